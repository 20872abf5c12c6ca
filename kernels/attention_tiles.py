"""What the forward and the backward of attention share: how a head and the keys are cut into tiles, and work on such tiles.

Triton's tiles have powers of two as sizes; heads of 80 and sequences of 197 do not. So a tile of tokens × channels is a tuple
of one or two pieces (80 = 64 + 16, not 128), and a sequence a tuple of segments (197 = 128 + 64 + 16, not 256) of which only
the last is padded. Tuples cost nothing: every loop over them is unrolled by the compiler.
"""

import torch
import triton
import triton.language as tl

from vit_fast.kernels.common import Target, dot, dot_precision

SMALLEST = 16  # a tensor core's shortest edge
LOG2E = tl.constexpr(1.4426950408889634)

# Kernels are not compiled anew for these being 1 or divisible by 16: what matters of a stride is in its unit (`stride_unit`).
HEADS_AND_STRIDES = ["H", "image_stride", "token_stride", "part_stride", "head_stride"]


def split(size: int, parts: int, largest: int = 1 << 30) -> tuple[int, ...]:
    """The size as at most ``parts`` descending powers of two, 16 at least, with the least padding, all of it in the last.

    Fewer parts where more would not save padding: 197 → (128, 64, 16), 257 → (256, 16), 50 → (64,), 80 → (64, 16), 0 → ().
    """
    if size <= 0:
        return ()
    whole = max(SMALLEST, triton.next_power_of_2(size))
    if parts == 1 or whole == SMALLEST:
        return (whole,)
    first = min(whole // 2, largest)
    rest = split(size - first, parts - 1, first)
    return (whole,) if first + sum(rest) >= whole and whole <= largest else (first, *rest)


def reads_shared_memory(target: Target) -> bool:
    """Whether products take their operands from shared memory (wgmma, tcgen05), not from registers: more of these are free."""
    return target.backend == "cuda" and 90 <= target.arch < 120


def takes_tf32_from_shared_memory(itemsize: int, target: Target) -> bool:
    """Whether it is float32 that these products round to TF32: they take 64 rows at a time, or are made of smaller ones."""
    return itemsize == 4 and reads_shared_memory(target) and dot_precision(torch.float32) == "tf32"


def rows_and_warps(tokens: int) -> tuple[int, int]:
    """Rows that a program keeps: 128, for each is met by the whole sequence; 64 where 128 would pad by over an eighth more."""
    return (128, 8) if -tokens % 128 - -tokens % 64 <= tokens // 8 else (64, 4)


def dtypes_of(qkv: torch.Tensor) -> dict:
    """The constexprs that follow from the tensors' dtype.

    ACC is what everything between two products is computed in. EXACT subtracts a row's maximum before it scales the scores;
    16-bit inputs do both in one fused multiply-add, which at logits of 1e4 rounds by 1e-3, too much for float32's budget.
    """
    return {
        "ACC": tl.float64 if qkv.dtype == torch.float64 else tl.float32,
        "EXACT": qkv.dtype in (torch.float32, torch.float64),
        "PRECISION": dot_precision(qkv.dtype),
    }


@triton.jit
def load_tile(ptr, rows, row_stride, N, HEAD: tl.constexpr, PIECES: tl.constexpr, MASKED: tl.constexpr):
    """[rows, HEAD] as a tuple of pieces, zeros beyond HEAD and, where MASKED, beyond row N."""
    row_ptr = ptr + rows.to(tl.int64)[:, None] * row_stride
    pieces = ()
    for i in tl.static_range(len(PIECES)):
        cols = (0 if i == 0 else PIECES[0]) + tl.arange(0, PIECES[i])[None, :]
        if MASKED and i == len(PIECES) - 1:
            piece = tl.load(row_ptr + cols, mask=(rows[:, None] < N) & (cols < HEAD), other=0.0)
        elif MASKED:
            piece = tl.load(row_ptr + cols, mask=rows[:, None] < N, other=0.0)
        elif i == len(PIECES) - 1:
            piece = tl.load(row_ptr + cols, mask=cols < HEAD, other=0.0)
        else:
            piece = tl.load(row_ptr + cols)
        pieces = pieces + (piece,)
    return pieces


def stride_unit(*tensors: torch.Tensor) -> int:
    """The largest power of two, 16 bytes at most, that divides the tensors' outer strides.

    Triton tells its compiler of a stride that 16 divides, and of nothing else: heads of 72 or 88 would be read channel by
    channel. So the outer strides are handed over in this unit, and `in_elements` multiplies them.
    """
    unit = 16 // tensors[0].element_size()
    while any(stride % unit for tensor in tensors for stride in tensor.stride()[:-1]):
        unit //= 2
    return unit


@triton.jit
def in_elements(stride, UNIT: tl.constexpr):
    return tl.cast(stride, tl.int64) * UNIT


@triton.jit
def segment_tokens(SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr):
    """The numbers of a segment's tokens."""
    start = 0
    for i in tl.static_range(SEGMENT):
        start += SEGMENTS[i]
    return start + tl.arange(0, SEGMENTS[SEGMENT])


@triton.jit
def load_segments(ptr, row_stride, N, HEAD: tl.constexpr, PIECES: tl.constexpr, SEGMENTS: tl.constexpr):
    """All tokens of one (image, head): a tuple of tiles, one for each segment."""
    tiles = ()
    for i in tl.static_range(len(SEGMENTS)):
        tokens = segment_tokens(SEGMENTS, i)
        tiles = tiles + (load_tile(ptr, tokens, row_stride, N, HEAD, PIECES, i == len(SEGMENTS) - 1),)
    return tiles


@triton.jit
def store_tile(ptr, rows, row_stride, N, tile, HEAD: tl.constexpr, PIECES: tl.constexpr):
    """The inverse of `load_tile`, with the one cast to the memory's dtype; rows beyond N are not written."""
    row_ptr = ptr + rows.to(tl.int64)[:, None] * row_stride
    for i in tl.static_range(len(PIECES)):
        cols = (0 if i == 0 else PIECES[0]) + tl.arange(0, PIECES[i])[None, :]
        tl.store(row_ptr + cols, tile[i].to(ptr.dtype.element_ty), mask=(rows[:, None] < N) & (cols < HEAD))


@triton.jit
def _zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr):
    return tl.zeros([ROWS, COLUMNS], dtype=ACC)


