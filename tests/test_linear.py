"""linear and mlp: forward and every gradient, implementation × dtype, against the reference in float64."""

import pytest
import torch
import torch.nn.functional as F
from hardware import GPU

from vit_fast import backends
from vit_fast.kernels import epilogue as epilogue_kernels
from vit_fast.kernels import linear as kernels
from vit_fast.kernels.common import TARGETS, Target
from vit_fast.ops.linear import linear
from vit_fast.ops.mlp import mlp
from vit_fast.testing import assert_within_budget, randn, with_gradients

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

HALVES = [torch.float16, torch.bfloat16]
ON = [("reference", torch.float64), ("torch", torch.float64)] + [
    (name, dtype) for name in ("reference", "torch", "triton") for dtype in (torch.float32, *HALVES)
]
TRITON = [dtype for name, dtype in ON if name == "triton"]
ACTIVATIONS = ["gelu", "gelu_tanh"]


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """In the interpreter: so that small shapes, too, have several groups of tiles and several steps down the rows."""
    if not GPU:
        monkeypatch.setattr(kernels, "_GROUP", 2)
        monkeypatch.setattr(epilogue_kernels, "target_of", lambda device: Target("cuda", 80, 1, 163 * 1024))


def linear_inputs(leading, depth, columns, dtype, device, bias=True, residual=False):
    """x, weight, and bias and residual or None. z = x Wᵀ + b has a variance near 2: both branches of GELU matter."""
    x = randn(*leading, depth, dtype=dtype, device=device, seed=1)
    weight = randn(columns, depth, dtype=dtype, device=device, seed=2, scale=depth**-0.5)
    b = randn(columns, dtype=dtype, device=device, seed=3) if bias else None
    return x, weight, b, randn(*leading, columns, dtype=dtype, device=device, seed=4) if residual else None


def mlp_inputs(leading, width, hidden, dtype, device, residual=False):
    x, weight1, bias1, _ = linear_inputs(leading, width, hidden, dtype, device)
    weight2 = randn(width, hidden, dtype=dtype, device=device, seed=5, scale=hidden**-0.5)
    bias2 = randn(width, dtype=dtype, device=device, seed=6)
    return x, weight1, bias1, weight2, bias2, randn(*leading, width, dtype=dtype, device=device, seed=7) if residual else None


def linear_of(activation):
    return lambda x, weight, bias, residual: linear(x, weight, bias, activation, residual)


def mlp_of(activation):
    return lambda *tensors: mlp(*tensors[:5], activation, tensors[5])


def check(function, implementation, tensors):
    """Outputs and gradients of an implementation, against the reference's in the same dtype and in float64."""

    def of(name, tensors):
        with backends.use(name):
            outputs, gradients = with_gradients(function, tensors)
        return outputs + [g for g in gradients if g is not None]

    exact = of("reference", [t if t is None else t.double() for t in tensors])
    actual, reference = of(implementation, tensors), of("reference", tensors)
    assert [a.dtype for a in actual] == [r.dtype for r in reference]
    assert_within_budget(actual, reference, exact, "output and gradients")


# (leading axes, K, M): K = 1, M = 1; N = 197; nothing a multiple of anything; whole tiles; a vector.
SHAPES = [((5,), 1, 1), ((1, 197), 48, 20), ((3, 1, 11), 67, 45), ((64,), 128, 64), ((), 17, 9)]
REAL = [((8, 197), 768, 3072), ((8, 197), 3072, 768), ((1, 197), 192, 192), ((2, 257), 1408, 1408)] if GPU else []
EPILOGUES = [("gelu", True, False), ("gelu", False, False), ("gelu_tanh", True, True), (None, True, True), (None, False, True)]


@pytest.mark.parametrize("implementation, dtype", ON)
@pytest.mark.parametrize("shape", SHAPES + REAL, ids=str)
def test_linear(shape, implementation, dtype, device):
    check(linear_of("gelu"), implementation, linear_inputs(*shape, dtype, device, residual=True))


@pytest.mark.parametrize("implementation, dtype", ON)
@pytest.mark.parametrize("activation, bias, residual", EPILOGUES)
def test_linear_epilogues(activation, bias, residual, implementation, dtype, device):
    check(linear_of(activation), implementation, linear_inputs((3, 23), 40, 33, dtype, device, bias, residual))


