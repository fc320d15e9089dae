"""Which teacher layer a student layer learns from."""

import pytest

from optima_core import ModulePair


def pair(students: int, teachers: int, layer_map: object = "uniform", name: str = "encoder") -> ModulePair:
    return ModulePair(name, students, teachers, 8, 16, layer_map)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("students", "teachers", "expected"),
    [(1, 5, (4,)), (2, 4, (1, 3)), (3, 6, (1, 3, 5)), (3, 5, (0, 2, 4)), (4, 4, (0, 1, 2, 3))],
)
def test_uniform_map_spreads_the_layers_and_ends_at_the_last(
    students: int, teachers: int, expected: tuple[int, ...]
) -> None:
    assert pair(students, teachers).teacher_layer_of() == expected


def test_uniform_map_ascends_without_repeats_whatever_the_depths() -> None:
    for teachers in range(1, 30):
        for students in range(1, teachers + 1):
            layers = pair(students, teachers).teacher_layer_of()
            assert len(layers) == students
            assert list(layers) == sorted(set(layers))
            assert 0 <= layers[0] <= layers[-1] == teachers - 1


def test_last_map_takes_the_last_layers() -> None:
    assert pair(2, 5, "last").teacher_layer_of() == (3, 4)


def test_an_explicit_map_is_taken_as_it_is_even_with_repeats() -> None:
    assert pair(3, 5, [0, 4, 4]).teacher_layer_of() == (0, 4, 4)


@pytest.mark.parametrize(
    ("students", "teachers", "layer_map", "name", "complaint"),
    [
        (3, 2, "uniform", "encoder", "3 student layers cannot learn from 2"),
        (0, 2, "uniform", "encoder", "0 student layers"),
        (1, 2, "first", "encoder", "unknown layer_map 'first'"),
        (2, 4, [1], "encoder", r"layer_map \[1\]"),
        (2, 4, [1, 4], "encoder", r"0\.\.3"),
        (1, 2, "last", "image.encoder", "'image.encoder'"),
        (1, 2, "last", "image/encoder", "'image/encoder'"),
        (1, 2, "last", "", "''"),
    ],
)
def test_what_does_not_fit_is_refused(
    students: int, teachers: int, layer_map: object, name: str, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        pair(students, teachers, layer_map, name)
