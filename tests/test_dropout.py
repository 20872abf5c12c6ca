"""Dropout and stochastic depth inside linear, mlp and attention: which elements, and the formula with that mask."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hardware import GPU
from torch.utils.checkpoint import checkpoint

from vit_fast import backends, extension
from vit_fast.ops.attention import PROBS, attention
from vit_fast.ops.dropout import draw_seeds, stochastic_depth
from vit_fast.ops.linear import ACTIVATIONS, linear
from vit_fast.ops.mlp import mlp
from vit_fast.testing import assert_within_budget, randn, with_gradients

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

# Those that draw their own bits, and what they compute in: on a GPU the extension leaves dropout to Triton.
CPP = [] if GPU or extension.missing("cpu") else [("cpp", torch.float32), ("cpp", torch.bfloat16)]
ON = [("triton", torch.float32), ("triton", torch.float16), ("triton", torch.bfloat16), *CPP]
FUSED = list(dict.fromkeys(name for name, _ in ON))


# ---- Which elements are kept, a second time ------------------------------------------------------------------------


def philox(counter, seed: int):
    """Philox4x32 in 7 rounds, of counters that broadcast: four words in uint32."""
    low = np.uint64(0xFFFFFFFF)
    c = [word.astype(np.uint64) for word in np.broadcast_arrays(*counter)]
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)]
    for _ in range(7):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(b >> np.uint64(32)) ^ c[1] ^ key[0], b & low, (a >> np.uint64(32)) ^ c[3] ^ key[1], a & low]
        key = [(key[0] + np.uint64(0x9E3779B9)) & low, (key[1] + np.uint64(0xBB67AE85)) & low]
    return [np.asarray(word).astype(np.uint32) for word in c]


def factors(bits, p: float) -> torch.Tensor:
    """0, or 1 / (1 - p) where the bits, as a signed number that counts from -2³¹ on, are p of 2³² or more."""
    kept = bits.view(np.int32).astype(np.int64) + 2**31 >= min(math.floor(p * 2**32), 2**32 - 1)
    return torch.from_numpy(kept * (1 / (1 - p) if p < 1 else 0.0))


def mask_of(seed, shape, p: float) -> torch.Tensor:
    """What dropout multiplies a tensor of that shape with."""
    rows, columns = math.prod(shape[:-1]), np.arange(shape[-1])
    words = philox((32 * (columns // 128) + columns % 32, np.arange(rows)[:, None], 0, 0), int(seed))
    word = np.broadcast_to(columns // 32 % 4, words[0].shape)
    return factors(np.choose(word, words), p).view(shape)


def images_of(seed, shape, p: float) -> torch.Tensor:
    """What stochastic depth multiplies the entries of the first axis with."""
    images = shape[0] if len(shape) > 1 else 1
    return factors(philox((np.arange(images), 0, 0, 1), int(seed))[0], p).view(-1, *(1,) * (len(shape) - 1))


def test_known_answers():
    """Of the generator's authors, Random123's kat_vectors: philox4x32 7."""
    assert [int(w) for w in philox((0, 0, 0, 0), 0)] == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    counter = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert [int(w) for w in philox(counter, 0x299F31D0A4093822)] == [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A]


def seeds_of(count, device):
    """The seeds that an operation draws next, if nobody draws before it."""
    state = torch.cuda.get_rng_state() if device.type == "cuda" else torch.get_rng_state()
    seeds = draw_seeds(torch.empty(0, device=device), count, 1.0)
    torch.cuda.set_rng_state(state) if device.type == "cuda" else torch.set_rng_state(state)
    return seeds


# ---- The formula with that mask -------------------------------------------------------------------------------------


def check(function, by_formula, implementation, tensors):
    """Results and gradients of an implementation against the formula's, in the same dtype and in float64."""
    torch.manual_seed(11)
    with backends.use(implementation):
        outputs, gradients = with_gradients(function, tensors)
    reference = with_gradients(by_formula, tensors)
    exact = with_gradients(by_formula, [t if t is None else t.double() for t in tensors])

    def flat(results):
        return [t for t in (*results[0], *results[1]) if t is not None]

    assert_within_budget(flat((outputs, gradients)), flat(reference), flat(exact), "output and gradients")


def layer(shape, depth, columns, dtype, device, seed=1):
    return (
        randn(*shape, depth, dtype=dtype, device=device, seed=seed),
        randn(columns, depth, dtype=dtype, device=device, seed=seed + 1, scale=depth**-0.5),
        randn(columns, dtype=dtype, device=device, seed=seed + 2),
    )


