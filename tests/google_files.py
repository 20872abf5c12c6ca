"""Random weights in the layouts of Google's .npz files, and what a network with such weights computes, in that very layout.

The forward pass is numpy and float64, and shares no code with the package: what it reads is the arrays as Google names them.
"""

import math

import numpy as np

_ATTENTION = "MultiHeadDotProductAttention_1"


def google_arrays(
    *, hidden=12, heads=3, mlp=20, layers=2, patch=(4, 4), grid=(3, 3), classes=5, in_channels=3, backbone=None, seed=0
) -> dict[str, np.ndarray]:
    """The arrays of vision_transformer's files. ``backbone``: (units of each block, width after the stem) for a hybrid."""
    rng = np.random.default_rng(seed)

    def random(*shape, scale=0.3):
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    def norm(name, *shape):
        return {f"{name}/scale": 1 + random(*shape), f"{name}/bias": random(*shape)}

    def dense(name, kernel, bias):
        return {f"{name}/kernel": random(*kernel), f"{name}/bias": random(*bias)}

    size = hidden // heads
    if backbone is not None:
        in_channels = backbone[1] * 4 * 2 ** (len(backbone[0]) - 1)
    arrays = {"cls": random(1, 1, hidden), "Transformer/posembed_input/pos_embedding": random(1, 1 + math.prod(grid), hidden)}
    arrays |= dense("embedding", (*patch, in_channels, hidden), (hidden,)) | dense("head", (hidden, classes), (classes,))
    arrays |= norm("Transformer/encoder_norm", hidden)
    for i in range(layers):
        block = f"Transformer/encoderblock_{i}"
        arrays |= norm(f"{block}/LayerNorm_0", hidden) | norm(f"{block}/LayerNorm_2", hidden)
        for name in ("query", "key", "value"):
            arrays |= dense(f"{block}/{_ATTENTION}/{name}", (hidden, heads, size), (heads, size))
        arrays |= dense(f"{block}/{_ATTENTION}/out", (heads, size, hidden), (hidden,))
        arrays |= dense(f"{block}/MlpBlock_3/Dense_0", (hidden, mlp), (mlp,))
        arrays |= dense(f"{block}/MlpBlock_3/Dense_1", (mlp, hidden), (hidden,))
    if backbone is not None:
        arrays |= {"conv_root/kernel": random(7, 7, 3, backbone[1])} | norm("gn_root", 1, 1, 1, backbone[1])
        channels = backbone[1]
        for b, n_units in enumerate(backbone[0]):
            middle = backbone[1] * 2**b
            for u in range(n_units):
                unit, out = f"block{b + 1}/unit{u + 1}", middle * 4
                arrays[f"{unit}/conv1/kernel"] = random(1, 1, channels, middle)
                arrays[f"{unit}/conv2/kernel"] = random(3, 3, middle, middle)
                arrays[f"{unit}/conv3/kernel"] = random(1, 1, middle, out)
                for i, width in ((1, middle), (2, middle), (3, out)):
                    arrays |= norm(f"{unit}/gn{i}", 1, 1, 1, width)
                if u == 0:
                    arrays[f"{unit}/conv_proj/kernel"] = random(1, 1, channels, out)
                    arrays |= norm(f"{unit}/gn_proj", 1, 1, 1, out)
                channels = out
    return arrays


def big_vision_arrays(arrays, *, stacked=False, prefix="", class_row=False) -> dict[str, np.ndarray]:
    """The same network as big_vision writes it; without ``class_row`` the class token's position must be zero."""
    renamed = {}
    for name, array in arrays.items():
        for old, new in (("Attention_1/", "Attention_0/"), ("LayerNorm_2/", "LayerNorm_1/"), ("MlpBlock_3/", "MlpBlock_0/")):
            name = name.replace(old, new)
        renamed[name] = array
    table = renamed.pop("Transformer/posembed_input/pos_embedding")
    if class_row:
        renamed["Transformer/pos_embedding"] = table
    else:
        assert not table[:, 0].any()
        renamed["pos_embedding"] = table[:, 1:]
    if stacked:
        layers = 1 + max(int(name.split("_")[1].split("/")[0]) for name in renamed if "encoderblock_" in name)
        for name in [name for name in renamed if "encoderblock_0/" in name]:
            parts = [renamed.pop(name.replace("block_0/", f"block_{i}/", 1)) for i in range(layers)]
            renamed[name.replace("encoderblock_0/", "encoderblock/")] = np.stack(parts)
    return {prefix + name: array for name, array in renamed.items()}


# ---- The forward pass -----------------------------------------------------------------------------------------------

_erf = np.vectorize(math.erf)


def _norm(x, arrays, name):
    x = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-6)
    return x * arrays[f"{name}/scale"] + arrays[f"{name}/bias"]


