"""The hybrid's backbone: the original's numbers, Google's numbers, and the grid that both end in."""

import google_files
import numpy as np
import oracle
import pytest
import torch

from vit_fast import checkpoints
from vit_fast.resnet import PreActBottleneck, ResNetV2, StdConv2d, conv1x1, conv3x3
from vit_fast.testing import assert_within_budget, randn

UNITS = (2, 1, 1)
PREFIX = "transformer.embeddings.hybrid_model."


def build(impl="original", units=UNITS, width_factor=0.5, seed=0):
    torch.manual_seed(seed)
    net = ResNetV2(units, width_factor, impl=impl)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


def expected(net, x, dtype, units=UNITS):
    state = {PREFIX + name: t.detach().to(dtype) for name, t in net.state_dict().items()}
    return oracle.backbone(x.to(dtype), state, units)


def test_state_dict_keys_are_the_originals():
    keys = {"root.conv.weight", "root.gn.weight", "root.gn.bias"}
    for block, count in enumerate((3, 4, 9), 1):
        for unit in range(1, count + 1):
            name = f"body.block{block}.unit{unit}."
            for i in (1, 2, 3):
                keys |= {f"{name}conv{i}.weight", f"{name}gn{i}.weight", f"{name}gn{i}.bias"}
            if unit == 1:
                keys |= {f"{name}downsample.weight", f"{name}gn_proj.weight", f"{name}gn_proj.bias"}
    with torch.device("meta"):
        for impl in ("original", "google"):
            net = ResNetV2((3, 4, 9), 1, impl=impl)
            assert set(net.state_dict()) == keys
            assert net.width == 64 and net.out_channels == 1024
    assert net.state_dict()["body.block3.unit9.conv2.weight"].shape == (256, 256, 3, 3)


@pytest.mark.parametrize("size", [(32, 32), (37, 50)])
def test_the_originals_numbers(size, device):
    net, x = build().to(device), randn(2, 3, *size, device=device)
    assert_within_budget(net(x), expected(net, x, torch.float32), expected(net, x, torch.float64), "features")


def test_gradients_are_the_originals():
    net, x = build(), randn(1, 3, 32, 32)
    net(x).square().sum().backward()

    def gradients(dtype):
        state = {PREFIX + n: t.detach().to(dtype).requires_grad_() for n, t in net.state_dict().items()}
        return torch.autograd.grad(oracle.backbone(x.to(dtype), state, UNITS).square().sum(), list(state.values()))

    actual = [p.grad for p in net.parameters()]
    assert_within_budget(actual, gradients(torch.float32), gradients(torch.float64), "gradient")


@pytest.mark.parametrize("size", [(32, 32), (45, 34), (51, 64)])
def test_googles_numbers(size):
    """Against numpy in Google's layout: SAME padding on odd and even sizes, groups, ε, and the standardisation's own ε."""
    arrays = google_files.google_arrays(backbone=(UNITS, 32), seed=1)
    net = ResNetV2(UNITS, 0.5, impl="google").double()
    state = checkpoints.from_google(arrays)
    net.load_state_dict({name.removeprefix(PREFIX): t for name, t in state.items() if name.startswith(PREFIX)})
    x = randn(2, 3, *size, dtype=torch.float64)
    features = google_files.google_features(arrays, x.permute(0, 2, 3, 1).numpy())
    np.testing.assert_allclose(net(x).permute(0, 2, 3, 1).detach().numpy(), features, rtol=1e-9, atol=1e-10)


def test_the_two_networks_differ():
    original, google = build(), build("google")
    google.load_state_dict(original.state_dict())
    x = randn(1, 3, 64, 64, seed=3)
    assert (original(x) - google(x)).abs().max() > 0.05


def test_the_standardisations():
    """A filter of nearly no variance shows where ε stands."""
    conv = conv3x3(1, 2)
    with torch.no_grad():
        conv.weight.copy_(randn(2, 1, 3, 3) * 1e-3)
    w = conv.weight.detach().double()
    centred = w - w.mean((1, 2, 3), keepdim=True)
    variance = centred.square().mean((1, 2, 3), keepdim=True)
    for impl, scale in (("original", (variance + 1e-5).sqrt()), ("google", variance.sqrt() + 1e-5)):
        conv.impl = impl
        torch.testing.assert_close(conv.standardised_weight().double(), centred / scale, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["original", "google"])
def test_output_grid_is_the_networks(impl):
    net = build(impl, units=(1, 1, 1))
    for height, width in ((16, 17), (5, 6), (31, 33), (48, 47), (64, 20), (7, 100), (65, 81)):
        assert net.output_grid(height, width) == tuple(net(torch.zeros(2, 3, height, width)).shape[2:]), (height, width)
    assert net.output_grid(224, 384) == (14, 24)
    with pytest.raises(ValueError, match="ResNetV2: the image's width must be at least"):
        net.output_grid(224, 0)


def test_the_smallest_image_of_the_original():
    net = build(units=(1, 1, 1))
    with pytest.raises(ValueError, match="the image's height must be at least 5 pixels, got 4"):
        net.output_grid(4, 32)
    with pytest.raises(RuntimeError):
        net(torch.zeros(2, 3, 4, 32))


