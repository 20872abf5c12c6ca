"""What every operation refuses before anything is computed: mixed devices and dtypes, and shapes that do not fit.

The messages say who, what was needed, and what came: ``layer_norm: weight must be [768], got [512]``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_shape(op: str, name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """ValueError unless the tensor's shape is exactly ``expected``."""
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{op}: {name} must be {list(expected)}, got {list(tensor.shape)}")


def check_tensors(op: str, first: tuple[str, Tensor], *others: tuple[str, Tensor | None], dtypes: bool = True) -> None:
    """The others must be on the first one's device and, outside autocast, of its dtype, which must be floating point.

    ValueError for a device, TypeError for a dtype. Under autocast the operation casts, as its stock counterpart does.
    """
    name, tensor = first
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: {name} must be floating point, got {dtype_name(tensor.dtype)}")
    for other_name, other in others:
        if other is None:
            continue
        if other.device != tensor.device:
            raise ValueError(f"{op}: {other_name} must be on {tensor.device} as {name} is, got {other.device}")
        if dtypes and other.dtype != tensor.dtype and not torch.is_autocast_enabled(tensor.device.type):
            raise TypeError(
                f"{op}: {other_name} must be {dtype_name(tensor.dtype)} as {name} is, got {dtype_name(other.dtype)}"
                " (convert one, or use torch.autocast)"
            )


def refuses_rows(name: str, tensor: Tensor | None) -> str | None:
    """Why a kernel that takes rows with one stride between them, and contiguous within, can't take this; None when it can."""
    if tensor is None or tensor.is_contiguous():
        return None
    stride = None  # that the next axis must have, outwards
    for size, step in zip(reversed(tensor.shape[:-1]), reversed(tensor.stride()[:-1]), strict=True):
        if size != 1:
            if stride not in (None, step):
                return f"{name}'s leading axes must flatten to one, got shape {list(tensor.shape)}, strides {tensor.stride()}"
            stride = size * step
    if tensor.stride(-1) != 1:
        return f"{name}'s last axis must be contiguous, got strides {tensor.stride()}"
    return None
