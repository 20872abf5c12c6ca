// Layer normalisation of rows. Three passes over a row that the first one brings into the cache: the sum, the squared distances from
// the mean (two passes: no cancellation), the result.
#pragma once

#include "vector.h"

namespace vit_fast::VIT_FAST_ISA {

template <class X, class R, class W, class T, class Y>
static void layer_norm_forward_rows(const LayerNormForward& a, int64_t begin, int64_t end) {
  const int64_t columns = a.columns;
  const W* weight = static_cast<const W*>(a.weight);
  const W* bias = static_cast<const W*>(a.bias);
  // A row of bfloat16 is turned into float32 once, not in each pass.
  constexpr int64_t WIDEST = sizeof(T) == 2 ? 4096 : 0;
  float widened[WIDEST + LANES];
  const bool widens = columns <= WIDEST;
  for (int64_t row = begin; row < end; ++row) {
    const X* x = static_cast<const X*>(a.x) + row * a.x_row;
    const R* residual = a.residual ? static_cast<const R*>(a.residual) + row * a.residual_row : nullptr;
    T* total = a.residual ? static_cast<T*>(a.total) + row * columns : nullptr;
    Y* y = static_cast<Y*>(a.y) + row * a.y_row;
    // The sum as the next operation will read it: rounded to its dtype.
    const auto given = [&](int64_t i, int n) { return residual ? load_up_to(total + i, n) : load_up_to(x + i, n); };
    const auto values = [&](int64_t i, int n) { return widens ? load_up_to(widened + i, n) : given(i, n); };
    vec sums[4] = {};
    int64_t i = 0;
    if (residual) {
      for_vectors(columns, [&](int64_t i, int n) {
        store_up_to(total + i, load_up_to(x + i, n) + load_up_to(residual + i, n), n);
      });
    }
    if (widens) for_vectors(columns, [&](int64_t i, int n) { store(widened + i, given(i, n)); });
    for (; i + 4 * LANES <= columns; i += 4 * LANES) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) sums[v] += values(i + v * LANES, LANES);
    }
    for (; i < columns; i += LANES) {
      const int n = int(columns - i < LANES ? columns - i : LANES);
      sums[0] += values(i, n);
    }
    const float mean = sum((sums[0] + sums[1]) + (sums[2] + sums[3])) / float(columns);
    vec squares[4] = {};
    for (i = 0; i + 4 * LANES <= columns; i += 4 * LANES) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const vec distance = values(i + v * LANES, LANES) - mean;
        squares[v] += distance * distance;
      }
    }
    for (; i + LANES <= columns; i += LANES) {
      const vec distance = values(i, LANES) - mean;
      squares[0] += distance * distance;
    }
    float rest = 0;
    for (; i < columns; ++i) {
      const float distance = (widens ? widened[i] : residual ? get(total + i) : get(x + i)) - mean;
      rest += distance * distance;
    }
    const float variance = (sum((squares[0] + squares[1]) + (squares[2] + squares[3])) + rest) / float(columns);
    const float rstd = 1.f / __builtin_sqrtf(variance + a.eps);
    for_vectors(columns, [&](int64_t i, int n) {
      vec v = (values(i, n) - mean) * rstd;
      if (weight) v *= load_up_to(weight + i, n);
      if (bias) v += load_up_to(bias + i, n);
      store_up_to(y + i, v, n);
    });
    if (a.mean) a.mean[row] = mean;
    if (a.rstd) a.rstd[row] = rstd;
  }
}

