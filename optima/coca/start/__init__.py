"""A student's weights from its teacher's: by truncation, or by projection onto the teacher's principal components.

Layers follow the layer map of distillation. Both copy what has equal shapes as it is, so that a student of the
teacher's widths starts with exactly the teacher's layers.

`truncate_teacher` takes the leading features, heads and hidden units of everything else.

`project_teacher` looks at what the teacher does with a batch, and learns nothing:

- The residual stream of width D_t is replaced by its D_s - 1 strongest directions (eigenvectors of its second moment).
  All readers of a stream are layer norms, which ignore the mean over features; so the directions are put into the
  mean-free part of the student's features, where a rotation commutes with a layer norm. Gains and offsets of norms move
  into the matrices behind them, scaled by what the stream has lost of its length. (The idea of rotating a stream under
  its norms is that of SliceGPT, Ashkboos et al., arXiv 2401.15024, for RMS norms and one rotation a layer.)
- The heads that contribute most stay. Where they are narrower, queries and keys are the best approximation of the
  teacher's scores of that rank, values and outputs of what the head writes, both over the batch's second moments.
- The hidden units of an MLP that contribute most stay; the mean of those that go moves into the bias.

With the teacher's own widths all of that is exact up to rounding, but for a norm of a normed state (the image tokens
under a pooler, the states under a task's head), where a gain between two norms has no exact counterpart.
"""

from optima.coca.start.project import project_teacher
from optima.coca.start.truncate import truncate_teacher

__all__ = ["project_teacher", "truncate_teacher"]
