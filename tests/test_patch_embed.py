"""patch_embed: forward and every gradient, implementation × dtype × layout of the images, against the reference in float64."""

import pytest
import torch
from hardware import GPU

from vit_fast import backends
from vit_fast.kernels import patch_embed as kernels
from vit_fast.kernels.common import TARGETS, Target
from vit_fast.ops.patch_embed import patch_embed, patch_embed_reference
from vit_fast.testing import assert_within_budget, randn, with_gradients

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

HALVES = [torch.float16, torch.bfloat16]
ON = [("reference", torch.float64), ("torch", torch.float64)] + [
    (name, dtype) for name in ("reference", "torch", "triton") for dtype in (torch.float32, *HALVES)
]
MEAN, STD = (0.485, 0.456, 0.406, 0.5, 0.3), (0.229, 0.224, 0.225, 0.5, 0.1)


@pytest.fixture(autouse=True)
def one_multiprocessor(monkeypatch):
    """In the interpreter: so that small shapes, too, fill the device and cut the weight's gradient into shares."""
    if not GPU:
        monkeypatch.setattr(kernels, "target_of", lambda device: Target("cuda", 80, 1, 163 * 1024))


def draw_images(shape, kind, device):
    """Images of a dtype, or bytes; every value of a byte occurs where there is room."""
    if kind == torch.uint8:
        return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1), dtype=kind).to(device)
    return randn(*shape, dtype=kind, device=device, seed=1)


def parameters(images, patch, width, dtype, device):
    """weight, bias, cls_token, position_embeddings for these images."""
    tokens = 1 + (images.shape[2] // patch[0]) * (images.shape[3] // patch[1])
    shapes = (width, images.shape[1], *patch), (width,), (1, 1, width), (1, tokens, width)
    return [randn(*shape, dtype=dtype, device=device, seed=seed) for seed, shape in enumerate(shapes, 2)]


def check(implementation, tensors, normalised=False):
    """Output and gradients of an implementation, against the reference's in the same dtype and in float64."""
    channels = tensors[0].shape[1]
    mean, std = (MEAN[:channels], STD[:channels]) if normalised else (None, None)

    def of(name, tensors):
        with backends.use(name):
            return with_gradients(lambda *tensors: patch_embed(*tensors, mean, std), tensors)

    exact = of("reference", [t.double() if t.is_floating_point() else t for t in tensors])
    results = of(implementation, tensors), of("reference", tensors), exact
    for what, actual, reference, exact in zip(("outputs", "gradients"), *results, strict=True):
        for i, (a, r, e) in enumerate(zip(actual, reference, exact, strict=True)):
            assert (a is None) == (r is None)
            if a is not None:
                assert a.dtype == r.dtype
                # What exact is computed in has no exact values to be held to: float64 gets a rounding step of float32.
                step = torch.float32 if a.dtype == torch.float64 else a.dtype
                assert_within_budget(a, r, e, f"{what}[{i}]", dtype=step)


# images, patch, width: one pixel; the hybrid's 1×1 patches; a rest in both directions, patches and grids that are not square;
# P = 14; more rows and columns than one tile; enough patches for two shares of the weight's gradient; N = 197.
SHAPES = [
    ((1, 1, 1, 1), (1, 1), 1),
    ((2, 37, 5, 7), (1, 1), 24),
    ((2, 3, 37, 50), (16, 8), 40),
    ((3, 3, 28, 42), (14, 14), 17),
    ((2, 5, 36, 24), (4, 3), 136),
    ((5, 3, 24, 30), (2, 3), 24),
    ((1, 3, 56, 56), (4, 4), 12),
]
REAL = [
    ((8, 3, 224, 224), (16, 16), 768),
    ((8, 3, 224, 224), (16, 16), 192),
    ((4, 3, 224, 224), (14, 14), 1280),
    ((2, 3, 224, 224), (14, 14), 1408),
    ((4, 3, 384, 384), (32, 32), 1024),
    ((4, 1024, 14, 14), (1, 1), 768),
    ((1, 3, 224, 224), (16, 16), 768),
] * GPU


@pytest.mark.parametrize("implementation, dtype", ON)
@pytest.mark.parametrize("shape, patch, width", SHAPES + REAL)
def test_forward_and_gradients(implementation, dtype, shape, patch, width, device):
    images = draw_images(shape, dtype, device)
    check(implementation, (images, *parameters(images, patch, width, dtype, device)))


LAYOUTS = {
    "contiguous": lambda images: images,
    "channels_last": lambda images: images.contiguous(memory_format=torch.channels_last),
    "planes first": lambda images: images.transpose(0, 1).contiguous().transpose(0, 1),
    "transposed": lambda images: images.transpose(2, 3).contiguous().transpose(2, 3),
    "window": lambda images: torch.nn.functional.pad(images, (3, 5, 2, 4))[:, :, 2:-4, 3:-5],
    "some channels of channels_last": lambda images: LAYOUTS["channels_last"](images.repeat(1, 2, 1, 1))[:, 1:4],
    "expanded": lambda images: images[:1].expand(images.shape),
    "every other pixel": lambda images: images.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, ::2, ::2],
}
KINDS = [
    (torch.float32, torch.float32, False),
    (torch.bfloat16, torch.bfloat16, False),
    (torch.uint8, torch.float32, True),
    (torch.uint8, torch.float16, True),
    (torch.uint8, torch.bfloat16, True),
    (torch.float32, torch.float32, True),
    (torch.float32, torch.bfloat16, True),
]


