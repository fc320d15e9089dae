"""Configurations, annotations, vocabularies and lists of shards: YAML and JSON that lie, repeat and nest."""

import gzip
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from cases import ACCEPTED, Case, Verdict, written
from miniatures import make_coco
from model_cases import CONFIG

from optima.coca.open_clip_config import open_clip_config
from optima.data.packing import pack
from optima.data.records import open_records
from optima.data.tokenizer import word_tokenizer


def setting_cases() -> Iterator[Case]:
    for name, text in GOOD_YAML.items():
        yield Case("config", name, written(text.encode()), ACCEPTED, "c.yaml")
    for name, (words, data) in BAD_YAML.items():
        yield Case("config", name, written(data), Verdict("refused", words), "c.yaml")
    yield Case("config", "a pipe", lambda path, _: os.mkfifo(path), Verdict("refused", "neither a file nor"), "c.yaml")
    for name, (words, change) in ANNOTATIONS.items():
        yield Case("annotations", name, _annotated(change), Verdict("rejected", words) if words else ACCEPTED)
    for name, (words, data) in NO_JSON.items():
        yield Case("annotations", f"{name}", written(data), Verdict("refused", words))
        yield Case("words", name, _in_folder("words.json", data), Verdict("refused", "words.json"))
        yield Case("open_clip", name, written(data), Verdict("refused", "configuration"))
        yield Case("vocabulary", name, written(data), Verdict("refused", "v.json"), "v.json")
    for name, change in WORDS.items():
        make = _in_folder("words.json", json.dumps(_words() | change).encode())
        yield Case("words", name, make, Verdict("refused", "words.json"))
    yield Case("words", "as they should be", _in_folder("words.json", json.dumps(_words()).encode()), ACCEPTED)
    yield Case("shards", "as they should be", _packed({}), ACCEPTED)
    for name, change in SHARDS.items():
        yield Case("shards", name, _packed(change), Verdict("refused", "train|missing or not whole"))
    yield Case("open_clip", "as it should be", written(json.dumps(open_clip_config(CONFIG)).encode()), ACCEPTED)
    for name, (words, change) in OPEN_CLIP.items():
        yield Case("open_clip", name, _open_clip(change), Verdict("refused", words))
    for name, (words, file, data) in VOCABULARIES.items():
        yield Case("vocabulary", name, written(data), Verdict("refused", words) if words else ACCEPTED, file)


BOMB = "a: &a [x, x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in zip("abcdefghijklmno", "bcdefghijklmnop", strict=True)
)

GOOD_YAML = {
    "an option": "batch_size: 4\n",
    "options within options": "engine:\n  rounds: 3\n  bandit: {policy: uniform}\n",
    "in json": '{"batch_size": 4, "engine": {"rounds": 3}}',
    "a byte order mark": "\ufeffbatch_size: 4\n",
    "an anchor that nothing repeats": "batch_size: &size 4\n",
}

BAD_YAML: dict[str, tuple[str, bytes | Callable[[Random], bytes]]] = {
    "nothing": ("Unexpected config", b""),
    "a comment": ("Unexpected config", b"# nothing\n"),
    "a bomb": ("the YAML alias", BOMB.encode()),
    "a bomb in quotes": ("c.yaml", ("layer_map: |\n" + "".join(f"  {line}\n" for line in BOMB.splitlines())).encode()),
    "an alias": ("the YAML alias", b"batch_size: &a 4\nprobe_size: *a\n"),
    "an alias of itself": ("the YAML alias", b"engine: &a\n  bandit: *a\n"),
    "a merge": ("the YAML alias", b"engine: &a {rounds: 3}\ndata:\n  <<: *a\n"),
    "an alias of nothing": ("c.yaml", b"batch_size: *nothing\n"),
    "a program": ("c.yaml", b"run: !!python/object/apply:os.system ['true']\n"),
    "a module": ("c.yaml", b"run: !!python/module:os\n"),
    "a name": ("c.yaml", b"run: !!python/name:os.system\n"),
    "a tag of its own": ("c.yaml", b"run: !mine 3\n"),
    "brackets": ("nested more than|no YAML", b"a: " + b"[" * 5000),
    "a hundred brackets": ("nested more than", b"a: " + b"[" * 100 + b"]" * 100),
    "levels": ("nested more than", "".join(" " * i + "a:\n" for i in range(200)).encode()),
    "more than a MiB": ("are the most", b"a: " + b"x" * 2**20),
    "noise": ("c.yaml", lambda draws: b"\xff" + draws.randbytes(200)),
    "zeros": ("c.yaml", bytes(200)),
    "Latin letters": ("not UTF-8", b"run: K\xe4tzchen\n"),
    "tabs": ("no YAML", b"engine:\n\trounds: 3\n"),
    "a list": ("c.yaml|config", b"- 1\n- 2\n"),
    "a number": ("c.yaml|config", b"17"),
    "two documents": ("no YAML", b"batch_size: 4\n---\nbatch_size: 5\n"),
    "an unknown option": ("did you mean batch_size", b"batch_sise: 4\n"),
    "a key that is a list": ("no YAML|config", b"? [a, b]\n: 4\n"),
    "a number that is no number": ("batch_size", b"batch_size: .nan\n"),
    "a number without end": ("batch_size", b"batch_size: .inf\n"),
    "a number of a thousand digits": ("batch_size|c.yaml", b"batch_size: -" + b"9" * 1000 + b"\n"),
    "a date": ("batch_size", b"batch_size: 2026-01-01\n"),
    "a class of its own": ("class_path", b"engine:\n  class_path: os.system\n  init_args: {command: 'true'}\n"),
    "a file for options": ("must be an object of options", b"engine: /dev/zero\n"),
    "another configuration": ("c.yaml|config", b"config: /dev/zero\n"),
}


