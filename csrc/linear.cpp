// Launchers of linear and of its epilogue's derivative on a CPU, and of the product that they share with patch_embed.

#include "launch.h"

namespace vit_fast {
namespace {

void pack(const Product& a) {
  const Kernels& kernel = kernels();
  const int64_t panels = kernel.product_panels(a);
  share(workers_for(panels), panels, [&](int, int64_t begin, int64_t end) { kernel.product_pack(a, begin, end); });
}

void compute(Product& a) {
  const Kernels& kernel = kernels();
  const int64_t tiles = kernel.product_tiles(a), workers = workers_for(tiles);
  Tensor scratch = floats(workers * kernel.product_scratch_size(a));
  a.scratch = floats_of(scratch);
  share(workers, tiles, [&](int worker, int64_t begin, int64_t end) { kernel.product(a, worker, begin, end); });
}

void check_packed(const char* op, const Tensor& packed) {
  check_rank(op, "packed", packed, 3);
  check_dtype(op, "packed", packed, {ScalarType::Float});
  STD_TORCH_CHECK(packed.is_cpu(), op, ": packed must be on the CPU");
  const char* other = set_with_panel(packed.size(2));
  STD_TORCH_CHECK(
      packed.size(2) == kernels().panel, op, ": packed must be for ", kernels().name, ", [panels, depth, ", kernels().panel,
      "], got ", text_of(packed.sizes()), other ? std::string(" for ") + other : std::string());
  check_contiguous(op, "packed", packed);
  STD_TORCH_CHECK(packed.size(1) > 0, op, ": packed must have elements, got shape ", text_of(packed.sizes()));
}

}  // namespace

void run_product(Product& a) {
  const Kernels& kernel = kernels();
  // A packed operand is read and written once more, and packing x turns the result: x is packed where it has far fewer rows (both
  // are as fast at a third of them; Xeon with AVX-512, 2026-11-24). A weight that is contiguous along its rows can only be packed.
  a.pack_x = a.w_step == 1 && 3 * a.rows <= a.columns;
  Tensor packed = floats(kernel.product_packed_size(a));
  a.packed = floats_of(packed);
  pack(a);
  compute(a);
}

void run_packed_product(Product& a) {
  a.pack_x = false;
  compute(a);
}

void take_packed(const char* op, Product& a, const Tensor& packed, int64_t columns) {
  check_packed(op, packed);
  const int64_t panel = kernels().panel;
  STD_TORCH_CHECK(
      columns > 0 && packed.size(0) == (columns + panel - 1) / panel,
      op, ": packed must have ", (columns + panel - 1) / panel, " panels of ", panel, " columns for out's ", columns, ", got shape ",
      text_of(packed.sizes()));
  a.columns = columns;
  a.depth = packed.size(1);
  a.packed = floats_of(packed);
}

void take_bias(const char* op, Product& a, const Tensor& bias, ScalarType type) {
  check_shape(op, "bias", bias, {a.columns});
  check_contiguous(op, "bias", bias);
  STD_TORCH_CHECK(bias.is_cpu(), op, ": bias must be on the CPU");
  check_dtype(op, "bias", bias, {ScalarType::Float, type});
  a.bias = bias.data_ptr();
  a.bias_type = type_of(bias);
}

namespace {

constexpr auto FLOATS = {ScalarType::Float, ScalarType::BFloat16};

// weight [columns, depth]
void take_weight(const char* op, Product& a, const Tensor& weight) {
  check_rank(op, "weight", weight, 2);
  a.columns = weight.size(0);
  a.depth = weight.size(1);
  STD_TORCH_CHECK(a.columns > 0 && a.depth > 0, op, ": weight must have elements, got shape ", text_of(weight.sizes()));
  STD_TORCH_CHECK(
      weight.stride(0) == 1 || weight.stride(1) == 1 || a.columns == 1 || a.depth == 1,
      op, ": weight must be contiguous along one axis, got strides ", text_of(weight.strides()));
  check_dtype(op, "weight", weight, FLOATS);
  a.w_row = weight.stride(0);
  a.w_step = a.depth == 1 ? 1 : weight.stride(1);
  if (a.columns == 1 && a.w_step != 1) a.w_row = 1;
  a.w = weight.data_ptr();
}

// x [..., depth], whose depth is that of the operand `of`.
void take_x(const char* op, Product& a, const Tensor& x, const char* of) {
  a.x_row = check_rows(op, "x", x);
  STD_TORCH_CHECK(
      x.size(x.dim() - 1) == a.depth, op, ": x's last axis must be ", a.depth, " as ", of, "'s, got shape ", text_of(x.sizes()));
  check_dtype(op, "x", x, FLOATS);
  a.rows = rows_of(x);
  a.group = std::max<int64_t>(1, a.rows);
  a.x = x.data_ptr();
  a.x_type = a.bias_type = a.residual_type = a.y_type = type_of(x);
}

void take_operands(const char* op, Product& a, const Tensor& x, const Tensor& weight) {
  check_rank(op, "weight", weight, 2);
  check_device(op, "weight", weight, "x", x);
  check_dtype(op, "weight", weight, {x.scalar_type()});
  take_weight(op, a, weight);
  take_x(op, a, x, "weight");
}

void take_residual(
    const char* op, Product& a, const Tensor& x, const Tensor& residual, const std::vector<int64_t>& sizes,
    std::initializer_list<ScalarType> types) {
  check_shape(op, "residual", residual, sizes);
  check_device(op, "residual", residual, "x", x);
  a.residual_row = check_rows(op, "residual", residual);
  check_dtype(op, "residual", residual, types);
  a.residual = residual.data_ptr();
  a.residual_type = type_of(residual);
}

std::vector<int64_t> with_columns(const Tensor& x, int64_t columns) {
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = columns;
  return sizes;
}

// What stochastic depth multiplies each entry of the first axis with, and the number of rows in one; no factors where p is 0.
struct Images {
  std::optional<Tensor> factors;
  int64_t rows = 1;

