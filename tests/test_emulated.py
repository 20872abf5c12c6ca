"""The CUDA kernels and launchers, run on the CPU by the stand-ins in tests/emulated: `python tests/build_variant.py emulated`.

Every dtype that they take, forward and every gradient, against the reference in float64. What only a GPU can tell (its memory
and math functions, cuBLASLt's own results, graphs, streams) is in test_extension_cuda.
"""

import os

import pytest

if os.environ.get("VIT_FAST_EMULATED") != "1":
    pytest.skip("runs in `python tests/build_variant.py emulated`", allow_module_level=True)

import test_extension  # noqa: E402
import test_layer_norm  # noqa: E402
import test_linear  # noqa: E402
import test_patch_embed  # noqa: E402
import torch  # noqa: E402
from test_extension import (  # noqa: E402, F401  (collected here)
    test_gelu_everywhere,
    test_linear_strides,
    test_not_a_number_stays_in_its_row,
)

import vit_fast  # noqa: E402
from vit_fast import backends, extension  # noqa: E402
from vit_fast.ops.linear import linear_reference  # noqa: E402
from vit_fast.testing import assert_within_budget, randn, with_gradients  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALVES = DTYPES[1:]
CPU = torch.device("cpu")
ops = torch.ops.vit_fast_cpp

pytestmark = pytest.mark.usefixtures("nan_filled_memory")


@pytest.fixture(autouse=True)
def dtypes_of_cuda(monkeypatch):
    monkeypatch.setitem(extension.DTYPES, "cpu", extension.DTYPES["cuda"])


# ---- Results and gradients ------------------------------------------------------------------------------------------

# A warp to a row: one chunk of 4 or 8 values in it; every lane and every number of chunks a lane may hold, the last ones partly
# past the end. A block to a row: what chunks don't fit, and rows wider than registers hold.
WARP_ROWS = [(1, 8), (5, 16), (9, 40), (2, 3, 5, 96), (37, 104), (5, 136), (2, 264), (3, 392)]
WARP_ROWS += [(2, columns) for columns in (520, 600, 648, 776, 1032, 1400)]
BLOCK_ROWS = [(1, 1), (5, 1), (3, 1, 17), (7, 33), (9, 12), (37, 65), (4, 255), (3, 257), (2, 1412), (1, 3000), (64,)]
NO_ROWS = [(0, 16), (3, 0, 9)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("shape", WARP_ROWS + BLOCK_ROWS + NO_ROWS, ids=str)
def test_layer_norm_results(shape, residual, dtype):
    test_layer_norm.check("cpp", test_layer_norm.inputs(shape, dtype, CPU, residual))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [100, 104])
@pytest.mark.parametrize("name", test_layer_norm.EXTREME)
def test_layer_norm_extremes(name, columns, dtype):
    x, weight, bias, _ = test_layer_norm.inputs((9, columns), torch.float64, CPU)
    tensors = [t.to(dtype) for t in (test_layer_norm.EXTREME[name](x), weight, bias)]
    test_layer_norm.check("cpp", [*tensors, None])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [40, 45])
