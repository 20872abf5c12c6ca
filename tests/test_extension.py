"""The extension's CPU kernels: every instruction set × dtype, forward and every gradient, against the reference in float64.

Shapes, strides and extreme values are those of the operations' own tests. Whatever this processor lacks is skipped by name;
test_lanes_of_avx512 runs the 16-lane code on any processor with AVX2 all the same.
"""

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import test_attention
import test_dropout
import test_layer_norm
import test_linear
import test_patch_embed
import torch

import vit_fast
from vit_fast import backends, extension
from vit_fast.ops.linear import ACTIVATIONS
from vit_fast.testing import assert_within_budget, randn, with_gradients

DTYPES = [torch.float32, torch.bfloat16]
CPU = torch.device("cpu")
ops = torch.ops.vit_fast_cpp

if extension.missing("cpu") is not None and os.environ.get("VIT_FAST_EXT", "auto") != "off":
    pytest.fail(f"the extension must be built for its tests: {extension.missing('cpu')}", pytrace=False)
pytestmark = [
    pytest.mark.skipif(extension.missing("cpu") is not None, reason=str(extension.missing("cpu"))),
    pytest.mark.usefixtures("instruction_set"),
]


def available(name):
    try:
        return extension.instruction_set(name) == name
    except RuntimeError:
        return False
    finally:
        extension.instruction_set("auto")


SETS = [name for name in ("portable", "avx2", "avx512") if extension.missing("cpu") is None and available(name)]


@pytest.fixture(params=SETS)
def instruction_set(request):
    extension.instruction_set(request.param)
    yield request.param
    extension.instruction_set("auto")


# ---- The operations -------------------------------------------------------------------------------------------------

# 197 tokens; rows of less than a vector, of a vector and one more, of no whole panel; deeper than a slice; more rows than a
# block, more columns than one; one row; in `linear`, operands of which either is packed.
LINEAR_SHAPES = [*test_linear.SHAPES, ((97,), 401, 530), ((230,), 33, 40), ((600,), 20, 70), ((67,), 1024, 33), ((1,), 70, 33)]
LAYER_NORM_SHAPES = [*test_layer_norm.SHAPES, (3, 768), (2, 31), (400, 65)]
# One block of queries and several; a panel and a token more; heads of no whole vector.
ATTENTION_SHAPES = [*test_attention.SHAPES, (1, 197, 2, 64), (2, 65, 3, 17), (1, 130, 1, 104), (1, 20, 2, 256), (1, 1100, 1, 8)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("shape", LAYER_NORM_SHAPES, ids=str)
def test_layer_norm_results(shape, residual, dtype):
    test_layer_norm.check("cpp", test_layer_norm.inputs(shape, dtype, CPU, residual))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", test_layer_norm.EXTREME)
def test_layer_norm_extremes(name, dtype):
    x, weight, bias, _ = test_layer_norm.inputs((9, 100), torch.float64, CPU)
    tensors = [t.to(dtype) for t in (test_layer_norm.EXTREME[name](x), weight, bias)]
    test_layer_norm.check("cpp", [*tensors, None])


@pytest.mark.parametrize("view", test_layer_norm.VIEWS)
def test_layer_norm_strides(view):
    """What is not rows of contiguous values is refused."""
    x, residual = (test_layer_norm.VIEWS[view](randn(4, 9, 40, seed=seed)) for seed in (1, 4))
    _, weight, bias, _ = test_layer_norm.inputs(x.shape, torch.float32, CPU)
    if view in ("without the class token", "tokens first", "columns of wider rows", "every other image", "expanded"):
        x, residual = x[:1], residual[:1]  # leading axes that do not flatten: see test_refused_by_name
    test_layer_norm.check("cpp", (x, weight, bias, residual))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", LINEAR_SHAPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_results(activation, shape, dtype):
    inputs = test_linear.linear_inputs(*shape, dtype, CPU, residual=activation != "gelu_tanh")
    test_linear.check(test_linear.linear_of(activation), "cpp", inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_without_epilogue(dtype):
    test_linear.check(test_linear.linear_of(None), "cpp", test_linear.linear_inputs((50,), 40, 33, dtype, CPU, bias=False))
    test_linear.check(test_linear.linear_of(None), "cpp", test_linear.linear_inputs((20,), 40, 33, dtype, CPU))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*test_linear.MLP_SHAPES, ((230,), 48, 200)], ids=str)
