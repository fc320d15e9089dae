"""Weights: pickles with gadgets and bombs, headers of safetensors that lie, checkpoints of other shapes."""

import collections
import dataclasses
import hashlib
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from cases import ACCEPTED, Case, Verdict, written
from safetensors.torch import save

from optima.coca import CoCa, CoCaConfig, ImageEncoderConfig, MultimodalDecoderConfig, TextDecoderConfig
from optima.coca.checkpoint import FORMAT

Bytes = bytes | Callable[[Random], bytes]
Maker = Callable[[Path, Random], None]

CONFIG = CoCaConfig(
    8,
    ImageEncoderConfig(16, 8, 8, 1, 2, 2.0),
    TextDecoderConfig(11, 6, 8, 1, 2, 2.0),
    MultimodalDecoderConfig(8, 1, 2),
)


def model_cases() -> Iterator[Case]:
    yield Case("model", "as it should be", written(lambda _: model_file()), ACCEPTED, "m.safetensors")
    for name, (words, data) in MODELS.items():
        yield Case("model", name, written(data), Verdict("refused", words), "m.safetensors")
    for name, content in PLAIN.items():
        yield Case("weights", name, written(lambda _, content=content: saved(content)), ACCEPTED, "w.pt")
    for name, (words, data) in PICKLES.items():
        yield Case("weights", name, written(data), Verdict("refused", words), "w.pt")
    yield Case("weights", "a pipe", lambda path, _: os.mkfifo(path), Verdict("refused", "does not exist"), "w.pt")
    yield Case(
        "model", "a pipe", lambda path, _: os.mkfifo(path), Verdict("refused", "does not exist"), "m.safetensors"
    )
    yield Case("checkpoint", "as it should be", checkpoint(), ACCEPTED)
    for name, (words, make) in CHECKPOINTS.items():
        yield Case("checkpoint", name, make, Verdict("refused", words))


def model_bytes(found: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """As safetensors writes them, but with the header in one order: it shuffles the metadata."""
    content = save(found, metadata)
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + length]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return headed(header, content[8 + length :])


def tensors() -> dict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {name: tensor.detach().clone() for name, tensor in CoCa(CONFIG).state_dict().items()}


def described(change: Callable[[dict[str, Any]], object] = lambda _: None, **more: str) -> dict[str, str]:
    config = dataclasses.asdict(CONFIG)
    change(config)
    return {"format": FORMAT, "config": json.dumps(config), "heads": "{}"} | more


def model_file(
    change: Callable[[dict[str, Any]], object] = lambda _: None,
    tensor: Callable[[dict[str, torch.Tensor]], object] = lambda _: None,
    **more: str,
) -> bytes:
    found = tensors()
    tensor(found)
    return model_bytes(found, described(change, **more))


