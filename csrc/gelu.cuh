// GELU and its derivative, with erf: x Φ(x) and Φ(x) + x φ(x); and as the tanh formula, which is x σ(2u), u = √(2/π) (x + 0.044715 x³).
#pragma once

#include "cuda.cuh"

namespace vit_fast {

template <Activation activation>
__device__ inline float activated(float x) {
  if constexpr (activation == Activation::none) return x;
  if constexpr (activation == Activation::gelu) {
    const float y = 0.5f * x * erfcf(-0.707106781f * x);  // erfc keeps the tail's relative accuracy
    return x < -1e4f ? 0.f : y;                            // -infinity times its tail of 0
  }
  const float y = x / (1.f + expf(-x * (1.595769122f + 0.0713548163f * x * x)));
  return x < -1e4f ? 0.f : y;
}

template <Activation activation>
__device__ inline float derivative_at(float x) {
  const float inside = x > 1e4f ? 1e4f : (x < -1e4f ? -1e4f : x);
  if constexpr (activation == Activation::gelu) {
    return 0.5f * erfcf(-0.707106781f * inside) + inside * 0.398942280f * expf(-0.5f * inside * inside);
  }
  const float squared = inside * inside, u2 = inside * (1.595769122f + 0.0713548163f * squared);
  // σ(2u) (1 - σ(2u)) is the same for -u, and exact to rounding as e/(1 + e)² with e = exp(-|2u|).
  const float e = expf(-fabsf(u2)), s = 1.f + e;
  float inverse = __fdividef(1.f, s);  // and a Newton step: s is in [1, 2] and needs none of what a full division is ready for
  inverse = fmaf(fmaf(-s, inverse, 1.f), inverse, inverse);
  const float sigma = u2 < 0.f ? e * inverse : inverse;
  return sigma + inside * e * inverse * inverse * (1.595769122f + 0.2140644488f * squared);
}

// y = act(z) + residual: [rows, columns], contiguous but for the residual's rows. y may be z.
void add_epilogue(const char* op, const Tensor& z, Activation activation, const Tensor* residual, int64_t residual_row, Tensor& y);

// (dz, dbias) = (dy act'(z), Σ rows of dz), all contiguous; and h = act(z) where it has elements. dz may be dy.
Tensor gelu_backward(const char* op, const Tensor& dy, const Tensor& z, Activation activation, Tensor& dz, Tensor& h);

// Dropout and stochastic depth on a GPU are Triton's.
inline void check_nothing_dropped(const char* op, double dropout_p, double stochastic_depth_p = 0) {
  STD_TORCH_CHECK(
      dropout_p == 0 && stochastic_depth_p == 0, op, ": on a GPU dropout_p and stochastic_depth_p must be 0, got ", dropout_p, " and ",
      stochastic_depth_p);
}

}  // namespace vit_fast
