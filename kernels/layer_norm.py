"""Layer normalisation over the last axis, with an optional residual input: forward and backward.

Forward, one pass over the data: a program holds a few whole rows in registers, takes the mean, then the centred squares.
Backward, one pass over the data: programs that stay resident walk over the rows, write dx (the residual stream's gradient
added in), and keep their share of dγ and dβ in registers; a second, small kernel adds the shares up in a fixed order.
Loads are plain `tl.load`: a TMA load that feeds a reduction is miscompiled by some releases of Triton (its issue 9703).
"""

import torch
import triton
import triton.language as tl

from vit_fast.kernels.common import Target, on_device, target_of, tuned

# ---- Launch choices -------------------------------------------------------------------------------------------------

MAX_COLUMNS = 8192

# By padded columns: (rows a program, warps). Forward: 32 elements a thread, which is four 16-byte loads in 16 bit and 48-64
# registers. Backward: rows in flight against registers; the loop prefetches, so a program needs fewer of them.
_FORWARD = {256: (16, 4), 512: (8, 4), 1024: (4, 4), 2048: (2, 4), 4096: (1, 4), 8192: (1, 8)}
_BACKWARD = {256: (16, 4), 512: (8, 8), 1024: (4, 4), 2048: (2, 4), 4096: (1, 8), 8192: (1, 16)}
_PROGRAMS_PER_MULTIPROCESSOR = 2  # of the backward: bounds the partial sums; with the prefetch that fills the memory pipe
_MOST_STAGES = 3  # of the backward's loop: two steps are on their way while one is computed


def _blocks(table: dict, columns: int) -> tuple[int, int, int]:
    block_columns = triton.next_power_of_2(columns)
    block_rows, warps = table[max(block_columns, 256)]
    return block_rows, block_columns, warps


@tuned
def forward_config(rows: int, columns: int, target: Target) -> tuple[int, int, int]:
    """(rows a program, padded columns, warps). Fewer rows a program where they would leave multiprocessors idle."""
    block_rows, block_columns, warps = _blocks(_FORWARD, columns)
    while block_rows > 1 and rows < 2 * target.multiprocessors * block_rows:
        block_rows //= 2
    return block_rows, block_columns, warps


