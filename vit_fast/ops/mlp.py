r"""ViT's MLP, two linear layers with GELU between them, as one differentiable unit.

.. math::

    h = m_1 \circ \operatorname{act}(x W_1^\top + b_1) \qquad y = s \, m_2 \circ (h W_2^\top + b_2) + r

m and s are dropout's and stochastic depth's in training, as in `vit_fast.ops.linear`, whose kernels these are. One unit rather
than two layers, so that in the backward pass the derivative of the activation is applied, and h computed again, in the epilogue
of the product that gives the hidden gradient.
Source: Dosovitskiy et al., "An Image is Worth 16x16 Words" (2021), eq. 3 and section 3.1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vit_fast import backends, extension
from vit_fast.backends import Implementation, Operation
from vit_fast.ops.checks import check_shape, check_tensors
from vit_fast.ops.dropout import check_probability, draw_seeds
from vit_fast.ops.linear import (
    check_activation,
    cpp_not_worth,
    cpp_refuses_dropout,
    cpp_refuses_product,
    epilogue_gradient,
    forward_with,
    linear_reference,
    linear_torch,
    multiplies,
    product,
    product_dtype,
    records,
    refuses_layers,
    rows_of,
    triton_not_worth,
)

# ---- Reference and stock PyTorch ------------------------------------------------------------------------------------


def mlp_reference(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, residual, dropout_p=0.0, stochastic_depth_p=0.0):
    """The formula, step by step."""
    hidden = linear_reference(x, fc1_weight, fc1_bias, activation, None, dropout_p)
    return linear_reference(hidden, fc2_weight, fc2_bias, None, residual, dropout_p, stochastic_depth_p)


def mlp_torch(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, residual, dropout_p=0.0, stochastic_depth_p=0.0):
    hidden = linear_torch(x, fc1_weight, fc1_bias, activation, None, dropout_p)
    return linear_torch(hidden, fc2_weight, fc2_bias, None, residual, dropout_p, stochastic_depth_p)


# ---- Autograd around the kernels ------------------------------------------------------------------------------------


class _Mlp(torch.autograd.Function):
    """Keeps z = x W₁ᵀ + b₁, and not h: a quarter less of what a whole block keeps.

    The backward pass reads z for act'(z) anyhow, and act(z), which shares its terms, goes to memory beside dz. h is kept where
    nothing asks for dz: with fc1 frozen, and what is before it.
    """

    @staticmethod
    def forward(
        ctx, x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, residual,
        dropout_p, stochastic_depth_p, hidden_seed, seed, kernels,
    ):  # fmt: skip
        for_x, for_weight1, for_bias1, for_weight2 = ctx.needs_input_grad[:4]
        keep = for_x or for_weight1 or for_bias1
        h, z = kernels.linear_fwd(x, fc1_weight, fc1_bias, activation, None, keep, dropout_p, 0.0, hidden_seed)
        y = _second_layer(kernels, h, fc2_weight, fc2_bias, residual, dropout_p, stochastic_depth_p, seed)
        ctx.kernels, ctx.dtype, ctx.epilogue = kernels, x.dtype, (activation, dropout_p, stochastic_depth_p)
        ctx.save_for_backward(
            x if for_weight1 else None,
            fc1_weight if for_x else None,
            fc2_weight if keep else None,
            z if keep else None,
            h if for_weight2 and not keep else None,
            hidden_seed,
            seed,
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        for_x, for_weight1, for_bias1, for_weight2, for_bias2, _, for_residual = ctx.needs_input_grad[:7]
        x, fc1_weight, fc2_weight, z, h, hidden_seed, seed = ctx.saved_tensors
        kernels, (activation, dropout_p, stochastic_depth_p) = ctx.kernels, ctx.epilogue
        dbias1 = dbias2 = None
        if seed is not None:
            dout, dbias2 = epilogue_gradient(kernels, dy, ctx.dtype, None, None, dropout_p, stochastic_depth_p, seed)
        else:  # from the wider residual's dtype, under autocast; and it comes in any layout, a sum's as one element expanded
            dout = dy.to(ctx.dtype).contiguous()
            dbias2 = rows_of(dout).sum(0) if for_bias2 else None
        if z is not None:
            dz, dbias1, h = _hidden_gradient(kernels, dout, fc2_weight, z, activation, dropout_p, hidden_seed, for_weight2)
        return (
            product(kernels, dz, fc1_weight.t()) if for_x else None,
            product(kernels, rows_of(dz).t(), rows_of(x).t()) if for_weight1 else None,
            dbias1 if for_bias1 else None,
            product(kernels, rows_of(dout).t(), rows_of(h).t()) if for_weight2 else None,
            dbias2 if for_bias2 else None,
            None,
            dy if for_residual else None,
            *(None,) * 5,
        )


def _second_layer(kernels, h, weight, bias, residual, dropout_p, stochastic_depth_p, seed):
    if residual is None and seed is None:
        return product(kernels, h, weight, bias)
    return forward_with(kernels, h, weight, bias, None, residual, False, dropout_p, stochastic_depth_p, seed)[0]


def _hidden_gradient(kernels, dout, fc2_weight, z, activation, dropout_p, seed, keep_activation):
    """(m₁ ∘ (dout W₂) ∘ act'(z), its sum over the rows, h or no elements)."""
    if multiplies(kernels, dout):
        dh = product(kernels, dout, fc2_weight.t())
        return kernels.epilogue_bwd(dh, z, activation, dropout_p, 0.0, seed, keep_activation)
    return kernels.linear_dgelu_bwd(dout, fc2_weight, z, activation, dropout_p, seed, keep_activation)


def _mlp_with_kernels(kernels):
    def run(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, residual, dropout_p=0.0, stochastic_depth_p=0.0):
        hidden_seed, seed = draw_seeds(x, 2, dropout_p, stochastic_depth_p)
        dtype = product_dtype(x)
        x, *parameters = (t.to(dtype) for t in (x, fc1_weight, fc1_bias, fc2_weight, fc2_bias))
        if records(x, *parameters, residual):
            dropped = (dropout_p, stochastic_depth_p, hidden_seed, seed)
            return _Mlp.apply(x, *parameters, activation, residual, *dropped, kernels)
        fc1_weight, fc1_bias, fc2_weight, fc2_bias = parameters
        h, _ = kernels.linear_fwd(x, fc1_weight, fc1_bias, activation, None, False, dropout_p, 0.0, hidden_seed)
        return _second_layer(kernels, h, fc2_weight, fc2_bias, residual, dropout_p, stochastic_depth_p, seed)

    return run


# ---- Implementations ------------------------------------------------------------------------------------------------


def _triton_supports(
    x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, residual, dropout_p=0.0, stochastic_depth_p=0.0
):
    return backends.triton_refuses(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual) or refuses_layers(
        x, residual, (fc1_weight, fc1_bias), (fc2_weight, fc2_bias)
    )


def _cpp_supports(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, residual, dropout_p=0.0, stochastic_depth_p=0.0):
    return (
        extension.refuses(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual)
        or refuses_layers(x, residual, (fc1_weight, fc1_bias), (fc2_weight, fc2_bias))
        or cpp_refuses_product(x, fc1_weight, fc2_weight)
        or cpp_refuses_dropout(x, dropout_p, stochastic_depth_p)
    )


_mlp = Operation(
    "mlp",
    {
        "reference": Implementation(mlp_reference, backends.anything),
        "torch": Implementation(mlp_torch, backends.anything),
        "triton": Implementation(_mlp_with_kernels(torch.ops.vit_fast), _triton_supports, triton_not_worth),
        "cpp": Implementation(_mlp_with_kernels(torch.ops.vit_fast_cpp), _cpp_supports, cpp_not_worth),
    },
    order=("triton", "cpp", "torch"),
)


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    activation: str = "gelu",
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    stochastic_depth_p: float = 0.0,
) -> Tensor:
    r"""y = s m₂ ∘ ((m₁ ∘ act(x W₁ᵀ + b₁)) W₂ᵀ + b₂) + residual.

    :param x: [..., D], float32, float16 or bfloat16 (float64 on the stock implementations).
    :param fc1_weight: W₁, [F, D]; :param fc1_bias: b₁, [F].
    :param fc2_weight: W₂, [D', F]; :param fc2_bias: b₂, [D'].
    :param activation: ``"gelu"`` (the exact x·Φ(x)) or ``"gelu_tanh"``.
    :param residual: [..., D'], or None.
    :param dropout_p: probability that an element of m₁ or m₂ is 0; else it is 1/(1 - p). Drawn from torch's generator. For
        training.
    :param stochastic_depth_p: the same for s, one number for each entry of x's first axis, an image.
    :returns: [..., D'].
    :raises ValueError: shapes or devices that do not fit, an unknown activation, a probability outside [0, 1]. TypeError:
        dtypes that do not fit.
    """
    check_tensors(
        "mlp",
        ("x", x),
        ("fc1_weight", fc1_weight),
        ("fc1_bias", fc1_bias),
        ("fc2_weight", fc2_weight),
        ("fc2_bias", fc2_bias),
        ("residual", residual),
    )
    check_shape("mlp", "fc1_weight", fc1_weight, (fc1_weight.shape[0], x.shape[-1]))
    check_shape("mlp", "fc1_bias", fc1_bias, fc1_weight.shape[:1])
    check_shape("mlp", "fc2_weight", fc2_weight, (fc2_weight.shape[0], fc1_weight.shape[0]))
    check_shape("mlp", "fc2_bias", fc2_bias, fc2_weight.shape[:1])
    if residual is not None:
        check_shape("mlp", "residual", residual, (*x.shape[:-1], fc2_weight.shape[0]))
    if activation is None:
        raise ValueError("mlp: activation must be 'gelu' or 'gelu_tanh', got None")
    check_activation("mlp", activation)
    check_probability("mlp", "dropout_p", dropout_p)
    check_probability("mlp", "stochastic_depth_p", stochastic_depth_p)
    return _mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, residual, dropout_p, stochastic_depth_p)
