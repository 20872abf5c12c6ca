r"""Weights made ready for inference: what is constant is multiplied into them once, in float64, and rounded once.

Each step is exact in real arithmetic:

====================  =============================================================================================
norm → next product   W' = W · diag(γ), b' = b + W β; what is left of LayerNorm is (x - mean) · rstd
LayerScale            W' = diag(s) · W, b' = s ⊙ b, in the product before it
bytes, mean, std      E' = E / (255 · std), b' = b - Σ E · mean / std, so that patches of raw bytes are multiplied
quick GELU            x·σ(1.702 x) = silu(1.702 x) / 1.702: the factors go into fc1 and fc2
attention pooling     the one query is constant: q Kᵀ/√d = x (W_kᵀ q)ᵀ/√d, so keys are never computed; their bias shifts all
                      scores of a head alike, which softmax takes out; and P (x W_vᵀ) = (P x) W_vᵀ
distillation          two heads' mean is one head over both tokens (the family's description has it so already)
====================  =============================================================================================

The softmax scale stays with the attention kernels, which have it in the exponent's base for nothing; biases stay in the
products' epilogues, for the same reason. In float16 norms are not folded: W · diag(γ) can leave its range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vit_fast.frozen.description import Architecture, Description


@dataclass(frozen=True)
class Normalisation:
    """(byte / 255 - mean) / std, per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def values(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return self.mean, self.std


@dataclass
class Folded:
    """What the engine computes with: dense weights by the names of `description`, some gone, some new.

    New are ``pool.scores`` [h, D] in place of the pool's probe, query and key, and ``pool.value.weight`` and ``.bias`` for
    its values.
    """

    architecture: Architecture
    weights: dict[str, Tensor]
    activation: str  # "gelu", "gelu_tanh" or "silu"
    done: list[str] = field(default_factory=list)  # for people


class _Weights:
    """The description's tensors: each is taken once, as float64."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.left = dict(tensors)
        device = next(iter(tensors.values())).device
        self.device = torch.device("cpu") if device.type == "mps" else device  # Apple's GPUs have no float64

    def take(self, name: str) -> Tensor | None:
        """A copy, to compute in."""
        tensor = self.left.pop(name, None)
        return None if tensor is None else tensor.detach().to(self.device, torch.float64, copy=True)


@torch.no_grad()
def fold(
    description: Description, dtype: torch.dtype, normalisation: Normalisation | None = None, unit: float = 255.0
) -> Folded:
    """The description's weights folded, in ``dtype``; its own tensors are left as they are.

    :param unit: what the folded weight divides bytes by, besides std: 255, or 1 where the kernel has done it already.
    """
    a, w = description.architecture, _Weights(description.weights)
    device = next(iter(description.weights.values())).device
    folds_norms = dtype != torch.float16
    quick = a.activation == "quick_gelu"
    scaled = any(name.endswith((".scale1", ".scale2")) for name in w.left)
    folded: dict[str, Tensor] = {}

    def put(name: str, tensor: Tensor | None) -> None:
        if tensor is not None:
            folded[name] = tensor.to(device, dtype).contiguous()

    def product(name: str, norm: str | None = None, of_weight: Tensor | float = 1.0, of_bias: Tensor | float = 1.0) -> None:
        """A product with the norm before it, and with factors, a number or one for each output."""
        weight, bias = w.take(name + ".weight"), w.take(name + ".bias")
        if norm is not None and folds_norms:
            gamma, beta = w.take(norm + ".weight"), w.take(norm + ".bias")
            if beta is not None:
                bias = weight @ beta + (0 if bias is None else bias)
            if gamma is not None:
                weight.mul_(gamma)
        if not isinstance(of_weight, float) or of_weight != 1.0:
            weight.mul_(of_weight[:, None] if isinstance(of_weight, Tensor) else of_weight)
        put(name + ".weight", weight)
        put(name + ".bias", None if bias is None else bias * of_bias)

    def mlp(prefix: str, norm: str, scale: Tensor | float = 1.0) -> None:
        factor = 1.702 if quick else 1.0
        product(prefix + "fc1", norm, factor, factor)
        product(prefix + "fc2", None, scale / factor, scale)

    for i in range(a.depth):
        block = f"blocks.{i}."
        scale1, scale2 = (1.0 if s is None else s for s in (w.take(block + "scale1"), w.take(block + "scale2")))
        product(block + "qkv", block + "norm1")
        product(block + "out", None, scale1, scale1)
        mlp(block, block + "norm2", scale2)
    if a.pool == "attention":
        heads = a.extras["pool_heads"]
        query, bias = w.take("pool.q.weight") @ w.take("pool.probe"), w.take("pool.q.bias")
        query = (query if bias is None else query + bias).unflatten(0, (heads, -1))  # [h, d]
        key, value = w.take("pool.kv.weight").chunk(2)
        put("pool.scores", torch.einsum("hd,hdD->hD", query, key.unflatten(0, (heads, -1))) / math.sqrt(query.shape[1]))
        put("pool.value.weight", value)
        bias = w.take("pool.kv.bias")
        put("pool.value.bias", None if bias is None else bias.chunk(2)[1])
        mlp("pool.", "pool.norm")
    if normalisation is not None:
        weight, bias = w.take("patch.weight"), w.take("patch.bias")
        mean, std = (weight.new_tensor(values)[:, None, None] for values in (normalisation.mean, normalisation.std))
        put("patch.weight", weight / (unit * std))
        put("patch.bias", (0 if bias is None else bias) - (weight * (mean / std)).sum((1, 2, 3)))
    for name in list(w.left):
        put(name, w.take(name))

    done = {
        "LayerNorm's weight and bias into the products behind them": folds_norms,
        "LayerScale into the products before it": scaled,
        "quick GELU's factor 1.702 into fc1 and fc2": quick,
        "the pool's query and keys into one vector a head": a.pool == "attention",
        "the images' normalisation into the patch embedding": normalisation is not None,
    }
    return Folded(a, folded, "silu" if quick else a.activation, [name for name, was in done.items() if was])
