"""Without a GPU the Triton kernels run in Triton's interpreter on CPU tensors, at small shapes; with one they run for real.

Both are decided here, before anything imports Triton.
"""

import os
import sys

import numpy as np
import torch
from hardware import GPU

if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ["VIT_FAST_TUNING"] = "off"  # what was measured on this machine must not decide what is tested

import pytest  # noqa: E402

if sys.platform == "linux":
    import triton  # noqa: E402, F401  (it is a dependency there: its tests are never skipped for the lack of it)


def _round_as_gpus_do():
    """float32 becomes the nearest bfloat16: Triton's interpreter cuts it off, an error of its own that is twice as large."""
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(values, source, target, mode):
        if (str(source), str(target)) != ("fp32", "bf16"):
            return convert(values, source, target, mode)
        return torch.from_numpy(np.array(values)).bfloat16().view(torch.uint16).numpy()

    interpreter._convert_float = rounded


if sys.platform == "linux" and not GPU:
    _round_as_gpus_do()


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
