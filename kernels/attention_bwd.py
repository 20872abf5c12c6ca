"""The gradient of attention, packed [B, N, 3, H, d] as the input is.

With P the probabilities, M what dropout multiplies them with, dP' the gradient that came in for the probabilities themselves,
δ = rowsum(dO ∘ O) + rowsum(P ∘ dP'):

    dV = (M ∘ P)ᵀ dO      dS = P ∘ (M ∘ (dO Vᵀ) + dP' − δ)      dQ = scale · dS K      dK = scale · dSᵀ Q

P comes back from the saved log Σ exp, M from its seed. Two kinds of programs, each of which keeps a tile and walks over the
sequence: one for the dQ of some queries, one for the dK and dV of some keys. That makes seven products instead of five, but
nothing is added up across programs: no atomics, and the same bits in every run. Programs of one (image, head) follow each other
in one launch, so that each input crosses the memory bus once and the others find it in the L2 cache; the programs for keys then
take δ from dO and O themselves. Where products cost more than bytes, and where one kernel of both kinds would spill, there are
two launches, the first of which leaves δ to the second.

With dP', and for float32, δ is rowsum(P ∘ dP) / rowsum(P) in one more walk over the keys, where dP = M ∘ (dO Vᵀ) + dP': the
rounding errors of dP and of P are then in both sides of dP − δ and cancel, where those of the stored O would not.

One program per (image, head), with all of it resident and two loops, spills: at least 184 bytes on sm_90 at N=197, d=64.
"""

import torch
import triton
import triton.language as tl

from vit_fast.kernels.attention_tiles import (
    HEADS_AND_STRIDES,
    add_product,
    dtypes_of,
    exp_shifted,
    in_elements,
    load_tile,
    lse_shift,
    masked_scores,
    reads_shared_memory,
    row_dot,
    rows_and_warps,
    rows_by_rows,
    scale_tile,
    segment_tokens,
    split,
    store_tile,
    stride_unit,
    takes_tf32_from_shared_memory,
    zero_tile,
)
from vit_fast.kernels.common import Target, on_device, target_of, tuned
from vit_fast.kernels.dropout import keep_limit, keep_scale, kept_probabilities

# ---- Launch choices -------------------------------------------------------------------------------------------------

_ONE_LAUNCH = 1024  # tokens


def in_one_launch(tokens: int, head: int, itemsize: int, target: Target) -> bool:
    """Whether one launch computes both kinds of gradients. It would spill with operands in registers and over 64 channels."""
    return itemsize == 2 and tokens <= _ONE_LAUNCH and (reads_shared_memory(target) or sum(split(head, 2)) <= 64)


@tuned
def backward_config(gradients: str, tokens: int, head: int, itemsize: int, target: Target) -> dict:
    """What the backward for "queries", "keys" or "both" is launched with. TAIL cuts the tokens left by whole steps.

    Compiled for sm_80, 90 and 100, none of the 16-bit choices spills for heads of up to 96 channels. TF32 takes 64 rows where
    that spills no more than 32 do: for keys, whose products have the queries of a step as rows, too, not with 64 channels.
    """
    pieces = split(head, 2)
    width, in_memory = sum(pieces), reads_shared_memory(target)
    tf32 = takes_tf32_from_shared_memory(itemsize, target)
    if tf32 and gradients == "queries" and width <= 128:
        rows, step, warps, stages = 64, 32, 4, 1
    elif tf32 and gradients == "keys" and 64 < width <= 96:
        rows, step, warps, stages = 64, 64, 8, 1
    elif itemsize > 2:
        rows, step, warps, stages = 32, 32, 4, 1
    else:
        rows, warps = rows_and_warps(tokens)
        step = 64 if in_memory and (width <= 64 or target.arch >= 100 and width <= 96) else 32
        step = step if in_memory or width <= 80 else 16
        stages = 2
    tail = split(tokens % step, 2, step)
    return {"PIECES": pieces, "TAIL": tail, "ROWS": rows, "STEP": step, "num_warps": warps, "num_stages": stages}


# ---- Kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def _load_shift(lse_ptr, rows, N, scale, ACC: tl.constexpr, EXACT: tl.constexpr):
    return lse_shift(tl.load(lse_ptr + rows, mask=rows < N, other=0.0), scale, ACC, EXACT)


