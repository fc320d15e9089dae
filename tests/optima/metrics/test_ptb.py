"""The words of captions, against what the Java tokenizer of COCO's evaluation made of them."""

import json
from pathlib import Path

import pytest

from optima.metrics import tokenize

GOLDEN = json.loads((Path(__file__).with_name("golden") / "captions.json").read_text(encoding="utf-8"))


def test_odd_captions_are_cut_as_the_java_tokenizer_cuts_them() -> None:
    pairs = list(zip(GOLDEN["candidates"], GOLDEN["candidate_tokens"], strict=True))
    for texts, tokens in zip(GOLDEN["references"], GOLDEN["reference_tokens"], strict=True):
        pairs += zip(texts, tokens, strict=True)
    assert len(pairs) == 400
    assert {text: tokenize(text) for text, _ in pairs} == {text: tokens.split() for text, tokens in pairs}


@pytest.mark.parametrize(
    ("caption", "words"),
    [  # each as CoreNLP 3.4.1 cuts it
        ("John O'Brien's c'mon y'all's ma'am", "john o'brien 's c'mon y' all 's ma'am"),
        ("gonna can't cannot lemme 'tis", "gon na ca n't can not lem me 't is"),
        ("12:30 10:4 555-1234 1-800-555-1234", "12:30 10:4 555-1234 1-800-555-1234"),
        ("(555) 123-4567 (5)", "-lrb-555-rrb- 123-4567 -lrb- 5 -rrb-"),
        ("[bracket] {brace} <tag> &amp; AT&T x&y", "-lsb- bracket -rsb- -lcb- brace -rcb- <tag> & at&t x & y"),
        ("£3 €4 ¢ ½ ¾ it’s ‘so’ “it” – — …", "# 3 $ 4 cents 1/2 3/4 it 's so it"),
        ("no. one is No. 5 in a.m. U.S.A. etc.", "no one is no. 5 in a.m. u.s.a. etc."),
        ("me@x.com www.site.com #tag @home ^_^ :-) !!! ?!", "me@x.com www.site.com #tag @home ^_^ :--rrb- !!! ?!"),
        ("5'10\" '90s 50's mid-1990s a_b a--b two- -5 --5", "5 10 '90s 50 's mid-1990s a_b a b two -5 5"),
        ("", ""),
        ("... ?", ""),
    ],
)
def test_what_captions_seldom_hold(caption: str, words: str) -> None:
    assert tokenize(caption) == words.split()
