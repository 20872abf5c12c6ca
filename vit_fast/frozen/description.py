r"""A Vision Transformer described once, whoever's class it came from: its architecture, and its weights in one layout.

.. math::

    z &= \operatorname{LN}_{pre}([prefix;\; patches\, E^\top + b + positions]) \\
    z &\leftarrow z + s_1 \odot (\operatorname{attention}(\operatorname{LN}_1(z) W_{qkv}^\top + b_{qkv}) W_o^\top + b_o) \\
    z &\leftarrow z + s_2 \odot (\operatorname{act}(\operatorname{LN}_2(z) W_1^\top + b_1) W_2^\top + b_2) \\
    tokens &= \operatorname{LN}(z) \qquad pooled = \tanh(\operatorname{LN}_{pool}(pool(tokens)) W_p^\top + b_p) \qquad
    logits = pooled\, W_h^\top + b_h

What a family lacks is left out: LN_pre (CLIP), s₁ and s₂ (LayerScale: DINOv2, deit3), LN (CLIP), LN_pool (timm's fc_norm,
CLIP), the tanh layer (Hugging Face's pooler), the head. The prefix tokens are the class token, distillation token and
registers, with the positions that the family adds to them.

Weights, by name; P is the number of prefix tokens, i a block, D the width, F the MLP's width, A = heads · head size:

==============================  =====================  ==========================================================
patch.weight, .bias             [D, C, p, q], [D]      as a convolution's
prefix                          [P, D]                 positions included; missing for P = 0
positions                       [rows · columns, D]    row by row; missing if there are none
pre_norm.weight, .bias          [D]                    LN_pre
blocks.i.norm1.weight, .bias    [D]
blocks.i.qkv.weight, .bias      [3A, D], [3A]          queries, keys, values; in each head after head
blocks.i.out.weight, .bias      [D, A], [D]
blocks.i.scale1, .scale2        [D]                    LayerScale
blocks.i.norm2.weight, .bias    [D]
blocks.i.fc1.weight, .bias      [F, D], [F]
blocks.i.fc2.weight, .bias      [D, F], [D]
norm.weight, .bias              [D]                    LN
pool.probe                      [D]                    attention pooling: its query token
pool.q, .kv, .out: .weight…     [D, D], [2D, D], …     its attention, one query an image
pool.norm, .fc1, .fc2           [D], [F', D], …        its MLP: y = o + fc2(act(fc1(LN(o))))
pool_norm.weight, .bias         [D']                   LN_pool; D' = D, or twice as much where two tokens are joined
pooler.weight, .bias            [D'', D']              the layer before tanh
head.weight, .bias              [classes, D'']
==============================  =====================  ==========================================================

Every bias, and the weight and bias of every norm, may be missing: zeros and ones then. Attention pooling has three sizes in the
architecture's ``extras``: ``pool_heads``, ``pool_eps`` of its norm, and ``pool_from``, the first token that it reads (timm
leaves registers out of it in some models). Sources: Dosovitskiy et al. 2021, eq. 1-4; Touvron et al., Going deeper with Image
Transformers (2021), eq. 4 (LayerScale); Darcet et al., Vision Transformers Need Registers (2024), section 2.2; Zhai et al.,
Scaling Vision Transformers (2022), section 2.2 (attention pooling).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_fast.frozen.positions import RESIZE

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")  # x·Φ(x); its tanh approximation; x·σ(1.702 x)
POOLS = ("class_token", "patch_mean", "class_token_and_patch_mean", "first_two", "attention")


class Unsupported(ValueError):
    """A model that can't be frozen, and what about it is the reason."""


