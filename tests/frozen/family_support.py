"""What the tests of the families share: packages that may be missing, random weights, and the comparison with the source."""

import importlib
import os

import pytest
import torch
from torch import nn

from vit_fast.frozen import families
from vit_fast.frozen.description import Architecture, Outputs, Unsupported, forward_reference

REQUIRED = [name for name in os.environ.get("VIT_FAST_REQUIRE_FAMILIES", "").split(",") if name]


def package(name):
    """The package, or a skip of the tests of its family: an error where VIT_FAST_REQUIRE_FAMILIES has it."""
    if name in REQUIRED:
        return importlib.import_module(name)
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision where its operators don't fit this torch
        pytest.skip(f"{name} can't be imported here: {error}", allow_module_level=True)


def randomized(model, seed=0):
    """In eval mode and float64, with no parameter that is zeros or ones: those hide that a part is left out or misplaced."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.double().named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            # Weights of layers of the size that keeps their outputs near 1; attention that prefers some tokens to others.
            scale = p.shape[1:].numel() ** -0.5 if p.dim() > 1 and p.shape[0] > 1 else 0.5
            p.copy_(noise * scale + (1.0 if isinstance(_owner(model, name), nn.LayerNorm) and name.endswith("weight") else 0.0))
    return model.eval()


def _owner(model, name):
    return model.get_submodule(name.rpartition(".")[0])


def images(*size, seed=1):
    return torch.randn(2, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def described(model):
    """What the model's family reads of it. Its weights stay the model's, and its architecture survives a file."""
    before = {name: t.clone() for name, t in model.state_dict().items()}
    description = families.family_of(model).describe(model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    a = description.architecture
    assert Architecture.from_json(a.to_json()) == a
    return description


def called(description, *args, **kwargs):
    """As a call of the source would be answered, by the formula of the description."""
    a = description.architecture
    request = families.by_name(a.family).request(a, *args, **kwargs)
    grid = a.grid_for(*request.images.shape[2:])
    assert grid == a.grid or a.any_size or request.any_size, "the source isn't asked for another image size"
    with torch.no_grad():
        return request.wrap(forward_reference(description, request.images, Outputs.parse(request.outputs, a)))


def source(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs)


def assert_close(got, expected, tolerance=1e-10):
    """Of tensors, tuples of them and None: the same structure, and values within the tolerance of the largest one."""
    assert type(got) is type(expected)
    if isinstance(expected, tuple):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_close(one, other, tolerance)
    elif expected is not None:
        assert got.shape == expected.shape and got.dtype == expected.dtype
        assert torch.isfinite(expected).all() and expected.std() > 1e-3, "the source's own output says nothing"
        assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def refused(model):
    """The message with which the model is refused."""
    with pytest.raises(Unsupported, match="^freeze: ") as caught:
        families.family_of(model).describe(model)
    return str(caught.value)
