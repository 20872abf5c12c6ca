r"""A matrix product with its epilogue: bias, GELU, dropout and residual forward; their derivative backward.

.. math::

    y = s \, m \circ \operatorname{act}(x W^\top + b) + r \qquad
    dz = m \circ (dy \, W) \circ \operatorname{act}'(z), \quad db = \sum_{rows} dz, \quad h = m \circ \operatorname{act}(z)

m is dropout's mask and s stochastic depth's, one number an image, see `dropout`: the backward pass draws m again.

One program computes one tile of the result. Tiles are small enough that a multiprocessor holds two programs, so that one's
epilogue runs beside the other's product; a persistent kernel would need Triton's warp specialisation for the same overlap.
Operands come through plain pointers (cp.async on NVIDIA): tensor descriptors would ask every caller of the library for an
allocator or every launch for an encoded descriptor, and refuse rows that are not 16-byte aligned.
Programs walk the tiles in groups of rows, so that what runs at the same time shares its operands in L2.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vit_fast.kernels.common import Target, dot, dot_precision, on_device, target_of, tuned
from vit_fast.kernels.dropout import dropped, image_factors, kept_strip, kept_words
from vit_fast.kernels.gelu import accumulator, gelu, gelu_derivative, takes_erf

# ---- Launch choices -------------------------------------------------------------------------------------------------


class Config(NamedTuple):
    """A tile of the result [rows, columns], the depth of one step of the product, and how the program runs."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# By what the target is and the operands' size: tiles, most work a byte first. Compiled by Triton 3.6 and 3.9, the 16-bit ones
# do not spill at the shapes of ViT-Ti to g, and two programs of each fit on a multiprocessor with wide shared memory. Eight
# warps on the first would leave room for one dgelu program on sm_90. IEEE float32 spills 16 bytes here and there.
_TILES = {
    ("wide", 2): (Config(128, 128, 64, 4, 3), Config(64, 64, 64, 4, 4), Config(64, 32, 128, 4, 4)),
    ("narrow", 2): (Config(128, 128, 32, 4, 4), Config(64, 64, 64, 4, 3), Config(64, 32, 128, 4, 3)),
    ("hip", 2): (Config(128, 128, 64, 4, 2), Config(64, 64, 64, 4, 2), Config(64, 32, 128, 4, 2)),
    ("wide", 4): (Config(128, 64, 32, 4, 3), Config(64, 64, 32, 4, 3), Config(64, 32, 32, 4, 3)),
    ("narrow", 4): (Config(128, 64, 32, 4, 3), Config(64, 64, 32, 4, 3), Config(64, 32, 32, 4, 3)),
    ("hip", 4): (Config(128, 64, 32, 4, 2), Config(64, 64, 32, 4, 2), Config(64, 32, 32, 4, 2)),
}
_WIDE = 128 * 1024  # bytes of shared memory: enough for two programs with a depth of 64 on one multiprocessor
_GROUP = 8  # row blocks walked together


@tuned
def product_config(rows: int, columns: int, depth: int, dtype: torch.dtype, target: Target) -> Config:
    """The launch of a product [rows, depth] × [depth, columns].

    The first tile that gives every multiprocessor one and pads the columns by an eighth at most; else the last.
    """
    kind = "hip" if target.backend == "hip" else "wide" if target.shared_memory >= _WIDE else "narrow"
    tiles = _TILES[kind, min(dtype.itemsize, 4)]
    for config in tiles:
        column_blocks = triton.cdiv(columns, config.columns)
        enough = triton.cdiv(rows, config.rows) * column_blocks >= target.multiprocessors
        if enough and 8 * column_blocks * config.columns <= 9 * columns:
            return config
    return tiles[-1]


# ---- The product ----------------------------------------------------------------------------------------------------