def headed(header: bytes, body: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def entry(kind: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> bytes:
    header = {"__metadata__": described(), "a": {"dtype": kind, "shape": shape, "data_offsets": offsets}}
    return headed(json.dumps(header).encode(), bytes(8))


def sized(module: str, **sizes: object) -> tuple[str, Bytes]:
    return ("no configuration that this version can read", lambda _: model_file(lambda c: c[module].update(sizes)))


def filled(value: float) -> Bytes:
    return lambda _: model_file(tensor=lambda found: found["image_encoder.patch.weight"].view(-1)[:1].fill_(value))


MODELS: dict[str, tuple[str, Bytes]] = {
    "nothing": ("no readable safetensors", b""),
    "seven bytes": ("no readable safetensors", b"1234567"),
    "a header of no length": ("no readable safetensors", headed(b"")),
    "a header longer than the file": ("no readable safetensors", headed(b"{}", length=10**6)),
    "a header longer than all files": ("no readable safetensors", headed(b"{}", length=2**63)),
    "a header that is no json": ("no readable safetensors", headed(b"{'a': 1}")),
    "a header that is a list": ("no readable safetensors", headed(b"[]")),
    "a header of brackets": ("no readable safetensors", headed(b"[" * 100_000)),
    "a header in Latin letters": ("no readable safetensors", headed(b'{"\xe4": 1}')),
    "a header without tensors": ("is not an OPTIMA CoCa model", headed(b"{}      ")),
    "an unknown type": ("no readable safetensors", entry("F33")),
    "a shape below nothing": ("no readable safetensors", entry(shape=[-2])),
    "a shape of words": ("no readable safetensors", entry(shape="two")),
    "a shape above all numbers": ("no readable safetensors", entry(shape=[2**40, 2**40])),
    "offsets backwards": ("no readable safetensors", entry(offsets=[8, 0])),
    "offsets beyond the file": ("no readable safetensors", entry(shape=[200], offsets=[0, 800])),
    "offsets that overlap": (
        "no readable safetensors",
        headed(
            json.dumps({name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for name in "ab"}).encode(),
            bytes(8),
        ),
    ),
    "a hole behind the tensors": ("no readable safetensors", entry() + bytes(8)),
    "another format": ("is not an OPTIMA CoCa model", lambda _: model_file(format="pt")),
    "a format without end": ("is not an OPTIMA CoCa model", lambda _: model_file(format="x" * 10**6)),
    "no configuration": ("no configuration", lambda _: model_bytes(tensors(), {"format": FORMAT})),
    "a configuration of brackets": ("no configuration", lambda _: model_file(config="[" * 100_000)),
    "a configuration without end": ("no configuration", lambda _: model_file(config='"' + "x" * 2**20 + '"')),
    "a configuration that is a list": ("no configuration", lambda _: model_file(config="[]")),
    "a configuration that is null": ("no configuration", lambda _: model_file(config="null")),
    "a module that is a number": ("no configuration", lambda _: model_file(lambda c: c.update(text_decoder=3))),
    "a module that is a list": ("no configuration", lambda _: model_file(lambda c: c.update(image_encoder=[1]))),
    "an unknown option": sized("text_decoder", flavour="sweet"),
    "a million layers": sized("image_encoder", layers=10**6),
    "a million layers of text": sized("text_decoder", layers=10**6),
    "no layers": sized("multimodal_decoder", layers=0),
    "layers that are true": sized("multimodal_decoder", layers=True),
    "heads that are a list": sized("image_encoder", heads=[2]),
    "no heads": sized("image_encoder", heads=0),
    "heads below nothing": sized("text_decoder", heads=-1),
    "patches of no size": sized("image_encoder", patch_size=0),
    "images of a world": sized("image_encoder", image_size=2**30, patch_size=2),
    "a width of a world": sized("image_encoder", width=2**40),
    "a width of words": sized("image_encoder", width="wide"),
    "a width of half": sized("image_encoder", width=8.5),
    "a vocabulary of a world": sized("text_decoder", vocab_size=2**60),
    "texts without end": sized("text_decoder", context_length=2**60),
    "a padding that is no token": sized("text_decoder", pad_id=11),
    "an MLP of no width": sized("text_decoder", mlp_ratio=0),
    "an MLP of a world": sized("text_decoder", mlp_ratio=1e30),
    "an MLP that is no number": sized("text_decoder", mlp_ratio=float("nan")),
    "queries of a world": sized("image_encoder", pooler_queries=2**40),
    "an unknown activation": sized("image_encoder", activation="relu"),
    "a deviation of nothing": sized("image_encoder", std=[0, 0, 0]),
    "a mean of words": sized("image_encoder", mean=["a", "b", "c"]),
    "heads that are a list of tasks": ("no configuration", lambda _: model_file(heads="[1]")),
    "heads that are a number": ("no configuration", lambda _: model_file(heads="7")),
    "a head that is a number": ("no configuration", lambda _: model_file(heads='{"vqa": 7}')),
    "a head of classes below nothing": ("no configuration", lambda _: model_file(heads='{"vqa": {"classes": -7}}')),
    "a head of a world": ("no configuration", lambda _: model_file(heads='{"vqa": {"classes": 1152921504606846976}}')),
    "a head of seven images": (
        "no configuration",
        lambda _: model_file(heads='{"vqa": {"classes": 7, "pictures": 7}}'),
    ),
    "a head with a dot": ("describes no model", lambda _: model_file(heads='{"a.b": {"classes": 7}}')),
    "a thousand heads": (
        "no configuration",
        lambda _: model_file(heads=json.dumps({str(i): {"classes": 2} for i in range(1000)})),
    ),
    "a tensor too many": (
        "tensor extra has shape",
        lambda _: model_file(tensor=lambda t: t.update(extra=torch.ones(1))),
    ),
    "a tensor too few": ("has shape missing", lambda _: model_file(tensor=lambda t: t.pop("logit_scale"))),
    "another width than it says": ("has shape", lambda _: model_file(lambda c: c.update(embed_dim=16))),
    "weights that are whole": (
        "is of type I64",
        lambda _: model_file(tensor=lambda t: t.update(logit_scale=torch.tensor(1))),
    ),
    "weights that are no numbers": ("not finite", filled(float("nan"))),
    "weights without end": ("not finite", filled(float("inf"))),
    "weights below all numbers": ("not finite", filled(-float("inf"))),
    "a pickle": ("no readable safetensors", lambda _: saved({"a": torch.zeros(2)})),
}


def saved(content: object, **options: object) -> bytes:
    target = io.BytesIO()
    torch.save(content, target, **options)
    return target.getvalue()


class Gadget:
    """Whoever unpickles this calls what it says."""

    def __init__(self, *call: object) -> None:
        self.call = call

    def __reduce__(self) -> tuple[object, ...]:
        return (self.call[0], tuple(self.call[1:]))


def compressed(content: object) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(content))) as plain, zipfile.ZipFile(target, "w", 8) as bomb:
        for part in plain.infolist():
            bomb.writestr(zipfile.ZipInfo(part.filename), plain.read(part.filename), zipfile.ZIP_DEFLATED)
    return target.getvalue()


