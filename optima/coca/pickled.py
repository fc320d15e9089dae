"""How is a pickle read that others wrote? Without running a line of what it says, and no larger than its file."""

import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from optima_core.errors import OptimaError


def load_plain(path: Path) -> Any:
    """What torch.save wrote, on the CPU, if it is tensors, numbers, texts and containers of them; no code is run.

    Raises OptimaError for anything else, and for an archive that unpacks to more than the file holds. A damaged file
    may raise any exception.
    """
    if not path.is_file():
        raise OptimaError("it is no plain file")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
        # torch.save compresses nothing; what is compressed may unpack to a thousand times its size.
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise OptimaError("it is compressed, which torch.save does not do")
        if sum(part.file_size for part in parts) > path.stat().st_size:
            raise OptimaError("its parts overlap")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:
        # torch's own message advises to read the file without this check.
        raise OptimaError("it holds more than tensors and plain values, and reading it could run code") from None