@triton.jit
def _tile(rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """This program's block of rows and block of columns: down a group of row blocks, then to the next block of columns."""
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    group_tiles = GROUP * tl.cdiv(columns, BLOCK_COLUMNS)
    first = tl.program_id(0) // group_tiles * GROUP
    group_rows = tl.minimum(row_blocks - first, GROUP)
    within = tl.program_id(0) % group_tiles
    return first + within % group_rows, within // group_rows


@triton.jit
def _product(
    x_ptr,
    weight_ptr,
    row,
    col,
    rows,
    columns,
    depth,
    x_row_stride,
    weight_column_stride,
    weight_depth_stride,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
):
    """Σ_k x[row, k] weight[col, k], accumulated in ACC. Rows past the end repeat the last one, columns past it are 0."""
    k = tl.arange(0, BLOCK_DEPTH)
    # A row is clamped rather than masked: it costs nothing in the loop. Columns may be the contiguous axis of the weight,
    # where a clamp would end vector loads and a mask does not.
    x_ptrs = x_ptr + tl.minimum(row, rows - 1)[:, None] * x_row_stride + k[None, :]
    weight_ptrs = weight_ptr + col[None, :] * weight_column_stride + k.to(tl.int64)[:, None] * weight_depth_stride
    weight_step = tl.cast(weight_depth_stride, tl.int64) * BLOCK_DEPTH
    acc = tl.zeros([row.shape[0], col.shape[0]], ACC)
    for start in range(0, depth, BLOCK_DEPTH):
        if EVEN_DEPTH:
            x = tl.load(x_ptrs)
            if EVEN_COLUMNS:
                weight = tl.load(weight_ptrs)
            else:
                weight = tl.load(weight_ptrs, (col < columns)[None, :], 0.0)
        else:
            inside = k < depth - start
            x = tl.load(x_ptrs, inside[None, :], 0.0)
            weight = tl.load(weight_ptrs, inside[:, None] & (col < columns)[None, :], 0.0)
        acc = dot(x, weight, acc, PRECISION)
        x_ptrs += BLOCK_DEPTH
        weight_ptrs += weight_step
    return acc


@triton.jit
def _halves(acc):
    return tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, acc.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _strips(acc):
    """The tile as a tuple of strips of 32 columns. The epilogue takes one after the other: on the whole tile it spills."""
    tl.static_assert(acc.shape[1] == 32 or acc.shape[1] == 64 or acc.shape[1] == 128)
    if acc.shape[1] == 32:
        return (acc,)
    elif acc.shape[1] == 64:
        return _halves(acc)
    else:
        left, right = _halves(acc)
        return _halves(left) + _halves(right)


# ---- Forward --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "dropout_limit", "depth_limit", "image_rows"])
def _linear_fwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    seed_ptr,  # None where nothing is dropped
    y_ptr,
    z_ptr,
    rows,
    columns,
    depth,
    x_row_stride,
    weight_column_stride,
    weight_depth_stride,
    residual_row_stride,
    y_row_stride,
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
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_block, column_block = _tile(rows, columns, BLOCK_ROWS, BLOCK_COLUMNS, GROUP)
    row = row_block.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # row * stride passes 2**31
    col = column_block.to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    acc = _product(
        x_ptr,
        weight_ptr,
        row,
        col,
        rows,
        columns,
        depth,
        x_row_stride,
        weight_column_stride,
        weight_depth_stride,
        ACC,
        PRECISION,
        BLOCK_DEPTH,
        EVEN_COLUMNS,
        EVEN_DEPTH,
    )
    first_column = column_block * BLOCK_COLUMNS
    if STOCHASTIC_DEPTH:
        factor = image_factors(seed_ptr, row, image_rows, depth_limit, depth_scale)[:, None]
    if DROPOUT:
        words = kept_words(seed_ptr, row, first_column, 1, dropout_limit)
    strips = _strips(acc)
    for i in tl.static_range(len(strips)):
        col = first_column + i * 32 + tl.arange(0, 32)
        mask = (row < rows)[:, None] & (col < columns)[None, :]
        offsets = row[:, None] * y_row_stride + col[None, :]
        y = strips[i]
        if bias_ptr is not None:
            y += tl.load(bias_ptr + col, col < columns, 0.0).to(ACC)[None, :]
        if z_ptr is not None:
            tl.store(z_ptr + offsets, y.to(z_ptr.dtype.element_ty), mask)
        if ACTIVATION is not None:
            y = gelu(y, ACTIVATION, ERF)
        if DROPOUT:
            y = tl.where(kept_strip(words, first_column, i), y * dropout_scale, 0.0)
        if STOCHASTIC_DEPTH:
            y = tl.where(factor != 0, y * factor, 0.0)
        if residual_ptr is not None:
            y += tl.load(residual_ptr + row[:, None] * residual_row_stride + col[None, :], mask, 0.0).to(ACC)
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask)