def renamed(draws: Random) -> bytes:
    """An archive whose pickle is a gadget of another protocol."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), b"\x80\x02cos\nsystem\nX\x04\0\0\0true\x85R.")
        archive.writestr(zipfile.ZipInfo("archive/version"), b"3\n")
    return target.getvalue()


PLAIN: dict[str, object] = {
    "a state dict": {"a": torch.zeros(2), "b": torch.ones(3, dtype=torch.float16)},
    "a state dict in order": collections.OrderedDict(a=torch.zeros(2)),
    "one beside other things": {"epoch": 3, "state_dict": {"a": torch.zeros(2)}, "optimizer": {"lr": [1.0]}},
}

UNSAFE = "more than tensors and plain values"

PICKLES: dict[str, tuple[str, Bytes]] = {
    "nothing": ("cannot be read", b""),
    "text": ("w.pt", b"no pickle\n" * 10),
    "noise": ("w.pt", lambda draws: b"\x80\x02" + draws.randbytes(500)),
    "a stop": ("w.pt", b"\x80\x02."),
    "a pickle of nothing on its stack": ("w.pt", b"\x80\x020."),
    "a build of nothing": ("w.pt", b"\x80\x02)\x81."),
    "a call of a number": ("w.pt", b"\x80\x02K\x01K\x02R."),
    "a mark without end": ("w.pt", b"\x80\x02((((("),
    "a text longer than the file": ("w.pt", b"\x80\x02X\xff\xff\xff\x7fa."),
    "a memo of a world": ("w.pt", b"\x80\x02K\x01r\xff\xff\xff\xffh\x01."),
    "a list in itself": ("w.pt", b"\x80\x02]q\x00h\x00a."),
    "brackets without end": ("w.pt", b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."),
    "a shell": (UNSAFE, lambda _: saved({"a": Gadget(os.system, "true")})),
    "a shell in protocol 0": ("w.pt", b"cos\nsystem\n(S'true'\ntR."),
    "a shell in protocol 5": ("w.pt", lambda _: pickle.dumps(Gadget(os.system, "true"), 5)),
    "a shell in the old layout": (
        UNSAFE,
        lambda _: saved({"a": Gadget(os.system, "true")}, _use_new_zipfile_serialization=False),
    ),
    "a shell under a state dict": (UNSAFE, lambda _: saved({"state_dict": {"a": Gadget(os.system, "true")}})),
    "a shell in an archive of its own": (UNSAFE, renamed),
    "an evaluation": (UNSAFE, lambda _: saved(Gadget(eval, "1"))),
    "a file to open": (UNSAFE, lambda _: saved(Gadget(open, "/etc/passwd"))),
    "an import": (UNSAFE, lambda _: saved(Gadget(__import__, "os"))),
    "an attribute of a module": (UNSAFE, lambda _: saved(Gadget(getattr, torch.Tensor, "numpy"))),
    "a path to touch": (UNSAFE, lambda _: saved({"a": Gadget(Path.touch, Path("harm"))})),
    "arguments of a program": (UNSAFE, lambda _: saved({"a": torch.zeros(1), "b": dataclasses.replace(CONFIG)})),
    "keys that are numbers": ("are no tensors", lambda _: saved({1: torch.zeros(2)})),
    "keys that are pairs": ("are no tensors", lambda _: saved({(1, 2): torch.zeros(2)})),
    "keys without end": ("are no tensors", lambda _: saved({"x" * 10**5: 1})),
    "a list": ("holds no state dict", lambda _: saved([torch.zeros(2)])),
    "a tensor alone": ("holds no state dict", lambda _: saved(torch.zeros(2))),
    "a number": ("holds no state dict", lambda _: saved(7)),
    "an empty one": ("holds no state dict", lambda _: saved({})),
    "one in itself": ("are no tensors", lambda _: saved(in_itself())),
    "sparse": ("are no tensors", lambda _: saved({"a": torch.zeros(4).to_sparse()})),
    "complex": ("are no tensors", lambda _: saved({"a": torch.zeros(4, dtype=torch.complex64)})),
    "a view of a world": ("are no tensors", lambda _: saved({"a": torch.zeros(1).expand(10**6, 10**6)})),
    "a device that is not here": ("are no tensors", lambda _: saved({"a": torch.zeros(4, device="meta")})),
    "compressed a thousandfold": ("compressed", lambda _: compressed({"a": torch.zeros(2**24)})),
    "cut in half": ("cannot be read", lambda _: (d := saved({"a": torch.zeros(1000)}))[: len(d) // 2]),
    "an archive of nothing": ("w.pt", b"PK\x05\x06" + bytes(18)),
    "TorchScript": ("w.pt", lambda _: scripted()),
}


def in_itself() -> dict[str, object]:
    found: dict[str, object] = {}
    found["a"] = found
    return found


def scripted() -> bytes:
    """What torch takes for TorchScript, which is a program."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in (("data.pkl", b"\x80\x02}."), ("constants.pkl", b"\x80\x02)."), ("version", b"3\n")):
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content)
        archive.writestr(zipfile.ZipInfo("archive/code/__torch__.py"), b"def forward(self): pass\n")
    return target.getvalue()


