"""The extension's operations for frozen models: packed weights, and results in memory that the caller gives."""

import pytest
import torch
import torch.nn.functional as F

from vit_fast import extension
from vit_fast.testing import assert_within_budget, randn

pytestmark = pytest.mark.skipif(extension.missing("cpu") is not None, reason=str(extension.missing("cpu")))
CPP = torch.ops.vit_fast_cpp
PANELS = {"avx512": 32, "avx2": 16, "portable": 8}


@pytest.fixture(params=PANELS, autouse=True)
def instructions(request):
    try:
        extension.instruction_set(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param
    extension.instruction_set("auto")


def framed(*shape, dtype=torch.float32):
    """A view of that shape with two values behind each row, and a check that nothing but the view was written."""
    memory = torch.full((*shape[:-1], shape[-1] + 2), 7.0, dtype=dtype)
    view = memory[..., : shape[-1]].fill_(float("nan"))
    return view, lambda: bool((memory[..., shape[-1] :] == 7).all())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    ("rows", "depth", "columns"),
    ((1, 1, 1), (3, 5, 15), (14, 64, 16), (15, 7, 17), (197, 48, 33), (29, 400, 70), (2, 1030, 31), (0, 4, 4), (32, 96, 512)),
)
def test_packed_product(rows, depth, columns, dtype, instructions):
    x = randn(rows, depth + 3, dtype=dtype)[:, :depth]
    weight, bias, residual = (
        randn(*s, dtype=dtype, seed=i) for i, s in enumerate(((columns, depth), (columns,), (rows, columns)), 1)
    )
    packed = CPP.linear_pack(weight)
    assert packed.shape == (-(-columns // PANELS[instructions]), depth, PANELS[instructions])
    assert torch.equal(CPP.linear_unpack(packed, columns).to(dtype), weight)
    assert torch.equal(CPP.linear_pack(weight.t().contiguous().t()), packed)
    for activation in (None, "gelu", "gelu_tanh", "silu"):
        act = {None: lambda t: t, "silu": F.silu}.get(
            activation, lambda t, a=activation: F.gelu(t, approximate="tanh" if "tanh" in a else "none")
        )
        for added in (None, residual):
            out, untouched = framed(rows, columns, dtype=dtype)
            if added is not None:
                out.copy_(added)
                added = out  # in place, as the residual stream is
            CPP.linear_packed_out(x, packed, bias, activation, added, out)
            y, exact = (act(F.linear(*(t.to(d) for t in (x, weight, bias)))) for d in (dtype, torch.float64))
            if added is not None:
                y, exact = y + residual, exact + residual.double()
            assert untouched()
            assert_within_budget(out, y, exact, f"{activation}, residual {added is not None}")


def test_a_run_of_panels_is_a_packed_matrix(instructions):
    panel = PANELS[instructions]
    x, weight = randn(9, 20), randn(3 * panel, 20, seed=1)
    packed = CPP.linear_pack(weight)
    out, whole = torch.empty(9, panel), torch.empty(9, 3 * panel)
    CPP.linear_packed_out(x, packed[1:2], None, None, None, out)
    CPP.linear_packed_out(x, packed, None, None, None, whole)
    assert torch.equal(out, whole[:, panel : 2 * panel])


def test_a_matrix_packed_for_another_set_is_refused(instructions):
    packed, out = torch.empty(1, 4, 64), torch.empty(2, 4)
    with pytest.raises(RuntimeError, match="linear_packed_out: packed"):
        CPP.linear_packed_out(torch.empty(2, 4), packed, None, None, None, out)
    for name, panel in PANELS.items():
        if name != instructions:
            with pytest.raises(RuntimeError, match=f"{name}.*{instructions}|{instructions}.*{name}"):
                CPP.linear_packed_out(torch.empty(2, 4), torch.empty(1, 4, panel), None, None, None, out)


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (dict(x=torch.empty(2, 5)), "linear_packed_out: "),
        (dict(bias=torch.empty(5)), r"bias must be \[4\]"),
        (dict(residual=torch.empty(2, 5)), r"residual must be \[2, 4\]"),
        (dict(activation="relu"), "activation must be 'gelu', 'gelu_tanh' or 'silu', got 'relu'"),
        (dict(x=torch.empty(2, 4, dtype=torch.float16)), "x must be"),
        (dict(out=torch.empty(4).expand(2, 4)), "none in two places"),
    ),
)
def test_refusals(change, message):
    given = dict(
        x=torch.empty(2, 4),
        packed=CPP.linear_pack(torch.empty(4, 4)),
        bias=None,
        activation=None,
        residual=None,
        out=torch.empty(2, 4),
    )
    with pytest.raises(RuntimeError, match=message):
        CPP.linear_packed_out(*(given | change).values())


