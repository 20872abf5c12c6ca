"""layer_norm: forward and every gradient, implementation × dtype, against the reference in float64."""

import pytest
import torch
from hardware import GPU

from vit_fast import backends
from vit_fast.kernels import layer_norm as kernels
from vit_fast.kernels.common import Target
from vit_fast.ops.layer_norm import layer_norm, layer_norm_reference
from vit_fast.testing import assert_within_budget, randn, with_gradients

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

HALVES = [torch.float16, torch.bfloat16]
ON = [("reference", torch.float64), ("torch", torch.float64)] + [
    (name, dtype) for name in ("reference", "torch", "triton") for dtype in (torch.float32, *HALVES)
]
EPS = 1e-6


@pytest.fixture(autouse=True)
def one_multiprocessor(monkeypatch):
    """In the interpreter: so that small shapes, too, have several rows a program and several steps in the backward's loop."""
    if not GPU:
        monkeypatch.setattr(kernels, "target_of", lambda device: Target("cuda", 80, 1, 163 * 1024))


def inputs(shape, dtype, device, residual=False):
    """x, weight, bias and the residual, or None."""
    x = randn(*shape, dtype=dtype, device=device, seed=1)
    weight = (1 + randn(shape[-1], device=device, seed=2, scale=0.2)).to(dtype)
    bias = randn(shape[-1], dtype=dtype, device=device, seed=3)
    return x, weight, bias, randn(*shape, dtype=dtype, device=device, seed=4) if residual else None


def check(implementation, tensors, eps=EPS):
    """Outputs and gradients of an implementation, against the reference's in the same dtype and in float64."""

    def of(name, tensors):
        with backends.use(name):
            return with_gradients(lambda x, weight, bias, residual: layer_norm(x, weight, bias, eps, residual), tensors)

    exact = of("reference", [t if t is None else t.double() for t in tensors])
    results = of(implementation, tensors), of("reference", tensors), exact
    for what, actual, reference, exact in zip(("outputs", "gradients"), *results, strict=True):
        kept = [triple for triple in zip(actual, reference, exact, strict=True) if triple[0] is not None]
        for i, (a, r, e) in enumerate(kept):
            assert a.dtype == r.dtype
            assert_within_budget(a, r, e, f"{what}[{i}]")


# One row of one column; the class token alone; N = 197; rows that are not a multiple of anything, one and several a program;
# more columns than the widest ViT (g) has.
SHAPES = [(1, 1), (5, 1), (3, 1, 17), (2, 197, 48), (7, 33), (131, 24), (2, 1500), (2, 3, 5, 40), (64,)]
REAL = [(8, 197, 768), (2, 257, 1280), (2, 257, 1408), (4, 577, 1024), (8, 197, 192), (8, 50, 384)] if GPU else []


@pytest.mark.parametrize("implementation, dtype", ON)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("shape", SHAPES + REAL, ids=str)
def test_forward_and_gradients(implementation, dtype, residual, shape, device):
    check(implementation, inputs(shape, dtype, device, residual))


def test_widest_rows(device):
    check("triton", inputs((2, kernels.MAX_COLUMNS), torch.bfloat16, device, residual=True))


EXTREME = {
    "mean 1e3, tiny variance": lambda x: 1e3 + 1e-3 * x,
    "mean -3e4, spread 16": lambda x: 16 * x - 3e4,
    "equal values": lambda x: torch.full_like(x, 1e3) + 0 * x,
    "zeros": lambda x: 0 * x,
    "large": lambda x: 1e4 * x,
    "tiny": lambda x: 1e-4 * x,
    "one outlier": lambda x: torch.where(torch.arange(x.shape[-1], device=x.device) == 3, 5e4, x),
}


@pytest.mark.parametrize("implementation, dtype", ON)
@pytest.mark.parametrize("name", EXTREME)
def test_extreme_values(implementation, dtype, name, device):
    x, weight, bias, _ = inputs((9, 768 if GPU else 100), torch.float64, device)
    x = EXTREME[name](x)
    check(implementation, [t.to(dtype) for t in (x, weight, bias)] + [None])


