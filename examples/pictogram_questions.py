"""A vision-language model of transformers' own classes, a LLaVA, distilled on questions about pictograms.

The teacher's vision tower is the image encoder of the shipped teacher, 5 layers of CLIP's kind; on it a small Llama of
4 layers learns to answer. Students of 2 + 2 layers start from layers of the teacher that a seed draws, and learn from
it: by its answers alone, or by the layers of its vision tower and language model as well, all at once or as the bandit
chooses. What counts is the held-out loss of the answers, on combinations of things that training never shows.

    python examples/pictogram_questions.py --seeds 0 1 2
"""

import argparse
import statistics
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from optima.assets import TEACHER
from optima.coca.checkpoint import load_coca
from optima.data.pictograms import ANSWERS, Pictograms
from optima.data.tokenizer import word_tokenizer
from optima_core import BanditConfig, Distiller, DistillerConfig, ObjectiveConfig, OptimiserConfig
from optima_core.integrations.huggingface import TransformersAdaptor, TransformersForward, pair_modules

TOKENIZER = word_tokenizer()
IMAGE = TOKENIZER.vocab_size + len(ANSWERS)
"""The word that stands for a patch of the image, behind those of questions and answers."""
PATCHES, LENGTH, WIDTH = 64, 12, 128
LAYERS = {"vision_tower": 5, "language_model": 4}
KEPT = 2
"""Layers of each that a student has."""


def make_model(vision_layers: int, language_layers: int) -> LlavaForConditionalGeneration:
    sizes = {"hidden_size": WIDTH, "num_attention_heads": 4}
    vision = {**sizes, "num_hidden_layers": vision_layers, "intermediate_size": 4 * WIDTH}
    vision |= {"model_type": "clip_vision_model", "image_size": 64, "patch_size": 8, "hidden_act": "gelu"}
    text = {**sizes, "num_hidden_layers": language_layers, "intermediate_size": 2 * WIDTH, "num_key_value_heads": 2}
    text |= {"model_type": "llama", "vocab_size": IMAGE + 1, "pad_token_id": TOKENIZER.pad_id}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config)


def load(split: str, start: int, size: int) -> dict[str, Tensor]:
    """Images, then questions, then the answer as one word: the only one that has a label."""
    batch = Pictograms(split).batch("vqa", start, size)
    questions = TOKENIZER.encode(list(batch.texts), LENGTH)[:, 1:]
    answers = TOKENIZER.vocab_size + batch.targets[:, None]
    ids = torch.cat([torch.full((size, PATCHES), IMAGE), questions, answers], dim=1)
    labels = torch.full_like(ids, -100)
    labels[:, -1] = ids[:, -1]
    valid = (ids != TOKENIZER.pad_id).long()
    return {
        "input_ids": ids,
        "attention_mask": valid,
        "labels": labels,
        "pixel_values": batch.images[:, 0].float() / 127.5 - 1,
    }


@torch.no_grad()
def score(model: nn.Module, held: list[dict[str, Tensor]]) -> tuple[float, float]:
    """Held-out loss of the answers, and the share that is right."""
    outputs = [model.eval()(**batch) for batch in held]
    right = [
        (output.logits[:, -2].argmax(-1) == batch["input_ids"][:, -1]).float().mean()
        for output, batch in zip(outputs, held, strict=True)
    ]
    return statistics.mean(float(output.loss) for output in outputs), statistics.mean(map(float, right))


def image_encoder() -> dict[str, Tensor]:
    """The weights of the shipped teacher's image encoder, by the names of CLIP's vision tower."""
    names = {
        "blocks": "encoder.layers",
        "norm_attention": "layer_norm1",
        "attention.out": "self_attn.out_proj",
        "norm_mlp": "layer_norm2",
        "mlp.0": "mlp.fc1",
        "mlp.2": "mlp.fc2",
        "class_token": "embeddings.class_embedding",
        "patch.weight": "embeddings.patch_embedding.weight",
        "position": "embeddings.position_embedding.weight",
        "norm_input": "pre_layrnorm",
        "norm_output": "post_layernorm",
    }
    found = {}
    for name, value in load_coca(TEACHER).image_encoder.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if "attention.qkv" in name:
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                found[name.replace("attention.qkv", f"self_attn.{part}_proj")] = rows
        elif name != "projection":
            found[name] = value
    return found


