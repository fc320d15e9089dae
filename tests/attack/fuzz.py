"""Fuzzes each parser of foreign bytes with atheris, which is led by what of the code an input reaches.

    pip install atheris
    python tests/attack/fuzz.py                            every target, 100,000 inputs each
    python tests/attack/fuzz.py --target tar --runs 10000
    python tests/attack/fuzz.py --target tar --input FILE  one input again

An input must end in a result, or in an error that a command shows in a line; anything else is a crash. It is minimised
no further than atheris did, written to --crashes, and printed as an entry of `found.py`, where it belongs once mended.
The fuzzed inputs begin with those of the corpus. Each target runs in a process of its own: atheris never returns.
"""

import argparse
import base64
import contextlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "optima" / "data"), str(HERE.parent / "optima")]

READER = {
    "tar": ("tar", "thing"),
    "safetensors": ("model", "m.safetensors"),
    "row": ("row", "thing"),
    "table": ("captions", "a.tsv"),
    "words": ("words", "words.json"),
    "vocabulary": ("vocabulary", "v.json"),
    "pieces": ("vocabulary", "v.model"),
    "pairs": ("vocabulary", "v.txt.gz"),
    "yaml": ("config", "c.yaml"),
    "png": ("image", "thing"),
}
"""Target -> the corpus's reader of such things, and the file name that it goes by."""

INSTRUMENTED = ["optima.data", "optima.coca.checkpoint", "optima.coca.config", "optima.runs.words", "optima.plain_yaml"]


def parser_of(target: str, folder: Path) -> Callable[[bytes], None]:
    """What is called with each input; it raises if the input was not handled."""
    from optima.coca.checkpoint import load_coca
    from optima.data.formats.folder import _jsonl, _tsv
    from optima.data.images import decode, inspect
    from optima.data.record import Collector, Unusable, clean_text, safe_name
    from optima.data.tar_index import tar_members
    from optima.data.tokenizers import named_tokenizer
    from optima.plain_yaml import load_yaml
    from optima.runs.words import read_words
    from optima_core.errors import OptimaError

    path = folder / READER[target][1]

    def rows(data: bytes) -> None:
        path.write_bytes(data)
        for _, name, texts in (_jsonl if target == "row" else _tsv)(path, Collector()):
            with contextlib.suppress(Unusable):
                safe_name(name)
            for text in texts:
                with contextlib.suppress(Unusable):
                    clean_text(text, "a caption")

    def tar(data: bytes) -> None:
        path.write_bytes(data)
        last = -1
        with contextlib.suppress(Unusable):
            for member in tar_members(path):
                assert last < member.offset <= member.offset + member.size <= len(data)
                last = member.offset

    def image(data: bytes) -> None:
        with contextlib.suppress(Unusable):
            decode(data, inspect(data))

    def file(read: Callable[[], object]) -> Callable[[bytes], None]:
        def parse(data: bytes) -> None:
            path.write_bytes(data)
            with contextlib.suppress(OptimaError, ValueError, OSError):
                read()

        return parse

    def yaml(data: bytes) -> None:
        with contextlib.suppress(OptimaError):
            load_yaml(data.decode("utf-8", "replace"), "config")

    return {
        "tar": tar,
        "safetensors": file(lambda: load_coca(path)),
        "row": rows,
        "table": rows,
        "words": file(lambda: read_words(folder)),
        "vocabulary": file(lambda: named_tokenizer(str(path))),
        "pieces": file(lambda: named_tokenizer(str(path))),
        "pairs": file(lambda: named_tokenizer(str(path))),
        "yaml": yaml,
        "png": image,
    }[target]


def write_seeds(target: str, folder: Path) -> None:
    """The corpus's inputs for the target, those below 64 KiB."""
    from corpus import CASES

    reader, name = READER[target]
    (folder / "seeds").mkdir()
    for place, case in enumerate(case for case in CASES if case.reader == reader and case.file in (name, "thing")):
        inner = folder / f"making-{place}"
        inner.mkdir()
        case.make(inner / case.file, Random(0))
        made = inner / case.file / name if (inner / case.file).is_dir() else inner / case.file
        if made.is_file() and not made.is_symlink() and made.stat().st_size < 2**16:
            (folder / "seeds" / str(place)).write_bytes(made.read_bytes())


def fuzz(target: str, words: argparse.Namespace) -> None:
    """Runs one target in this process, and never returns."""
    import atheris

    folder = words.inner
    with atheris.instrument_imports(include=INSTRUMENTED):
        parse = parser_of(target, folder)
    write_seeds(target, folder)
    options = [f"-runs={words.runs}", f"-max_total_time={words.seconds}", "-timeout=20", "-rss_limit_mb=4096"]
    options += ["-max_len=65536", f"-artifact_prefix={words.crashes}/{target}-", "-print_final_stats=1", "-seed=1"]
    atheris.Setup([sys.argv[0], *options, str(folder / "seeds")], parse)
    atheris.Fuzz()


def run_target(target: str, words: argparse.Namespace) -> bool:
    """Runs a target in a process of its own, prints a line, and says whether nothing crashed."""
    inner = [sys.executable, __file__, "--target", target, "--runs", str(words.runs), "--seconds", str(words.seconds)]
    with tempfile.TemporaryDirectory() as folder:
        inner += ["--crashes", str(words.crashes), "--inner", folder]
        ended = subprocess.run(inner, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")

    def last(pattern: str) -> str:
        return (re.findall(pattern, ended.stdout) or ["?"])[-1]

    crashes = sorted(words.crashes.glob(f"{target}-*"))
    done, peak = last(r"number_of_executed_units:\s*(\d+)"), last(r"peak_rss_mb:\s*(\d+)")
    reached = last(r"cov: (\d+)")
    print(f"{target}: {done} inputs, {reached} branches reached, {len(crashes)} crashes, peak {peak} MiB", flush=True)
    for path in crashes:
        text = base64.b64encode(path.read_bytes()).decode()
        print(f'  ("{READER[target][0]}", "{READER[target][1]}", "{text}", "refused", ""),')
    if ended.returncode:
        print(ended.stdout[-3000:])
    return not ended.returncode and not crashes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=READER, action="append", help="one of them, or several; by default all")
    parser.add_argument("--runs", type=int, default=100_000, help="inputs a target")
    parser.add_argument("--seconds", type=int, default=600, help="at most, a target")
    parser.add_argument("--crashes", type=Path, default=Path("crashes"), help="folder for inputs that crashed")
    parser.add_argument("--input", type=Path, help="a single input to try")
    parser.add_argument("--inner", type=Path, help=argparse.SUPPRESS)
    words = parser.parse_args()
    targets = words.target or list(READER)
    if words.input is not None:
        with tempfile.TemporaryDirectory() as name:
            parser_of(targets[0], Path(name))(words.input.read_bytes())
        return 0
    words.crashes.mkdir(parents=True, exist_ok=True)
    if words.inner is not None:
        fuzz(targets[0], words)
    fine = [run_target(target, words) for target in targets]
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
