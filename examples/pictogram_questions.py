"""A vision-language student of transformers' own classes, SmolVLM, distilled on questions about pictograms.

A small random SmolVLM of 4 + 4 layers learns to answer; students of 2 + 2 of its layers then learn from it, over three
seeds: by its answers alone, and by the layers of its vision tower and language model as well, all at once or as the
bandit chooses. What counts is the held-out loss of the answers.

    python examples/pictogram_questions.py
"""

import argparse
import copy
import statistics
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

from optima.data.pictograms import ANSWERS, Pictograms
from optima.data.tokenizer import word_tokenizer
from optima_core import BanditConfig, Distiller, DistillerConfig, ObjectiveConfig, OptimiserConfig
from optima_core.integrations.huggingface import TransformersAdaptor, TransformersForward, pair_modules

WORDS = word_tokenizer()
IMAGE = WORDS.vocab_size + len(ANSWERS)
"""The word that stands for a piece of the image, behind those of questions and answers."""
PIECES, LENGTH = 16, 12
MODULES = ("vision", "language")


def make_model(layers: int) -> SmolVLMForConditionalGeneration:
    sizes = {"num_hidden_layers": layers, "num_attention_heads": 4}
    vision = {**sizes, "hidden_size": 64, "intermediate_size": 128, "image_size": 64, "patch_size": 8}
    text = {"model_type": "llama", **sizes, "hidden_size": 96, "intermediate_size": 192, "num_key_value_heads": 2}
    text |= {"vocab_size": IMAGE + 1, "pad_token_id": WORDS.pad_id}
    return SmolVLMForConditionalGeneration(
        SmolVLMConfig(vision_config=vision, text_config=text, scale_factor=2, image_token_id=IMAGE, pad_token_id=0)
    )


def load(split: str, start: int, size: int) -> dict[str, Tensor]:
    """Images, then questions, then the answer as one word: the only one that has a label."""
    batch = Pictograms(split).batch("vqa", start, size)
    questions = WORDS.encode(list(batch.texts), LENGTH)[:, 1:]
    answers = WORDS.vocab_size + batch.targets[:, None]
    ids = torch.cat([torch.full((size, PIECES), IMAGE), questions, answers], dim=1)
    labels = torch.full_like(ids, -100)
    labels[:, -1] = ids[:, -1]
    valid = (ids != WORDS.pad_id).long()
    return {
        "input_ids": ids,
        "attention_mask": valid,
        "labels": labels,
        "pixel_values": batch.images.float() / 127.5 - 1,
    }


@torch.no_grad()
def score(model: nn.Module, held: dict[str, Tensor]) -> tuple[float, float]:
    """Held-out loss of the answers, and the share that is right."""
    output = model.eval()(**held)
    right = output.logits[:, -2].argmax(-1) == held["input_ids"][:, -1]
    return float(output.loss), float(right.float().mean())


def train_teacher(steps: int, batch: int) -> nn.Module:
    torch.manual_seed(0)
    model = make_model(4)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=steps)
    for step in range(steps):
        model.train()(**load("train", step * batch, batch)).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
    return model.eval()


def cut_out(teacher: nn.Module) -> nn.Module:
    """The teacher with every second layer."""
    student, other = make_model(2), copy.deepcopy(teacher.state_dict())
    for name in list(other):
        head, _, rest = name.partition(".layers.")
        if rest:
            layer, _, part = rest.partition(".")
            value = other.pop(name)
            if int(layer) % 2:
                other[f"{head}.layers.{int(layer) // 2}.{part}"] = value
    student.load_state_dict(other)
    return student


def ways(rounds: int) -> Iterator[tuple[str, DistillerConfig]]:
    optimiser = OptimiserConfig(learning_rate=1e-3)
    for name, layers, policy in (
        ("answers alone", 0.0, "all_modules"),
        ("all layers", 1.0, "all_modules"),
        ("layers, chosen", 2.0, "discounted_thompson"),
    ):
        objective = ObjectiveConfig(hidden=layers, attention=layers)
        yield name, DistillerConfig(rounds, 10, objective=objective, optimiser=optimiser, bandit=BanditConfig(policy))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("teacher_steps", 1500), ("rounds", 20), ("batch", 32), ("seeds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options, started = parser.parse_args(), time.perf_counter()
    torch.set_num_threads(1)
    teacher, held, size = train_teacher(options.teacher_steps, options.batch), load("test", 0, 500), options.batch
    print("teacher               loss {:.3f}  right {:.1%}".format(*score(teacher, held)), flush=True)
    print("student as cut out    loss {:.3f}  right {:.1%}".format(*score(cut_out(teacher), held)), flush=True)
    for name, config in ways(options.rounds):
        found = []
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            first = 10**6 + seed * 10**5
            student = cut_out(teacher)
            ours, theirs = TransformersAdaptor(student), TransformersAdaptor(teacher)
            probe = load("validation", 0, 64)
            pairs = pair_modules(ours, theirs, probe, names=MODULES)
            forwards = TransformersForward(ours), TransformersForward(theirs)
            engine = Distiller(
                student.train(), *forwards, pairs, lambda i, first=first: load("train", first + i * size, size), probe,
                config, seed,
            )  # fmt: skip
            for _ in range(config.rounds):
                engine.run_round()
            found.append(score(student, held))
        losses, right = zip(*found, strict=True)
        told = ", ".join(f"{loss:.3f}" for loss in losses)
        print(f"{name:20}  loss {statistics.mean(losses):.3f} ({told})  right {statistics.mean(right):.1%}", flush=True)
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
