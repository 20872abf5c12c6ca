r"""Patch embedding: an image becomes a row of tokens.

.. math:: z = [x_{class};\; x_p^1 E;\; \dots;\; x_p^N E] + b + E_{pos}

Each P×P patch is flattened and multiplied by E (the weight of a convolution with stride P, seen as a matrix), the class token
is put before them, and the position table is added. Source: Dosovitskiy et al., "An Image is Worth 16x16 Words" (2021), eq. 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vit_fast import backends, extension
from vit_fast.backends import Implementation, Operation
from vit_fast.ops.checks import check_shape, check_tensors, dtype_name

# ---- Reference ------------------------------------------------------------------------------------------------------


def patch_embed_reference(images, weight, bias, cls_token, position_embeddings, mean, std):
    """The formula, as the original computes it: convolution, flatten, transpose, concatenation, addition."""
    x = F.conv2d(normalize(images, mean, std, weight.dtype), weight, bias, stride=weight.shape[-2:])
    x = x.flatten(2).transpose(-1, -2)
    x = torch.cat((cls_token.expand(x.shape[0], -1, -1), x), dim=1)
    return x + position_embeddings


def normalize(images: Tensor, mean: Tensor | None, std: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(images - mean) / std per channel in float32 or wider, bytes divided by 255 first; unchanged when there is no mean."""
    if mean is None:
        return images
    wide = torch.promote_types(dtype, torch.float32)
    x = images.to(wide) / 255 if images.dtype == torch.uint8 else images.to(wide)
    return ((x - mean.to(wide).view(-1, 1, 1)) / std.to(wide).view(-1, 1, 1)).to(dtype)


# ---- Stock PyTorch --------------------------------------------------------------------------------------------------


def patch_embed_torch(images, weight, bias, cls_token, position_embeddings, mean, std):
    """The same as one matrix product over gathered patches."""
    images = normalize(images, mean, std, weight.dtype)
    p, q = weight.shape[-2:]
    rows, columns = images.shape[-2] // p, images.shape[-1] // q
    patches = images[:, :, : rows * p, : columns * q].unflatten(3, (columns, q)).unflatten(2, (rows, p))
    patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [B, rows·columns, C·p·q]
    x = F.linear(patches, weight.flatten(1), bias)
    x = torch.cat((cls_token.expand(x.shape[0], -1, -1), x), dim=1)  # promotes under autocast
    if torch.compiler.is_compiling() or x.dtype != position_embeddings.dtype:
        return x + position_embeddings
    return x.add_(position_embeddings)  # no derivative needs the sum's inputs


# ---- The kernels' boundary: schema, fake, launch --------------------------------------------------------------------

torch.library.define(
    "vit_fast::patch_embed_fwd",
    "(Tensor images, Tensor weight, Tensor bias, Tensor cls_token, Tensor position_embeddings, Tensor? mean, Tensor? std)"
    " -> Tensor",
)
torch.library.define(
    "vit_fast::patch_embed_bwd",
    "(Tensor dout, Tensor images, Tensor weight, Tensor? mean, Tensor? std, bool images_wanted)"
    " -> (Tensor dimages, Tensor dweight, Tensor dbias, Tensor dcls_token, Tensor dposition_embeddings)",
)


def _patch_embed_fwd_fake(images, weight, bias, cls_token, position_embeddings, mean, std):
    dtype = torch.promote_types(torch.promote_types(weight.dtype, cls_token.dtype), position_embeddings.dtype)
    return images.new_empty((images.shape[0], *position_embeddings.shape[1:]), dtype=dtype)


def _patch_embed_bwd_fake(dout, images, weight, mean, std, images_wanted):
    _, tokens, width = dout.shape
    dimages = images.new_empty(images.shape if images_wanted else 0)
    sums = dout.new_empty(width), dout.new_empty(1, 1, width), dout.new_empty(1, tokens, width)
    return dimages, weight.new_empty(weight.shape), *sums


extension.register_fakes(patch_embed_fwd=_patch_embed_fwd_fake, patch_embed_bwd=_patch_embed_bwd_fake)


@torch.library.impl("vit_fast::patch_embed_fwd", "default")
def _(images, weight, bias, cls_token, position_embeddings, mean, std):
    from vit_fast.kernels.patch_embed import patch_embed_fwd

    return patch_embed_fwd(images, weight, bias, cls_token, position_embeddings, mean, std)


@torch.library.impl("vit_fast::patch_embed_bwd", "default")
def _(dout, images, weight, mean, std, images_wanted):
    from vit_fast.kernels.patch_embed import patch_embed_bwd

    return patch_embed_bwd(dout, images, weight, mean, std, images_wanted)


# ---- Autograd around the kernels ------------------------------------------------------------------------------------


class _PatchEmbed(torch.autograd.Function):
    """Kernels of one namespace (``torch.ops.vit_fast`` or ``torch.ops.vit_fast_cpp``) as a differentiable function."""

    @staticmethod
    def forward(ctx, images, weight, bias, cls_token, position_embeddings, mean, std, kernels):
        ctx.kernels = kernels
        ctx.save_for_backward(images, weight, mean, std)
        return kernels.patch_embed_fwd(images, weight, bias, cls_token, position_embeddings, mean, std)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        wanted = ctx.needs_input_grad[0]
        dimages, *gradients = ctx.kernels.patch_embed_bwd(dout, *ctx.saved_tensors, wanted)
        return dimages if wanted else None, *gradients, None, None, None


