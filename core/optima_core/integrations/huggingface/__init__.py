"""Models of transformers, distilled layer by layer without naming a path. Needs the extra `hf`.

student, teacher = TransformersAdaptor(small), TransformersAdaptor(large)
pairs = pair_modules(student, teacher, batch)
Distiller(small, TransformersForward(student), TransformersForward(teacher), pairs, load, batch, DistillerConfig())
"""

from typing import TYPE_CHECKING

from optima_core.lazily import attributes_from

if TYPE_CHECKING:
    from optima_core.integrations.huggingface.adaptor import TransformersAdaptor
    from optima_core.integrations.huggingface.forward import TransformersForward
    from optima_core.integrations.huggingface.modules import find_modules
    from optima_core.integrations.huggingface.pairs import pair_modules
else:
    __getattr__ = attributes_from(
        __name__,
        adaptor=("TransformersAdaptor",),
        forward=("TransformersForward",),
        modules=("find_modules",),
        pairs=("pair_modules",),
    )

__all__ = ["TransformersAdaptor", "TransformersForward", "find_modules", "pair_modules"]