  Images(const char* op, const Tensor& x, double p, const std::optional<Tensor>& seed) {
    const Dropout depth = dropout_of(op, "stochastic_depth_p", p, seed);
    if (!depth.on || x.numel() == 0) return;
    const int64_t images = x.dim() > 1 ? x.size(0) : 1;
    rows = rows_of(x) / images;
    factors = floats(images);
    kernels().stochastic_depth(depth, images, floats_of(*factors));
  }
  const float* get() const { return factors ? floats_of(*factors) : nullptr; }
};

std::tuple<Tensor, Tensor> linear_fwd(
    Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<std::string> activation, std::optional<Tensor> residual,
    bool keep_preactivation, double dropout_p, double stochastic_depth_p, std::optional<Tensor> seed) {
  const char* op = "linear_fwd";
  Product a = {};
  take_operands(op, a, x, weight);
  a.activation = int8_t(check_activation(op, activation));
  const std::vector<int64_t> sizes = with_columns(x, a.columns);
  if (bias) {
    check_dtype(op, "bias", *bias, {x.scalar_type()});
    take_bias(op, a, *bias, x.scalar_type());
  }
  ScalarType y_type = x.scalar_type();
  if (residual) {
    take_residual(op, a, x, *residual, sizes, {ScalarType::Float, x.scalar_type()});  // a wider one under autocast
    y_type = wider(x, *residual);
  }
  a.dropout = dropout_of(op, "dropout_p", dropout_p, seed);
  const Images images(op, x, stochastic_depth_p, seed);
  a.image_factors = images.get();
  a.image_rows = images.rows;

  Tensor y = empty(sizes, y_type), z = empty(keep_preactivation ? sizes : std::vector<int64_t>{0}, x.scalar_type());
  if (a.rows > 0) {
    a.y = y.data_ptr();
    a.y_row = a.z_row = a.columns;
    a.y_type = type_of(y);
    a.z = keep_preactivation ? z.data_ptr() : nullptr;
    run_product(a);
  }
  return {y, z};
}

Tensor linear_pack(Tensor weight) {
  Product a = {};
  take_weight("linear_pack", a, weight);
  a.x_type = type_of(weight);
  const int64_t panel = kernels().panel;
  Tensor packed = empty({(a.columns + panel - 1) / panel, a.depth, panel});
  a.packed = floats_of(packed);
  pack(a);
  return packed;
}

Tensor linear_unpack(Tensor packed, int64_t columns) {
  const char* op = "linear_unpack";
  check_rank(op, "packed", packed, 3);
  check_dtype(op, "packed", packed, {ScalarType::Float});
  check_contiguous(op, "packed", packed);
  const int64_t panels = packed.size(0), depth = packed.size(1), panel = packed.size(2);
  STD_TORCH_CHECK(
      columns >= 0 && columns <= panels * panel && columns > (panels - 1) * panel,
      op, ": columns must be what ", panels, " panels of ", panel, " hold, got ", columns);
  Tensor weight = empty({columns, depth});
  const float* from = floats_of(packed);
  float* to = floats_of(weight);
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t k = 0; k < depth; ++k) *to++ = from[(j / panel * depth + k) * panel + j % panel];
  }
  return weight;
}

void linear_packed_out(
    Tensor x, Tensor packed, std::optional<Tensor> bias, std::optional<std::string> activation, std::optional<Tensor> residual,
    Tensor out) {
  const char* op = "linear_packed_out";
  check_out(op, "out", out);
  Product a = {};
  take_packed(op, a, packed, out.size(out.dim() - 1));
  take_x(op, a, x, "packed");
  check_shape(op, "out", out, with_columns(x, a.columns));
  check_dtype(op, "out", out, {x.scalar_type(), ScalarType::Float});
  check_apart(op, "x", x, out);
  a.activation = int8_t(check_activation(op, activation, true));
  a.y = out.data_ptr();
  a.y_row = check_rows(op, "out", out);
  a.y_type = type_of(out);
  if (bias) take_bias(op, a, *bias, x.scalar_type());
  if (residual) {
    take_residual(op, a, x, *residual, sizes_of(out), {out.scalar_type()});
    check_apart(op, "residual", *residual, out, true);
  }
  if (a.rows > 0) run_packed_product(a);
}

