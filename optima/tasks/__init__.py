"""The four tasks: what a head looks like, what a model shows the objective, and how predictions are scored."""

from optima.tasks.spec import HEADLINE, HEADS, PICTURE_SIZE, TASKS, TEXT_LENGTH, Task

__all__ = ["HEADLINE", "HEADS", "PICTURE_SIZE", "TASKS", "TEXT_LENGTH", "Task"]
