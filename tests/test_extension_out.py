"""The extension's operations of a frozen model: weights packed once, results in memory that the caller gives.

Every instruction set × dtype against the formula in float64; memory around a result stays as it was.
"""

import pytest
import test_attention
import test_patch_embed
import torch
import torch.nn.functional as F
from test_extension import CPU, DTYPES, Guarded, instruction_set, ops, pytestmark  # noqa: F401  (pytest takes the last two here)

from vit_fast import extension
from vit_fast.testing import assert_within_budget, randn

ACTIVATIONS = {
    None: lambda z: z,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}
FRAME = 77.0


class Framed:
    """Memory for a result, NaN, within more that holds another value; `whole` says whether the rest still does."""

    def __init__(self, sizes, dtype, axes=(-1,), before=3, behind=5):
        outer = list(sizes)
        for axis in axes:
            outer[axis] += before + behind
        self.memory = torch.full(outer, FRAME, dtype=dtype)
        self.out = self.memory
        for axis in axes:
            self.out = self.out.narrow(axis, before, sizes[axis])
        self.out.fill_(float("nan"))

    def filled(self, values):
        self.out.copy_(values)
        return self.out

    def check(self):
        result = self.out.clone()
        self.out.fill_(FRAME)
        assert (self.memory == FRAME).all(), "written outside of the result"
        return result


def linear_inputs(leading, depth, columns, dtype):
    x = randn(*leading, depth, dtype=dtype, seed=1)
    weight = randn(columns, depth, dtype=dtype, seed=2, scale=depth**-0.5)
    return x, weight, randn(columns, dtype=dtype, seed=3), randn(*leading, columns, dtype=dtype, seed=4)


def linear(x, weight, bias, activation, residual):
    y = ACTIVATIONS[activation](F.linear(x, weight, bias))
    return y if residual is None else y + residual


def check_linear(result, x, weight, bias, activation, residual):
    given = x, weight, bias, residual
    double = [t if t is None else t.double() for t in given]
    reference = [t if t is None else t.to(x.dtype) for t in given]
    of = [linear(*tensors[:3], activation, tensors[3]) for tensors in (reference, double)]
    assert_within_budget(result, of[0], of[1])


# One row; 197; more than a block; one column; a vector's, a panel's, and one more or less; depth 1, a slice's and more.
SHAPES = [
    ((1,), 1, 1),
    ((2, 3), 5, 15),
    ((1,), 40, 16),
    ((15,), 33, 17),
    ((13,), 1, 31),
    ((14,), 192, 33),
    ((29,), 193, 70),
    ((197,), 70, 48),
    ((1, 197), 401, 65),
    ((2, 225), 24, 100),
    ((50,), 800, 600),
    ((460,), 30, 40),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_results(activation, shape, dtype):
    x, weight, bias, residual = linear_inputs(*shape, dtype)
    packed = ops.linear_pack(weight)
    for b, r in [(bias, None), (None, residual), (bias, residual), (None, None)]:
        out = Framed(residual.shape, dtype)
        ops.linear_packed_out(x, packed, b, activation, r, out.out)
        check_linear(out.check(), x, weight, b, activation, r)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [((13,), 40, 17), ((197,), 200, 64), ((2, 225), 33, 600)], ids=str)
def test_residual_in_place(shape, dtype):
    x, weight, bias, residual = linear_inputs(*shape, dtype)
    stream = Framed(residual.shape, dtype)
    ops.linear_packed_out(x, ops.linear_pack(weight), bias, "gelu", stream.filled(residual), stream.out)
    check_linear(stream.check(), x, weight, bias, "gelu", residual)


def test_strides():
    x, weight, bias, residual = linear_inputs((4, 6), 24, 40, torch.float32)
    packed, wide = ops.linear_pack(weight), randn(4, 6, 64)
    memory = torch.full((4, 6, 96), FRAME)
    inputs = [
        (wide[..., 8:32], wide[..., 24:]),
        (x[:, 2], residual[:, 3]),
        (x[0], residual[0, :1].expand(6, 40)),
    ]
    for x, residual in inputs:
        out = Framed(residual.shape, torch.float32)
        ops.linear_packed_out(x, packed, bias, "silu", residual, out.out)
        check_linear(out.check(), x, weight, bias, "silu", residual)
    x = memory[..., :24].copy_(randn(4, 6, 24, seed=1))  # rows of the result between those of x
    ops.linear_packed_out(x, packed, bias, None, None, memory[..., 30:70])
    check_linear(memory[..., 30:70].clone(), x, weight, bias, None, None)
    assert (memory[..., 24:30] == FRAME).all() and (memory[..., 70:] == FRAME).all()


