// Random bits by counter, which dropout and stochastic depth compare with a limit: Philox4x32 in 7 rounds (Salmon et al., Parallel
// Random Numbers: As Easy as 1, 2, 3, 2011). kernels/dropout.py says which bits belong to which element, and takes the same: a seed
// drops the same elements on every device and with any number of threads.
#pragma once

#include "vector.h"

namespace vit_fast::VIT_FAST_ISA {

typedef uint64_t lvec __attribute__((vector_size(LANES * 4)));

// Of LANES/2 products of the low halves of 64 bits.
VIT_FAST_INLINE lvec wide_product(lvec a, uint32_t b) {
  // GCC 12 makes three multiplications of the plain form for these two sets: 1.28 instead of 0.44 ns an element of dropout with AVX2
  // (AMD EPYC, Zen 5, 2026-11-25).
#if defined(VIT_FAST_LANES) || defined(__AVX512F__) || defined(__clang__)
  return (a & 0xffffffffull) * uint64_t(b);
#elif defined(__AVX2__)
  return lvec(__builtin_ia32_pmuludq256(ivec(a), ivec(uvec{} + b)));
#elif defined(__SSE2__)
  return lvec(__builtin_ia32_pmuludq128(ivec(a), ivec(uvec{} + b)));
#else
  return (a & 0xffffffffull) * uint64_t(b);
#endif
}

VIT_FAST_INLINE void multiply(uvec a, uint32_t b, uvec& high, uvec& low) {
  const lvec pairs = lvec(a), even = wide_product(pairs, b), odd = wide_product(pairs >> 32, b);
  high = uvec((even >> 32) | (odd & 0xffffffff00000000ull));
  low = a * b;
}

struct Words {
  uvec word[4];
};

VIT_FAST_INLINE Words philox(uvec c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed) {
  uvec a = c0, b = uvec{} + c1, c = uvec{} + c2, d = uvec{} + c3;
  uint32_t key_a = uint32_t(seed), key_b = uint32_t(seed >> 32);
#pragma GCC unroll 7
  for (int round = 0; round < 7; ++round) {
    uvec high_a, low_a, high_c, low_c;
    multiply(a, 0xD2511F53u, high_a, low_a);
    multiply(c, 0xCD9E8D57u, high_c, low_c);
    a = high_c ^ b ^ key_a;
    b = low_c;
    c = high_a ^ d ^ key_b;
    d = low_a;
    key_a += 0x9E3779B9u;
    key_b += 0xBB67AE85u;
  }
  return {{a, b, c, d}};
}

VIT_FAST_INLINE uvec counting_from(uint32_t first) {
  uvec lanes = {};
  for (int i = 0; i < LANES; ++i) lanes[i] = first + uint32_t(i);
  return lanes;
}

// What an element is multiplied with: 0 or the scale.
VIT_FAST_INLINE vec factor_of(uvec bits, const Dropout& d) { return ivec(bits) >= d.limit ? all(d.scale) : vec{}; }

// A product with 0 that is 0 for what is not finite, too.
VIT_FAST_INLINE vec times_factor(vec values, vec factor) { return factor != 0.f ? values * factor : vec{}; }

constexpr int64_t DROPOUT_GROUP = 128;  // columns of a row that share calls: one call's words are 32 columns apart

// The factors of columns [column, column + count) of a row, from `factors` on or somewhat behind; it has 2 groups more than count.
VIT_FAST_INLINE const float* dropout_factors(const Dropout& d, int64_t row, int64_t column, int64_t count, float* factors) {
  const int64_t first = column / DROPOUT_GROUP * DROPOUT_GROUP;
  for (int64_t group = first; group < column + count; group += DROPOUT_GROUP) {
    for (int i = 0; i < 32; i += LANES) {
      const Words words = philox(counting_from(uint32_t(group / 4 + i)), uint32_t(row), 0, 0, d.seed);
#pragma GCC unroll 4
      for (int w = 0; w < 4; ++w) store(factors + (group - first) + 32 * w + i, factor_of(words.word[w], d));
    }
  }
  return factors + (column - first);
}

// The factors of one row of probabilities, of all keys: a whole number of vectors is written.
VIT_FAST_INLINE void probability_factors(const Dropout& d, int64_t plane, int64_t query, int64_t keys, float* factors) {
  for (int64_t key = 0; key < keys; key += LANES) {
    const Words words = philox(counting_from(uint32_t(key)), uint32_t(query), uint32_t(plane), 0, d.seed);
    store(factors + key, factor_of(words.word[0], d));
  }
}

// What stochastic depth multiplies each of `images` with.
static void stochastic_depth(const Dropout& d, int64_t images, float* factors) {
  for_vectors(images, [&](int64_t i, int n) {
    store_up_to(factors + i, factor_of(philox(counting_from(uint32_t(i)), 0, 0, 1, d.seed).word[0], d), n);
  });
}

}  // namespace vit_fast::VIT_FAST_ISA
