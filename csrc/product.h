// The matrix product behind every operation on a CPU.
//
//   y[n, j] = Σ_k x[n, k] w[j, k]
//
// One of the operands is packed: cut into panels of PANEL of its rows, in which the PANEL values of each k lie side by side. A tile
// multiplies a panel's vectors by single values of TILE rows of the other operand, which is read where it lies. So either operand may
// be the packed one. Depth is cut into slices, so that a panel's slice, or that of a strip of TILE rows, stays in the first cache while
// what it is multiplied by passes from the second; the tiles of a block accumulate in a scratch matrix that stays in the second as well,
// where the epilogue finds it.
// Source of the scheme: Goto & van de Geijn, Anatomy of High-Performance Matrix Multiplication (2008).
#pragma once

#include "vector.h"

namespace vit_fast::VIT_FAST_ISA {

constexpr int PANEL = 2 * LANES;
// Rows of a tile: its accumulators fill the registers (2 · TILE of 16 or 32), less two for the panel and one for the single value.
constexpr int TILE = LANES == 16 ? 14 : 6;
// Values of k in a slice: 24 KB of a panel. Shorter without fused multiply-adds, whose every step rounds twice.
constexpr int64_t SLICE = LANES == 4 ? 96 : 6144 / PANEL;
constexpr int64_t BLOCK_ROWS = 16 * TILE;  // of the operand that is read in place
constexpr int64_t BLOCK_COLUMNS = 512;     // of panels, in one block
// Which of the two stays: strips are 4-7 % faster with 16 lanes, panels 3-5 % with 8 (Xeon, B/16 batch 8, 2026-11-25).
constexpr bool STRIPS_STAY = LANES == 16;

// c[M][V·LANES] (+)= a · b over `depth` values of k.
// a(i, k) = a[i * a_row + k * a_step], b(k, :) = b + k * PANEL, c(i, :) = c + i * c_row. SIDE_BY_SIDE: a_step is 1. Said in the
// type, since a compiler that keeps the step in a register moves row addresses out of them: 10 % (Xeon with AVX-512, 2026-11-25).
template <int M, int V, bool SIDE_BY_SIDE>
VIT_FAST_INLINE void tile(
    int64_t depth, const float* a, int64_t a_row, int64_t a_step, const float* b, float* c, int64_t c_row, bool add) {
  vec acc[M][V];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[i][v] = vec{};
  }
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    vec panel[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) panel[v] = load(b + v * LANES);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const vec single = all(a[i * a_row]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[i][v] += single * panel[v];
    }
    a += SIDE_BY_SIDE ? 1 : a_step;
    b += PANEL;
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      // Every slice is summed apart and then added: shorter chains, smaller rounding errors.
      float* to = c + i * c_row + v * LANES;
      store(to, add ? acc[i][v] + load(to) : acc[i][v]);
    }
  }
}

template <int M, int V, bool SIDE_BY_SIDE>
static void tile_of(
    int rows, int64_t depth, const float* a, int64_t a_row, int64_t a_step, const float* b, float* c, int64_t c_row, bool add) {
  if constexpr (M > 1) {
    if (rows < M) return tile_of<M - 1, V, SIDE_BY_SIDE>(rows, depth, a, a_row, a_step, b, c, c_row, add);
  }
  tile<M, V, SIDE_BY_SIDE>(depth, a, a_row, a_step, b, c, c_row, add);
}

// A matrix of `rows` rows of `depth` values, packed: [panels][depth][PANEL], so that any run of panels is one too. Rows that are not
// there are zeros.
VIT_FAST_INLINE int64_t panels_of(int64_t rows) { return (rows + PANEL - 1) / PANEL; }

// c[rows][columns] (+)= a · b for `columns` of a packed operand from its first panel on: what attention is made of.
VIT_FAST_INLINE void small_product(
    int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row, int64_t a_step, const float* packed, float* c,
    int64_t c_row, bool add) {
  constexpr int64_t SHORT = 128;  // of a slice: everything is near, and the sums are as accurate as stock products'
  for (int64_t p = 0; p < panels_of(columns); ++p) {
    const bool full = columns - p * PANEL > LANES;
    for (int64_t k = 0; k < depth; k += SHORT) {
      const int64_t here = depth - k < SHORT ? depth - k : SHORT;
      const float* panel = packed + (p * depth + k) * PANEL;
      for (int64_t i = 0; i < rows; i += TILE) {
        const int m = int(rows - i < TILE ? rows - i : TILE);
        const float* from = a + i * a_row + k * a_step;
        float* to = c + i * c_row + p * PANEL;
        const auto multiply = full ? (a_step == 1 ? tile_of<TILE, 2, true> : tile_of<TILE, 2, false>)
                                   : (a_step == 1 ? tile_of<TILE, 1, true> : tile_of<TILE, 1, false>);
        multiply(m, here, from, a_row, a_step, panel, to, c_row, add || k > 0);
      }
    }
  }
}

// LANES rows of LANES values each become LANES columns.
VIT_FAST_INLINE void transpose(const float* from, int64_t from_row, float* to, int64_t to_row) {
  vec square[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) square[i] = load(from + i * from_row);
  transpose(square);
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) store(to + i * to_row, square[i]);
}

// One panel from rows whose values of k are side by side.
template <class T>
static void pack_rows(const T* rows, int64_t row_stride, int64_t count, int64_t depth, float* panel) {
  for (int64_t j = 0; j < PANEL; j += LANES) {
    const int64_t there = count - j < LANES ? count - j : LANES;
    for (int64_t k = 0; k < depth; k += LANES) {
      const int n = int(depth - k < LANES ? depth - k : LANES);
      vec square[LANES];
      if (there == LANES && n == LANES) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) square[i] = load(rows + (j + i) * row_stride + k);
      } else {
        for (int i = 0; i < LANES; ++i) square[i] = i < there ? load_up_to(rows + (j + i) * row_stride + k, n) : vec{};
      }
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) {
        if (i < n) store(panel + (k + i) * PANEL + j, square[i]);
      }
    }
  }
}

// One panel from rows that lie side by side: the values of one k are adjacent, those of the next k_stride further.
template <class T>
static void pack_columns(const T* columns, int64_t k_stride, int64_t count, int64_t depth, float* panel) {
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t j = 0; j < PANEL; j += LANES) {
      const int64_t left = count - j;
      const T* from = columns + k * k_stride + j;
      store(panel + k * PANEL + j, left <= 0 ? vec{} : load_up_to(from, int(left < LANES ? left : LANES)));
    }
  }
}

}  // namespace vit_fast::VIT_FAST_ISA