def test_mixed_dtypes():
    """bfloat16 x with a float32 bias, and into float32, as linear_fwd does with a wider residual."""
    x, weight, bias, residual = linear_inputs((31,), 100, 70, torch.bfloat16)
    packed = ops.linear_pack(weight)
    for b, r, dtype in [
        (bias.float() + 1e-3, residual, torch.bfloat16),
        (bias.float() + 1e-3, residual.float() + 1e-3, torch.float32),
        (bias, None, torch.float32),
    ]:
        out = Framed((31, 70), dtype)
        ops.linear_packed_out(x, packed, b, "gelu", r, out.out)
        check_linear(out.check(), x.to(dtype), weight.to(dtype), b, "gelu", r)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns, depth", [(1, 1), (16, 5), (17, 40), (70, 33), (100, 1)])
def test_pack_and_unpack(columns, depth, dtype, instruction_set):  # noqa: F811
    weight = randn(columns, depth, dtype=dtype)
    panel = {"avx512": 32, "avx2": 16, "portable": 8}[instruction_set]
    for given in (weight, weight.t().contiguous().t(), randn(columns, depth + 3, dtype=dtype)[:, 1:-2]):
        packed = ops.linear_pack(given)
        assert packed.dtype == torch.float32 and packed.shape == (-(-columns // panel), depth, panel)
        assert torch.equal(ops.linear_unpack(packed, columns), given.float())
        padding = packed.transpose(1, 2).reshape(-1, depth)[columns:]
        assert not padding.any()  # the same file for the same model


def test_ranges_of_panels():
    x, weight, bias, _ = linear_inputs((20,), 50, 100, torch.float32)
    packed = ops.linear_pack(weight)
    panel = packed.shape[2]
    for first, last in [(0, 1), (1, 3), (2, packed.shape[0])]:
        rows = slice(first * panel, min(100, last * panel))
        out = Framed((20, rows.stop - rows.start), torch.float32)
        ops.linear_packed_out(x, packed[first:last], bias[rows], None, None, out.out)
        check_linear(out.check(), x, weight[rows], bias[rows], None, None)
        assert torch.equal(ops.linear_unpack(packed[first:last], rows.stop - rows.start), weight[rows])
    out = Framed((20, 2 * panel - 3), torch.float32)  # and columns of a panel can be left out at its end
    ops.linear_packed_out(x, packed[:2], None, None, None, out.out)
    check_linear(out.check(), x, weight[: 2 * panel - 3], None, None, None)


def test_silu_everywhere():
    z = torch.linspace(-100, 100, 4001)[:, None]
    out, one = torch.empty(4001, 1), ops.linear_pack(torch.ones(1, 1))
    ops.linear_packed_out(z, one, None, "silu", None, out)
    assert ((out - F.silu(z.double())).abs() <= 2.5e-7 * z.abs()).all()
    inf = float("inf")
    special = torch.tensor([-inf, -3e38, -1e30, 1e30, 3e38, inf, float("nan")])[:, None]
    out = torch.empty(7, 1)
    ops.linear_packed_out(special, one, None, "silu", None, out)
    assert out[:6, 0].tolist() == [0, 0, 0, *special[3:6, 0].tolist()] and out[6].isnan()


def test_not_a_number_stays_in_its_row():
    x, weight, bias, residual = linear_inputs((37,), 40, 64, torch.float32)
    x[3], x[36, 5] = float("nan"), float("inf")
    out = torch.empty_like(residual)
    ops.linear_packed_out(x, ops.linear_pack(weight), bias, "gelu", residual, out)
    assert (~out.isfinite().all(-1)).nonzero().flatten().tolist() == [3, 36]


def test_any_number_of_threads():
    """The same within rounding for every number of threads, and bit for bit for the same number."""
    x, weight, bias, residual = linear_inputs((197,), 300, 200, torch.float32)
    packed, qkv = ops.linear_pack(weight), test_attention.packed((2, 70, 3, 16))
    before = torch.get_num_threads()

    def results():
        results = [torch.empty(197, 200), torch.empty(2, 70, 48), torch.empty(197, 300)]
        ops.linear_packed_out(x, packed, bias, "gelu", residual, results[0])
        ops.attention_out(qkv, 0.25, "none", results[1], None)
        ops.layer_norm_out(x, None, None, 1e-6, results[2])
        return results

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


# ---- layer_norm_out, attention_out, patch_embed_out -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (2, 5, 64), (197, 768), (9, 4100)], ids=str)
def test_layer_norm_results(shape, dtype):
    x = (randn(*shape, seed=1) * 2 + 1).to(dtype)
    parameters = [
        (None, None),
        (randn(shape[-1], dtype=dtype, seed=2), randn(shape[-1], dtype=dtype, seed=3)),
        (randn(shape[-1], seed=2), randn(shape[-1], seed=3)),
        (randn(shape[-1], seed=2), None),
        (None, randn(shape[-1], seed=3)),
    ]
    for weight, bias in parameters:

        def of(type, weight=weight, bias=bias):
            given = [t if t is None else t.to(type) for t in (x, weight, bias)]
            return F.layer_norm(given[0], shape[-1:], *given[1:], 1e-6)

        out, stream = Framed(shape, dtype), Framed(shape, dtype)
        ops.layer_norm_out(x, weight, bias, 1e-6, out.out)
        ops.layer_norm_out(stream.filled(x), weight, bias, 1e-6, stream.out)
        result = out.check()
        assert_within_budget(result, of(dtype), of(torch.float64))
        assert torch.equal(stream.check(), result)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("probs", test_attention.PROBS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 11, 2, 24), (1, 197, 2, 64), (2, 65, 3, 17)], ids=str)
