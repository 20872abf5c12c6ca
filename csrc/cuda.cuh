// What the CUDA launchers and kernels share.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"

namespace vit_fast {

using bf16 = __nv_bfloat16;
using fp16 = __half;

constexpr auto FLOATS = {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16};

// ---- Host -----------------------------------------------------------------------------------------------------------

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline torch::stable::accelerator::DeviceGuard guard_of(const Tensor& tensor) {
  return torch::stable::accelerator::DeviceGuard(tensor.get_device_index());
}

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, op, ": launch failed: ", cudaGetErrorString(error));
}

inline Tensor empty_like(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), type);
}
inline std::vector<int64_t> sizes_of(const Tensor& tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }
inline ScalarType wider(const Tensor& a, const Tensor& b) {
  return a.scalar_type() == ScalarType::Float ? a.scalar_type() : b.scalar_type();
}
inline Tensor as_rows(const Tensor& gradient) {  // a gradient comes in any layout
  int64_t stride;
  return flattens(gradient, stride) ? gradient : torch::stable::contiguous(gradient);
}

inline int multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// Whether rows of `columns` elements, `stride` apart, can be read 16 bytes at a time.
inline bool in_chunks(const void* data, int64_t element_size, int64_t columns, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && columns * element_size % 16 == 0 && stride * element_size % 16 == 0;
}

// f(T{}) with the element type of a tensor of one of FLOATS.
template <class F>
void with_type(ScalarType type, const F& f) {
  if (type == ScalarType::Float) {
    f(float{});
  } else if (type == ScalarType::Half) {
    f(fp16{});
  } else {
    f(bf16{});
  }
}

// ---- Device ---------------------------------------------------------------------------------------------------------

__device__ inline float as_float(float value) { return value; }
__device__ inline float as_float(fp16 value) { return __half2float(value); }
__device__ inline float as_float(bf16 value) { return __bfloat162float(value); }
__device__ inline float as_float(uint8_t value) { return float(value); }
__device__ inline void assign(float& to, float value) { to = value; }
__device__ inline void assign(fp16& to, float value) { to = __float2half_rn(value); }
__device__ inline void assign(bf16& to, float value) { to = __float2bfloat16_rn(value); }

// N neighbours, in memory accesses of 16 bytes where they fill them.
template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Chunk {
  T values[N];
};

template <int N, class T>
__device__ inline void load(const T* from, float (&to)[N]) {
  const Chunk<T, N> chunk = *reinterpret_cast<const Chunk<T, N>*>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = as_float(chunk.values[i]);
}

template <int N, class T>
__device__ inline void store(T* to, const float (&from)[N]) {
  Chunk<T, N> chunk;
#pragma unroll
  for (int i = 0; i < N; ++i) assign(chunk.values[i], from[i]);
  *reinterpret_cast<Chunk<T, N>*>(to) = chunk;
}

__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// Of all threads of a block of whole warps, to all of them. `shared`: one float a warp, free to use.
__device__ inline float block_sum(float value, float* shared) {
  value = warp_sum(value);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0;
  for (int warp = 0; warp < blockDim.x / 32; ++warp) total += shared[warp];
  return total;
}

// sum[column] = Σ over parts, in their order: the same in every run.
template <class T>
__global__ void sum_parts_kernel(const float* parts, int64_t count, int64_t columns, T* sum) {
  const int64_t column = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= columns) return;
  float total = 0;
  for (int64_t part = 0; part < count; ++part) total += parts[part * columns + column];
  assign(sum[column], total);
}

inline Tensor sum_of_parts(const char* op, const float* parts, int64_t count, int64_t columns, const Tensor& like, ScalarType type) {
  Tensor sum = empty_like(like, {columns}, type);
  if (columns == 0) return sum;
  with_type(type, [&](auto t) {
    using T = decltype(t);
    sum_parts_kernel<<<unsigned((columns + 63) / 64), 64, 0, current_stream(like)>>>(
        parts, count, columns, static_cast<T*>(sum.data_ptr()));
  });
  check_launch(op);
  return sum;
}

}  // namespace vit_fast
