// Launchers of attention on a CPU.

#include "launch.h"

namespace vit_fast {
namespace {

constexpr auto FLOATS = {ScalarType::Float, ScalarType::BFloat16};

constexpr int8_t HEAD_MEAN = 3;

int8_t check_kind(const char* op, const std::string& probs) {
  const char* names[] = {"none", "all", "class_token", "head_mean"};
  for (int8_t i = 0; i < 4; ++i) {
    if (probs == names[i]) return i;
  }
  STD_TORCH_CHECK(false, op, ": probs must be none, all, class_token or head_mean, got '", probs, "'");
}

Attention take_qkv(
    const char* op, const Tensor& qkv, double scale, double dropout_p, const std::optional<Tensor>& seed, const std::string& probs) {
  check_rank(op, "qkv", qkv, 5);
  STD_TORCH_CHECK(qkv.size(2) == 3, op, ": qkv must be [B, N, 3, H, d], got ", text_of(qkv.sizes()));
  STD_TORCH_CHECK(
      qkv.size(4) > 0 && (qkv.size(4) == 1 || qkv.stride(4) == 1 || qkv.numel() == 0),
      op, ": qkv's last axis must be contiguous and not empty, got shape ", text_of(qkv.sizes()), ", strides ",
      text_of(qkv.strides()));
  check_dtype(op, "qkv", qkv, FLOATS);
  Attention a = {};
  a.images = qkv.size(0);
  a.tokens = qkv.size(1);
  a.heads = qkv.size(3);
  a.head = qkv.size(4);
  a.image_stride = qkv.stride(0);
  a.token_stride = qkv.stride(1);
  a.part_stride = qkv.stride(2);
  a.head_stride = qkv.stride(3);
  a.scale = float(scale);
  a.dropout = dropout_of(op, "dropout_p", dropout_p, seed);
  a.type = type_of(qkv);
  a.kind = check_kind(op, probs);
  a.qkv = qkv.data_ptr();
  a.block = kernels().attention_block(a);
  return a;
}

std::vector<int64_t> probs_sizes(const Attention& a) {
  const std::vector<int64_t> sizes[] = {
      {0}, {a.images, a.heads, a.tokens, a.tokens}, {a.images, a.heads, a.tokens}, {a.images, a.tokens, a.tokens}};
  return sizes[a.kind];
}

ScalarType lse_type(const Attention& a) { return a.type == Type::f32 ? ScalarType::Double : ScalarType::Float; }

void run_forward(Attention& a, const Tensor& out) {
  a.out = out.data_ptr();
  a.out_image = out.stride(0);
  a.out_token = out.stride(1);
  const Kernels& kernel = kernels();
  const int64_t blocks = (a.tokens + a.block - 1) / a.block, units = blocks * a.images * (a.kind == HEAD_MEAN ? 1 : a.heads);
  const int64_t workers = workers_for(units);
  Tensor scratch = floats(workers * kernel.attention_forward_scratch(a));
  a.scratch = floats_of(scratch);
  share(workers, units, [&](int worker, int64_t begin, int64_t end) { kernel.attention_forward(a, worker, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor> attention_fwd(
    Tensor qkv, double scale, double dropout_p, std::optional<Tensor> seed, std::string probs) {
  const char* op = "attention_fwd";
  Attention a = take_qkv(op, qkv, scale, dropout_p, seed, probs);
  Tensor out = empty({a.images, a.tokens, a.heads * a.head}, qkv.scalar_type());
  Tensor lse = empty({a.images, a.heads, a.tokens}, lse_type(a)), probabilities = empty(probs_sizes(a), qkv.scalar_type());
  if (qkv.numel() == 0) return {out, lse, probabilities};
  a.lse = lse.data_ptr();
  a.probs = probabilities.data_ptr();
  run_forward(a, out);
  return {out, lse, probabilities};
}

void attention_out(Tensor qkv, double scale, std::string probs, Tensor out, std::optional<Tensor> probabilities) {
  const char* op = "attention_out";
  Attention a = take_qkv(op, qkv, scale, 0.0, std::nullopt, probs);
  check_out(op, "out", out);
  check_shape(op, "out", out, {a.images, a.tokens, a.heads * a.head});
  check_dtype(op, "out", out, {qkv.scalar_type()});
  check_apart(op, "qkv", qkv, out);
  STD_TORCH_CHECK(
      probabilities.has_value() == (a.kind != 0), op, ": probabilities must come with probs other than none and only then, got probs '",
      probs, "' and ", probabilities ? "a tensor" : "None");
  if (probabilities) {
    check_out(op, "probabilities", *probabilities);
    check_shape(op, "probabilities", *probabilities, probs_sizes(a));
    check_dtype(op, "probabilities", *probabilities, {qkv.scalar_type()});
    check_contiguous(op, "probabilities", *probabilities);
    check_apart(op, "qkv", qkv, *probabilities);
    check_apart(op, "probabilities", *probabilities, out);
    a.probs = probabilities->data_ptr();
  }
  if (qkv.numel() > 0) run_forward(a, out);
}

Tensor attention_bwd(
    Tensor dout, Tensor qkv, Tensor out, Tensor lse, double scale, double dropout_p, std::optional<Tensor> seed,
    std::string probs, std::optional<Tensor> dprobs) {
  const char* op = "attention_bwd";
  Attention a = take_qkv(op, qkv, scale, dropout_p, seed, probs);
  check_shape(op, "dout", dout, {a.images, a.tokens, a.heads * a.head});
  check_shape(op, "out", out, {a.images, a.tokens, a.heads * a.head});
  check_shape(op, "lse", lse, {a.images, a.heads, a.tokens});
  check_dtype(op, "dout", dout, {qkv.scalar_type()});
  check_dtype(op, "lse", lse, {lse_type(a)});
  check_contiguous(op, "lse", lse);
  if (dprobs) {
    check_shape(op, "dprobs", *dprobs, probs_sizes(a));
    check_dtype(op, "dprobs", *dprobs, {qkv.scalar_type()});
    if (!dprobs->is_contiguous()) dprobs = torch::stable::contiguous(*dprobs);
    a.dprobs = dprobs->data_ptr();
  }
  Tensor dqkv = empty(sizes_of(qkv), qkv.scalar_type());
  if (qkv.numel() == 0) return dqkv;
  if (a.heads * a.head > 1 && dout.stride(2) != 1) dout = torch::stable::contiguous(dout);  // a gradient comes in any layout
  a.dout = dout.data_ptr();
  a.dout_image = dout.stride(0);
  a.dout_token = dout.stride(1);
  a.lse = lse.data_ptr();
  a.dqkv = dqkv.data_ptr();
  const Kernels& kernel = kernels();
  const int64_t units = a.images * a.heads, workers = workers_for(units);
  Tensor scratch = floats(workers * kernel.attention_backward_scratch(a));
  a.scratch = floats_of(scratch);
  share(workers, units, [&](int worker, int64_t begin, int64_t end) { kernel.attention_backward(a, worker, begin, end); });
  return dqkv;
}

}  // namespace
}  // namespace vit_fast

STABLE_TORCH_LIBRARY_IMPL(vit_fast_cpp, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&vit_fast::attention_fwd));
  m.impl("attention_out", TORCH_BOX(&vit_fast::attention_out));
  m.impl("attention_bwd", TORCH_BOX(&vit_fast::attention_bwd));
}
