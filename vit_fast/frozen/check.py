"""Whether a frozen model gives what its source gives, within the project's error budget (`vit_fast.testing`)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vit_fast.frozen.description import Description, Outputs, forward_reference
from vit_fast.testing import Error, error

if TYPE_CHECKING:
    from vit_fast.frozen.model import Frozen

IMAGES, MORE_IMAGES = 2, 16  # the second where the first break the budget: the largest error of few values varies by chance


def tensors_of(result: Any, name: str = "output") -> dict[str, Tensor]:
    """The tensors in whatever a model returned: a tensor, a tuple, a dict, a `ModelOutput`."""
    if isinstance(result, Tensor):
        return {name: result}
    items = result.items() if isinstance(result, Mapping) else enumerate(result) if isinstance(result, (tuple, list)) else ()
    return {
        key: tensor
        for part, value in items
        for key, tensor in tensors_of(value, str(part) if name == "output" else f"{name}.{part}").items()
    }


@torch.no_grad()
def parity(frozen: Frozen, source: nn.Module, description: Description, images: int = IMAGES) -> dict[str, Error]:
    """The errors of the frozen model on random images, by output of the source.

    Exact is a copy of the source in float64. The budget comes from the error of the formula in `description`, step by step in
    the frozen model's dtype.
    """
    a, device, dtype = frozen.architecture, frozen.device, frozen.dtype
    generator = torch.Generator().manual_seed(0)
    shape = (images, a.channels, *a.image_size)
    if frozen.normalisation is None:
        given = torch.randn(shape, generator=generator).to(device, dtype)
        normalised = given.double() if device.type != "mps" else given.cpu().double()
    else:
        given = torch.randint(256, shape, generator=generator, dtype=torch.uint8).to(device)
        mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in frozen.normalisation.values)
        normalised = ((given.cpu().double() / 255 - mean) / std).to("cpu" if device.type == "mps" else device)
    family = frozen.family
    request = family.request(a, given)

    exact = copy.deepcopy(source).to(normalised.device).double()(normalised)
    reference = forward_reference(description.to(dtype), normalised.to(device, dtype), Outputs.parse(request.outputs, a))
    actual = frozen(given, outputs=request.outputs)
    exact, reference, actual = (tensors_of(result) for result in (exact, request.wrap(reference), request.wrap(actual)))
    return {name: error(actual[name], reference[name], exact[name]) for name in actual}