def train_teacher(steps: int, batch: int, bf16: bool) -> nn.Module:
    """Its vision tower stays as it is; projector and language model learn."""
    torch.manual_seed(0)
    model = make_model(*LAYERS.values())
    tower = model.model.vision_tower
    getattr(tower, "vision_model", tower).load_state_dict(image_encoder())
    tower.requires_grad_(False)
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model.train()(**load("train", step * batch, batch)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
    return model.eval()


def cut_out(teacher: nn.Module, seed: int) -> nn.Module:
    """A student of the teacher's layers, which the seed draws; their order stays."""
    torch.manual_seed(seed)
    student, weights = make_model(KEPT, KEPT), {}
    drawn = {part: torch.randperm(layers)[:KEPT].sort().values.tolist() for part, layers in LAYERS.items()}
    for name, value in teacher.state_dict().items():
        head, _, rest = name.partition(".layers.")
        if not rest:
            weights[name] = value
            continue
        number, _, inner = rest.partition(".")
        layers = drawn["vision_tower" if "vision_tower" in head else "language_model"]
        if int(number) in layers:
            weights[f"{head}.layers.{layers.index(int(number))}.{inner}"] = value
    student.load_state_dict(weights)
    return student


def distil(teacher: nn.Module, seed: int, config: DistillerConfig, size: int) -> nn.Module:
    student = cut_out(teacher, seed)
    ours, theirs = TransformersAdaptor(student), TransformersAdaptor(teacher)
    probe, first = load("validation", 0, 2 * size), 10**6 * (seed + 1)
    pairs = pair_modules(ours, theirs, probe, names=("vision", "language"))
    forwards = TransformersForward(ours), TransformersForward(theirs)

    def batch(number: int) -> dict[str, Tensor]:
        return load("train", first + number * size, size)

    engine = Distiller(student.train(), *forwards, pairs, batch, probe, config, seed)
    for _ in range(config.rounds):
        engine.run_round()
    return student


def ways(rounds: int, bf16: bool) -> Iterator[tuple[str, DistillerConfig]]:
    shared = {"optimiser": OptimiserConfig(learning_rate=1e-3), "precision": "bf16" if bf16 else "fp32"}
    for name, layers, policy in (
        ("answers alone", 0.0, "all_modules"),
        ("all layers", 1.0, "all_modules"),
        ("layers, chosen", 1.0, "discounted_thompson"),
    ):
        objective = ObjectiveConfig(hidden=layers, attention=layers)
        yield name, DistillerConfig(rounds, 10, objective=objective, bandit=BanditConfig(policy), **shared)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("teacher_steps", 600), ("rounds", 15), ("batch", 32), ("held", 500)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--bf16", action="store_true", help="arithmetic of training, for CPUs that have it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = min(100, options.held)
    held = [load("test", start, size) for start in range(0, options.held, size)]

    def show(name: str, model: nn.Module) -> tuple[float, float]:
        found = score(model, held)
        print("{:26}  loss {:.3f}  right {:.1%}  {:.0f} s".format(name, *found, time.process_time()), flush=True)
        return found

    teacher = train_teacher(options.teacher_steps, options.batch, options.bf16)
    show("teacher", teacher)
    for seed in options.seeds:
        show(f"as cut out, seed {seed}", cut_out(teacher, seed))
    for name, config in ways(options.rounds, options.bf16):
        found = [show(f"{name}, seed {seed}", distil(teacher, seed, config, options.batch)) for seed in options.seeds]
        loss, right = (statistics.mean(values) for values in zip(*found, strict=True))
        print(f"{name + ', mean':26}  loss {loss:.3f}  right {right:.1%}", flush=True)


if __name__ == "__main__":
    main()