void check_preactivation(const char* op, const Tensor& z) {
  check_contiguous(op, "z", z);
  STD_TORCH_CHECK(z.dim() > 0, op, ": z must have at least one axis, got a scalar");
  check_dtype(op, "z", z, FLOATS);
}

// (dz, dbias, h), contiguous: see EpilogueBackward; dbias the sum of dz over the rows, h of no elements unless it is to be kept. Where
// dz may be dy, no memory is taken for it.
std::tuple<Tensor, Tensor, Tensor> run_epilogue_backward(
    const Tensor& dy, const Tensor* z, Activation activation, const Dropout& dropout, const Images* images, bool keep_activation,
    bool in_place) {
  const int64_t columns = dy.size(dy.dim() - 1), rows = rows_of(dy), parts = parts_of(rows);
  const std::vector<int64_t> sizes = sizes_of(dy);
  Tensor dz = in_place ? dy : empty(sizes, dy.scalar_type());
  Tensor h = empty(keep_activation ? sizes : std::vector<int64_t>{0}, dy.scalar_type());
  Tensor sums = floats(parts * columns);
  EpilogueBackward a = {};
  a.dy = dy.data_ptr();
  a.z = z ? z->data_ptr() : nullptr;
  a.dz = dz.data_ptr();
  a.h = keep_activation ? h.data_ptr() : nullptr;
  a.sums = floats_of(sums);
  a.rows = rows;
  a.columns = columns;
  a.type = type_of(dy);
  a.activation = int8_t(activation);
  a.dropout = dropout;
  a.image_factors = images ? images->get() : nullptr;
  a.image_rows = images ? images->rows : 1;
  const Kernels& kernel = kernels();
  share(workers_for(parts), parts, [&](int, int64_t begin, int64_t end) { kernel.epilogue_backward(a, begin, end); });
  return {dz, sum_of_parts(a.sums, parts, columns, dy.scalar_type()), h};
}

std::tuple<Tensor, Tensor, Tensor> linear_dgelu_bwd(
    Tensor dy, Tensor weight, Tensor z, std::string activation, double dropout_p, std::optional<Tensor> seed, bool keep_activation) {
  const char* op = "linear_dgelu_bwd";
  check_rank(op, "weight", weight, 2);
  Product a = {};
  take_operands(op, a, dy, torch::stable::transpose(weight, 0, 1));  // dh = dy W
  check_preactivation(op, z);
  check_shape(op, "z", z, with_columns(dy, a.columns));
  check_dtype(op, "z", z, {dy.scalar_type()});
  const Activation act = check_activation(op, activation);
  const Dropout dropout = dropout_of(op, "dropout_p", dropout_p, seed);
  // torch's product, which is as fast for a weight to be read across its rows; act'(z) in place behind it.
  return run_epilogue_backward(torch::stable::matmul(dy, weight), &z, act, dropout, nullptr, keep_activation, true);
}

std::tuple<Tensor, Tensor, Tensor> epilogue_bwd(
    Tensor dy, std::optional<Tensor> z, std::optional<std::string> activation, double dropout_p, double stochastic_depth_p,
    std::optional<Tensor> seed, bool keep_activation) {
  const char* op = "epilogue_bwd";
  const Activation act = check_activation(op, activation);
  STD_TORCH_CHECK(
      z.has_value() == (act != Activation::none) && (z || !keep_activation), op, ": z must come with an activation and only then");
  if (z) {
    check_preactivation(op, *z);
    check_shape(op, "dy", dy, sizes_of(*z));
    check_dtype(op, "dy", dy, {z->scalar_type(), ScalarType::Float});
    if (dy.scalar_type() != z->scalar_type()) dy = torch::stable::to(dy, z->scalar_type());  // a wider residual's, under autocast
  }
  STD_TORCH_CHECK(dy.dim() > 0, op, ": dy must have at least one axis, got a scalar");
  check_dtype(op, "dy", dy, FLOATS);
  check_contiguous(op, "dy", dy);
  const Dropout dropout = dropout_of(op, "dropout_p", dropout_p, seed);
  const Images images(op, dy, stochastic_depth_p, seed);
  return run_epilogue_backward(dy, z ? &*z : nullptr, act, dropout, &images, keep_activation, false);
}

}  // namespace
}  // namespace vit_fast

STABLE_TORCH_LIBRARY_IMPL(vit_fast_cpp, CPU, m) {
  m.impl("linear_fwd", TORCH_BOX(&vit_fast::linear_fwd));
  m.impl("linear_pack", TORCH_BOX(&vit_fast::linear_pack));
  m.impl("linear_unpack", TORCH_BOX(&vit_fast::linear_unpack));
  m.impl("linear_packed_out", TORCH_BOX(&vit_fast::linear_packed_out));
  m.impl("linear_dgelu_bwd", TORCH_BOX(&vit_fast::linear_dgelu_bwd));
  m.impl("epilogue_bwd", TORCH_BOX(&vit_fast::epilogue_bwd));
}
