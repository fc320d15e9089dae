"""Caption scores, against the reference evaluation: its figures on file, and itself where it is installed."""

import contextlib
import io
import json
import random
from pathlib import Path

import numpy as np
import pytest

from optima.metrics import bleu, caption_scores, cider_d, rouge_l, tokenize

GOLDEN = json.loads((Path(__file__).with_name("golden") / "captions.json").read_text(encoding="utf-8"))


def golden_means() -> np.ndarray:
    return np.array([*GOLDEN["bleu"], GOLDEN["rouge_l"][0], GOLDEN["cider_d"][0]])


def test_scores_on_the_reference_tokens_are_the_references() -> None:
    said = [tokens.split() for tokens in GOLDEN["candidate_tokens"]]
    truths = [[tokens.split() for tokens in texts] for texts in GOLDEN["reference_tokens"]]
    found = caption_scores(said, truths)
    np.testing.assert_allclose(found.bleu, GOLDEN["bleu"], rtol=1e-6)
    np.testing.assert_allclose(found.rouge_l, GOLDEN["rouge_l"][1:], rtol=1e-6)
    np.testing.assert_allclose(found.cider_d, GOLDEN["cider_d"][1:], rtol=1e-6, atol=1e-9)


def test_scores_from_end_to_end_without_java_are_within_half_a_percent() -> None:
    said = [tokenize(text) for text in GOLDEN["candidates"]]
    truths = [[tokenize(text) for text in texts] for texts in GOLDEN["references"]]
    found = caption_scores(said, truths)
    ours = [*found.bleu, found.rouge_l.mean(), found.cider_d.mean()]
    np.testing.assert_allclose(ours, golden_means(), rtol=5e-3)


@pytest.mark.parametrize("vocabulary", [3, 12, 200])
def test_random_captions_score_as_pycocoevalcap_says(seed: int, vocabulary: int) -> None:
    reason = "pycocoevalcap is the oracle: pip install --no-deps pycocoevalcap==1.2"
    scorers = pytest.importorskip("pycocoevalcap.bleu.bleu", reason=reason)
    rouge = pytest.importorskip("pycocoevalcap.rouge.rouge", reason=reason)
    cider = pytest.importorskip("pycocoevalcap.cider.cider", reason=reason)
    draw = random.Random(seed)

    def caption(least: int) -> list[str]:
        return [f"w{draw.randrange(vocabulary)}" for _ in range(draw.randint(least, 12))]

    said = [caption(0) for _ in range(30)]
    truths = [[caption(1) for _ in range(draw.randint(1, 6))] for _ in said]
    theirs_said = {i: [" ".join(words)] for i, words in enumerate(said)}
    theirs_truths = {i: [" ".join(words) for words in texts] for i, texts in enumerate(truths)}
    with contextlib.redirect_stdout(io.StringIO()):
        expected_bleu, _ = scorers.Bleu(4).compute_score(theirs_truths, theirs_said, 0)
        _, expected_rouge = rouge.Rouge().compute_score(theirs_truths, theirs_said)
        _, expected_cider = cider.Cider().compute_score(theirs_truths, theirs_said)
    np.testing.assert_allclose(bleu(said, truths), expected_bleu, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(rouge_l(said, truths), expected_rouge, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(cider_d(said, truths), expected_cider, rtol=1e-6, atol=1e-9)


def test_a_caption_that_is_its_reference_scores_everything_and_another_items_nothing() -> None:
    truths = [[f"{word} on a {word} mat".split()] for word in ("cat", "dog", "owl")]
    right = caption_scores([texts[0] for texts in truths], truths)
    assert right.bleu == pytest.approx((1, 1, 1, 1))
    assert right.rouge_l == pytest.approx([1, 1, 1])
    assert right.cider_d == pytest.approx([10, 10, 10])
    wrong = caption_scores([["x", "y", "z"]] * 3, truths)
    assert max(wrong.bleu) < 1e-3
    assert not wrong.rouge_l.any()
    assert not wrong.cider_d.any()


def test_captions_without_references_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one reference"):
        caption_scores([["a"], ["b"]], [[["a"]], []])
    with pytest.raises(ValueError, match="got 1 for 2 items"):
        caption_scores([["a"]], [[["a"]], [["b"]]])
