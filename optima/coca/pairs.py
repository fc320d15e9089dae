"""How the modules of two CoCa models correspond."""

from collections.abc import Sequence

from optima.coca.model import MODULES, CoCa
from optima_core.modules import ModulePair


def module_pairs(student: CoCa, teacher: CoCa, layer_map: str | Sequence[int] = "uniform") -> tuple[ModulePair, ...]:
    """The three modules with both models' depths and widths.

    Raises ValueError if a module of the student is deeper than the teacher's.
    """
    pairs = []
    for name in MODULES:
        ours, theirs = getattr(student.config, name), getattr(teacher.config, name)
        pairs.append(
            ModulePair(
                name=name,
                student_layers=ours.layers,
                teacher_layers=theirs.layers,
                student_width=ours.width,
                teacher_width=theirs.width,
                layer_map=layer_map,
            )
        )
    return tuple(pairs)
