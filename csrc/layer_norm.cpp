// Launchers of layer_norm on a CPU.

#include "launch.h"

namespace vit_fast {
namespace {

constexpr auto FLOATS = {ScalarType::Float, ScalarType::BFloat16};
constexpr int64_t LEAST_VALUES = 16384;  // for a thread of its own to be worth its start

int64_t least_rows(int64_t columns) { return std::max<int64_t>(1, LEAST_VALUES / std::max<int64_t>(1, columns)); }

void run(const LayerNormForward& a, int64_t rows) {
  if (rows == 0) return;
  const Kernels& kernel = kernels();
  share(workers_for(rows, least_rows(a.columns)), rows, [&](int, int64_t begin, int64_t end) {
    kernel.layer_norm_forward(a, begin, end);
  });
}

void check_parameters(const char* op, const Tensor& weight, const Tensor& bias, int64_t columns) {
  check_shape(op, "weight", weight, {columns});
  check_shape(op, "bias", bias, {columns});
  check_contiguous(op, "weight", weight);
  check_contiguous(op, "bias", bias);
}

void check_statistics(const char* op, const char* name, const Tensor& tensor, int64_t rows) {
  check_dtype(op, name, tensor, {ScalarType::Float});
  check_contiguous(op, name, tensor);
  STD_TORCH_CHECK(tensor.numel() == rows, op, ": ", name, " must have ", rows, " elements, got ", tensor.numel());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_fwd(
    Tensor x, Tensor weight, Tensor bias, double eps, std::optional<Tensor> residual) {
  const char* op = "layer_norm_fwd";
  LayerNormForward a = {};
  a.x_row = check_rows(op, "x", x);
  const int64_t columns = a.columns = x.size(x.dim() - 1);
  STD_TORCH_CHECK(columns > 0, op, ": x must have columns, got shape ", text_of(x.sizes()));
  check_parameters(op, weight, bias, columns);
  check_dtype(op, "x", x, {ScalarType::Float, ScalarType::BFloat16});
  check_dtype(op, "weight", weight, {ScalarType::Float, ScalarType::BFloat16});
  check_dtype(op, "bias", bias, {weight.scalar_type()});
  check_device(op, "weight", weight, "x", x);
  check_device(op, "bias", bias, "x", x);
  if (residual) {
    check_device(op, "residual", *residual, "x", x);
    check_shape(op, "residual", *residual, sizes_of(x));
    check_dtype(op, "residual", *residual, {ScalarType::Float, ScalarType::BFloat16});
    a.residual_row = check_rows(op, "residual", *residual);
  }
  const ScalarType total_type = residual ? wider(x, *residual) : x.scalar_type();
  STD_TORCH_CHECK(
      weight.scalar_type() == ScalarType::Float || total_type == ScalarType::BFloat16,
      op, ": weight must be at least as wide as the sum, float32, got bfloat16");

  const std::vector<int64_t> sizes = sizes_of(x), rows_sizes(sizes.begin(), sizes.end() - 1);
  Tensor y = empty(sizes, weight.scalar_type());
  Tensor total = residual ? empty(sizes, total_type) : empty({0}, total_type);
  Tensor mean = empty(rows_sizes), rstd = empty(rows_sizes);
  const int64_t rows = rows_of(x);
  if (rows > 0) {
    a.x = x.data_ptr();
    a.residual = residual ? residual->data_ptr() : nullptr;
    a.weight = weight.data_ptr();
    a.bias = bias.data_ptr();
    a.y = y.data_ptr();
    a.y_row = columns;
    a.total = total.data_ptr();
    a.mean = floats_of(mean);
    a.rstd = floats_of(rstd);
    a.eps = float(eps);
    a.x_type = type_of(x);
    a.residual_type = residual ? type_of(*residual) : a.x_type;
    a.weight_type = type_of(weight);
    a.total_type = type_of(total);
    a.y_type = type_of(y);
    run(a, rows);
  }
  return {y, total, mean, rstd};
}

void layer_norm_out(Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias, double eps, Tensor out) {
  const char* op = "layer_norm_out";
  LayerNormForward a = {};
  a.x_row = check_rows(op, "x", x);
  a.columns = x.size(x.dim() - 1);
  STD_TORCH_CHECK(a.columns > 0, op, ": x must have columns, got shape ", text_of(x.sizes()));
  check_dtype(op, "x", x, FLOATS);
  check_out(op, "out", out);
  check_shape(op, "out", out, sizes_of(x));
  check_dtype(op, "out", out, {x.scalar_type()});
  a.y_row = check_rows(op, "out", out);
  check_apart(op, "x", x, out, true);
  a.x_type = a.residual_type = a.weight_type = a.total_type = a.y_type = type_of(x);
  for (const auto& [name, parameter] : {std::make_pair("weight", &weight), std::make_pair("bias", &bias)}) {
    if (!*parameter) continue;
    check_shape(op, name, **parameter, {a.columns});
    check_contiguous(op, name, **parameter);
    check_device(op, name, **parameter, "x", x);
    check_dtype(op, name, **parameter, {ScalarType::Float, x.scalar_type()});
    STD_TORCH_CHECK(
        !weight || (*parameter)->scalar_type() == weight->scalar_type(), op, ": bias must be ", name_of(weight->scalar_type()),
        " as weight, got ", name_of((*parameter)->scalar_type()));
    a.weight_type = type_of(**parameter);
  }
  a.x = x.data_ptr();
  a.weight = weight ? weight->data_ptr() : nullptr;
  a.bias = bias ? bias->data_ptr() : nullptr;
  a.y = out.data_ptr();
  a.eps = float(eps);
  run(a, rows_of(x));
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(
    Tensor dy, Tensor total, Tensor weight, Tensor mean, Tensor rstd, std::optional<Tensor> dtotal) {
  const char* op = "layer_norm_bwd";
  check_shape(op, "dy", dy, sizes_of(total));
  dy = as_rows(dy);
  if (dtotal) dtotal = as_rows(*dtotal);
  LayerNormBackward a = {};
  a.dy_row = check_rows(op, "dy", dy);
  a.total_row = check_rows(op, "total", total);
  const int64_t columns = a.columns = total.size(total.dim() - 1), rows = rows_of(total);
  STD_TORCH_CHECK(columns > 0, op, ": total must have columns, got shape ", text_of(total.sizes()));
  check_parameters(op, weight, weight, columns);
  check_dtype(op, "total", total, {ScalarType::Float, ScalarType::BFloat16});
  check_dtype(op, "weight", weight, {ScalarType::Float, ScalarType::BFloat16});
  check_dtype(op, "dy", dy, {weight.scalar_type()});
  check_statistics(op, "mean", mean, rows);
  check_statistics(op, "rstd", rstd, rows);
  if (dtotal) {
    check_shape(op, "dtotal", *dtotal, sizes_of(total));
    check_dtype(op, "dtotal", *dtotal, {total.scalar_type()});
    a.dtotal_row = check_rows(op, "dtotal", *dtotal);
  }

  const int64_t parts = parts_of(rows);
  Tensor dx = empty(sizes_of(total), total.scalar_type()), sums = empty({2, parts, columns});
  a.rows = rows;
  a.dy = dy.data_ptr();
  a.total = total.data_ptr();
  a.weight = weight.data_ptr();
  a.dtotal = dtotal ? dtotal->data_ptr() : nullptr;
  a.dx = dx.data_ptr();
  a.mean = floats_of(mean);
  a.rstd = floats_of(rstd);
  a.sums = floats_of(sums);
  a.type = type_of(total);
  a.weight_type = type_of(weight);
  const Kernels& kernel = kernels();
  share(workers_for(parts), parts, [&](int, int64_t begin, int64_t end) { kernel.layer_norm_backward(a, begin, end); });
  const ScalarType type = weight.scalar_type();
  return {dx, sum_of_parts(a.sums, parts, columns, type), sum_of_parts(a.sums + parts * columns, parts, columns, type)};
}

}  // namespace
}  // namespace vit_fast

STABLE_TORCH_LIBRARY_IMPL(vit_fast_cpp, CPU, m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&vit_fast::layer_norm_fwd));
  m.impl("layer_norm_out", TORCH_BOX(&vit_fast::layer_norm_out));
  m.impl("layer_norm_bwd", TORCH_BOX(&vit_fast::layer_norm_bwd));
}
