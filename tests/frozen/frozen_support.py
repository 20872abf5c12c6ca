"""Small descriptions of every kind of architecture with random weights, and small models of ours."""

import copy

import torch

from vit_fast import CONFIGS, VisionTransformer
from vit_fast.frozen.description import Architecture, Description

WIDTH, HEADS, MLP = 48, 3, 80
PLAIN = dict(prefix_tokens=1, pool="class_token", activation="gelu", final_norm_eps=1e-6, pool_norm_eps=None)

# What sets each apart from PLAIN; "scale": LayerScale, "bias": False for products without one.
KINDS = {
    "plain": {},
    "no biases": dict(bias=False),
    "tanh GELU, mean": dict(activation="gelu_tanh", pool="patch_mean"),
    "DINOv2 with registers": dict(scale=True, prefix_tokens=5, pool="class_token_and_patch_mean"),
    "CLIP": dict(activation="quick_gelu", pre_norm_eps=1e-5, final_norm_eps=None, pool_norm_eps=1e-5, norm_eps=1e-5),
    "SigLIP": dict(activation="gelu_tanh", prefix_tokens=0, pool="attention"),
    "attention pool, quick GELU, no biases": dict(activation="quick_gelu", pool="attention", bias=False),
    "distilled": dict(prefix_tokens=2, pool="first_two"),
    "pooler": dict(pooler=True),
    "no positions": dict(positions=False),
    "features": dict(pool=None),
    "one block, LayerScale": dict(scale=True, depth=1),
    "eps 1e-12, fc_norm": dict(norm_eps=1e-12, final_norm_eps=None, pool="patch_mean", pool_norm_eps=1e-6),
}


def description(kind: str, dtype=torch.float64, size=(32, 48), patch=(16, 16), seed=0) -> Description:
    """Random weights: none of them zero or one, so that one left out shows."""
    asked = dict(PLAIN, norm_eps=1e-6, depth=2) | KINDS[kind]
    scale, bias, positions = (
        asked.pop(name, default) for name, default in (("scale", False), ("bias", True), ("positions", True))
    )
    classes = 7 if asked["pool"] else 0
    architecture = Architecture(
        family="vit_fast",
        name=kind,
        image_size=size,
        channels=3,
        patch=patch,
        width=WIDTH,
        heads=HEADS,
        head_size=WIDTH // HEADS,
        mlp_width=MLP,
        resize="original",
        extras={"classes": classes, "attention": False, "pool_heads": 2, "pool_eps": 1e-6, "pool_from": 0},
        **asked,
    )
    generator = torch.Generator().manual_seed(seed)
    weights = {}

    def add(name, *shape, around=0.0, spread=0.3):
        weights[name] = (around + spread * torch.randn(shape, generator=generator)).to(dtype)

    def norm(name, width=WIDTH):
        add(name + ".weight", width, around=1.0)
        add(name + ".bias", width)

    def linear(name, outputs, inputs):
        add(name + ".weight", outputs, inputs, spread=1.5 / inputs**0.5)
        if bias:
            add(name + ".bias", outputs)

    add("patch.weight", WIDTH, 3, *patch, spread=0.05)
    if bias:
        add("patch.bias", WIDTH)
    if architecture.prefix_tokens:
        add("prefix", architecture.prefix_tokens, WIDTH)
    if positions:
        add("positions", architecture.grid[0] * architecture.grid[1], WIDTH)
    if architecture.pre_norm_eps:
        norm("pre_norm")
    for i in range(architecture.depth):
        block = f"blocks.{i}."
        norm(block + "norm1")
        linear(block + "qkv", 3 * WIDTH, WIDTH)
        linear(block + "out", WIDTH, WIDTH)
        norm(block + "norm2")
        linear(block + "fc1", MLP, WIDTH)
        linear(block + "fc2", WIDTH, MLP)
        if scale:
            add(block + "scale1", WIDTH, around=0.5)
            add(block + "scale2", WIDTH, around=0.5)
    if architecture.final_norm_eps:
        norm("norm")
    width = WIDTH * (2 if architecture.pool in ("first_two", "class_token_and_patch_mean") else 1)
    if architecture.pool == "attention":
        add("pool.probe", WIDTH)
        for name, outputs in (("q", WIDTH), ("kv", 2 * WIDTH), ("out", WIDTH)):
            linear("pool." + name, outputs, WIDTH)
        norm("pool.norm")
        linear("pool.fc1", MLP, WIDTH)
        linear("pool.fc2", WIDTH, MLP)
    if architecture.pool_norm_eps:
        norm("pool_norm", width)
    if architecture.pooler:
        linear("pooler", WIDTH, width)
        width = WIDTH
    if classes:
        linear("head", classes, width)
    return Description(architecture, weights)


def model(name="ViT-Ti_16", size=(64, 96), classes=10, layers=2, seed=0, **options) -> VisionTransformer:
    """One of ours, in eval mode, every parameter random."""
    config = copy.deepcopy(CONFIGS[name])
    config.transformer.num_layers = layers
    config.classifier = options.pop("classifier", "token")
    built = VisionTransformer(config, size, classes, **options).eval()
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in built.named_parameters():
        around = 1.0 if key.endswith("norm.weight") else 0.0
        with torch.no_grad():
            parameter.copy_(around + 0.05 * torch.randn(parameter.shape, generator=generator))
    return built
