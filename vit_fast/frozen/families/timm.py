"""timm's `VisionTransformer` and `VisionTransformerDistilled`: vit_*, deit and deit3, DINOv2, CLIP and SigLIP image towers.

The class takes many options; what its parts are decides here, never the model's name.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vit_fast.frozen.description import Architecture, Description, Unsupported
from vit_fast.frozen.families import Request, add
from vit_fast.frozen.families.reading import (
    Block,
    absent,
    activation,
    expect,
    is_of,
    known_class,
    linear,
    norm_eps,
    patch_size,
    read_blocks,
    read_embeddings,
    read_head,
)

_KNOWN = {
    "timm.models.vision_transformer": ("VisionTransformer",),
    "timm.models.deit": ("VisionTransformerDistilled",),
}


def reads(model: nn.Module) -> bool:
    return is_of(model, "timm")


def describe(model: nn.Module) -> Description:
    distilled = known_class(model, _KNOWN).__name__ == "VisionTransformerDistilled"
    if not isinstance(model.blocks, nn.Sequential):
        raise Unsupported(f"freeze: the blocks are in a {type(model.blocks).__name__}, not in a Sequential")
    # PatchDropout leaves every patch where it is in eval mode.
    if type(model.patch_drop).__name__ != "PatchDropout":
        absent(model.patch_drop, "the model", "a patch_drop")
    absent(model.pos_drop, "the model", "a pos_drop")
    absent(model.head_drop, "the model", "a head_drop")

    embed = model.patch_embed
    expect(embed, "patch_embed", "PatchEmbed", "timm")
    patch = patch_size(embed.proj, "patch_embed.proj")
    absent(embed.norm, "patch_embed", "a norm")
    if embed.dynamic_img_pad:
        raise Unsupported("freeze: patch_embed pads images (dynamic_img_pad)")
    if embed.img_size is None:
        raise Unsupported("freeze: patch_embed has no image size (img_size=None), so there is no grid of its positions")

    weights: dict[str, Tensor] = {}
    add(weights, "patch", embed.proj)
    width = embed.proj.out_channels
    fields = read_blocks(weights, [_block(block, i) for i, block in enumerate(model.blocks)], width)
    tokens = [getattr(model, name, None) for name in ("cls_token", "dist_token", "reg_token")]
    tokens = [token for token in tokens if token is not None]
    table = None if model.pos_embed is None else model.pos_embed[0]
    embedded = 0 if getattr(model, "no_embed_class", False) or table is None else sum(token.shape[1] for token in tokens)
    prefix_tokens = read_embeddings(weights, tokens, table, embedded, embed.grid_size)
    if table is None and prefix_tokens:
        with torch.no_grad():
            kept = model._pos_embed(embed.proj.weight.new_zeros(1, 1, 1, width)).shape[1] - 1
        if kept != prefix_tokens:  # 1.0.24 is such a release, 1.0.26 keeps them
            raise Unsupported("freeze: there are no positions, and this release of timm then leaves out the prefix tokens")

    final, pool, pool_norm, extras = _pool(model, weights, fields, distilled, prefix_tokens)
    pre_norm = _norm(model, "norm_pre", "pre_norm", weights, width)
    dynamic = getattr(model, "dynamic_img_size", False)
    extras["classes"] = _distilled_heads(model, weights) if distilled else read_head(weights, model.head)
    if pool is None and extras["classes"]:
        raise Unsupported("freeze: the head is applied to every token (global_pool='' with num_classes > 0)")
    architecture = Architecture(
        family="timm",
        name=type(model).__name__,
        image_size=tuple(embed.img_size),
        channels=embed.proj.in_channels,
        patch=patch,
        prefix_tokens=prefix_tokens,
        pool=pool,
        pre_norm_eps=pre_norm,
        final_norm_eps=final,
        pool_norm_eps=pool_norm,
        resize="timm",
        any_size=dynamic or (table is None and not embed.strict_img_size),
        extras=extras,
        **fields,
    )
    return Description(architecture, weights)


def _block(block: nn.Module, i: int) -> Block:
    where = f"block {i}"
    expect(block, where, "Block", "timm.models.vision_transformer")
    attention, mlp = block.attn, block.mlp
    expect(attention, f"{where}'s attention", "Attention", "timm")
    expect(mlp, f"{where}'s MLP", "Mlp", "timm")
    for name in ("q_norm", "k_norm"):
        absent(getattr(attention, name, None), where, "a norm of queries and keys (qk_norm)")
    absent(getattr(attention, "norm", None), where, "a norm before attention's output projection (scale_attn_norm)")
    absent(getattr(attention, "gate", None), where, "gated attention")
    absent(getattr(mlp, "norm", None), where, "a norm inside the MLP (scale_mlp_norm)")
    return Block(
        norm1=block.norm1,
        qkv=(attention.qkv,),
        out=attention.proj,
        heads=attention.num_heads,
        norm2=block.norm2,
        fc1=mlp.fc1,
        act=mlp.act,
        fc2=mlp.fc2,
        scale1=_layer_scale(block.ls1, where),
        scale2=_layer_scale(block.ls2, where),
        scaling=attention.scale,
    )


def _layer_scale(module: nn.Module, where: str) -> Tensor | None:
    if type(module) is nn.Identity:
        return None
    expect(module, f"{where}'s ls1 or ls2", "LayerScale", "timm")
    return module.gamma


def _norm(model: nn.Module, theirs: str, ours: str, weights: dict[str, Tensor], width: int) -> float | None:
    module = getattr(model, theirs)
    if type(module) is nn.Identity:
        return None
    add(weights, ours, module)
    return norm_eps(module, theirs, width)


def _pool(model: nn.Module, weights: dict[str, Tensor], fields: dict, distilled: bool, prefix_tokens: int):
    """eps of the final norm, the pool, eps of the norm after it, and what else the pool needs."""
    width = fields["width"]
    final = _norm(model, "norm", "norm", weights, width)
    if distilled:
        return final, "first_two", None, {}
    attention, pool = getattr(model, "attn_pool", None), model.global_pool
    # Releases without the option read every token in an attention pool, and only patches in the mean.
    include_prefix = getattr(model, "pool_include_prefix", attention is not None)
    extras = {}
    if attention is not None:
        extras = _attention_pool(attention, weights, fields)
        extras["pool_from"] = 0 if include_prefix else prefix_tokens
        pool = "attention"
    elif pool == "avg":
        if include_prefix and prefix_tokens:
            raise Unsupported("freeze: average pooling includes the prefix tokens (pool_include_prefix)")
        pool = "patch_mean"
    elif pool == "token":
        pool = "class_token"
    elif not pool:
        # With no pooling fc_norm is over every token, like the norm that it then stands for.
        fc_norm = _norm(model, "fc_norm", "norm", weights, width)
        if None not in (final, fc_norm):
            raise Unsupported("freeze: norm and fc_norm are both applied to every token")
        return (final if fc_norm is None else fc_norm), None, None, extras
    else:
        raise Unsupported(f"freeze: global_pool={pool!r} is not supported; 'token', 'avg', 'map' and '' are")
    return final, pool, _norm(model, "fc_norm", "pool_norm", weights, width), extras


def _attention_pool(pool: nn.Module, weights: dict[str, Tensor], fields: dict) -> dict:
    expect(pool, "attn_pool", "AttentionPoolLatent", "timm")
    for name in ("q_norm", "k_norm"):
        absent(getattr(pool, name, None), "attn_pool", "a norm of queries and keys (qk_norm)")
    if pool.pos_embed is not None:
        raise Unsupported("freeze: attn_pool has positions of its own")
    if pool.latent_len != 1 or pool.pool not in ("token", "avg"):
        raise Unsupported(f"freeze: attn_pool gives {pool.latent_len} tokens, pooled as {pool.pool!r}; it must give one")
    if pool.mlp is None:
        raise Unsupported("freeze: attn_pool has no output projection and MLP")
    expect(pool.mlp, "attn_pool's MLP", "Mlp", "timm")
    absent(getattr(pool.mlp, "norm", None), "attn_pool's MLP", "a norm")
    if activation(pool.mlp.act, "attn_pool") != fields["activation"]:
        raise Unsupported(f"freeze: attn_pool's activation is not the blocks' {fields['activation']}")
    weights["pool.probe"] = pool.latent.reshape(-1)
    for name, module in (("q", pool.q), ("kv", pool.kv), ("out", pool.proj), ("fc1", pool.mlp.fc1), ("fc2", pool.mlp.fc2)):
        add(weights, "pool." + name, linear(module, f"attn_pool's {name}"))
    add(weights, "pool.norm", pool.norm)
    return {"pool_heads": pool.num_heads, "pool_eps": norm_eps(pool.norm, "attn_pool.norm", fields["width"])}


def _distilled_heads(model: nn.Module, weights: dict[str, Tensor]) -> int:
    """The mean of two heads, each of one token, is one head of both."""
    heads: list[dict[str, Tensor]] = [{}, {}]
    classes, other = (read_head(w, head) for w, head in zip(heads, (model.head, model.head_dist), strict=True))
    if classes != other:
        raise Unsupported(f"freeze: head and head_dist have different numbers of classes: {classes} and {other}")
    if classes:
        weights["head.weight"] = torch.cat([w["head.weight"] for w in heads], dim=1) / 2
        biases = [w["head.bias"] for w in heads if "head.bias" in w]
        if biases:
            weights["head.bias"] = sum(biases) / 2
    return classes


def request(architecture: Architecture, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Request:
    """As `VisionTransformer.forward`: logits, or without a head what it would read, or without a pool all tokens."""
    if attn_mask is not None or is_causal:
        raise ValueError("freeze: attn_mask and is_causal are not supported")
    if architecture.extras["classes"]:
        return Request(x, ("logits",), lambda found: found["logits"])
    if architecture.pool is None:
        return Request(x, ("tokens",), lambda found: found["tokens"])
    if architecture.pool == "first_two":
        return Request(x, ("pooled",), lambda found: found["pooled"].unflatten(1, (2, -1)).mean(1))
    return Request(x, ("pooled",), lambda found: found["pooled"])
