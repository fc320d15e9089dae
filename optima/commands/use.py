"""The commands `caption` and `answer`: what a run's student says of one's own pictures."""

from optima.commands.options import AnswerConfig, CaptionConfig
from optima.runs.student import load_student
from optima_core.errors import OptimaError


def run_caption(config: CaptionConfig) -> None:
    """Prints a line a picture."""
    if not config.picture:
        raise OptimaError("no picture given: `caption picture.png --run runs/distill`")
    captions = load_student(config.run, config.device).caption(config.picture, config.generation)
    for path, caption in zip(config.picture, captions, strict=True):
        print(f"{path}: {caption}")


def run_answer(config: AnswerConfig) -> None:
    """Prints a line an answer."""
    answers = load_student(config.run, config.device).answer(config.text, config.picture)
    for answer, probability in list(answers.items())[: config.show]:
        print(f"{answer}  {100 * probability:.1f} %")