MLP_SHAPES = [((5,), 1, 1), ((1, 197), 20, 40), ((3, 1, 11), 45, 67), ((64,), 64, 128), ((), 9, 17)]
MLP_REAL = [((8, 197), 768, 3072), ((1, 197), 192, 768), ((2, 257), 1408, 6144)] if GPU else []


@pytest.mark.parametrize("implementation, dtype", ON)
@pytest.mark.parametrize("shape", MLP_SHAPES + MLP_REAL, ids=str)
def test_mlp(shape, implementation, dtype, device):
    check(mlp_of("gelu"), implementation, mlp_inputs(*shape, dtype, device, residual=True))


@pytest.mark.parametrize("implementation, dtype", ON)
@pytest.mark.parametrize("activation, residual", [("gelu", False), ("gelu_tanh", True), ("gelu_tanh", False)])
def test_mlp_epilogues(activation, residual, implementation, dtype, device):
    check(mlp_of(activation), implementation, mlp_inputs((3, 23), 33, 40, dtype, device, residual))


@pytest.mark.parametrize("dtype", TRITON)
@pytest.mark.parametrize("index", range(3))
def test_every_tile_of_the_table(index, dtype, device, monkeypatch):
    """The large ones are for shapes that the interpreter has no time for: here each gets several blocks of every axis."""
    config = kernels._TILES["wide", dtype.itemsize][index]
    monkeypatch.setattr(kernels, "product_config", lambda *shape: config)
    rows, depth, columns = 2 * config.rows + 5, config.depth + 7, config.columns + 9
    check(linear_of(None), "triton", linear_inputs((rows,), depth, columns, dtype, device, residual=True))
    check(mlp_of("gelu"), "triton", mlp_inputs((rows,), 24, columns, dtype, device))


# ---- GELU's range, and values at its ends ---------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", TRITON)
def test_gelu_is_accurate_everywhere(dtype, activation, device):
    """Through a layer of one channel with weight 1, and a wider residual of zeros, so that y is not rounded to 16 bits."""
    z = torch.linspace(-12, 12, 601, device=device).to(dtype)[:, None]
    weight, residual = torch.ones(1, 1, dtype=dtype, device=device), torch.zeros(z.shape, device=device)
    y = torch.ops.vit_fast.linear_fwd(z, weight, None, activation, residual, False)[0]
    exact = F.gelu(z.double(), approximate="tanh" if activation == "gelu_tanh" else "none")
    error = (y.double() - exact).abs()
    # 2.5e-5 is what the σ form promises for 16-bit tensors; everything else is a few float32 roundings.
    assert error.max() <= (2.6e-5 if activation == "gelu" and dtype in HALVES else 2e-6)
    if dtype in HALVES:
        assert (error <= torch.finfo(dtype).eps * exact.abs() + 2.6e-5 * z.abs().double().clamp(max=1)).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", TRITON)
def test_gelu_derivative_is_accurate_everywhere(dtype, activation, device):
    z = torch.linspace(-12, 12, 1200, device=device).to(dtype).view(6, 200)
    dy = randn(6, 200, dtype=dtype, device=device)

    def stock(dy, z):
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        dz = torch.ops.aten.gelu_backward(dy, z, approximate=approximate)
        return dz, dz.sum(0), F.gelu(z, approximate=approximate)

    actual = torch.ops.vit_fast.epilogue_bwd(dy, z, activation, keep_activation=True)
    assert_within_budget(actual, stock(dy, z), stock(dy.double(), z.double()), "dz, dbias and h")
    dz, dbias, h = torch.ops.vit_fast.epilogue_bwd(dy, z, activation)
    assert torch.equal(dz, actual[0]) and torch.equal(dbias, actual[1]) and h.numel() == 0


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", TRITON)
def test_extreme_values(dtype, activation, device):
    x = torch.tensor([-1e4, -300.0, -20.0, -1e-4, 0.0, 1e-4, 20.0, 300.0, 1e4], device=device).to(dtype)[:, None]
    weight = torch.tensor([[1.0], [-1.0], [0.5]], device=device).to(dtype)
    check(linear_of(activation), "triton", (x, weight, torch.zeros(3, dtype=dtype, device=device), None))
    square = torch.eye(3, dtype=dtype, device=device)
    bias = torch.zeros(3, dtype=dtype, device=device)
    check(mlp_of(activation), "triton", (x, weight, bias, square, bias, x.expand(-1, 3).contiguous()))


