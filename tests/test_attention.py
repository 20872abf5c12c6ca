"""attention: forward and gradient, implementation × dtype × kind of probabilities, against the reference in float64."""

import math
import mmap

import pytest
import torch
from hardware import GPU
from torch.utils.checkpoint import checkpoint

from vit_fast import backends
from vit_fast.kernels import attention as kernels
from vit_fast.kernels import attention_bwd as backward_kernels
from vit_fast.kernels.attention_tiles import split
from vit_fast.kernels.common import TARGETS
from vit_fast.ops.attention import PROBS, attention, attention_reference
from vit_fast.testing import assert_within_budget, randn, with_gradients

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

HALVES = [torch.float16, torch.bfloat16]
GRADIENTS = ["queries", "keys", "both"]
ON = [("reference", torch.float64), ("torch", torch.float64)] + [
    (name, dtype) for name in ("reference", "torch", "triton") for dtype in (torch.float32, *HALVES)
]


@pytest.fixture(autouse=True)
def patched_once(monkeypatch):
    """Triton's interpreter patches triton.language anew at every call of a jit function by another: most of a test's time.

    Once a launch does.
    """
    if GPU:
        return
    from triton.runtime import interpreter

    patch, launch, done = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def patch_once(fn):
        if fn.__module__ not in done:
            done.add(fn.__module__)
            return patch(fn)

    def launch_anew(self, *args, **kwargs):
        done.clear()
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_anew)


@pytest.fixture
def design(request, monkeypatch):
    """Small tiles in the interpreter, so that small shapes, too, have several tiles, steps and tails, in either design."""
    if GPU:
        return

    def forward(tokens, head, itemsize, target):
        config = {"PIECES": split(head, 2), "ROWS": 16}
        if request.param == "short":
            return config | {"SEGMENTS": split(tokens, 3)}
        return config | {"COLUMNS": 32, "TAIL": split(tokens % 32, 2, 32)}

    def backward(gradients, tokens, head, itemsize, target):
        return {"PIECES": split(head, 2), "ROWS": 32, "STEP": 32, "TAIL": split(tokens % 32, 2, 32)}

    def in_one_launch(tokens, head, itemsize, target):
        return request.param == "short" and itemsize == 2

    monkeypatch.setattr(kernels, "forward_config", forward)
    monkeypatch.setattr(backward_kernels, "backward_config", backward)
    monkeypatch.setattr(backward_kernels, "in_one_launch", in_one_launch)


BOTH_DESIGNS = pytest.mark.parametrize("design", ["short", "streaming"], indirect=True)


def packed(shape, dtype=torch.float32, device="cpu", **options):
    """qkv [B, N, 3, H, d] of a (B, N, H, d)."""
    images, tokens, heads, head = shape
    return randn(images, tokens, 3, heads, head, dtype=dtype, device=device, **options)


def run(name, qkv, probs="none", dropout_p=0.0):
    def function(qkv):
        return attention(qkv, qkv.shape[3], dropout_p, False if probs == "none" else probs)

    with backends.use(name):
        return with_gradients(function, [qkv])


def check(name, qkv, probs="none"):
    """Outputs and gradient of an implementation, against the reference's in the same dtype and in float64."""
    exact = run("reference", qkv.double(), probs)
    results = run(name, qkv, probs), run("reference", qkv, probs), exact
    for what, actual, reference, exact in zip(("results", "gradient"), *results, strict=True):
        for a, r in zip(actual, reference, strict=True):
            assert a.dtype == r.dtype
        # The exact result is itself rounded to float64: of a float64 result float32's step shows what can be shown.
        assert_within_budget(actual, reference, exact, what, torch.float32 if qkv.dtype == torch.float64 else None)


# ---- Forward and gradient -------------------------------------------------------------------------------------------

# (B, N, H, d): the testing config; one token; whole tiles; tails of one and two segments, one of them a single token.
SHAPES = [(2, 1, 1, 1), (2, 1, 2, 16), (1, 64, 1, 16), (2, 50, 2, 24), (1, 97, 1, 80), (1, 37, 3, 40)]
REAL = []
if GPU:
    REAL = [(8, 197, 12, 64), (4, 257, 16, 80), (2, 257, 16, 88), (2, 577, 16, 64), (8, 50, 12, 64), (2, 785, 12, 64)]


@pytest.mark.parametrize("name, dtype", ON)
@pytest.mark.parametrize("probs", PROBS)
@pytest.mark.parametrize("shape", [(2, 50, 2, 24)] + REAL, ids=str)
def test_forward_and_gradient(name, dtype, probs, shape, device):
    check(name, packed(shape, dtype, device), probs)


