"""Whether two sets of records, and the batches of two loaders, are the same."""

import torch

from optima.data.config import LoaderConfig, TransformConfig
from optima.data.loader import Loader, make_loader
from optima.data.record import Records

SMALL = TransformConfig(image_size=32)


def loader_of(records: Records, *, workers: int = 0, share: float = 0.01, **options: object) -> Loader:
    config = LoaderConfig(engine="torch", workers=workers, transform=SMALL, max_rejected=share)
    return make_loader(records, config, batch_size=4, seed=5, **options)  # type: ignore[arg-type]


def batches_of(records: Records, steps: int = 12, **options: object) -> list[list[torch.Tensor]]:
    with loader_of(records, **options) as loader:  # type: ignore[arg-type]
        return [list(loader.load(step)) for step in range(steps)]


def assert_same(found: Records, expected: Records) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found.items, expected.items, strict=True):
        assert (ours.id, ours.texts, ours.target, ours.answers) == (
            theirs.id, theirs.texts, theirs.target, theirs.answers,
        )  # fmt: skip
        assert [source.read() for source in ours.images] == [source.read() for source in theirs.images]
    assert (found.task, found.classes, found.left_out) == (expected.task, expected.classes, expected.left_out)
    assert [vars(lost) for lost in found.rejected] == [vars(lost) for lost in expected.rejected]


def assert_equal_batches(found: list[list[torch.Tensor]], expected: list[list[torch.Tensor]]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