@pytest.mark.parametrize("kind, dtype, normalised", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_normalisation(layout, kind, dtype, normalised, device):
    images = LAYOUTS[layout](draw_images((2, 3, 19, 26), kind, device))
    check("triton", (images, *parameters(images, (6, 4), 24, dtype, device)), normalised)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_every_byte(implementation, channels, device):
    """All 256 values of a byte in each channel, against the formula."""
    images = torch.arange(256, dtype=torch.uint8, device=device).view(1, 1, 16, 16).expand(2, channels, 16, 16)
    check(implementation, (images, *parameters(images, (16, 4), 24, torch.float32, device)), normalised=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_by_one_patches(layout, dtype, device):
    """The hybrid's: planes, where threads walk along the patches, and pixels, whose channels lie side by side."""
    images = LAYOUTS[layout](draw_images((3, 70, 7, 5), dtype, device))
    check("triton", (images, *parameters(images, (1, 1), 24, dtype, device)))


@pytest.mark.parametrize("implementation, dtype", ON)
@pytest.mark.parametrize("values", ["equal", "zeros", "large", "tiny", "cancelling"])
def test_extreme_values(implementation, dtype, values, device):
    images = draw_images((2, 3, 12, 12), torch.float64, device)
    weight, bias, cls_token, position = parameters(images, (4, 4), 24, torch.float64, device)
    if values == "cancelling":  # the product's sum is far smaller than its terms
        images, weight = images.abs() * 30, weight - weight.mean((1, 2, 3), keepdim=True)
    else:
        images = {"equal": images * 0 + 3, "zeros": images * 0, "large": images * 1e3, "tiny": images * 1e-4}[values]
    check(implementation, [t.to(dtype) for t in (images, weight, bias, cls_token, position)])


@pytest.mark.parametrize("normalised", [False, True])
def test_class_row_is_no_product(normalised, device):
    """Token 0 is the class token and its position, exactly, whatever the weight holds."""
    images = draw_images((2, 3, 8, 8), torch.uint8 if normalised else torch.float32, device)
    weight, bias, cls_token, position = parameters(images, (4, 4), 24, torch.float32, device)
    mean, std = (MEAN[:3], STD[:3]) if normalised else (None, None)
    with backends.use("triton"):
        out = patch_embed(images, weight * float("inf"), bias, cls_token, position, mean, std)
    assert torch.equal(out[:, :1], (cls_token + position[:, :1]).expand(2, 1, 24))
    assert not out[:, 1:].isfinite().any()


@pytest.mark.parametrize("implementation", ["reference", "torch", "triton"])
def test_empty_batch(implementation, device):
    images = draw_images((0, 3, 8, 8), torch.float32, device)
    with backends.use(implementation):
        outputs, gradients = with_gradients(patch_embed, (images, *parameters(images, (4, 4), 24, torch.float32, device)))
    assert outputs[0].shape == (0, 5, 24)
    assert [g.shape for g in gradients] == [(0, 3, 8, 8), (24, 3, 4, 4), (24,), (1, 1, 24), (1, 5, 24)]
    assert not any(g.any() for g in gradients[1:])


def test_channels_last_weight(device):
    """A model in channels_last: neither its images nor its weight are copied."""
    images = LAYOUTS["channels_last"](draw_images((2, 3, 8, 12), torch.float32, device))
    weight, *rest = parameters(images, (4, 4), 24, torch.float32, device)
    check("triton", (images, weight.contiguous(memory_format=torch.channels_last), *rest))


@pytest.mark.parametrize("cotangent", [lambda out: out.sum(), lambda out: out.transpose(1, 2).flatten(1).square().sum()])
def test_strided_gradients(cotangent, device):
    images = draw_images((2, 3, 8, 12), torch.float32, device)
    tensors = images, *parameters(images, (4, 4), 24, torch.float32, device)

    def gradients(name, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
        with backends.use(name):
            return torch.autograd.grad(cotangent(patch_embed(*leaves)), leaves)

    exact = gradients("reference", torch.float64)
    assert_within_budget(gradients("triton", torch.float32), gradients("reference", torch.float32), exact)


def test_gradients_share_no_memory(device):
    """The class token's gradient is a row of the position table's: a view would have both clipped twice."""
    images = draw_images((2, 3, 8, 8), torch.float32, device)
    leaves = [t.requires_grad_() for t in parameters(images, (4, 4), 24, torch.float32, device)]
    with backends.use("triton"):
        patch_embed(images, *leaves).sum().backward()
    assert len({leaf.grad.untyped_storage().data_ptr() for leaf in leaves}) == len(leaves)


def test_gradient_is_deterministic(device):
    images = draw_images((5, 3, 24, 30), torch.bfloat16, device)
    tensors = images, *parameters(images, (2, 3), 24, torch.bfloat16, device)
    with backends.use("triton"):
        first, second = (with_gradients(patch_embed, tensors)[1] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("axis", range(4))
def test_pixels_past_2_to_31(axis, device):
    """One axis has a stride of 2**30, so index 2 of it lies 2**31 elements on; 32-bit products point before the image."""
    shape, stride = (3, 3, 4, 4), 2**30
    strides = [48, 16, 4, 1]
    strides[axis] = stride
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # the pages that nobody touches are never committed
    try:
        storage = torch.empty(6 * stride, dtype=torch.uint8, device=device)
    except RuntimeError as error:
        pytest.skip(f"needs {6 * stride} bytes of address space: {error}")
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before
    for wrapped in range(2):
        storage[wrapped * stride : wrapped * stride + 256] = 0
    images = storage.as_strided(shape, strides, 2 * stride)
    drawn = draw_images(shape, torch.uint8, device)
    images.copy_(drawn)
    tensors = parameters(drawn, (2, 2), 24, torch.float32, device)
    normalisation = torch.tensor(MEAN[:3], device=device), torch.tensor(STD[:3], device=device)
    forward, backward = torch.ops.vit_fast.patch_embed_fwd, torch.ops.vit_fast.patch_embed_bwd
    out = forward(images, *tensors, *normalisation)
    assert torch.equal(out, forward(drawn, *tensors, *normalisation))
    dweight = backward(out, images, tensors[0], *normalisation, False)[1]
    assert torch.equal(dweight, backward(out, drawn, tensors[0], *normalisation, False)[1])


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(images=lambda t: t[0]), ValueError, r"patch_embed: images must be \[B, C, H, W\], got \[3, 8, 8\]"),
        (dict(images=lambda t: t.byte()), TypeError, "patch_embed: uint8 images need mean and std, got neither"),
        (dict(images=lambda t: t.int()), TypeError, "patch_embed: images must be floating point, or uint8 .* got int32"),
        (dict(images=lambda t: t.half()), TypeError, "patch_embed: images must be float32 as weight is, got float16"),
        (dict(images=lambda t: t[:, :2]), ValueError, r"patch_embed: weight must be \[24, 2, 4, 4\], got \[24, 3, 4, 4\]"),
        (dict(images=lambda t: t[:, :, :4]), ValueError, r"position_embeddings must be \[1, 3, 24\], got \[1, 5, 24\]"),
        (dict(bias=lambda t: t[:5]), ValueError, r"patch_embed: bias must be \[24\], got \[5\]"),
        (dict(cls_token=lambda t: t[0]), ValueError, r"patch_embed: cls_token must be \[1, 1, 24\], got \[1, 24\]"),
        (dict(bias=lambda t: t.to("meta")), ValueError, "patch_embed: bias must be on .* as weight is, got meta"),
        (dict(mean=lambda t: (0.5,) * 3), ValueError, "patch_embed: mean and std come together"),
        (dict(mean=lambda t: (0.5,) * 2, std=lambda t: (1.0,) * 3), ValueError, r"mean must be \[3\], got \[2\]"),
    ],
)
def test_refused_by_the_operation(change, error, message, device):
    images = draw_images((2, 3, 8, 8), torch.float32, device)
    names = "images", "weight", "bias", "cls_token", "position_embeddings"
    arguments = dict(zip(names, (images, *parameters(images, (4, 4), 24, torch.float32, device)), strict=True))
    for name, function in change.items():
        arguments[name] = function(arguments.get(name))
    with pytest.raises(error, match=message):
        patch_embed(**arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(bias=lambda t: t.repeat_interleave(2)[::2]), "bias with contiguous rows, got strides \\(2,\\)"),
        (dict(position_embeddings=lambda t: t.mT.contiguous().mT), "position_embeddings with contiguous rows"),
        (dict(images=lambda t: t[:, :, :3], position_embeddings=lambda t: t[:, :1]), r"\[3, 8\] hold no patch of \[4, 4\]"),
        (dict(images=lambda t: t.repeat(1, 6, 1, 1), weight=lambda t: t.repeat(1, 6, 1, 1), mean=18, std=18), "at most 16"),
    ],
)
def test_refused_by_the_kernels(change, message, device):
    images = draw_images((2, 3, 8, 8), torch.float32, device)
    names = "images", "weight", "bias", "cls_token", "position_embeddings"
    arguments = dict(zip(names, (images, *parameters(images, (4, 4), 24, torch.float32, device)), strict=True))
    for name, change_it in change.items():
        arguments[name] = (1.0,) * change_it if isinstance(change_it, int) else change_it(arguments[name])
    message = f"patch_embed: implementation 'triton' cannot run: .*{message}"
    with backends.use("triton"), pytest.raises(RuntimeError, match=message):
        patch_embed(**arguments)