// M rows from `row` on. With g = dy γ and h = (s - mean) rstd:
//   ds = rstd (g - mean(g) - h mean(g h)) + dtotal,  dγ += Σ dy h,  dβ += Σ dy.
// The parameters' sums are read and written once for the M rows.
template <int M, class T, class W>
static void layer_norm_backward_of(const LayerNormBackward& a, int64_t row, float* dweight, float* dbias) {
  const int64_t columns = a.columns;
  const W* weight = static_cast<const W*>(a.weight);
  const W* dy = static_cast<const W*>(a.dy) + row * a.dy_row;
  const T* total = static_cast<const T*>(a.total) + row * a.total_row;
  vec sum_g[M] = {}, sum_gh[M] = {};
  for_vectors(columns, [&](int64_t i, int n) {
    const vec w = load_up_to(weight + i, n);
    vec dw = load_up_to(dweight + i, n), db = load_up_to(dbias + i, n);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const vec d = load_up_to(dy + m * a.dy_row + i, n);
      const vec h = (load_up_to(total + m * a.total_row + i, n) - a.mean[row + m]) * a.rstd[row + m], g = d * w;
      sum_g[m] += g;
      sum_gh[m] += g * h;  // lanes past the end have g = 0
      dw += d * h;
      db += d;
    }
    store_up_to(dweight + i, dw, n);
    store_up_to(dbias + i, db, n);
  });
  for (int m = 0; m < M; ++m) {
    const float mean = a.mean[row + m], rstd = a.rstd[row + m];
    const float mean_g = sum(sum_g[m]) / float(columns), mean_gh = sum(sum_gh[m]) / float(columns);
    const T* dtotal = a.dtotal ? static_cast<const T*>(a.dtotal) + (row + m) * a.dtotal_row : nullptr;
    T* dx = static_cast<T*>(a.dx) + (row + m) * columns;
    for_vectors(columns, [&](int64_t i, int n) {
      const vec h = (load_up_to(total + m * a.total_row + i, n) - mean) * rstd;
      const vec g = rounded(load_up_to(dy + m * a.dy_row + i, n) * load_up_to(weight + i, n));  // as in its mean: equal ones cancel
      vec d = rstd * (g - mean_g - h * mean_gh);
      if (dtotal) d += load_up_to(dtotal + i, n);
      store_up_to(dx + i, d, n);
    });
  }
}

template <class T, class W>
static void layer_norm_backward_rows(const LayerNormBackward& a, int64_t part) {
  float* dweight = a.sums + part * a.columns;
  float* dbias = dweight + parts_of(a.rows) * a.columns;
  for (int64_t i = 0; i < a.columns; ++i) dweight[i] = dbias[i] = 0;
  int64_t row = part * ROWS_OF_PART;
  const int64_t end = row + ROWS_OF_PART < a.rows ? row + ROWS_OF_PART : a.rows;
  for (; row + 4 <= end; row += 4) layer_norm_backward_of<4, T, W>(a, row, dweight, dbias);
  for (; row < end; ++row) layer_norm_backward_of<1, T, W>(a, row, dweight, dbias);
}

static void layer_norm_forward(const LayerNormForward& a, int64_t begin, int64_t end) {
  const bool x = a.x_type == Type::bf16, r = a.residual_type == Type::bf16, w = a.weight_type == Type::bf16;
  using f = float;
  using b = bf16;
  if (w) {  // then nothing is wider: autocast widens the weight
    layer_norm_forward_rows<b, b, b, b, b>(a, begin, end);
  } else if (a.y_type == Type::bf16) {
    layer_norm_forward_rows<b, b, f, b, b>(a, begin, end);
  } else if (x) {
    if (r) {
      layer_norm_forward_rows<b, b, f, b, f>(a, begin, end);
    } else {
      layer_norm_forward_rows<b, f, f, f, f>(a, begin, end);
    }
  } else if (r) {
    layer_norm_forward_rows<f, b, f, f, f>(a, begin, end);
  } else {
    layer_norm_forward_rows<f, f, f, f, f>(a, begin, end);
  }
}

static void layer_norm_backward(const LayerNormBackward& a, int64_t begin, int64_t end) {
  for (int64_t part = begin; part < end; ++part) {
    if (a.weight_type == Type::bf16) {
      layer_norm_backward_rows<bf16, bf16>(a, part);
    } else if (a.type == Type::bf16) {
      layer_norm_backward_rows<bf16, float>(a, part);
    } else {
      layer_norm_backward_rows<float, float>(a, part);
    }
  }
}

// The sums of parts, in their order.
static void add_rows(const float* parts, int64_t count, int64_t columns, void* sum, Type type) {
  for_vectors(columns, [&](int64_t i, int n) {
    vec total = {};
    for (int64_t part = 0; part < count; ++part) total += load_up_to(parts + part * columns + i, n);
    if (type == Type::bf16) {
      store_up_to(static_cast<bf16*>(sum) + i, total, n);
    } else {
      store_up_to(static_cast<float*>(sum) + i, total, n);
    }
  });
}

}  // namespace vit_fast::VIT_FAST_ISA
