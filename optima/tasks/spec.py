"""What is fixed about each task: its classes, its pictures, and the score it is judged by."""

from optima.coca import HeadSpec
from optima.data.pictograms.stream import CLASSES, TASKS, Task

PICTURE_SIZE = 64
"""Side of the square pictures, pixels."""

TEXT_LENGTH = 14
"""Tokens in a row of text, start and end included; the longest pictogram text takes fewer."""

HEADS: dict[str, HeadSpec] = {
    task: HeadSpec(len(CLASSES[task]), pictures=2 if task == "nlvr2" else 1) for task in TASKS if CLASSES[task]
}
"""The classification heads of a CoCa that does all four tasks."""

HEADLINE: dict[Task, str] = {
    "captioning": "scene_accuracy",
    "vqa": "accuracy",
    "nlvr2": "accuracy",
    "snli_ve": "accuracy",
}
"""The score that a task is judged by, in percent."""

__all__ = ["HEADLINE", "HEADS", "PICTURE_SIZE", "TASKS", "TEXT_LENGTH", "Task"]
