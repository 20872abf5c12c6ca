"""torchvision's `VisionTransformer`: vit_b_16, vit_l_32, vit_h_14, …, also with a representation layer before the head."""

from __future__ import annotations

from torch import Tensor, nn

from vit_fast.frozen.description import Architecture, Description, Unsupported
from vit_fast.frozen.families import Request, add
from vit_fast.frozen.families.reading import (
    Block,
    absent,
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


def reads(model: nn.Module) -> bool:
    return is_of(model, "torchvision")


def describe(model: nn.Module) -> Description:
    known_class(model, {"torchvision.models.vision_transformer": ("VisionTransformer",)})
    encoder, stem = model.encoder, model.conv_proj
    if isinstance(stem, nn.Sequential):
        raise Unsupported("freeze: patches come from a stack of convolutions (conv_stem_configs)")
    expect(encoder, "the model", "Encoder", "torchvision")
    absent(encoder.dropout, "the encoder", "a dropout of its own")
    patch = patch_size(stem, "conv_proj")
    width = stem.out_channels
    size = (model.image_size, model.image_size)
    weights: dict[str, Tensor] = {}
    add(weights, "patch", stem)
    grid = size[0] // patch[0], size[1] // patch[1]
    read_embeddings(weights, [model.class_token], encoder.pos_embedding[0], 1, grid)
    fields = read_blocks(weights, [_block(block, i) for i, block in enumerate(encoder.layers)], width)
    add(weights, "norm", encoder.ln)
    pooler, classes = _heads(model.heads, weights)
    architecture = Architecture(
        family="torchvision",
        name=type(model).__name__,
        image_size=size,
        channels=stem.in_channels,
        patch=patch,
        prefix_tokens=1,
        pool="class_token",
        final_norm_eps=norm_eps(encoder.ln, "encoder.ln", width),
        pooler=pooler,
        resize="torchvision",
        extras={"classes": classes},
        **fields,
    )
    return Description(architecture, weights)


def _block(block: nn.Module, i: int) -> Block:
    where = f"block {i}"
    expect(block, where, "EncoderBlock", "torchvision")
    expect(block.mlp, f"{where}'s MLP", "MLPBlock", "torchvision")
    absent(block.dropout, where, "a dropout of its own")
    layers = [layer for layer in block.mlp if not isinstance(layer, nn.Dropout)]
    if len(layers) != 3:
        raise Unsupported(f"freeze: {where}'s MLP has {len(layers)} layers, where two and an activation are expected")
    return Block(
        norm1=block.ln_1,
        qkv=block.self_attention,
        out=block.self_attention.out_proj,
        heads=block.num_heads,
        norm2=block.ln_2,
        fc1=layers[0],
        act=layers[1],
        fc2=layers[2],
    )


def _heads(heads: nn.Module, weights: dict[str, Tensor]) -> tuple[bool, int]:
    """Whether there is a representation layer, and the number of classes. People put heads of their own in this place."""
    layers = list(heads) if type(heads) is nn.Sequential else [heads]
    layers = [layer for layer in layers if type(layer) is not nn.Dropout]
    if len(layers) == 3:
        expect(layers[1], "the heads' activation", nn.Tanh)
        add(weights, "pooler", linear(layers[0], "the heads' pre_logits"))
    elif len(layers) > 1:
        raise Unsupported(f"freeze: the heads are {heads}, where one layer, or two with tanh between them, are expected")
    return len(layers) == 3, read_head(weights, layers[-1] if layers else None)


def request(architecture: Architecture, x: Tensor) -> Request:
    """As `VisionTransformer.forward`: logits, or what the head would read."""
    name = "logits" if architecture.extras["classes"] else "pooled"
    return Request(x, (name,), lambda found: found[name])