def checkpoint(change: Callable[[dict[str, Any]], object] = lambda _: None, data: bytes | None = None) -> Maker:
    """A folder with one checkpoint, whose digests are right; `data`: in the place of the file of tensors."""

    def make(path: Path, _: Random) -> None:
        folder = path / "step-000000003"
        folder.mkdir(parents=True)
        held = save({"weights": torch.arange(6.0).reshape(2, 3)}) if data is None else data
        (folder / "00000-0.safetensors").write_bytes(held)
        content: dict[str, Any] = {
            "format": "optima checkpoint 2",
            "files": [{"name": "00000-0.safetensors", "sha256": hashlib.sha256(held).hexdigest()}],
            "tensors": {"weights": {"type": "F32", "shape": [2, 3], "pieces": [[0, [0, 0], [2, 3]]]}},
            "state": {"config": "{}", "step": 3, "weights": None},
        }
        change(content)
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        (folder / "manifest.json").write_text(json.dumps({"sha256": digest, **content}))

    return make


def manifest(data: bytes) -> Maker:
    """A folder with one checkpoint that is a manifest alone."""

    def make(path: Path, _: Random) -> None:
        (path / "step-000000003").mkdir(parents=True)
        (path / "step-000000003" / "manifest.json").write_bytes(data)

    return make


