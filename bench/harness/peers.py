"""Other people's packages: imported where they are installed, or a reason why they are not measured."""

import contextlib
import importlib
import importlib.util
import io
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from bench.harness.contest import Unavailable


def peer(module: str, package: str, install: str) -> ModuleType:
    """The imported module, without what it prints.

    Raises Unavailable, naming the package and how to install it.
    """
    if importlib.util.find_spec(package) is None:
        raise Unavailable(f"not installed: {install}")
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except Exception as error:
        raise Unavailable(f"cannot be imported: {type(error).__name__}: {error}") from error


def textbrewer() -> ModuleType:
    """Its file of losses alone: the package's own import wants a dozen others."""
    package = importlib.util.find_spec("textbrewer")
    if package is not None:
        sys.modules.setdefault("textbrewer", importlib.util.module_from_spec(package))  # not executed
    return peer("textbrewer.losses", "textbrewer", 'pip install ".[bench]"')


def torchdistill() -> ModuleType:
    # It declares torchvision as a dependency, which its losses do not import.
    return peer("torchdistill.losses.mid_level", "torchdistill", "pip install --no-deps torchdistill==1.1.5")


def liger() -> ModuleType:
    return peer("liger_kernel.chunked_loss", "liger_kernel", 'pip install ".[bench]"')


def mabwiser() -> ModuleType:
    return peer("mabwiser.mab", "mabwiser", 'pip install ".[bench]"')


def smpybandits() -> ModuleType:
    return peer("SMPyBandits.Policies", "SMPyBandits", 'pip install ".[bench]" (Python before 3.13)')


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` of it, afresh; a failure to compile becomes Unavailable."""
    torch.compiler.reset()
    made = torch.compile(function, dynamic=False)

    def call(*arguments: Any) -> Any:
        try:
            return made(*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise Unavailable(f"does not compile: {str(error).strip().splitlines()[0][:200]}") from error

    return call