def test_the_input_is_no_output():
    x = torch.empty(2, 4)
    with pytest.raises(RuntimeError, match="x must not share memory with out"):
        CPP.linear_packed_out(x, CPP.linear_pack(torch.empty(4, 4)), None, None, None, x)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("columns", (1, 15, 33, 768))
def test_layer_norm(columns, dtype):
    x, weight, bias = (
        randn(2, 5, columns, dtype=dtype),
        randn(columns, dtype=dtype, seed=1),
        randn(columns, dtype=dtype, seed=2),
    )
    for w, b in ((None, None), (weight, bias), (weight, None)):
        y, exact = (
            F.layer_norm(x.to(d), (columns,), None if w is None else w.to(d), None if b is None else b.to(d), 1e-6)
            for d in (dtype, torch.float64)
        )
        out, untouched = framed(2, 5, columns, dtype=dtype)
        CPP.layer_norm_out(x, w, b, 1e-6, out)
        assert_within_budget(out, y, exact)
        assert untouched()
        in_place = x.clone()
        CPP.layer_norm_out(in_place, w, b, 1e-6, in_place)
        assert torch.equal(in_place, out)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("probs", ("none", "all", "class_token", "head_mean"))
def test_attention(probs, dtype):
    qkv = randn(2, 19, 3, 3, 12, dtype=dtype)
    expected, _, probabilities = CPP.attention_fwd(qkv, 0.3, 0.0, None, probs)
    out, untouched = framed(2, 19, 36, dtype=dtype)
    given = None if probs == "none" else torch.full_like(probabilities, float("nan"))
    CPP.attention_out(qkv, 0.3, probs, out, given)
    assert torch.equal(out, expected) and untouched()
    assert probs == "none" or torch.equal(given, probabilities)
    with pytest.raises(RuntimeError, match="probabilities must come with probs other than none"):
        CPP.attention_out(qkv, 0.3, probs, out, torch.empty(1) if given is None else None)


@pytest.mark.parametrize("source", (torch.float32, torch.bfloat16, torch.uint8), ids=str)
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), ids=("NCHW", "NHWC"))
def test_patch_embed(source, layout):
    values = torch.randint(256, (2, 3, 13, 17)).to(source) if source == torch.uint8 else randn(2, 3, 13, 17, dtype=source)
    images = values.contiguous(memory_format=layout)
    dtype = torch.bfloat16 if source == torch.bfloat16 else torch.float32
    scale = 1 / 255 if source == torch.uint8 else 1
    weight, bias, positions = (randn(*s, dtype=dtype, seed=i) for i, s in enumerate(((20, 3, 4, 5), (20,), (9, 20)), 1))
    weight = weight * scale
    memory = torch.full((2, 10, 20), 7.0, dtype=dtype)
    CPP.patch_embed_out(images, CPP.linear_pack(weight.flatten(1)), bias, positions, 4, 5, memory[:, 1:])
    assert bool((memory[:, 0] == 7).all())

    def formula(d):
        return F.conv2d(images.to(d), weight.to(d), bias.to(d), stride=(4, 5)).flatten(2).transpose(1, 2) + positions.to(d)

    assert_within_budget(memory[:, 1:], formula(dtype), formula(torch.float64))
