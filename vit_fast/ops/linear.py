r"""A linear layer with its epilogue, and the two of them that make ViT's MLP.

.. math::

    y = \operatorname{act}(x W^\top + b) + r \qquad
    \operatorname{mlp}(x) = \operatorname{act}(x W_1^\top + b_1) W_2^\top + b_2 + r

act is nothing, GELU with the exact error function, x·Φ(x) (Hendrycks & Gimpel 2016), or its tanh approximation by name.
Source of the MLP: Dosovitskiy et al., "An Image is Worth 16x16 Words" (2021), eq. 3 and section 3.1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vit_fast import backends
from vit_fast.backends import Implementation, Operation
from vit_fast.ops.checks import check_shape, check_tensors

ACTIVATIONS = {None: None, "gelu": "none", "gelu_tanh": "tanh"}  # our name: torch.nn.functional.gelu's `approximate`

# ---- References -----------------------------------------------------------------------------------------------------


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None):
    """The formula, step by step."""
    y = F.linear(x, weight, bias)
    if activation is not None:
        y = F.gelu(y, approximate=ACTIVATIONS[activation])
    return y if residual is None else y + residual


def mlp_reference(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, residual):
    """The formula, step by step."""
    hidden = linear_reference(x, fc1_weight, fc1_bias, activation, None)
    return linear_reference(hidden, fc2_weight, fc2_bias, None, residual)


# ---- Stock PyTorch --------------------------------------------------------------------------------------------------


def linear_torch(x, weight, bias, activation, residual):
    """The same with the epilogue computed in place where autograd allows it: fewer fresh pages, less memory."""
    y = F.linear(x, weight, bias)
    in_place = not torch.compiler.is_compiling()  # the compiler fuses the epilogue itself
    if activation is not None:
        approximate = ACTIVATIONS[activation]
        # GELU's derivative needs its input, so it can't overwrite it while autograd watches.
        if in_place and not y.requires_grad:
            torch.ops.aten.gelu_(y, approximate=approximate)
        else:
            y = F.gelu(y, approximate=approximate)
    if residual is None:
        return y
    if in_place and y.dtype == residual.dtype and activation is None:
        return y.add_(residual)  # no derivative needs the sum's inputs
    return y + residual


def mlp_torch(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, residual):
    hidden = linear_torch(x, fc1_weight, fc1_bias, activation, None)
    return linear_torch(hidden, fc2_weight, fc2_bias, None, residual)


# ---- Implementations ------------------------------------------------------------------------------------------------

_linear = Operation(
    "linear",
    {
        "reference": Implementation(linear_reference, backends.anything),
        "torch": Implementation(linear_torch, backends.anything),
    },
    order=("torch",),
)

_mlp = Operation(
    "mlp",
    {
        "reference": Implementation(mlp_reference, backends.anything),
        "torch": Implementation(mlp_torch, backends.anything),
    },
    order=("torch",),
)


def _check_activation(op: str, activation: str | None) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {list(ACTIVATIONS)}, got {activation!r}")


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, residual: Tensor | None = None
) -> Tensor:
    r"""y = act(x Wᵀ + b) + residual.

    :param x: [..., K], float32, float16 or bfloat16 (float64 on the stock implementations).
    :param weight: W, [M, K]; :param bias: b, [M] or None.
    :param activation: None, ``"gelu"`` (the exact x·Φ(x)) or ``"gelu_tanh"``.
    :param residual: [..., M], or None.
    :returns: [..., M] in the inputs' dtype; under autocast as ``torch.nn.functional.linear`` gives it.
    :raises ValueError: shapes or devices that do not fit, an unknown activation. TypeError: dtypes that do not fit.
    """
    check_tensors("linear", ("x", x), ("weight", weight), ("bias", bias), ("residual", residual))
    check_shape("linear", "weight", weight, (weight.shape[0], x.shape[-1]))
    if bias is not None:
        check_shape("linear", "bias", bias, weight.shape[:1])
    if residual is not None:
        check_shape("linear", "residual", residual, (*x.shape[:-1], weight.shape[0]))
    _check_activation("linear", activation)
    return _linear(x, weight, bias, activation, residual)


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    activation: str = "gelu",
    residual: Tensor | None = None,
):
    r"""y = act(x W₁ᵀ + b₁) W₂ᵀ + b₂ + residual: ViT's MLP as one differentiable unit.

    One unit rather than two calls of `linear`, so that in the backward pass the derivative of the activation can be applied
    in the epilogue of the product that gives the hidden gradient.

    :param x: [..., D], float32, float16 or bfloat16 (float64 on the stock implementations).
    :param fc1_weight: W₁, [F, D]; :param fc1_bias: b₁, [F].
    :param fc2_weight: W₂, [D', F]; :param fc2_bias: b₂, [D'].
    :param activation: ``"gelu"`` (the exact x·Φ(x)) or ``"gelu_tanh"``.
    :param residual: [..., D'], or None.
    :returns: [..., D'].
    :raises ValueError: shapes or devices that do not fit, an unknown activation. TypeError: dtypes that do not fit.
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
    _check_activation("mlp", activation)
    return _mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, residual)
