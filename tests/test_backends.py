"""Selecting an implementation: by name without falling back, by auto, by the environment."""

import os
import subprocess
import sys

import pytest
import torch
from hardware import GPU

import vit_fast
from vit_fast import backends
from vit_fast.backends import OPERATIONS, Implementation, Operation


@pytest.fixture
def operation():
    def supports(x):
        return None if x > 0 else f"it needs a positive x, got {x}"

    yield Operation(
        "double",
        {
            "reference": Implementation(lambda x: ("reference", 2 * x), backends.anything),
            "torch": Implementation(lambda x: ("torch", 2 * x), backends.anything),
            "cpp": Implementation(lambda x: ("cpp", 2 * x), supports),
        },
        order=("cpp", "torch"),
    )
    del OPERATIONS["double"]


def test_auto_takes_the_first_that_supports_the_inputs(operation):
    assert operation(1) == ("cpp", 2) and operation(-1) == ("torch", -2)


def test_a_named_implementation_never_falls_back(operation):
    with vit_fast.use("cpp"):
        assert operation(1) == ("cpp", 2)
        with pytest.raises(RuntimeError, match="^double: implementation 'cpp' cannot run: it needs a positive x, got -1$"):
            operation(-1)
    with vit_fast.use("triton"), pytest.raises(RuntimeError, match="no such implementation .it has reference, torch, cpp"):
        operation(1)


def test_use_nests_and_restores(operation):
    with vit_fast.use("reference"):
        with vit_fast.use("torch"):
            assert operation(1)[0] == "torch"
        assert operation(1)[0] == "reference"
    assert backends.selected() == "auto"
    with pytest.raises(KeyError), vit_fast.use("torch"):
        raise KeyError
    assert backends.selected() == "auto"


def test_use_as_a_plain_call(operation):
    try:
        vit_fast.use("reference")
        assert operation(1)[0] == "reference"
    finally:
        vit_fast.use("auto")


def test_unknown_name():
    with pytest.raises(ValueError, match="unknown implementation 'cuda': choose one of reference, torch, triton, cpp, auto"):
        vit_fast.use("cuda")
    assert backends.selected() == "auto"


def test_environment_variable():
    code = "import vit_fast; print(vit_fast.backends.selected())"
    environment = {**os.environ, "VIT_FAST_IMPL": "torch"}
    assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout == "torch\n"
    environment["VIT_FAST_IMPL"] = "fastest"
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode != 0 and "unknown implementation 'fastest'" in result.stderr


def test_what_runs_here():
    status = vit_fast.backends()
    assert list(status) == ["reference", "torch", "triton", "cpp"] and status["reference"] is None and status["torch"] is None
    assert set(OPERATIONS) >= {"patch_embed", "layer_norm", "linear", "mlp", "attention"}


@pytest.mark.skipif(GPU, reason="says what happens on a machine without a GPU")
def test_without_a_gpu_triton_says_why():
    code = "import torch, vit_fast\nvit_fast.use('triton')\nvit_fast.ops.attention(torch.zeros(1, 4, 3 * 16), num_heads=1)\n"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.stderr.endswith("RuntimeError: attention: implementation 'triton' cannot run: no CUDA device\n")


@pytest.mark.skipif(GPU, reason="auto takes the kernels on a GPU")
def test_auto_leaves_the_interpreter_to_tests():
    x = torch.zeros(2, 8)
    assert OPERATIONS["layer_norm"].choose(x, x[0], x[0], 1e-6, None) in ("cpp", "torch")


def test_transforms_take_the_stock_operations():
    x = torch.randn(2, 8, requires_grad=True)

    def total(x):
        return vit_fast.ops.layer_norm(x, torch.ones(8), torch.zeros(8)).square().sum()

    torch.testing.assert_close(torch.func.grad(total)(x.detach()), torch.autograd.grad(total(x), x)[0])
    with vit_fast.use("triton"), pytest.raises(RuntimeError, match="inside torch.func transforms only stock"):
        torch.func.grad(total)(x.detach())
