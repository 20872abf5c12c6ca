// GELU as an epilogue of its own, for what cuBLASLt's can't do: with erf, with a residual behind it, with a wider residual. And its
// backward pass with the bias's gradient.

#include "gelu.cuh"

namespace vit_fast {
namespace {

constexpr int THREADS = 256;

// N elements a thread; `columns` is a multiple of N, so that they lie in one row.
template <int N, Activation activation, class Z, class R, class Y>
__global__ void __launch_bounds__(THREADS) add_epilogue_kernel(
    const Z* z, const R* residual, Y* y, int64_t size, int64_t columns, int64_t residual_row) {
  const int64_t i = (int64_t(blockIdx.x) * THREADS + threadIdx.x) * N;
  if (i >= size) return;
  float values[N];
  load<N>(z + i, values);
#pragma unroll
  for (int k = 0; k < N; ++k) values[k] = activated<activation>(values[k]);
  if (residual != nullptr) {
    float more[N];
    const int64_t row = i / columns;
    load<N>(residual + row * residual_row + (i - row * columns), more);
#pragma unroll
    for (int k = 0; k < N; ++k) values[k] += more[k];
  }
  store<N>(y + i, values);
}

// A block owns 32 N columns and every gridDim.y-th group of 8 rows; parts: [gridDim.y][columns].
template <int N, Activation activation, class T>
__global__ void __launch_bounds__(THREADS) gelu_backward_kernel(
    const T* dy, const T* z, T* dz, T* h, float* parts, int64_t rows, int64_t columns) {
  const int64_t column = (int64_t(blockIdx.x) * 32 + threadIdx.x) * N;
  float sums[N] = {};
  if (column < columns) {
    for (int64_t row = int64_t(blockIdx.y) * 8 + threadIdx.y; row < rows; row += int64_t(gridDim.y) * 8) {
      float d[N], at[N];
      load<N>(dy + row * columns + column, d);
      load<N>(z + row * columns + column, at);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        d[k] *= derivative_at<activation>(at[k]);
        sums[k] += d[k];
        at[k] = activated<activation>(at[k]);
      }
      if (h != nullptr) store<N>(h + row * columns + column, at);
      store<N>(dz + row * columns + column, d);
    }
  }
  __shared__ float shared[8][32][N + 1];  // one more: no two lanes in one bank
#pragma unroll
  for (int k = 0; k < N; ++k) shared[threadIdx.y][threadIdx.x][k] = sums[k];
  __syncthreads();
  if (threadIdx.y == 0 && column < columns) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      float total = 0;
      for (int y = 0; y < 8; ++y) total += shared[y][threadIdx.x][k];
      parts[int64_t(blockIdx.y) * columns + column + k] = total;
    }
  }
}

template <class F>
void with_activation(Activation activation, const F& f) {
  if (activation == Activation::gelu) {
    f(std::integral_constant<Activation, Activation::gelu>{});
  } else if (activation == Activation::gelu_tanh) {
    f(std::integral_constant<Activation, Activation::gelu_tanh>{});
  } else {
    f(std::integral_constant<Activation, Activation::none>{});
  }
}

}  // namespace

void add_epilogue(const char* op, const Tensor& z, Activation activation, const Tensor* residual, int64_t residual_row, Tensor& y) {
  const int64_t size = z.numel(), columns = z.size(z.dim() - 1);
  if (size == 0) return;
  const cudaStream_t stream = current_stream(z);
  const bool mixed = residual != nullptr && residual->scalar_type() != z.scalar_type();  // a float32 residual of 16-bit rows
  with_type(z.scalar_type(), [&](auto t) {
    using Z = decltype(t);
    constexpr int N = 16 / sizeof(Z);
    with_activation(activation, [&](auto act) {
      const auto launch = [&](auto n, auto r) {
        using R = decltype(r);  // y has the residual's type: the wider one
        const int64_t blocks = (size + int64_t(THREADS) * n - 1) / (int64_t(THREADS) * n);
        add_epilogue_kernel<n, act, Z, R, R><<<unsigned(blocks), THREADS, 0, stream>>>(
            static_cast<const Z*>(z.data_ptr()), residual ? static_cast<const R*>(residual->data_ptr()) : nullptr,
            static_cast<R*>(y.data_ptr()), size, columns, residual_row);
      };
      const auto launch_chunks = [&](auto r) {
        const bool chunks = in_chunks(z.data_ptr(), sizeof(Z), columns, columns) && in_chunks(y.data_ptr(), sizeof(r), columns, columns) &&
                            (residual == nullptr || in_chunks(residual->data_ptr(), sizeof(r), columns, residual_row));
        if (chunks) {
          launch(std::integral_constant<int, N>{}, r);
        } else {
          launch(std::integral_constant<int, 1>{}, r);
        }
      };
      if (mixed) {
        launch_chunks(float{});
      } else {
        launch_chunks(Z{});
      }
    });
  });
  check_launch(op);
}

