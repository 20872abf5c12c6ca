"""The original's formulas once more, as plain functions of a state dict: what modeling.py is tested against.

Nothing of vit_fast is used here, and no module: only tensor arithmetic in the dtype of the weights. No dropout.
"""

import math

import torch
import torch.nn.functional as F


def layer_norm(x, state, name):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)


def linear(x, state, name):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def group_norm(x, state, name, groups=32, eps=1e-6):
    return F.group_norm(x, groups, state[f"{name}.weight"], state[f"{name}.bias"], eps)


def std_conv(x, state, name, stride=1, padding=0):
    weight = state[f"{name}.weight"]
    mean = weight.mean((1, 2, 3), keepdim=True)
    variance = (weight - mean).square().mean((1, 2, 3), keepdim=True)
    return F.conv2d(x, (weight - mean) / torch.sqrt(variance + 1e-5), None, stride, padding)


def backbone(x, state, units):
    """The original's ResNetV2, which is not Google's."""
    p = "transformer.embeddings.hybrid_model."
    x = F.relu(group_norm(std_conv(x, state, f"{p}root.conv", 2, 3), state, f"{p}root.gn"))
    x = F.max_pool2d(x, 3, 2)
    for block, count in enumerate(units, 1):
        for unit in range(1, count + 1):
            n = f"{p}body.block{block}.unit{unit}"
            stride = 2 if unit == 1 and block > 1 else 1
            shortcut = x
            if unit == 1:
                shortcut = std_conv(x, state, f"{n}.downsample", stride)
                shortcut = group_norm(shortcut, state, f"{n}.gn_proj", groups=shortcut.shape[1], eps=1e-5)
            y = F.relu(group_norm(std_conv(x, state, f"{n}.conv1"), state, f"{n}.gn1"))
            y = F.relu(group_norm(std_conv(y, state, f"{n}.conv2", stride, 1), state, f"{n}.gn2"))
            x = F.relu(shortcut + group_norm(std_conv(y, state, f"{n}.conv3"), state, f"{n}.gn3"))
    return x


def vision_transformer(state, images, heads, resnet_units=None):
    """(logits, attention weights of every layer, output of every layer)."""
    x = images if resnet_units is None else backbone(images, state, resnet_units)
    p = "transformer.embeddings."
    weight = state[f"{p}patch_embeddings.weight"]
    x = F.conv2d(x, weight, state[f"{p}patch_embeddings.bias"], stride=weight.shape[-1])
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state[f"{p}cls_token"].expand(len(x), -1, -1), x], 1) + state[f"{p}position_embeddings"]
    probabilities, layers = [], []
    i = 0
    while f"transformer.encoder.layer.{i}.attn.query.weight" in state:
        n = f"transformer.encoder.layer.{i}"
        y = layer_norm(x, state, f"{n}.attention_norm")
        q, k, v = (
            linear(y, state, f"{n}.attn.{part}").unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        p_ = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1)
        x = linear((p_ @ v).transpose(1, 2).flatten(2), state, f"{n}.attn.out") + x
        y = linear(layer_norm(x, state, f"{n}.ffn_norm"), state, f"{n}.ffn.fc1")
        y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
        x = linear(y, state, f"{n}.ffn.fc2") + x
        probabilities.append(p_)
        layers.append(x)
        i += 1
    x = layer_norm(x, state, "transformer.encoder.encoder_norm")
    return linear(x[:, 0], state, "head"), probabilities, layers


def evaluate(state, images, labels, heads, dtype, resnet_units=None):
    """Everything a test compares, computed in ``dtype``: logits, loss, attention weights, gradients by parameter name."""
    state = {name: t.detach().to(dtype).requires_grad_() for name, t in state.items()}
    logits, probabilities, layers = vision_transformer(state, images.to(dtype), heads, resnet_units)
    loss = F.cross_entropy(logits, labels)
    gradients = torch.autograd.grad(loss, list(state.values()))
    return {
        "logits": logits.detach(),
        "loss": loss.detach(),
        "attention": [t.detach() for t in probabilities],
        "layers": [t.detach() for t in layers],
        "gradients": dict(zip(state, gradients, strict=True)),
    }