@triton.jit
def _add_dprobs(dp, dprobs, rows, cols, N, DPROBS: tl.constexpr):
    """dp + dP', rows and cols broadcastable against each other; dP' is zero beyond its rows and beyond key N."""
    if DPROBS:
        dprobs_ptr, dprobs_rows, row_stride, col_stride, factor = dprobs
        offsets = rows.to(tl.int64) * row_stride + cols.to(tl.int64) * col_stride
        dp += tl.load(dprobs_ptr + offsets, mask=(rows < dprobs_rows) & (cols < N), other=0.0).to(dp.dtype) * factor
    return dp


@triton.jit
def _rows_and_dp(
    q, do, k, v, high, low, rows, cols, N, plane, scale, dropout, dprobs,
    DROPOUT: tl.constexpr, DPROBS: tl.constexpr, MASKED: tl.constexpr,
    ACC: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(P, M ∘ (dO Vᵀ) + dP') of the queries ``rows`` and the keys ``cols``."""
    s = masked_scores(q, k, cols, N, MASKED, ACC, PRECISION)
    p = exp_shifted(s, high[:, None], low[:, None], scale, EXACT)
    dp = rows_by_rows(do, v, ACC, PRECISION)
    if DROPOUT:
        seed_ptr, dropout_limit, dropout_scale = dropout
        dp = tl.where(kept_probabilities(seed_ptr, plane, rows[:, None], cols[None, :], dropout_limit), dp * dropout_scale, 0.0)
    return p, _add_dprobs(dp, dprobs, rows[:, None], cols[None, :], N, DPROBS)


@triton.jit
def _take_keys(
    dq, q, do, k_ptr, v_ptr, high, low, delta, rows, cols, N, token_stride, plane, scale, dropout, dprobs,
    HEAD: tl.constexpr, PIECES: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr, DPROBS: tl.constexpr,
    ACC: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Load the keys ``cols`` and add their share to a query tile's dQ."""
    k = load_tile(k_ptr, cols, token_stride, N, HEAD, PIECES, MASKED)
    v = load_tile(v_ptr, cols, token_stride, N, HEAD, PIECES, MASKED)
    p, dp = _rows_and_dp(
        q, do, k, v, high, low, rows, cols, N, plane, scale, dropout, dprobs, DROPOUT, DPROBS, MASKED, ACC, EXACT, PRECISION
    )  # fmt: skip
    return add_product(dq, p * (dp - delta[:, None]), k, PRECISION)


@triton.jit
def _query_gradient(
    dout_ptr, qkv_ptr, out_ptr, lse_ptr, dqkv_ptr, delta_ptr, N, H, dout_token_stride, token_stride, part_stride,
    plane, start, scale, dropout, dprobs,
    HEAD: tl.constexpr, PIECES: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    KEEP_DELTA: tl.constexpr, DROPOUT: tl.constexpr, DPROBS: tl.constexpr,
    ACC: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of some queries; the pointers are at this (image, head) already."""
    rows = start + tl.arange(0, ROWS)
    k_ptr = qkv_ptr + part_stride
    v_ptr = k_ptr + part_stride
    q = load_tile(qkv_ptr, rows, token_stride, N, HEAD, PIECES, True)
    do = load_tile(dout_ptr, rows, dout_token_stride, N, HEAD, PIECES, True)
    high, low = _load_shift(lse_ptr, rows, N, scale, ACC, EXACT)
    if DPROBS or EXACT:
        delta = tl.zeros([ROWS], dtype=ACC)
        total = tl.zeros([ROWS], dtype=ACC)
        for step in range(0, N, STEP):
            cols = step + tl.arange(0, STEP)
            k = load_tile(k_ptr, cols, token_stride, N, HEAD, PIECES, True)
            v = load_tile(v_ptr, cols, token_stride, N, HEAD, PIECES, True)
            p, dp = _rows_and_dp(
                q, do, k, v, high, low, rows, cols, N, plane, scale, dropout, dprobs,
                DROPOUT, DPROBS, True, ACC, EXACT, PRECISION,
            )  # fmt: skip
            delta += tl.sum(p * dp, 1)
            total += tl.sum(p, 1)
        delta /= total
    else:
        delta = row_dot(do, load_tile(out_ptr, rows, H * HEAD, N, HEAD, PIECES, True), ACC)
    if KEEP_DELTA:
        tl.store(delta_ptr + rows, delta, mask=rows < N)
    dq = zero_tile(ROWS, PIECES, ACC)
    full = N // STEP * STEP  # tokens in unmasked steps; the rest is TAIL
    for step in range(0, full, STEP):
        dq = _take_keys(
            dq, q, do, k_ptr, v_ptr, high, low, delta, rows, step + tl.arange(0, STEP), N, token_stride, plane, scale,
            dropout, dprobs, HEAD, PIECES, False, DROPOUT, DPROBS, ACC, EXACT, PRECISION,
        )  # fmt: skip
    for i in tl.static_range(len(TAIL)):
        dq = _take_keys(
            dq, q, do, k_ptr, v_ptr, high, low, delta, rows, full + segment_tokens(TAIL, i), N, token_stride, plane, scale,
            dropout, dprobs, HEAD, PIECES, i == len(TAIL) - 1, DROPOUT, DPROBS, ACC, EXACT, PRECISION,
        )  # fmt: skip
    store_tile(dqkv_ptr, rows, 3 * H * HEAD, N, scale_tile(dq, scale), HEAD, PIECES)


@triton.jit
def _take_queries(
    dk, dv, k, v, dout_ptr, qkv_ptr, out_ptr, lse_ptr, delta_ptr, rows, cols, N, H, dout_token_stride, token_stride,
    plane, scale, dropout, dprobs,
    HEAD: tl.constexpr, PIECES: tl.constexpr, MASKED: tl.constexpr, READ_DELTA: tl.constexpr,
    DROPOUT: tl.constexpr, DPROBS: tl.constexpr, ACC: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Load the queries ``rows`` and add their share to a key tile's dK and dV. P and dP lie transposed, [keys, queries].

    Queries beyond N need no further mask: their q, dO, shift and δ are zeros, so they add zero.
    """
    q = load_tile(qkv_ptr, rows, token_stride, N, HEAD, PIECES, MASKED)
    do = load_tile(dout_ptr, rows, dout_token_stride, N, HEAD, PIECES, MASKED)
    if READ_DELTA:
        delta = tl.load(delta_ptr + rows, mask=rows < N, other=0.0)
    else:
        delta = row_dot(do, load_tile(out_ptr, rows, H * HEAD, N, HEAD, PIECES, MASKED), ACC)
    high, low = _load_shift(lse_ptr, rows, N, scale, ACC, EXACT)
    if EXACT:  # the very products that made δ: their rounding errors cancel in dP − δ
        s = tl.trans(rows_by_rows(q, k, ACC, PRECISION))
        dp = tl.trans(rows_by_rows(do, v, ACC, PRECISION))
    else:
        s = rows_by_rows(k, q, ACC, PRECISION)
        dp = rows_by_rows(v, do, ACC, PRECISION)
    p = exp_shifted(s, high[None, :], low[None, :], scale, EXACT)
    if DROPOUT:
        seed_ptr, dropout_limit, dropout_scale = dropout
        keep = kept_probabilities(seed_ptr, plane, rows[None, :], cols[:, None], dropout_limit)
        dv = add_product(dv, tl.where(keep, p * dropout_scale, 0.0), do, PRECISION)
        dp = tl.where(keep, dp * dropout_scale, 0.0)
    else:
        dv = add_product(dv, p, do, PRECISION)
    dp = _add_dprobs(dp, dprobs, rows[None, :], cols[:, None], N, DPROBS)
    return add_product(dk, p * (dp - delta[None, :]), q, PRECISION), dv


@triton.jit
def _key_gradient(
    dout_ptr, qkv_ptr, out_ptr, lse_ptr, dqkv_ptr, delta_ptr, N, H, dout_token_stride, token_stride, part_stride,
    plane, start, scale, dropout, dprobs,
    HEAD: tl.constexpr, PIECES: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    READ_DELTA: tl.constexpr, DROPOUT: tl.constexpr, DPROBS: tl.constexpr,
    ACC: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of some keys; the pointers are at this (image, head) already."""
    cols = start + tl.arange(0, ROWS)
    k = load_tile(qkv_ptr + part_stride, cols, token_stride, N, HEAD, PIECES, True)
    v = load_tile(qkv_ptr + part_stride + part_stride, cols, token_stride, N, HEAD, PIECES, True)
    dk = zero_tile(ROWS, PIECES, ACC)
    dv = zero_tile(ROWS, PIECES, ACC)
    full = N // STEP * STEP  # tokens in unmasked steps; the rest is TAIL
    for step in range(0, full, STEP):
        dk, dv = _take_queries(
            dk, dv, k, v, dout_ptr, qkv_ptr, out_ptr, lse_ptr, delta_ptr, step + tl.arange(0, STEP), cols, N, H,
            dout_token_stride, token_stride, plane, scale, dropout, dprobs,
            HEAD, PIECES, False, READ_DELTA, DROPOUT, DPROBS, ACC, EXACT, PRECISION,
        )  # fmt: skip
    for i in tl.static_range(len(TAIL)):
        dk, dv = _take_queries(
            dk, dv, k, v, dout_ptr, qkv_ptr, out_ptr, lse_ptr, delta_ptr, full + segment_tokens(TAIL, i), cols, N, H,
            dout_token_stride, token_stride, plane, scale, dropout, dprobs,
            HEAD, PIECES, i == len(TAIL) - 1, READ_DELTA, DROPOUT, DPROBS, ACC, EXACT, PRECISION,
        )  # fmt: skip
    dk_ptr = dqkv_ptr + H * HEAD
    store_tile(dk_ptr, cols, 3 * H * HEAD, N, scale_tile(dk, scale), HEAD, PIECES)
    store_tile(dk_ptr + H * HEAD, cols, 3 * H * HEAD, N, dv, HEAD, PIECES)


@triton.jit(do_not_specialize=[*HEADS_AND_STRIDES, "dout_image_stride", "dout_token_stride", "dropout_limit"])
def _attention_bwd_kernel(
    dout_ptr,  # [B, N, H, HEAD], strides of its own for B and N
    qkv_ptr,  # [B, N, 3, H, HEAD]
    out_ptr,  # [B, N, H, HEAD] contiguous
    lse_ptr,  # [B, H, N] contiguous
    seed_ptr,  # None without dropout
    dprobs_ptr,  # [B, H, dprobs_rows, N], any strides; None without
    dqkv_ptr,  # [B, N, 3, H, HEAD] contiguous
    delta_ptr,  # [B, H, N] contiguous; None for both GRADIENTS at once
    N, H, dprobs_rows,
    dout_image_stride, dout_token_stride, image_stride, token_stride, part_stride, head_stride,
    dprobs_image_stride, dprobs_head_stride, dprobs_row_stride, dprobs_col_stride,
    scale, dropout_limit, dropout_scale, dprobs_scale,
    GRADIENTS: tl.constexpr,  # "queries" (leaves δ), "keys" (takes δ), "both"
    UNIT: tl.constexpr,  # of the strides of dout and qkv
    HEAD: tl.constexpr, PIECES: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    DROPOUT: tl.constexpr, DPROBS: tl.constexpr, ACC: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(N, ROWS)
    programs = 2 * tiles if GRADIENTS == "both" else tiles  # of one (image, head)
    plane = tl.program_id(0) // programs
    tile = tl.program_id(0) % programs
    image, head = (plane // H).to(tl.int64), (plane % H).to(tl.int64)
    token_stride, part_stride = in_elements(token_stride, UNIT), in_elements(part_stride, UNIT)
    dout_token_stride = in_elements(dout_token_stride, UNIT)
    qkv_ptr += image * in_elements(image_stride, UNIT) + head * in_elements(head_stride, UNIT)
    dout_ptr += image * in_elements(dout_image_stride, UNIT) + head * HEAD
    out_ptr += (image * N * H + head) * HEAD
    dqkv_ptr += (image * N * 3 * H + head) * HEAD
    lse_ptr += plane.to(tl.int64) * N
    if GRADIENTS != "both":
        delta_ptr += plane.to(tl.int64) * N
    if DPROBS:
        dprobs_ptr += image * dprobs_image_stride + head * dprobs_head_stride
    dropout = (seed_ptr, dropout_limit, dropout_scale)
    dprobs = (dprobs_ptr, dprobs_rows, dprobs_row_stride, dprobs_col_stride, dprobs_scale)
    if GRADIENTS == "queries" or (GRADIENTS == "both" and tile < tiles):
        _query_gradient(
            dout_ptr, qkv_ptr, out_ptr, lse_ptr, dqkv_ptr, delta_ptr, N, H, dout_token_stride, token_stride, part_stride,
            plane, tile * ROWS, scale, dropout, dprobs,
            HEAD, PIECES, TAIL, ROWS, STEP, GRADIENTS == "queries", DROPOUT, DPROBS, ACC, EXACT, PRECISION,
        )  # fmt: skip
    else:
        _key_gradient(
            dout_ptr, qkv_ptr, out_ptr, lse_ptr, dqkv_ptr, delta_ptr, N, H, dout_token_stride, token_stride, part_stride,
            plane, tile % tiles * ROWS, scale, dropout, dprobs,
            HEAD, PIECES, TAIL, ROWS, STEP, GRADIENTS == "keys", DROPOUT, DPROBS, ACC, EXACT, PRECISION,
        )  # fmt: skip


# ---- Launcher -------------------------------------------------------------------------------------------------------


def _as_planes(dprobs: torch.Tensor | None, probs: str, heads: int) -> tuple[int, tuple[int, int, int, int], float]:
    """dprobs as [B, H, rows, N]: (rows, strides, the factor that makes it dP')."""
    if dprobs is None:
        return 0, (0, 0, 0, 0), 1.0
    if probs == "head_mean":  # every head has an equal share of one gradient
        image, row, col = dprobs.stride()
        return dprobs.shape[1], (image, 0, row, col), 1 / heads
    if probs == "class_token":
        image, head, col = dprobs.stride()
        return 1, (image, head, 0, col), 1.0
    return dprobs.shape[2], dprobs.stride(), 1.0


def attention_bwd(dout, qkv, out, lse, scale, dropout_p, seed, probs, dprobs):
    """The gradient by qkv, from those by the two results of `attention_fwd` and what it saved; dprobs None stands for zero.

    :param dout: [B, N, H·d].
    :param dprobs: like the probabilities, any strides.
    :returns: dqkv [B, N, 3, H, d] contiguous; every element is written, by one program.
    """
    images, tokens, _, heads, head = qkv.shape
    dqkv = qkv.new_empty(qkv.shape)
    if dqkv.numel() == 0:
        return dqkv
    if dout.stride(-1) != 1:  # the gradient of a sum is one number expanded: rare, and nothing to stream from
        dout = dout.contiguous()
    numbers, unit = dtypes_of(qkv), stride_unit(dout, qkv)
    dprobs_rows, dprobs_strides, dprobs_scale = _as_planes(dprobs, probs, heads)
    sizes = tokens, head, qkv.element_size(), target_of(qkv.device)
    if in_one_launch(*sizes) and dprobs is None:
        delta, launches = None, ("both",)
    else:
        exact = qkv.dtype == torch.float64
        delta, launches = lse.new_empty(lse.shape, dtype=torch.float64 if exact else torch.float32), ("queries", "keys")
    seed = seed if dropout_p > 0 else None
    strides = [stride // unit for stride in (*dout.stride()[:2], *qkv.stride()[:4])]
    with on_device(qkv):
        for gradients in launches:
            config = backward_config(gradients, *sizes)
            programs = triton.cdiv(tokens, config["ROWS"]) * (2 if gradients == "both" else 1)
            _attention_bwd_kernel[(images * heads * programs,)](
                dout, qkv, out, lse, seed, dprobs, dqkv, delta,
                tokens, heads, dprobs_rows, *strides, *dprobs_strides,
                scale, keep_limit(dropout_p), keep_scale(dropout_p), dprobs_scale,
                GRADIENTS=gradients, UNIT=unit, HEAD=head, DROPOUT=dropout_p > 0, DPROBS=dprobs is not None,
                **numbers, **config,
            )  # fmt: skip
    return dqkv
