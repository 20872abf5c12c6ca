r"""The hybrid's backbone: a pre-activation ResNet (v2) with group normalisation and standardised weights.

.. math::

    \hat w = \frac{w - \mu_w}{\sqrt{\sigma_w^2 + 10^{-5}}} \qquad
    y = \operatorname{relu}(r + \operatorname{GN}(\hat w_3 * \operatorname{relu}(\operatorname{GN}(\hat w_2 *
    \operatorname{relu}(\operatorname{GN}(\hat w_1 * x))))))

μ and σ are taken over the inputs of each output channel; r is x, or a normalised projection of x where the shape changes.

There are two networks of this name, and one set of weights fits both. ``impl="original"`` is the one of jeonsworld/ViT-pytorch;
``impl="google"`` is the one that Google's weights were trained in:

=========================  ======================================  =====================================================
\                          original                                google
=========================  ======================================  =====================================================
weight standardisation     (w - μ) / √(σ² + 1e-5)                  (w - μ) / (σ + 1e-5)
stride-2 convolutions      padded alike on all sides               SAME: the odd pixel of padding goes right and below
stem's 3×3 max-pool        not padded: 112 → 55                    SAME, padded with -∞: 112 → 56
``gn_proj``                as many groups as channels, ε = 1e-5    32 groups, ε = 1e-6
=========================  ======================================  =====================================================

In both σ² is the population variance, every other group normalisation has 32 groups and ε = 1e-6, and the stride of a unit is
on its 3×3 convolution. At 224 and 384 pixels both end in the same grid (14×14, 24×24).

Sources: He et al., Identity Mappings in Deep Residual Networks (2016); Qiao et al., Weight Standardization (2019); Kolesnikov
et al., Big Transfer (2020). Google's network: google-research/vision_transformer at c6de1e5, ``vit_jax/models_resnet.py`` and
the root block in ``vit_jax/models_vit.py``; groups, ε and padding there are the defaults of flax.linen's GroupNorm and Conv.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMPLS = ("original", "google")


def _same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Pixels before and after an axis so that ceil(size / stride) windows cover it: TensorFlow's and XLA's SAME."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _pad_same(x: Tensor, kernel: tuple[int, int], stride: tuple[int, int], value: float) -> Tensor:
    rows = _same_padding(x.shape[-2], kernel[0], stride[0])
    columns = _same_padding(x.shape[-1], kernel[1], stride[1])
    return F.pad(x, (*columns, *rows), value=value) if any(rows + columns) else x


class StdConv2d(nn.Conv2d):
    """A convolution whose weight is standardised at every call; [B,C,H,W] → [B,C',H',W'].

    The statistics are float32 for half-precision weights; the standardised weight is rounded to the weight's dtype once.
    Gradients go through the standardisation. With ``impl="google"`` a stride above 1 takes SAME padding instead of ``padding``.
    """

    def __init__(self, *args, impl: str = "original", **kwargs):
        super().__init__(*args, **kwargs)
        self.impl = impl

    def standardised_weight(self) -> Tensor:
        w = self.weight
        if w.dtype in (torch.float16, torch.bfloat16):
            w = w.float()
        variance, mean = torch.var_mean(w, dim=(1, 2, 3), keepdim=True, correction=0)
        scale = torch.sqrt(variance) + 1e-5 if self.impl == "google" else torch.sqrt(variance + 1e-5)
        return ((w - mean) / scale).to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        padding = self.padding
        if self.impl == "google" and max(self.stride) > 1:
            x, padding = _pad_same(x, self.kernel_size, self.stride, value=0.0), 0
        return F.conv2d(x, self.standardised_weight(), self.bias, self.stride, padding, self.dilation, self.groups)


def conv3x3(cin: int, cout: int, stride: int = 1, groups: int = 1, bias: bool = False, impl: str = "original") -> StdConv2d:
    return StdConv2d(cin, cout, kernel_size=3, stride=stride, padding=1, bias=bias, groups=groups, impl=impl)


def conv1x1(cin: int, cout: int, stride: int = 1, bias: bool = False, impl: str = "original") -> StdConv2d:
    return StdConv2d(cin, cout, kernel_size=1, stride=stride, padding=0, bias=bias, impl=impl)


class _SameMaxPool2d(nn.MaxPool2d):
    """Max-pooling with SAME padding of -∞, which never wins."""

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = (self.kernel_size,) * 2, (self.stride,) * 2
        return F.max_pool2d(_pad_same(x, kernel, stride, value=float("-inf")), kernel, stride)


class PreActBottleneck(nn.Module):
    """One residual unit: 1×1 to ``cmid`` channels, 3×3 with the stride, 1×1 to ``cout``.

    [B,cin,H,W] → [B,cout,⌈H/stride⌉,⌈W/stride⌉]. ``cout`` defaults to ``cin``, ``cmid`` to a quarter of ``cout``; both must be
    multiples of 32.
    """

    def __init__(self, cin: int, cout: int | None = None, cmid: int | None = None, stride: int = 1, impl: str = "original"):
        super().__init__()
        cout = cout or cin
        cmid = cmid or cout // 4
        self.gn1 = nn.GroupNorm(32, cmid, eps=1e-6)
        self.conv1 = conv1x1(cin, cmid, impl=impl)
        self.gn2 = nn.GroupNorm(32, cmid, eps=1e-6)
        self.conv2 = conv3x3(cmid, cmid, stride, impl=impl)
        self.gn3 = nn.GroupNorm(32, cout, eps=1e-6)
        self.conv3 = conv1x1(cmid, cout, impl=impl)
        # Not in place, as the original's is: a hook on gn1 or gn2 sees what the layer gave, also after the relu.
        self.relu = nn.ReLU()
        if stride != 1 or cin != cout:
            self.downsample = conv1x1(cin, cout, stride, impl=impl)
            self.gn_proj = nn.GroupNorm(32, cout, eps=1e-6) if impl == "google" else nn.GroupNorm(cout, cout)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.gn_proj(self.downsample(x)) if hasattr(self, "downsample") else x
        y = self.relu(self.gn1(self.conv1(x)))
        y = self.relu(self.gn2(self.conv2(y)))
        y = self.gn3(self.conv3(y))
        return self.relu(residual + y)

    def load_from(self, weights, n_block: str, n_unit: str) -> None:
        """Copy the unit ``"{n_block}/{n_unit}"`` (such as ``"block1"``, ``"unit2"``) of Google's arrays into this one."""
        from vit_fast.checkpoints import load_unit

        load_unit(self, weights, n_block, n_unit)


class ResNetV2(nn.Module):
    """A 7×7 stem with stride 2, a max-pool, then one block for each entry of ``block_units``.

    [B,3,H,W] → [B,out_channels,h,w], where (h, w) is `output_grid`; [B,1024,14,14] for 224 pixels in R50+ViT-B/16.

    :param block_units: units of each block, (3, 4, 9) in R50+ViT-B/16. Block i has width·4·2^i channels; all but the first
        halve the grid.
    :param width_factor: 1 for a ResNet-50's 64 channels after the stem; 64·width_factor must be a multiple of 32.
    :param impl: ``"original"`` or ``"google"``, see the module's docstring.
    :raises ValueError: an unknown ``impl``, or a width that is no multiple of 32.
    """

    def __init__(self, block_units, width_factor, impl: str = "original"):
        super().__init__()
        if impl not in IMPLS:
            raise ValueError(f"ResNetV2: impl must be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
        width = int(64 * width_factor)
        if width < 32 or width % 32:
            raise ValueError(f"ResNetV2: 64 * width_factor must be a multiple of 32, got {width} (width_factor {width_factor})")
        self.width, self.impl = width, impl
        pool = _SameMaxPool2d if impl == "google" else nn.MaxPool2d
        self.root = nn.Sequential(
            OrderedDict(
                conv=StdConv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False, impl=impl),
                gn=nn.GroupNorm(32, width, eps=1e-6),
                relu=nn.ReLU(),
                pool=pool(kernel_size=3, stride=2, padding=0),
            )
        )
        blocks = OrderedDict()
        channels = width
        for i, n_units in enumerate(block_units):
            cmid, stride = width * 2**i, 1 if i == 0 else 2
            units = OrderedDict(unit1=PreActBottleneck(channels, cmid * 4, cmid, stride, impl))
            channels = cmid * 4
            for j in range(2, n_units + 1):
                units[f"unit{j}"] = PreActBottleneck(channels, channels, cmid, impl=impl)
            blocks[f"block{i + 1}"] = nn.Sequential(units)
        self.body = nn.Sequential(blocks)
        self.out_channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.root(x))

    def output_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the feature map for images of this size in pixels, from the layers' arithmetic alone.

        :raises ValueError: an image too small for the stem.
        """
        return self._output_size("height", height), self._output_size("width", width)

    def _output_size(self, what: str, size: int) -> int:
        # Every strided layer but the original's pool gives ceil(size / 2) windows, in both implementations.
        stem = -(-size // 2)
        size_after_pool = -(-stem // 2) if self.impl == "google" else (stem - 3) // 2 + 1
        if size < 1 or size_after_pool < 1:
            smallest = 1 if self.impl == "google" else 5
            raise ValueError(f"ResNetV2: the image's {what} must be at least {smallest} pixels, got {size}")
        for _ in range(len(self.body) - 1):
            size_after_pool = -(-size_after_pool // 2)
        return size_after_pool
