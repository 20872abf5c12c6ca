// Launchers of linear on a GPU: cuBLASLt's products, with its epilogue where that computes what is asked for and with one pass of
// our own behind it where not:
//
//   bias, bias + residual, tanh GELU, the derivative of tanh GELU with the bias's gradient   one product
//   GELU with erf, an activation with a residual, a residual wider than the product          product with bias, then one pass

#include "cublaslt.cuh"
#include "gelu.cuh"

namespace vit_fast {
namespace {

// x [..., depth] times weight [columns, depth]: fills in the operands.
LtProduct take_operands(const char* op, const char* name, const Tensor& x, const Tensor& weight) {
  check_rank(op, "weight", weight, 2);
  check_device(op, "weight", weight, name, x);
  LtProduct p = {};
  p.columns = weight.size(0);
  p.depth = weight.size(1);
  p.x_row = check_rows(op, name, x);
  STD_TORCH_CHECK(
      x.size(x.dim() - 1) == p.depth, op, ": ", name, "'s last axis must be ", p.depth, " as weight's, got shape ",
      text_of(x.sizes()));
  STD_TORCH_CHECK(p.columns > 0 && p.depth > 0, op, ": weight must have elements, got shape ", text_of(weight.sizes()));
  STD_TORCH_CHECK(
      weight.stride(0) == 1 || weight.stride(1) == 1 || p.columns == 1 || p.depth == 1,
      op, ": weight must be contiguous along one axis, got strides ", text_of(weight.strides()));
  check_dtype(op, name, x, FLOATS);
  check_dtype(op, "weight", weight, {x.scalar_type()});
  p.w_row = weight.stride(0);
  p.w_step = p.depth == 1 ? 1 : weight.stride(1);
  if (p.columns == 1 && p.w_step != 1) p.w_row = 1;
  p.rows = rows_of(x);
  // cuBLASLt takes no leading dimension of 0: one row for all is a product of its own for every row's place.
  const bool of_rows = p.w_step == 1;
  STD_TORCH_CHECK(
      of_rows ? p.columns == 1 || p.w_row >= p.depth : p.depth == 1 || p.w_step >= p.columns,
      op, ": weight's rows must not overlap, got strides ", text_of(weight.strides()));
  STD_TORCH_CHECK(
      p.rows <= 1 || p.x_row >= p.depth, op, ": ", name, "'s rows must not overlap, got strides ", text_of(x.strides()));
  p.batch = 1;
  p.x = x.data_ptr();
  p.w = weight.data_ptr();
  p.y_row = p.columns;
  p.type = x.scalar_type();
  return p;
}

std::vector<int64_t> with_columns(const Tensor& x, int64_t columns) {
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = columns;
  return sizes;
}

std::tuple<Tensor, Tensor> linear_fwd(
    Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<std::string> activation, std::optional<Tensor> residual,
    bool keep_preactivation, double dropout_p, double stochastic_depth_p, std::optional<Tensor> /*seed*/) {
  const char* op = "linear_fwd";
  check_nothing_dropped(op, dropout_p, stochastic_depth_p);
  LtProduct p = take_operands(op, "x", x, weight);
  const Activation act = check_activation(op, activation);
  const std::vector<int64_t> sizes = with_columns(x, p.columns);
  if (bias) {
    check_shape(op, "bias", *bias, {p.columns});
    check_contiguous(op, "bias", *bias);
    check_device(op, "bias", *bias, "x", x);
    check_dtype(op, "bias", *bias, {x.scalar_type()});
    p.bias = bias->data_ptr();
    p.epilogue = CUBLASLT_EPILOGUE_BIAS;
  }
  ScalarType y_type = x.scalar_type();
  int64_t residual_row = 0;
  if (residual) {
    check_shape(op, "residual", *residual, sizes);
    check_device(op, "residual", *residual, "x", x);
    check_dtype(op, "residual", *residual, {x.scalar_type(), ScalarType::Float});  // a wider one under autocast
    residual_row = check_rows(op, "residual", *residual);
    y_type = wider(x, *residual);
  }

  const auto guard = guard_of(x);
  Tensor y = empty_like(x, sizes, y_type), z = empty_like(x, keep_preactivation ? sizes : std::vector<int64_t>{0}, x.scalar_type());
  if (p.rows == 0) return {y, z};

  const bool same = y_type == x.scalar_type();
  if (act == Activation::none && !keep_preactivation && same && (!residual || residual_row >= p.columns || p.rows == 1)) {
    p.y = y.data_ptr();
    if (residual) {
      p.residual = residual->data_ptr();
      p.residual_row = residual_row;
    }
    Lt::instance().run(op, p, x);
    return {y, z};
  }
  if (act == Activation::gelu_tanh && !residual && p.columns % 8 == 0) {  // the kept rows lie 16 bytes apart or multiples of it
    p.y = y.data_ptr();
    p.aux = keep_preactivation ? z.data_ptr() : nullptr;
    p.epilogue = keep_preactivation ? (bias ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_AUX)
                                    : (bias ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_GELU);
    Lt::instance().run(op, p, x);
    return {y, z};
  }
  // The pass behind it works in place where nothing needs the pre-activation.
  Tensor product = keep_preactivation ? z : same ? y : empty_like(x, sizes, x.scalar_type());
  p.y = product.data_ptr();
  Lt::instance().run(op, p, x);
  add_epilogue(op, product, act, residual ? &*residual : nullptr, residual_row, y);
  return {y, z};
}

std::tuple<Tensor, Tensor, Tensor> linear_dgelu_bwd(
    Tensor dy, Tensor weight, Tensor z, std::string activation, double dropout_p, std::optional<Tensor> /*seed*/, bool keep_activation) {
  const char* op = "linear_dgelu_bwd";
  check_nothing_dropped(op, dropout_p);
  check_rank(op, "weight", weight, 2);
  LtProduct p = take_operands(op, "dy", dy, torch::stable::transpose(weight, 0, 1));  // dh = dy W
  const Activation act = check_activation(op, activation);
  check_shape(op, "z", z, with_columns(dy, p.columns));
  check_dtype(op, "z", z, {dy.scalar_type()});
  check_contiguous(op, "z", z);
  check_device(op, "z", z, "dy", dy);

  const auto guard = guard_of(dy);
  Tensor dz = empty_like(z, sizes_of(z), z.scalar_type());
  Tensor h = empty_like(z, keep_activation ? sizes_of(z) : std::vector<int64_t>{0}, z.scalar_type());
  p.y = dz.data_ptr();
  if (act == Activation::gelu_tanh && p.columns % 8 == 0 && p.rows > 0) {
    Tensor dbias = empty_like(z, {p.columns}, z.scalar_type());
    p.epilogue = CUBLASLT_EPILOGUE_DGELU_BGRAD;
    p.aux = z.data_ptr();
    p.bias_gradient = dbias.data_ptr();
    Lt::instance().run(op, p, dy);
    if (keep_activation) add_epilogue(op, z, act, nullptr, 0, h);
    return {dz, dbias, h};
  }
  if (p.rows > 0) Lt::instance().run(op, p, dy);
  Tensor dbias = gelu_backward(op, dz, z, act, dz, h);
  return {dz, dbias, h};
}

}  // namespace
}  // namespace vit_fast

STABLE_TORCH_LIBRARY_IMPL(vit_fast_cpp, CUDA, m) {
  m.impl("linear_fwd", TORCH_BOX(&vit_fast::linear_fwd));
  m.impl("linear_dgelu_bwd", TORCH_BOX(&vit_fast::linear_dgelu_bwd));
}
