r"""Layer normalisation over the last axis, with an optional residual input.

.. math::

    s = x + r \qquad
    y = \frac{s - \mu}{\sqrt{\sigma^2 + \varepsilon}} \, \gamma + \beta \qquad
    \mu = \frac1D \sum_i s_i, \quad \sigma^2 = \frac1D \sum_i (s_i - \mu)^2

With a residual r the sum s is a result too: the residual stream goes on from it. Source: Ba et al., Layer Normalization (2016);
its place before each half of a block: Dosovitskiy et al., "An Image is Worth 16x16 Words" (2021), eq. 2-4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vit_fast import backends, extension
from vit_fast.backends import Implementation, Operation
from vit_fast.ops.checks import check_shape, check_tensors, refuses_rows

# ---- Reference ------------------------------------------------------------------------------------------------------


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None):
    """The formula, as the original computes it: an addition, then ``torch.nn.functional.layer_norm``."""
    if residual is None:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    total = x + residual
    return F.layer_norm(total, x.shape[-1:], weight, bias, eps), total


# ---- The kernels' boundary: schema, fake, launch --------------------------------------------------------------------

torch.library.define(
    "vit_fast::layer_norm_fwd",
    "(Tensor x, Tensor weight, Tensor bias, float eps, Tensor? residual) -> (Tensor y, Tensor total, Tensor mean, Tensor rstd)",
)
torch.library.define(
    "vit_fast::layer_norm_bwd",
    "(Tensor dy, Tensor total, Tensor weight, Tensor mean, Tensor rstd, Tensor? dtotal)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
)


def _layer_norm_fwd_fake(x, weight, bias, eps, residual):
    total_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    stats = x.new_empty(x.shape[:-1], dtype=torch.promote_types(total_dtype, torch.float32))
    total = x.new_empty(0 if residual is None else x.shape, dtype=total_dtype)
    return x.new_empty(x.shape, dtype=weight.dtype), total, stats, torch.empty_like(stats)


def _layer_norm_bwd_fake(dy, total, weight, mean, rstd, dtotal):
    return total.new_empty(total.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


extension.register_fakes(layer_norm_fwd=_layer_norm_fwd_fake, layer_norm_bwd=_layer_norm_bwd_fake)


@torch.library.impl("vit_fast::layer_norm_fwd", "default")
def _(x, weight, bias, eps, residual):
    from vit_fast.kernels.layer_norm import layer_norm_fwd

    return layer_norm_fwd(x, weight, bias, eps, residual)


@torch.library.impl("vit_fast::layer_norm_bwd", "default")
def _(dy, total, weight, mean, rstd, dtotal):
    from vit_fast.kernels.layer_norm import layer_norm_bwd

    return layer_norm_bwd(dy, total, weight, mean, rstd, dtotal)


# ---- Autograd around the kernels ------------------------------------------------------------------------------------


class _LayerNorm(torch.autograd.Function):
    """Kernels of one namespace (``torch.ops.vit_fast`` or ``torch.ops.vit_fast_cpp``) as a differentiable function."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, residual, kernels):
        y, total, mean, rstd = kernels.layer_norm_fwd(x, weight, bias, eps, residual)
        ctx.kernels, ctx.with_residual = kernels, residual is not None
        ctx.save_for_backward(x if residual is None else total, weight, mean, rstd)
        return y if residual is None else (y, total)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dtotal=None):
        dx, dweight, dbias = ctx.kernels.layer_norm_bwd(dy, *ctx.saved_tensors, dtotal)
        return dx, dweight, dbias, None, dx if ctx.with_residual else None, None


def _with_kernels(kernels):
    def run(x, weight, bias, eps, residual):
        if torch.is_autocast_enabled(x.device.type):
            # The stock operation casts everything to float32. The kernels compute in float32 anyway and give y in the weight's
            # dtype, so that x and the residual need no copies.
            wide = torch.promote_types(x.dtype, torch.float32)
            weight, bias = weight.to(wide), bias.to(wide)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, residual)):
            return _LayerNorm.apply(x, weight, bias, eps, residual, kernels)
        y, total, _, _ = kernels.layer_norm_fwd(x, weight, bias, eps, residual)
        return y if residual is None else (y, total)

    return run


# ---- Implementations ------------------------------------------------------------------------------------------------


def _triton_supports(x, weight, bias, eps, residual):
    reason = backends.triton_refuses(x, weight, bias, residual)
    if reason is not None:
        return reason
    from vit_fast.kernels.layer_norm import MAX_COLUMNS, refuses_strides

    if not 1 <= x.shape[-1] <= MAX_COLUMNS:
        return f"its rows hold 1 to {MAX_COLUMNS} columns, got {x.shape[-1]}"
    return _refuses_parameters(weight, bias) or refuses_strides(x) or (None if residual is None else refuses_strides(residual))


def _cpp_supports(x, weight, bias, eps, residual):
    reason = extension.refuses(x, weight, bias, residual) or _refuses_parameters(weight, bias)
    if reason is None and x.shape[-1] == 0:
        return "its rows hold at least one column, got 0"
    return reason or refuses_rows("x", x) or refuses_rows("residual", residual)


def _refuses_parameters(weight, bias):
    if not (weight.is_contiguous() and bias.is_contiguous()):
        return f"it takes a contiguous weight and bias, got strides {weight.stride()} and {bias.stride()}"
    return None


_layer_norm = Operation(
    "layer_norm",
    {
        "reference": Implementation(layer_norm_reference, backends.anything),
        # F.layer_norm is one fused kernel on every device already: the stock composition is the reference.
        "torch": Implementation(layer_norm_reference, backends.anything),
        "triton": Implementation(_with_kernels(torch.ops.vit_fast), _triton_supports),
        "cpp": Implementation(_with_kernels(torch.ops.vit_fast_cpp), _cpp_supports, extension.not_worth),
    },
    order=("triton", "cpp", "torch"),
)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6, residual: Tensor | None = None):
    r"""y = (s - mean(s)) / sqrt(var(s) + eps) · weight + bias, over the last axis, where s = x + residual.

    :param x: [..., D], float32, float16 or bfloat16 (float64 on the stock implementations).
    :param weight: [D], γ.
    :param bias: [D], β.
    :param eps: added to the variance; 1e-6 throughout ViT.
    :param residual: [..., D] like x, or None.
    :returns: y [..., D]; with a residual the pair (y, s). Statistics are float32 whatever the input.
    :raises ValueError: shapes or devices that do not fit. TypeError: dtypes that do not.

    Source: Ba et al. 2016, eq. 3-4.
    """
    columns = x.shape[-1:]
    check_tensors("layer_norm", ("x", x), ("weight", weight), ("bias", bias), ("residual", residual))
    check_shape("layer_norm", "weight", weight, columns)
    check_shape("layer_norm", "bias", bias, columns)
    if residual is not None:
        check_shape("layer_norm", "residual", residual, x.shape)
    return _layer_norm(x, weight, bias, eps, residual)
