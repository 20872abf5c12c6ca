r"""The Vision Transformer, class by class: read this file from top to bottom to learn what a ViT computes.

An image is cut into patches of P×P pixels; each becomes a vector, a token, by one matrix product. A class token is put before
them, a position table is added, and a standard Transformer encoder lets the tokens exchange information. What the class token
has gathered by then is classified by one linear layer::

    image [B,C,H,W] ─ Embeddings ─ [B,N,D] ─ Block × L ─ LayerNorm ─ token 0 ─ head ─ logits [B,classes]
                                               │
                                               └ x + Attention(LayerNorm(x)), then x + Mlp(LayerNorm(x))

Axes: B images, C channels, H×W pixels, N tokens (1 + number of patches), D channels of a token, h heads of size d = D/h.

Classes, arguments, state-dict keys and results are those of jeonsworld/ViT-pytorch. Sources: [ViT] Dosovitskiy et al., "An
Image is Worth 16x16 Words" (2021); [Attn] Vaswani et al., "Attention Is All You Need" (2017).

How it is computed. Every class has two ways to the same numbers. `_steps` calls its sub-modules one after the other, as the
original does. The fast way hands their parameters to the fused operations of `vit_fast.ops`. It is taken unless somebody could
see the difference: when ``vit_fast.use("reference")`` is in force, or a sub-module has hooks or was replaced, the steps are
taken.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _global_hooks
from torch.utils.checkpoint import checkpoint

from vit_fast import backends, ops
from vit_fast.configs import CONFIGS
from vit_fast.ops.dropout import stochastic_depth
from vit_fast.packing import PackedLinears
from vit_fast.resnet import ResNetV2

__all__ = [
    "CONFIGS",
    "MLP",
    "Attention",
    "Block",
    "Embeddings",
    "Encoder",
    "LayerNorm",
    "Mlp",
    "Transformer",
    "VisionTransformer",
]


def _pair(size) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _untouched(*modules: nn.Module) -> bool:
    """Whether nobody can tell if these sub-modules are called: of the expected types, and without hooks."""
    if _global_hooks._global_forward_hooks or _global_hooks._global_forward_pre_hooks:
        return False
    if _global_hooks._global_backward_hooks or _global_hooks._global_backward_pre_hooks:
        return False
    for module in modules:
        if type(module) not in _FUSIBLE:
            return False
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return False
    return True


def _dropout_rate(dropout: nn.Dropout) -> float:
    return dropout.p if dropout.training else 0.0


class LayerNorm(nn.LayerNorm):
    r"""y = (x - mean) / sqrt(var + ε) · γ + β over a token's D channels: every token on one scale, before each half of a block.

    In and out: [..., D]; ε = 1e-6. [ViT] eq. 2-4.
    """

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class Attention(nn.Module):
    r"""Multi-head self-attention: each token asks every token, and takes the answers in proportion to how well they fit.

    .. math::

        q, k, v = x W_q^\top + b_q,\; x W_k^\top + b_k,\; x W_v^\top + b_v \qquad
        A = \operatorname{softmax}\left(\frac{q k^\top}{\sqrt d}\right) \qquad y = (A v) W_o^\top + b_o

    q is what a token looks for, k what it offers to be found by, v what it passes on. The D channels are split into h heads
    that attend separately, each to something else; the division by √d keeps the scores' variance, and with it the softmax's
    slope, the same for every head size. Position plays no part here: it is in the tokens since `Embeddings`.

    In: [B,N,D]; optionally a residual [B,N,D] that is added to y, and the probability with which stochastic depth leaves y out
    of an image's sum. Out: (y [B,N,D], A [B,h,N,N] if ``vis`` else None); A is taken before dropout. Cost: 8·N·D² + 4·N²·D
    operations an image. [Attn] section 3.2, [ViT] appendix A.
    """

    def __init__(self, config, vis: bool):
        super().__init__()
        self.vis = vis
        self.num_attention_heads = config.transformer["num_heads"]
        if config.hidden_size % self.num_attention_heads:
            heads = self.num_attention_heads
            raise ValueError(f"Attention: hidden_size {config.hidden_size} is not a multiple of {heads} heads")
        self.attention_head_size = config.hidden_size // self.num_attention_heads
        self.all_head_size = self.num_attention_heads * self.attention_head_size

        self.query = nn.Linear(config.hidden_size, self.all_head_size)
        self.key = nn.Linear(config.hidden_size, self.all_head_size)
        self.value = nn.Linear(config.hidden_size, self.all_head_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)
        self.attn_dropout = nn.Dropout(config.transformer["attention_dropout_rate"])
        self.proj_dropout = nn.Dropout(config.transformer["attention_dropout_rate"])
        self.softmax = nn.Softmax(dim=-1)

        self._packed = PackedLinears()
        self._pack()
        self.register_load_state_dict_post_hook(_pack_after_loading)

    def forward(
        self, hidden_states: Tensor, residual: Tensor | None = None, stochastic_depth_p: float = 0.0
    ) -> tuple[Tensor, Tensor | None]:
        parts = (self.query, self.key, self.value, self.out, self.attn_dropout, self.proj_dropout, self.softmax)
        if backends.selected() == "reference" or not _untouched(*parts):
            return self._steps(hidden_states, residual, stochastic_depth_p)
        attended = ops.attention(
            self._qkv(hidden_states), self.num_attention_heads, _dropout_rate(self.attn_dropout), return_probs=self.vis
        )
        context, weights = attended if self.vis else (attended, None)
        dropped = (_dropout_rate(self.proj_dropout), stochastic_depth_p)
        return ops.linear(context, self.out.weight, self.out.bias, None, residual, *dropped), weights

    def _qkv(self, x: Tensor) -> Tensor:
        """The three projections of x in one array, [B,N,3·D]; one product when their parameters lie side by side."""
        layers = (self.query, self.key, self.value)
        # The compiler can't see memory addresses, so there the parameters are never known to be packed.
        if not torch.compiler.is_compiling() and self._packed.matches(*layers):
            return ops.linear(x, *self._packed.parameters(*layers))
        # A GPU copies weights faster than the larger products; on a CPU each product writes its part of the result.
        if x.is_cuda and all(layer.bias is not None for layer in layers):
            return ops.linear(x, torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers]))
        return torch.stack([ops.linear(x, layer.weight, layer.bias) for layer in layers], dim=-2).flatten(-2)

    def _steps(self, x: Tensor, residual: Tensor | None, stochastic_depth_p: float) -> tuple[Tensor, Tensor | None]:
        query, key, value = (self.transpose_for_scores(layer(x)) for layer in (self.query, self.key, self.value))
        scores = torch.matmul(query, key.transpose(-1, -2))
        scores = scores / math.sqrt(self.attention_head_size)
        probabilities = self.softmax(scores)
        weights = probabilities if self.vis else None
        context = torch.matmul(self.attn_dropout(probabilities), value)
        context = context.permute(0, 2, 1, 3).contiguous().flatten(2)
        y = stochastic_depth(self.proj_dropout(self.out(context)), stochastic_depth_p)
        return (y if residual is None else y + residual), weights

    def transpose_for_scores(self, x: Tensor) -> Tensor:
        """[B,N,D] → [B,h,N,d]."""
        return x.unflatten(-1, (self.num_attention_heads, self.attention_head_size)).permute(0, 2, 1, 3)

    # The parameters are packed again after everything that gives them new memory.

    def _pack(self) -> None:
        layers = (self.query, self.key, self.value)
        if all(type(layer) is nn.Linear and layer.bias is not None for layer in layers):
            self._packed.pack(*layers)

    def _apply(self, fn, recurse=True):  # .to(), .half(), .cuda(), …
        super()._apply(fn, recurse)
        self._pack()
        return self

    def __setstate__(self, state):  # copy.deepcopy, pickle
        super().__setstate__(state)
        self._pack()


def _pack_after_loading(module: Attention, incompatible_keys) -> None:
    module._pack()  # load_state_dict(assign=True) replaces the parameters


class Mlp(nn.Module):
    r"""Two linear layers with GELU between them, on every token alone: what attention gathered is worked on here.

    .. math:: y = \operatorname{GELU}(x W_1^\top + b_1) W_2^\top + b_2 \qquad \operatorname{GELU}(z) = z \, \Phi(z)

    Φ is the standard normal distribution function, by the exact erf. The hidden layer is 4·D wide in all published sizes; two
    thirds of a ViT's multiplications happen here. In: [B,N,D]; optionally a residual that is added, and the probability with
    which stochastic depth leaves y out of an image's sum. Out: [B,N,D]. [ViT] eq. 3 and section 3.1.
    """

    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.transformer["mlp_dim"])
        self.fc2 = nn.Linear(config.transformer["mlp_dim"], config.hidden_size)
        self.act_fn = F.gelu
        self.dropout = nn.Dropout(config.transformer["dropout_rate"])
        nn.init.xavier_uniform_(self.fc1.weight)
        nn.init.xavier_uniform_(self.fc2.weight)
        nn.init.normal_(self.fc1.bias, std=1e-6)
        nn.init.normal_(self.fc2.bias, std=1e-6)

    def forward(self, x: Tensor, residual: Tensor | None = None, stochastic_depth_p: float = 0.0) -> Tensor:
        fc1, fc2 = self.fc1, self.fc2
        if backends.selected() == "reference" or self.act_fn is not F.gelu or not _untouched(fc1, fc2, self.dropout):
            y = stochastic_depth(self.dropout(fc2(self.dropout(self.act_fn(fc1(x))))), stochastic_depth_p)
            return y if residual is None else y + residual
        dropped = (_dropout_rate(self.dropout), stochastic_depth_p)
        return ops.mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, "gelu", residual, *dropped)


MLP = Mlp


class Embeddings(nn.Module):
    r"""The image as a row of tokens: patches times a matrix, a class token before them, positions added.

    .. math:: z = [x_{class};\; E x_p^1 + b;\; \dots;\; E x_p^{N-1} + b] + E_{pos}

    x_p is a patch as a vector of C·P² pixels. The same product is a convolution with kernel and stride P, which is how the
    weight is stored. Attention sees a set, not a sequence: the learned table E_pos is all the model knows of where a patch was.
    The class token is a learned vector with no patch; it ends up holding what the classifier reads. In the hybrid a ResNet's
    features take the place of pixels. In: [B,C,H,W] floating point, normalised as the weights expect. Out: [B,N,D] after
    dropout, patches row by row. [ViT] eq. 1 and section 3.1.

    ``interpolate_positions=True`` accepts other image sizes at run time, by resizing the table to the patch grid of each batch
    ([ViT] section 3.2). ``hybrid_impl`` is ``"original"`` or ``"google"``, see `vit_fast.resnet`.
    """

    def __init__(self, config, img_size, in_channels: int = 3, *, interpolate_positions: bool = False, hybrid_impl="original"):
        super().__init__()
        self.img_size = _pair(img_size)
        self.in_channels = in_channels
        self.interpolate_positions = interpolate_positions
        self.hybrid = config.patches.get("grid") is not None
        if self.hybrid:
            if in_channels != 3:
                raise ValueError(f"Embeddings: the hybrid's backbone reads 3 channels, got in_channels={in_channels}")
            self.hybrid_model = ResNetV2(config.resnet.num_layers, config.resnet.width_factor, impl=hybrid_impl)
            in_channels = self.hybrid_model.out_channels
            features = self.hybrid_model.output_grid(*self.img_size)
            patch_size = tuple(max(1, size // grid) for size, grid in zip(features, config.patches["grid"], strict=True))
        else:
            patch_size = _pair(config.patches["size"])
        self.patch_embeddings = nn.Conv2d(in_channels, config.hidden_size, kernel_size=patch_size, stride=patch_size)
        self.grid = self._grid_for(*self.img_size)
        if 0 in self.grid:
            raise ValueError(f"Embeddings: img_size {_by(self.img_size)} is smaller than one patch of {_by(patch_size)}")
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], config.hidden_size))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.dropout = nn.Dropout(config.transformer["dropout_rate"])

    def forward(self, x: Tensor) -> Tensor:
        positions = self._positions_for(x)
        if self.hybrid:
            x = self.hybrid_model(x)
        if backends.selected() == "reference" or not _untouched(self.patch_embeddings):
            patches = self.patch_embeddings(x).flatten(2).transpose(-1, -2)
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), patches), dim=1) + positions
        else:
            x = ops.patch_embed(x, self.patch_embeddings.weight, self.patch_embeddings.bias, self.cls_token, positions)
        return self.dropout(x)

    def _grid_for(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches that an image of this size gives."""
        if self.hybrid:
            height, width = self.hybrid_model.output_grid(height, width)
        rows, columns = self.patch_embeddings.kernel_size
        return height // rows, width // columns

    def _positions_for(self, images: Tensor) -> Tensor:
        """The position table that fits the images; ValueError or TypeError for images that don't fit the model."""
        if images.dim() != 4:
            raise ValueError(f"Embeddings: images must be [B, C, H, W], got {list(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(
                f"Embeddings: images must be floating point, got {images.dtype}; scale and normalise them first,"
                " such as (images.float() / 255 - 0.5) / 0.5"
            )
        if images.shape[1] != self.in_channels:
            raise ValueError(f"Embeddings: images must have {self.in_channels} channels, got {images.shape[1]}")
        size = (images.shape[2], images.shape[3])
        if size == self.img_size:
            return self.position_embeddings
        grid = self._grid_for(*size)
        if not self.interpolate_positions:
            raise ValueError(
                f"Embeddings: images are {_by(size)}, the model was built for img_size {_by(self.img_size)}: build it with"
                f" img_size={size}, or pass interpolate_positions=True to resize the position table at run time"
            )
        if 0 in grid:
            raise ValueError(f"Embeddings: images of {_by(size)} are smaller than one patch")
        from vit_fast.checkpoints import resize_position_embeddings

        return resize_position_embeddings(self.position_embeddings, self.grid, grid)