# Columns within a group of 128 and beyond it, less than a vector, rows that are the packed operand and not; a vector.
SHAPES = [((2, 9), 24, 40), ((3, 4, 5), 17, 129), ((1, 3), 8, 300), ((40,), 12, 7), ((), 9, 33)]


@pytest.mark.parametrize("implementation, dtype", ON)
@pytest.mark.parametrize("shape, depth, columns", SHAPES, ids=str)
@pytest.mark.parametrize("activation, with_residual, p, depth_p", [("gelu", True, 0.3, 0.4), (None, False, 0.1, 0.0)])
def test_linear(activation, with_residual, p, depth_p, shape, depth, columns, implementation, dtype, device):
    torch.manual_seed(11)
    seed = seeds_of(1, device)[0]
    mask = (mask_of(seed, (*shape, columns), p) * images_of(seed, (*shape, columns), depth_p)).to(device)
    residual = randn(*shape, columns, dtype=dtype, device=device, seed=9) if with_residual else None

    def fused(x, weight, bias, residual):
        return linear(x, weight, bias, activation, residual, p, depth_p)

    def by_formula(x, weight, bias, residual):
        y = F.linear(x, weight, bias)
        y = y if activation is None else F.gelu(y)
        y = y * mask.to(x.dtype)
        return y if residual is None else y + residual

    check(fused, by_formula, implementation, (*layer(shape, depth, columns, dtype, device), residual))


@pytest.mark.parametrize("implementation, dtype", ON)
@pytest.mark.parametrize("epilogue", ["stochastic depth alone", "without bias", "a transposed weight"])
def test_linear_otherwise(epilogue, implementation, dtype, device):
    p = 0.0 if "alone" in epilogue else 0.25
    x, weight, bias = layer((6, 4), 20, 50, dtype, device)
    weight = weight.t().contiguous().t() if "transposed" in epilogue else weight
    bias = None if "bias" in epilogue else bias
    torch.manual_seed(11)
    seed = seeds_of(1, device)[0]
    mask = (mask_of(seed, (6, 4, 50), p) * images_of(seed, (6, 4, 50), 0.5)).to(device)
    check(
        lambda x, weight, bias: linear(x, weight, bias, dropout_p=p, stochastic_depth_p=0.5),
        lambda x, weight, bias: F.linear(x, weight, bias) * mask.to(x.dtype),
        implementation,
        (x, weight, bias),
    )


@pytest.mark.parametrize("implementation, dtype", ON)
@pytest.mark.parametrize("shape", [(3, 7), (1, 5), (20,), ()], ids=str)
@pytest.mark.parametrize("activation, with_residual, p, depth_p", [("gelu", True, 0.2, 0.4), ("gelu_tanh", False, 0.5, 0.0)])
def test_mlp(activation, with_residual, p, depth_p, shape, implementation, dtype, device):
    width, hidden = 24, 150
    torch.manual_seed(11)
    first, second = seeds_of(2, device)
    inside = mask_of(first, (*shape, hidden), p).to(device)
    outside = (mask_of(second, (*shape, width), p) * images_of(second, (*shape, width), depth_p)).to(device)
    tensors = (*layer(shape, width, hidden, dtype, device), *layer(shape, hidden, width, dtype, device, seed=4)[1:])
    residual = randn(*shape, width, dtype=dtype, device=device, seed=9) if with_residual else None

    def fused(*tensors):
        return mlp(*tensors[:5], activation, tensors[5], p, depth_p)

    def by_formula(x, weight1, bias1, weight2, bias2, residual):
        h = F.gelu(F.linear(x, weight1, bias1), approximate=ACTIVATIONS[activation]) * inside.to(x.dtype)
        y = F.linear(h, weight2, bias2) * outside.to(x.dtype)
        return y if residual is None else y + residual

    check(fused, by_formula, implementation, (*tensors, residual))


@pytest.mark.parametrize("implementation, dtype", [on for on in ON if on[1] != torch.float16])
@pytest.mark.parametrize("tokens, size", [(5, 8), (33, 16), (150, 8)])
@pytest.mark.parametrize("probs", PROBS)
def test_attention(probs, tokens, size, implementation, dtype, device):
    images, heads, p = 2, 2, 0.3
    torch.manual_seed(11)
    seed = seeds_of(1, device)[0]
    token = np.arange(tokens)
    words = philox((token, token[:, None], np.arange(images * heads)[:, None, None], 0), int(seed))
    mask = factors(words[0], p).view(images, heads, tokens, tokens).to(device)

    def by_formula(qkv):
        query, key, value = (t.transpose(1, 2) for t in qkv.unbind(2))
        probabilities = torch.softmax(query @ key.mT / math.sqrt(size), -1)
        out = (probabilities * mask.to(qkv.dtype) @ value).transpose(1, 2).flatten(2)
        chosen = {"all": probabilities, "class_token": probabilities[:, :, 0], "head_mean": probabilities.mean(1), "none": None}
        return out if probs == "none" else (out, chosen[probs])

    check(
        lambda qkv: attention(qkv, heads, p, False if probs == "none" else probs),
        by_formula,
        implementation,
        (randn(images, tokens, 3, heads, size, dtype=dtype, device=device),),
    )


