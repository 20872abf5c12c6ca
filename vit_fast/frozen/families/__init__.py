"""Whose models can be frozen: one module a family, which reads a live model and speaks its calling convention.

A family's module has

``reads(model) -> bool``
    whether the model is of one of its classes; without importing the family's package.
``describe(model) -> Description``
    architecture and weights. `Unsupported` names what the model has that frozen inference doesn't compute.
``request(architecture, *args, **kwargs) -> Request``
    what a call with the source's signature asks for, and how its results are wrapped.

The family's own package is imported inside these functions alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from vit_fast.frozen.description import Unsupported

NAMES = ("vit_fast", "timm", "transformers", "torchvision")  # of the families; their modules are called the same


@dataclass(frozen=True)
class Request:
    """One call: its images, what is to be computed, and how the source would return it."""

    images: Tensor
    outputs: tuple[str, ...]  # names of `description.Outputs`
    wrap: Callable[[Mapping[str, Any]], Any]  # of the results by these names
    any_size: bool = False  # whether this call asks for the position table to be resized


def by_name(name: str) -> ModuleType:
    return importlib.import_module(f"vit_fast.frozen.families.{name}")


def family_of(model: nn.Module) -> ModuleType:
    """The module of the family that the model belongs to; `Unsupported` if it belongs to none."""
    for name in NAMES:
        family = by_name(name)
        if family.reads(model):
            return family
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    raise Unsupported(
        f"freeze: {kind} is not a model that it can read: those of vit_fast, timm's VisionTransformer, transformers' ViT, DeiT,"
        " Dinov2, CLIP and SigLIP vision models and torchvision's VisionTransformer are"
    )


def add(weights: dict[str, Tensor], name: str, module: nn.Module) -> None:
    """A layer's or norm's weight and bias, where it has them, under a name of the description."""
    for part in ("weight", "bias"):
        if (tensor := getattr(module, part, None)) is not None:
            weights[f"{name}.{part}"] = tensor


def stacked(weights: dict[str, Tensor], name: str, layers: Sequence[nn.Linear]) -> None:
    """Several layers of one input as one, such as query, key and value; a missing bias beside others is zeros."""
    weights[name + ".weight"] = torch.cat([layer.weight for layer in layers])
    if any(layer.bias is not None for layer in layers):
        biases = [layer.weight.new_zeros(layer.weight.shape[0]) if layer.bias is None else layer.bias for layer in layers]
        weights[name + ".bias"] = torch.cat(biases)
