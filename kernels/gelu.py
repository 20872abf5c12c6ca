r"""GELU and its derivative, for the epilogues of products and for the backward pass of one alone.

.. math::

    \operatorname{gelu}(x) = x \, \Phi(x) \qquad \operatorname{gelu}'(x) = \Phi(x) + x \, \varphi(x) \qquad
    \operatorname{gelu_{tanh}}(x) = x \, \sigma(2u), \quad u = \sqrt{2/\pi} \, (x + 0.044715 x^3)

Φ, φ: the standard normal distribution and its density. Source: Hendrycks & Gimpel, Gaussian Error Linear Units (2016), sec. 2.

For 16-bit tensors Φ(x) is taken as σ(2u) too, with u the odd polynomial of degree 5 that brings x·σ(2u) within 2.5e-5 of
x·Φ(x): an exp2, a division and four multiply-adds instead of libdevice's erf. float32 and float64 take erf itself.
"""

import torch
import triton
import triton.language as tl


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """What a tensor of that dtype is computed in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def takes_erf(dtype: torch.dtype) -> bool:
    """Whether Φ comes from erf: where the 2.5e-5 of the σ form would show."""
    return dtype.itemsize > 2


# ---- Device functions -----------------------------------------------------------------------------------------------


@triton.jit
def _normal_cdf_sigmoid(x):
    """σ(2u) ≈ Φ(x), u = x (0.797507884 + 0.0370056482 x² - 3.51518453e-4 x⁴), with -2 log2(e) inside the coefficients.

    The polynomial turns back at x² = 52.6, where σ has long been 0 or 1: x² stops there.
    """
    square = tl.minimum(x * x, 52.0)
    return 1 / (1 + tl.exp2(x * (-2.301121339 + square * (-0.1067757303 + square * 0.001014267858))))


@triton.jit
def gelu(x, ACTIVATION: tl.constexpr, ERF: tl.constexpr):
    """act(x), elementwise, in x's dtype: "gelu" or "gelu_tanh"; with ERF the former through the error function."""
    if ACTIVATION == "gelu_tanh":
        u = 0.7978845608028654 * x * (1 + 0.044715 * x * x)
        return x / (1 + tl.exp2(-2.8853900817779268 * u))
    elif ERF:
        return x * (0.5 + 0.5 * tl.erf(0.7071067811865476 * x))
    else:
        return x * _normal_cdf_sigmoid(x)


@triton.jit
def gelu_derivative(x, ACTIVATION: tl.constexpr, ERF: tl.constexpr):
    """act'(x), elementwise, in x's dtype."""
    if ACTIVATION == "gelu_tanh":
        u = 0.7978845608028654 * x * (1 + 0.044715 * x * x)
        du = 0.7978845608028654 * (1 + 0.134145 * x * x)
        # With e = exp(-2|u|), which can't overflow: σ(2u) = (1 or e) / (1 + e), and its derivative needs no 1 - σ.
        e = tl.exp2(-2.8853900817779268 * tl.abs(u))
        sigmoid = tl.where(x < 0, e, 1.0) / (1 + e)
        return sigmoid + 2 * x * du * e / ((1 + e) * (1 + e))
    else:
        density = 0.3989422804014327 * tl.exp2(-0.7213475204444817 * x * x)  # 1/√2π, log2(e)/2
        if ERF:
            return 0.5 + 0.5 * tl.erf(0.7071067811865476 * x) + x * density
        else:
            return _normal_cdf_sigmoid(x) + x * density