def test_attention_results(shape, probs, dtype):
    qkv = test_attention.packed(shape, dtype)
    images, tokens, heads, head = shape
    scale = head**-0.5
    expected = ops.attention_fwd(qkv, scale, 0.0, None, probs)
    for axes in [(2,), (1,), (0, 1, 2)]:
        out = Framed((images, tokens, heads * head), dtype, axes)
        probabilities = None if probs == "none" else Framed(expected[2].shape, dtype, (0,))
        ops.attention_out(qkv, scale, probs, out.out, probabilities and probabilities.out)
        assert torch.equal(out.check(), expected[0])  # which the operation's own tests compare with the formula
        assert probabilities is None or torch.equal(probabilities.check(), expected[2])

    def of(type):
        q, k, v = qkv.to(type).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)

    assert_within_budget(expected[0], of(dtype), of(torch.float64))


@pytest.mark.parametrize("kind, dtype", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.uint8, torch.float32),
                                         (torch.uint8, torch.bfloat16), (torch.float32, torch.bfloat16)])  # fmt: skip
@pytest.mark.parametrize("layout", test_patch_embed.LAYOUTS)
def test_patch_embed_results(layout, kind, dtype):
    for channels, size, patch, width in [(3, (19, 26), (6, 4), 40), (3, (33, 32), (16, 16), 17), (5, (7, 5), (1, 1), 70)]:
        images = test_patch_embed.LAYOUTS[layout](test_patch_embed.draw_images((2, channels, *size), kind, CPU))
        channels = images.shape[1]  # some of those drawn
        depth = channels * patch[0] * patch[1]
        weight = randn(width, channels, *patch, dtype=dtype, seed=2, scale=depth**-0.5 / (100 if kind == torch.uint8 else 1))
        count = (size[0] // patch[0]) * (size[1] // patch[1])
        bias, positions = randn(width, seed=3), randn(count, width, dtype=dtype, seed=4)
        packed = ops.linear_pack(weight.flatten(1))
        for b, table in [(bias, positions), (bias.to(dtype), None), (None, positions.float() + 1e-3)]:

            def of(type, b=b, table=table, images=images, weight=weight, patch=patch):
                rows = F.conv2d(images.to(type), weight.to(type), b if b is None else b.to(type), patch).flatten(2)
                rows = rows.transpose(1, 2)
                return rows if table is None else rows + table.to(type)

            out = Framed((2, count, width), dtype, (1, 2), 1, 0)  # behind a prefix token
            ops.patch_embed_out(images, packed, b, table, *patch, out.out)
            assert_within_budget(out.check(), of(dtype), of(torch.float64))


def test_every_byte():
    """All 256 values of a byte, each in a patch of its own, as planes and as pixels."""
    images = (
        torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1) + torch.tensor([0, 50, 100])[:, None, None]
    )
    images = images.to(torch.uint8)
    packed = ops.linear_pack(torch.eye(3))
    for given in (images, images.contiguous(memory_format=torch.channels_last)):
        out = torch.empty(1, 256, 3)
        ops.patch_embed_out(given, packed, None, None, 1, 1, out)
        assert torch.equal(out, images.float().flatten(2).transpose(1, 2))