@pytest.mark.parametrize("activation, residual", [("gelu", True), ("gelu_tanh", False)])
def test_mlp_results(activation, residual, shape, dtype):
    test_linear.check(test_linear.mlp_of(activation), "cpp", test_linear.mlp_inputs(*shape, dtype, CPU, residual))


# Masks of whole groups of 128 columns and of parts; either operand packed; more columns and rows than a block.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, depth, columns", [*test_dropout.SHAPES, ((230,), 33, 40), ((67,), 40, 530), ((3,), 9, 700)])
def test_linear_that_drops(shape, depth, columns, dtype):
    test_dropout.test_linear("gelu", True, 0.3, 0.4, shape, depth, columns, "cpp", dtype, CPU)
    test_dropout.test_linear_otherwise("a transposed weight", "cpp", dtype, CPU)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 7), (), (40, 3)], ids=str)
def test_mlp_that_drops(shape, dtype):
    test_dropout.test_mlp("gelu_tanh", True, 0.2, 0.4, shape, "cpp", dtype, CPU)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("probs", test_attention.PROBS)
@pytest.mark.parametrize("tokens, size", [(5, 8), (65, 17), (197, 16)])
def test_attention_that_drops(tokens, size, probs, dtype):
    test_dropout.test_attention(probs, tokens, size, "cpp", dtype, CPU)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_gelu_everywhere(activation):
    """Through a layer of one channel with weight 1: a few float32 roundings from x Φ(x), its tail too; and the derivative."""
    z = torch.linspace(-14, 14, 4001)[:, None]
    y = ops.linear_fwd(z, torch.ones(1, 1), None, activation, None, False)[0]
    exact = z.double() * torch.erfc(-z.double() / 2**0.5) / 2  # PyTorch's own loses the tail, in float64 too
    if activation == "gelu_tanh":
        exact = torch.nn.functional.gelu(z.double(), approximate="tanh")
    assert ((y - exact).abs() <= 2.5e-7 * z.abs()).all()
    if activation == "gelu":
        tail = (z > -9) & (z < -1)
        assert ((y - exact).abs()[tail] <= 2e-5 * exact.abs()[tail]).all()
    dy = torch.ones(z.shape)

    def stock(dy, z):
        dz = torch.ops.aten.gelu_backward(dy, z, approximate=ACTIVATIONS[activation])
        return dz, dz.sum(0), torch.nn.functional.gelu(z, approximate=ACTIVATIONS[activation])

    assert_within_budget(
        ops.epilogue_bwd(dy, z, activation, keep_activation=True), stock(dy, z), stock(dy.double(), z.double())
    )
    inf = float("inf")
    special = torch.tensor([[-inf, -3e38, -1e30, 1e30, 3e38, inf]])
    y = ops.linear_fwd(special.T.contiguous(), torch.ones(1, 1), None, activation, None, False)[0].flatten()
    assert y.tolist() == [0.0, 0.0, 0.0, *special[0, 3:].tolist()]
    derivative = ops.epilogue_bwd(torch.ones(1, 6), special, activation)[0].flatten()
    assert derivative.tolist() == [0, 0, 0, 1, 1, 1]
    assert ops.linear_fwd(torch.full((1, 1), float("nan")), torch.ones(1, 1), None, activation, None, False)[0].isnan().all()


def test_linear_strides():
    x, weight, bias, residual = test_linear.linear_inputs((4, 6), 24, 40, torch.float32, CPU, residual=True)
    wide = randn(4, 6, 64)
    layouts = [
        (wide[..., 8:32], weight, bias, wide[..., 24:]),
        (x[:, 2], weight, bias, residual[:, 3]),
        (x, weight.t().contiguous().t(), bias, residual),
        (x, randn(40, 64)[:, 3:27], bias, residual),
        (x, randn(80, 24)[::2], bias, residual),
        (x[0], weight, bias, residual[0, :1].expand(6, 40)),
    ]
    for tensors in layouts:
        for activation in ("gelu", None):
            test_linear.check(test_linear.linear_of(activation), "cpp", tensors)


def test_not_a_number_stays_in_its_row():
    for rows in (37, 130):  # either operand packed
        x, weight, bias, residual = test_linear.linear_inputs((rows,), 40, 64, torch.float32, CPU, residual=True)
        x[3] = float("nan")
        x[36, 5] = float("inf")
        with backends.use("cpp"):
            y = vit_fast.ops.linear(x, weight, bias, "gelu", residual)
        assert (~y.isfinite().all(-1)).nonzero().flatten().tolist() == [3, 36]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("probs", test_attention.PROBS)
