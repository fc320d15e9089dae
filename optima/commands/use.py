"""The commands `caption` and `answer`: what a run's student says of one's own images."""

import warnings

from optima.commands.options import AnswerConfig, CaptionConfig
from optima.runs.confidence import UNUSUAL
from optima.runs.student import load_student
from optima_core.errors import OptimaError


def run_caption(config: CaptionConfig) -> None:
    """Prints a line an image, and warns of those whose captions the student is less sure of than it usually is."""
    if not config.image:
        raise OptimaError("no image given: `caption image.png --run runs/distill`")
    student = load_student(config.run, config.device)
    captions, usual = student.probable_captions(config.image, config.generation), student.words.usual or 0.0
    unsure = []
    for path, (caption, probability) in zip(config.image, captions, strict=True):
        print(f"{path}: {caption}  {100 * probability:.0f} %")
        if probability < usual:
            unsure.append(str(path))
    if unsure:
        warnings.warn(
            f"the student is less sure of {', '.join(unsure)} than of {1 - UNUSUAL:.0%} of images like those it was "
            f"trained on ({100 * usual:.0f} %): the caption may be wrong, or the image of another kind",
            stacklevel=2,
        )


def run_answer(config: AnswerConfig) -> None:
    """Prints a line an answer."""
    answers = load_student(config.run, config.device).answer(config.text, config.image)
    for answer, probability in list(answers.items())[: config.show]:
        print(f"{answer}  {100 * probability:.1f} %")