def linear_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    residual: torch.Tensor | None,
    keep_preactivation: bool,
    dropout_p: float = 0.0,
    stochastic_depth_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = s m ∘ act(x Wᵀ + b) + residual, and z = x Wᵀ + b if it is to be kept.

    :param x: [..., K], its leading axes one stride apart, its last axis contiguous; :param weight: W, [M, K].
    :param bias: [M], contiguous, or None; :param residual: [..., M], strides as x, or None. It may be of a wider dtype.
    :param activation: None, "gelu" or "gelu_tanh".
    :param dropout_p, stochastic_depth_p: in [0, 1]; the latter for each entry of x's first axis.
    :param seed: int64 [1] on x's device; None where nothing is dropped.
    :returns: y [..., M] in the wider dtype of x and residual; z [..., M] in x's dtype, or [0].
    """
    columns, depth = weight.shape
    rows = x.numel() // depth
    shape = (*x.shape[:-1], columns)
    y = x.new_empty(shape, dtype=x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype))
    z = x.new_empty(shape if keep_preactivation else 0)
    if rows == 0:
        return y, z
    config = product_config(rows, columns, depth, x.dtype, target_of(x.device))
    tensors = (x, weight, bias, residual, seed, y, z if keep_preactivation else None)
    residual_row_stride = 0 if residual is None else residual.view(rows, columns).stride(0)
    strides = (x.view(rows, depth).stride(0), *weight.stride(), residual_row_stride, columns)
    with on_device(x):
        _linear_fwd_kernel[(triton.cdiv(rows, config.rows) * triton.cdiv(columns, config.columns),)](
            *tensors,
            rows,
            columns,
            depth,
            *strides,
            *dropped(dropout_p, stochastic_depth_p, x),
            DROPOUT=dropout_p > 0,
            STOCHASTIC_DEPTH=stochastic_depth_p > 0,
            **_constants(config, columns, depth, x.dtype, activation),
        )
    return y, z


def _constants(config: Config, columns: int, depth: int, dtype: torch.dtype, activation: str | None) -> dict:
    return dict(
        ACTIVATION=activation,
        ERF=takes_erf(dtype),
        ACC=accumulator(dtype),
        PRECISION=dot_precision(dtype),
        BLOCK_ROWS=config.rows,
        BLOCK_COLUMNS=config.columns,
        BLOCK_DEPTH=config.depth,
        EVEN_COLUMNS=columns % config.columns == 0,
        EVEN_DEPTH=depth % config.depth == 0,
        GROUP=_GROUP,
        num_warps=config.warps,
        num_stages=config.stages,
    )


# ---- Backward -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "dropout_limit"])
def _linear_dgelu_bwd_kernel(
    dy_ptr,
    weight_ptr,
    z_ptr,
    seed_ptr,  # None without dropout
    dz_ptr,
    h_ptr,  # None where it is not wanted
    partial_ptr,
    rows,
    columns,
    depth,
    dy_row_stride,
    weight_column_stride,
    weight_depth_stride,
    z_row_stride,
    dropout_limit,
    dropout_scale,
    ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr,
    ERF: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_block, column_block = _tile(rows, columns, BLOCK_ROWS, BLOCK_COLUMNS, GROUP)
    row = row_block.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # row * stride passes 2**31
    col = column_block.to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    acc = _product(
        dy_ptr,
        weight_ptr,
        row,
        col,
        rows,
        columns,
        depth,
        dy_row_stride,
        weight_column_stride,
        weight_depth_stride,
        ACC,
        PRECISION,
        BLOCK_DEPTH,
        EVEN_COLUMNS,
        EVEN_DEPTH,
    )
    first_column = column_block * BLOCK_COLUMNS
    if DROPOUT:
        words = kept_words(seed_ptr, row, first_column, 1, dropout_limit)
    strips = _strips(acc)
    for i in tl.static_range(len(strips)):
        col = first_column + i * 32 + tl.arange(0, 32)
        mask = (row < rows)[:, None] & (col < columns)[None, :]
        offsets = row[:, None] * z_row_stride + col[None, :]
        z = tl.load(z_ptr + offsets, mask, 0.0).to(ACC)
        dz = strips[i] * gelu_derivative(z, ACTIVATION, ERF)
        # Rows past the end hold a copy of the last one: they must not reach the sum.
        kept = (row < rows)[:, None]
        if DROPOUT:
            kept &= kept_strip(words, first_column, i)
            dz *= dropout_scale
        if h_ptr is not None:
            h = gelu(z, ACTIVATION, ERF)
            if DROPOUT:
                h = tl.where(kept, h * dropout_scale, 0.0)
            tl.store(h_ptr + offsets, h.to(h_ptr.dtype.element_ty), mask)
        dz = tl.where(kept, dz, 0.0)
        tl.store(dz_ptr + offsets, dz.to(dz_ptr.dtype.element_ty), mask)
        tl.store(partial_ptr + row_block.to(tl.int64) * columns + col, tl.sum(dz, 0), col < columns)


def linear_dgelu_bwd(
    dy: torch.Tensor,
    weight: torch.Tensor,
    z: torch.Tensor,
    activation: str,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    keep_activation: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dz = m ∘ (dy W) ∘ act'(z), the gradient of z where y = h Wᵀ, h = m ∘ act(z); its sum over the rows; h on request.

    :param dy: [..., D], contiguous; :param weight: W, [D, F]; :param z: [..., F], contiguous. One dtype.
    :param dropout_p, seed: as the forward pass had them.
    :returns: dz [..., F], dbias [F], and h [..., F] or [0], in that dtype. The sum is over unrounded values, in float32, in a
        fixed order.
    """
    depth, columns = weight.shape
    rows = z.numel() // columns
    dz, h = torch.empty_like(z), z.new_empty(z.shape if keep_activation else 0)
    config = product_config(rows, columns, depth, z.dtype, target_of(z.device))
    row_blocks = triton.cdiv(rows, config.rows)
    # One row a block of rows: 1/128 of dz's elements for the large tiles.
    partial = z.new_empty((row_blocks, columns), dtype=torch.promote_types(z.dtype, torch.float32))
    tensors = (dy, weight, z, seed, dz, h if keep_activation else None, partial)
    strides = (depth, *reversed(weight.stride()), columns)
    if rows > 0:
        with on_device(z):
            _linear_dgelu_bwd_kernel[(row_blocks * triton.cdiv(columns, config.columns),)](
                *tensors,
                rows,
                columns,
                depth,
                *strides,
                *dropped(dropout_p, 0.0, dy)[:2],
                DROPOUT=dropout_p > 0,
                **_constants(config, columns, depth, z.dtype, activation),
            )
    return dz, partial.sum(0).to(z.dtype), h