@pytest.mark.parametrize("shape", ATTENTION_SHAPES, ids=str)
def test_attention_results(shape, probs, dtype):
    test_attention.check("cpp", test_attention.packed(shape, dtype), probs)


@pytest.mark.parametrize("view", [name for name in test_attention.VIEWS])
def test_attention_strides(view):
    test_attention.check("cpp", test_attention.VIEWS[view](test_attention.packed((3, 11, 2, 24))), "all")


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e2])
def test_attention_extremes(scale):
    """Logits of up to 1e4 and more, rows of equal values: softmax of one token, or of all alike."""
    test_attention.check("cpp", test_attention.packed((1, 40, 2, 16), scale=scale), "all")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, patch, width", test_patch_embed.SHAPES)
def test_patch_embed_results(shape, patch, width, dtype):
    images = test_patch_embed.draw_images(shape, dtype, CPU)
    test_patch_embed.check("cpp", (images, *test_patch_embed.parameters(images, patch, width, dtype, CPU)))


@pytest.mark.parametrize("kind, dtype, normalised", [k for k in test_patch_embed.KINDS if torch.float16 not in k])
@pytest.mark.parametrize("layout", test_patch_embed.LAYOUTS)
def test_patch_embed_layouts(layout, kind, dtype, normalised):
    """Few patches and many: either operand of the product is gathered."""
    for width in (24, 130):
        images = test_patch_embed.LAYOUTS[layout](test_patch_embed.draw_images((2, 3, 19, 26), kind, CPU))
        parameters = test_patch_embed.parameters(images, (6, 4), width, dtype, CPU)
        test_patch_embed.check("cpp", (images, *parameters), normalised)
    images = test_patch_embed.LAYOUTS[layout](test_patch_embed.draw_images((3, 3, 36, 42), kind, CPU))
    test_patch_embed.check("cpp", (images, *test_patch_embed.parameters(images, (3, 3), 24, dtype, CPU)), normalised)


def test_empty():
    """No images, no tokens, no rows: results of those shapes, and zeros for what sums over nothing."""
    empty = randn(0, 5, 16)
    with backends.use("cpp"):
        x, weight, bias, residual = test_layer_norm.inputs((0, 5, 16), torch.float32, CPU, residual=True)
        outputs, gradients = with_gradients(
            lambda x, w, b, r: vit_fast.ops.layer_norm(x, w, b, 1e-6, r), (x, weight, bias, residual)
        )
        assert [o.shape for o in outputs] == [empty.shape] * 2 and not gradients[1].any() and not gradients[2].any()
        tensors = test_linear.mlp_inputs((0, 5), 16, 24, torch.float32, CPU, residual=True)
        outputs, gradients = with_gradients(test_linear.mlp_of("gelu"), tensors)
        assert outputs[0].shape == empty.shape and not any(g.any() for g in gradients)
        for shape in [(0, 5, 2, 8), (2, 0, 2, 8)]:
            outputs, gradients = with_gradients(
                lambda q: vit_fast.ops.attention(q, 2, return_probs=True), [randn(shape[0], shape[1], 3, 2, 8)]
            )
            assert outputs[0].shape == (*shape[:2], 16) and gradients[0].numel() == 0
        images = randn(0, 3, 8, 8)
        outputs, gradients = with_gradients(
            vit_fast.ops.patch_embed, (images, *test_patch_embed.parameters(images, (4, 4), 6, torch.float32, CPU))
        )
        assert outputs[0].shape == (0, 5, 6) and not any(g.any() for g in gradients)


# ---- How they are called --------------------------------------------------------------------------------------------