@pytest.mark.parametrize("kind", [torch.float32, torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16])
def test_autocast(kind, parameter_dtype, device):
    """As the convolution and the additions of the reference: products in bfloat16, the rest promotes."""
    normalised = kind == torch.uint8
    images = draw_images((2, 3, 12, 8), kind, device)
    tensors = images, *parameters(images, (4, 4), 24, parameter_dtype, device)

    def of(name, tensors, enabled=True):
        def function(*tensors):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled), backends.use(name):
                return patch_embed(*tensors, *((MEAN[:3], STD[:3]) if normalised else ()))

        return with_gradients(function, tensors)

    actual, reference = of("triton", tensors), of("reference", tensors)
    exact = of("reference", [t.double() if t.is_floating_point() else t for t in tensors], enabled=False)
    for a, r, e in zip(actual, reference, exact, strict=True):
        kept = [[t for t in ts if t is not None] for ts in (a, r, e)]
        assert [t.dtype for t in kept[0]] == [t.dtype for t in kept[1]]
        assert_within_budget(*kept, dtype=torch.bfloat16)


@pytest.mark.parametrize("kind, dtype, normalised", KINDS[:3])
def test_opcheck(kind, dtype, normalised, device):
    images = LAYOUTS["channels_last"](draw_images((2, 3, 9, 8), kind, device))
    tensors = parameters(images, (4, 4), 24, dtype, device)
    mean, std = (torch.tensor(t[:3], device=device) if normalised else None for t in (MEAN, STD))
    torch.library.opcheck(torch.ops.vit_fast.patch_embed_fwd.default, (images, *tensors, mean, std))
    mixed = images, tensors[0].bfloat16(), *(t.float() for t in tensors[1:]), mean, std
    torch.library.opcheck(torch.ops.vit_fast.patch_embed_fwd.default, mixed)
    dout = randn(2, 5, 24, dtype=dtype, device=device)
    for wanted in (False, True)[: 1 if kind == torch.uint8 else 2]:
        torch.library.opcheck(torch.ops.vit_fast.patch_embed_bwd.default, (dout, images, tensors[0], mean, std, wanted))


