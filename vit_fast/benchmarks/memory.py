"""What a forward pass keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def kept_bytes(forward: Callable[[], Tensor], parameters: Iterable[Tensor], device: torch.device) -> int:
    """Bytes of distinct memory that autograd keeps after a forward pass, parameters and their packed copies aside.

    On a GPU what the allocator has given out more than before, which is true of compiled models too; elsewhere what autograd
    is seen to save.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        result = forward()
        kept_there = torch.cuda.memory_allocated(device) - before
        del result
        return kept_there
    ranges = [(p.data_ptr(), p.data_ptr() + p.numel() * p.element_size()) for p in parameters]
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if not any(first <= address < last for first, last in ranges):
            kept[address] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    del result
    return sum(kept.values())
