"""What the operations that drop something share: seeds for the kernels, stochastic depth in stock PyTorch, the check of a rate.

Sources: Srivastava et al., Dropout (2014); Huang et al., Deep Networks with Stochastic Depth (2016).
"""

from __future__ import annotations

import torch
from torch import Tensor


def draw_seeds(x: Tensor, count: int, *probabilities: float) -> tuple[Tensor | None, ...]:
    """So many seeds, int64 [1] each, from torch's generator of x's device; None where nothing is dropped.

    Drawn there, so manual_seed, checkpointing and CUDA graphs all hold.
    """
    if not any(probabilities):
        return (None,) * count
    return torch.randint(1 << 62, (count,), device=x.device).split(1)


def stochastic_depth(y: Tensor, p: float) -> Tensor:
    """y, each entry of its first axis set to zero with probability p and else divided by 1 - p, so that the mean stays."""
    if p == 0.0:
        return y
    kept = y.new_empty(y.shape[:1] + (1,) * (y.dim() - 1)) if y.dim() > 1 else y.new_empty(1)
    return y * kept.bernoulli_(1.0 - p).div_(max(1.0 - p, 1e-12))


def check_probability(op: str, name: str, p: float) -> None:
    """ValueError unless p is in [0, 1]."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{op}: {name} must be in [0, 1], got {p}")