@dataclass(frozen=True)
class Architecture:
    """What a Vision Transformer computes, without its weights; see the module's formula."""

    family: str  # "vit_fast", "timm", "transformers", "torchvision": who reads the model and wraps its outputs
    name: str  # of the source's class, for people
    image_size: tuple[int, int]  # height and width that the position table is for
    channels: int
    patch: tuple[int, int]
    width: int  # D
    depth: int
    heads: int
    head_size: int
    mlp_width: int  # F
    activation: str  # one of ACTIVATIONS
    prefix_tokens: int  # class, distillation, registers; they come first
    pool: str | None  # one of POOLS; None: nothing is pooled
    norm_eps: float  # of LN_1, LN_2
    pre_norm_eps: float | None = None  # None: there is none; so for the others
    final_norm_eps: float | None = None
    pool_norm_eps: float | None = None  # of LN_pool, and of the attention pool's own norm
    pooler: bool = False  # a linear layer and tanh
    stem_size: tuple[int, int] | None = None  # what the stem makes of image_size; None without a stem
    resize: str | None = None  # the family's rule for other image sizes, one of positions.RESIZE; None: it has none
    any_size: bool = False  # whether the source takes other image sizes without being asked to
    extras: Mapping[str, Any] = field(default_factory=dict)  # what the family needs to wrap outputs; of JSON's types

    def __post_init__(self):
        for name, known in (("activation", ACTIVATIONS), ("pool", (None, *POOLS)), ("resize", (None, *RESIZE))):
            if getattr(self, name) not in known:
                raise ValueError(f"Architecture: {name} must be one of {known}, got {getattr(self, name)!r}")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of an image of the native size."""
        return self.grid_for(*(self.stem_size or self.image_size))

    def grid_for(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image, or of what the stem makes of it, of that size."""
        return height // self.patch[0], width // self.patch[1]

    @property
    def tokens(self) -> int:
        """N, for an image of the native size."""
        rows, columns = self.grid
        return self.prefix_tokens + rows * columns

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Architecture:
        pairs = {name: values[name] and tuple(values[name]) for name in ("image_size", "patch", "stem_size")}
        return cls(**{**values, **pairs})


@dataclass
class Description:
    """An architecture with its weights. The weights are the model's own tensors, or views of them, where they can be."""

    architecture: Architecture
    weights: dict[str, Tensor]
    stem: nn.Module | None = None  # what images pass before they are cut into patches: the hybrid's ResNet

    def to(self, dtype: torch.dtype) -> Description:
        import copy

        stem = None if self.stem is None else copy.deepcopy(self.stem).to(dtype)
        return Description(self.architecture, {name: w.detach().to(dtype) for name, w in self.weights.items()}, stem)


# ---- Outputs --------------------------------------------------------------------------------------------------------

_LAYERED = ("layer", "attention", "attention_class_token", "attention_mean")
OUTPUTS = ("logits", "pooled", "tokens", "embeddings", *_LAYERED)


@dataclass(frozen=True)
class Outputs:
    """Which results are wanted, by the names that a caller uses.

    ``logits`` [B, classes] · ``pooled`` [B, D''] · ``tokens`` [B, N, D] · ``embeddings`` [B, N, D], what the first block reads
    · ``layer:i`` [B, N, D], what block i gives · ``attention:i`` [B, H, N, N], its softmax probabilities ·
    ``attention_class_token:i`` [B, H, N], token 0's row of them · ``attention_mean:i`` [B, N, N], their mean over the heads.
    i counts from 0, or from the end with a minus. The last four without ``:i`` mean every layer, and give a list.
    """

    names: tuple[str, ...]
    layers: Mapping[str, tuple[int, ...]]  # of each name, the blocks it is about

    @classmethod
    def parse(cls, names: str | Iterable[str], architecture: Architecture) -> Outputs:
        """ValueError for a name that doesn't exist, or that this architecture has no such thing for."""
        names = (names,) if isinstance(names, str) else tuple(names)
        layers = {}
        for name in names:
            match = re.fullmatch(r"([a-z_]+)(?::(-?\d+))?", name) if isinstance(name, str) else None
            if match is None or match[1] not in OUTPUTS or (match[2] is not None and match[1] not in _LAYERED):
                known = ", ".join(f"{o}[:i]" if o in _LAYERED else o for o in OUTPUTS)
                raise ValueError(f"freeze: there is no output {name!r}; there are {known}")
            if match[1] in ("logits", "pooled") and architecture.pool is None:
                raise ValueError(f"freeze: {architecture.name} pools nothing, so it has no {name}")
            if match[1] == "logits" and not architecture.extras.get("classes"):
                raise ValueError(f"freeze: {architecture.name} has no head, so it has no logits")
            depth = architecture.depth
            if match[2] is None:
                layers[name] = tuple(range(depth)) if match[1] in _LAYERED else ()
            elif not -depth <= int(match[2]) < depth:
                raise ValueError(f"freeze: {name!r}: there are layers 0 to {depth - 1}")
            else:
                layers[name] = (int(match[2]) % depth,)
        return cls(names, layers)

    def of_layer(self, kind: str, layer: int) -> bool:
        return any(name.partition(":")[0] == kind and layer in self.layers[name] for name in self.names)

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset(name.partition(":")[0] for name in self.names)

    def collect(self, found: Mapping[str, Tensor]) -> dict[str, Tensor | list[Tensor]]:
        """From results by canonical name (``layer:3``) to what was asked for by the caller's."""
        results: dict[str, Tensor | list[Tensor]] = {}
        for name in self.names:
            kind, _, index = name.partition(":")
            if kind not in _LAYERED:
                results[name] = found[name]
            else:
                listed = [found[f"{kind}:{layer}"] for layer in self.layers[name]]
                results[name] = listed[0] if index else listed
        return results


