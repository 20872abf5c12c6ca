"""Linear layers whose parameters lie side by side in memory, so that one product computes them all.

Attention keeps three layers, query, key and value, because checkpoints, optimizers and users know them by these names. One
product with the three weights stacked is faster than three. Stacking copies, and a cached copy goes stale when a weight changes
in place. So nothing is copied: the layers' parameters *are* the thirds of one block. Whatever writes to them writes to the
block.

The parameters stay ordinary: each has a storage of its own size, so saving, sharing and copying one never drags the others
along. Anything may also replace them (``model.to``, ``load_state_dict(assign=True)``, weight tying, FSDP). `matches` then says
no, and the layers are computed one by one until `pack` is called again.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PackedLinears:
    """The block of memory behind several ``nn.Linear`` of equal input size."""

    def __init__(self):
        self.weight: Tensor | None = None  # [sum of outputs, inputs]
        self.bias: Tensor | None = None  # [sum of outputs]
        self._addresses: tuple[tuple[int, int], ...] = ()  # of each layer's weight and bias

    # A copy of a model has parameters of its own: it packs them itself.
    def __deepcopy__(self, memo):
        return PackedLinears()

    def __reduce__(self):
        return PackedLinears, ()

    @torch.no_grad()
    def pack(self, *linears: nn.Linear) -> None:
        """Move the layers' parameters, which keep their identity, into one block; leaves them alone where that can't be."""
        parameters = [p for linear in linears for p in (linear.weight, linear.bias)]
        if self.matches(*linears) or not all(map(_can_move, parameters)):
            return
        if len({(p.dtype, p.device) for p in parameters}) > 1 or len({linear.in_features for linear in linears}) > 1:
            return
        self.weight = torch.cat([linear.weight for linear in linears])
        self.bias = torch.cat([linear.bias for linear in linears])
        row = 0
        for linear in linears:
            rows = linear.out_features
            linear.weight.data = _with_own_storage(self.weight, row, rows)
            linear.bias.data = _with_own_storage(self.bias, row, rows)
            row += rows
        self._addresses = tuple((linear.weight.data_ptr(), linear.bias.data_ptr()) for linear in linears)

    def matches(self, *linears: nn.Linear) -> bool:
        """Whether the layers' parameters still are the parts of this block."""
        if self.weight is None:
            return False
        for linear, addresses in zip(linears, self._addresses, strict=True):
            weight, bias = linear.weight, linear.bias
            # Transformed tensors (vmap, DTensor, …) have other types, and no address of their own.
            if type(weight) is not nn.Parameter or type(bias) is not nn.Parameter:
                return False
            if weight.data_ptr() != addresses[0] or bias.data_ptr() != addresses[1]:
                return False
            if weight.dtype != self.weight.dtype or not weight.is_contiguous() or bias.dtype != self.bias.dtype:
                return False
        return True

    def parameters(self, *linears: nn.Linear) -> tuple[Tensor, Tensor]:
        """The stacked weight and bias; gradients reach the layers' own parameters. Only while `matches`."""
        weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
        if not torch.is_grad_enabled():
            return self.weight, self.bias
        return _Stacked.apply(self.weight, *weights), _Stacked.apply(self.bias, *biases)


class _Stacked(torch.autograd.Function):
    """torch.cat of tensors that already are the parts of ``block``: no copy forward, views of the gradient backward."""

    @staticmethod
    def forward(block, *parts):
        return block.detach()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])  # never read: unpacking them detects a change in place since the forward pass

    @staticmethod
    def backward(ctx, grad):
        return None, *grad.split([part.shape[0] for part in ctx.saved_tensors])


def _can_move(parameter) -> bool:
    return (
        type(parameter) is nn.Parameter
        and type(parameter.data) is Tensor
        and parameter.layout == torch.strided
        and parameter.device.type != "meta"
        and not (parameter.device.type == "cpu" and parameter.is_shared())  # every CUDA tensor calls itself shared
    )


def _with_own_storage(block: Tensor, row: int, rows: int) -> Tensor:
    """Rows of the block as a tensor whose storage begins and ends with them; it keeps the block's memory alive."""
    part = block[row : row + rows]
    start = part.storage_offset() * part.element_size()
    storage = block.untyped_storage()[start : start + part.numel() * part.element_size()]
    return torch.empty(0, dtype=part.dtype, device=part.device).set_(storage, 0, part.shape, part.stride())