@pytest.mark.skipif(not CPP, reason="the extension's CPU kernels are not in use here")
def test_the_same_for_any_number_of_threads():
    x, weight, bias = layer((3, 50), 16, 200, torch.float32, "cpu")
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            torch.manual_seed(1)
            with backends.use("cpp"):
                results.append(linear(x, weight, bias, dropout_p=0.5, stochastic_depth_p=0.3))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


# ---- As dropout should be -------------------------------------------------------------------------------------------

EVERY = ["reference", "torch", *FUSED]


def ones(implementation, p, depth_p=0.0, shape=(40, 20, 100), device="cpu"):
    """What the mask is: of a layer that gives ones."""
    x = torch.zeros(*shape[:-1], 1, device=device)
    weight, bias = torch.zeros(shape[-1], 1, device=device), torch.ones(shape[-1], device=device)
    with backends.use(implementation):
        return linear(x, weight, bias, None, None, p, depth_p)


@pytest.mark.parametrize("implementation", EVERY)
def test_shares(implementation, device):
    """The right share, scaled; no two rows, columns or images alike; images dropped as wholes."""
    p = 0.25
    mask = ones(implementation, p, device=device)
    assert mask.unique().tolist() == [0.0, pytest.approx(1 / (1 - p))]
    kept = (mask != 0).double()
    assert abs(float(kept.mean()) - (1 - p)) < 5 * math.sqrt(p * (1 - p) / kept.numel())
    for axis in range(3):
        slices = kept.movedim(axis, 0).flatten(1)
        same = (slices[:20, None] == slices[None, :20]).double().mean(-1)
        same.fill_diagonal_(0.0)
        assert same.max() < 1 - 2 * p * (1 - p) + 0.1  # what independent ones share, and some noise
    whole = ones(implementation, 0.0, p, (4000, 2, 3), device)
    assert torch.equal(whole, whole[:, :1, :1].expand_as(whole))
    assert abs(float((whole[:, 0, 0] != 0).double().mean()) - (1 - p)) < 5 * math.sqrt(p * (1 - p) / 4000)


@pytest.mark.parametrize("implementation", EVERY)
def test_nothing_and_everything(implementation, device):
    following = torch.rand(1, device=device)
    torch.manual_seed(0)
    assert (ones(implementation, 0.0, device=device) == 1).all()
    assert torch.equal(torch.rand(1, device=device), following)  # nothing was drawn
    for p, depth_p in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        assert (ones(implementation, p, depth_p, device=device) == 0).all()
    tensors = (*layer((2, 3), 8, 20, torch.float32, device), *layer((2, 3), 20, 8, torch.float32, device, seed=4)[1:])
    with backends.use(implementation):
        outputs, gradients = with_gradients(lambda *t: mlp(*t, "gelu", t[0], 1.0, 1.0), tensors)
    assert torch.equal(outputs[0], tensors[0]) and all(bool((g == 0).all()) for g in gradients[1:])


@pytest.mark.parametrize("implementation", EVERY)
def test_follows_the_generator(implementation, device):
    """A seed repeats it, the next call differs, checkpointing computes with the same masks again."""
    tensors = (*layer((8, 9), 8, 40, torch.float32, device), *layer((8, 9), 40, 8, torch.float32, device, seed=4)[1:])

    def call(*tensors):
        return mlp(*tensors, "gelu", tensors[0], 0.5, 0.5)

    with backends.use(implementation):
        torch.manual_seed(1)
        first, second = call(*tensors), call(*tensors)
        torch.manual_seed(1)
        assert torch.equal(call(*tensors), first) and not torch.equal(first, second)
        gradients = []
        for function in (call, lambda *tensors: checkpoint(call, *tensors, use_reentrant=False)):
            torch.manual_seed(1)
            gradients.append(with_gradients(function, tensors)[1])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("implementation", FUSED)
