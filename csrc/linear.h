// The product of cpu.h's `Product` with its epilogues, and their derivative.
#pragma once

#include "patch_embed.h"
#include "product.h"
#include "random.h"

namespace vit_fast::VIT_FAST_ISA {

VIT_FAST_INLINE vec activated(vec values, int activation) {
  return activation == 0 ? values : activation == 1 ? gelu(values) : activation == 2 ? gelu_tanh(values) : silu(values);
}
VIT_FAST_INLINE vec derivative_at(vec values, int activation) {
  return activation == 1 ? gelu_derivative(values) : gelu_tanh_derivative(values);
}

VIT_FAST_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
VIT_FAST_INLINE int64_t in_place_rows(const Product& a) { return a.pack_x ? a.columns : a.rows; }
VIT_FAST_INLINE int64_t packed_rows(const Product& a) { return a.pack_x ? a.rows : a.columns; }

// Whether the operand that is not packed is read from a copy, slice by slice: to become float32, and where its rows lie a multiple of
// 4 KB apart, which fall into the same few places of the first cache, if enough panels use the copy to pay for it.
template <class X>
VIT_FAST_INLINE bool copies_slices(const Product& a) {
  const int64_t stride = a.pack_x ? a.w_row : a.x_row;
  return sizeof(X) < 4 || (stride % 1024 == 0 && packed_rows(a) >= 32 * PANEL);
}

// Values [k, k + depth) of rows [begin, begin + count), SLICE apart in `to`.
template <class X>
static void copy_slice(const Product& a, int64_t begin, int64_t count, int64_t k, int64_t depth, float* to) {
  const X* from = static_cast<const X*>(a.pack_x ? a.w : a.x);
  const int64_t stride = a.pack_x ? a.w_row : a.x_row;
  for (int64_t i = 0; i < count; ++i) {
    const X* row = from + (begin + i) * stride + k;
    for_vectors(depth, [&](int64_t j, int n) { store_up_to(to + i * SLICE + j, load_up_to(row + j, n), n); });
  }
}

static int64_t product_panels(const Product& a) { return panels_of(packed_rows(a)); }
static int64_t product_tiles(const Product& a) { return (in_place_rows(a) + TILE - 1) / TILE; }
static int64_t product_packed_size(const Product& a) {
  return panels_of(packed_rows(a)) * PANEL * a.depth * (a.pack_x && a.patches ? 2 : 1);
}
static int64_t product_scratch_size(const Product& a) {
  return BLOCK_ROWS * (BLOCK_COLUMNS + LANES + SLICE + (!a.pack_x && a.patches ? a.depth : 0));
}

static void product_pack(const Product& a, int64_t begin, int64_t end) {
  const int64_t rows = packed_rows(a);
  for (int64_t p = begin; p < end; ++p) {
    const int64_t first = p * PANEL, count = smaller(rows - first, PANEL);
    float* panel = a.packed + first * a.depth;
    if (!a.pack_x && a.w_row == 1 && a.w_step != 1) {
      if (a.x_type == Type::bf16) {
        pack_columns(static_cast<const bf16*>(a.w) + first, a.w_step, count, a.depth, panel);
      } else {
        pack_columns(static_cast<const float*>(a.w) + first, a.w_step, count, a.depth, panel);
      }
    } else if (a.pack_x && a.patches) {
      float* gathered = panel + panels_of(rows) * PANEL * a.depth;  // behind the panels: see product_packed_size
      gather_patches(*a.patches, first, count, gathered);
      pack_rows(gathered, a.depth, count, a.depth, panel);
    } else {
      const int64_t stride = a.pack_x ? a.x_row : a.w_row;
      if (a.x_type == Type::bf16) {
        pack_rows(static_cast<const bf16*>(a.pack_x ? a.x : a.w) + first * stride, stride, count, a.depth, panel);
      } else {
        pack_rows(static_cast<const float*>(a.pack_x ? a.x : a.w) + first * stride, stride, count, a.depth, panel);
      }
    }
  }
}

// One row into the second cache.
VIT_FAST_INLINE void prefetch_row(const float* row, int64_t depth) {
  for (int64_t k = 0; k < depth; k += 16) __builtin_prefetch(row + k, 0, 2);
}

// Where `rows` rows of results go from column j on, and what is added to them, into the second cache.
template <class X, class Y>
VIT_FAST_INLINE void prefetch_results(const Product& a, int64_t n, int64_t j, int64_t rows, int64_t columns) {
  for (int64_t i = n; i < n + rows; ++i) {
    const int64_t group = i / a.group, in_group = i % a.group;
    const Y* y = static_cast<const Y*>(a.y) + group * a.y_group + in_group * a.y_row + j;
    for (int64_t k = 0; k < columns; k += 64 / sizeof(Y)) __builtin_prefetch(y + k, 1, 2);
    if (a.residual) {
      const int64_t size = size_of(a.residual_type);
      const char* residual =
          static_cast<const char*>(a.residual) + (group * a.residual_group + in_group * a.residual_row + j) * size;
      for (int64_t k = 0; k < columns * size; k += 64) __builtin_prefetch(residual + k, 0, 2);
    }
    if (a.z) {
      const X* z = static_cast<const X*>(a.z) + i * a.z_row + j;
      for (int64_t k = 0; k < columns; k += 64 / sizeof(X)) __builtin_prefetch(z + k, 1, 2);
    }
  }
}

// What follows the sums: `count` values of row n from column j on. Overwrites them.
template <class X, class Y>
VIT_FAST_INLINE void finish(const Product& a, int64_t n, int64_t j, int64_t count, float* values) {
  const int64_t in_group = n % a.group;
  Y* y = static_cast<Y*>(a.y) + (n / a.group) * a.y_group + in_group * a.y_row + j;
  X* z = a.z ? static_cast<X*>(a.z) + n * a.z_row + j : nullptr;
  const int64_t residual = (n / a.group) * a.residual_group + in_group * a.residual_row + j;
  float factors[(BLOCK_COLUMNS > BLOCK_ROWS ? BLOCK_COLUMNS : BLOCK_ROWS) + 2 * DROPOUT_GROUP];
  const float* factor = a.dropout.on ? dropout_factors(a.dropout, n, j, count, factors) : nullptr;
  const float whole = a.image_factors ? a.image_factors[n / a.image_rows] : 1.f;
  for_vectors(count, [&](int64_t i, int m) {
    vec v = load_up_to(values + i, m);
    if (a.bias) v += load_up_to(a.bias, a.bias_type, j + i, m);
    if (z) store_up_to(z + i, v, m);
    v = activated(v, a.activation);
    if (factor) v = times_factor(v, load_up_to(factor + i, m));
    if (a.image_factors) v = times_factor(v, all(whole));
    if (a.residual) v += load_up_to(a.residual, a.residual_type, residual + i, m);
    store_up_to(y + i, v, m);
  });
}

template <class X, class Y>
static void product_blocks(const Product& a, int worker, int64_t begin, int64_t end) {
  float* block = a.scratch + worker * product_scratch_size(a);  // [BLOCK_ROWS][BLOCK_COLUMNS]
  float* turned = block + BLOCK_ROWS * BLOCK_COLUMNS;           // [LANES][BLOCK_ROWS]
  float* slice = turned + LANES * BLOCK_ROWS;                   // [BLOCK_ROWS][SLICE]
  float* gathered = slice + BLOCK_ROWS * SLICE;                 // [BLOCK_ROWS][depth]
  const bool gathers = !a.pack_x && a.patches, copies = !gathers && copies_slices<X>(a);
  const int64_t packed = packed_rows(a);
  for (int64_t first = begin; first < end; first += BLOCK_ROWS) {
    const int64_t rows = smaller(end - first, BLOCK_ROWS);
    if (gathers) gather_patches(*a.patches, first, rows, gathered);
    for (int64_t column = 0; column < packed; column += BLOCK_COLUMNS) {
      const int64_t columns = smaller(packed - column, BLOCK_COLUMNS);
      for (int64_t k = 0; k < a.depth; k += SLICE) {
        const int64_t depth = smaller(a.depth - k, SLICE);
        const float* in_place = gathered + k;
        int64_t row_stride = a.depth;
        if (copies) {
          copy_slice<X>(a, first, rows, k, depth, slice);
          in_place = slice;
          row_stride = SLICE;
        } else if (!gathers) {
          row_stride = a.pack_x ? a.w_row : a.x_row;
          in_place = static_cast<const float*>(a.pack_x ? a.w : a.x) + first * row_stride + k;
        }
        const bool last = k + depth == a.depth;
        const auto multiply = [&](int64_t i, int64_t p) {
          const int64_t m = smaller(rows - i, TILE), next = smaller(rows - i - TILE, TILE);
          const float* from = in_place + i * row_stride;
          // The next strip's rows come in runs too short for the hardware to see: with the first panel, or some with each.
          const int64_t begin = STRIPS_STAY ? (p - column) / PANEL : (p == column ? 0 : next);
          const int64_t step = STRIPS_STAY ? panels_of(columns) : 1;
          for (int64_t r = begin; !copies && r < next; r += step) prefetch_row(from + (TILE + r) * row_stride, depth);
          if (last && !a.pack_x) prefetch_results<X, Y>(a, first + i, p, m, smaller(packed - p, PANEL));
          const bool full = packed - p > LANES;
          const float* panel = a.packed + p * a.depth + k * PANEL;
          const auto tile_of_width = full ? tile_of<TILE, 2, true> : tile_of<TILE, 1, true>;
          tile_of_width(int(m), depth, from, row_stride, 1, panel, block + i * BLOCK_COLUMNS + (p - column), BLOCK_COLUMNS, k > 0);
        };
        const auto finish_rows = [&](int64_t i, int64_t end) {
          for (; last && !a.pack_x && i < end; ++i) finish<X, Y>(a, first + i, column, columns, block + i * BLOCK_COLUMNS);
        };
        if constexpr (STRIPS_STAY) {
          for (int64_t i = 0; i < rows; i += TILE) {
            for (int64_t p = column; p < column + columns; p += PANEL) multiply(i, p);
            finish_rows(i, smaller(i + TILE, rows));
          }
        } else {
          for (int64_t p = column; p < column + columns; p += PANEL) {
            for (int64_t i = 0; i < rows; i += TILE) multiply(i, p);
          }
          finish_rows(0, rows);
        }
      }
      if (a.pack_x) {
        for (int64_t n = 0; n < columns; n += LANES) {
          for (int64_t i = 0; i < rows; i += LANES) transpose(block + i * BLOCK_COLUMNS + n, BLOCK_COLUMNS, turned + i, BLOCK_ROWS);
          for (int64_t lane = 0; lane < smaller(columns - n, LANES); ++lane) {
            finish<X, Y>(a, column + n + lane, first, rows, turned + lane * BLOCK_ROWS);
          }
        }
      }
    }
  }
}

static void product(const Product& a, int worker, int64_t begin, int64_t end) {
  begin *= TILE;
  end = smaller(end * TILE, in_place_rows(a));
  using f = float;
  using b = bf16;
  if (a.x_type == Type::f32 && a.y_type == Type::f32) {
    product_blocks<f, f>(a, worker, begin, end);
  } else if (a.x_type == Type::f32) {
    product_blocks<f, b>(a, worker, begin, end);
  } else if (a.y_type == Type::f32) {
    product_blocks<b, f>(a, worker, begin, end);
  } else {
    product_blocks<b, b>(a, worker, begin, end);
  }
}

template <class T, int activation>
static void epilogue_backward_rows(const EpilogueBackward& a, int64_t part) {
  constexpr int64_t CHUNK = 8 * DROPOUT_GROUP;
  float factors[CHUNK + 2 * DROPOUT_GROUP];
  float* sums = a.sums + part * a.columns;
  for (int64_t j = 0; j < a.columns; ++j) sums[j] = 0;
  for (int64_t row = part * ROWS_OF_PART; row < smaller((part + 1) * ROWS_OF_PART, a.rows); ++row) {
    const float whole = a.image_factors ? a.image_factors[row / a.image_rows] : 1.f;
    for (int64_t chunk = 0; chunk < a.columns; chunk += CHUNK) {
      const int64_t columns = smaller(a.columns - chunk, CHUNK), first = row * a.columns + chunk;
      const T* dy = static_cast<const T*>(a.dy) + first;
      const T* z = static_cast<const T*>(a.z) + first;
      T* dz = static_cast<T*>(a.dz) + first;
      T* h = a.h ? static_cast<T*>(a.h) + first : nullptr;
      const float* factor = a.dropout.on ? dropout_factors(a.dropout, row, chunk, columns, factors) : nullptr;
      for_vectors(columns, [&](int64_t j, int n) {
        const auto dropped = [&](vec v) {
          if (factor) v = times_factor(v, load_up_to(factor + j, n));
          return a.image_factors ? times_factor(v, all(whole)) : v;
        };
        vec d = dropped(load_up_to(dy + j, n));
        if constexpr (activation != 0) {
          const vec at = load_up_to(z + j, n);
          d *= derivative_at(at, activation);
          if (h) store_up_to(h + j, dropped(activated(at, activation)), n);
        }
        store_up_to(dz + j, d, n);
        store_up_to(sums + chunk + j, load_up_to(sums + chunk + j, n) + d, n);
      });
    }
  }
}

template <class T>
static void epilogue_backward_parts(const EpilogueBackward& a, int64_t begin, int64_t end) {
  for (int64_t part = begin; part < end; ++part) {
    if (a.activation == 0) {
      epilogue_backward_rows<T, 0>(a, part);
    } else if (a.activation == 1) {
      epilogue_backward_rows<T, 1>(a, part);
    } else {
      epilogue_backward_rows<T, 2>(a, part);
    }
  }
}

static void epilogue_backward(const EpilogueBackward& a, int64_t begin, int64_t end) {
  if (a.type == Type::f32) {
    epilogue_backward_parts<float>(a, begin, end);
  } else {
    epilogue_backward_parts<bf16>(a, begin, end);
  }
}

}  // namespace vit_fast::VIT_FAST_ISA