def test_empty():
    x, weight, bias, residual = linear_inputs((0, 5), 24, 40, torch.float32)
    packed = ops.linear_pack(weight)
    ops.linear_packed_out(x, packed, bias, "gelu", residual, residual)
    ops.layer_norm_out(x, None, None, 1e-6, torch.empty_like(x))
    for shape in [(0, 5, 3, 2, 8), (2, 0, 3, 2, 8)]:
        ops.attention_out(torch.empty(shape), 1.0, "none", torch.empty(*shape[:2], 16), None)
    packed = ops.linear_pack(randn(6, 48))
    ops.patch_embed_out(torch.empty(0, 3, 8, 8), packed, None, None, 4, 4, torch.empty(0, 4, 6))
    ops.patch_embed_out(torch.empty(2, 3, 8, 3), packed, None, torch.empty(0, 6), 4, 4, torch.empty(2, 0, 6))


# ---- Memory and schemas ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at_end", [False, True], ids=["before", "behind"])
def test_nothing_outside_is_touched(at_end, dtype):
    """A read or a write beyond a tensor would end the process."""
    guarded = Guarded(at_end)
    for rows, depth, columns in [(1, 1, 1), (3, 7, 5), (70, 33, 17), (19, 9, 70), (197, 40, 33)]:
        x, weight, bias, residual = map(guarded, linear_inputs((rows,), depth, columns, dtype))
        packed = guarded(ops.linear_pack(weight))
        assert torch.equal(packed, ops.linear_pack(guarded(weight.t()).t()))
        ops.linear_packed_out(x, packed, bias, "silu", residual, guarded(torch.zeros_like(residual)))
        ops.linear_packed_out(x, packed, guarded(bias.float()), "gelu", residual, residual)
        ops.layer_norm_out(x, None, None, 1e-6, x)
        ops.layer_norm_out(residual, bias, bias, 1e-6, guarded(torch.zeros_like(residual)))
    for shape in [(1, 5, 2, 7), (1, 50, 1, 16), (2, 33, 1, 24)]:
        qkv = guarded(test_attention.packed(shape, dtype))
        for probs in test_attention.PROBS:
            out, _, probabilities = ops.attention_fwd(qkv, 0.3, 0.0, None, probs)
            ops.attention_out(qkv, 0.3, probs, guarded(out), None if probs == "none" else guarded(probabilities))
    for kind in (dtype, torch.uint8):
        for shape, patch, width in [((1, 3, 9, 11), (4, 5), 6), ((2, 1, 8, 8), (2, 2), 40), ((2, 9, 11, 3), (3, 3), 33)]:
            images = guarded(test_patch_embed.draw_images(shape, kind, CPU))
            images = images.permute(0, 3, 1, 2) if shape[3] == 3 else images
            count = images.shape[2] // patch[0] * (images.shape[3] // patch[1])
            packed = guarded(ops.linear_pack(randn(width, images.shape[1] * patch[0] * patch[1])))
            positions, out = (
                guarded(randn(count, width, dtype=dtype)),
                guarded(torch.zeros(shape[0], count, width, dtype=dtype)),
            )
            ops.patch_embed_out(images, packed, guarded(randn(width)), positions, *patch, out)


