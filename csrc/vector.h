// Vectors of float32 for one instruction set, in the compilers' own vector types: the same source serves AVX-512 (16 lanes), AVX2 (8)
// and any machine (4), by the flags that isa.cpp is compiled with. Everything here has internal linkage and no header of the standard
// library is used that holds code: an inline function compiled for AVX-512 must never be the one that the linker keeps for all.
#pragma once

#include <cstdint>

#include "cpu.h"

#define VIT_FAST_INLINE static inline __attribute__((always_inline))

namespace vit_fast::VIT_FAST_ISA {

#if defined(VIT_FAST_LANES)  // a test compiles the 16 lanes of AVX-512 for machines without it
constexpr int LANES = VIT_FAST_LANES;
#elif defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef uint32_t uvec __attribute__((vector_size(LANES * 4)));
typedef uint16_t hvec __attribute__((vector_size(LANES * 2)));
// The same anywhere in memory, whatever the declared type there.
typedef float vec_in_memory __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t hvec_in_memory __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

// bfloat16 as it lies in memory.
struct bf16 {
  uint16_t bits;
};

VIT_FAST_INLINE vec all(float value) { return value - vec{}; }

// A product that is rounded before it is added to: without this the compiler may make one multiply-add of both.
VIT_FAST_INLINE vec rounded(vec product) {
#if defined(__x86_64__) && !defined(VIT_FAST_LANES)
  __asm__("" : "+v"(product));
#elif defined(__aarch64__)
  __asm__("" : "+w"(product));
#else
  __asm__("" : "+m"(product));
#endif
  return product;
}

VIT_FAST_INLINE float as_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

VIT_FAST_INLINE uint32_t as_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

// One element: exact to float32, rounded to nearest even from it; a NaN stays one.
VIT_FAST_INLINE float get(const float* p) { return *p; }
VIT_FAST_INLINE float get(const bf16* p) { return as_float(uint32_t(p->bits) << 16); }
VIT_FAST_INLINE void put(float* p, float value) { *p = value; }
VIT_FAST_INLINE void put(bf16* p, float value) {
  const uint32_t bits = as_bits(value);
  p->bits = value != value ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

VIT_FAST_INLINE vec load(const float* p) { return *reinterpret_cast<const vec_in_memory*>(p); }
VIT_FAST_INLINE vec load(const bf16* p) {
  const hvec bits = *reinterpret_cast<const hvec_in_memory*>(p);
  return reinterpret_cast<vec>(__builtin_convertvector(bits, uvec) << 16);
}
VIT_FAST_INLINE void store(float* p, vec values) { *reinterpret_cast<vec_in_memory*>(p) = values; }
VIT_FAST_INLINE void store(bf16* p, vec values) {
  const uvec bits = reinterpret_cast<uvec>(values);
  uvec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  rounded = (values != values) ? (uvec{} + 0x7fc0) : rounded;
  *reinterpret_cast<hvec_in_memory*>(p) = __builtin_convertvector(rounded, hvec);
}

// The first n lanes, 0 < n < LANES; the others are 0.
template <class T>
VIT_FAST_INLINE vec load_first(const T* p, int n) {
  float lanes[LANES] = {};
  for (int i = 0; i < LANES && i < n; ++i) lanes[i] = get(p + i);
  return load(lanes);
}
template <class T>
VIT_FAST_INLINE void store_first(T* p, vec values, int n) {
  float lanes[LANES];
  store(lanes, values);
  for (int i = 0; i < LANES && i < n; ++i) put(p + i, lanes[i]);
}

// Calls step(offset, n) for each vector of `count` elements: n == LANES for all but a rest.
template <class Step>
VIT_FAST_INLINE void for_vectors(int64_t count, Step step) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) step(i, LANES);
  if (i < count) step(i, int(count - i));
}
template <class T>
VIT_FAST_INLINE vec load_up_to(const T* p, int n) {
  return n == LANES ? load(p) : load_first(p, n);
}
// From element i on of memory whose type is known only now.
VIT_FAST_INLINE vec load_up_to(const void* p, Type type, int64_t i, int n) {
  return type == Type::f32 ? load_up_to(static_cast<const float*>(p) + i, n) : load_up_to(static_cast<const bf16*>(p) + i, n);
}
VIT_FAST_INLINE int64_t size_of(Type type) { return type == Type::f32 ? 4 : 2; }
template <class T>
VIT_FAST_INLINE void store_up_to(T* p, vec values, int n) {
  if (n == LANES) {
    store(p, values);
  } else {
    store_first(p, values, n);
  }
}

// LANES rows become LANES columns, in place: at distance 1, 2, 4, … the blocks off the diagonal of every pair of rows change places.
template <int... lane>
struct Lanes {
  template <int distance>
  VIT_FAST_INLINE void swap(vec& a, vec& b) {
    const vec low = __builtin_shufflevector(a, b, ((lane & distance) ? LANES + lane - distance : lane)...);
    b = __builtin_shufflevector(a, b, ((lane & distance) ? LANES + lane : lane + distance)...);
    a = low;
  }
};
template <int count, int... lane>
struct FirstLanes : FirstLanes<count - 1, count - 1, lane...> {};
template <int... lane>
struct FirstLanes<0, lane...> {
  using type = Lanes<lane...>;
};
template <int distance = 1>
VIT_FAST_INLINE void transpose(vec* rows) {
  if constexpr (distance < LANES) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) {
      if (!(i & distance)) FirstLanes<LANES>::type::template swap<distance>(rows[i], rows[i + distance]);
    }
    transpose<2 * distance>(rows);
  }
}