def test_compiled(implementation, device):
    """One graph, seeds and all, that gives what is given without it."""
    tensors = (*layer((8, 9), 8, 40, torch.float32, device), *layer((8, 9), 40, 8, torch.float32, device, seed=4)[1:])

    def call(*tensors):
        y = mlp(*tensors, "gelu", 2 * tensors[0], 0.5, 0.5)
        return linear(y, tensors[1], tensors[2], dropout_p=0.3)

    torch._dynamo.reset()
    results = []
    with backends.use(implementation):
        for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
            torch.manual_seed(1)
            results.append(with_gradients(function, tensors))
    # Products may be computed by others while tracing, which rounds otherwise.
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", FUSED)
def test_what_autograd_keeps(implementation, device):
    """x, the weights, z and two seeds: no mask, and neither h nor anything else of its size."""
    tensors = (*layer((4, 16), 8, 32, torch.float32, device), *layer((4, 16), 32, 8, torch.float32, device, seed=4)[1:])
    leaves = [t.requires_grad_() for t in tensors]
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t)
    with backends.use(implementation), hooks:
        mlp(*leaves, dropout_p=0.1, stochastic_depth_p=0.1)
    assert sorted(map(tuple, kept)) == [(1,), (1,), (4, 16, 8), (4, 16, 32), (8, 32), (32, 8)]


@pytest.mark.parametrize("implementation", FUSED)
@pytest.mark.parametrize("frozen", [(0, 1, 2), (3,), (1, 3), (0, 1, 2, 4)], ids=str)
def test_frozen_parameters(frozen, implementation, device):
    """The gradients that are asked for are those of a call that asks for all."""
    tensors = (*layer((4, 6), 8, 32, torch.float32, device), *layer((4, 6), 32, 8, torch.float32, device, seed=4)[1:])
    results = []
    for without in ((), frozen):
        leaves = [t.clone().requires_grad_(i not in without) for i, t in enumerate(tensors)]
        torch.manual_seed(2)
        with backends.use(implementation):
            mlp(*leaves, dropout_p=0.3, stochastic_depth_p=0.2).square().sum().backward()
        results.append([t.grad for t in leaves])
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        assert (b is None) if i in frozen else torch.equal(a, b)


@pytest.mark.parametrize("implementation, dtype", [("triton", torch.bfloat16), ("triton", torch.float16), *CPP[1:]])
def test_autocast_with_a_wider_residual(implementation, dtype, device):
    """16-bit products, a float32 residual and gradient: the mask of the same seed."""
    tensors = (*layer((5, 6), 8, 40, torch.float32, device), randn(5, 6, 40, device=device, seed=8))
    torch.manual_seed(11)
    seed = seeds_of(1, device)[0]
    mask = (mask_of(seed, (5, 6, 40), 0.3) * images_of(seed, (5, 6, 40), 0.4)).to(device)

    def fused(x, weight, bias, residual):
        return linear(x, weight, bias, "gelu", residual, 0.3, 0.4)

    def by_formula(x, weight, bias, residual):
        y = F.gelu(F.linear(x, weight, bias))
        return y * mask.to(y.dtype) + residual

    torch.manual_seed(11)
    with torch.autocast(device.type, dtype):
        with backends.use(implementation):
            outputs, gradients = with_gradients(fused, tensors)
        reference = with_gradients(by_formula, tensors)
    exact = with_gradients(by_formula, [t.double() for t in tensors])
    assert outputs[0].dtype == torch.float32
    for a, r, e in zip((*outputs, *gradients), (*reference[0], *reference[1]), (*exact[0], *exact[1]), strict=True):
        assert_within_budget(a, r, e, dtype=dtype)


def test_stochastic_depth_is_of_the_first_axis():
    y = stochastic_depth(torch.ones(2000, 3, 4), 0.5)
    assert torch.equal(y, y[:, :1, :1].expand_as(y)) and y.unique().tolist() == [0.0, 2.0]
    assert 900 < int((y[:, 0, 0] == 0).sum()) < 1100
    assert torch.equal(stochastic_depth(y, 0.0), y)


@pytest.mark.parametrize("name", ["dropout_p", "stochastic_depth_p"])
@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_probabilities_that_cannot_be(name, p):
    x, weight, bias = layer((2,), 4, 4, torch.float32, "cpu")
    for op, function in (
        ("linear", lambda **p: linear(x, weight, bias, **p)),
        ("mlp", lambda **p: mlp(x, weight, bias, weight, bias, **p)),
    ):
        with pytest.raises(ValueError, match=rf"{op}: {name} must be in \[0, 1\], got {p}"):
            function(**{name: p})
