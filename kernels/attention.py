"""Attention from the packed product qkv [B, N, 3, H, d] to [B, N, H·d]: the forward, and the launchers of both directions.

Two designs. *Short*: one program holds the keys and values of one (image, head) and walks over the queries; a row's softmax
is taken over all its keys at once, without rescaling; every input is read once. *Streaming*: one program per tile of queries
walks over the keys with a running maximum and sum (Milakov and Gimelshein 2018; Dao et al., FlashAttention, 2022); it has no
limit on N.

Probabilities, when asked for, come from the same program: the short one has a whole row in registers, the streaming one walks
over the keys a second time once it knows the row's sum. Their mean over the heads is a second kernel that recomputes them from
the saved sums, one program per (image, tile) that adds the heads up in order: q kᵀ is computed twice, but only N² numbers an
image are written, and without atomics.
"""

import torch
import triton
import triton.language as tl

from vit_fast.kernels.attention_bwd import attention_bwd
from vit_fast.kernels.attention_tiles import (
    HEADS_AND_STRIDES,
    add_product,
    dtypes_of,
    exp_shifted,
    in_elements,
    load_segments,
    load_tile,
    log_sum,
    lse_shift,
    masked_scores,
    max_shift,
    reads_shared_memory,
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

__all__ = ["attention_bwd", "attention_fwd"]

# ---- Launch choices -------------------------------------------------------------------------------------------------


# Scores and output of a row that 64 rows in four warps hold in registers: beyond, the compiler spills.
_SHORT = {True: 336, False: 272}  # by `reads_shared_memory`
_TF32 = 128  # channels of a head, likewise, for 64 rows of TF32


@tuned
def forward_config(tokens: int, head: int, itemsize: int, target: Target) -> dict:
    """What the forward is launched with: with SEGMENTS in the short design, with COLUMNS and TAIL in the streaming one.

    Compiled for sm_80, 90 and 100, none of the 16-bit choices spills for heads of up to 128 channels.
    """
    pieces, segments = split(head, 2), split(tokens, 3)
    width = sum(pieces)
    if itemsize == 2 and sum(segments) + width <= _SHORT[reads_shared_memory(target)]:
        return {"PIECES": pieces, "SEGMENTS": segments, "ROWS": 64, "num_warps": 4, "num_stages": 2}
    if itemsize > 2:
        rows = 64 if takes_tf32_from_shared_memory(itemsize, target) and width <= _TF32 else 32
        cols, warps, stages = 32, 4, 1
    elif width > 128 and not reads_shared_memory(target):
        rows, cols, warps, stages = 64, 32, 8, 2
    else:
        (rows, warps), cols, stages = rows_and_warps(tokens), 64, 2
    tail = split(tokens % cols, 2, cols)
    return {"PIECES": pieces, "TAIL": tail, "ROWS": rows, "COLUMNS": cols, "num_warps": warps, "num_stages": stages}


@tuned
def head_mean_config(head: int, itemsize: int, target: Target) -> dict:
    """What the kernel for the mean over the heads is launched with."""
    edge = 64 if itemsize == 2 or takes_tf32_from_shared_memory(itemsize, target) else 32
    stages = 2 if itemsize == 2 else 1
    return {"PIECES": split(head, 2), "ROWS": edge, "COLUMNS": edge, "num_warps": 4, "num_stages": stages}


# ---- Kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def _finish_rows(
    out_ptr, lse_ptr, plane, rows, N, H, acc, highest, total, scale,
    HEAD: tl.constexpr, PIECES: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Write a tile of the output and of log Σ exp; returns the factor that makes the exponentials probabilities."""
    inverse = 1.0 / total
    image, head = (plane // H).to(tl.int64), plane % H
    tile_ptr = out_ptr + image * N * H * HEAD + head * HEAD
    store_tile(tile_ptr, rows, H * HEAD, N, scale_tile(acc, inverse[:, None]), HEAD, PIECES)
    lse = log_sum(highest, total, scale, EXACT)
    tl.store(lse_ptr + plane.to(tl.int64) * N + rows, lse, mask=rows < N)
    return inverse


@triton.jit
def _store_probabilities(probs_ptr, plane, rows, cols, N, probs_rows, probabilities):
    """Into [planes, probs_rows, N]: every row, or the class token's alone."""
    row_ptr = probs_ptr + (plane.to(tl.int64) * probs_rows + rows[:, None]) * N
    mask = (rows[:, None] < probs_rows) & (cols[None, :] < N)
    tl.store(row_ptr + cols[None, :], probabilities.to(probs_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*HEADS_AND_STRIDES, "dropout_limit"])
def _attention_fwd_short_kernel(
    qkv_ptr,  # [B, N, 3, H, HEAD]
    seed_ptr,  # None without dropout
    out_ptr,  # [B, N, H, HEAD] contiguous
    lse_ptr,  # [B, H, N] contiguous
    probs_ptr,  # [B, H, probs_rows, N] contiguous
    N,
    H,
    probs_rows,
    image_stride,
    token_stride,
    part_stride,
    head_stride,
    scale,
    dropout_limit,
    dropout_scale,
    UNIT: tl.constexpr,  # of the four strides
    HEAD: tl.constexpr,
    PIECES: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PROBS: tl.constexpr,
    ACC: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    plane = tl.program_id(0)
    token_stride, part_stride = in_elements(token_stride, UNIT), in_elements(part_stride, UNIT)
    q_ptr = qkv_ptr + (plane // H) * in_elements(image_stride, UNIT) + (plane % H) * in_elements(head_stride, UNIT)
    k_ptr = q_ptr + part_stride
    keys = load_segments(k_ptr, token_stride, N, HEAD, PIECES, SEGMENTS)
    values = load_segments(k_ptr + part_stride, token_stride, N, HEAD, PIECES, SEGMENTS)
    for start_row in range(0, N, ROWS):
        rows = start_row + tl.arange(0, ROWS)
        q = load_tile(q_ptr, rows, token_stride, N, HEAD, PIECES, True)
        scores = ()
        highest = tl.full([ROWS], float("-inf"), dtype=ACC)
        for i in tl.static_range(len(SEGMENTS)):
            cols = segment_tokens(SEGMENTS, i)
            s = masked_scores(q, keys[i], cols, N, i == len(SEGMENTS) - 1, ACC, PRECISION)
            highest = tl.maximum(highest, tl.max(s, 1))
            scores = scores + (s,)
        shift = max_shift(highest, scale, EXACT)
        exponentials = ()
        total = tl.zeros([ROWS], dtype=ACC)
        acc = zero_tile(ROWS, PIECES, ACC)
        for i in tl.static_range(len(SEGMENTS)):
            p = exp_shifted(scores[i], shift[:, None], 0.0, scale, EXACT)
            total += tl.sum(p, 1)
            exponentials = exponentials + (p,)
            if DROPOUT:
                keep = kept_probabilities(seed_ptr, plane, rows[:, None], segment_tokens(SEGMENTS, i)[None, :], dropout_limit)
                p = tl.where(keep, p * dropout_scale, 0.0)
            acc = add_product(acc, p, values[i], PRECISION)
        inverse = _finish_rows(out_ptr, lse_ptr, plane, rows, N, H, acc, highest, total, scale, HEAD, PIECES, EXACT)
        if PROBS:
            if start_row < probs_rows:
                for i in tl.static_range(len(SEGMENTS)):
                    cols = segment_tokens(SEGMENTS, i)
                    p = exponentials[i] * inverse[:, None]
                    _store_probabilities(probs_ptr, plane, rows, cols, N, probs_rows, p)


@triton.jit
def _attend(
    q, highest, total, acc, k_ptr, part_stride, token_stride, rows, cols, N, plane, seed_ptr, scale, dropout_limit,
    dropout_scale, HEAD: tl.constexpr, PIECES: tl.constexpr, DROPOUT: tl.constexpr, MASKED: tl.constexpr,
    ACC: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the running softmax: take in the keys ``cols``."""
    k = load_tile(k_ptr, cols, token_stride, N, HEAD, PIECES, MASKED)
    s = masked_scores(q, k, cols, N, MASKED, ACC, PRECISION)
    new_highest = tl.maximum(highest, tl.max(s, 1))
    shift = max_shift(new_highest, scale, EXACT)
    p = exp_shifted(s, shift[:, None], 0.0, scale, EXACT)
    correction = exp_shifted(highest, shift, 0.0, scale, EXACT)
    total = total * correction + tl.sum(p, 1)
    if DROPOUT:
        keep = kept_probabilities(seed_ptr, plane, rows[:, None], cols[None, :], dropout_limit)
        p = tl.where(keep, p * dropout_scale, 0.0)
    v = load_tile(k_ptr + part_stride, cols, token_stride, N, HEAD, PIECES, MASKED)
    return new_highest, total, add_product(scale_tile(acc, correction[:, None]), p, v, PRECISION)


@triton.jit(do_not_specialize=[*HEADS_AND_STRIDES, "dropout_limit"])
def _attention_fwd_streaming_kernel(
    qkv_ptr,  # [B, N, 3, H, HEAD]
    seed_ptr,  # None without dropout
    out_ptr,  # [B, N, H, HEAD] contiguous
    lse_ptr,  # [B, H, N] contiguous
    probs_ptr,  # [B, H, probs_rows, N] contiguous
    N,
    H,
    probs_rows,
    image_stride,
    token_stride,
    part_stride,
    head_stride,
    scale,
    dropout_limit,
    dropout_scale,
    UNIT: tl.constexpr,  # of the four strides
    HEAD: tl.constexpr,
    PIECES: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PROBS: tl.constexpr,
    ACC: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles = tl.cdiv(N, ROWS)
    plane = tl.program_id(0) // tiles
    start_row = tl.program_id(0) % tiles * ROWS
    rows = start_row + tl.arange(0, ROWS)
    token_stride, part_stride = in_elements(token_stride, UNIT), in_elements(part_stride, UNIT)
    q_ptr = qkv_ptr + (plane // H) * in_elements(image_stride, UNIT) + (plane % H) * in_elements(head_stride, UNIT)
    k_ptr = q_ptr + part_stride
    q = load_tile(q_ptr, rows, token_stride, N, HEAD, PIECES, True)
    highest = tl.full([ROWS], float("-inf"), dtype=ACC)
    total = tl.zeros([ROWS], dtype=ACC)
    acc = zero_tile(ROWS, PIECES, ACC)
    full = N // COLUMNS * COLUMNS  # tokens in unmasked steps; the rest is TAIL
    for start in range(0, full, COLUMNS):
        highest, total, acc = _attend(
            q, highest, total, acc, k_ptr, part_stride, token_stride, rows, start + tl.arange(0, COLUMNS), N, plane, seed_ptr,
            scale, dropout_limit, dropout_scale, HEAD, PIECES, DROPOUT, False, ACC, EXACT, PRECISION,
        )  # fmt: skip
    for i in tl.static_range(len(TAIL)):
        highest, total, acc = _attend(
            q, highest, total, acc, k_ptr, part_stride, token_stride, rows, full + segment_tokens(TAIL, i), N, plane, seed_ptr,
            scale, dropout_limit, dropout_scale, HEAD, PIECES, DROPOUT, i == len(TAIL) - 1, ACC, EXACT, PRECISION,
        )  # fmt: skip
    inverse = _finish_rows(out_ptr, lse_ptr, plane, rows, N, H, acc, highest, total, scale, HEAD, PIECES, EXACT)
    if PROBS:
        if start_row < probs_rows:
            shift = max_shift(highest, scale, EXACT)
            for start in range(0, N, COLUMNS):
                cols = start + tl.arange(0, COLUMNS)
                k = load_tile(k_ptr, cols, token_stride, N, HEAD, PIECES, True)
                s = rows_by_rows(q, k, ACC, PRECISION)
                p = exp_shifted(s, shift[:, None], 0.0, scale, EXACT) * inverse[:, None]
                _store_probabilities(probs_ptr, plane, rows, cols, N, probs_rows, p)


@triton.jit(do_not_specialize=HEADS_AND_STRIDES)
def _attention_fwd_head_mean_kernel(
    qkv_ptr,  # [B, N, 3, H, HEAD]
    lse_ptr,  # [B, H, N] contiguous
    probs_ptr,  # [B, N, N] contiguous
    N,
    H,
    image_stride,
    token_stride,
    part_stride,
    head_stride,
    scale,
    UNIT: tl.constexpr,  # of the four strides
    HEAD: tl.constexpr,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACC: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_tiles, col_tiles = tl.cdiv(N, ROWS), tl.cdiv(N, COLUMNS)
    image = tl.program_id(0) // col_tiles // row_tiles
    rows = tl.program_id(0) // col_tiles % row_tiles * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(0) % col_tiles * COLUMNS + tl.arange(0, COLUMNS)
    mean = tl.zeros([ROWS, COLUMNS], dtype=ACC)
    token_stride, part_stride = in_elements(token_stride, UNIT), in_elements(part_stride, UNIT)
    head_stride = in_elements(head_stride, UNIT)
    q_ptr = qkv_ptr + image * in_elements(image_stride, UNIT)
    lse_ptr += image.to(tl.int64) * H * N
    for _ in range(0, H):
        q = load_tile(q_ptr, rows, token_stride, N, HEAD, PIECES, True)
        k = load_tile(q_ptr + part_stride, cols, token_stride, N, HEAD, PIECES, True)
        lse = tl.load(lse_ptr + rows, mask=rows < N, other=0.0)
        high, low = lse_shift(lse, scale, ACC, EXACT)
        mean += exp_shifted(rows_by_rows(q, k, ACC, PRECISION), high[:, None], low[:, None], scale, EXACT)
        q_ptr += head_stride
        lse_ptr += N
    _store_probabilities(probs_ptr, image, rows, cols, N, N, mean / H)


# ---- Launcher -------------------------------------------------------------------------------------------------------


def attention_fwd(qkv, scale, dropout_p, seed, probs):
    """softmax(scale · q kᵀ) v, and what the backward needs.

    :param qkv: [B, N, 3, H, d], its last axis contiguous.
    :param scale: of the scores, positive.
    :param dropout_p: in [0, 1].
    :param seed: int64 [1] on qkv's device; None without dropout.
    :param probs: "none", "all", "class_token" or "head_mean".
    :returns: out [B, N, H·d]; log Σ exp(scale · q kᵀ) [B, H, N], float32 for 16-bit inputs and else float64 (`lse_shift` says
        why); the probabilities before dropout, [B, H, N, N], [B, H, N] or [B, N, N]; [0] for "none".
    """
    images, tokens, _, heads, head = qkv.shape
    out = qkv.new_empty(images, tokens, heads * head)
    lse = qkv.new_empty(images, heads, tokens, dtype=torch.float32 if qkv.element_size() == 2 else torch.float64)
    shape = {"none": (0,), "all": (images, heads, tokens, tokens), "class_token": (images, heads, tokens)}
    probabilities = qkv.new_empty(shape.get(probs, (images, tokens, tokens)))
    if out.numel() == 0:
        return out, lse, probabilities
    config = forward_config(tokens, head, qkv.element_size(), target_of(qkv.device))
    numbers = dtypes_of(qkv)
    unit = stride_unit(qkv)
    strides = [stride // unit for stride in qkv.stride()[:4]]
    programs = images * heads * (1 if "SEGMENTS" in config else triton.cdiv(tokens, config["ROWS"]))
    kernel = _attention_fwd_short_kernel if "SEGMENTS" in config else _attention_fwd_streaming_kernel
    with on_device(qkv):
        kernel[(programs,)](
            qkv, seed if dropout_p > 0 else None, out, lse, probabilities,
            tokens, heads, 1 if probs == "class_token" else tokens, *strides,
            scale, keep_limit(dropout_p), keep_scale(dropout_p),
            UNIT=unit, HEAD=head, DROPOUT=dropout_p > 0, PROBS=probs in ("all", "class_token"), **numbers, **config,
        )  # fmt: skip
        if probs == "head_mean":
            mean = head_mean_config(head, qkv.element_size(), target_of(qkv.device))
            tiles = triton.cdiv(tokens, mean["ROWS"]) * triton.cdiv(tokens, mean["COLUMNS"])
            _attention_fwd_head_mean_kernel[(images * tiles,)](
                qkv, lse, probabilities, tokens, heads, *strides, scale, UNIT=unit, HEAD=head, **numbers, **mean
            )
    return out, lse, probabilities