def test_opcheck(instruction_set):  # noqa: F811
    if instruction_set != extension.instruction_set("auto"):
        pytest.skip("of schemas, which are the same for all: once")

    def check(op, *arguments):
        torch.library.opcheck(op.default, arguments, test_utils="test_schema")

    x, weight, bias, residual = linear_inputs((3, 7), 10, 12, torch.float32)
    packed, out = ops.linear_pack(weight), torch.empty_like(residual)
    check(ops.linear_pack, weight)
    check(ops.linear_unpack, packed, 12)
    check(ops.linear_packed_out, x, packed, bias, "gelu", residual, out)
    check(ops.linear_packed_out, x, packed, None, None, None, out)
    check(ops.layer_norm_out, x, x[0, 0], x[0, 1], 1e-6, torch.empty_like(x))
    qkv = test_attention.packed((2, 7, 2, 8))
    check(ops.attention_out, qkv, 0.3, "none", torch.empty(2, 7, 16), None)
    check(ops.attention_out, qkv, 0.3, "head_mean", torch.empty(2, 7, 16), torch.empty(2, 7, 7))
    packed = ops.linear_pack(randn(6, 48))
    check(ops.patch_embed_out, randn(2, 3, 9, 8), packed, randn(6), randn(4, 6), 4, 4, torch.empty(2, 4, 6))


X, W, B, Y = randn(4, 8), randn(6, 8), randn(6), torch.zeros(4, 6)
BOTH = torch.zeros(4, 20)
QKV, OUT = randn(2, 4, 3, 2, 8), torch.zeros(2, 4, 16)
IMAGES, EMBEDDED = randn(2, 3, 8, 8), torch.zeros(2, 4, 6)


def packed(*shape):
    return ops.linear_pack(randn(*shape))


def linear_out(x=X, weight=None, bias=None, activation=None, residual=None, out=Y):
    ops.linear_packed_out(x, packed(6, 8) if weight is None else weight, bias, activation, residual, out)


def embed_out(images=IMAGES, weight=(6, 48), bias=None, positions=None, patch=(4, 4), out=EMBEDDED):
    ops.patch_embed_out(images, packed(*weight), bias, positions, *patch, out)


