"""A constant weight in the layout of the product that multiplies by it: out = act(x Wᵀ + b) + residual.

========  ===========================================================================================================
packed    the extension's product on CPUs: the weight in panels, the result into memory that is given
onednn    oneDNN's on CPUs: the weight in the blocks that it chooses
dense     the operation `vit_fast.ops.linear`, by whichever implementation is in force, with the weight as it is
========  ===========================================================================================================
"""

from __future__ import annotations

import torch
from torch import Tensor

from vit_fast import extension, tuning
from vit_fast.backends import OPERATIONS

ROWS = 197  # oneDNN asks how many rows are to be multiplied: those of one image


class Dense:
    """Any device, any dtype."""

    name = "dense"

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight, self.bias = weight, bias

    def __call__(
        self, x: Tensor, activation: str | None = None, residual: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        silu = activation == "silu"
        y = OPERATIONS["linear"](x, self.weight, self.bias, None if silu else activation, residual)
        return torch.ops.aten.silu_(y) if silu else y

    def dense(self) -> tuple[Tensor, Tensor | None]:
        """The weight and bias as they were given."""
        return self.weight, self.bias

    def update(self, weight: Tensor, bias: Tensor | None) -> None:
        """Take other values, in place."""
        self.weight.copy_(weight)
        if self.bias is not None:
            self.bias.copy_(bias)

    def part(self, begin: int, end: int) -> Dense | None:
        """The product for outputs [begin, end) alone, in the same memory; None where there is no such thing."""
        return Dense(self.weight[begin:end], None if self.bias is None else self.bias[begin:end])

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.weight, self.bias) if t is not None]


class OneDnn(Dense):
    """CPUs: float32, and bfloat16 where the processor multiplies it."""

    name = "onednn"
    _ACTIVATIONS = {None: ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "silu": ("swish", "")}

    @staticmethod
    def serves(dtype: torch.dtype) -> bool:
        fits = dtype == torch.float32 or dtype == torch.bfloat16 and tuning.cpu_multiplies_bfloat16()
        return fits and torch.backends.mkldnn.is_available()

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.dtype = weight.dtype
        super().__init__(torch.ops.mkldnn._reorder_linear_weight(weight, ROWS), bias)

    def __call__(self, x, activation=None, residual=None, out=None):
        if residual is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")
        name, algorithm = self._ACTIVATIONS[activation]
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, name, [], algorithm)

    def dense(self):
        return self.weight.to_dense(), self.bias

    def update(self, weight, bias):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        if bias is not None:
            self.bias.copy_(bias)

    def part(self, begin, end):
        """In memory of its own: the blocks can't be cut."""
        bias = None if self.bias is None else self.bias[begin:end]
        return OneDnn(self.weight.to_dense()[begin:end].contiguous(), bias)


class Packed(Dense):
    """CPUs with the extension: float32 and bfloat16 operands, multiplied in float32."""

    name = "packed"

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.columns = weight.shape[0]
        self.dtype = weight.dtype
        super().__init__(torch.ops.vit_fast_cpp.linear_pack(weight), bias)

    def __call__(self, x, activation=None, residual=None, out=None):
        if out is None:
            out = x.new_empty((*x.shape[:-1], self.columns))
        torch.ops.vit_fast_cpp.linear_packed_out(x, self.weight, self.bias, activation, residual, out)
        return out

    def dense(self):
        return torch.ops.vit_fast_cpp.linear_unpack(self.weight, self.columns).to(self.dtype), self.bias

    def update(self, weight, bias):
        super().update(torch.ops.vit_fast_cpp.linear_pack(weight), bias)

    def part(self, begin, end):
        panel = self.weight.shape[2]
        if begin % panel or end % panel:
            return None
        part = Packed.__new__(Packed)
        part.columns, part.dtype = end - begin, self.dtype
        part.weight = self.weight[begin // panel : end // panel]
        part.bias = None if self.bias is None else self.bias[begin:end]
        return part


def best_for(device: torch.device, dtype: torch.dtype) -> type[Dense]:
    """The kind of product to prepare weights for.

    B/16, float32, the whole model with packed and oneDNN's products in one run: 95.5 and 79.1 ms at batch 1, 642 and 628 ms at
    batch 8 (AMD EPYC (Zen 5), 2 threads, torch 2.13, 2026-11-25).
    """
    if device.type != "cpu":
        return Dense
    if OneDnn.serves(dtype):
        return OneDnn
    if dtype in extension.DTYPES["cpu"] and extension.missing("cpu") is None:
        return Packed
    return Dense