@BOTH_DESIGNS
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_designs(design, dtype, shape, device):
    check("triton", packed(shape, dtype, device), "none")


@BOTH_DESIGNS
@pytest.mark.parametrize("probs", PROBS[1:])
@pytest.mark.parametrize("shape", [(2, 50, 2, 24), (1, 33, 2, 16)], ids=str)
def test_designs_with_probabilities(design, probs, shape, device):
    check("triton", packed(shape, torch.float32, device), probs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [197] if not GPU else [2, 15, 31, 129, 196, 197, 198, 300, 1024, 2048, 4096])
def test_numbers_of_tokens(dtype, tokens, device):
    """With the launch choices of real shapes."""
    check("triton", packed((1, tokens, 1, 64), dtype, device))


@pytest.mark.parametrize("head", [3, 32, 72, 88, 96, 104, 112, 128, 200, 256])
def test_head_sizes(head, device):
    check("triton", packed((1, 20, 2, head), torch.float16, device))


# ---- Strides --------------------------------------------------------------------------------------------------------

VIEWS = {
    "three axes": lambda t: t.flatten(2).unflatten(2, (3, 2, -1)),
    "without the class token": lambda t: t[:, 1:],
    "every other token and image": lambda t: t[::2, ::2],
    "tokens first": lambda t: t.transpose(0, 1),
    "q, k, v first": lambda t: t.permute(0, 2, 1, 3, 4).contiguous().permute(0, 2, 1, 3, 4),
    "heads first": lambda t: t.permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4),
    "channels of wider heads": lambda t: t[..., 3:19],
    "one image for all": lambda t: t[:1].expand(3, -1, -1, -1, -1),
}


@BOTH_DESIGNS
@pytest.mark.parametrize("view", VIEWS)
def test_strided_inputs(design, view, device):
    check("triton", VIEWS[view](packed((3, 11, 2, 24), device=device)), "all")


@BOTH_DESIGNS
@pytest.mark.parametrize("probs", PROBS)
@pytest.mark.parametrize(
    "loss",
    [
        lambda results: sum(t.sum() for t in results),  # expanded gradients
        lambda results: sum(t.transpose(0, -1).flatten(1).square().sum() for t in results),  # permuted ones
        lambda results: results[-1].square().sum(),  # one result unused
        lambda results: results[0][:, 0].square().sum(),
    ],
    ids=["sum", "permuted", "last", "class token"],
)
def test_strided_and_missing_gradients(design, probs, loss, device):
    def gradient(name, dtype):
        # Small logits: the interpreter rounds the product in exp2(logit - lse), which a GPU does not.
        qkv = packed((2, 19, 2, 16), dtype, device, scale=0.5).requires_grad_()
        with backends.use(name):
            results = attention(qkv, 2, return_probs=False if probs == "none" else probs)
        return torch.autograd.grad(loss(results if isinstance(results, tuple) else (results,)), qkv)

    exact = gradient("reference", torch.float64)
    assert_within_budget(gradient("triton", torch.float32), gradient("reference", torch.float32), exact)


def _lazily_committed(elements, device):
    """float16 memory of which only the pages that are touched take room."""
    if device.type == "cuda":
        if torch.cuda.mem_get_info(device)[0] < 3 * elements:
            pytest.skip(f"needs {2 * elements} bytes of GPU memory")
        return torch.zeros(elements, dtype=torch.float16, device=device)
    try:
        return torch.frombuffer(mmap.mmap(-1, 2 * elements), dtype=torch.float16)
    except (OSError, ValueError) as refused:
        pytest.skip(f"this machine doesn't give {2 * elements} bytes of address space: {refused}")


# Which of (image, token, part, head) lie how far apart: the farthest offset of each passes 2**31 elements, no other does.
FAR = {
    "images": (2**31 + 64, 96, 32, 16),
    "tokens": (192, 2**30 + 8, 32, 16),
    "parts": (288, 96, 2**30 + 8, 16),
    "heads": (96, 48, 16, 2**31 + 64),
}


@BOTH_DESIGNS
@pytest.mark.parametrize("axis", FAR)
def test_offsets_past_2_to_the_31(design, axis, device):
    shape, strides = (2, 3, 3, 2, 16), (*FAR[axis], 1)
    elements = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    qkv = torch.as_strided(_lazily_committed(elements, device), shape, strides)
    qkv.copy_(packed((2, 3, 2, 16), torch.float16, device))
    (out, probabilities), (gradient,) = run("triton", qkv, "all")
    (near_out, near_probabilities), (near_gradient,) = run("triton", qkv.contiguous(), "all")
    assert torch.equal(out, near_out) and torch.equal(probabilities, near_probabilities)
    assert torch.equal(gradient, near_gradient)