def _by(size) -> str:
    return f"{size[0]}x{size[1]}"


class Block(nn.Module):
    r"""One layer of the encoder: the tokens talk to each other, then each thinks for itself.

    .. math:: x \leftarrow x + \operatorname{Attention}(\operatorname{LN}(x)) \qquad
              x \leftarrow x + \operatorname{Mlp}(\operatorname{LN}(x))

    LayerNorm comes before each half (pre-norm), and each half only adds to x: the residual stream runs through all blocks
    untouched, which is what lets deep stacks train. In: [B,N,D]. Out: (x [B,N,D], attention weights or None). [ViT] eq. 2-3,
    figure 1.

    Not in the original: ``stochastic_depth_rate``, the probability with which, in training, a half is left out for an image and
    what is not is divided by 1 - rate (Huang et al., Deep Networks with Stochastic Depth, 2016). `Encoder` sets it where the
    configuration asks for it.
    """

    def __init__(self, config, vis: bool):
        super().__init__()
        self.stochastic_depth_rate = 0.0
        self.hidden_size = config.hidden_size
        self.attention_norm = LayerNorm(config.hidden_size, eps=1e-6)
        self.ffn_norm = LayerNorm(config.hidden_size, eps=1e-6)
        self.ffn = Mlp(config)
        self.attn = Attention(config, vis)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        p = self.stochastic_depth_rate if self.training else 0.0
        # Each half adds the residual itself, in the epilogue of its last product, unless somebody watches what comes out of it.
        if _untouched(self.attn):
            x, weights = self.attn(self.attention_norm(x), x, p)
        else:
            h = x
            x, weights = self.attn(self.attention_norm(x))
            x = stochastic_depth(x, p) + h
        if _untouched(self.ffn):
            x = self.ffn(self.ffn_norm(x), x, p)
        else:
            x = stochastic_depth(self.ffn(self.ffn_norm(x)), p) + x
        return x, weights

    def load_from(self, weights, n_block) -> None:
        """Copy block ``n_block`` of Google's arrays (a mapping such as ``np.load`` gives) into this one."""
        from vit_fast.checkpoints import load_block

        load_block(self, weights, n_block)