@pytest.mark.parametrize("units, channels, grid", [((2,), 128, (16, 12)), ((1, 1, 1, 1), 1024, (2, 2)), ((), 32, (16, 12))])
def test_other_depths(units, channels, grid):
    net = build("google", units=units)
    assert net.out_channels == channels and net.output_grid(64, 48) == grid
    assert net(torch.zeros(2, 3, 64, 48)).shape == (2, channels, *grid)


def test_refused_settings():
    with pytest.raises(ValueError, match="ResNetV2: impl must be one of 'original', 'google', got 'timm'"):
        ResNetV2((1, 1, 1), 1, impl="timm")
    with pytest.raises(ValueError, match="multiple of 32, got 48"):
        ResNetV2((1, 1, 1), 0.75)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype, device):
    net, x = build().to(device), randn(2, 3, 40, 40, device=device)
    reference, exact = expected(net, x, dtype), expected(net, x, torch.float64)
    with torch.autocast(x.device.type, dtype):
        mixed = net(x)
    assert_within_budget(mixed, reference, exact, "under autocast", dtype=dtype)
    half = net.to(dtype)(x.to(dtype))
    assert half.dtype == dtype
    assert_within_budget(half, reference, exact, "in half precision")


def test_googles_numbers_in_half_precision():
    arrays = google_files.google_arrays(backbone=(UNITS, 32), seed=1)
    state = {n.removeprefix(PREFIX): t for n, t in checkpoints.from_google(arrays).items() if n.startswith(PREFIX)}
    net, x = ResNetV2(UNITS, 0.5, impl="google"), randn(2, 3, 40, 40)
    net.load_state_dict(state)
    images = x.permute(0, 2, 3, 1).numpy()
    reference, exact = (
        torch.from_numpy(google_files.google_features(arrays, images, dtype)).permute(0, 3, 1, 2)
        for dtype in (np.float16, np.float64)
    )
    assert_within_budget(net.half()(x.half()), reference, exact, "features")


def test_half_precision_weights_are_standardised_in_float32():
    conv = StdConv2d(512, 4, 3).half()
    with torch.no_grad():
        conv.weight.add_(2.0)  # the mean is far from zero: float16 statistics would lose the variance
    w = conv.weight.detach().double()
    exact = (w - w.mean((1, 2, 3), keepdim=True)) / (w.var((1, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
    actual = conv.standardised_weight()
    assert actual.dtype == torch.float16
    assert ((actual.double() - exact).abs() <= torch.finfo(torch.float16).eps * exact.abs() + 2e-4).all()


@pytest.mark.parametrize("impl", ["original", "google"])
def test_compiles_whole(impl):
    torch._dynamo.reset()
    net, x = build(impl, units=(1, 1)), randn(2, 3, 37, 32)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), net(x))


def test_channels_last_and_empty_batch():
    net, x = build("google"), randn(2, 3, 33, 40)
    torch.testing.assert_close(net(x.to(memory_format=torch.channels_last)), net(x), rtol=1e-4, atol=1e-4)
    assert build(units=(1,))(torch.empty(0, 3, 32, 32)).shape == (0, 128, 7, 7)


def test_hooks_see_what_a_layer_gave():
    """No layer after it changes a layer's output in place."""
    unit, seen = PreActBottleneck(64, 64, 32), {}
    for name in ("gn1", "gn2", "gn3"):
        unit.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: seen.__setitem__(name, out))
    unit(randn(2, 64, 8, 8))
    assert all((out < 0).any() for out in seen.values()) and len(seen) == 3


def test_units_without_and_with_projection():
    assert not hasattr(PreActBottleneck(64, 64, 32), "downsample")
    assert PreActBottleneck(64, cmid=32, stride=2).gn_proj.num_groups == 64
    assert PreActBottleneck(64, 128).gn_proj.eps == 1e-5
    google = PreActBottleneck(64, 128, impl="google").gn_proj
    assert (google.num_groups, google.eps) == (32, 1e-6)
    assert PreActBottleneck(64, 256).conv1.out_channels == 64  # a quarter of cout
    assert conv1x1(4, 8, stride=2).stride == (2, 2) and conv3x3(4, 4, groups=2).groups == 2


def test_load_from_of_a_unit():
    arrays = google_files.google_arrays(backbone=(UNITS, 32), seed=2)
    net = build()
    for b, block in net.body.named_children():
        for u, unit in block.named_children():
            unit.load_from(arrays, n_block=b, n_unit=u)
    unit = net.body.block2.unit1
    assert np.array_equal(unit.conv2.weight.detach().numpy(), arrays["block2/unit1/conv2/kernel"].transpose(3, 2, 0, 1))
    projection = arrays["block2/unit1/conv_proj/kernel"].transpose(3, 2, 0, 1)
    assert np.array_equal(unit.downsample.weight.detach().numpy(), projection)
    assert np.array_equal(unit.gn_proj.bias.detach().numpy(), arrays["block2/unit1/gn_proj/bias"].reshape(-1))

    before = {name: t.clone() for name, t in unit.state_dict().items()}
    del arrays["block2/unit1/conv1/kernel"], arrays["block2/unit1/gn3/bias"]
    with pytest.raises(checkpoints.CheckpointError, match=r"block2/unit1/… do not fit the PreActBottleneck") as error:
        unit.load_from(arrays, "block2", "unit1")
    assert "missing: conv1.weight" in str(error.value) and "missing: gn3.bias" in str(error.value)
    assert all(torch.equal(before[name], t) for name, t in unit.state_dict().items())
