"""Tiny models in place of the shipped ones, so that a whole run takes a second."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from optima.coca import CoCa, CoCaConfig, HeadSpec, ImageEncoderConfig, MultimodalDecoderConfig, TextDecoderConfig
from optima.coca.checkpoint import save_coca
from optima.data.tokenizer import word_tokenizer
from optima.tasks.pictograms import HEADS, IMAGE_SIZE, TEXT_LENGTH

MakeCoca = Callable[..., CoCa]


def _make_coca(
    width: int = 16,
    layers: int = 1,
    heads: dict[str, HeadSpec] | None = HEADS,
    *,
    vocab_size: int | None = None,
    image_size: int = IMAGE_SIZE,
    context_length: int = TEXT_LENGTH,
    pooler_queries: int = 0,
) -> CoCa:
    return CoCa(
        CoCaConfig(
            embed_dim=8,
            image_encoder=ImageEncoderConfig(image_size, 16, width, layers, 2, 2.0, pooler_queries, 2),
            text_decoder=TextDecoderConfig(
                vocab_size or word_tokenizer().vocab_size, context_length, width, layers, 2, 2.0
            ),
            multimodal_decoder=MultimodalDecoderConfig(width, layers, 2, 2.0),
        ),
        heads,
    ).eval()


@pytest.fixture(scope="session")
def make_coca() -> MakeCoca:
    """Makes a CoCa of random weights."""
    return _make_coca


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher with heads for all tasks."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("models") / "teacher.safetensors"
    save_coca(_make_coca(32, 2), path)
    return path


@pytest.fixture(scope="session")
def student_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tinier student start without heads."""
    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("models") / "student.safetensors"
    save_coca(_make_coca(16, 1, None), path)
    return path


@pytest.fixture
def brief(teacher_file: Path, student_file: Path) -> list[str]:
    """Options of a distillation that takes about a second; the run directory is the caller's."""
    return (
        f"--teacher {teacher_file} --student {student_file} --engine.rounds 4 --engine.steps_per_round 2 "
        "--batch_size 4 --probe_size 6 --evaluate_every 2 --evaluate_items 4 --test_items 20 --samples 4 "
        "--checkpoint_every 1 --threads 1 --quiet --engine.bandit.policy discounted_thompson"
    ).split()
