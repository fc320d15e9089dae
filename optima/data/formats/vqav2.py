"""VQAv2, from the question and annotation files of the site.

    ROOT/v2_OpenEnded_mscoco_{train2014,val2014,test2015,test-dev2015}_questions.json
    ROOT/v2_mscoco_{train2014,val2014}_annotations.json
    ROOT/{train2014,val2014,test2015}/COCO_*_%012d.jpg     (or under ROOT/images)

A record is a question. The classes are the most frequent answers of the training annotations, so every split needs
that file, unless the classes are given (those of a trained model). Training leaves out questions whose answers are no
classes.
"""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from optima.data.answers import agreed_answer, answer_vocabulary
from optima.data.formats.files import ImageFolders, find_or_refuse, read_json, rows_of
from optima.data.record import Collector, Record, Records, Unusable, clean_text, entry, identifier, name_of

SPLITS = {"train": "train2014", "validation": "val2014", "test": "test2015", "test-dev": "test-dev2015"}
FOLDERS = ("", "annotations/", "questions/", "vqa/")


def read_vqav2(root: Path, split: str, answers: int, classes: Sequence[str] | None) -> Records:
    """The split's questions; test splits have no answers.

    Args:
        answers: size of the answer vocabulary.
        classes: the answer vocabulary, if it is known already.
    """
    official = SPLITS[split]
    images = official.replace("-dev", "")
    questions = _find(root, f"v2_OpenEnded_mscoco_{official}_questions.json", f"the {split} questions")
    collector = Collector()
    given = _answers(root, official, collector) if split in ("train", "validation") else {}
    if classes is None:
        trained = given if split == "train" else _answers(root, SPLITS["train"], Collector())
        classes = answer_vocabulary(chain.from_iterable(trained.values()), answers)
    vocabulary = {answer: target for target, answer in enumerate(classes)}
    folders = ImageFolders(root, [images, f"images/{images}"])

    def make(row: Any) -> Record | None:
        name = identifier(entry(row, "question_id"), "question_id")
        text = clean_text(entry(row, "question"), "a question")
        image = entry(row, "image_id")
        if isinstance(image, bool) or not isinstance(image, int):
            raise Unusable("id-type", f"image_id must be a whole number, got {image!r:.80}")
        if given and name not in given:
            raise Unusable("answers-missing", f"question {name} has no annotation")
        source = folders.source(f"COCO_{images}_{image:012d}.jpg", f"{image:012d}.jpg")
        said = given.get(name, ())
        target = agreed_answer(said, vocabulary)
        if split == "train" and target < 0:
            collector.left_out["no answer in the vocabulary"] += 1
            return None
        return Record(name, (source,), (text,), target, said)

    for number, row in enumerate(rows_of(read_json(questions), "questions", questions)):
        collector.take(f"{questions.name} questions[{number}]", name_of(row, "question_id"), make, row)
    return collector.records("vqav2", split, "vqa", tuple(classes))


def _find(root: Path, name: str, what: str) -> Path:
    return find_or_refuse(root, [folder + name for folder in FOLDERS], what)


def _answers(root: Path, official: str, collector: Collector) -> dict[str, tuple[str, ...]]:
    """The annotators' answers by question id; unusable annotations are rejected."""
    path = _find(root, f"v2_mscoco_{official}_annotations.json", f"the {official} annotations")
    found: dict[str, tuple[str, ...]] = {}
    for number, row in enumerate(rows_of(read_json(path), "annotations", path)):
        try:
            name = identifier(entry(row, "question_id"), "question_id")
            if name in found:
                raise Unusable("duplicate-id", f"question {name} was annotated before")
            answers = entry(row, "answers")
            if not isinstance(answers, list) or not answers:
                raise Unusable("answers-missing", f"a list of answers is wanted, got {answers!r:.80}")
            found[name] = tuple(clean_text(entry(answer, "answer"), "an answer") for answer in answers)
        except Unusable as fault:
            collector.reject(f"{path.name} annotations[{number}]", fault, name_of(row, "question_id"))
    return found