@pytest.mark.parametrize("view", test_layer_norm.VIEWS)
def test_layer_norm_strides(view, columns, dtype):
    x, residual = (test_layer_norm.VIEWS[view](randn(4, 9, columns, dtype=dtype, seed=seed)) for seed in (1, 4))
    _, weight, bias, _ = test_layer_norm.inputs(x.shape, dtype, CPU)
    if view in ("without the class token", "tokens first", "columns of wider rows", "every other image", "expanded"):
        x, residual = x[:1], residual[:1]  # leading axes that do not flatten are refused by name
    test_layer_norm.check("cpp", (x, weight, bias, residual))
    test_layer_norm.check("cpp", (x, weight, bias, residual.contiguous()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_addresses(dtype):
    """Each tensor in turn where 16-byte accesses don't fit: by its address, or by its rows' alone."""
    tensors = test_layer_norm.inputs((5, 40), dtype, CPU, True)
    for i in range(4):
        for moved in (shifted, widened) if i in (0, 3) else (shifted,):
            given = [moved(t) if i == j else t for j, t in enumerate(tensors)]
            test_layer_norm.check("cpp", given)
    _, total, mean, rstd = ops.layer_norm_fwd(*tensors[:3], 1e-6, tensors[3])
    tensors = randn(5, 40, dtype=dtype, seed=5), total, tensors[1], randn(5, 40, dtype=dtype, seed=6)
    dx, dweight, dbias = ops.layer_norm_bwd(*tensors[:3], mean, rstd, tensors[3])
    for i in range(4):
        for moved in (shifted, widened) if i != 2 else (shifted,):
            dy, total, weight, dtotal = (moved(t) if i == j else t for j, t in enumerate(tensors))
            actual = ops.layer_norm_bwd(dy, total, weight, mean, rstd, dtotal)
            for a, e in zip(actual, (dx, dweight, dbias), strict=True):
                assert (a.double() - e.double()).abs().max() <= 4 * torch.finfo(dtype).eps * e.double().abs().max()


def shifted(tensor):
    """Equal, one element behind an address that is aligned."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


def widened(tensor):
    """Equal, aligned, in rows that lie one element further apart."""
    return torch.nn.functional.pad(tensor, (0, 1))[..., :-1]


@pytest.mark.parametrize("narrow", HALVES)
@pytest.mark.parametrize("types", [(0, 0, 1), (0, 1, 1), (1, 0, 0), (1, 1, 1), (0, 1, 0), (1, 0, 1), (1, 1, 0)], ids=str)
def test_layer_norm_of_mixed_dtypes(types, narrow, monkeypatch):
    monkeypatch.setattr(test_extension, "DTYPES", [torch.float32, narrow])
    test_extension.test_layer_norm_of_mixed_dtypes(types)


@pytest.mark.parametrize("cotangent", [lambda t: t.sum(), lambda t: t.transpose(0, 1).flatten(1).square().sum()])
def test_layer_norm_gradients_in_any_layout(cotangent):
    """Expanded and transposed gradients arrive at the backward pass, of y and of the sum."""
    tensors = test_layer_norm.inputs((3, 5, 24), torch.float32, CPU, residual=True)

    def gradients(name, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
        with backends.use(name):
            y, total = vit_fast.ops.layer_norm(*leaves[:3], 1e-6, leaves[3])
        return torch.autograd.grad(cotangent(y) + cotangent(total), leaves)

    exact = gradients("reference", torch.float64)
    assert_within_budget(gradients("cpp", torch.float32), gradients("reference", torch.float32), exact)


# Columns for cuBLASLt's GELU (multiples of 8) and not; whole chunks and not; more than a block of the derivative has, and so
# many that one part of its sums is left.
LINEAR_SHAPES = [*test_linear.SHAPES, ((97,), 31, 136), ((20,), 40, 2312), ((1,), 70, 33), ((3, 5), 8, 260), ((2, 0), 5, 8)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", LINEAR_SHAPES, ids=str)
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_linear_results(residual, activation, shape, dtype):
    for bias in (True, False):
        inputs = test_linear.linear_inputs(*shape, dtype, CPU, bias, residual)
        test_linear.check(test_linear.linear_of(activation), "cpp", inputs)
        # Without the pre-activation, in place or in another epilogue; and with it.
        y, z = ops.linear_fwd(*inputs[:3], activation, inputs[3], False)
        assert z.numel() == 0
        assert_within_budget(y, *(linear_reference(*to(inputs[:3]), activation, to(inputs)[3]) for to in (list, doubled)))
        z = ops.linear_fwd(*inputs[:3], activation, inputs[3], True)[1]
        assert_within_budget(z, *(linear_reference(*to(inputs[:3]), None, None) for to in (list, doubled)))


def doubled(tensors):
    return [t if t is None else t.double() for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*test_linear.MLP_SHAPES, ((97,), 48, 136)], ids=str)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_mlp_results(residual, activation, shape, dtype):
    test_linear.check(test_linear.mlp_of(activation), "cpp", test_linear.mlp_inputs(*shape, dtype, CPU, residual))


@pytest.mark.parametrize("narrow", HALVES)
@pytest.mark.parametrize("columns", [33, 40])
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh"])
def test_linear_with_a_wider_residual(activation, columns, narrow):
    """16-bit products, float32 residual and gradient, as autocast brings them together; an expanded one, too."""
    *tensors, _ = test_linear.linear_inputs((7,), 24, columns, narrow, CPU)
    wide = randn(7, columns + 8, seed=4)
    for residual in (wide[:, :columns].contiguous(), wide[:, 4:-4], wide[:1, :columns].expand(7, columns)):

        def of(name, tensors, enabled, residual=residual):
            with backends.use(name), torch.autocast("cpu", narrow, enabled=enabled):
                outputs, gradients = with_gradients(test_linear.linear_of(activation), tensors)
            return [*outputs, *gradients]

        given = (*tensors, residual)
        actual, reference = of("cpp", given, True), of("reference", given, True)
        assert [a.dtype for a in actual] == [r.dtype for r in reference] and actual[0].dtype == torch.float32
        assert_within_budget(actual, reference, of("reference", doubled(given), False), dtype=narrow)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh"])
def test_linear_layouts(activation, dtype):
    x, weight, bias, residual = test_linear.linear_inputs((4, 6), 24, 40, dtype, CPU, residual=True)
    wide, odd = randn(4, 6, 64, dtype=dtype), randn(4 * 6 * 65 + 1, dtype=dtype)[1:].view(4, 6, 65)
    layouts = {
        "rows of a wider tensor": (wide[..., 8:32], weight, bias, wide[..., 24:]),
        "rows that no chunk fits": (odd[..., 1:25], weight, bias, odd[..., 25:]),
        "rows whose addresses alone fit": (widened(x), widened(weight), bias, widened(residual)),
        "a token of each image": (x[:, 2], weight, bias, residual[:, 3]),
        "one token, kept as an axis": (x[:, 2:3], weight, bias, residual[:, 3:4]),
        "a vector": (x[0, 0], weight, bias, residual[0, 0]),
        "a transposed weight": (x, weight.t().contiguous().t(), bias, residual),
        "rows of a wider weight": (x, randn(40, 64, dtype=dtype)[:, 3:27], bias, residual),
        "rows of a wider transposed weight": (x, randn(24, 64, dtype=dtype)[:, 3:43].t(), bias, residual),
        "every second row of a weight": (x, randn(80, 24, dtype=dtype)[::2], bias, residual),
        "an expanded residual": (x[0], weight, bias, residual[0, :1].expand(6, 40)),
        "one row of a weight": (x, randn(3, 64, dtype=dtype)[1:2, ::2][:, :24].t().contiguous().t(), None, residual[..., :1]),
        "one column of a weight": (x[..., :1], weight[:, 4:5], bias, residual),
        "one element of a weight": (x[..., :1], weight[3:4, 4:5], bias[:1], residual[..., 5:6].contiguous()),
        "a bias that is less aligned": (x, weight, randn(41, dtype=dtype)[1:], residual),
    }
    for tensors in layouts.values():
        for more in (tensors[3], None):
            test_linear.check(test_linear.linear_of(activation), "cpp", (*tensors[:3], more))


def test_overlapping_rows_are_refused():
    """cuBLASLt has no leading dimension for them: what it would read lies outside."""
    x, weight, bias, _ = test_linear.linear_inputs((6,), 24, 40, torch.float32, CPU)
    column = weight[:1, :1].expand(1, 24)
    for w in (weight[:1].expand(40, 24), weight[:, :1].expand(40, 24), weight.as_strided((40, 24), (2, 1)), column):
        with pytest.raises(RuntimeError, match="linear_fwd: weight('s rows must not overlap| must be contiguous)"):
            ops.linear_fwd(x, w, None, None, None, False)
    with pytest.raises(RuntimeError, match="linear_dgelu_bwd: weight's rows must not overlap"):
        ops.linear_dgelu_bwd(x, weight.t()[:, :1].expand(24, 40), randn(6, 40), "gelu")
    with pytest.raises(RuntimeError, match="linear_fwd: x's rows must not overlap"):
        ops.linear_fwd(x[:1].expand(6, 24), weight, bias, None, None, False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns, step", [(40, 1), (40, 3), (33, 1)])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_derivative_layouts(activation, columns, step, dtype):
    """dy in wider rows, a transposed weight, GELU's input at an address that no chunk fits."""
    z = randn(7 * columns + step, dtype=dtype, seed=1)[step:].view(7, columns)
    dy, weight = randn(7, 30, dtype=dtype, seed=2)[:, 3:27], randn(24, columns, dtype=dtype, seed=3, scale=0.2)

    def stock(dy, weight, z):
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        dz = torch.ops.aten.gelu_backward(dy @ weight, z, approximate=approximate)
        return dz, dz.sum(0), torch.nn.functional.gelu(z, approximate=approximate)

    for w in (weight, weight.t().contiguous().t()):
        actual = ops.linear_dgelu_bwd(dy, w, z, activation, keep_activation=True)
        assert ops.linear_dgelu_bwd(dy, w, z, activation)[2].numel() == 0
        assert_within_budget(actual, stock(dy, w, z), stock(*doubled((dy, w, z))))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_gelu_derivative_everywhere(activation, dtype):
    dy, z = randn(40, 104, dtype=dtype), torch.linspace(-14, 14, 40 * 104).to(dtype).view(40, 104)

    def stock(dy, z):
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        dz = torch.ops.aten.gelu_backward(dy, z, approximate=approximate)
        return dz, dz.sum(0), torch.nn.functional.gelu(z, approximate=approximate)

    for of in (lambda t: t, lambda t: t[:, 3:].contiguous(), lambda t: t[17:24, :5].contiguous()):
        given = of(dy), of(z)
        assert_within_budget(ops.epilogue_bwd(*given, activation, keep_activation=True), stock(*given), stock(*doubled(given)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, patch, width", [*test_patch_embed.SHAPES, ((2, 3, 16, 40), (8, 8), 24), ((0, 3, 8, 8), (4, 4), 6)]
)
def test_patch_embed_results(shape, patch, width, dtype):
    images = test_patch_embed.draw_images(shape, dtype, CPU)
    test_patch_embed.check("cpp", (images, *test_patch_embed.parameters(images, patch, width, dtype, CPU)))


@pytest.mark.parametrize("kind, dtype, normalised", [*test_patch_embed.KINDS, (torch.float32, torch.float16, True)])
@pytest.mark.parametrize("layout", test_patch_embed.LAYOUTS)
def test_patch_embed_layouts(layout, kind, dtype, normalised):
    """Patches of whole chunks and of none, in images that chunks fit or not."""
    for shape, patch in [((2, 3, 16, 40), (8, 8)), ((2, 3, 19, 26), (6, 4)), ((1, 3, 9, 35), (3, 5))]:
        images = test_patch_embed.LAYOUTS[layout](test_patch_embed.draw_images(shape, kind, CPU))
        test_patch_embed.check("cpp", (images, *test_patch_embed.parameters(images, patch, 24, dtype, CPU)), normalised)


@pytest.mark.parametrize("narrow", HALVES)
def test_autocast(narrow):
    """16-bit products, float32 parameters and residual: the wider one decides."""
    images = randn(2, 3, 16, 16)
    calls = [
        (test_linear.mlp_of("gelu"), test_linear.mlp_inputs((3, 11), 16, 24, torch.float32, CPU, residual=True)),
        (test_linear.mlp_of("gelu_tanh"), test_linear.mlp_inputs((3, 11), 16, 24, torch.float32, CPU)),
        (vit_fast.ops.patch_embed, (images, *test_patch_embed.parameters(images, (8, 8), 6, torch.float32, CPU))),
    ]
    for function, inputs in calls:

        def of(name, inputs, enabled=True, function=function):
            with backends.use(name), torch.autocast("cpu", narrow, enabled=enabled):
                outputs, gradients = with_gradients(function, inputs)
            return outputs + [g for g in gradients if g is not None]

        exact = of("reference", doubled(inputs), enabled=False)
        assert_within_budget(of("cpp", inputs), of("reference", inputs), exact, dtype=narrow)


# ---- How they run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_in_every_run(dtype):
    """Blocks and threads take turns in another order each time."""

    def results():
        with backends.use("cpp"):
            of = [with_gradients(test_linear.mlp_of(act), mlp) for act, mlp in mlps]
            of += [with_gradients(lambda *t: vit_fast.ops.layer_norm(*t[:3], 1e-6, t[3]), rows) for rows in norms]
        return [t for outputs, gradients in of for t in (*outputs, *gradients)]

    mlps = [(act, test_linear.mlp_inputs((37,), 24, 40, dtype, CPU, residual=True)) for act in ("gelu", "gelu_tanh")]
    norms = [test_layer_norm.inputs((23, columns), dtype, CPU, True) for columns in (104, 99)]
    first = results()
    assert all(torch.equal(a, b) for _ in range(4) for a, b in zip(first, results(), strict=True))


def test_captured(monkeypatch):
    """Inside a graph's capture nothing is timed, and shapes that nothing has timed yet run all the same."""
    monkeypatch.setenv("EMULATED_CAPTURE", "1")
    test_linear.check(test_linear.mlp_of("gelu_tanh"), "cpp", test_linear.mlp_inputs((29,), 23, 48, torch.float32, CPU))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
def test_an_algorithm_is_kept_for_its_alignment(activation, dtype):
    """cuBLASLt chooses by the alignment of every address: what a first call finds must not serve one that is less aligned."""
    x, weight, bias, _ = test_linear.linear_inputs((31,), 24, 56, dtype, CPU)
    expected = ops.linear_fwd(x, weight, bias, activation, None, True)

    for i in range(3):
        given = [shifted(t) if i == j else t for j, t in enumerate((x, weight, bias))]
        for keep in (True, False):
            actual = ops.linear_fwd(*given, activation, None, keep)
            assert torch.equal(actual[0], expected[0])
    dy, z = randn(31, 24, dtype=dtype), randn(31, 56, dtype=dtype)
    expected = ops.linear_dgelu_bwd(dy, weight.t(), z, "gelu_tanh")
    for given in [(shifted(dy), weight.t(), z), (dy, shifted(weight).t(), z), (dy, weight.t(), shifted(z))]:
        assert all(torch.equal(a, e) for a, e in zip(ops.linear_dgelu_bwd(*given, "gelu_tanh"), expected, strict=True))


# ---- Memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at_end", [False, True], ids=["before", "behind"])
def test_nothing_outside_is_read(at_end, dtype):
    """A read beyond an input would end the process."""
    guarded = test_extension.Guarded(at_end)
    for rows, columns in [(3, 7), (5, 16), (40, 33), (9, 104), (2, 3000)]:
        x, weight, bias, residual = map(guarded, test_layer_norm.inputs((rows, columns), dtype, CPU, True))
        _, total, mean, rstd = ops.layer_norm_fwd(x, weight, bias, 1e-6, residual)
        ops.layer_norm_bwd(x, guarded(total), weight, guarded(mean), guarded(rstd), residual)
    for rows, depth, columns in [(3, 7, 5), (70, 33, 17), (19, 9, 70), (9, 16, 24)]:
        x, weight, bias, residual = map(guarded, test_linear.linear_inputs((rows,), depth, columns, dtype, CPU, residual=True))
        for activation in ("gelu", "gelu_tanh"):
            _, z = ops.linear_fwd(x, weight, bias, activation, residual, True)
            ops.linear_fwd(x, guarded(weight.t()).t(), bias, activation, None, True)
            ops.epilogue_bwd(residual, guarded(z), activation, keep_activation=True)
            ops.linear_dgelu_bwd(x, guarded(randn(depth, columns, dtype=dtype)), guarded(z), activation, keep_activation=True)
    for kind in (dtype, torch.uint8):
        for shape, patch, width in [((1, 3, 9, 11), (4, 5), 6), ((2, 1, 8, 8), (2, 2), 40), ((1, 2, 8, 16), (8, 8), 16)]:
            images = guarded(test_patch_embed.draw_images(shape, kind, CPU))
            parameters = [guarded(p) for p in test_patch_embed.parameters(images, patch, width, dtype, CPU)]
            mean, std = (guarded(torch.full((shape[1],), 0.5)) for _ in range(2))
            y = ops.patch_embed_fwd(images, *parameters, mean, std)
            ops.patch_embed_bwd(guarded(y), images, parameters[0], mean, std, kind == dtype)


def test_past_2_to_31(monkeypatch):
    """Row 2 lies 2**31 elements behind row 0; a 32-bit product of row and stride points as far before it instead."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # pages nobody touches aren't committed
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
    for activation in (None, "gelu"):
        expected = ops.linear_fwd(x, weight, bias, activation, residual, True)
        actual = ops.linear_fwd(far(x), weight, bias, activation, far(residual, column=64), True)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    for columns in (40, 33):
        rows, weight, bias, residual = test_layer_norm.inputs((3, columns), torch.bfloat16, CPU, True)
        expected = ops.layer_norm_fwd(rows, weight, bias, 1e-6, residual)
        actual = ops.layer_norm_fwd(far(rows), weight, bias, 1e-6, far(residual, column=64))
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
        actual = ops.layer_norm_bwd(far(rows), far(rows, column=64), weight, *expected[2:], far(residual, column=128))
        expected = ops.layer_norm_bwd(rows, rows, weight, *expected[2:], residual)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    for axis in range(4):
        images = randn(3, 3, 3, 3, dtype=torch.bfloat16)
        parameters = test_patch_embed.parameters(images, (1, 3), 6, torch.bfloat16, CPU)
        expected = ops.patch_embed_fwd(images, *parameters, None, None)
        assert torch.equal(ops.patch_embed_fwd(far(images, axis), *parameters, None, None), expected)