def _annotated(change: Callable[[dict[str, Any]], object]) -> Callable[[Path, Random], None]:
    def make(path: Path, _: Random) -> None:
        root = path.with_name("from")
        content = json.loads((make_coco(root, 4) / "annotations/captions_train2017.json").read_text())
        change(content)
        path.write_text(json.dumps(content))

    return make


def _image(**more: object) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["images"].append({"id": 77, "file_name": "none.jpg"} | more)


def _caption(**more: object) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["annotations"].append({"id": 9001, "image_id": 0, "caption": "a cat"} | more)


ANNOTATIONS: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "as they should be": ("", lambda content: None),
    "more than is asked for": ("", lambda content: content.update(info={"a": [1]}, licenses=None)),
    "an image that is not there": ("image-missing", _image()),
    "an image that leaves its folder": ("unsafe-name", _image(file_name="../../etc/passwd")),
    "an image of a name too long": ("image-unreadable", _image(file_name="d/" * 3000 + "x.jpg")),
    "an image of a folder too long": ("image-unreadable", _image(file_name="a" * 300 + "/x.jpg")),
    "an image whose name is a number": ("unsafe-name", _image(file_name=7)),
    "an image whose id is true": ("id-type", _image(id=True)),
    "an image whose id is a list": ("id-type", _image(id=[1])),
    "an image whose id has no end": ("text-overlong", _image(id="7" * 100_000)),
    "an image whose id is half": ("id-type", _image(id=0.5)),
    "an image that is a list": ("row-type", lambda content: content["images"].append([1])),
    "an image without an id": ("field-missing", lambda content: content["images"].append({"file_name": "x.jpg"})),
    "an image twice": ("duplicate-id", lambda content: content["images"].append(content["images"][0])),
    "a caption of another image": ("image-unknown", _caption(image_id=999)),
    "a caption of an image in brackets": ("id-type", _caption(image_id={"id": 0})),
    "a caption that is a number": ("text-type", _caption(caption=7)),
    "a caption of nothing": ("text-empty", _caption(caption=" ")),
    "a caption without end": ("text-overlong", _caption(caption="x" * 10**6)),
    "a caption that is null": ("row-type", lambda content: content["annotations"].append(None)),
}

NO_JSON: dict[str, tuple[str, bytes | Callable[[Random], bytes]]] = {
    "nothing": ("is not a JSON file", b""),
    "a half": ("is not a JSON file", b'{"images": ['),
    "brackets": ("is not a JSON file", b"[" * 200_000),
    "noise": ("is not a JSON file", lambda draws: b"\xff" + draws.randbytes(300)),
    "a number of 5000 digits": ("is not a JSON file", b'{"images": ' + b"1" * 5000 + b"}"),
    "a list": ("holds no list", b"[]"),
    "null": ("holds no list", b"null"),
    "an object of nothing": ("holds no list", b"{}"),
}


def _in_folder(name: str, data: bytes | Callable[[Random], bytes]) -> Callable[[Path, Random], None]:
    def make(path: Path, draws: Random) -> None:
        path.mkdir()
        written(data)(path / name, draws)

    return make


def _words() -> dict[str, object]:
    found: dict[str, object] = {"task": "vqa", "text_length": 20, "classes": ["no", "yes"]}
    return found | {"tokenizer": word_tokenizer().to_json(), "transform": {"image_size": 32}}


WORDS: dict[str, dict[str, object]] = {
    "a length of words": {"text_length": "x"},
    "a length of a world": {"text_length": 10**12},
    "a length below nothing": {"text_length": -1},
    "images of no size": {"transform": {"image_size": 0}},
    "images of words": {"transform": {"image_size": "large"}},
    "images of a list": {"transform": [32]},
    "an unknown task": {"task": "painting"},
    "a task that is a list": {"task": ["vqa"]},
    "classes that are a text": {"classes": "yes"},
    "classes that are numbers": {"classes": [1, 2]},
    "no classes": {"classes": None},
    "a tokenizer that is a number": {"tokenizer": 3},
    "a tokenizer of nothing": {"tokenizer": {}},
    "a tokenizer that is a list": {"tokenizer": {"backend": [1]}},
    "a tokenizer of an unknown model": {"tokenizer": {"backend": {"model": {"type": "Magic"}}}},
    "a tokenizer of noise": {"tokenizer": {"backend": {"sentencepiece": "AAAA"}, "pad": "a", "start": "b", "end": "c"}},
    "a tokenizer without padding": {"tokenizer": word_tokenizer().to_json() | {"pad": "<none>"}},
    "a tokenizer whose padding is a list": {"tokenizer": word_tokenizer().to_json() | {"pad": []}},
}


