r"""GELU and its derivative for the epilogues of `linear`, and the backward pass of GELU alone.

.. math::

    \operatorname{gelu}(x) = x \, \Phi(x) \qquad \operatorname{gelu}'(x) = \Phi(x) + x \, \varphi(x) \qquad
    \operatorname{gelu_{tanh}}(x) = x \, \sigma(2u), \quad u = \sqrt{2/\pi} \, (x + 0.044715 x^3)

Φ, φ: the standard normal distribution and its density. Source: Hendrycks & Gimpel, Gaussian Error Linear Units (2016), sec. 2.

For 16-bit tensors Φ(x) is taken as σ(2u) too, with u the odd polynomial of degree 5 that brings x·σ(2u) within 2.5e-5 of
x·Φ(x): an exp2, a division and four multiply-adds instead of libdevice's erf. float32 and float64 take erf itself.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vit_fast.kernels.common import Target, on_device, target_of, tuned

# ---- Launch choices -------------------------------------------------------------------------------------------------


class Config(NamedTuple):
    """A tile of the tensor, and how the programs run that walk down the rows, tile by tile."""

    rows: int
    columns: int
    warps: int
    stages: int
    programs: int  # down the rows; as many beside them as there are blocks of columns


_PROGRAMS_PER_MULTIPROCESSOR = 8  # all resident, at under 64 registers a thread; bounds the bias gradient's partial sums


@tuned
def gelu_bwd_config(rows: int, columns: int, target: Target) -> Config:
    """The launch of the backward pass: 16 elements a thread, which is two 16-byte loads of each operand in 16 bit."""
    block_rows, block_columns = 8, 256
    resident = triton.cdiv(_PROGRAMS_PER_MULTIPROCESSOR * target.multiprocessors, triton.cdiv(columns, block_columns))
    return Config(block_rows, block_columns, 4, 3, min(triton.cdiv(rows, block_rows), resident))


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


# ---- Backward -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows"])
def _gelu_bwd_kernel(
    dy_ptr,
    z_ptr,
    dz_ptr,
    partial_ptr,
    rows,
    columns,
    row_stride,
    ACTIVATION: tl.constexpr,
    ERF: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], ACC)
    for start in tl.range(program * BLOCK_ROWS, rows, tl.num_programs(0) * BLOCK_ROWS, num_stages=STAGES):
        row = (start + tl.arange(0, BLOCK_ROWS)).to(tl.int64)  # row * stride passes 2**31
        offsets = row[:, None] * row_stride + cols[None, :]
        mask = (row < rows)[:, None] & (cols < columns)[None, :]
        dy = tl.load(dy_ptr + offsets, mask, 0.0).to(ACC)
        z = tl.load(z_ptr + offsets, mask, 0.0).to(ACC)
        dz = dy * gelu_derivative(z, ACTIVATION, ERF)
        tl.store(dz_ptr + offsets, dz.to(dz_ptr.dtype.element_ty), mask)
        acc += dz
    tl.store(partial_ptr + program.to(tl.int64) * columns + cols, tl.sum(acc, 0), cols < columns)


def gelu_bwd(dy: torch.Tensor, z: torch.Tensor, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """dz = dy ∘ act'(z), and its sum over the rows: the gradient of the bias inside z.

    :param dy: [..., M], contiguous, in any floating dtype; :param z: [..., M], contiguous.
    :returns: dz [..., M] and dbias [M] in z's dtype. The sum is over unrounded values, in float32, in a fixed order.
    """
    columns = z.shape[-1]
    rows = z.numel() // columns
    dz = torch.empty_like(z)
    config = gelu_bwd_config(rows, columns, target_of(z.device))
    partial = z.new_empty((config.programs, columns), dtype=torch.promote_types(z.dtype, torch.float32))
    if rows > 0:
        with on_device(z):
            _gelu_bwd_kernel[(config.programs, triton.cdiv(columns, config.columns))](
                dy,
                z,
                dz,
                partial,
                rows,
                columns,
                columns,
                ACTIVATION=activation,
                ERF=takes_erf(z.dtype),
                ACC=accumulator(z.dtype),
                BLOCK_ROWS=config.rows,
                BLOCK_COLUMNS=config.columns,
                STAGES=config.stages,
                num_warps=config.warps,
            )
    return dz, partial.sum(0).to(z.dtype)
