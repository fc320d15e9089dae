"""Makes golden/*.json from the reference evaluators; run once, needs Java and two packages that the tests do not.

python tests/optima/metrics/make_golden.py captions                   # pip install pycocoevalcap==1.2; Java on PATH
python tests/optima/metrics/make_golden.py vqa PATH/TO/vqaEval.py     # github.com/GT-Vision-Lab/VQA
"""

# ruff: noqa: SIM905

import contextlib
import io
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).with_name("golden")

WHO = (
    "A man|Two dogs|a young woman|The boy's dog|Several people|A black-and-white cat|A 3-year-old girl|"
    "An elderly couple|Someone's hand|The men's team|a T-shirt-clad teen|Three giraffes|A stop sign|"
    "Half-eaten pizza|A brown/white horse|The U.S. flag|Mr. Potato Head|A bride & groom|a guy (in red)|"
    "Kids' toys|A semi-truck|the Boeing 747|A tv/dvd combo|O'Hare's jet|A \"no parking\" sign|"
    "The 1950's car|Ms. Pac-Man game|A double-decker bus|the boys' bikes|A café"
).split("|")
DOES = (
    "is riding|isn't looking at|sitting on|can't reach|standing next to|is about to eat|walks by|"
    "are playing with|who's holding|lying in front of|that's parked near|has just hit|they're chasing|"
    "doesn't want|reads 'closed' above|hanging over|jumps over|pulls|with|w/ a view of|getting ready for|"
    "says \"hi\" to|eats at|'s flying over|won't touch"
).split("|")
WHAT = (
    "a surfboard|the couch|an 8-inch cake|a skateboard ramp|his mother's lap|a bunch of bananas|"
    "a fire hydrant|the train tracks|a laptop & mouse|tennis ball|5th Ave.|a red, white, and blue kite|"
    "the street (at night)|a plate of food; fries|a 1/2 eaten donut|Main St. and Elm|a wave in the ocean|"
    "the batter's box|a bathroom sink/toilet|rock 'n' roll posters|a pair of men's shoes|"
    "a vase of flowers...|grass -- lots of it|two teddy bears [plush]|the clock tower @ noon|the sea|"
    "a 20% off sign|$5 umbrellas|No. 7 bus|St. Patrick's parade|a hot-dog/burger stand|an e-mail|Wi-Fi router"
).split("|")
WHEN = (
    "|||.| .|!|...|, 1990s style.| at 5 p.m.|, e.g. in winter.| in the '60s| during the day?| :)|, etc.|"
    " at 12:30pm.| in 1,000 pieces| (see photo)| on 12/25/2012.| for $3.50.|; it's sunny.| - cute!| -- wow!!|"
    " & more| 😀| in São Paulo.| “quoted”.| — seen from afar| in NYC…| vs. the Red Sox| on the dog's bed.|"
    " while it’s raining.| near the 7-Eleven."
).split("|")


def sentence(draw: random.Random) -> str:
    """An odd caption."""
    text = f"{draw.choice(WHO)} {draw.choice(DOES)} {draw.choice(WHAT)}{draw.choice(WHEN)}"
    changed = draw.random()
    if changed < 0.05:
        return text.upper()
    return text.replace(" ", "  ", 1) if changed < 0.1 else text


def alike(text: str, draw: random.Random) -> str:
    """A caption that shares most words with another."""
    words, others = text.split(" "), sentence(draw).split(" ")
    start = draw.randrange(len(words))
    words[start : start + draw.randrange(1, 4)] = others[start : start + draw.randrange(0, 4)]
    return " ".join(words) or text


def captions() -> dict[str, Any]:
    """Candidates and references, their tokens, and the scores of pycocoevalcap from end to end."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    draw = random.Random(20)
    truths, said = {}, {}
    for item in range(100):
        first = sentence(draw)
        truths[item] = [{"caption": text} for text in (first, alike(first, draw), alike(first, draw))]
        said[item] = [{"caption": alike(first, draw)}]
    tokenised_truths, tokenised_said = (PTBTokenizer().tokenize(texts) for texts in (truths, said))
    with contextlib.redirect_stdout(io.StringIO()):
        bleu, _ = Bleu(4).compute_score(tokenised_truths, tokenised_said, 0)
        rouge, rouge_items = Rouge().compute_score(tokenised_truths, tokenised_said)
        cider, cider_items = Cider().compute_score(tokenised_truths, tokenised_said)
    return {
        "candidates": [said[item][0]["caption"] for item in said],
        "references": [[text["caption"] for text in truths[item]] for item in truths],
        "candidate_tokens": [tokenised_said[item][0] for item in said],
        "reference_tokens": [tokenised_truths[item] for item in truths],
        "bleu": [float(score) for score in bleu],
        "rouge_l": [float(score) for score in (rouge, *rouge_items)],
        "cider_d": [float(score) for score in (cider, *cider_items)],
    }


ANSWERS = (
    "yes|no|Yes.|the dog|a dog|dog|dogs|two|2|Two!|none|0|zero|it's|its|dont know|don't know|black & white|"
    "black and white|black, white|1,000|1000|10:30|10.5|5.|t-shirt|t shirt|T-Shirt|left/right|left / right|"
    "U.S.|us|(red)|red|red?|wouldnt|an apple|apple|on the table|on table|yall|hes|he's|can't|cant|-5|5 -|#1|"
    "50%|\"stop\"|stop|ten|10|3,4|3, 4|new york\n|a|the|somebody'd|ma'am|maam|cafe|café|  blue |blue|what's|"
    "whats|she's|let's|oclock|Id've|couldnt've|couldn'tve"
).split("|")


def vqa(evaluator: Path) -> list[dict[str, Any]]:
    """Answers, ten annotators' answers, and the reference's accuracy."""
    source = re.sub(r'print (".*")', r"print(\1)", evaluator.read_text(encoding="utf-8"))
    space: dict[str, Any] = {}
    exec(compile(source, str(evaluator), "exec"), space)
    draw = random.Random(21)
    rows = []
    for question in range(400):
        pool = draw.sample(ANSWERS, draw.choice((1, 2, 3, 6)))
        truths = [draw.choice(pool) for _ in range(10)]
        answer = draw.choice([*pool, draw.choice(ANSWERS)])

        class Truths:
            qa = {  # noqa: RUF012
                question: {
                    "answers": [{"answer": text, "answer_id": i} for i, text in enumerate(truths)],
                    "question_type": "", "answer_type": "",
                }
            }  # fmt: skip

            def getQuesIds(self) -> list[int]:
                return list(self.qa)

        class Said(Truths):
            qa = {question: {"answer": answer}}  # noqa: RUF012

        reference = space["VQAEval"](Truths(), Said(), n=10)
        with contextlib.redirect_stdout(io.StringIO()):
            reference.evaluate()
        rows.append({"answer": answer, "annotators": truths, "accuracy": reference.accuracy["overall"] / 100})
    return rows


def main(what: str, *paths: str) -> None:
    """Writes one of the files."""
    content = captions() if what == "captions" else vqa(Path(paths[0]))
    GOLDEN.mkdir(exist_ok=True)
    text = (
        json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace('"],', '"],\n').replace("},{", "},\n{")
    )
    (GOLDEN / f"{what}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
