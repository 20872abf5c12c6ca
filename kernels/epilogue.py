r"""The backward pass of a linear layer's epilogue, where it is not the epilogue of a product itself.

.. math::

    dz = s \, m \circ dy \circ \operatorname{act}'(z), \quad db = \sum_{rows} dz, \quad h = s \, m \circ \operatorname{act}(z)

m is dropout's mask and s stochastic depth's, drawn again from the forward pass's seed.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vit_fast.kernels.common import Target, on_device, target_of, tuned
from vit_fast.kernels.dropout import dropped, image_factors, kept_block
from vit_fast.kernels.gelu import accumulator, gelu, gelu_derivative, takes_erf

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
def epilogue_bwd_config(rows: int, columns: int, target: Target) -> Config:
    """16 elements a thread, which is two 16-byte loads of each operand in 16 bit."""
    block_rows, block_columns = 8, 256
    resident = triton.cdiv(_PROGRAMS_PER_MULTIPROCESSOR * target.multiprocessors, triton.cdiv(columns, block_columns))
    return Config(block_rows, block_columns, 4, 3, min(triton.cdiv(rows, block_rows), resident))


# ---- Kernel ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "dropout_limit", "depth_limit", "image_rows"])
def _epilogue_bwd_kernel(
    dy_ptr,
    z_ptr,  # None without an activation
    seed_ptr,  # None where nothing is dropped
    dz_ptr,
    h_ptr,  # None where it is not wanted
    partial_ptr,
    rows,
    columns,
    row_stride,
    dropout_limit,
    dropout_scale,
    depth_limit,
    depth_scale,
    image_rows,
    ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr,
    STOCHASTIC_DEPTH: tl.constexpr,
    ERF: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    first_column = tl.program_id(1) * BLOCK_COLUMNS
    cols = first_column + tl.arange(0, BLOCK_COLUMNS)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], ACC)
    for start in tl.range(program * BLOCK_ROWS, rows, tl.num_programs(0) * BLOCK_ROWS, num_stages=STAGES):
        row = (start + tl.arange(0, BLOCK_ROWS)).to(tl.int64)  # row * stride passes 2**31
        offsets = row[:, None] * row_stride + cols[None, :]
        mask = (row < rows)[:, None] & (cols < columns)[None, :]
        dz = tl.load(dy_ptr + offsets, mask, 0.0).to(ACC)
        if DROPOUT:
            kept = kept_block(seed_ptr, row, first_column, BLOCK_COLUMNS, dropout_limit)
            dz = tl.where(kept, dz * dropout_scale, 0.0)
        if STOCHASTIC_DEPTH:
            factor = image_factors(seed_ptr, row, image_rows, depth_limit, depth_scale)[:, None]
            dz = tl.where(factor != 0, dz * factor, 0.0)
        if ACTIVATION is not None:
            z = tl.load(z_ptr + offsets, mask, 0.0).to(ACC)
            dz *= gelu_derivative(z, ACTIVATION, ERF)
            if h_ptr is not None:
                h = gelu(z, ACTIVATION, ERF)
                if DROPOUT:
                    h = tl.where(kept, h * dropout_scale, 0.0)
                if STOCHASTIC_DEPTH:
                    h = tl.where(factor != 0, h * factor, 0.0)
                tl.store(h_ptr + offsets, h.to(h_ptr.dtype.element_ty), mask)
        tl.store(dz_ptr + offsets, dz.to(dz_ptr.dtype.element_ty), mask)
        acc += dz
    tl.store(partial_ptr + program.to(tl.int64) * columns + cols, tl.sum(acc, 0), cols < columns)


def epilogue_bwd(
    dy: torch.Tensor,
    z: torch.Tensor | None,
    activation: str | None,
    dropout_p: float = 0.0,
    stochastic_depth_p: float = 0.0,
    seed: torch.Tensor | None = None,
    keep_activation: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dz = s m ∘ dy ∘ act'(z); its sum over the rows, the gradient of the bias inside z; and h = s m ∘ act(z) on request.

    :param dy: [..., M], contiguous, in any floating dtype; :param z: [..., M], contiguous; None without an activation.
    :param dropout_p, stochastic_depth_p, seed: as the forward pass had them.
    :returns: dz [..., M], dbias [M], and h [..., M] or [0], in z's dtype, without it dy's. The sum is over unrounded values, in
        float32, in a fixed order.
    """
    like = dy if z is None else z
    columns = dy.shape[-1]
    rows = dy.numel() // columns
    dz = torch.empty_like(like)
    h = like.new_empty(like.shape if keep_activation else 0)
    config = epilogue_bwd_config(rows, columns, target_of(dy.device))
    partial = like.new_empty((config.programs, columns), dtype=torch.promote_types(like.dtype, torch.float32))
    if rows > 0:
        with on_device(dy):
            _epilogue_bwd_kernel[(config.programs, triton.cdiv(columns, config.columns))](
                dy,
                z,
                seed,
                dz,
                h if keep_activation else None,
                partial,
                rows,
                columns,
                columns,
                *dropped(dropout_p, stochastic_depth_p, dy),
                ACTIVATION=activation,
                DROPOUT=dropout_p > 0,
                STOCHASTIC_DEPTH=stochastic_depth_p > 0,
                ERF=takes_erf(like.dtype),
                ACC=accumulator(like.dtype),
                BLOCK_ROWS=config.rows,
                BLOCK_COLUMNS=config.columns,
                STAGES=config.stages,
                num_warps=config.warps,
            )
    return dz, partial.sum(0).to(like.dtype), h
