"""Miniature data sets in the official formats, with pictograms for images: real JPEGs and PNGs of several shapes."""

import io
import json
import random
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from optima.data.pictograms.captions import references
from optima.data.pictograms.render import render
from optima.data.pictograms.stream import Pictograms
from optima.task import Task


def save_image(path: Path, scene: Any, size: tuple[int, int], **options: Any) -> None:
    """Saves a scene stretched to size (width, height); the ending says the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(render(scene).transpose(1, 2, 0)).resize(size, Image.Resampling.BICUBIC)
    image.save(path, **options)


def shape(index: int) -> tuple[int, int]:
    """A size (width, height) that differs from image to image, as it does in real sets."""
    draws = random.Random(index)
    return draws.randrange(64, 160), draws.randrange(64, 160)


def examples(task: Task, count: int) -> list[Any]:
    data = Pictograms("train", 7)
    return [data.example(task, index) for index in range(count)]


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def make_coco(root: Path, count: int = 12, year: str = "2017") -> Path:
    """train and val of the site, each with `count` images of up to three captions, and test without captions."""
    for short, first in (("train", 0), ("val", 1000), ("test", 2000)):
        images, annotations = [], []
        for index, example in enumerate(examples("captioning", count)):
            image_id = first + index
            name = f"{image_id:012d}.jpg" if year == "2017" else f"COCO_{short}{year}_{image_id:012d}.jpg"
            width, height = shape(image_id)
            save_image(root / f"{short}{year}" / name, example.scenes[0], (width, height), quality=90)
            images.append({"id": image_id, "file_name": name, "width": width, "height": height})
            for place, text in enumerate(references(example.scenes[0])[: 1 + index % 3]):
                annotations.append({"id": 10 * image_id + place, "image_id": image_id, "caption": text})
        if short == "test":
            write_json(root / f"annotations/image_info_test{year}.json", {"images": images, "info": {}})
        else:
            write_json(
                root / f"annotations/captions_{short}{year}.json", {"images": images, "annotations": annotations}
            )
    return root


def make_karpathy(root: Path, count: int = 12) -> Path:
    splits = ("train", "restval", "val", "test")
    images = []
    for index, example in enumerate(examples("captioning", count)):
        folder = "train2014" if index % 2 else "val2014"
        name = f"COCO_{folder}_{index:012d}.jpg"
        save_image(root / folder / name, example.scenes[0], shape(index), quality=90)
        sentences = [{"raw": text, "tokens": text.split(), "sentid": 1} for text in references(example.scenes[0])]
        images.append(
            {"filepath": folder, "filename": name, "cocoid": index, "split": splits[index % 4], "sentences": sentences}
        )
    write_json(root / "dataset_coco.json", {"images": images, "dataset": "coco"})
    return root


def make_vqav2(root: Path, count: int = 12) -> Path:
    for official, first in (("train2014", 0), ("val2014", 1000), ("test2015", 2000)):
        questions, annotations = [], []
        for index, example in enumerate(examples("vqa", count)):
            image_id, question_id = first + index // 2, 10 * (first + index)
            if index % 2 == 0:
                name = f"COCO_{official}_{image_id:012d}.jpg"
                save_image(root / official / name, example.scenes[0], shape(image_id), quality=90)
            questions.append({"image_id": image_id, "question": example.text, "question_id": question_id})
            answers = [example.answer] * 7 + ["Unsure."] * 3
            annotations.append(
                {
                    "question_id": question_id,
                    "image_id": image_id,
                    "question_type": "how many",
                    "answer_type": "other",
                    "multiple_choice_answer": example.answer,
                    "answers": [
                        {"answer": answer, "answer_confidence": "yes", "answer_id": 1 + place}
                        for place, answer in enumerate(answers)
                    ],
                }
            )
        write_json(root / f"v2_OpenEnded_mscoco_{official}_questions.json", {"questions": questions, "info": {}})
        if official != "test2015":
            write_json(root / f"v2_mscoco_{official}_annotations.json", {"annotations": annotations, "info": {}})
    return root


def make_nlvr2(root: Path, count: int = 12) -> Path:
    for official in ("train", "dev", "test1"):
        rows = []
        for index, example in enumerate(examples("nlvr2", count)):
            pair = f"{official}-{index // 2}-{index % 2}"
            folder = f"images/train/{index % 3}" if official == "train" else official
            for side, scene in enumerate(example.scenes):
                save_image(root / folder / f"{pair}-img{side}.png", scene, shape(10 * index + side))
            row = {"identifier": f"{pair}-0", "sentence": example.text, "label": str(bool(example.target))}
            rows.append(row | ({"directory": index % 3} if official == "train" else {}))
        write_lines(root / f"data/{official}.json", rows)
    return root


def make_snli_ve(root: Path, count: int = 12) -> Path:
    for official, first in (("train", 0), ("dev", 1000), ("test", 2000)):
        rows = []
        for index, example in enumerate(examples("snli_ve", count)):
            image = str(first + index)
            save_image(root / f"flickr30k-images/{image}.jpg", example.scenes[0], shape(first + index), quality=90)
            label = "-" if index == 5 else example.answer
            rows.append(
                {
                    "pairID": f"{image}.jpg#0r1{label[0]}",
                    "captionID": f"{image}.jpg#0",
                    "Flickr30K_ID": image,
                    "gold_label": label,
                    "sentence1": "an image",
                    "sentence2": example.text,
                }
            )
        write_lines(root / f"snli_ve_{official}.jsonl", rows)
    return root


def make_folder(root: Path, count: int = 12, ending: str = "tsv") -> Path:
    rows = []
    for index, example in enumerate(examples("captioning", count)):
        name = f"images/{index}.{'jpg' if index % 2 else 'png'}"
        save_image(root / name, example.scenes[0], shape(index))
        rows += [(name, text) for text in references(example.scenes[0])[:2]]
    for split in ("train", "validation", "test"):
        if ending == "tsv":
            lines = ["file_name\tcaption", *("\t".join(row) for row in rows)]
            (root / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        else:
            write_lines(root / f"{split}.jsonl", ({"file_name": name, "text": text} for name, text in rows))
    return root


def make_webdataset(root: Path, count: int = 12) -> Path:
    """Two tars a split, as other programs write them: an image, and its caption in .txt or in .json."""
    root.mkdir(parents=True, exist_ok=True)
    for split, first in (("train", 0), ("validation", 1000), ("test", 2000)):
        for shard in range(2):
            with tarfile.open(root / f"{split}-{shard:04d}.tar", "w") as tar:
                for index, example in list(enumerate(examples("captioning", count)))[shard::2]:
                    encoded = io.BytesIO()
                    image = Image.fromarray(render(example.scenes[0]).transpose(1, 2, 0))
                    image.resize(shape(first + index)).save(encoded, "JPEG", quality=90)
                    text = references(example.scenes[0])[0]
                    words = ("txt", text) if index % 3 else ("json", json.dumps({"caption": text}))
                    for ending, data in (("jpg", encoded.getvalue()), (words[0], words[1].encode())):
                        member = tarfile.TarInfo(f"{first + index:06d}.{ending}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
    return root


MAKERS = {
    "coco": make_coco,
    "coco_karpathy": make_karpathy,
    "vqav2": make_vqav2,
    "nlvr2": make_nlvr2,
    "snli_ve": make_snli_ve,
    "folder": make_folder,
    "webdataset": make_webdataset,
}