@tuned
def backward_config(rows: int, columns: int, itemsize: int, target: Target) -> tuple[int, int, int, int, int]:
    """(rows a step, padded columns, warps, stages, programs at most). The prefetch takes its share of the shared memory."""
    block_rows, block_columns, warps = _blocks(_BACKWARD, columns)
    programs = _PROGRAMS_PER_MULTIPROCESSOR * target.multiprocessors
    while block_rows > 1 and rows < programs * block_rows:
        block_rows //= 2
    step = 3 * block_rows * block_columns * itemsize  # dy, dtotal, total
    stages = min(_MOST_STAGES, 1 + target.shared_memory // _PROGRAMS_PER_MULTIPROCESSOR // step)
    return block_rows, block_columns, warps, stages, programs


# ---- Kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def _rows_of_tile(tile, rows, BLOCK_ROWS: tl.constexpr):
    """The outer index and the inner rows that a tile covers, both int64: a row times its stride passes 2**31."""
    tiles = tl.cdiv(rows, BLOCK_ROWS)
    outer = (tile // tiles).to(tl.int64)
    row = (tile % tiles).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    return outer, row


@triton.jit(do_not_specialize=["rows"])
def _layer_norm_fwd_kernel(
    x_ptr,  # [outer, rows, COLUMNS]
    residual_ptr,  # the same, or None
    weight_ptr,
    bias_ptr,
    y_ptr,  # contiguous, as are total, mean and rstd
    total_ptr,  # None without a residual
    mean_ptr,  # its dtype is the accumulator's
    rstd_ptr,
    rows,
    x_outer_stride,
    x_row_stride,
    residual_outer_stride,
    residual_row_stride,
    eps,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    acc_type = mean_ptr.dtype.element_ty
    outer, row = _rows_of_tile(tl.program_id(0), rows, BLOCK_ROWS)
    cols = tl.arange(0, BLOCK_COLUMNS)
    in_rows, in_cols = row < rows, (cols < COLUMNS)[None, :]
    mask = in_rows[:, None] & in_cols
    out_row = outer * rows + row
    out = out_row[:, None] * COLUMNS + cols[None, :]

    x_offsets = outer * x_outer_stride + row[:, None] * x_row_stride + cols[None, :]
    x = tl.load(x_ptr + x_offsets, mask=mask, other=0.0).to(acc_type)
    if residual_ptr is not None:
        residual_offsets = outer * residual_outer_stride + row[:, None] * residual_row_stride + cols[None, :]
        x += tl.load(residual_ptr + residual_offsets, mask=mask, other=0.0).to(acc_type)
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + out, total, mask=mask)
        x = total.to(acc_type)  # what is normalised is what was stored: the backward reads it again

    # Two passes over the registers. The second also takes what rounding left of the mean (the corrected two-pass algorithm of
    # Chan, Golub and LeVeque 1983): without it a mean of 1e3 costs a row of tiny variance most of its digits.
    rough = tl.sum(x, 1) / COLUMNS
    centred = tl.where(in_cols, x - rough[:, None], 0.0)
    rest = tl.sum(centred, 1) / COLUMNS
    variance = tl.maximum(tl.sum(centred * centred, 1) / COLUMNS - rest * rest, 0.0)
    rstd = 1.0 / tl.sqrt(variance + eps)
    tl.store(mean_ptr + out_row, rough + rest, mask=in_rows)
    tl.store(rstd_ptr + out_row, rstd, mask=in_rows)

    weight = tl.load(weight_ptr + cols, mask=cols < COLUMNS, other=0.0).to(acc_type)
    bias = tl.load(bias_ptr + cols, mask=cols < COLUMNS, other=0.0).to(acc_type)
    y = (centred - rest[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["outers", "rows"])
def _layer_norm_bwd_kernel(
    dy_ptr,  # [outers, rows, COLUMNS], as are dtotal and total
    dtotal_ptr,  # or None
    total_ptr,
    weight_ptr,
    mean_ptr,  # its dtype is the accumulator's
    rstd_ptr,
    dx_ptr,  # contiguous
    partials_ptr,  # [2, programs, COLUMNS]: each program's share of dγ and dβ
    outers,
    rows,
    dy_outer_stride,
    dy_row_stride,
    dtotal_outer_stride,
    dtotal_row_stride,
    total_outer_stride,
    total_row_stride,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    acc_type = mean_ptr.dtype.element_ty
    program, programs = tl.program_id(0), tl.num_programs(0)
    cols = tl.arange(0, BLOCK_COLUMNS)
    in_cols = cols < COLUMNS
    weight = tl.load(weight_ptr + cols, mask=in_cols, other=0.0).to(acc_type)
    dweight = tl.zeros([BLOCK_COLUMNS], acc_type)
    dbias = tl.zeros([BLOCK_COLUMNS], acc_type)

    for tile in tl.range(program, outers * tl.cdiv(rows, BLOCK_ROWS), programs, num_stages=STAGES):
        outer, row = _rows_of_tile(tile, rows, BLOCK_ROWS)
        in_rows = row < rows
        mask = in_rows[:, None] & in_cols[None, :]
        out_row = outer * rows + row

        total_offsets = outer * total_outer_stride + row[:, None] * total_row_stride + cols[None, :]
        dy_offsets = outer * dy_outer_stride + row[:, None] * dy_row_stride + cols[None, :]
        total = tl.load(total_ptr + total_offsets, mask=mask, other=0.0).to(acc_type)
        dy = tl.load(dy_ptr + dy_offsets, mask=mask, other=0.0).to(acc_type)
        mean = tl.load(mean_ptr + out_row, mask=in_rows, other=0.0)
        rstd = tl.load(rstd_ptr + out_row, mask=in_rows, other=0.0)

        # Padding holds dy = 0, and each sum below has dy as a factor.
        normalised = (total - mean[:, None]) * rstd[:, None]
        dweight += tl.sum(dy * normalised, 0)
        dbias += tl.sum(dy, 0)
        dnormalised = dy * weight[None, :]
        along_row = tl.sum(dnormalised * normalised, 1) / COLUMNS
        mean_of = tl.sum(dnormalised, 1) / COLUMNS
        dx = (dnormalised - mean_of[:, None] - normalised * along_row[:, None]) * rstd[:, None]
        if dtotal_ptr is not None:
            dtotal_offsets = outer * dtotal_outer_stride + row[:, None] * dtotal_row_stride + cols[None, :]
            dx += tl.load(dtotal_ptr + dtotal_offsets, mask=mask, other=0.0).to(acc_type)
        tl.store(dx_ptr + out_row[:, None] * COLUMNS + cols[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)

    share = partials_ptr + program.to(tl.int64) * COLUMNS + cols
    tl.store(share, dweight, mask=in_cols)
    tl.store(share + programs.to(tl.int64) * COLUMNS, dbias, mask=in_cols)


@triton.jit(do_not_specialize=["programs"])
def _layer_norm_bwd_sum_kernel(
    partials_ptr,  # [2, programs, COLUMNS]
    dweight_ptr,
    dbias_ptr,
    programs,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_cols = cols < COLUMNS
    acc = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], partials_ptr.dtype.element_ty)
    first = tl.program_id(1) * programs
    for start in range(0, programs, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        mask = (row < programs)[:, None] & in_cols[None, :]
        acc += tl.load(partials_ptr + (first + row)[:, None] * COLUMNS + cols[None, :], mask=mask, other=0.0)
    result = tl.sum(acc, 0)
    if tl.program_id(1) == 0:
        tl.store(dweight_ptr + cols, result.to(dweight_ptr.dtype.element_ty), mask=in_cols)
    else:
        tl.store(dbias_ptr + cols, result.to(dbias_ptr.dtype.element_ty), mask=in_cols)


# ---- Launchers ------------------------------------------------------------------------------------------------------


def refuses_strides(x: torch.Tensor) -> str | None:
    """Why the kernels can't walk over this tensor's rows; None when they can."""
    if x.is_contiguous() or (x.dim() <= 3 and (x.stride(-1) == 1 or x.shape[-1] == 1)):
        return None
    got = f"shape {list(x.shape)}, strides {x.stride()}"
    return f"it takes contiguous tensors, or up to three axes with contiguous rows, got {got}"


def _walk(*tensors: torch.Tensor | None) -> tuple[int, int, list[int]]:
    """(outer size, rows in each, strides): a common walk over the rows of tensors of one shape, as [outer, rows, columns].

    The strides are (outer, row) of each tensor in turn, zeros for None. Contiguous tensors are one run of rows.
    """
    given = [t for t in tensors if t is not None]
    shape = given[0].shape
    if all(t.is_contiguous() for t in given):
        return 1, shape[:-1].numel(), [s for t in tensors for s in ((0, 0) if t is None else (0, shape[-1]))]
    as_three = [None if t is None else t[(None,) * (3 - t.dim())] for t in tensors]
    outers, rows = next(t for t in as_three if t is not None).shape[:2]
    if rows == 1:  # [B, 1, D], a slice of one token: B is the axis to walk along
        return 1, outers, [s for t in as_three for s in ((0, 0) if t is None else (0, t.stride(0)))]
    return outers, rows, [s for t in as_three for s in ((0, 0) if t is None else t.stride()[:2])]


def layer_norm_fwd(x, weight, bias, eps, residual):
    """(y, total, mean, rstd) for x [..., D]; total = x + residual, or empty(0) when the residual is None.

    y has the dtype of the weight, total that of x + residual; mean and rstd [...] are float32 (float64 for float64).
    """
    columns = x.shape[-1]
    y = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    total_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    total = torch.empty(0 if residual is None else x.shape, dtype=total_dtype, device=x.device)
    mean = torch.empty(x.shape[:-1], dtype=torch.promote_types(total_dtype, torch.float32), device=x.device)
    rstd = torch.empty_like(mean)
    if x.numel() == 0:
        return y, total, mean, rstd
    outers, rows, strides = _walk(x, residual)
    block_rows, block_columns, warps = forward_config(outers * rows, columns, target_of(x.device))
    with on_device(x):
        _layer_norm_fwd_kernel[(outers * triton.cdiv(rows, block_rows),)](
            x, residual, weight, bias, y, None if residual is None else total, mean, rstd,
            rows, *strides, eps,
            COLUMNS=columns, BLOCK_ROWS=block_rows, BLOCK_COLUMNS=block_columns, num_warps=warps,
        )  # fmt: skip
    return y, total, mean, rstd


def layer_norm_bwd(dy, total, weight, mean, rstd, dtotal):
    """(dx, dweight, dbias) for dy [..., D] and the gradient dtotal of the sum, or None; dx has the dtype of total."""
    columns = total.shape[-1]
    dx = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    if total.numel() == 0:
        return dx, torch.zeros_like(weight), torch.zeros_like(weight)
    # Gradients come in whatever layout the next operation's derivative left, expanded ones included; these are the rare ones.
    dy = dy if refuses_strides(dy) is None else dy.contiguous()
    dtotal = dtotal if dtotal is None or refuses_strides(dtotal) is None else dtotal.contiguous()
    outers, rows, strides = _walk(dy, dtotal, total)
    block_rows, block_columns, warps, stages, programs = backward_config(
        outers * rows, columns, max(dy.element_size(), total.element_size()), target_of(total.device)
    )
    programs = min(programs, outers * triton.cdiv(rows, block_rows))
    partials = torch.empty(2, programs, columns, dtype=mean.dtype, device=total.device)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
    with on_device(total):
        _layer_norm_bwd_kernel[(programs,)](
            dy, dtotal, total, weight, mean, rstd, dx, partials,
            outers, rows, *strides,
            COLUMNS=columns, BLOCK_ROWS=block_rows, BLOCK_COLUMNS=block_columns, STAGES=stages, num_warps=warps,
        )  # fmt: skip
        _layer_norm_bwd_sum_kernel[(triton.cdiv(columns, 32), 2)](
            partials, dweight, dbias, programs, COLUMNS=columns, BLOCK_ROWS=64, BLOCK_COLUMNS=32, num_warps=4
        )
    return dx, dweight, dbias