@pytest.mark.parametrize("dtype", TRITON)
def test_small_inputs_keep_their_relative_accuracy(dtype, device):
    x, weight, _, _ = linear_inputs((33,), 24, 20, dtype, device)
    check(linear_of("gelu"), "triton", ((x * 2**-8), weight, None, None))


@pytest.mark.parametrize("dtype", TRITON)
def test_not_a_number_stays_in_its_row(dtype, device):
    """Rows past the end repeat the last one, and channels past the end are zeros: neither may carry a NaN elsewhere."""
    x, weight, bias, residual = linear_inputs((37,), 40, 24, dtype, device, residual=True)
    x[3] = float("nan")
    x[36, 5] = float("inf")
    with backends.use("triton"):
        y = linear(x, weight, bias, "gelu", residual)
    broken = ~y.isfinite().all(-1)
    assert broken.nonzero().flatten().tolist() == [3, 36]


# ---- Layouts --------------------------------------------------------------------------------------------------------


def test_strides_that_are_taken(device):
    x, weight, bias, residual = linear_inputs((4, 6), 24, 40, torch.float32, device, residual=True)
    wide = randn(4, 6, 64, device=device)
    layouts = {
        "rows of a wider tensor": (wide[..., 8:32], weight, bias, wide[..., 24:]),
        "a token of each image": (x[:, 2], weight, bias, residual[:, 3]),
        "one token, kept as an axis": (x[:, 2:3], weight, bias, residual[:, 3:4]),
        "a transposed weight": (x, weight.t().contiguous().t(), bias, residual),
        "rows of a wider weight": (x, randn(40, 64, device=device)[:, 3:27], bias, residual),
        "every second row of a weight": (x, randn(80, 24, device=device)[::2], bias, residual),
        "an expanded residual": (x[0], weight, bias, residual[0, :1].expand(6, 40)),
    }
    for tensors in layouts.values():
        for activation in ("gelu", None):
            check(linear_of(activation), "triton", _as_given(tensors))
    tensors = mlp_inputs((4, 6), 24, 40, torch.float32, device, residual=True)
    weight2 = tensors[3].t().contiguous().t()
    check(mlp_of("gelu"), "triton", _as_given((wide[..., :24], *tensors[1:3], weight2, tensors[4], wide[..., 40:])))


def _as_given(tensors):
    """`with_gradients` detaches, which keeps strides; `.double()` does not: the exact result has no use for them."""
    assert any(not t.is_contiguous() or t.shape[-2:-1] == (1,) for t in tensors)
    return tensors


def test_gradients_in_any_layout(device):
    """A sum's gradient is one element expanded; a transposed consumer's is not contiguous."""
    tensors = mlp_inputs((3, 5), 12, 20, torch.float32, device, residual=True)
    check(lambda *t: mlp_of("gelu")(*t).sum(), "triton", tensors)
    check(lambda *t: mlp_of("gelu")(*t).transpose(0, 2) * 2, "triton", tensors)
    tensors = linear_inputs((3, 5), 12, 20, torch.float32, device, residual=True)
    for activation in ("gelu", None):
        check(lambda *t: linear_of(activation)(*t).sum(), "triton", tensors)  # noqa: B023 - called at once
        check(lambda *t: linear_of(activation)(*t).transpose(0, 2) * 2, "triton", tensors)  # noqa: B023