def _of_state(**values: object) -> Maker:
    return checkpoint(lambda content: content["state"].update(values))


def _of_tensor(**values: object) -> Maker:
    return checkpoint(lambda content: content["tensors"]["weights"].update(values))


def _piped(name: str) -> Maker:
    def make(path: Path, draws: Random) -> None:
        checkpoint()(path, draws)
        (path / "step-000000003" / name).unlink()
        os.mkfifo(path / "step-000000003" / name)

    return make


def _earlier(path: Path, _: Random) -> None:
    path.mkdir()
    data = saved({"config": "{}", "step": 3})
    (path / "step-000000003.pt").write_bytes(data + hashlib.sha256(data).digest())


_DIGEST = "digest of its manifest.json is wrong"

CHECKPOINTS: dict[str, tuple[str, Maker]] = {
    "nothing": ("cannot be read", manifest(b"")),
    "an empty object": (_DIGEST, manifest(b"{}")),
    "without a digest": (_DIGEST, manifest(b'{"format": "optima checkpoint 2"}')),
    "a list of lists": ("cannot be read", manifest(b"[" * 100_000)),
    "no text": ("cannot be read", manifest(bytes(range(128, 256)))),
    "of another format": ("it is no optima", checkpoint(lambda content: content.update(format=7))),
    "a list": ("no state of a run", checkpoint(lambda content: content.update(state=[1]))),
    "a number": ("no state of a run", checkpoint(lambda content: content.update(state=7))),
    "without keys": ("'config' is NoneType", checkpoint(lambda content: content.update(state={}))),
    "with a number for its configuration": ("'config' is int", _of_state(config=7)),
    "with a text for its step": ("'step' is str", _of_state(step="3")),
    "with tensors of no type": ("cannot be read", _of_tensor(type="os.system")),
    "a petabyte in pieces": ("do not make it up", _of_tensor(shape=[2**25, 2**25])),
    "a petabyte in a piece": (
        "of another shape", _of_tensor(shape=[2**25, 2**25], pieces=[[0, [0, 0], [2**25, 2**25]]])
    ),
    "sizes below nothing": ("outside a tensor", _of_tensor(shape=[-2, -3], pieces=[[0, [0, 0], [-2, -3]]])),
    "a piece in no file": ("in none of them", _of_tensor(pieces=[[1, [0, 0], [2, 3]]])),
    "a piece in half a file": ("must be whole", _of_tensor(pieces=[[0.0, [0, 0], [2, 3]]])),
    "a piece in a true file": ("must be whole", _of_tensor(pieces=[[False, [0, 0], [2, 3]]])),
    "sizes of halves": ("must be whole", _of_tensor(shape=[2.0, 3.0], pieces=[[0, [0.0, 0], [2, 3.0]]])),
    "a piece that is a text": ("cannot be read", _of_tensor(pieces=["000"])),
    "a file elsewhere": (
        "no plain file", checkpoint(lambda content: content["files"][0].update(name="../../../etc/passwd"))
    ),
    "tensors that are text": ("cannot be read", checkpoint(data=b"no tensors\n" * 10)),
    "a shell": ("cannot be read", checkpoint(data=saved(Gadget(os.system, "true")))),
    "of the earlier layout": ("kept each in one file", _earlier),
    "a pipe": ("no plain file", _piped("manifest.json")),
    "a pipe of tensors": ("no plain file", _piped("00000-0.safetensors")),
    "a folder": ("no plain file", lambda path, _: (path / "step-000000003" / "manifest.json").mkdir(parents=True)),
}  # fmt: skip
