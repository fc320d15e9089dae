"""The commands `caption` and `answer`: what a run's student says of one's own images."""

from optima.commands.options import AnswerConfig, CaptionConfig
from optima.runs.student import load_student
from optima_core.errors import OptimaError


def run_caption(config: CaptionConfig) -> None:
    """Prints a line an image."""
    if not config.image:
        raise OptimaError("no image given: `caption image.png --run runs/distill`")
    captions = load_student(config.run, config.device).caption(config.image, config.generation)
    for path, caption in zip(config.image, captions, strict=True):
        print(f"{path}: {caption}")


def run_answer(config: AnswerConfig) -> None:
    """Prints a line an answer."""
    answers = load_student(config.run, config.device).answer(config.text, config.image)
    for answer, probability in list(answers.items())[: config.show]:
        print(f"{answer}  {100 * probability:.1f} %")
