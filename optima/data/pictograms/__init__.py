"""Pictograms: a small world of emoji, generated from a seed, with ground truth for four vision-language tasks.

    >>> from optima.data.pictograms import Pictograms
    >>> Pictograms("test").example("captioning", 0).text  # doctest: +SKIP
    'two pizzas to the right of a dog'

`stream` is the data set; `scene` and `render` make images; `captions`, `questions`, `hypotheses` and `statements`
are the four tasks' languages and truths; `combinations` keeps the splits apart.
"""

from optima.data.pictograms.captions import Description, describes, parse_caption, references
from optima.data.pictograms.combinations import SPLITS, Split
from optima.data.pictograms.hypotheses import snli_ve
from optima.data.pictograms.kinds import KINDS
from optima.data.pictograms.questions import ANSWERS, vqa
from optima.data.pictograms.render import render
from optima.data.pictograms.scene import Scene
from optima.data.pictograms.statements import nlvr2
from optima.data.pictograms.stream import (
    CLASSES,
    Batch,
    Example,
    Pictograms,
    TrainingBatch,
    collate,
    training_pair_items,
    training_scene_items,
)

__all__ = [
    "ANSWERS",
    "CLASSES",
    "KINDS",
    "SPLITS",
    "Batch",
    "Description",
    "Example",
    "Pictograms",
    "Scene",
    "Split",
    "TrainingBatch",
    "collate",
    "describes",
    "nlvr2",
    "parse_caption",
    "references",
    "render",
    "snli_ve",
    "training_pair_items",
    "training_scene_items",
    "vqa",
]
