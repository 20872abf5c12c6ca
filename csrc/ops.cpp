// Every schema of the extension. The namespace mirrors the one that vit_fast/ops/*.py define for the Triton kernels (vit_fast::),
// argument by argument: an operation's autograd code is written once and takes its kernels from either.
//
// CPU kernels are registered in <op>.cpp, CUDA kernels in <op>.cu, which lie in an object of their own: it is loaded after this
// one, and only where torch has CUDA.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(vit_fast_cpp, m) {
  m.def(
      "layer_norm_fwd(Tensor x, Tensor weight, Tensor bias, float eps, Tensor? residual)"
      " -> (Tensor y, Tensor total, Tensor mean, Tensor rstd)");
  m.def(
      "layer_norm_bwd(Tensor dy, Tensor total, Tensor weight, Tensor mean, Tensor rstd, Tensor? dtotal)"
      " -> (Tensor dx, Tensor dweight, Tensor dbias)");

  m.def(
      "linear_fwd(Tensor x, Tensor weight, Tensor? bias, str? activation, Tensor? residual, bool keep_preactivation,"
      " float dropout_p=0.0, float stochastic_depth_p=0.0, Tensor? seed=None) -> (Tensor y, Tensor z)");
  m.def(
      "linear_dgelu_bwd(Tensor dy, Tensor weight, Tensor z, str activation, float dropout_p=0.0, Tensor? seed=None,"
      " bool keep_activation=False) -> (Tensor dz, Tensor dbias, Tensor h)");
  m.def(
      "epilogue_bwd(Tensor dy, Tensor? z, str? activation, float dropout_p=0.0, float stochastic_depth_p=0.0, Tensor? seed=None,"
      " bool keep_activation=False) -> (Tensor dz, Tensor dbias, Tensor h)");

  m.def(
      "patch_embed_fwd(Tensor images, Tensor weight, Tensor bias, Tensor cls_token, Tensor position_embeddings,"
      " Tensor? mean, Tensor? std) -> Tensor");
  m.def(
      "patch_embed_bwd(Tensor dout, Tensor images, Tensor weight, Tensor? mean, Tensor? std, bool images_wanted)"
      " -> (Tensor dimages, Tensor dweight, Tensor dbias, Tensor dcls_token, Tensor dposition_embeddings)");

  m.def(
      "attention_fwd(Tensor qkv, float scale, float dropout_p, Tensor? seed, str probs)"
      " -> (Tensor out, Tensor lse, Tensor probabilities)");
  m.def(
      "attention_bwd(Tensor dout, Tensor qkv, Tensor out, Tensor lse, float scale, float dropout_p, Tensor? seed, str probs,"
      " Tensor? dprobs) -> Tensor dqkv");

  // Of a frozen model, on a CPU: weights packed once, results where the caller wants them.
  m.def("linear_pack(Tensor weight) -> Tensor packed");
  m.def("linear_unpack(Tensor packed, int columns) -> Tensor weight");
  m.def(
      "linear_packed_out(Tensor x, Tensor packed, Tensor? bias, str? activation, Tensor? residual, Tensor(a!) out) -> ()");
  m.def("layer_norm_out(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor(a!) out) -> ()");
  m.def("attention_out(Tensor qkv, float scale, str probs, Tensor(a!) out, Tensor(b!)? probabilities) -> ()");
  m.def(
      "patch_embed_out(Tensor images, Tensor packed, Tensor? bias, Tensor? positions, int patch_rows, int patch_columns,"
      " Tensor(a!) out) -> ()");

  m.def("instruction_set(str name) -> str");
}