# ---- Values ---------------------------------------------------------------------------------------------------------


def _numbers(qkv):
    return torch.arange(qkv.shape[1], device=qkv.device)[:, None, None, None]


def _peaked(qkv, logit):
    """Scores of ±logit: q and k are ± the same vector."""
    sign = torch.where(_numbers(qkv)[..., 0] % 3 == 0, 1.0, -1.0)
    qkv[:, :, 0] = sign * math.sqrt(abs(logit) / math.sqrt(qkv.shape[-1])) * math.copysign(1, logit)
    qkv[:, :, 1] = sign * math.sqrt(abs(logit) / math.sqrt(qkv.shape[-1]))
    return qkv


EXTREME = {
    "logits of 1e4 and -1e4": lambda qkv: _peaked(qkv, 1e4),
    "logits of -1e4 and 1e4": lambda qkv: _peaked(qkv, -1e4),
    "equal tokens": lambda qkv: qkv[:, :1].expand_as(qkv).clone(),
    "equal logits of 1e4": lambda qkv: torch.cat([torch.full_like(qkv[:, :, :2], 50.0), qkv[:, :, 2:]], 2),
    "equal logits of -1e4": lambda qkv: torch.cat([0 * qkv[:, :, :1] - 50, 0 * qkv[:, :, 1:2] + 50, qkv[:, :, 2:]], 2),
    "zeros": lambda qkv: 0 * qkv,
    "one token far above": lambda qkv: torch.where(_numbers(qkv) == 5, 30.0, qkv),
    "scattered logits of hundreds": lambda qkv: torch.cat([(12 * qkv[:, :, :2]).round(), qkv[:, :, 2:]], 2),  # q kᵀ is exact
}


@BOTH_DESIGNS
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("values", EXTREME)
def test_extreme_values(design, dtype, values, device):
    qkv = EXTREME[values](packed((1, 37, 1, 16), torch.float64, device)).to(dtype)
    check("triton", qkv, "all")


@pytest.mark.parametrize("name", ["torch", "reference"])
@pytest.mark.parametrize("values", EXTREME)
def test_extreme_values_elsewhere(name, values, device):
    check(name, EXTREME[values](packed((1, 37, 1, 16), torch.float64, device)).float(), "all")


@pytest.mark.parametrize("name", ["reference", "torch", "triton"])
@pytest.mark.parametrize("probs", PROBS)
@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (2, 0, 2, 8)], ids=str)
def test_nothing(name, probs, shape, device):
    if shape[1] == 0 and probs == "class_token":
        pytest.skip("no tokens, no class token")
    results, (gradient,) = run(name, packed(shape, device=device), probs)
    images, tokens, heads, head = shape
    assert results[0].shape == (images, tokens, heads * head) and gradient.shape == (images, tokens, 3, heads, head)
    if probs == "all":
        assert results[1].shape == (images, heads, tokens, tokens)


def test_same_bits_every_time(device):
    qkv = packed((1, 37, 2, 16), device=device)
    torch.manual_seed(3)
    first = run("triton", qkv, "all", 0.2)
    torch.manual_seed(3)
    second = run("triton", qkv, "all", 0.2)
    for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True):
        assert torch.equal(a, b)


# ---- Dropout --------------------------------------------------------------------------------------------------------


def _one_hot_values(qkv):
    """With v = I the output is the dropped probabilities themselves: [B, N, H·N] for heads of N channels."""
    qkv = qkv.clone()
    qkv[:, :, 2] = torch.eye(qkv.shape[1], dtype=qkv.dtype, device=qkv.device)[None, :, None]
    return qkv


def _dropped(qkv, p, seed):
    """The probabilities after dropout [B, H, N, N], as the forward has them, for d = N."""
    torch.manual_seed(seed)
    with backends.use("triton"):
        out = attention(_one_hot_values(qkv), qkv.shape[3], p)
    return out.unflatten(2, (qkv.shape[3], -1)).transpose(1, 2)