def test_past_2_to_31(device):
    """Row 2 lies 2**31 elements behind row 0; a 32-bit product of row and stride points as far before it instead."""
    stride = 2**30
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # the pages that nobody touches are never committed
    try:
        storage = torch.empty(4 * stride + 640, dtype=torch.bfloat16, device=device)
    except RuntimeError as error:
        pytest.skip(f"needs {8 * 2**30} bytes of address space: {error}")
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before
    storage[:512] = 0  # where a wrapped address points

    def far(tensor, column):
        view = storage.as_strided(tensor.shape, (stride, 1), 2 * stride + column)
        return view.copy_(tensor)

    x, weight, bias, residual = linear_inputs((3,), 40, 3, torch.bfloat16, device, residual=True)
    expected = kernels.linear_fwd(x, weight, bias, "gelu", residual, True)
    actual = kernels.linear_fwd(far(x, 0), far(weight, 64), bias, "gelu", far(residual, 128), True)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))

    # What the launchers allocate themselves has contiguous rows: the kernels take a row stride, so they are launched directly.
    def product(kernel, *arguments, columns, depth, **constants):
        config = kernels.product_config(3, columns, depth, torch.bfloat16, kernels.target_of(x.device))
        constants |= kernels._constants(config, columns, depth, torch.bfloat16, "gelu")
        kernel[(1,)](*arguments, **constants)

    y, z = far(torch.zeros_like(residual), 192), far(torch.zeros_like(residual), 256)
    sizes = (3, 3, 40, 40, weight.stride(0), 1, 3, stride)
    none = (0, 1.0, 0, 1.0, 1)  # nothing is dropped
    arguments = (x, weight, bias, residual, None, y, z, *sizes, *none)
    product(kernels._linear_fwd_kernel, *arguments, columns=3, depth=40, DROPOUT=False, STOCHASTIC_DEPTH=False)
    assert torch.equal(y, expected[0]) and torch.equal(z, expected[1])

    dy, weight2 = randn(3, 8, dtype=torch.bfloat16, device=device), randn(8, 3, dtype=torch.bfloat16, device=device, seed=1)
    expected = kernels.linear_dgelu_bwd(dy, weight2, z.contiguous(), "gelu", keep_activation=True)
    h = far(torch.zeros_like(residual), 512)
    dz, partial = far(torch.zeros_like(residual), 320), torch.empty(1, 3, device=device)
    sizes = (3, 3, 8, stride, 1, 3, stride)
    arguments = (far(dy, 384), weight2, z, None, dz, h, partial, *sizes, *none[:2])
    product(kernels._linear_dgelu_bwd_kernel, *arguments, columns=3, depth=8, DROPOUT=False)
    assert torch.equal(dz, expected[0]) and torch.equal(partial[0].bfloat16(), expected[1]) and torch.equal(h, expected[2])

    dy = randn(3, 3, dtype=torch.bfloat16, device=device)
    expected = epilogue_kernels.epilogue_bwd(dy, z.contiguous(), "gelu", keep_activation=True)
    constants = dict(ACTIVATION="gelu", ERF=False, ACC=epilogue_kernels.accumulator(torch.bfloat16), STAGES=2)
    constants |= dict(DROPOUT=False, STOCHASTIC_DEPTH=False, BLOCK_ROWS=16, BLOCK_COLUMNS=32)
    h.zero_()
    epilogue_kernels._epilogue_bwd_kernel[(1, 1)](far(dy, 448), z, None, dz, h, partial, 3, 3, stride, *none, **constants)
    assert torch.equal(dz, expected[0]) and torch.equal(partial[0].bfloat16(), expected[1]) and torch.equal(h, expected[2])


@pytest.mark.parametrize("implementation", ["reference", "torch", "triton"])
def test_empty_batch(implementation, device):
    tensors = linear_inputs((0, 5), 12, 20, torch.float32, device, residual=True)
    with backends.use(implementation):
        for activation in ("gelu", None):
            (y,), gradients = with_gradients(linear_of(activation), tensors)
            assert y.shape == (0, 5, 20) and [g.shape for g in gradients] == [t.shape for t in tensors]
            assert all((g == 0).all() for g in gradients)
        tensors = mlp_inputs((0, 5), 12, 20, torch.float32, device, residual=True)
        (y,), gradients = with_gradients(mlp_of("gelu"), tensors)
        assert y.shape == (0, 5, 12) and all((g == 0).all() for g in gradients)


