// What the CPU launchers share: memory from torch's allocator, and work shared out over torch's threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu.h"

namespace vit_fast {

inline Type type_of(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::BFloat16 ? Type::bf16 : Type::f32; }
inline ScalarType wider(const Tensor& a, const Tensor& b) { return type_of(a) == Type::f32 ? a.scalar_type() : b.scalar_type(); }

// Contiguous. Through the shim's own call: 0.8 µs less than the dispatcher's takes (AMD EPYC,
// 2026-11-23), which counts where an operation takes 10 µs.
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType type = ScalarType::Float) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(1, sizes[i])) strides[i] = stride;
  const int32_t dtype = type == ScalarType::Float    ? aoti_torch_dtype_float32()
                        : type == ScalarType::Double ? aoti_torch_dtype_float64()
                                                     : aoti_torch_dtype_bfloat16();
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}
inline Tensor floats(int64_t count) { return empty({count}); }
inline float* floats_of(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

inline std::vector<int64_t> sizes_of(const Tensor& tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }

// A gradient comes in any layout, that of a sum as one element expanded.
inline Tensor as_rows(const Tensor& gradient) {
  int64_t stride;
  return flattens(gradient, stride) ? gradient : torch::stable::contiguous(gradient);
}

// How many of torch's threads `items` of work are worth, at least `least` of them for each; 1 for no work.
inline int64_t workers_for(int64_t items, int64_t least = 1) {
  const int64_t worth = (items + least - 1) / least;
  return std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), worth));
}

// f(worker, begin, end) for each of `workers` equal shares of `items`, at the same time.
template <class F>
void share(int64_t workers, int64_t items, const F& f) {
  if (workers == 1) return f(0, int64_t(0), items);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker) f(int(worker), items * worker / workers, items * (worker + 1) / workers);
  });
}

// parts [count][columns] added up.
inline Tensor sum_of_parts(const float* parts, int64_t count, int64_t columns, ScalarType type) {
  Tensor sum = empty({columns}, type);
  kernels().add_rows(parts, count, columns, sum.data_ptr(), type_of(sum));
  return sum;
}

// A caller's memory to write: on a CPU, its last axis contiguous, no element of it in two places.
void check_out(const char* op, const char* name, const Tensor& out);
// An input may be the output itself where `in_place`, else no memory of it. Rows of one matrix may lie between those of the other.
void check_apart(const char* op, const char* name, const Tensor& input, const Tensor& out, bool in_place = false);

// Drops with probability p, by the seed, int64 [1], which must be there where p is above 0.
Dropout dropout_of(const char* op, const char* name, double p, const std::optional<Tensor>& seed);

// Packs one operand and computes; chooses which, and allocates what both steps need.
void run_product(Product& a);
// The same with a weight that linear_pack made, or a range of its panels: `take_packed` fills it in, columns and depth with it.
void take_packed(const char* op, Product& a, const Tensor& packed, int64_t columns);
void run_packed_product(Product& a);

// Of length a.columns, in float32 or in `type`.
void take_bias(const char* op, Product& a, const Tensor& bias, ScalarType type);

}  // namespace vit_fast