# ---- The formula ----------------------------------------------------------------------------------------------------


def _norm(x: Tensor, w: Mapping[str, Tensor], name: str, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w.get(name + ".weight"), w.get(name + ".bias"), eps)


def _linear(x: Tensor, w: Mapping[str, Tensor], name: str) -> Tensor:
    return F.linear(x, w[name + ".weight"], w.get(name + ".bias"))


def _activated(x: Tensor, activation: str) -> Tensor:
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def forward_reference(description: Description, images: Tensor, outputs: Outputs) -> dict[str, Tensor | list[Tensor]]:
    """The module's formula, step by step, in the dtype of weights and images [B, C, H, W]."""
    a, w = description.architecture, description.weights
    found: dict[str, Tensor] = {}
    features = images if description.stem is None else description.stem(images)
    grid = a.grid_for(features.shape[2], features.shape[3])
    z = F.conv2d(features, w["patch.weight"], w.get("patch.bias"), stride=a.patch).flatten(2).transpose(1, 2)
    if "positions" in w:
        z = z + (w["positions"] if grid == a.grid else RESIZE[a.resize](w["positions"], a.grid, grid))
    if a.prefix_tokens:
        z = torch.cat([w["prefix"].expand(z.shape[0], -1, -1), z], dim=1)
    if a.pre_norm_eps is not None:
        z = _norm(z, w, "pre_norm", a.pre_norm_eps)
    found["embeddings"] = z
    for i in range(a.depth):
        block = f"blocks.{i}."
        qkv = _linear(_norm(z, w, block + "norm1", a.norm_eps), w, block + "qkv")
        q, k, v = qkv.unflatten(2, (3, a.heads, a.head_size)).permute(2, 0, 3, 1, 4)
        probabilities = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(a.head_size), dim=-1)
        found[f"attention:{i}"], found[f"attention_mean:{i}"] = probabilities, probabilities.mean(1)
        found[f"attention_class_token:{i}"] = probabilities[:, :, 0]
        y = _linear((probabilities @ v).transpose(1, 2).flatten(2), w, block + "out")
        z = z + y * w.get(block + "scale1", 1)
        y = _linear(
            _activated(_linear(_norm(z, w, block + "norm2", a.norm_eps), w, block + "fc1"), a.activation), w, block + "fc2"
        )
        z = z + y * w.get(block + "scale2", 1)
        found[f"layer:{i}"] = z
    tokens = found["tokens"] = z if a.final_norm_eps is None else _norm(z, w, "norm", a.final_norm_eps)
    if a.pool is not None and not outputs.kinds.isdisjoint(("pooled", "logits")):
        pooled = pool_reference(a, w, tokens)
        found["pooled"] = pooled
        if outputs.kinds & {"logits"}:
            found["logits"] = _linear(pooled, w, "head")
    return outputs.collect(found)


def pool_reference(a: Architecture, w: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """What the head reads, of tokens [B, N, D]."""
    if a.pool == "class_token":
        pooled = tokens[:, 0]
    elif a.pool == "patch_mean":
        pooled = tokens[:, a.prefix_tokens :].mean(1)
    elif a.pool == "class_token_and_patch_mean":
        pooled = torch.cat([tokens[:, 0], tokens[:, a.prefix_tokens :].mean(1)], dim=1)
    elif a.pool == "first_two":
        pooled = tokens[:, :2].flatten(1)
    else:
        heads = a.extras["pool_heads"]
        query = _linear(w["pool.probe"], w, "pool.q").unflatten(0, (heads, 1, -1))  # [h, 1, d]
        read = tokens[:, a.extras["pool_from"] :]
        k, v = _linear(read, w, "pool.kv").unflatten(2, (2, heads, -1)).permute(2, 0, 3, 1, 4)
        probabilities = torch.softmax(query @ k.transpose(-1, -2) / math.sqrt(k.shape[-1]), dim=-1)
        y = _linear((probabilities @ v).flatten(1), w, "pool.out")
        normed = _norm(y, w, "pool.norm", a.extras["pool_eps"])
        pooled = y + _linear(_activated(_linear(normed, w, "pool.fc1"), a.activation), w, "pool.fc2")
    if a.pool_norm_eps is not None:
        pooled = _norm(pooled, w, "pool_norm", a.pool_norm_eps)
    return torch.tanh(_linear(pooled, w, "pooler")) if a.pooler else pooled
