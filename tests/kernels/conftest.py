"""Seeds that are printed, and how many random problems are tried."""

import os
import random
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))  # for `from kernel_support import ...` under --import-mode=importlib

# OPTIMA_TEST_EXAMPLES scales how many random problems each property is tried on.
settings.register_profile(
    "kernels",
    max_examples=int(os.environ.get("OPTIMA_TEST_EXAMPLES", "25")),
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("kernels")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A fresh seed, set for torch and printed with a failing test; OPTIMA_TEST_SEED repeats a run."""
    value = int(os.environ.get("OPTIMA_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"OPTIMA_TEST_SEED={value} reproduces {request.node.nodeid}")
    torch.manual_seed(value)
    return value


@pytest.fixture
def device() -> torch.device:
    """Where kernels run in this session."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
