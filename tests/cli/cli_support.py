"""What the tests of the command line share: a small model, and what it sees."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vit_fast import CONFIGS, VisionTransformer, backends

ROOT = Path(__file__).parents[2]
CLASSES = 5
HOT = (1, 2)  # the patch, of 4x4, that the constructed attention goes to
SMALL = ("--model", "ViT-Ti_16", "--img-size", 32)
DEMO = ("demo", "--model", "ViT-Ti_16", "--img-size", 32, "--batch", "1,3", "--rounds", 2)
GRAY = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)


def tiny(seed=0, img_size=64, classes=CLASSES):
    """Ti/16 whose every parameter is random, with a head that makes up its mind."""
    torch.manual_seed(seed)
    model = VisionTransformer(CONFIGS["ViT-Ti_16"], img_size=img_size, num_classes=classes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        model.head.weight.mul_(5)
    return model.eval()


def as_model_sees(path, size=64, mean=0.5, std=0.5):
    pixels = np.asarray(Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BICUBIC))
    return ((torch.from_numpy(pixels.copy()).double() / 255 - mean) / std).permute(2, 0, 1)[None].float()


def break_operation(monkeypatch, op, change):
    """Let the stock implementation of an operation, which `auto` takes without a GPU, give something else."""
    operation = backends.OPERATIONS[op]
    for name in operation.order:
        monkeypatch.setitem(
            operation.implementations,
            name,
            backends.Implementation(lambda *a: change(operation.implementations["reference"].run(*a)), backends.anything),
        )