@pytest.mark.parametrize("kind, dtype, normalised", KINDS[:3])
def test_compile_fullgraph(kind, dtype, normalised, device):
    images = draw_images((2, 3, 8, 12), kind, device)
    tensors = images, *parameters(images, (4, 4), 24, dtype, device)
    mean, std = (torch.tensor(t[:3], device=device) if normalised else None for t in (MEAN, STD))

    def function(*tensors):
        return patch_embed(*tensors, mean, std)

    torch._dynamo.reset()
    with backends.use("triton"):
        compiled = torch.compile(function, backend="inductor" if GPU else "aot_eager", fullgraph=True)
        actual, expected = with_gradients(compiled, tensors), with_gradients(function, tensors)
    for a, e in zip((*actual[0], *actual[1]), (*expected[0], *expected[1]), strict=True):
        assert (a is None and e is None) or torch.equal(a, e)


@pytest.mark.skipif(GPU, reason="the kernels take float64 in the interpreter only")
@pytest.mark.parametrize("normalised", [False, True])
def test_gradcheck(normalised, device):
    images = draw_images((2, 2, 5, 4), torch.float64, device)
    tensors = [t.requires_grad_() for t in (images, *parameters(images, (2, 2), 3, torch.float64, device))]
    normalisation = (MEAN[:2], STD[:2]) if normalised else ()
    with backends.use("triton"):
        assert torch.autograd.gradcheck(lambda *t: patch_embed(*t, *normalisation), tensors, fast_mode=True)


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_launch_choices(arch, dtype):
    """Every multiprocessor has a program where the shape allows, and partial sums stay below the size of what they sum over."""
    target = TARGETS[arch]
    for rows, width in ((128 * 197, 768), (64 * 257, 1408), (197, 192), (1, 8)):
        block_m, block_n, *_ = kernels.forward_config(rows, width, 32, dtype, target)
        programs = -(-rows // block_m) * -(-width // block_n)
        most = -(-rows // 32) * -(-width // 32)
        assert programs >= min(target.multiprocessors, most // 4) and block_n < 2 * max(width, 32)
        *_, shares = kernels.backward_config(rows, width, 768, dtype, target)
        assert 1 <= shares <= 2 * target.multiprocessors
        assert shares == 1 or shares * 768 * width * 4 <= 2 * rows * (768 + width) * dtype.itemsize


def test_reference_is_the_convolution(device):
    """One patch by hand: the formula's own check."""
    images = draw_images((1, 2, 2, 2), torch.float64, device)
    weight, bias, cls_token, position = parameters(images, (2, 2), 3, torch.float64, device)
    out = patch_embed_reference(images, weight, bias, cls_token, position, None, None)
    token = (images[0].flatten() * weight.flatten(1)).sum(1) + bias + position[0, 1]
    assert torch.allclose(out[0, 1], token, rtol=1e-12) and torch.equal(out[0, 0], cls_token[0, 0] + position[0, 0])