# ---- What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x, w, b, r: linear(x, w[:, :5], b), ValueError, r"linear: weight must be \[20, 12\], got \[20, 5\]"),
        (lambda x, w, b, r: linear(x, w, b[:5]), ValueError, r"linear: bias must be \[20\], got \[5\]"),
        (
            lambda x, w, b, r: linear(x, w, b, None, r[:1]),
            ValueError,
            r"linear: residual must be \[3, 4, 20\], got \[1, 4, 20\]",
        ),
        (lambda x, w, b, r: linear(x, w, b, "relu"), ValueError, "linear: activation must be one of .* got 'relu'"),
        (lambda x, w, b, r: linear(x, w.half(), b), TypeError, "linear: weight must be float32 as x is, got float16"),
        (lambda x, w, b, r: linear(x, w, b.to("meta")), ValueError, "linear: bias must be on .* as x is, got meta"),
        (lambda x, w, b, r: mlp(x, w, b, w, b), ValueError, r"mlp: fc2_weight must be \[20, 20\], got \[20, 12\]"),
        (lambda x, w, b, r: mlp(x, w, b, w.t(), b[:12], None), ValueError, "mlp: activation must be .* got None"),
    ],
)
def test_refused_by_the_operation(call, error, message, device):
    with pytest.raises(error, match=message):
        call(*linear_inputs((3, 4), 12, 20, torch.float32, device, residual=True))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x, w, b, r: (x[:, 1:], w, b, None), r"x's leading axes must flatten to one, got shape \[3, 3, 12\]"),
        (lambda x, w, b, r: (x.transpose(0, 2).contiguous().transpose(0, 2), w, b, None), "x's "),
        (lambda x, w, b, r: (x[0].t().contiguous().t(), w, b, None), "x's last axis must be contiguous"),
        (lambda x, w, b, r: (x, w, b, r.transpose(0, 1).contiguous().transpose(0, 1)), "residual's leading axes must flatten"),
        (lambda x, w, b, r: (x, torch.cat([w, w], 1)[:, ::2], b, None), "a weight must be contiguous along one axis"),
        (lambda x, w, b, r: (x, w, torch.cat([b, b])[::2], None), "a bias must be contiguous"),
        (lambda x, w, b, r: (x[..., :0], w[:, :0], b, None), r"a weight must have elements, got \[20, 0\]"),
    ],
)
def test_refused_by_triton_alone(change, message, device):
    x, weight, bias, residual = change(*linear_inputs((3, 4), 12, 20, torch.float32, device, residual=True))
    with backends.use("torch"):
        assert linear(x, weight, bias, "gelu", residual).isfinite().all()
    with backends.use("triton"), pytest.raises(RuntimeError, match="linear: implementation 'triton' cannot run: .*" + message):
        linear(x, weight, bias, "gelu", residual)
    if residual is None:
        square = torch.zeros(weight.shape[0], weight.shape[0], device=device)
        with backends.use("triton"), pytest.raises(RuntimeError, match="mlp: implementation 'triton' cannot run: .*" + message):
            mlp(x, weight, bias, square, torch.zeros(weight.shape[0], device=device))


@pytest.fixture(params=[False, True], ids=["ieee", "tf32"])
def tf32(request):
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = request.param
    yield request.param
    torch.backends.cuda.matmul.allow_tf32 = before


def test_auto_leaves_ieee_float32_to_stock(tf32, device, monkeypatch):
    """As a GPU would see it: whether `auto` may take the kernels, not whether it does here."""
    monkeypatch.setattr(backends, "_selected", "auto")
    x, weight, bias, residual = linear_inputs((3, 4), 12, 12, torch.float32, device, residual=True)
    half = [t.bfloat16() for t in (x, weight, bias)]
    refused = backends.OPERATIONS["linear"].reason_against("triton", x, weight, bias, "gelu", residual)
    assert (refused is None) == tf32 and (tf32 or "allow_tf32" in refused)
    refused = backends.OPERATIONS["mlp"].reason_against("triton", x, weight, bias, weight, bias, "gelu", residual)
    assert (refused is None) == tf32
    assert backends.OPERATIONS["linear"].reason_against("triton", *half, "gelu", None) is None

    def doubled_if_taken(x):  # a compiled model asks while it is traced
        return x if backends.OPERATIONS["linear"].reason_against("triton", x, weight, bias, "gelu", residual) else 2 * x

    torch._dynamo.reset()
    compiled = torch.compile(doubled_if_taken, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), 2 * x if tf32 else x)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert backends.OPERATIONS["linear"].reason_against("triton", x, weight, bias, "gelu", residual) is None


# ---- What is computed by whom, and kept -----------------------------------------------------------------------------


