"""Held-out combinations stay held out, and nothing is missing from training."""

from optima.data.pictograms import KINDS, SPLITS, Pictograms, Scene
from optima.task import TASKS


def combination(scene: Scene) -> tuple[int, ...] | frozenset[int]:
    kinds = frozenset(thing.kind for thing in scene.things)
    return kinds if len(kinds) == 2 else (scene.things[0].kind, len(scene.things))


def shown(split: str, seed: int, items: int) -> set[tuple[int, ...] | frozenset[int]]:
    images = Pictograms(split, seed) if split == "train" else Pictograms(split, seed, size=items)
    scenes = [images.scene(index) for index in range(items)]
    for task in TASKS:
        scenes += [scene for index in range(items) for scene in images.example(task, index).scenes]
    return {combination(scene) for scene in scenes}


def test_no_combination_occurs_in_two_splits(seed: int) -> None:
    train, validation, test = (shown(split, seed, 600) for split in SPLITS)
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_training_images_keep_to_the_training_combinations(seed: int) -> None:
    held_out = shown("validation", seed, 500) | shown("test", seed, 500)
    images = Pictograms("train", seed)
    assert not {combination(images.scene(index)) for index in range(2000)} & held_out


def test_one_combination_in_ten_is_held_out_for_each_split(seed: int) -> None:
    everything = len(KINDS) * 4 + len(KINDS) * (len(KINDS) - 1) // 2
    for split in ("validation", "test"):
        assert 0.08 < len(shown(split, seed, 1000)) / everything < 0.12


def test_every_kind_stands_alone_in_training_and_beside_another_in_each_split(seed: int) -> None:
    train = shown("train", seed, 600)
    assert {c[0] for c in train if isinstance(c, tuple)} == set(range(len(KINDS)))
    for split in SPLITS:
        pairs = [c for c in shown(split, seed, 600) if isinstance(c, frozenset)]
        assert set().union(*pairs) == set(range(len(KINDS)))