REFUSED = [
    (lambda: ops.linear_pack(X[0]), r"linear_pack: weight must have 2 axes, got shape \[8\]"),
    (lambda: ops.linear_pack(X[:, :0]), "linear_pack: weight must have elements"),
    (lambda: ops.linear_pack(X[::2, ::2]), "linear_pack: weight must be contiguous along one axis"),
    (lambda: ops.linear_pack(X.double()), "linear_pack: weight must be float32 or bfloat16, got float64"),
    (lambda: ops.linear_unpack(packed(6, 8), 33), "linear_unpack: columns must be what 1 panels of .* hold, got 33"),
    (lambda: ops.linear_unpack(X, 3), "linear_unpack: packed must have 3 axes"),
    (lambda: linear_out(weight=W), "linear_packed_out: packed must have 3 axes"),
    (lambda: linear_out(weight=packed(6, 8).double()), "packed must be float32, got float64"),
    (lambda: linear_out(weight=torch.zeros(1, 8, 5)), r"packed must be for .*, \[panels, depth, .*\], got \[1, 8, 5\]$"),
    (lambda: linear_out(weight=packed(70, 8)), r"packed must have 1 panels of .* columns for out's 6, got shape"),
    (lambda: linear_out(weight=packed(6, 16)[:, ::2]), "packed must be contiguous"),
    (lambda: linear_out(x=X[:, :7]), r"x's last axis must be 8 as packed's, got shape \[4, 7\]"),
    (lambda: linear_out(x=X.double()), "x must be float32 or bfloat16, got float64"),
    (lambda: linear_out(x=randn(4, 16)[:, ::2]), "x must be rows of contiguous values"),
    (lambda: linear_out(bias=B[:5]), r"bias must be \[6\], got \[5\]"),
    (lambda: linear_out(bias=B.bfloat16()), "bias must be float32, got bfloat16"),
    (lambda: linear_out(activation="relu"), "activation must be 'gelu', 'gelu_tanh' or 'silu', got 'relu'"),
    (lambda: linear_out(residual=Y[:3]), r"residual must be \[4, 6\], got \[3, 6\]"),
    (lambda: linear_out(residual=Y.bfloat16()), "residual must be float32, got bfloat16"),
    (lambda: linear_out(out=Y[:3]), r"out must be \[4, 6\], got \[3, 6\]"),
    (lambda: linear_out(out=Y.bfloat16()), "out must be float32, got bfloat16"),
    (lambda: linear_out(out=Y[:1].expand(4, 6)), "out must be rows of contiguous values, none in two places"),
    (lambda: linear_out(out=torch.zeros(6, 4).t()), "out must be rows of contiguous values"),
    (lambda: linear_out(x=BOTH[:, :8], out=BOTH[:, 7:13]), "x must not share memory with out$"),
    (
        lambda: linear_out(residual=BOTH[:, :6], out=BOTH[:, 1:7]),
        "residual must not share memory with out unless it is out itself",
    ),
    (lambda: ops.linear_fwd(X, W, B, "silu", None, False), "activation must be 'gelu' or 'gelu_tanh', got 'silu'"),
    (lambda: ops.layer_norm_out(X, X[0, :5], None, 1e-6, X), r"layer_norm_out: weight must be \[8\], got \[5\]"),
    (lambda: ops.layer_norm_out(X, X[0], X[0].bfloat16(), 1e-6, X), "layer_norm_out: bias must be float32, got bfloat16"),
    (lambda: ops.layer_norm_out(X, None, None, 1e-6, X.bfloat16()), "layer_norm_out: out must be float32, got bfloat16"),
    (
        lambda: ops.layer_norm_out(BOTH[:, :8], None, None, 1e-6, BOTH[:, 2:10]),
        "layer_norm_out: x must not share memory with out",
    ),
    (lambda: ops.attention_out(QKV, 1.0, "some", OUT, None), "probs must be none, all, class_token or head_mean, got 'some'"),
    (lambda: ops.attention_out(QKV, 1.0, "all", OUT, None), "probabilities must come with probs other than none and only then"),
    (lambda: ops.attention_out(QKV, 1.0, "none", OUT, OUT), "probabilities must come with probs other than none and only then"),
    (lambda: ops.attention_out(QKV, 1.0, "none", OUT[:1], None), r"out must be \[2, 4, 16\], got \[1, 4, 16\]"),
    (lambda: ops.attention_out(QKV, 1.0, "all", OUT, OUT), r"probabilities must be \[2, 2, 4, 4\], got \[2, 4, 16\]"),
    (lambda: ops.attention_out(QKV, 1.0, "none", QKV.view(2, 4, 48)[..., :16], None), "qkv must not share memory with out"),
    (lambda: embed_out(weight=(6, 50)), r"packed must be 48 deep for patches of \[3, 4, 4\], got 50"),
    (lambda: embed_out(patch=(0, 4)), "a patch must have rows and columns, got 0 and 4"),
    (lambda: embed_out(out=EMBEDDED[:, 1:]), r"out must be \[2, 4, 6\], got \[2, 3, 6\]"),
    (lambda: embed_out(images=IMAGES.double()), "images must be float32 or bfloat16 or uint8, got float64"),
    (lambda: embed_out(positions=randn(5, 6)), r"positions must be \[4, 6\], got \[5, 6\]"),
]


@pytest.mark.parametrize("call, message", REFUSED)
def test_refused_with_a_message(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


def test_packed_for_another_instruction_set(instruction_set):  # noqa: F811
    weight = packed(6, 8)
    extension.instruction_set("portable")
    if instruction_set == "portable":
        extension.instruction_set("auto")
    now = extension.instruction_set()
    if now == instruction_set:
        pytest.skip(f"this processor has only {now}")
    with pytest.raises(RuntimeError, match=rf"packed must be for {now}, .*, got \[1, 8, .*\] for {instruction_set}"):
        linear_out(weight=weight)
