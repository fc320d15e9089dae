"""The whole corpus, and what made fuzzers stop, which has become part of it."""

from cases import Case
from found import found_cases
from image_cases import image_cases
from model_cases import model_cases
from setting_cases import setting_cases
from tar_cases import tar_cases
from text_cases import text_cases

CASES: tuple[Case, ...] = (
    *image_cases(),
    *text_cases(),
    *tar_cases(),
    *model_cases(),
    *setting_cases(),
    *found_cases(),
)