class Encoder(nn.Module):
    """The blocks one after another, then a last LayerNorm, since pre-norm blocks leave the stream itself unnormalised.

    In: [B,N,D]. Out: (encoded [B,N,D], list of one [B,h,N,N] a layer if ``vis`` else []). [ViT] eq. 2-4.

    Two things for training that the original lacks, both off by default. A ``stochastic_depth_rate`` among the configuration's
    transformer fields is the last block's; the others' grow to it in even steps from the first one's 0. With the attribute
    ``gradient_checkpointing`` set, the backward pass computes each block again instead of keeping what is in it.
    """

    def __init__(self, config, vis: bool):
        super().__init__()
        self.vis = vis
        self.gradient_checkpointing = False
        self.layer = nn.ModuleList(Block(config, vis) for _ in range(config.transformer["num_layers"]))
        self.encoder_norm = LayerNorm(config.hidden_size, eps=1e-6)
        rate = config.transformer.get("stochastic_depth_rate", 0.0)
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"Encoder: stochastic_depth_rate must be in [0, 1], got {rate}")
        for i, block in enumerate(self.layer):
            block.stochastic_depth_rate = rate * i / max(1, len(self.layer) - 1)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, list[Tensor]]:
        attn_weights = []
        for block in self.layer:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden_states, weights = checkpoint(block, hidden_states, use_reentrant=False)
            else:
                hidden_states, weights = block(hidden_states)
            if self.vis:
                attn_weights.append(weights)
        return self.encoder_norm(hidden_states), attn_weights