def _packed(change: dict[str, object]) -> Callable[[Path, Random], None]:
    def make(path: Path, _: Random) -> None:
        root = path.with_name("from")
        pack(open_records("coco", make_coco(root, 4), "train"), path, 2**20, None)
        content = json.loads((path / "train.json").read_text())
        (path / "train.json").write_text(json.dumps({"optima_shards": 1} | content | change))

    return make


SHARDS: dict[str, dict[str, object]] = {
    "no shards": {"shards": None},
    "shards that are a text": {"shards": "train-000000.tar"},
    "a shard that is null": {"shards": [None]},
    "a shard without a file": {"shards": [{"bytes": 3}]},
    "a shard without a size": {"shards": [{"file": "train-000000.tar"}]},
    "a shard of another size": {"shards": [{"file": "train-000000.tar", "bytes": 3}]},
    "a shard that leaves its folder": {"shards": [{"file": "../../x.tar", "bytes": 3}]},
    "an absolute shard": {"shards": [{"file": "/etc/passwd", "bytes": 3}]},
    "a shard of a name too long": {"shards": [{"file": "a" * 5000, "bytes": 3}]},
    "no classes": {"classes": None},
    "classes of numbers": {"classes": [1]},
    "nothing left out": {"left_out": None},
    "words left out": {"left_out": {"a": "b"}},
    "an unknown task": {"task": "painting"},
    "a task that is a list": {"task": []},
    "another data set": {"name": "folder"},
    "a data set that is a list": {"name": ["coco"]},
    "another version": {"optima_shards": 99},
    "a version that is a list": {"optima_shards": [1]},
}


def _open_clip(change: Callable[[dict[str, Any]], object]) -> Callable[[Path, Random], None]:
    def make(path: Path, _: Random) -> None:
        values = open_clip_config(CONFIG)
        change(values["model_cfg"])
        path.write_text(json.dumps(values))

    return make


OPEN_CLIP: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "a million layers": ("layers", lambda model: model["vision_cfg"].update(layers=10**6)),
    "heads of no width": ("configuration", lambda model: model["vision_cfg"].update(head_width=0)),
    "a width of words": ("width", lambda model: model["vision_cfg"].update(width="wide")),
    "a width below nothing": ("width", lambda model: model["vision_cfg"].update(width=-8)),
    "patches of no size": ("patch_size", lambda model: model["vision_cfg"].update(patch_size=0)),
    "an MLP of words": ("mlp_ratio", lambda model: model["text_cfg"].update(mlp_ratio="wide")),
    "a section that is a list": ("must be an object", lambda model: model.update(text_cfg=[1])),
    "a section without end": ("must be an object", lambda model: model.update(text_cfg="x" * 10**5)),
    "an unknown option": ("is not supported", lambda model: model.update(magic="x" * 10**5)),
    "no sections": ("lacks", lambda model: model.clear()),
}


def _pieces(count: int) -> bytes:
    return gzip.compress(b"heading\n" + b"a b\n" * count, mtime=0)


VOCABULARIES: dict[str, tuple[str, str, bytes | Callable[[Random], bytes]]] = {
    "as it should be": ("", "v.json", json.dumps({"<unk>": 0, "<pad>": 1, "<start>": 2, "<end>": 3, "a": 4}).encode()),
    "without its tokens": ("v.json", "v.json", b'{"a": 0}'),
    "with ids of words": ("v.json", "v.json", b'{"<unk>": "0"}'),
    "with ids below nothing": ("v.json", "v.json", b'{"<unk>": -1}'),
    "with ids of a world": ("v.json", "v.json", b'{"<unk>": 18446744073709551616}'),
    "byte pairs that are none": ("v.txt.gz", "v.txt.gz", b"no gzip"),
    "byte pairs of nothing": ("v.txt.gz", "v.txt.gz", gzip.compress(b"", mtime=0)),
    "byte pairs too few": ("v.txt.gz", "v.txt.gz", _pieces(10)),
    "byte pairs cut short": ("v.txt.gz", "v.txt.gz", lambda _: _pieces(50_000)[:60]),
    "byte pairs of zeros without end": ("v.txt.gz", "v.txt.gz", lambda _: gzip.compress(bytes(2**27), mtime=0)),
    "pieces of noise": ("v.model", "v.model", bytes(range(256))),
    "pieces of nothing": ("v.model", "v.model", b""),
}