def small_model():
    config = vit_fast.CONFIGS["testing"]
    torch.manual_seed(0)
    return vit_fast.VisionTransformer(config, 32, num_classes=5, vis=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_model(dtype):
    images, labels = randn(2, 3, 32, 32, dtype=dtype), torch.tensor([1, 3])

    def of(name, dtype):
        model = small_model().to(dtype)
        with backends.use(name):
            logits, maps = model.eval()(images.to(dtype))
            loss = torch.nn.functional.cross_entropy(logits, labels)
            return [logits, *maps, *torch.autograd.grad(loss, [p for n, p in model.named_parameters() if "key.bias" not in n])]

    actual, reference, exact = of("cpp", dtype), of("reference", dtype), of("reference", torch.float64)
    for a, r, e in zip(actual, reference, exact, strict=True):
        assert (
            torch.isfinite(a).all()
            and (a - e).abs().max() <= 4 * (r - e).abs().max() + 4 * torch.finfo(dtype).eps * e.abs().max()
        )


def test_any_number_of_threads():
    """The same within rounding for every number of threads, and bit for bit for the same number."""
    tensors = test_linear.mlp_inputs((3, 67), 48, 200, torch.float32, CPU, residual=True)
    qkv = test_attention.packed((2, 70, 3, 16))
    before = torch.get_num_threads()

    def results():
        with backends.use("cpp"):
            mlp = with_gradients(test_linear.mlp_of("gelu"), tensors)
            attention = with_gradients(lambda q: vit_fast.ops.attention(q, 3, return_probs="head_mean"), [qkv])
        return [*mlp[0], *mlp[1], *attention[0], *attention[1]]

    try:
        torch.set_num_threads(1)
        single = results()
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            first, second = results(), results()
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
            assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(first, single, strict=True))
    finally:
        torch.set_num_threads(before)


def test_autocast():
    tensors = test_linear.mlp_inputs((3, 11), 16, 24, torch.float32, CPU, residual=True)
    qkv = test_attention.packed((1, 9, 2, 8))
    images = randn(2, 3, 8, 8)
    parameters = test_patch_embed.parameters(images, (4, 4), 6, torch.float32, CPU)
    calls = [
        (test_linear.mlp_of("gelu"), tensors),
        (test_linear.linear_of("gelu"), (tensors[0], tensors[1], tensors[2], None)),
        (lambda q: vit_fast.ops.attention(q, 2), [qkv]),
        (vit_fast.ops.patch_embed, (images, *parameters)),
    ]
    for function, inputs in calls:

        def of(name, enabled=True, function=function, inputs=inputs):
            inputs = inputs if enabled else [t if t is None else t.double() for t in inputs]
            with backends.use(name), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                outputs, gradients = with_gradients(function, inputs)
            return outputs + [g for g in gradients if g is not None]

        for a, r, e in zip(of("cpp"), of("reference"), of("reference", enabled=False), strict=True):
            assert_within_budget(a, r, e, dtype=torch.bfloat16)


@pytest.mark.parametrize("types", [(0, 0, 1), (0, 1, 1), (1, 0, 0), (1, 1, 1), (0, 1, 0)], ids=str)
def test_layer_norm_of_mixed_dtypes(types):
    """x, residual and parameters in float32 or bfloat16, as autocast brings them together: y is float32."""
    tensors = test_layer_norm.inputs((5, 40), torch.float32, CPU, True)
    x, weight, bias, residual = (t.to(DTYPES[types[i]]) for t, i in zip(tensors, (0, 2, 2, 1), strict=True))
    with backends.use("cpp"), torch.autocast("cpu", torch.bfloat16):
        outputs, gradients = with_gradients(
            lambda x, w, b, r: vit_fast.ops.layer_norm(x, w, b, 1e-6, r), (x, weight, bias, residual)
        )
    total_dtype = torch.promote_types(x.dtype, residual.dtype)
    assert [o.dtype for o in outputs] == [torch.float32, total_dtype]

    def stock(x, weight, bias, residual):
        total = (x + residual).to(total_dtype if x.dtype != torch.float64 else x.dtype)
        wide = torch.promote_types(total.dtype, torch.float32)
        return torch.nn.functional.layer_norm(total.to(wide), (40,), weight.to(wide), bias.to(wide), 1e-6), total

    given = (x, weight, bias, residual)
    reference, exact = with_gradients(stock, given), with_gradients(stock, [t.double() for t in given])
    for a, r, e in zip((*outputs, *gradients), (*reference[0], *reference[1]), (*exact[0], *exact[1]), strict=True):
        assert a.dtype == r.dtype
        assert_within_budget(a, r, e)