class Transformer(nn.Module):
    """Embeddings, then the encoder. In: [B,C,H,W]. Out: (encoded [B,N,D], list of attention weights). [ViT] figure 1."""

    def __init__(self, config, img_size, vis: bool, **embeddings_options):
        super().__init__()
        self.embeddings = Embeddings(config, img_size=img_size, **embeddings_options)
        self.encoder = Encoder(config, vis)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.encoder(self.embeddings(input_ids))


class VisionTransformer(nn.Module):
    r"""Image classification: the encoder's class token through one linear layer.

    .. math:: logits = \operatorname{LN}(z_L)_0 W^\top + b

    :param config: an entry of `CONFIGS`, or any object with attribute and item access such as ``ml_collections.ConfigDict``.
        ``config.classifier``: ``"token"`` reads the class token, ``"gap"`` the mean of the patch tokens.
    :param img_size: pixels, one number or (height, width). :param num_classes: outputs of the head.
    :param zero_head: `load_from` sets the head to zero instead of reading it: the start of fine-tuning on other classes.
    :param vis: also return the attention weights of every layer.
    :param interpolate_positions, hybrid_impl: see `Embeddings`.

    ``forward(x [B,C,H,W])`` gives (logits [B,classes], list of attention weights [B,h,N,N], empty unless ``vis``);
    ``forward(x, labels [B])`` gives the mean cross-entropy, a scalar. [ViT] eq. 4, section 3.1.
    """

    def __init__(self, config, img_size=224, num_classes=21843, zero_head=False, vis=False, **embeddings_options):
        super().__init__()
        if config.classifier not in ("token", "gap"):
            raise ValueError(f"VisionTransformer: config.classifier must be 'token' or 'gap', got {config.classifier!r}")
        self.num_classes = num_classes
        self.zero_head = zero_head
        self.classifier = config.classifier
        self.transformer = Transformer(config, img_size, vis, **embeddings_options)
        self.head = nn.Linear(config.hidden_size, num_classes)

    def forward(self, x: Tensor, labels: Tensor | None = None):
        encoded, attn_weights = self.transformer(x)
        pooled = encoded[:, 0] if self.classifier == "token" else encoded[:, 1:].mean(dim=1)
        logits = self.head(pooled)
        if labels is not None:
            return F.cross_entropy(logits.view(-1, self.num_classes), labels.view(-1))
        return logits, attn_weights

    def load_from(self, weights) -> None:
        """Load Google's arrays (``np.load("ViT-B_16.npz")``, or the path), position table resized to this model's grid.

        ``CheckpointError`` lists everything that is missing, left over or of another shape; the model is unchanged then.
        """
        from vit_fast.checkpoints import load

        load(self, weights)


_FUSIBLE = frozenset({nn.Linear, nn.Conv2d, nn.Dropout, nn.Softmax, Attention, Mlp})