@triton.jit
def zero_tile(ROWS: tl.constexpr, PIECES: tl.constexpr, ACC: tl.constexpr):
    pieces = ()
    for i in tl.static_range(len(PIECES)):
        pieces = pieces + (_zeros(ROWS, PIECES[i], ACC),)
    return pieces


@triton.jit
def scale_tile(tile, factor):
    pieces = ()
    for i in tl.static_range(len(tile)):
        pieces = pieces + (tile[i] * factor,)
    return pieces


@triton.jit
def rows_by_rows(a, b, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """a bᵀ of two tuples of pieces: [rows of a, rows of b]."""
    acc = tl.zeros([a[0].shape[0], b[0].shape[0]], dtype=ACC)
    for i in tl.static_range(len(a)):
        acc = dot(a[i], tl.trans(b[i]), acc, PRECISION)
    return acc


@triton.jit
def add_product(acc, weights, tile, PRECISION: tl.constexpr):
    """acc + weights · tile, the weights [rows, tokens] rounded to the tile's dtype, acc and tile tuples of pieces."""
    weights = weights.to(tile[0].dtype)
    pieces = ()
    for i in tl.static_range(len(tile)):
        pieces = pieces + (dot(weights, tile[i], acc[i], PRECISION),)
    return pieces


@triton.jit
def row_dot(a, b, ACC: tl.constexpr):
    """rowsum(a ∘ b) of two tuples of pieces."""
    total = tl.sum(a[0].to(ACC) * b[0].to(ACC), 1)
    for i in tl.static_range(1, len(a)):
        total += tl.sum(a[i].to(ACC) * b[i].to(ACC), 1)
    return total


@triton.jit
def masked_scores(q, k, cols, N, MASKED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """q kᵀ; where MASKED, −inf for keys beyond N."""
    scores = rows_by_rows(q, k, ACC, PRECISION)
    if MASKED:
        scores = tl.where(cols[None, :] < N, scores, float("-inf"))
    return scores


@triton.jit
def max_shift(highest, scale, EXACT: tl.constexpr):
    """A row's highest score as `exp_shifted` takes it."""
    if EXACT:
        return highest
    return highest * (scale * LOG2E)


@triton.jit
def exp_shifted(scores, high, low, scale, EXACT: tl.constexpr):
    """exp(scale · scores − shift), the shift as `max_shift` or `lse_shift` gives it, broadcast against the scores."""
    if EXACT:
        return tl.exp((scores - high - low) * scale)
    return tl.exp2(scores * (scale * LOG2E) - high)


@triton.jit
def log_sum(highest, total, scale, EXACT: tl.constexpr):
    """log Σ exp(scale · scores) of rows with these highest scores and sums of exp(scale · (scores − highest))."""
    if EXACT:
        return highest.to(tl.float64) * tl.cast(scale, tl.float32).to(tl.float64) + tl.log(total.to(tl.float64))
    else:
        return highest * scale + tl.log(total)


@triton.jit
def lse_shift(lse, scale, ACC: tl.constexpr, EXACT: tl.constexpr):
    """What `log_sum` gave as `exp_shifted` takes it: (high, low).

    EXACT: in the scores' own unit and cut in two, for a single float32 would round by up to 1e-3 at logits of 1e4 and by 5e-7
    at ordinary ones, an error of all of the row's probabilities at once. Else one number, times log2 e.
    """
    if EXACT:
        shift = lse / tl.cast(scale, tl.float32).to(tl.float64)
        high = shift.to(ACC)
        return high, (shift - high.to(tl.float64)).to(ACC)
    else:
        return lse * LOG2E, tl.zeros_like(lse)