def test_opcheck(instruction_set):
    if instruction_set != extension.instruction_set("auto"):
        pytest.skip("of schemas and fakes, which are the same for all: once")
    x, weight, bias, residual = test_layer_norm.inputs((3, 5, 24), torch.bfloat16, CPU, True)
    check = torch.library.opcheck
    for r in (None, residual):
        check(ops.layer_norm_fwd.default, (x, weight, bias, 1e-6, r))
        _, total, mean, rstd = ops.layer_norm_fwd(x, weight, bias, 1e-6, r)
        check(ops.layer_norm_bwd.default, (x, x if r is None else total, weight, mean, rstd, r))
    x, weight, bias, residual = test_linear.linear_inputs((3, 7), 10, 12, torch.float32, CPU, residual=True)
    check(ops.linear_fwd.default, (x, weight, bias, "gelu", residual, True))
    check(ops.linear_fwd.default, (x, weight, None, None, None, False))
    seed = torch.tensor([5])
    check(ops.linear_fwd.default, (x, weight, bias, "gelu", residual, True, 0.1, 0.2, seed))
    check(ops.linear_dgelu_bwd.default, (residual, randn(12, 9), randn(3, 7, 9), "gelu"))
    check(ops.linear_dgelu_bwd.default, (residual, randn(12, 9), randn(3, 7, 9), "gelu", 0.1, seed, True))
    check(ops.epilogue_bwd.default, (residual, residual, "gelu_tanh"))
    check(ops.epilogue_bwd.default, (residual, residual, "gelu", 0.1, 0.2, seed, True))
    check(ops.epilogue_bwd.default, (residual, None, None, 0.0, 0.2, seed))
    qkv = test_attention.packed((2, 7, 2, 8))
    for probs in test_attention.PROBS:
        check(ops.attention_fwd.default, (qkv, 0.3, 0.0, None, probs))
        out, lse, probabilities = ops.attention_fwd(qkv, 0.3, 0.0, None, probs)
        dprobs = None if probs == "none" else probabilities
        check(ops.attention_bwd.default, (out, qkv, out, lse, 0.3, 0.0, None, probs, dprobs))
    images = randn(2, 3, 9, 8)
    parameters = test_patch_embed.parameters(images, (4, 4), 6, torch.float32, CPU)
    check(ops.patch_embed_fwd.default, (images, *parameters, None, None))
    for wanted in (False, True):
        check(ops.patch_embed_bwd.default, (randn(2, 5, 6), images, parameters[0], None, None, wanted))


def test_compile_fullgraph(instruction_set):
    if instruction_set != extension.instruction_set("auto"):
        pytest.skip("of the boundary, which is the same for all: once")
    model, images = small_model().eval(), randn(1, 3, 32, 32)
    torch._dynamo.reset()
    with backends.use("cpp"), torch.no_grad():
        assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(images)[0], model(images)[0])


def test_chosen_by_auto():
    x, weight, bias, _ = test_layer_norm.inputs((40, 16), torch.float32, CPU)
    operations = backends.OPERATIONS
    assert operations["layer_norm"].choose(x, weight, bias, 1e-6, None) == "cpp"
    assert operations["linear"].choose(x, randn(8, 16), None, None, None) == "cpp"
    assert operations["linear"].choose(x[:1], randn(8, 16), None, None, None) == "torch"
    assert operations["layer_norm"].choose(x.half(), weight.half(), bias.half(), 1e-6, None) == "torch"
    assert operations["attention"].choose(test_attention.packed((1, 4, 2, 8)), 0.1, "none") == "cpp"


# ---- Memory ---------------------------------------------------------------------------------------------------------

PAGE = mmap.PAGESIZE


