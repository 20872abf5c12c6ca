"""What dropout and stochastic depth keep: random bits by counter, the same whoever asks, in whatever tiles.

An element's 32 bits come from Philox4x32 in 7 rounds (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011), whose
key is the seed and whose counter says where the element is:

    dropout of a matrix                 counter (32 · (column // 128) + column % 32, row, 0, 0), word column // 32 % 4
    dropout of attention's P            counter (key, query, image · heads + head, 0), word 0
    stochastic depth                    counter (image, 0, 0, 1), word 0

It is kept where the bits, as a signed integer, are not below a limit. The extension's csrc/random.h takes the same bits. One
call serves four elements of a matrix: 32 columns apart, they are in the strips of one program's tile, and there in one thread.
"""

import torch
import triton
import triton.language as tl

from vit_fast.kernels.common import INTERPRETED as _INTERPRETED

_ROUNDS = tl.constexpr(7)
_WORDS = tl.constexpr(4)
_STEP = tl.constexpr(32)


def keep_limit(p: float) -> int:
    """What the bits of an element that is kept reach; all of them at p = 0, all but one in 2³² are below it at p = 1."""
    return min(int(p * 2**32), 2**32 - 1) - 2**31


def keep_scale(p: float) -> float:
    """What a kept element is multiplied by: 1 / (1 - p), and 0 at p = 1."""
    return 1 / (1 - p) if p < 1 else 0.0


def dropped(dropout_p: float, stochastic_depth_p: float, x: torch.Tensor) -> tuple:
    """What the kernels of a matrix are told: limit and scale of either, and the number of rows of an image."""
    image_rows = x.shape[1:-1].numel() if x.dim() > 1 else 1
    return (
        keep_limit(dropout_p),
        keep_scale(dropout_p),
        keep_limit(stochastic_depth_p),
        keep_scale(stochastic_depth_p),
        image_rows,
    )


@triton.jit
def _kept(seed_ptr, c0, c1, c2, c3, limit):
    """Whether each of the four words of these counters, int32 tensors that broadcast, is not below the limit."""
    c0, c1 = tl.broadcast(c0, c1)
    a, b, c, d = tl.philox(tl.load(seed_ptr), c0, c1, c2, c3, _ROUNDS)
    return (
        a.to(tl.int32, bitcast=True) >= limit,
        b.to(tl.int32, bitcast=True) >= limit,
        c.to(tl.int32, bitcast=True) >= limit,
        d.to(tl.int32, bitcast=True) >= limit,
    )


@triton.jit
def kept_probabilities(seed_ptr, plane, rows, cols, limit):
    """Of attention's P: ``rows`` and ``cols`` come as [R, 1] and [1, C] or the other way round."""
    return _kept(seed_ptr, cols, rows, plane, 0, limit)[0]


@triton.jit
def image_factors(seed_ptr, row, image_rows, limit, scale):
    """What stochastic depth multiplies rows of images of so many rows with: 0 or the scale."""
    image = row.to(tl.int32) // image_rows
    return tl.where(_kept(seed_ptr, image, tl.zeros_like(image), 0, 1, limit)[0], scale, 0.0)


@triton.jit
def _packed(seed, c0, c1, limit):
    """The comparisons of a call's four words as the bits of one number."""
    a, b, c, d = tl.philox(seed, c0, c1, 0, 0, _ROUNDS)
    a = (a.to(tl.int32, bitcast=True) >= limit).to(tl.int32)
    b = (b.to(tl.int32, bitcast=True) >= limit).to(tl.int32)
    c = (c.to(tl.int32, bitcast=True) >= limit).to(tl.int32)
    d = (d.to(tl.int32, bitcast=True) >= limit).to(tl.int32)
    return a | (b << 1) | (c << 2) | (d << 3)


@triton.jit
def kept_words(seed_ptr, row, first_column, GROUPS: tl.constexpr, limit):
    """Of a matrix, packed: [rows, 32 · GROUPS], bit w of [r, 32 g + c] for column 128 (first_column // 128 + g) + 32 w + c."""
    c0 = first_column // (_STEP * _WORDS) * _STEP + tl.arange(0, _STEP * GROUPS)
    c0, c1 = tl.broadcast(c0[None, :].to(tl.int32), row[:, None].to(tl.int32))
    seed = tl.load(seed_ptr)
    if _INTERPRETED:
        return _packed(seed, c0, c1, limit)
    else:
        # Element by element: a whole tile's rounds, one after the other, would need four registers an element at a time.
        return tl.map_elementwise(_packed, tl.full(c0.shape, seed, tl.int64), c0, c1, tl.full(c0.shape, limit, tl.int32))


@triton.jit
def kept_strip(words, first_column, STRIP: tl.constexpr):
    """Of a matrix: the columns [first_column + 32 · STRIP, + 32), by the words of their group."""
    return (words >> (first_column // _STEP % _WORDS + STRIP)) & 1 != 0


@triton.jit
def kept_block(seed_ptr, row, first_column, COLUMNS: tl.constexpr, limit):
    """Of a matrix: [rows, COLUMNS], 32 of them or a larger power of two, from a multiple of it on."""
    GROUPS: tl.constexpr = (COLUMNS + 127) // 128
    WORDS: tl.constexpr = COLUMNS // (32 * GROUPS)
    words = tl.reshape(kept_words(seed_ptr, row, first_column, GROUPS, limit), (row.shape[0], GROUPS, 1, 32))
    shift = first_column // _STEP % _WORDS + tl.arange(0, WORDS)
    bits = (words >> shift[None, None, :, None]) & 1
    return tl.reshape(bits, (row.shape[0], COLUMNS)) != 0
