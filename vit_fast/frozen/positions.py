"""The position table for another grid of patches, by each family's rule.

A table that is resized by another family's rule costs accuracy without a word.

============  ==================================================================================================
original      bilinear, corners aligned: what the original, Google and its .npz files ask for
timm          bicubic with antialiasing (``timm.layers.resample_abs_pos_embed``)
transformers  bicubic, half-pixel centres (``interpolate_pos_encoding`` of its model classes)
torchvision   bicubic, corners aligned (``torchvision.models.vision_transformer.interpolate_embeddings``)
============  ==================================================================================================
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]


def _interpolated(table: Tensor, old: Grid, new: Grid, **how) -> Tensor:
    grid = table.reshape(1, *old, table.shape[-1]).permute(0, 3, 1, 2)
    # The families compute in float32; a table of lower precision is cast there and back.
    grid = grid.to(torch.promote_types(table.dtype, torch.float32))
    return F.interpolate(grid, size=new, **how).flatten(2).squeeze(0).t().to(table.dtype).contiguous()


def _original(table: Tensor, old: Grid, new: Grid) -> Tensor:
    from vit_fast.checkpoints import resize_position_embeddings

    return resize_position_embeddings(table.unsqueeze(0), old, new, num_prefix=0).squeeze(0)


RESIZE: dict[str, Callable[[Tensor, Grid, Grid], Tensor]] = {
    "original": _original,
    "timm": functools.partial(_interpolated, mode="bicubic", align_corners=False, antialias=True),
    "transformers": functools.partial(_interpolated, mode="bicubic", align_corners=False),
    "torchvision": functools.partial(_interpolated, mode="bicubic", align_corners=True),
}
