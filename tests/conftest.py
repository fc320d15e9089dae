"""A fresh seed for every test, printed with a failure; OPTIMA_TEST_SEED repeats one. Triton where there is no GPU."""

import os
import random

import pytest
import torch

if not torch.cuda.is_available():
    # Read at the first import of optima_kernels, whichever folder's tests come first.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Set for torch, too."""
    value = int(os.environ.get("OPTIMA_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"OPTIMA_TEST_SEED={value} reproduces {request.node.nodeid}")
    torch.manual_seed(value)
    return value
