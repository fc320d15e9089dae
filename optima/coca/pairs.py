"""How the modules of two CoCa models correspond."""

from collections.abc import Mapping, Sequence

from optima.coca.config import MODULES
from optima.coca.model import CoCa
from optima_core.modules import ModulePair


def module_pairs(
    student: CoCa,
    teacher: CoCa,
    layer_map: str | Mapping[str, Sequence[int]] = "uniform",
    single_layer_maps: bool = False,
) -> tuple[ModulePair, ...]:
    """The three modules with both models' depths and widths.

    layer_map: that of `ModulePair` for all modules; or by module the teacher layers, those left out being "uniform".
    single_layer_maps: whether the attention maps of a student's only layer are compared with those of a deeper module,
        whose layer attends to what layers before it made: it costs up to 16 points (bench/COMPARE.md).

    Raises ValueError if a module of the student is deeper than the teacher's, or if the two cut an image into
    different numbers of tokens, so that their states and attention maps cannot be compared.
    """
    image_tokens = [
        (
            model.config.image_encoder.image_size // model.config.image_encoder.patch_size,
            model.config.image_encoder.pooler_queries,
        )
        for model in (student, teacher)
    ]
    if image_tokens[0] != image_tokens[1]:
        (our_side, our_queries), (their_side, their_queries) = image_tokens
        raise ValueError(
            f"the student has {our_side} x {our_side} patches and {our_queries} pooler queries, the teacher "
            f"{their_side} x {their_side} and {their_queries}; both must be equal"
        )
    unknown = set() if isinstance(layer_map, str) else set(layer_map) - set(MODULES)
    if unknown:
        raise ValueError(f"layer_map names the module {min(unknown)!r}; there are {', '.join(MODULES)}")
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
                layer_map=layer_map if isinstance(layer_map, str) else layer_map.get(name, "uniform"),
                maps=single_layer_maps or ours.layers > 1 or theirs.layers == 1,
            )
        )
    return tuple(pairs)