def google_logits(arrays, images: np.ndarray, features=None) -> np.ndarray:
    """Logits [B,classes] of images [B,H,W,C]; ``features`` [B,h,w,C] take the images' place behind a hybrid's backbone."""
    a = {name: array.astype(np.float64) for name, array in arrays.items()}
    x = np.asarray(images if features is None else features, dtype=np.float64)
    p, q = a["embedding/kernel"].shape[:2]
    batch, height, width, channels = x.shape
    x = x[:, : height // p * p, : width // q * q].reshape(batch, height // p, p, width // q, q, channels)
    x = np.einsum("bhpwqc,pqcd->bhwd", x, a["embedding/kernel"]) + a["embedding/bias"]
    x = x.reshape(batch, -1, x.shape[-1])
    x = np.concatenate([np.repeat(a["cls"], batch, axis=0), x], axis=1) + a["Transformer/posembed_input/pos_embedding"]
    for i in range(sum(name.endswith("LayerNorm_0/scale") for name in a)):
        block = f"Transformer/encoderblock_{i}"
        attention = f"{block}/{_ATTENTION}"
        y = _norm(x, a, f"{block}/LayerNorm_0")
        q, k, v = (
            np.einsum("bnd,dhk->bnhk", y, a[f"{attention}/{name}/kernel"]) + a[f"{attention}/{name}/bias"]
            for name in ("query", "key", "value")
        )
        scores = np.einsum("bqhk,bshk->bhqs", q, k) / math.sqrt(q.shape[-1])
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        y = np.einsum("bhqs,bshk->bqhk", scores / scores.sum(axis=-1, keepdims=True), v)
        x = x + np.einsum("bqhk,hkd->bqd", y, a[f"{attention}/out/kernel"]) + a[f"{attention}/out/bias"]
        y = _norm(x, a, f"{block}/LayerNorm_2")
        y = y @ a[f"{block}/MlpBlock_3/Dense_0/kernel"] + a[f"{block}/MlpBlock_3/Dense_0/bias"]
        y = y * 0.5 * (1 + _erf(y / math.sqrt(2)))
        x = x + y @ a[f"{block}/MlpBlock_3/Dense_1/kernel"] + a[f"{block}/MlpBlock_3/Dense_1/bias"]
    return _norm(x, a, "Transformer/encoder_norm")[:, 0] @ a["head/kernel"] + a["head/bias"]


def _windows(x, kernel, stride, fill):
    """[B,H,W,C] with SAME padding → [B,h,w,k,k,C]."""
    pads = []
    for size in x.shape[1:3]:
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        pads.append((total // 2, total - total // 2))
    x = np.pad(x, ((0, 0), *pads, (0, 0)), constant_values=fill)
    windows = np.lib.stride_tricks.sliding_window_view(x, (kernel, kernel), axis=(1, 2))
    return windows[:, ::stride, ::stride].transpose(0, 1, 2, 4, 5, 3)


def _standardised_conv(x, kernel, stride=1):
    kernel = kernel - kernel.mean(axis=(0, 1, 2))
    kernel = kernel / (kernel.std(axis=(0, 1, 2)) + 1e-5)
    return np.einsum("bhwklc,klcd->bhwd", _windows(x, kernel.shape[0], stride, 0.0), kernel)


def _group_norm(x, arrays, name):
    grouped = x.reshape(*x.shape[:3], 32, -1)
    mean, var = grouped.mean(axis=(1, 2, 4), keepdims=True), grouped.var(axis=(1, 2, 4), keepdims=True)
    x = ((grouped - mean) / np.sqrt(var + 1e-6)).reshape(x.shape)
    return x * arrays[f"{name}/scale"] + arrays[f"{name}/bias"]


def google_features(arrays, images: np.ndarray, dtype=np.float64) -> np.ndarray:
    """Features [B,h,w,C] of Google's ResNet for images [B,H,W,3], as ``vit_jax/models_resnet.py`` describes it."""
    a = {name: array.astype(dtype) for name, array in arrays.items()}
    relu = lambda x: np.maximum(x, 0)  # noqa: E731
    x = relu(_group_norm(_standardised_conv(images.astype(dtype), a["conv_root/kernel"], 2), a, "gn_root"))
    x = _windows(x, 3, 2, -np.inf).max(axis=(3, 4))
    units = sorted(name.removesuffix("/conv1/kernel") for name in a if name.endswith("/conv1/kernel"))
    for unit in units:
        stride = 2 if unit.endswith("unit1") and not unit.startswith("block1/") else 1
        residual = x
        if f"{unit}/conv_proj/kernel" in a:
            residual = _group_norm(_standardised_conv(x, a[f"{unit}/conv_proj/kernel"], stride), a, f"{unit}/gn_proj")
        y = relu(_group_norm(_standardised_conv(x, a[f"{unit}/conv1/kernel"]), a, f"{unit}/gn1"))
        y = relu(_group_norm(_standardised_conv(y, a[f"{unit}/conv2/kernel"], stride), a, f"{unit}/gn2"))
        x = relu(residual + _group_norm(_standardised_conv(y, a[f"{unit}/conv3/kernel"]), a, f"{unit}/gn3"))
    return x