@BOTH_DESIGNS
@pytest.mark.parametrize("probs", PROBS)
def test_dropout(design, probs, device):
    """What is dropped: the right share, nothing systematic; the rest is scaled. The gradient belongs to the same mask."""
    p, tokens = 0.3, 33
    qkv = packed((2, tokens, 2, tokens), device=device)
    dropped = _dropped(qkv, p, seed=5)
    reference, exact = (attention_reference(t, 0.0, "all")[1] for t in (qkv, qkv.double()))
    mask = dropped != 0
    assert_within_budget(dropped * (1 - p), reference * mask, exact * mask)
    assert abs(mask.double().mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / mask.numel())
    planes = mask.flatten(0, 1).double()
    for a in range(4):  # no two (image, head) share a mask, no two rows or columns of one do
        for b in range(a):
            assert (planes[a] == planes[b]).double().mean() < 0.8
    assert planes[0].unique(dim=0).shape[0] == tokens and planes[0].unique(dim=1).shape[1] == tokens
    assert not torch.equal(mask, _dropped(qkv, p, seed=6) != 0)

    def with_mask(qkv):
        query, key, value = (t.transpose(1, 2) for t in qkv.unbind(2))
        probabilities = torch.softmax(query @ key.mT / math.sqrt(tokens), -1)
        out = (probabilities * (mask / (1 - p)).to(qkv.dtype) @ value).transpose(1, 2).flatten(2)
        chosen = {"all": probabilities, "class_token": probabilities[:, :, 0], "head_mean": probabilities.mean(1), "none": None}
        return out if probs == "none" else (out, chosen[probs])

    torch.manual_seed(5)
    results = run("triton", qkv, probs, p)
    expected, exact = with_gradients(with_mask, [qkv]), with_gradients(with_mask, [qkv.double()])
    for actual, reference, exactly in zip(results, expected, exact, strict=True):
        assert_within_budget(actual, reference, exactly)


@pytest.mark.parametrize("name", ["reference", "torch", "triton"])
def test_dropping_everything(name, device):
    (out, probabilities), (gradient,) = run(name, packed((1, 9, 2, 16), device=device), "all", 1.0)
    assert (out == 0).all() and probabilities.sum(-1).allclose(torch.ones(1, device=device))
    assert gradient.isfinite().all() and (gradient[:, :, 2] == 0).all()


def test_dropout_follows_the_generator(device):
    """A seed repeats it, the next call differs, and checkpointing recomputes the same mask."""
    qkv = packed((1, 24, 1, 24), device=device)
    assert torch.equal(_dropped(qkv, 0.5, seed=1), _dropped(qkv, 0.5, seed=1))
    with backends.use("triton"):
        torch.manual_seed(1)
        assert not torch.equal(attention(qkv, 1, 0.5), attention(qkv, 1, 0.5))
        gradients = []
        for function in (attention, lambda *args: checkpoint(attention, *args, use_reentrant=False)):
            leaf = qkv.clone().requires_grad_()
            torch.manual_seed(1)
            gradients += torch.autograd.grad(function(leaf, 1, 0.5).square().sum(), leaf)
    assert torch.equal(*gradients)


# ---- The public function --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("probs", ["none", "class_token"])
def test_autocast(dtype, probs, device):
    """As the stock operation: computed, and given back, in the lower dtype; the gradient in the input's."""
    qkv = packed((2, 21, 2, 16), device=device)

    def autocast(name):
        with torch.autocast(device.type, dtype):
            return run(name, qkv, probs)

    actual, reference, exact = autocast("triton"), autocast("reference"), run("reference", qkv.double(), probs)
    assert actual[0][0].dtype == dtype and actual[1][0].dtype == torch.float32
    for a, r, e in zip(actual, reference, exact, strict=True):
        assert_within_budget(a, r, e, dtype=dtype)


def test_autocast_leaves_float64(device):
    with torch.autocast(device.type, torch.bfloat16), backends.use("torch"):
        assert attention(packed((1, 3, 1, 4), torch.float64, device), 1).shape == (1, 3, 4)


REFUSED = [
    (lambda: attention(torch.zeros(2, 5, 18), 4), ValueError, r"last axis must be a multiple of 3·4 heads, got \[2, 5, 18\]"),
    (lambda: attention(torch.zeros(2, 5, 2, 2, 8), 2), ValueError, r"qkv must be \[B, N, 3, 2, d\]"),
    (lambda: attention(torch.zeros(2, 5, 3, 2, 8), 3), ValueError, r"qkv must be \[B, N, 3, 3, d\]"),
    (lambda: attention(torch.zeros(2, 5, 3, 2, 8), 2, 1.5), ValueError, r"dropout_p must be in \[0, 1\], got 1.5"),
    (lambda: attention(torch.zeros(2, 5, 3, 2, 8), 2, return_probs="some"), ValueError, "return_probs must be .*got 'some'"),
    (lambda: attention(torch.zeros(2, 5, 3, 2, 8, dtype=torch.int32), 2), TypeError, "must be floating point, got int32"),
]