def test_a_product_without_epilogue_is_stock(device, monkeypatch):
    monkeypatch.setattr(kernels, "linear_fwd", None)
    x, weight, bias, residual = linear_inputs((3, 4), 12, 20, torch.float32, device, residual=True)
    with backends.use("triton"):
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
        with pytest.raises(TypeError):  # the launcher that was taken away
            linear(x, weight, bias, None, residual)


def test_gradients_of_some_inputs_alone(device):
    """Frozen parameters: what is asked for is what all of them give, whichever others are frozen."""
    cases = [(linear_of("gelu"), linear_inputs((3, 5), 12, 20, torch.float32, device, residual=True))]
    cases.append((linear_of(None), cases[0][1]))
    cases.append((mlp_of("gelu"), mlp_inputs((3, 5), 12, 20, torch.float32, device, residual=True)))
    with backends.use("triton"):
        for function, tensors in cases:
            dy = randn(*function(*tensors).shape, device=device, seed=9)
            leaves = [t.detach().requires_grad_() for t in tensors]
            everything = torch.autograd.grad(function(*leaves), leaves, dy)
            for i, whole in enumerate(everything):
                some = [t.detach().requires_grad_(j == i) for j, t in enumerate(tensors)]
                assert torch.equal(torch.autograd.grad(function(*some), some[i], dy)[0], whole), i


def test_nothing_is_kept_without_need(device):
    """z is there for the gradients that pass the activation: not in inference, and not where the second layer alone learns."""
    tensors = mlp_inputs((3, 5), 12, 20, torch.float32, device)
    with backends.use("triton"):
        assert mlp_of("gelu")(*tensors).grad_fn is None
        tensors[4].requires_grad_()
        y = mlp_of("gelu")(*tensors)
        assert all(t is None for t in y.grad_fn.saved_tensors)
        tensors[3].requires_grad_()
        y = mlp_of("gelu")(*tensors)
        assert [t.shape for t in y.grad_fn.saved_tensors if t is not None] == [(3, 5, 20)]


def test_the_output_can_be_changed_in_place(device):
    """A custom function's output that is a view of something could not."""
    for function, tensors in (
        (linear_of("gelu"), linear_inputs((3, 5), 12, 20, torch.float32, device, residual=True)),
        (mlp_of("gelu"), mlp_inputs((3, 5), 12, 20, torch.float32, device, residual=True)),
    ):
        check(lambda *t: function(*t).mul_(2), "triton", tensors)  # noqa: B023 - called at once