Tensor gelu_backward(const char* op, const Tensor& dy, const Tensor& z, Activation activation, Tensor& dz, Tensor& h) {
  const int64_t columns = z.size(z.dim() - 1), rows = rows_of(z);
  // Enough blocks to fill the device, few enough for the parts to be small beside the data.
  const int64_t column_blocks = (columns + 255) / 256;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>((rows + 7) / 8, 8 * multiprocessors() / std::max<int64_t>(1, column_blocks)));
  Tensor partial = empty_like(z, {parts, columns}, ScalarType::Float);
  if (rows > 0 && columns > 0) {
    with_type(z.scalar_type(), [&](auto t) {
      using T = decltype(t);
      constexpr int CHUNK = 16 / sizeof(T);
      const bool chunks = in_chunks(z.data_ptr(), sizeof(T), columns, columns) && in_chunks(dy.data_ptr(), sizeof(T), columns, columns) &&
                          in_chunks(dz.data_ptr(), sizeof(T), columns, columns) && in_chunks(h.data_ptr(), sizeof(T), columns, columns);
      with_activation(activation, [&](auto act) {
        if constexpr (act != Activation::none) {
          const auto launch = [&](auto n) {
            const dim3 grid(unsigned((columns + 32 * n - 1) / (32 * n)), unsigned(parts));
            gelu_backward_kernel<n, act, T><<<grid, dim3(32, 8), 0, current_stream(z)>>>(
                static_cast<const T*>(dy.data_ptr()), static_cast<const T*>(z.data_ptr()), static_cast<T*>(dz.data_ptr()),
                h.numel() > 0 ? static_cast<T*>(h.data_ptr()) : nullptr, static_cast<float*>(partial.data_ptr()), rows, columns);
          };
          if (chunks) {
            launch(std::integral_constant<int, CHUNK>{});
          } else {
            launch(std::integral_constant<int, 1>{});
          }
        }
      });
    });
    check_launch(op);
  }
  return sum_of_parts(op, static_cast<const float*>(partial.data_ptr()), rows > 0 ? parts : 0, columns, z, z.scalar_type());
}

namespace {

std::tuple<Tensor, Tensor, Tensor> epilogue_bwd(
    Tensor dy, std::optional<Tensor> given_z, std::optional<std::string> activation, double dropout_p, double stochastic_depth_p,
    std::optional<Tensor> /*seed*/, bool keep_activation) {
  const char* op = "epilogue_bwd";
  const Activation act = check_activation(op, activation);
  check_nothing_dropped(op, dropout_p, stochastic_depth_p);
  STD_TORCH_CHECK(given_z && act != Activation::none, op, ": z and an activation must be there");
  const Tensor& z = *given_z;
  check_contiguous(op, "z", z);
  STD_TORCH_CHECK(z.dim() > 0, op, ": z must have at least one axis, got a scalar");
  check_dtype(op, "z", z, FLOATS);
  check_shape(op, "dy", dy, sizes_of(z));
  check_contiguous(op, "dy", dy);
  check_device(op, "dy", dy, "z", z);
  check_dtype(op, "dy", dy, {z.scalar_type(), ScalarType::Float});
  const auto guard = guard_of(z);
  if (dy.scalar_type() != z.scalar_type()) dy = torch::stable::to(dy, z.scalar_type());  // a wider residual's, under autocast
  Tensor dz = empty_like(z, sizes_of(z), z.scalar_type());
  Tensor h = empty_like(z, keep_activation ? sizes_of(z) : std::vector<int64_t>{0}, z.scalar_type());
  Tensor dbias = gelu_backward(op, dy, z, act, dz, h);
  return {dz, dbias, h};
}

}  // namespace
}  // namespace vit_fast

STABLE_TORCH_LIBRARY_IMPL(vit_fast_cpp, CUDA, m) { m.impl("epilogue_bwd", TORCH_BOX(&vit_fast::epilogue_bwd)); }
