"""How many random problems are tried, and where."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

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
def device() -> torch.device:
    """Where kernels run in this session."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
