// What the launchers refuse before anything is allocated. The messages say who, what was needed, and what came:
// "layer_norm_fwd: weight must be [768], got [512]". Host code, for CPU and CUDA objects alike.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <vector>

namespace vit_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Long: return "int64";
    default: return "another dtype";
  }
}

template <class Sizes>
std::string text_of(const Sizes& sizes) {
  std::string text = "[";
  for (const int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

inline void check_rank(const char* op, const char* name, const Tensor& tensor, int64_t rank) {
  STD_TORCH_CHECK(
      tensor.dim() == rank, op, ": ", name, " must have ", rank, " axes, got shape ", text_of(tensor.sizes()));
}

inline void check_shape(const char* op, const char* name, const Tensor& tensor, std::vector<int64_t> expected) {
  const auto sizes = tensor.sizes();
  bool same = sizes.size() == expected.size();
  for (size_t i = 0; same && i < expected.size(); ++i) same = sizes[i] == expected[i];
  STD_TORCH_CHECK(same, op, ": ", name, " must be ", text_of(expected), ", got ", text_of(sizes));
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, std::initializer_list<ScalarType> allowed) {
  std::string names;
  for (const ScalarType type : allowed) {
    if (tensor.scalar_type() == type) return;
    if (names == name_of(type)) continue;  // float32, or the dtype of another operand, which is float32
    names += (names.empty() ? "" : " or ") + std::string(name_of(type));
  }
  STD_TORCH_CHECK(false, op, ": ", name, " must be ", names, ", got ", name_of(tensor.scalar_type()));
}

// On the device of `first`. The dispatcher brings tensors of the two device types here when one argument decides.
inline void check_device(const char* op, const char* name, const Tensor& tensor, const char* first_name, const Tensor& first) {
  STD_TORCH_CHECK(
      tensor.is_cpu() == first.is_cpu() && tensor.get_device_index() == first.get_device_index(),
      op, ": ", name, " must be on the device of ", first_name);
}

// Whether a tensor is a matrix of its last axis: the leading axes flatten to one, the last is contiguous. `stride`: between its rows.
inline bool flattens(const Tensor& tensor, int64_t& stride) {
  const int64_t last = tensor.dim() - 1;
  stride = 0;
  if (last < 0) return false;
  stride = tensor.size(last);
  if (tensor.numel() == 0) return true;
  if (tensor.stride(last) != 1 && tensor.size(last) != 1) return false;
  int64_t expected = -1;
  for (int64_t axis = last - 1; axis >= 0; --axis) {
    if (tensor.size(axis) == 1) continue;
    if (expected < 0) stride = tensor.stride(axis);
    if (expected >= 0 && tensor.stride(axis) != expected) return false;
    expected = tensor.stride(axis) * tensor.size(axis);
  }
  return true;
}

// The distance in elements between the rows of a tensor seen as a matrix of its last axis.
inline int64_t check_rows(const char* op, const char* name, const Tensor& tensor) {
  int64_t stride;
  STD_TORCH_CHECK(
      flattens(tensor, stride), op, ": ", name, " must be rows of contiguous values, its leading axes flattening to one, got shape ",
      text_of(tensor.sizes()), ", strides ", text_of(tensor.strides()));
  return stride;
}

inline void check_contiguous(const char* op, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(
      tensor.is_contiguous(), op, ": ", name, " must be contiguous, got shape ", text_of(tensor.sizes()), ", strides ",
      text_of(tensor.strides()));
}

// The number of rows of a tensor seen as a matrix of its last axis.
inline int64_t rows_of(const Tensor& tensor) {
  int64_t rows = 1;
  for (int64_t axis = 0; axis + 1 < tensor.dim(); ++axis) rows *= tensor.size(axis);
  return rows;
}

enum class Activation { none, gelu, gelu_tanh, silu };

// `silu`: whether the operation, which has no backward pass then, knows that one too.
inline Activation check_activation(const char* op, const std::optional<std::string>& name, bool silu = false) {
  if (!name) return Activation::none;
  if (*name == "gelu") return Activation::gelu;
  if (*name == "silu" && silu) return Activation::silu;
  const char* known = silu ? "'gelu', 'gelu_tanh' or 'silu'" : "'gelu' or 'gelu_tanh'";
  STD_TORCH_CHECK(*name == "gelu_tanh", op, ": activation must be ", known, ", got '", *name, "'");
  return Activation::gelu_tanh;
}

}  // namespace vit_fast