@pytest.mark.parametrize("offset", [0.0, 1e3, -1e4, 1e6])
def test_forward_is_exact_for_a_large_mean(offset, device):
    """Rounding of the mean alone would cost eps·offset/deviation here; the kernel is within a few rounding steps of exact."""
    x = (randn(6, 768, device=device, seed=1, scale=2.0) + offset).float()
    weight, bias = torch.ones(768, device=device), torch.zeros(768, device=device)
    with backends.use("triton"):
        y = layer_norm(x, weight, bias, EPS)
    exact = layer_norm_reference(x.double(), weight.double(), bias.double(), EPS)
    assert_within_budget(y, exact.float(), exact, dtype=torch.float32)


VIEWS = {
    "without the class token": lambda t: t[:, 1:],
    "class token": lambda t: t[:, 0],
    "class token, kept axis": lambda t: t[:, :1],
    "every other image": lambda t: t[::2],
    "columns of wider rows": lambda t: t[..., 3:27],
    "tokens first": lambda t: t.transpose(0, 1),
    "expanded": lambda t: t[:1].expand(3, -1, -1),
    "one column": lambda t: t[:1, :2, 5:6],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of", ["x", "residual", "both"])
@pytest.mark.parametrize("view", VIEWS)
def test_strided_inputs(dtype, of, view, device):
    x, residual = (VIEWS[view](randn(4, 9, 40, dtype=dtype, device=device, seed=seed)) for seed in (1, 4))
    _, weight, bias, _ = inputs(x.shape, dtype, device)
    if of != "both":
        x, residual = (x, residual.contiguous()) if of == "x" else (x.contiguous(), residual)
    check("triton", (x, weight, bias, residual))
    if of == "x":
        check("triton", (x, weight, bias, None))


@pytest.mark.parametrize("cotangent", [lambda t: t.sum(), lambda t: t.transpose(0, 1).flatten(1).square().sum()])
def test_strided_gradients(cotangent, device):
    """Expanded and transposed gradients arrive at the backward, of y and of the sum."""
    tensors = inputs((3, 5, 24), torch.float32, device, residual=True)

    def gradients(name, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
        with backends.use(name):
            y, total = layer_norm(*leaves[:3], EPS, leaves[3])
        return torch.autograd.grad(cotangent(y) + cotangent(total), leaves)

    exact = gradients("reference", torch.float64)
    assert_within_budget(gradients("triton", torch.float32), gradients("reference", torch.float32), exact)


@pytest.mark.parametrize("used", [0, 1])
def test_one_unused_output(used, device):
    """Only y, or only the sum, goes on: the other's gradient is zero."""
    tensors = inputs((3, 24), torch.float32, device, residual=True)

    def gradients(name, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
        with backends.use(name):
            out = layer_norm(*leaves[:3], EPS, leaves[3])[used]
        return torch.autograd.grad(out.square().sum(), leaves, materialize_grads=True)

    exact = gradients("reference", torch.float64)
    assert_within_budget(gradients("triton", torch.float32), gradients("reference", torch.float32), exact)


@pytest.mark.parametrize("implementation", ["reference", "torch", "triton"])
@pytest.mark.parametrize("shape", [(0, 16), (0, 5, 16), (4, 0, 16)], ids=str)
def test_empty_batch(implementation, shape, device):
    tensors = inputs(shape, torch.float32, device, residual=True)
    with backends.use(implementation):
        outputs, gradients = with_gradients(lambda x, w, b, r: layer_norm(x, w, b, EPS, r), tensors)
    assert [o.shape for o in outputs] == [shape, shape]
    assert [g.shape for g in gradients] == [shape, (16,), (16,), shape]
    assert not gradients[1].any() and not gradients[2].any()


def test_gradient_is_deterministic(device):
    tensors = inputs((131, 24), torch.bfloat16, device, residual=True)
    with backends.use("triton"):
        first, second = (with_gradients(lambda x, w, b, r: layer_norm(x, w, b, EPS, r), tensors)[1] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_rows_past_2_to_31(device):
    """Row 2 lies 2**31 elements behind row 0; a 32-bit product of row and stride points as far before it instead."""
    columns, stride = 40, 2**30
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # the pages that nobody touches are never committed
    try:
        storage = torch.empty(4 * stride + columns, dtype=torch.bfloat16, device=device)
    except RuntimeError as error:
        pytest.skip(f"needs {8 * 2**30} bytes of address space: {error}")
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before
    x = storage.as_strided((3, columns), (stride, 1), 2 * stride)
    rows, weight, bias, _ = inputs((3, columns), torch.bfloat16, device)
    x.copy_(rows)
    storage[:columns] = 0  # where the wrapped address points
    y, _, mean, rstd = torch.ops.vit_fast.layer_norm_fwd(x, weight, bias, EPS, None)
    expected = torch.ops.vit_fast.layer_norm_fwd(rows, weight, bias, EPS, None)
    assert torch.equal(y, expected[0]) and torch.equal(mean, expected[2])
    # As dy, dtotal and total at once.
    dx = torch.ops.vit_fast.layer_norm_bwd(x, x, weight, mean, rstd, x)
    expected = torch.ops.vit_fast.layer_norm_bwd(rows, rows, weight, mean, rstd, rows)
    assert all(torch.equal(a, b) for a, b in zip(dx, expected, strict=True))
    # The same through the outer stride of three axes.
    y = torch.ops.vit_fast.layer_norm_fwd(x.unflatten(1, (2, 20)), weight[:20], bias[:20], EPS, None)[0]
    expected = torch.ops.vit_fast.layer_norm_fwd(rows.unflatten(1, (2, 20)), weight[:20], bias[:20], EPS, None)[0]
    assert torch.equal(y, expected)


@pytest.mark.parametrize(
    "tensors, error, message",
    [
        (lambda x, w, b: (x, w[:5], b), ValueError, r"layer_norm: weight must be \[8\], got \[5\]"),
        (lambda x, w, b: (x, w, b[None]), ValueError, r"layer_norm: bias must be \[8\], got \[1, 8\]"),
        (lambda x, w, b: (x, w, b, EPS, x[:1]), ValueError, r"layer_norm: residual must be \[3, 2, 8\], got \[1, 2, 8\]"),
        (lambda x, w, b: (x, w.half(), b), TypeError, "layer_norm: weight must be float32 as x is, got float16"),
        (lambda x, w, b: (x.int(), w, b), TypeError, "layer_norm: x must be floating point, got int32"),
        (lambda x, w, b: (x, w.to("meta"), b), ValueError, "layer_norm: weight must be on .* as x is, got meta"),
    ],
)
def test_refused_by_the_operation(tensors, error, message, device):
    x, weight, bias, _ = inputs((3, 2, 8), torch.float32, device)
    with pytest.raises(error, match=message):
        layer_norm(*tensors(x, weight, bias))


@pytest.mark.parametrize(
    "tensors, message",
    [
        (lambda x, w, b: (x.transpose(1, 2), w[:1].expand(2), b[:2]), "contiguous weight and bias"),
        (lambda x, w, b: (x.transpose(1, 2), w[:2], b[:2]), r"contiguous rows, got shape \[3, 8, 2\], strides \(16, 1, 8\)"),
        (lambda x, w, b: (x[None, :, :1], w, b), r"up to three axes"),
        (lambda x, w, b: (x, w, b, EPS, x.transpose(1, 2).contiguous().transpose(1, 2)), "contiguous rows"),
        (lambda x, w, b: (x.new_ones(2, 8193), w.new_ones(8193), w.new_ones(8193)), "1 to 8192 columns, got 8193"),
        (lambda x, w, b: (x[..., :0], w[:0], b[:0]), "1 to 8192 columns, got 0"),
    ],
)
def test_refused_by_the_kernels(tensors, message, device):
    x, weight, bias, _ = inputs((3, 2, 8), torch.float32, device)
    message = f"layer_norm: implementation 'triton' cannot run: .*{message}"
    with backends.use("triton"), pytest.raises(RuntimeError, match=message):
        layer_norm(*tensors(x, weight, bias))


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_autocast(residual, weight_dtype, device):
    """y is float32, as CUDA's autocast has it; the sum has the dtype of the addition; nothing is copied on the way in."""
    x, weight, bias, r = inputs((5, 40), torch.bfloat16, device, residual)
    weight, bias = weight.to(weight_dtype), bias.to(weight_dtype)

    def kernels(x, weight, bias, r):
        with torch.autocast(device.type, dtype=torch.bfloat16), backends.use("triton"):
            return layer_norm(x, weight, bias, EPS, r)

    def stock(x, weight, bias, r):
        if r is None:
            return layer_norm_reference(x.float(), weight.float(), bias.float(), EPS)
        total = x + r
        return layer_norm_reference(total.float(), weight.float(), bias.float(), EPS), total

    tensors = (x, weight, bias, r)
    actual, reference = with_gradients(kernels, tensors), with_gradients(stock, tensors)
    exact = with_gradients(layer_norm_double, [t if t is None else t.double() for t in tensors])
    assert [o.dtype for o in actual[0]] == [torch.float32, torch.bfloat16][: len(actual[0])]
    for a, r, e in zip(actual, reference, exact, strict=True):
        kept = [[t for t in ts if t is not None] for ts in (a, r, e)]
        assert [t.dtype for t in kept[0]] == [t.dtype for t in kept[1]]
        assert_within_budget(*kept)


def layer_norm_double(x, weight, bias, residual):
    return layer_norm_reference(x, weight, bias, EPS, residual)


def test_mixed_sum_under_autocast(device):
    """A float32 stream and a 16-bit branch add up in float32."""
    x, weight, bias, r = inputs((5, 40), torch.float32, device, residual=True)
    with torch.autocast(device.type, dtype=torch.bfloat16), backends.use("triton"):
        y, total = layer_norm(x, weight, bias, EPS, r.bfloat16())
    reference = layer_norm_reference(x, weight, bias, EPS, r.bfloat16().float())
    exact = layer_norm_reference(x.double(), weight.double(), bias.double(), EPS, r.bfloat16().double())
    assert y.dtype == total.dtype == torch.float32
    assert_within_budget((y, total), reference, exact)


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(residual, dtype, device):
    x, weight, bias, r = inputs((3, 5, 24), dtype, device, residual)
    torch.library.opcheck(torch.ops.vit_fast.layer_norm_fwd.default, (x, weight, bias, EPS, r))
    torch.library.opcheck(torch.ops.vit_fast.layer_norm_fwd.default, (x[:, 1:], weight.float(), bias.float(), EPS, None))
    _, total, mean, rstd = torch.ops.vit_fast.layer_norm_fwd(x, weight, bias, EPS, r)
    total = x if r is None else total
    torch.library.opcheck(torch.ops.vit_fast.layer_norm_bwd.default, (x, total, weight, mean, rstd, r))


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_compile_fullgraph(residual, device):
    tensors = inputs((3, 5, 24), torch.float32, device, residual)

    def function(x, weight, bias, r):
        return layer_norm(x * 1, weight, bias, EPS, r)

    torch._dynamo.reset()
    with backends.use("triton"):
        compiled = torch.compile(function, backend="inductor" if GPU else "aot_eager", fullgraph=True)
        actual, expected = with_gradients(compiled, tensors), with_gradients(function, tensors)
    for a, e in zip((*actual[0], *actual[1]), (*expected[0], *expected[1]), strict=True):
        assert (a is None and e is None) or torch.equal(a, e)


@pytest.mark.skipif(GPU, reason="the kernels take float64 in the interpreter only")
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_gradcheck(residual, device):
    tensors = [t if t is None else t.double().requires_grad_() for t in inputs((2, 3, 5), torch.float32, device, residual)]
    with backends.use("triton"):
        assert torch.autograd.gradcheck(lambda x, w, b, r: layer_norm(x, w, b, EPS, r), tensors, fast_mode=True)
