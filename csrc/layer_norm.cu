// Layer normalisation on a GPU. Statistics are float32, from two passes over a row (no cancellation).
//
// Rows whose values a warp holds in registers are read once, a warp to a row. The rest (mixed dtypes under autocast, rows that are wider
// or that 16-byte accesses do not fit) takes a block to a row, which reads it again from the cache.

#include "cuda.cuh"

namespace vit_fast {
namespace {

constexpr int WARPS = 4;  // of a block whose warps have a row each

struct Forward {
  const void *x, *residual, *weight, *bias;
  void *y, *total;
  float *mean, *rstd;
  int64_t rows, columns, x_row, residual_row;
  float eps;
};

// A lane holds chunks lane, lane + 32, … of N values: P of them, the last ones past the end where columns < P · 32 · N.
template <int N, int P, class T>
__global__ void __launch_bounds__(32 * WARPS) layer_norm_forward_warp_kernel(const Forward a) {
  const int64_t row = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32;
  if (row >= a.rows) return;
  const int lane = threadIdx.x % 32;
  const T* x = static_cast<const T*>(a.x) + row * a.x_row;
  const T* residual = a.residual ? static_cast<const T*>(a.residual) + row * a.residual_row : nullptr;
  float values[P][N];
  float sum = 0;
#pragma unroll
  for (int p = 0; p < P; ++p) {
    const int64_t column = (int64_t(p) * 32 + lane) * N;
#pragma unroll
    for (int k = 0; k < N; ++k) values[p][k] = 0;
    if (column < a.columns) {
      load<N>(x + column, values[p]);
      if (residual != nullptr) {
        float more[N];
        load<N>(residual + column, more);
#pragma unroll
        for (int k = 0; k < N; ++k) {
          T rounded;  // the sum as the next operation will read it
          assign(rounded, values[p][k] + more[k]);
          values[p][k] = as_float(rounded);
        }
        store<N>(static_cast<T*>(a.total) + row * a.columns + column, values[p]);
      }
    }
#pragma unroll
    for (int k = 0; k < N; ++k) sum += values[p][k];
  }
  const float mean = warp_sum(sum) / float(a.columns);
  float squares = 0;
#pragma unroll
  for (int p = 0; p < P; ++p) {
    if ((int64_t(p) * 32 + lane) * N < a.columns) {
#pragma unroll
      for (int k = 0; k < N; ++k) squares += (values[p][k] - mean) * (values[p][k] - mean);
    }
  }
  const float rstd = 1.f / sqrtf(warp_sum(squares) / float(a.columns) + a.eps);
#pragma unroll
  for (int p = 0; p < P; ++p) {
    const int64_t column = (int64_t(p) * 32 + lane) * N;
    if (column < a.columns) {
      float weight[N], bias[N];
      load<N>(static_cast<const T*>(a.weight) + column, weight);
      load<N>(static_cast<const T*>(a.bias) + column, bias);
#pragma unroll
      for (int k = 0; k < N; ++k) values[p][k] = (values[p][k] - mean) * rstd * weight[k] + bias[k];
      store<N>(static_cast<T*>(a.y) + row * a.columns + column, values[p]);
    }
  }
  if (lane == 0) {
    a.mean[row] = mean;
    a.rstd[row] = rstd;
  }
}

template <class X, class R, class W, class T>
__global__ void __launch_bounds__(256) layer_norm_forward_block_kernel(const Forward a) {
  __shared__ float shared[8];
  const int64_t row = blockIdx.x;
  const X* x = static_cast<const X*>(a.x) + row * a.x_row;
  const R* residual = a.residual ? static_cast<const R*>(a.residual) + row * a.residual_row : nullptr;
  T* total = a.residual ? static_cast<T*>(a.total) + row * a.columns : nullptr;
  const auto value = [&](int64_t column) {  // a thread reads what it wrote itself
    return total != nullptr ? as_float(total[column]) : as_float(x[column]);
  };
  float sum = 0;
  for (int64_t column = threadIdx.x; column < a.columns; column += blockDim.x) {
    if (residual != nullptr) assign(total[column], as_float(x[column]) + as_float(residual[column]));
    sum += value(column);
  }
  const float mean = block_sum(sum, shared) / float(a.columns);
  float squares = 0;
  for (int64_t column = threadIdx.x; column < a.columns; column += blockDim.x) {
    squares += (value(column) - mean) * (value(column) - mean);
  }
  const float rstd = 1.f / sqrtf(block_sum(squares, shared) / float(a.columns) + a.eps);
  for (int64_t column = threadIdx.x; column < a.columns; column += blockDim.x) {
    const float normal = (value(column) - mean) * rstd;
    assign(
        static_cast<W*>(a.y)[row * a.columns + column],
        normal * as_float(static_cast<const W*>(a.weight)[column]) + as_float(static_cast<const W*>(a.bias)[column]));
  }
  if (threadIdx.x == 0) {
    a.mean[row] = mean;
    a.rstd[row] = rstd;
  }
}

struct Backward {
  const void *dy, *total, *weight, *dtotal;
  void* dx;
  const float *mean, *rstd;
  float* parts;  // [2][gridDim.x][columns]
  int64_t rows, columns, dy_row, total_row, dtotal_row;
};

// With g = dy γ and h = (s - mean) rstd:  ds = rstd (g - mean(g) - h mean(g h)) + dtotal,  dγ = Σ dy h,  dβ = Σ dy.
// A warp walks down every gridDim.x · WARPS-th row with the sums of its lanes' columns in registers.
template <int N, int P, class T>
__global__ void __launch_bounds__(32 * WARPS, 2) layer_norm_backward_warp_kernel(const Backward a) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float dweight[P][N] = {}, dbias[P][N] = {};
  for (int64_t row = int64_t(blockIdx.x) * WARPS + warp; row < a.rows; row += int64_t(gridDim.x) * WARPS) {
    const float mean = a.mean[row], rstd = a.rstd[row];
    float h[P][N], g[P][N];
    float sum_g = 0, sum_gh = 0;
#pragma unroll
    for (int p = 0; p < P; ++p) {
      const int64_t column = (int64_t(p) * 32 + lane) * N;
      if (column < a.columns) {
        float weight[N];
        load<N>(static_cast<const T*>(a.total) + row * a.total_row + column, h[p]);
        load<N>(static_cast<const T*>(a.dy) + row * a.dy_row + column, g[p]);
        load<N>(static_cast<const T*>(a.weight) + column, weight);
#pragma unroll
        for (int k = 0; k < N; ++k) {
          h[p][k] = (h[p][k] - mean) * rstd;
          dweight[p][k] += g[p][k] * h[p][k];
          dbias[p][k] += g[p][k];
          g[p][k] *= weight[k];
          sum_g += g[p][k];
          sum_gh += g[p][k] * h[p][k];
        }
      }
    }
    const float mean_g = warp_sum(sum_g) / float(a.columns), mean_gh = warp_sum(sum_gh) / float(a.columns);
#pragma unroll
    for (int p = 0; p < P; ++p) {
      const int64_t column = (int64_t(p) * 32 + lane) * N;
      if (column < a.columns) {
        float more[N] = {};
        if (a.dtotal != nullptr) load<N>(static_cast<const T*>(a.dtotal) + row * a.dtotal_row + column, more);
#pragma unroll
        for (int k = 0; k < N; ++k) g[p][k] = rstd * (g[p][k] - mean_g - h[p][k] * mean_gh) + more[k];
        store<N>(static_cast<T*>(a.dx) + row * a.columns + column, g[p]);
      }
    }
  }
  // The block's warps add up, one after the other, in the part that the block writes: no atomics.
  float* part_dweight = a.parts + int64_t(blockIdx.x) * a.columns;
  float* part_dbias = part_dweight + int64_t(gridDim.x) * a.columns;
  for (int turn = 0; turn < WARPS; ++turn) {
    if (warp == turn) {
#pragma unroll
      for (int p = 0; p < P; ++p) {
        const int64_t column = (int64_t(p) * 32 + lane) * N;
        if (column < a.columns) {
          float before[N] = {};
          if (turn > 0) load<N>(part_dweight + column, before);
#pragma unroll
          for (int k = 0; k < N; ++k) before[k] += dweight[p][k];
          store<N>(part_dweight + column, before);
#pragma unroll
          for (int k = 0; k < N; ++k) before[k] = 0;
          if (turn > 0) load<N>(part_dbias + column, before);
#pragma unroll
          for (int k = 0; k < N; ++k) before[k] += dbias[p][k];
          store<N>(part_dbias + column, before);
        }
      }
    }
    __syncthreads();
  }
}

template <class T, class W>
__global__ void __launch_bounds__(256) layer_norm_backward_block_kernel(const Backward a) {
  __shared__ float shared[8];
  const int64_t row = blockIdx.x;
  const float mean = a.mean[row], rstd = a.rstd[row];
  const T* total = static_cast<const T*>(a.total) + row * a.total_row;
  const W* dy = static_cast<const W*>(a.dy) + row * a.dy_row;
  const W* weight = static_cast<const W*>(a.weight);
  float sum_g = 0, sum_gh = 0;
  for (int64_t column = threadIdx.x; column < a.columns; column += blockDim.x) {
    const float g = as_float(dy[column]) * as_float(weight[column]), h = (as_float(total[column]) - mean) * rstd;
    sum_g += g;
    sum_gh += g * h;
  }
  const float mean_g = block_sum(sum_g, shared) / float(a.columns), mean_gh = block_sum(sum_gh, shared) / float(a.columns);
  for (int64_t column = threadIdx.x; column < a.columns; column += blockDim.x) {
    const float g = as_float(dy[column]) * as_float(weight[column]), h = (as_float(total[column]) - mean) * rstd;
    float d = rstd * (g - mean_g - h * mean_gh);
    if (a.dtotal != nullptr) d += as_float(static_cast<const T*>(a.dtotal)[row * a.dtotal_row + column]);
    assign(static_cast<T*>(a.dx)[row * a.columns + column], d);
  }
}

// The parts of dγ and dβ for the block kernel: a thread to a column, every gridDim.y-th row.
template <class T, class W>
__global__ void __launch_bounds__(64) layer_norm_parameter_sums_kernel(const Backward a) {
  const int64_t column = int64_t(blockIdx.x) * 64 + threadIdx.x;
  if (column >= a.columns) return;
  float dweight = 0, dbias = 0;
  for (int64_t row = blockIdx.y; row < a.rows; row += gridDim.y) {
    const float d = as_float(static_cast<const W*>(a.dy)[row * a.dy_row + column]);
    const float total = as_float(static_cast<const T*>(a.total)[row * a.total_row + column]);
    dweight += d * (total - a.mean[row]) * a.rstd[row];
    dbias += d;
  }
  a.parts[int64_t(blockIdx.y) * a.columns + column] = dweight;
  a.parts[(int64_t(gridDim.y) + blockIdx.y) * a.columns + column] = dbias;
}

// f(N, P) with the fewest chunks a lane that hold a row of `columns` elements of T; false where a warp's registers don't. More than
// 5 chunks of 8 would spill in the backward pass: then chunks of 4, of which 11 hold the 1,408 columns of the widest ViT (g).
template <class T, class F>
bool with_chunks(int64_t columns, const F& f) {
  const auto fits = [&](auto n, auto p) {
    if (columns > int64_t(32) * n * p) return false;
    f(n, p);
    return true;
  };
  constexpr std::integral_constant<int, 16 / sizeof(T)> n;
  constexpr std::integral_constant<int, 4> four;
  if (fits(n, std::integral_constant<int, 1>{}) || fits(n, std::integral_constant<int, 2>{}) ||
      fits(n, std::integral_constant<int, 3>{}) || fits(n, std::integral_constant<int, 4>{}) ||
      fits(n, std::integral_constant<int, 5>{})) {
    return true;
  }
  if constexpr (n == four) {
    if (fits(four, std::integral_constant<int, 6>{}) || fits(four, std::integral_constant<int, 8>{})) return true;
  }
  return fits(four, std::integral_constant<int, 11>{});
}

void check_parameters(const char* op, const Tensor& weight, const Tensor& bias, const Tensor& x, int64_t columns) {
  check_shape(op, "weight", weight, {columns});
  check_shape(op, "bias", bias, {columns});
  check_contiguous(op, "weight", weight);
  check_contiguous(op, "bias", bias);
  check_dtype(op, "weight", weight, {x.scalar_type(), ScalarType::Float});
  check_dtype(op, "bias", bias, {weight.scalar_type()});
  check_device(op, "weight", weight, "x", x);
  check_device(op, "bias", bias, "x", x);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_fwd(
    Tensor x, Tensor weight, Tensor bias, double eps, std::optional<Tensor> residual) {
  const char* op = "layer_norm_fwd";
  Forward a = {};
  a.x_row = check_rows(op, "x", x);
  a.columns = x.size(x.dim() - 1);
  a.rows = rows_of(x);
  STD_TORCH_CHECK(a.columns > 0, op, ": x must have columns, got shape ", text_of(x.sizes()));
  STD_TORCH_CHECK(a.rows < (int64_t(1) << 31), op, ": x must have fewer than 2**31 rows, got ", a.rows);
  check_dtype(op, "x", x, FLOATS);
  ScalarType total_type = x.scalar_type();
  if (residual) {
    check_shape(op, "residual", *residual, sizes_of(x));
    check_device(op, "residual", *residual, "x", x);
    if (x.scalar_type() == ScalarType::Float) {
      check_dtype(op, "residual", *residual, FLOATS);
    } else {
      check_dtype(op, "residual", *residual, {x.scalar_type(), ScalarType::Float});
    }
    a.residual_row = check_rows(op, "residual", *residual);
    total_type = wider(x, *residual);
  }
  check_parameters(op, weight, bias, x, a.columns);
  const bool plain = weight.scalar_type() == x.scalar_type() && (!residual || residual->scalar_type() == x.scalar_type());
  STD_TORCH_CHECK(
      plain || weight.scalar_type() == ScalarType::Float, op, ": weight must be float32 where dtypes are mixed, got ",
      name_of(weight.scalar_type()));

  const auto guard = guard_of(x);
  const std::vector<int64_t> sizes = sizes_of(x), rows_sizes(sizes.begin(), sizes.end() - 1);
  Tensor y = empty_like(x, sizes, weight.scalar_type());
  Tensor total = empty_like(x, residual ? sizes : std::vector<int64_t>{0}, total_type);
  Tensor mean = empty_like(x, rows_sizes, ScalarType::Float), rstd = empty_like(x, rows_sizes, ScalarType::Float);
  if (a.rows == 0) return {y, total, mean, rstd};
  a.x = x.data_ptr();
  a.residual = residual ? residual->data_ptr() : nullptr;
  a.weight = weight.data_ptr();
  a.bias = bias.data_ptr();
  a.y = y.data_ptr();
  a.total = total.data_ptr();
  a.mean = static_cast<float*>(mean.data_ptr());
  a.rstd = static_cast<float*>(rstd.data_ptr());
  a.eps = float(eps);
  const cudaStream_t stream = current_stream(x);
  with_type(x.scalar_type(), [&](auto t) {
    using X = decltype(t);
    const bool chunks = plain && in_chunks(a.x, sizeof(X), a.columns, a.x_row) && in_chunks(a.weight, sizeof(X), a.columns, 0) &&
                        in_chunks(a.bias, sizeof(X), a.columns, 0) && in_chunks(a.residual, sizeof(X), a.columns, a.residual_row);
    if (chunks && with_chunks<X>(a.columns, [&](auto n, auto p) {
          layer_norm_forward_warp_kernel<n, p, X><<<unsigned((a.rows + WARPS - 1) / WARPS), 32 * WARPS, 0, stream>>>(a);
        })) {
      return;
    }
    const auto launch = [&](auto r, auto w, auto sum) {
      layer_norm_forward_block_kernel<X, decltype(r), decltype(w), decltype(sum)><<<unsigned(a.rows), 256, 0, stream>>>(a);
    };
    if (plain) {
      launch(X{}, X{}, X{});
    } else if (!residual || residual->scalar_type() == x.scalar_type()) {
      launch(X{}, float{}, X{});
    } else if (x.scalar_type() == ScalarType::Float) {
      with_type(residual->scalar_type(), [&](auto r) { launch(r, float{}, float{}); });
    } else {
      launch(float{}, float{}, float{});
    }
  });
  check_launch(op);
  return {y, total, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(
    Tensor dy, Tensor total, Tensor weight, Tensor mean, Tensor rstd, std::optional<Tensor> dtotal) {
  const char* op = "layer_norm_bwd";
  Backward a = {};
  a.total_row = check_rows(op, "total", total);
  a.columns = total.size(total.dim() - 1);
  a.rows = rows_of(total);
  STD_TORCH_CHECK(a.columns > 0, op, ": total must have columns, got shape ", text_of(total.sizes()));
  STD_TORCH_CHECK(a.rows < (int64_t(1) << 31), op, ": total must have fewer than 2**31 rows, got ", a.rows);
  check_dtype(op, "total", total, FLOATS);
  check_parameters(op, weight, weight, total, a.columns);
  check_shape(op, "dy", dy, sizes_of(total));
  check_dtype(op, "dy", dy, {weight.scalar_type()});
  check_device(op, "dy", dy, "total", total);
  for (const Tensor* statistic : {&mean, &rstd}) {
    check_dtype(op, "a statistic", *statistic, {ScalarType::Float});
    check_contiguous(op, "a statistic", *statistic);
    check_device(op, "a statistic", *statistic, "total", total);
    STD_TORCH_CHECK(statistic->numel() == a.rows, op, ": a statistic must have ", a.rows, " elements, got ", statistic->numel());
  }
  if (dtotal) {
    check_shape(op, "dtotal", *dtotal, sizes_of(total));
    check_dtype(op, "dtotal", *dtotal, {total.scalar_type()});
    check_device(op, "dtotal", *dtotal, "total", total);
  }

  const auto guard = guard_of(total);
  dy = as_rows(dy);
  if (dtotal) dtotal = as_rows(*dtotal);
  a.dy_row = check_rows(op, "dy", dy);
  if (dtotal) a.dtotal_row = check_rows(op, "dtotal", *dtotal);
  // Two blocks a multiprocessor walk down the rows: that bounds the parts, however many rows there are.
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>((a.rows + WARPS - 1) / WARPS, 2 * multiprocessors()));
  Tensor dx = empty_like(total, sizes_of(total), total.scalar_type()), sums = empty_like(total, {2, parts, a.columns}, ScalarType::Float);
  a.dy = dy.data_ptr();
  a.total = total.data_ptr();
  a.weight = weight.data_ptr();
  a.dtotal = dtotal ? dtotal->data_ptr() : nullptr;
  a.dx = dx.data_ptr();
  a.mean = static_cast<const float*>(mean.data_ptr());
  a.rstd = static_cast<const float*>(rstd.data_ptr());
  a.parts = static_cast<float*>(sums.data_ptr());
  const cudaStream_t stream = current_stream(total);
  if (a.rows > 0) {
    with_type(total.scalar_type(), [&](auto t) {
      using T = decltype(t);
      const bool plain = weight.scalar_type() == total.scalar_type();
      const bool chunks = plain && in_chunks(a.dy, sizeof(T), a.columns, a.dy_row) && in_chunks(a.total, sizeof(T), a.columns, a.total_row) &&
                          in_chunks(a.weight, sizeof(T), a.columns, 0) && in_chunks(a.dtotal, sizeof(T), a.columns, a.dtotal_row);
      if (chunks && with_chunks<T>(a.columns, [&](auto n, auto p) {
            layer_norm_backward_warp_kernel<n, p, T><<<unsigned(parts), 32 * WARPS, 0, stream>>>(a);
          })) {
        return;
      }
      const auto launch = [&](auto w) {
        using W = decltype(w);
        layer_norm_backward_block_kernel<T, W><<<unsigned(a.rows), 256, 0, stream>>>(a);
        const dim3 grid(unsigned((a.columns + 63) / 64), unsigned(parts));
        layer_norm_parameter_sums_kernel<T, W><<<grid, 64, 0, stream>>>(a);
      };
      if (plain) {
        launch(T{});
      } else {
        launch(float{});
      }
    });
    check_launch(op);
  }
  const int64_t count = a.rows > 0 ? parts : 0;
  const ScalarType type = weight.scalar_type();
  Tensor dweight = sum_of_parts(op, a.parts, count, a.columns, total, type);
  Tensor dbias = sum_of_parts(op, a.parts + parts * a.columns, count, a.columns, total, type);
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace vit_fast

STABLE_TORCH_LIBRARY_IMPL(vit_fast_cpp, CUDA, m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&vit_fast::layer_norm_fwd));
  m.impl("layer_norm_bwd", TORCH_BOX(&vit_fast::layer_norm_bwd));
}
