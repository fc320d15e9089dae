"""VQA answers: the reference evaluator's normalisation, its oddities included, and the vocabulary."""

import pytest

from optima.data.answers import agreed_answer, answer_vocabulary, normalise_answer


@pytest.mark.parametrize(
    ("answer", "normalised"),
    [
        ("Yes.", "yes"),
        ("two", "2"),
        ("None", "0"),
        ("The red  one", "red 1"),
        ("dont know", "don't know"),
        ("she'dve gone", "she'd've gone"),
        ("youd've", "you'd've"),
        ("somebody'd", "somebodyd"),
        ("t-shirt", "t shirt"),
        ("salt - pepper", "salt pepper"),
        ("1,000 t-shirts", "1000 tshirts"),
        ("10:30 a.m.", "10:30 am"),
        ("1.5", "1.5"),
        ("a\nb\tc", "b c"),
        ("its", "its"),
    ],
)
def test_answers_are_compared_as_the_reference_evaluator_does(answer: str, normalised: str) -> None:
    assert normalise_answer(answer) == normalised


def test_the_33rd_period_stays_as_in_the_reference_evaluator() -> None:
    assert normalise_answer("." * 40) == "." * 8


def test_the_vocabulary_holds_the_most_frequent_normalised_answers() -> None:
    said = ["Yes", "yes.", "yes", "two", "2", "cat", "cat", "the"]
    assert answer_vocabulary(said, 2) == ("yes", "2")
    assert answer_vocabulary(said, 10) == ("yes", "2", "cat")


def test_the_class_is_the_answer_of_most_annotators_within_the_vocabulary() -> None:
    vocabulary = {"yes": 0, "no": 1}
    assert agreed_answer(["maybe"] * 6 + ["No."] * 3 + ["yes"], vocabulary) == 1
    assert agreed_answer(["no", "yes"], vocabulary) == 0
    assert agreed_answer(["maybe"], vocabulary) == -1