@pytest.mark.parametrize("call, kind, message", REFUSED, ids=range(len(REFUSED)))
def test_refused(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize(
    "qkv, message",
    [
        (lambda device: packed((1, 2, 1, 257), device=device), "at most 256 channels, got 257"),
        (lambda device: packed((1, 2, 1, 8), device=device)[..., ::2], "last axis must be contiguous, got stride 2"),
    ],
)
def test_refused_by_the_kernels(qkv, message, device):
    qkv = qkv(device)
    refusal = f"attention: implementation 'triton' cannot run: .*{message}"
    with backends.use("triton"), pytest.raises(RuntimeError, match=refusal):
        attention(qkv, 1)
    with backends.use("auto"):
        assert attention(qkv, 1).isfinite().all()


@pytest.mark.parametrize(
    "probs, dropout_p", [("none", 0.0), ("none", 0.4), ("all", 0.4), ("class_token", 0.0), ("head_mean", 0.0)]
)
def test_opcheck(probs, dropout_p, device):
    qkv = VIEWS["tokens first"](packed((3, 2, 2, 16), torch.float16, device))
    seed = torch.tensor([11], device=device) if dropout_p else None
    forward = (qkv, 0.25, dropout_p, seed, probs)
    torch.library.opcheck(torch.ops.vit_fast.attention_fwd.default, forward)
    out, lse, probabilities = torch.ops.vit_fast.attention_fwd(*forward)
    dprobs = None if probs == "none" else torch.ones_like(probabilities)
    backward = (torch.ones_like(out), qkv, out, lse, 0.25, dropout_p, seed, probs, dprobs)
    torch.library.opcheck(torch.ops.vit_fast.attention_bwd.default, backward)


@pytest.mark.parametrize("probs, dropout_p", [("none", 0.0), ("head_mean", 0.0), ("none", 0.4)])
def test_compile(probs, dropout_p, device):
    qkv = packed((2, 5, 2, 16), device=device)
    compiled = torch.compile(attention, fullgraph=True, backend="inductor" if GPU else "aot_eager")

    def gradient(function):
        leaf = qkv.clone().requires_grad_()
        torch.manual_seed(1)
        results = function(leaf, 2, dropout_p, False if probs == "none" else probs)
        results = results if isinstance(results, tuple) else (results,)
        return *results, *torch.autograd.grad(sum(t.square().sum() for t in results), leaf)

    with backends.use("triton"):
        results = gradient(compiled)
        if dropout_p == 0:  # inductor draws its own random numbers
            for a, b in zip(results, gradient(attention), strict=True):
                assert torch.equal(a, b)
        else:
            assert all(t.isfinite().all() for t in results)


@pytest.mark.parametrize(
    "design, probs", [("short", "none"), ("short", "all"), ("streaming", "head_mean")], indirect=["design"]
)
def test_gradcheck(design, probs):
    if GPU:
        pytest.skip("float64 runs in the interpreter only")

    def function(qkv):
        torch.manual_seed(2)
        return attention(qkv, 2, 0.25, False if probs == "none" else probs)

    with backends.use("triton"):
        torch.autograd.gradcheck(function, packed((1, 3, 2, 3), torch.float64).requires_grad_(), fast_mode=True)


# ---- Launch choices -------------------------------------------------------------------------------------------------


def test_split():
    assert split(197, 3) == (128, 64, 16) and split(257, 3) == (256, 16) and split(50, 3) == (64,) and split(80, 2) == (64, 16)


def test_split_covers():
    for size in range(1, 700):
        for parts in (1, 2, 3):
            segments = split(size, parts)
            assert sum(segments) - size < segments[-1] and list(segments) == sorted(segments, reverse=True)
            assert len(segments) <= parts and all(s >= 16 and s & (s - 1) == 0 for s in segments)
    assert split(0, 2) == ()


@pytest.mark.parametrize("target", TARGETS.values(), ids=str)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_token_is_covered_once(target, itemsize):
    for tokens in (1, 17, 50, 197, 257, 577, 1025, 4096):
        for head in (1, 64, 72, 80, 128, 256):
            forward = kernels.forward_config(tokens, head, itemsize, target)
            backwards = [backward_kernels.backward_config(of, tokens, head, itemsize, target) for of in GRADIENTS]
            if "SEGMENTS" in forward:
                assert 0 <= sum(forward["SEGMENTS"]) - tokens < forward["SEGMENTS"][-1]
            streaming = [(forward.get("COLUMNS"), forward.get("TAIL"))]
            for step, tail in streaming + [(backward["STEP"], backward["TAIL"]) for backward in backwards]:
                if step is not None and tokens % step:
                    assert 0 <= sum(tail) - tokens % step < tail[-1]
