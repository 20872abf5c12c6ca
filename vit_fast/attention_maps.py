r"""Where a Vision Transformer looks: the class token's attention to the patches, and pictures of it.

One layer shows what its class token gathers, but the tokens it gathers from have been mixed by the layers before. Attention
rollout follows them back to the patches, with half of every token passing through the residual connection:

.. math:: R = \hat A_L \cdots \hat A_2 \hat A_1 \qquad \hat A = \tfrac12 \bar A + \tfrac12 I

Ā is the mean over the heads; Â's rows are scaled to sum to 1. Source: Abnar & Zuidema, Quantifying Attention Flow in
Transformers (2020), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vit_fast.terminal import CommandError, needs


def class_attention(weights: Sequence[Tensor], grid: tuple[int, int], layer: int = -1, head: int | None = None) -> Tensor:
    """Token 0's attention to each patch in one layer, by one head or the mean of all.

    :param weights: one [B, h, N, N] a layer, as a model with ``vis`` returns them, or token 0's row of them, [B, h, N], as a
        frozen model's ``attention_class_token``; N = 1 + rows·columns of ``grid``.
    :returns: [B, rows, columns], float32. Its sum is below 1 by what the token pays to itself.
    """
    row = weights[layer] if weights[layer].dim() == 3 else weights[layer][:, :, 0]
    row = row[:, :, 1:].float()
    return (row.mean(1) if head is None else row[:, head]).unflatten(-1, grid)


def rollout(weights: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
    """Token 0's attention to each patch through all layers, [B, rows, columns], float32; see the module's formula.

    :param weights: one [B, h, N, N] a layer, or their means over the heads, [B, N, N], as a frozen model's ``attention_mean``.
    """
    tokens = weights[0].shape[-1]
    identity = torch.eye(tokens, device=weights[0].device)
    row = identity[:1]  # token 0's row of R alone, multiplied from the last layer on: N times cheaper than all of R
    for layer in reversed(weights):
        mean = layer.float() if layer.dim() == 3 else layer.float().mean(1)
        mixed = 0.5 * mean + 0.5 * identity
        row = row @ (mixed / mixed.sum(-1, keepdim=True))
    return row[:, 0, 1:].unflatten(-1, grid)


def spread(attention: Tensor) -> str:
    """How uneven a map is, in words: its least and greatest value, in units of what even attention would give each patch."""
    relative = attention / attention.mean()
    return f"{float(relative.min()):.2f} to {float(relative.max()):.2f} times the mean"


def overlay(picture, attention: Tensor):
    """The picture, of its own size and without its colours, below a map [rows, columns]: dark where the map is least, bright
    yellow where it is greatest.
    """
    import numpy as np

    Image = needs("an overlay", "PIL.Image")
    colours = needs("an overlay", "matplotlib").colormaps["inferno"]
    attention = attention.detach().cpu()
    if not bool(attention.isfinite().all()):
        raise CommandError("the attention weights are not finite: the weights or the dtype do not suit the model")
    low, high = attention.min(), attention.max()
    scaled = (attention - low) / (high - low) if high > low else torch.zeros_like(attention)
    smooth = Image.fromarray(scaled.numpy().astype(np.float32)).resize(picture.size, Image.Resampling.BILINEAR)
    strength = np.clip(np.asarray(smooth), 0, 1)
    gray = np.asarray(picture.convert("L"))[..., None]
    heat = colours(strength)[..., :3] * 255
    opacity = 0.5 + 0.15 * strength[..., None]
    return Image.fromarray(np.uint8(np.round((1 - opacity) * gray + opacity * heat)))


def sheet(pictures: Sequence, rows: Sequence[tuple[str, Tensor]], title: str):
    """Pictures side by side, and under them a row of overlays for each (name, maps [B, rows, columns]); a PIL image.

    Every overlay has a scale of its own; below it stands how far from even it is.
    """
    needs("an attention sheet", "matplotlib")
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    count = len(pictures)
    # In inches: a margin for the rows' names, a title, and under each row room for its captions.
    cell, gap, left, top = 2.6, 0.08, 0.36, 0.5
    caption = 0.3
    width = left + count * (cell + gap)
    height = top + cell + gap + len(rows) * (cell + caption) + 0.1
    figure = Figure(figsize=(width, height), dpi=110)
    canvas = FigureCanvasAgg(figure)
    figure.text(left / width, 1 - 0.5 * top / height, title, fontsize=11, va="center")
    edge = top
    for name, maps in [("photograph", None), *rows]:
        bottom = 1 - (edge + cell) / height
        figure.text(0.5 * left / width, bottom + 0.5 * cell / height, name, rotation=90, ha="center", va="center", fontsize=10)
        for column, picture in enumerate(pictures):
            axes = figure.add_axes(((left + column * (cell + gap)) / width, bottom, cell / width, cell / height))
            axes.imshow(picture if maps is None else overlay(picture, maps[column]), aspect="auto")
            axes.set_axis_off()
            if maps is not None:
                centre = (left + column * (cell + gap) + 0.5 * cell) / width
                text = spread(maps[column].cpu())
                figure.text(centre, bottom - 0.5 * caption / height, text, ha="center", va="center", fontsize=8.5, color="0.3")
        edge += cell + (gap if maps is None else caption)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