def test_deterministic(device):
    tensors = mlp_inputs((150,), 24, 40, torch.bfloat16, device, residual=True)
    with backends.use("triton"):
        first, second = (with_gradients(mlp_of("gelu"), tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_autocast(implementation, dtype, device):
    """Parameters in float32: the products are in autocast's dtype, and a float32 residual makes the sum float32."""

    def of(name, function, tensors, enabled=True):
        def called(*tensors):
            with torch.autocast(device.type, dtype=dtype, enabled=enabled):
                return function(*tensors)

        with backends.use(name):
            outputs, gradients = with_gradients(called, tensors)
        return outputs + [g for g in gradients if g is not None]

    for residual in (False, True):
        for function, tensors in (
            (linear_of("gelu"), linear_inputs((3, 23), 24, 40, torch.float32, device, residual=residual)),
            (linear_of(None), linear_inputs((3, 23), 24, 40, torch.float32, device, residual=residual)),
            (mlp_of("gelu"), mlp_inputs((3, 23), 24, 40, torch.float32, device, residual=residual)),
        ):
            actual, reference = (of(name, function, tensors) for name in (implementation, "reference"))
            exact = of("reference", function, [t if t is None else t.double() for t in tensors], enabled=False)
            assert [a.dtype for a in actual] == [r.dtype for r in reference]
            assert actual[0].dtype == (torch.float32 if residual else dtype)
            # The cotangents are random numbers of the output's dtype: the exact result must see the same ones.
            if residual:
                assert_within_budget(actual, reference, exact, "output and gradients", dtype=dtype)
            else:
                assert_within_budget(actual[0], reference[0], exact[0], "output", dtype=dtype)


# ---- The compiler's view --------------------------------------------------------------------------------------------


def test_opcheck(device):
    x, weight, bias, residual = linear_inputs((3, 5), 12, 20, torch.bfloat16, device, residual=True)
    ops = torch.ops.vit_fast
    for arguments in (
        (x, weight, bias, "gelu", None, True),
        (x, weight, None, "gelu_tanh", residual, False),
        (x[:, 1], weight.t().contiguous().t(), bias, None, residual[:, 0].float(), True),
    ):
        torch.library.opcheck(ops.linear_fwd.default, arguments)
    torch.library.opcheck(ops.linear_dgelu_bwd.default, (x, weight.t(), residual, "gelu"))
    torch.library.opcheck(ops.epilogue_bwd.default, (residual.float(), residual, "gelu"))
    seed = torch.tensor([5], device=device)
    torch.library.opcheck(ops.linear_fwd.default, (x, weight, bias, "gelu", residual, True, 0.1, 0.2, seed))
    torch.library.opcheck(ops.linear_dgelu_bwd.default, (x, weight.t(), residual, "gelu", 0.1, seed, True))
    torch.library.opcheck(ops.epilogue_bwd.default, (residual, None, None, 0.1, 0.2, seed))


@pytest.mark.parametrize("autocast", [False, True])
def test_compile_fullgraph(autocast, device):
    for function, tensors in (
        (linear_of("gelu"), linear_inputs((3, 5), 12, 20, torch.float32, device, residual=True)),
        (mlp_of("gelu"), mlp_inputs((3, 5), 12, 20, torch.float32, device, residual=True)),
    ):

        def called(x, *others):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
                return function(x * 1, *others)  # noqa: B023 - called at once

        torch._dynamo.reset()
        with backends.use("triton"):
            compiled = torch.compile(called, backend="aot_eager", fullgraph=True)
            actual, expected = with_gradients(compiled, tensors), with_gradients(called, tensors)
        for a, e in zip((*actual[0], *actual[1]), (*expected[0], *expected[1]), strict=True):
            assert torch.equal(a, e)


@pytest.mark.skipif(GPU, reason="the kernels take float64 in the interpreter only")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation, device):
    for function, tensors in (
        (linear_of(activation), linear_inputs((2, 3), 5, 4, torch.float64, device, residual=True)),
        (mlp_of(activation), mlp_inputs((2, 3), 4, 5, torch.float64, device, residual=True)),
    ):
        with backends.use("triton"):
            assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in tensors], fast_mode=True)


# ---- Launch choices -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS.values(), ids=str)
def test_choices_fit_their_target(target):
    for dtype in (torch.bfloat16, torch.float32):
        for rows in (1, 50, 197, 1576, 25216, 32896):
            for columns, depth in ((192, 192), (768, 3072), (3072, 768), (6144, 1408)):
                config = kernels.product_config(rows, columns, depth, dtype, target)
                steps = config.stages * (config.rows + config.columns) * config.depth * dtype.itemsize
                assert steps <= target.shared_memory
    large, small = (kernels.product_config(rows, 768, 768, torch.bfloat16, target) for rows in (25216, 50))
    assert large.rows * large.columns > small.rows * small.columns
    for rows, columns in ((25216, 3072), (50, 3072), (1, 1)):
        config = epilogue_kernels.epilogue_bwd_config(rows, columns, target)
        assert 1 <= config.programs <= -(-rows // config.rows)
        assert (config.programs - 1) * -(-columns // config.columns) <= 8 * target.multiprocessors


@pytest.mark.parametrize("columns", [2048, 2100])
def test_wide_products_in_blocks_on_few_threads(columns):
    """The stock implementation's blocks of columns, the last one narrower, on a strided input, against the product whole."""
    x, weight, bias = randn(2, 14, 24)[:, ::2], randn(columns, 24, seed=1), randn(columns, seed=2)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with backends.use("torch"):
            whole = linear(x, weight, bias, activation="gelu")
            with torch.no_grad():
                blocks = linear(x, weight, bias, activation="gelu")
        with backends.use("reference"):
            exact = linear(x.double(), weight.double(), bias.double(), activation="gelu")
            assert_within_budget(blocks, linear(x, weight, bias, activation="gelu"), exact)
        torch.testing.assert_close(blocks, whole)
    finally:
        torch.set_num_threads(threads)
