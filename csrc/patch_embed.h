// Patches of images as rows, and their gradients back into images.
#pragma once

#include "vector.h"

namespace vit_fast::VIT_FAST_ISA {

VIT_FAST_INLINE float pixel(const float* p) { return *p; }
VIT_FAST_INLINE float pixel(const bf16* p) { return get(p); }
VIT_FAST_INLINE float pixel(const uint8_t* p) { return float(*p); }

// (pixel · unit - mean) / std as one multiply-add, in the order C, P, Q of a convolution's weight.
template <class T>
static void gather_patches_of(const Patches& a, double unit, int64_t begin, int64_t count, float* to) {
  const int64_t P = a.patch_rows, Q = a.patch_columns, in_image = a.rows * a.columns;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t n = begin + i, image = n / in_image, row = n % in_image / a.columns, column = n % a.columns;
    const T* corner =
        static_cast<const T*>(a.images) + image * a.image_stride + row * P * a.row_stride + column * Q * a.column_stride;
    for (int64_t c = 0; c < a.channels; ++c) {
      const float factor = a.mean ? float(unit / a.std[c]) : 1.f, offset = a.mean ? -a.mean[c] / a.std[c] : 0.f;
      for (int64_t p = 0; p < P; ++p) {
        const T* line = corner + c * a.channel_stride + p * a.row_stride;
        if (a.column_stride == 1) {
          for (int64_t q = 0; q < Q; ++q) to[q] = pixel(line + q) * factor + offset;
        } else {
          for (int64_t q = 0; q < Q; ++q) to[q] = pixel(line + q * a.column_stride) * factor + offset;
        }
        to += Q;
      }
    }
  }
}

static void gather_patches(const Patches& a, int64_t begin, int64_t count, float* to) {
  if (a.source == Patches::Source::u8) {
    gather_patches_of<uint8_t>(a, 1. / 255., begin, count, to);
  } else if (a.source == Patches::Source::bf16) {
    gather_patches_of<bf16>(a, 1., begin, count, to);
  } else {
    gather_patches_of<float>(a, 1., begin, count, to);
  }
  if (a.round_to_bf16) {
    const int64_t size = count * a.channels * a.patch_rows * a.patch_columns;
    for_vectors(size, [&](int64_t i, int n) {
      bf16 rounded[LANES];
      store_up_to(rounded, load_up_to(to + i, n), n);
      store_up_to(to + i, load_up_to(rounded, n), n);
    });
  }
}

// One channel of one image at a time: every pixel belongs to one patch, or to the rest that fills none and gets zero.
template <class T>
static void patch_scatter_of(const PatchScatter& a, int64_t begin, int64_t end) {
  const int64_t P = a.patch_rows, Q = a.patch_columns, depth = a.channels * P * Q;
  for (int64_t plane = begin; plane < end; ++plane) {
    const int64_t image = plane / a.channels, c = plane % a.channels;
    T* to = static_cast<T*>(a.dimages) + plane * a.height * a.width;
    const float factor = a.std ? 1.f / a.std[c] : 1.f;
    for (int64_t h = 0; h < a.height; ++h) {
      for (int64_t w = 0; w < a.width; ++w) put(to + h * a.width + w, 0.f);
      if (h >= a.rows * P) continue;
      for (int64_t column = 0; column < a.columns; ++column) {
        const float* from = a.dpatches + ((image * a.rows + h / P) * a.columns + column) * depth + (c * P + h % P) * Q;
        for (int64_t q = 0; q < Q; ++q) put(to + h * a.width + column * Q + q, from[q] * factor);
      }
    }
  }
}

static void patch_scatter(const PatchScatter& a, int64_t begin, int64_t end) {
  if (a.type == Type::bf16) {
    patch_scatter_of<bf16>(a, begin, end);
  } else {
    patch_scatter_of<float>(a, begin, end);
  }
}

}  // namespace vit_fast::VIT_FAST_ISA