VIT_FAST_INLINE float sum(vec values) {
  float lanes[LANES];
  store(lanes, values);
  for (int width = LANES / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

VIT_FAST_INLINE vec maximum(vec a, vec b) { return ((a > b) | (a != a)) ? a : b; }  // NaN if either is

VIT_FAST_INLINE float max(vec values) {
  float lanes[LANES];
  store(lanes, values);
  float largest = lanes[0];
  for (int i = 1; i < LANES; ++i) largest = (largest > lanes[i] || largest != largest) ? largest : lanes[i];
  return largest;
}

// e^x within 0.7 units in the last place (with fused multiply-adds); 0 below -87.33, infinity above 88.72.
// x = n ln 2 + r, |r| <= ln 2 / 2; e^r = 1 + r + r² p(r), p of degree 5 fitted for the smallest relative error; 2^n by the exponent bits.
VIT_FAST_INLINE vec exp(vec x) {
  const vec low = all(-87.33f), high = all(88.72f);
  const vec inside = x < low ? low : (x > high ? high : x);  // NaN passes
  const vec magic = all(12582912.f);                         // 1.5 · 2^23: adding it rounds to an integer, in the low bits
  const vec shifted = inside * 1.44269504f + magic;
  const vec n = shifted - magic;
  const vec r = (inside - n * 0.693145752f) - n * 1.42860677e-6f;
  vec p = all(1.978926078e-4f);
  p = p * r + 1.394575226e-3f;
  p = p * r + 8.333503757e-3f;
  p = p * r + 4.166628033e-2f;
  p = p * r + 1.666666582e-1f;
  p = p * r + 5.000000072e-1f;
  p = p * (r * r) + r + 1.f;
  // 2^n as two factors: n reaches 128, which one float32 exponent does not hold.
  const ivec whole = reinterpret_cast<ivec>(shifted) - reinterpret_cast<ivec>(magic);
  const ivec half = whole >> 1;
  const vec first = reinterpret_cast<vec>((half + 127) << 23), second = reinterpret_cast<vec>((whole - half + 127) << 23);
  p = p * first * second;
  p = x < low ? vec{} : p;
  return x > high ? all(__builtin_inff()) : p;
}

// tail = Φ(-|x|), density = φ(x): the standard normal distribution and its density.
// Φ(-t) e^{t²/2} is smooth and falls as 1/t: a quotient of polynomials fitted on 0 <= t <= 13.5 gives it within 5.2e-9 relative
// before rounding; beyond, e^{-t²/2} is 0 in float32. Taking the tail keeps its relative accuracy where 1 - Φ would cancel.
VIT_FAST_INLINE void normal(vec x, vec& tail, vec& density) {
  const vec t = x < 0.f ? -x : x;
  const vec e = exp(t * t * -0.5f);
  vec p = all(4.036970939e-3f);
  p = p * t + 4.009788417e-2f;
  p = p * t + 1.816453206e-1f;
  p = p * t + 4.361455763e-1f;
  p = p * t + 5.000000026e-1f;
  vec q = all(1.011904666e-2f);
  q = q * t + 1.005177002e-1f;
  q = q * t + 4.652738740e-1f;
  q = q * t + 1.195894106f;
  q = q * t + 1.670176082f;
  q = q * t + 1.f;
  const vec ratio = t > 1e4f ? vec{} : p / q;  // far out both polynomials overflow, and e is 0 long before
  tail = e * ratio;
  density = e * 0.398942280f;
}

// x Φ(x), and for the derivative Φ(x) + x φ(x).
VIT_FAST_INLINE vec gelu(vec x) {
  vec tail, density;
  normal(x, tail, density);
  const vec y = x * (x < 0.f ? tail : 1.f - tail);
  return x < -1e4f ? vec{} : y;  // -infinity times its tail of 0
}
VIT_FAST_INLINE vec gelu_derivative(vec x) {
  vec tail, density;
  normal(x, tail, density);
  const vec inside = x > 1e4f ? vec{} : (x < -1e4f ? vec{} : x);  // infinity times a density of 0
  return (x < 0.f ? tail : 1.f - tail) + inside * density + (x != x ? x : vec{});
}

// x σ(2u), u = √(2/π) (x + 0.044715 x³), and its derivative.
VIT_FAST_INLINE vec gelu_tanh(vec x) {
  const vec u2 = x * (1.595769122f + 0.0713548163f * x * x);
  const vec y = x / (1.f + exp(-u2));
  return x < -1e4f ? vec{} : y;
}
// x σ(x)
VIT_FAST_INLINE vec silu(vec x) {
  const vec y = x / (1.f + exp(-x));
  return x < -1e4f ? vec{} : y;
}
VIT_FAST_INLINE vec gelu_tanh_derivative(vec x) {
  const vec inside = x > 1e4f ? all(1e4f) : (x < -1e4f ? all(-1e4f) : x);
  const vec squared = inside * inside, u2 = inside * (1.595769122f + 0.0713548163f * squared);
  // σ(2u) (1 - σ(2u)) is the same for -u, and exact to rounding as e/(1 + e)² with e = exp(-|2u|).
  const vec e = exp(u2 < 0.f ? u2 : -u2), inverse = 1.f / (1.f + e);
  const vec sigma = u2 < 0.f ? e * inverse : inverse;
  return sigma + inside * e * inverse * inverse * (1.595769122f + 0.2140644488f * squared);
}

}  // namespace vit_fast::VIT_FAST_ISA
