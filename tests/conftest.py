"""Without a GPU the Triton kernels run in Triton's interpreter on CPU tensors, at small shapes; with one they run for real.

Both are decided here, before anything imports Triton.
"""

import os
import sys

import torch
from hardware import GPU

if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ["VIT_FAST_TUNING"] = "off"  # what was measured on this machine must not decide what is tested

import pytest  # noqa: E402

if sys.platform == "linux":
    import triton  # noqa: E402, F401  (it is a dependency there: its tests are never skipped for the lack of it)


@pytest.fixture
def device():
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture
def nan_filled_memory():
    """torch.empty gives NaN: a kernel that leaves a hole, or reads what nobody wrote, shows it."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
