"""Which parts of the models are distilled, and which teacher layer each student layer learns from."""

from collections.abc import Sequence
from dataclasses import dataclass

LAYER_MAPS = ("uniform", "last")


@dataclass(frozen=True)
class ModulePair:
    """One module of both models: an arm of the bandit.

    Attributes:
        name: The module's name, the same in the taps of teacher and student, without "." and "/".
        student_layers: Number of layers of the student's module.
        teacher_layers: Number of layers of the teacher's module, at least as many.
        student_width: Width of the student's hidden states.
        teacher_width: Width of the teacher's hidden states.
        layer_map: "uniform" spreads the student's layers over the teacher's so that the last meets the last; "last"
            pairs the student with the teacher's last layers; a sequence names the teacher layer (from 0) of each
            student layer.
        maps: Whether attention maps are compared; hidden states always are.
    """

    name: str
    student_layers: int
    teacher_layers: int
    student_width: int
    teacher_width: int
    layer_map: str | Sequence[int] = "uniform"
    maps: bool = True

    def __post_init__(self) -> None:
        if not self.name or set(self.name) & set("./"):
            raise ValueError(f"a module's name must not be empty nor contain '.' or '/', got {self.name!r}")
        self.teacher_layer_of()

    def teacher_layer_of(self) -> tuple[int, ...]:
        """The teacher layer that each student layer learns from.

        Raises ValueError if the map does not fit the layers.
        """
        students, teachers = self.student_layers, self.teacher_layers
        if not 1 <= students <= teachers:
            raise ValueError(
                f"module {self.name}: {students} student layers cannot learn from {teachers} teacher layers"
            )
        if self.layer_map == "uniform":
            return tuple((i + 1) * teachers // students - 1 for i in range(students))
        if self.layer_map == "last":
            return tuple(range(teachers - students, teachers))
        if isinstance(self.layer_map, str):
            raise ValueError(
                f"module {self.name}: unknown layer_map {self.layer_map!r}; give one of {LAYER_MAPS} or a list"
            )
        chosen = tuple(self.layer_map)
        if len(chosen) != students or any(not 0 <= layer < teachers for layer in chosen):
            raise ValueError(
                f"module {self.name}: layer_map {list(chosen)} must name one teacher layer 0..{teachers - 1} "
                f"for each of the {students} student layers"
            )
        return chosen
