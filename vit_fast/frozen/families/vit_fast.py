"""Our own classes: the drop-in `VisionTransformer` and `Transformer`, plain and hybrid."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vit_fast.frozen.description import Architecture, Description, Unsupported
from vit_fast.frozen.families import Request, add, stacked
from vit_fast.modeling import Attention, Block, Mlp, Transformer, VisionTransformer


def reads(model: nn.Module) -> bool:
    return isinstance(model, (VisionTransformer, Transformer))


def describe(model: VisionTransformer | Transformer) -> Description:
    classifies = isinstance(model, VisionTransformer)
    transformer = model.transformer if classifies else model
    embeddings, encoder = transformer.embeddings, transformer.encoder
    blocks = list(encoder.layer)
    for i, block in enumerate(blocks):
        for module, expected in ((block, Block), (block.attn, Attention), (block.ffn, Mlp)):
            if type(module) is not expected:
                raise Unsupported(f"freeze: block {i} has a {type(module).__name__} where it expects {expected.__name__}")
        if block.ffn.act_fn is not F.gelu:
            raise Unsupported(f"freeze: block {i}'s activation is {block.ffn.act_fn}, not GELU")
    if not blocks:
        raise Unsupported("freeze: the model has no blocks")
    first = blocks[0]
    patch = embeddings.patch_embeddings.kernel_size
    architecture = Architecture(
        family="vit_fast",
        name=type(model).__name__,
        image_size=embeddings.img_size,
        channels=embeddings.in_channels,
        patch=patch,
        width=first.hidden_size,
        depth=len(blocks),
        heads=first.attn.num_attention_heads,
        head_size=first.attn.attention_head_size,
        mlp_width=first.ffn.fc1.out_features,
        activation="gelu",
        prefix_tokens=1,
        pool=None if not classifies else "class_token" if model.classifier == "token" else "patch_mean",
        norm_eps=first.attention_norm.eps,
        final_norm_eps=encoder.encoder_norm.eps,
        stem_size=embeddings.hybrid_model.output_grid(*embeddings.img_size) if embeddings.hybrid else None,
        resize="original",
        any_size=embeddings.interpolate_positions,
        extras={"classes": model.head.out_features if classifies else 0, "attention": encoder.vis},
    )
    table = embeddings.position_embeddings
    weights: dict[str, Tensor] = {
        "prefix": embeddings.cls_token[0] + table[0, :1],
        "positions": table[0, 1:],
    }
    for i, block in enumerate(blocks):
        name = f"blocks.{i}."
        add(weights, name + "norm1", block.attention_norm)
        add(weights, name + "norm2", block.ffn_norm)
        attention = block.attn
        stacked(weights, name + "qkv", (attention.query, attention.key, attention.value))
        add(weights, name + "out", attention.out)
        add(weights, name + "fc1", block.ffn.fc1)
        add(weights, name + "fc2", block.ffn.fc2)
    add(weights, "patch", embeddings.patch_embeddings)
    add(weights, "norm", encoder.encoder_norm)
    if classifies:
        add(weights, "head", model.head)
    return Description(architecture, weights, embeddings.hybrid_model if embeddings.hybrid else None)


def request(architecture: Architecture, x: Tensor, labels: Tensor | None = None) -> Request:
    """As `VisionTransformer.forward`: (logits, attention weights), or with labels the loss."""
    head = "logits" if architecture.pool else "tokens"
    if labels is not None:
        if not architecture.pool:
            raise TypeError("freeze: a Transformer takes no labels")
        return Request(x, ("logits",), lambda found: F.cross_entropy(found["logits"], labels.view(-1)))
    if not architecture.extras["attention"]:
        return Request(x, (head,), lambda found: (found[head], []))
    return Request(x, (head, "attention"), lambda found: (found[head], found["attention"]))