class Guarded:
    """Copies of tensors that end, or begin, where memory that nobody may touch begins, or ends."""

    libc = ctypes.CDLL(None, use_errno=True)

    def __init__(self, at_end: bool):
        self.at_end, self.kept = at_end, []

    def __call__(self, tensor):
        size = tensor.numel() * tensor.element_size()
        pages = -(-size // PAGE)
        area = mmap.mmap(-1, (pages + 2) * PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(area))
        for page in (0, pages + 1):
            assert self.libc.mprotect(ctypes.c_void_p(start + page * PAGE), PAGE, 0) == 0
        offset = PAGE + (pages * PAGE - size if self.at_end else 0)
        self.kept.append(area)
        return torch.frombuffer(area, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at_end", [False, True], ids=["before", "behind"])
def test_nothing_outside_is_read(at_end, dtype):
    """A read beyond an input would end the process."""
    guarded = Guarded(at_end)
    for rows, columns in [(3, 7), (5, 16), (40, 33)]:
        x, weight, bias, residual = map(guarded, test_layer_norm.inputs((rows, columns), dtype, CPU, True))
        _, total, mean, rstd = ops.layer_norm_fwd(x, weight, bias, 1e-6, residual)
        ops.layer_norm_bwd(x, guarded(total), weight, guarded(mean), guarded(rstd), residual)
    for rows, depth, columns in [(3, 7, 5), (70, 33, 17), (19, 9, 70)]:
        x, weight, bias, residual = map(guarded, test_linear.linear_inputs((rows,), depth, columns, dtype, CPU, residual=True))
        _, z = ops.linear_fwd(x, weight, bias, "gelu", residual, True)
        ops.linear_fwd(x, guarded(weight.t()).t(), bias, "gelu", residual, True)
        ops.linear_fwd(x, weight, bias, "gelu", residual, True, 0.1, 0.2, guarded(torch.tensor([5])))
        ops.epilogue_bwd(residual, guarded(z), "gelu", 0.1, 0.2, torch.tensor([5]), True)
        ops.linear_dgelu_bwd(x, guarded(randn(depth, columns, dtype=dtype)), guarded(z), "gelu_tanh")
    for shape in [(1, 5, 2, 7), (1, 50, 1, 16), (2, 33, 1, 24)]:
        qkv = guarded(test_attention.packed(shape, dtype))
        for probs in test_attention.PROBS:
            out, lse, probabilities = ops.attention_fwd(qkv, 0.3, 0.0, None, probs)
            dprobs = None if probs == "none" else guarded(probabilities)
            for dropped in ((0.0, None), (0.1, guarded(torch.tensor([5])))):
                ops.attention_fwd(qkv, 0.3, *dropped, probs)
                ops.attention_bwd(guarded(out), qkv, guarded(out), guarded(lse), 0.3, *dropped, probs, dprobs)
    for kind in (dtype, torch.uint8):
        for shape, patch, width in [((1, 3, 9, 11), (4, 5), 6), ((2, 1, 8, 8), (2, 2), 40)]:
            images = guarded(test_patch_embed.draw_images(shape, kind, CPU))
            parameters = [guarded(p) for p in test_patch_embed.parameters(images, patch, width, dtype, CPU)]
            mean, std = (guarded(torch.full((shape[1],), 0.5)) for _ in range(2))
            y = ops.patch_embed_fwd(images, *parameters, mean, std)
            ops.patch_embed_bwd(guarded(y), images, parameters[0], mean, std, kind == dtype)


def test_past_2_to_31():
    """Row 2 lies 2**31 elements behind row 0; a 32-bit product of row and stride points as far before it instead."""
    stride = 2**30
    try:
        storage = torch.empty(4 * stride + 4096, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"needs {8 * 2**30} bytes of address space: {error}")
    storage[:4096] = 0  # where a wrapped address points

    def far(tensor, axis=0, column=0):
        strides = list(tensor.stride())
        strides[axis] = stride
        return storage.as_strided(tensor.shape, strides, 2 * stride + column).copy_(tensor)

    x, weight, bias, residual = test_linear.linear_inputs((3,), 40, 24, torch.bfloat16, CPU, residual=True)
    expected = ops.linear_fwd(x, weight, bias, "gelu", residual, True)
    actual = ops.linear_fwd(far(x), weight, bias, "gelu", far(residual, column=64), True)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    actual = ops.linear_fwd(x, far(weight[:3], column=128), bias[:3], None, None, False)[0]
    assert torch.equal(actual, ops.linear_fwd(x, weight[:3].contiguous(), bias[:3], None, None, False)[0])
    rows, weight, bias, residual = test_layer_norm.inputs((3, 40), torch.bfloat16, CPU, True)
    expected = ops.layer_norm_fwd(rows, weight, bias, 1e-6, residual)
    actual = ops.layer_norm_fwd(far(rows), weight, bias, 1e-6, far(residual, column=64))
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    actual = ops.layer_norm_bwd(far(rows), far(rows, column=64), weight, *expected[2:], far(residual, column=128))
    expected = ops.layer_norm_bwd(rows, rows, weight, *expected[2:], residual)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    for axis in (0, 1):
        qkv = test_attention.packed((3, 3, 2, 8), torch.bfloat16)
        expected = ops.attention_fwd(qkv, 0.3, 0.0, None, "all")
        actual = ops.attention_fwd(far(qkv, axis) if axis else far(qkv), 0.3, 0.0, None, "all")
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
        dqkv = ops.attention_bwd(
            far(expected[0], axis, 2048), far(qkv, axis), expected[0], expected[1], 0.3, 0.0, None, "none", None
        )
        assert torch.equal(dqkv, ops.attention_bwd(expected[0], qkv, expected[0], expected[1], 0.3, 0.0, None, "none", None))
    for axis in range(4):
        images = randn(3, 3, 3, 3, dtype=torch.bfloat16)
        parameters = test_patch_embed.parameters(images, (1, 3), 6, torch.bfloat16, CPU)
        expected = ops.patch_embed_fwd(images, *parameters, None, None)
        assert torch.equal(ops.patch_embed_fwd(far(images, axis), *parameters, None, None), expected)


# ---- What is refused ------------------------------------------------------------------------------------------------

X, W, B, SEED = torch.zeros(4, 8), torch.zeros(6, 8), torch.zeros(6), torch.tensor([3])
QKV, IMAGES = torch.zeros(1, 4, 3, 2, 8), torch.zeros(2, 3, 8, 8)
EMBEDDING = torch.zeros(6, 3, 4, 4), B, torch.zeros(1, 1, 6), torch.zeros(1, 5, 6)
REFUSED = [
    (lambda: ops.layer_norm_fwd(X, W, B, 1e-6, None), r"layer_norm_fwd: weight must be \[8\], got \[6, 8\]"),
    (
        lambda: ops.layer_norm_fwd(X.half(), X[0], X[0], 1e-6, None),
        "layer_norm_fwd: x must be float32 or bfloat16, got float16",
    ),
    (
        lambda: ops.layer_norm_fwd(X.t(), B[:4], B[:4], 1e-6, None),
        r"x must be rows of contiguous values.*\[8, 4\], strides \[1, 8\]",
    ),
    (lambda: ops.layer_norm_fwd(X, X[0], X[0], 1e-6, X[:3]), r"layer_norm_fwd: residual must be \[4, 8\], got \[3, 8\]"),
    (lambda: ops.layer_norm_fwd(X[:, :0], X[0, :0], X[0, :0], 1e-6, None), "layer_norm_fwd: x must have columns"),
    (lambda: ops.layer_norm_fwd(X, X[0].bfloat16(), X[0].bfloat16(), 1e-6, None), "weight must be at least as wide as the sum"),
    (lambda: ops.layer_norm_bwd(X, X, X[0], X[0], X[0], None), "layer_norm_bwd: mean must have 4 elements, got 8"),
    (lambda: ops.linear_fwd(X, W.double(), B, None, None, False), "linear_fwd: weight must be float32, got float64"),
    (lambda: ops.linear_fwd(X, W[:, :5], B, None, None, False), "linear_fwd: x's last axis must be 5 as weight's"),
    (
        lambda: ops.linear_fwd(X, W[:, ::2], B, None, None, False),
        "linear_fwd: x's last axis must be 4|contiguous along one axis",
    ),
    (lambda: ops.linear_fwd(X, W, B[:5], None, None, False), r"linear_fwd: bias must be \[6\], got \[5\]"),
    (lambda: ops.linear_fwd(X, W, B, "relu", None, False), "activation must be 'gelu' or 'gelu_tanh', got 'relu'"),
    (lambda: ops.linear_fwd(X, W, B, None, X, False), r"linear_fwd: residual must be \[4, 6\], got \[4, 8\]"),
    (lambda: ops.linear_dgelu_bwd(X, torch.zeros(8, 6), X, "gelu"), r"linear_dgelu_bwd: z must be \[4, 6\], got \[4, 8\]"),
    (lambda: ops.epilogue_bwd(X, W, "gelu"), r"epilogue_bwd: dy must be \[6, 8\], got \[4, 8\]"),
    (lambda: ops.epilogue_bwd(X, X.t().contiguous().t(), "gelu"), "epilogue_bwd: z must be contiguous"),
    (lambda: ops.epilogue_bwd(X, X, None), "epilogue_bwd: z must come with an activation and only then"),
    (
        lambda: ops.epilogue_bwd(X, None, None, keep_activation=True),
        "epilogue_bwd: z must come with an activation and only then",
    ),
    (lambda: ops.epilogue_bwd(X, None, None, 0.5), "epilogue_bwd: dropout_p 0.5 needs a seed"),
    (lambda: ops.linear_fwd(X, W, B, None, None, False, 1.5, 0.0, SEED), r"linear_fwd: dropout_p must be in \[0, 1\], got 1.5"),
    (lambda: ops.linear_fwd(X, W, B, None, None, False, 0.0, 0.5), "linear_fwd: stochastic_depth_p 0.5 needs a seed"),
    (lambda: ops.linear_fwd(X, W, B, None, None, False, 0.5, 0.0, SEED[:0]), r"linear_fwd: seed must be \[1\], got \[0\]"),
    (
        lambda: ops.linear_fwd(X, W, B, None, None, False, 0.5, 0.0, SEED.int()),
        "linear_fwd: seed must be int64, got another dtype",
    ),
    (
        lambda: ops.attention_fwd(QKV[0], 1.0, 0.0, None, "none"),
        r"attention_fwd: qkv must have 5 axes, got shape \[4, 3, 2, 8\]",
    ),
    (lambda: ops.attention_fwd(QKV, 1.0, 0.5, None, "none"), "attention_fwd: dropout_p 0.5 needs a seed"),
    (lambda: ops.attention_fwd(QKV, 1.0, 0.0, None, "some"), "probs must be none, all, class_token or head_mean, got 'some'"),
    (lambda: ops.attention_fwd(QKV.transpose(3, 4), 1.0, 0.0, None, "none"), "qkv's last axis must be contiguous"),
    (
        lambda: ops.patch_embed_fwd(IMAGES, *EMBEDDING[:3], EMBEDDING[3][:, 1:], None, None),
        r"position_embeddings must be \[1, 5, 6\]",
    ),
    (lambda: ops.patch_embed_fwd(IMAGES.byte(), *EMBEDDING, None, None), "uint8 images need mean and std, got neither"),
    (lambda: ops.patch_embed_fwd(IMAGES[:, :2], *EMBEDDING, None, None), r"images must be \[2, 3, 8, 8\], got \[2, 2, 8, 8\]"),
    (lambda: ops.patch_embed_fwd(IMAGES[..., :3], *EMBEDDING, None, None), "hold no patch"),
    (
        lambda: ops.patch_embed_bwd(X, IMAGES, EMBEDDING[0], None, None, False),
        r"patch_embed_bwd: dout must be \[2, 5, 6\], got \[4, 8\]",
    ),
    (lambda: ops.instruction_set("sse9"), "instruction_set: must be auto, .*portable, got 'sse9'"),
]


@pytest.mark.parametrize("call, message", REFUSED)
def test_refused_with_a_message(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


def test_refused_by_name():
    x, weight, bias, residual = test_layer_norm.inputs((3, 4, 8), torch.float32, CPU, True)
    refused = backends.OPERATIONS["layer_norm"].reason_against
    assert "leading axes must flatten" in refused("cpp", x[:, 1:], weight, bias, 1e-6, None)
    assert "leading axes must flatten" in refused(
        "cpp", x, weight, bias, 1e-6, residual.transpose(0, 1).contiguous().transpose(0, 1)
    )
    assert refused("cpp", x.half(), weight, bias, 1e-6, None) == "on cpu it takes float32, bfloat16, got float16"
    assert refused("cpp", x.to("meta"), weight, bias, 1e-6, None) == "the extension has no kernels for meta"


# ---- The build ------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]


def test_no_code_of_one_instruction_set_is_shared(instruction_set, tmp_path):
    """An inline function compiled for AVX-512 that the linker keeps for all would crash other processors."""
    if instruction_set != "portable":
        pytest.skip("of the build: once")
    sys.path.insert(0, str(ROOT / "csrc"))
    import build_extension as build

    compiler = build.find_compiler()
    for name, flags in {"portable": "", **build.X86_SETS}.items():
        command = [
            *compiler,
            "-std=c++20",
            "-O1",
            "-fPIC",
            f"-DVIT_FAST_ISA={name}",
            *flags.split(),
            "-c",
            str(ROOT / "csrc/isa.cpp"),
        ]
        subprocess.run([*command, "-o", str(tmp_path / "isa.o")], check=True)
        symbols = subprocess.run(
            ["nm", "--defined-only", str(tmp_path / "isa.o")], check=True, capture_output=True, text=True
        ).stdout
        shared = [line.split()[2] for line in symbols.splitlines() if line.split()[1] not in "trdb"]
        assert shared == [f"_ZN8vit_fast{len(name)}{name}7kernelsE"]