def _with_kernels(kernels):
    def run(images, weight, bias, cls_token, position_embeddings, mean, std):
        device = images.device.type
        if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
            # As a convolution: the product in the lower dtype, to which the kernel casts what it reads of the images; the
            # additions promote.
            weight = weight.to(torch.get_autocast_dtype(device))
        tensors = images, weight, bias, cls_token, position_embeddings
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return _PatchEmbed.apply(*tensors, mean, std, kernels)
        return kernels.patch_embed_fwd(*tensors, mean, std)

    return run


# ---- Implementations ------------------------------------------------------------------------------------------------


def _triton_supports(images, weight, bias, cls_token, position_embeddings, mean, std):
    of_images = None if images.dtype == torch.uint8 else images
    reason = backends.triton_refuses(weight, bias, cls_token, position_embeddings, of_images)
    if reason is not None:
        return reason
    if position_embeddings.shape[1] == 1:
        return f"images of {list(images.shape[2:])} hold no patch of {list(weight.shape[2:])}"
    if weight.numel() >= 2**31:
        return f"it takes a weight of less than 2**31 elements, got {weight.numel()}"
    if mean is not None and mean.shape[0] > 16:
        return f"it normalises images of at most 16 channels, got {mean.shape[0]}"
    named = dict(bias=bias, cls_token=cls_token, position_embeddings=position_embeddings, mean=mean, std=std)
    for name, tensor in named.items():
        if tensor is not None and tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
            return f"it takes {name} with contiguous rows, got strides {tensor.stride()}"
    return None


def _cpp_supports(images, weight, bias, cls_token, position_embeddings, mean, std):
    of_images = None if images.dtype == torch.uint8 else images
    reason = extension.refuses(weight, bias, cls_token, position_embeddings, of_images)
    if reason is not None:
        return reason
    if torch.is_autocast_enabled(images.device.type):
        reason = extension.refuses_dtype(images.device, torch.get_autocast_dtype(images.device.type))
    if position_embeddings.shape[1] == 1 or weight.numel() == 0:
        return f"images of {list(images.shape)} hold no patch of {list(weight.shape)}"
    for name, tensor in dict(weight=weight, bias=bias, cls_token=cls_token, position_embeddings=position_embeddings).items():
        if not tensor.is_contiguous():
            return f"it takes a contiguous {name}, got strides {tensor.stride()}"
    return reason


def _cpp_not_worth(images, weight, *others):
    under_autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if under_autocast else weight.dtype
    return extension.not_worth(images) or extension.product_not_worth(dtype)


_patch_embed = Operation(
    "patch_embed",
    {
        "reference": Implementation(patch_embed_reference, backends.anything),
        "torch": Implementation(patch_embed_torch, backends.anything),
        "triton": Implementation(_with_kernels(torch.ops.vit_fast), _triton_supports),
        "cpp": Implementation(_with_kernels(torch.ops.vit_fast_cpp), _cpp_supports, _cpp_not_worth),
    },
    order=("triton", "cpp", "torch"),
)


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor,
    cls_token: Tensor,
    position_embeddings: Tensor,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
) -> Tensor:
    r"""[class token; patches · Eᵀ + bias] + position embeddings.

    :param images: [B, C, H, W], any strides; floating point like the weight, or uint8 with ``mean`` and ``std``.
    :param weight: E as a convolution's weight, [D, C, P, P'] (OIHW). A rest of H or W that fills no patch is left out.
    :param bias: [D]. :param cls_token: [1, 1, D]. :param position_embeddings: [1, 1 + (H//P)·(W//P'), D].
    :param mean: per channel, [C], in units of the image (bytes: of 0…1); with ``std`` the images are normalised first,
        (image - mean) / std, bytes divided by 255 before.
    :param std: [C]; both or neither.
    :returns: [B, N, D], N = 1 + (H//P)·(W//P'), token 0 the class token, then the patches row by row.
    :raises ValueError: shapes or devices that do not fit. TypeError: dtypes that do not.
    """
    if images.dim() != 4:
        raise ValueError(f"patch_embed: images must be [B, C, H, W], got {list(images.shape)}")
    if (mean is None) != (std is None):
        raise ValueError("patch_embed: mean and std come together, got only one of them")
    if images.dtype == torch.uint8:
        if mean is None:
            raise TypeError("patch_embed: uint8 images need mean and std, got neither")
    elif not images.is_floating_point():
        got = dtype_name(images.dtype)
        raise TypeError(f"patch_embed: images must be floating point, or uint8 with mean and std, got {got}")
    channels = images.shape[1]
    if mean is not None:
        mean, std = (torch.as_tensor(t, dtype=torch.float32, device=images.device) for t in (mean, std))
        check_shape("patch_embed", "mean", mean, (channels,))
        check_shape("patch_embed", "std", std, (channels,))
    check_tensors(
        "patch_embed",
        ("weight", weight),
        ("bias", bias),
        ("cls_token", cls_token),
        ("position_embeddings", position_embeddings),
        ("images", images if mean is None else None),
    )
    if images.device != weight.device:
        raise ValueError(f"patch_embed: images must be on {weight.device} as weight is, got {images.device}")
    width = weight.shape[0]
    check_shape("patch_embed", "weight", weight, (width, channels, *weight.shape[2:]))
    tokens = 1 + (images.shape[2] // weight.shape[2]) * (images.shape[3] // weight.shape[3])
    check_shape("patch_embed", "bias", bias, (width,))
    check_shape("patch_embed", "cls_token", cls_token, (1, 1, width))
    check_shape("patch_embed", "position_embeddings", position_embeddings, (1, tokens, width))
    return _patch_embed(images, weight, bias, cls_token, position_embeddings, mean, std)
