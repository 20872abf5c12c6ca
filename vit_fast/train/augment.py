"""Random changes to training images: crops, flips, turns, mixtures; vectorised, and the same whoever computes them.

What is random is drawn for a whole batch at once, from a generator of seed and step: a `Draw` says what happens to each image.
Every process of several, and a run that is resumed, thus draws the same without any generator's state being kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """What may happen to a training image; nothing, by default."""

    crop: float = 1.0  # a random rectangle of at least this part of the area, sides 3:4 to 4:3, resized to the whole; 1: none
    flip: bool = False  # left and right change places, for every second image
    rotate: float = 0.0  # degrees, either way
    shift: float = 0.0  # parts of the side, any way
    zoom: float = 0.0  # 0.1: larger or smaller by up to 10 %
    shear: float = 0.0  # degrees, either way
    mixup: float = 0.0  # α of Beta(α, α), by which two images and their labels are mixed (Zhang et al. 2018); 0: none

    def draw(self, rng: np.random.Generator, count: int) -> Draw:
        """Always as many random numbers, so that one option does not change what another draws."""
        area, ratio, x, y, turn, dx, dy, zoom, shear, flip = rng.random((10, count))
        share = rng.beta(self.mixup, self.mixup, (count + 1) // 2) if self.mixup > 0 else np.ones((count + 1) // 2)
        crop = np.stack([self.crop + area * (1 - self.crop), 2 * ratio - 1, x, y], axis=1) if self.crop < 1 else None
        a, s = (np.deg2rad(limit) * (2 * u - 1) for limit, u in ((self.rotate, turn), (self.shear, shear)))
        z = np.exp(np.log1p(self.zoom) * (2 * zoom - 1))
        mirror = np.where((flip < 0.5) & self.flip, -1.0, 1.0)
        # Where each output pixel is taken from, in coordinates of -1 to 1.
        theta = np.zeros((count, 2, 3))
        theta[:, 0, 0], theta[:, 0, 1] = mirror * np.cos(a) / z, (np.tan(s) * np.cos(a) - np.sin(a)) / z
        theta[:, 1, 0], theta[:, 1, 1] = mirror * np.sin(a) / z, (np.tan(s) * np.sin(a) + np.cos(a)) / z
        theta[:, 0, 2], theta[:, 1, 2] = 2 * self.shift * (2 * dx - 1), 2 * self.shift * (2 * dy - 1)
        moves = self.flip or any(limit > 0 for limit in (self.rotate, self.shift, self.zoom, self.shear))
        return Draw(crop, theta if moves else None, np.repeat(share, 2)[:count])


@dataclass(frozen=True)
class Draw:
    """What happens to each image of a batch; the first axis of every array."""

    crop: np.ndarray | None  # [B,4]: part of the area, log-ratio in -1…1, and where, both in 0…1
    theta: np.ndarray | None  # [B,2,3]
    share: np.ndarray  # [B]: of the image itself, where it is mixed with its neighbour

    def rows(self, rows: slice) -> Draw:
        crop, theta = (None if array is None else array[rows] for array in (self.crop, self.theta))
        return Draw(crop, theta, self.share[rows])


def crop_box(crop: np.ndarray, width: int, height: int) -> tuple[float, float, float, float]:
    """Left, upper, right and lower edge, in pixels, of one image's crop."""
    area, log_ratio, x, y = crop
    ratio = math.exp(log_ratio * math.log(4 / 3))
    w = min(width, math.sqrt(area * width * height * ratio))
    h = min(height, math.sqrt(area * width * height / ratio))
    left, upper = x * (width - w), y * (height - h)
    return left, upper, min(width, left + w), min(height, upper + h)


def with_crops(draw: Draw, height: int, width: int) -> Draw:
    """The crops as part of theta: for images that are in memory already, all of one size."""
    if draw.crop is None:
        return draw
    boxes = np.array([crop_box(crop, width, height) for crop in draw.crop])
    left, upper, right, lower = boxes.T
    inner = np.zeros((len(boxes), 2, 3))
    inner[:, 0, 0], inner[:, 0, 2] = (right - left) / width, (right + left) / width - 1
    inner[:, 1, 1], inner[:, 1, 2] = (lower - upper) / height, (lower + upper) / height - 1
    if draw.theta is not None:  # the output is taken from the crop, and the crop from the image
        outer = np.concatenate([draw.theta, np.tile([[[0.0, 0.0, 1.0]]], (len(boxes), 1, 1))], axis=1)
        inner = inner @ outer
    return Draw(None, inner, draw.share)


def moved(images: Tensor, theta: np.ndarray | None) -> Tensor:
    """Images [B,C,H,W], floating point, resampled bilinearly where theta says; beyond the edge is what is at the edge."""
    if theta is None:
        return images
    where = torch.from_numpy(theta).to(images.device, images.dtype)
    grid = F.affine_grid(where, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def mixed(images: Tensor, targets: Tensor, share: np.ndarray) -> tuple[Tensor, Tensor]:
    """Each image with its neighbour, 0 with 1, 2 with 3, …, and so the targets [B, classes]. The order is random already."""
    part = torch.from_numpy(share).to(images.device, images.dtype)
    partner = torch.arange(len(images), device=images.device) ^ 1
    partner = partner.clamp(max=len(images) - 1)  # the last of an odd number stays as it is
    parts = part.view(-1, 1, 1, 1)
    return images * parts + images[partner] * (1 - parts), targets * part[:, None] + targets[partner] * (1 - part[:, None])
