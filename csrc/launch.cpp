// What launchers ask of memory that the caller gives for results.

#include "launch.h"

#include <numeric>

namespace vit_fast {
namespace {

int64_t bytes_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Byte: return 1;
    case ScalarType::BFloat16: return 2;
    default: return 4;
  }
}

// From the first element to behind the last one, in elements.
int64_t extent(const Tensor& tensor) {
  int64_t count = 1;
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) count += (tensor.size(axis) - 1) * tensor.stride(axis);
  return count;
}

bool same_place(const Tensor& a, const Tensor& b) {
  if (a.data_ptr() != b.data_ptr() || a.scalar_type() != b.scalar_type() || a.dim() != b.dim()) return false;
  for (int64_t axis = 0; axis < a.dim(); ++axis) {
    if (a.size(axis) != b.size(axis) || (a.size(axis) > 1 && a.stride(axis) != b.stride(axis))) return false;
  }
  return true;
}

}  // namespace

Dropout dropout_of(const char* op, const char* name, double p, const std::optional<Tensor>& seed) {
  STD_TORCH_CHECK(p >= 0 && p <= 1, op, ": ", name, " must be in [0, 1], got ", p);
  if (p == 0) return {};
  STD_TORCH_CHECK(seed.has_value(), op, ": ", name, " ", p, " needs a seed");
  check_shape(op, "seed", *seed, {1});
  check_dtype(op, "seed", *seed, {ScalarType::Long});
  STD_TORCH_CHECK(seed->is_cpu(), op, ": seed must be on the CPU");
  const int64_t limit = std::min<int64_t>(int64_t(p * 4294967296.), 4294967295) - 2147483648;
  return {true, uint64_t(*static_cast<const int64_t*>(seed->data_ptr())), int32_t(limit), p < 1 ? float(1 / (1 - p)) : 0.f};
}

void check_out(const char* op, const char* name, const Tensor& out) {
  STD_TORCH_CHECK(out.dim() > 0 && out.is_cpu(), op, ": ", name, " must be on the CPU and have at least one axis");
  if (out.numel() == 0) return;
  const int64_t last = out.dim() - 1;
  std::vector<int64_t> axes(out.dim());
  std::iota(axes.begin(), axes.end(), 0);
  std::sort(axes.begin(), axes.end(), [&](int64_t a, int64_t b) { return out.stride(a) < out.stride(b); });
  int64_t below = 1;  // how far the axes of smaller strides reach
  bool apart = out.size(last) == 1 || out.stride(last) == 1;
  for (const int64_t axis : axes) {
    if (out.size(axis) == 1) continue;
    apart = apart && out.stride(axis) >= below;
    below += (out.size(axis) - 1) * out.stride(axis);
  }
  STD_TORCH_CHECK(
      apart, op, ": ", name, " must be rows of contiguous values, none in two places, got shape ", text_of(out.sizes()), ", strides ",
      text_of(out.strides()));
}

void check_apart(const char* op, const char* name, const Tensor& input, const Tensor& out, bool in_place) {
  if (input.numel() == 0 || out.numel() == 0 || (in_place && same_place(input, out))) return;
  const int64_t size = bytes_of(input), out_size = bytes_of(out);
  const char* from = static_cast<const char*>(input.data_ptr());
  const char* to = static_cast<const char*>(out.data_ptr());
  if (from + extent(input) * size <= to || to + extent(out) * out_size <= from) return;
  int64_t row, out_row;
  bool apart = flattens(input, row) && flattens(out, out_row) && row * size == out_row * out_size && row > 0;
  if (apart) {  // rows as far from each other in both: where out's lie between the input's
    const int64_t stride = row * size, offset = ((to - from) % stride + stride) % stride;
    apart = offset >= input.size(input.dim() - 1) * size && offset + out.size(out.dim() - 1) * out_size <= stride;
  }
  STD_TORCH_CHECK(apart, op, ": ", name, " must not share memory with out", in_place ? " unless it is out itself" : "");
}

}  // namespace vit_fast
