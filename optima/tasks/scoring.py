"""Scores of the official data sets by their benchmarks' definitions, and predictions in their submission formats."""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from optima.data.formats import coco, nlvr2, snli_ve, vqav2
from optima.data.record import Record, Records
from optima.metrics import caption_scores, consistency, tokenize, vqa_accuracy
from optima.tasks.data import Evaluation, percent

RIGHT_CIDER_D = 1.0
"""Least CIDEr-D (of 10) of a caption that counts as right where a yes or no is wanted, as in a report's samples."""
RIGHT_ACCURACY = 0.6
"""Least VQA accuracy of an answer that counts as right there: what two of ten annotators said."""


def has_truth(records: Records) -> bool:
    """Whether predictions for these records can be scored: captions, answers or labels were published."""
    first = records[0]
    return bool(first.texts if records.task == "captioning" else first.answers) or first.target >= 0


def score(records: Records, indices: Sequence[int], predictions: Sequence[str]) -> Evaluation:
    """Scores one prediction for each of some records.

    Captioning: `cider_d`, `bleu_1` to `bleu_4`, `rouge_l`, each times 100. VQA: `accuracy`. NLVR2: `accuracy` and
    `consistency`. SNLI-VE: `accuracy`, and `accuracy/<label>` among the hypotheses of that label. Without published
    truth there are no scores and nothing is right.
    """
    items = [records[index] for index in indices]
    if not has_truth(records):
        return Evaluation({}, list(indices), list(predictions), [False] * len(items))
    scores, correct = _SCORES[records.task](records, items, predictions)
    return Evaluation(scores, list(indices), list(predictions), correct)


Scored = tuple[dict[str, float], list[bool]]


def _captioning(_: Records, items: Sequence[Record], said: Sequence[str]) -> Scored:
    found = caption_scores(
        [tokenize(caption) for caption in said], [[tokenize(text) for text in item.texts] for item in items]
    )
    scores = {
        "cider_d": 100 * float(found.cider_d.mean()),
        **{f"bleu_{n}": 100 * score for n, score in enumerate(found.bleu, 1)},
        "rouge_l": 100 * float(found.rouge_l.mean()),
    }
    return scores, [score >= RIGHT_CIDER_D for score in found.cider_d.tolist()]


def _vqa(_: Records, items: Sequence[Record], said: Sequence[str]) -> Scored:
    accuracies = [vqa_accuracy(answer, item.answers) for answer, item in zip(said, items, strict=True)]
    return {"accuracy": percent(accuracies)}, [accuracy >= RIGHT_ACCURACY for accuracy in accuracies]


def _nlvr2(records: Records, items: Sequence[Record], said: Sequence[str]) -> Scored:
    correct = _same_class(records, items, said)
    share = consistency(correct, [item.id for item in items])
    return {"accuracy": percent(correct), "consistency": 100 * share}, correct


def _snli_ve(records: Records, items: Sequence[Record], said: Sequence[str]) -> Scored:
    correct = _same_class(records, items, said)
    scores = {"accuracy": percent(correct)}
    for target, label in enumerate(records.classes):
        right = [good for good, item in zip(correct, items, strict=True) if item.target == target]
        if right:
            scores[f"accuracy/{label}"] = percent(right)
    return scores, correct


def _same_class(records: Records, items: Sequence[Record], said: Sequence[str]) -> list[bool]:
    return [records.classes[item.target] == label for label, item in zip(said, items, strict=True)]


_SCORES: dict[str, Callable[[Records, Sequence[Record], Sequence[str]], Scored]] = {
    "captioning": _captioning,
    "vqa": _vqa,
    "nlvr2": _nlvr2,
    "snli_ve": _snli_ve,
}


def submission(records: Records, indices: Sequence[int], predictions: Sequence[str]) -> tuple[str, str]:
    """Name and content of the file with predictions for some records.

    COCO: the result JSON of the caption server and of pycocoevalcap, image_id and caption. VQAv2: the result JSON of
    the server, question_id and answer. NLVR2: the CSV of its eval/metrics.py, identifier and True or False. SNLI-VE has
    no server: JSONL with pairID and gold_label as in its own files. Folders and tars: JSONL with file_name and caption.
    """
    ids = [records[index].id for index in indices]
    if records.name in ("coco", "coco_karpathy"):
        return f"captions_{_official(records)}_optima_results.json", _rows("image_id", "caption", ids, predictions)
    if records.name == "vqav2":
        name = f"vqa_OpenEnded_mscoco_{_official(records)}_optima_results.json"
        return name, _rows("question_id", "answer", ids, predictions)
    if records.name == "nlvr2":
        lines = [f"{name},{said.capitalize()}\n" for name, said in zip(ids, predictions, strict=True)]
        return f"nlvr2_{_official(records)}_predictions.csv", "".join(lines)
    key, value = ("pairID", "gold_label") if records.name == "snli_ve" else ("file_name", "caption")
    rows = [
        json.dumps({key: name, value: said}, ensure_ascii=False) for name, said in zip(ids, predictions, strict=True)
    ]
    split = re.sub(r"[^\w.-]+", "_", _official(records))  # a pattern of tars may stand for a split
    return f"{records.name}_{split}_predictions.jsonl", "".join(f"{row}\n" for row in rows)


def _official(records: Records) -> str:
    """The benchmark's own name of the split."""
    known: dict[str, dict[str, Any]] = {"vqav2": vqav2.SPLITS, "nlvr2": nlvr2.SPLITS, "snli_ve": snli_ve.SPLITS}
    if records.name == "coco_karpathy":
        return "karpathy_" + coco.KARPATHY[records.split][0]
    if records.name == "coco":
        return {"validation": "val"}.get(records.split, records.split)
    official: str = known.get(records.name, {}).get(records.split, records.split)
    return official


def _rows(key: str, value: str, ids: Sequence[str], predictions: Sequence[str]) -> str:
    """A JSON list of objects; ids are numbers where they are written as such."""
    rows = [
        {key: int(name) if name.isdecimal() else name, value: said} for name, said in zip(ids, predictions, strict=True)
    ]
    return json.dumps(rows, ensure_ascii=False) + "\n"
