// What the launchers of <op>.cpp hand to the kernels of <op>.h, which are compiled once per instruction set (isa.cpp).
//
// A kernel computes a range of its work; who shares it out, allocates, and checks is the launcher. Pointers are to the first element,
// strides count elements, matrices are rows of contiguous values unless a second stride is named. `worker` numbers the ranges that are
// computed at the same time, so that each has scratch memory of its own.
#pragma once

#include <cstdint>

namespace vit_fast {

enum class Type : int8_t { f32, bf16 };

// Sums over rows are taken in parts, which are then added up: short chains, small rounding errors, and the same result for any
// number of threads.
constexpr int64_t ROWS_OF_PART = 32;
constexpr int64_t parts_of(int64_t rows) { return (rows + ROWS_OF_PART - 1) / ROWS_OF_PART; }

// Dropout by counter, see random.h: what is kept is multiplied by `scale`. Off where nothing is dropped.
struct Dropout {
  bool on;
  uint64_t seed;
  int32_t limit;  // kept are those whose random bits, as an integer, are not below it
  float scale;
};

// [rows, columns]; total = x + residual is written only with a residual, mean and rstd [rows] unless they are null. Without a weight
// or bias they are ones and zeros.
struct LayerNormForward {
  const void *x, *residual, *weight, *bias;
  void *y, *total;
  float *mean, *rstd;
  int64_t columns, x_row, residual_row, y_row;
  float eps;
  Type x_type, residual_type, weight_type, total_type, y_type;  // of both parameters; y has it too, or with one in float32 x's
};

// dtotal may be null. sums: [2][parts][columns], of dweight and of dbias, a part for every ROWS_OF_PART rows.
struct LayerNormBackward {
  const void *dy, *total, *weight, *dtotal;
  void* dx;
  const float *mean, *rstd;
  float* sums;
  int64_t rows, columns, dy_row, total_row, dtotal_row;
  Type type, weight_type;  // of total, dtotal and dx; of dy and weight
};

// The rows of a product gathered from images: row (b·rows + r)·columns + c holds the values [C, P, Q] of one patch.
struct Patches {
  const void* images;
  const float *mean, *std;  // [C], or both null
  int64_t image_stride, channel_stride, row_stride, column_stride;
  int64_t channels, patch_rows, patch_columns;  // C, P, Q
  int64_t rows, columns;                        // of patches in an image
  enum class Source : int8_t { f32, bf16, u8 } source;
  bool round_to_bf16;  // the reference normalises in float32 and multiplies in the weight's dtype
};

// v[n, j] = Σ_k x[n, k] w[j, k] with what follows in the epilogue, each of it only where its pointer is given:
//   v += bias, z = v, y = image_factor[n / image_rows] dropout(act(v)) + residual
// Row n of y and of the residual lie at (n / group)·group_stride + (n % group)·row_stride.
struct Product {
  const void *x, *w, *bias, *residual;
  const Patches* patches;  // where x comes from when it is not null
  void *y, *z;
  int64_t rows, columns, depth;
  int64_t x_row, w_row, w_step;  // w_step: from one k to the next; w_row or w_step is 1
  int64_t group, y_group, y_row, residual_group, residual_row, z_row;
  Type x_type, bias_type, residual_type, y_type;  // w and z have x's; of patches, in which w comes
  int8_t activation;                              // 0 none, 1 gelu, 2 gelu_tanh, 3 silu
  Dropout dropout;
  const float* image_factors;  // of stochastic depth, or null
  int64_t image_rows;
  bool pack_x;     // which operand is packed; the work is counted in rows of the other
  float* packed;   // product_packed_size
  float* scratch;  // [workers][product_scratch_size]
};

// dz = image_factor dropout(dy) act'(z), h = image_factor dropout(act(z)), sums[part][columns] += dz; without z, act is nothing.
struct EpilogueBackward {
  const void *dy, *z;
  void *dz, *h;  // h may be null
  float* sums;
  int64_t rows, columns;
  Type type;
  int8_t activation;
  Dropout dropout;
  const float* image_factors;
  int64_t image_rows;
};

// qkv [B, N, 3, H, d] by its strides, the last 1. Work is counted in blocks of queries of a head (of all heads for head_mean).
struct Attention {
  const void *qkv, *dout, *dprobs;
  void *out, *probs, *dqkv;
  void* lse;  // [B, H, N], float64 for float32, float32 for bfloat16; null where no backward pass follows
  int64_t images, tokens, heads, head;
  int64_t image_stride, token_stride, part_stride, head_stride;
  int64_t block;   // queries
  int64_t out_image, out_token;    // strides; a token's values are contiguous
  int64_t dout_image, dout_token;
  float scale;
  Dropout dropout;
  Type type;
  int8_t kind;     // of probabilities: 0 none, 1 all, 2 class_token, 3 head_mean
  float* scratch;  // [workers][attention_forward_scratch or attention_backward_scratch]
};

// dimages from the gradient of the patches.
struct PatchScatter {
  const float* dpatches;  // [B·rows·columns, C·P·Q]
  void* dimages;          // [B, C, H, W] contiguous
  const float* std;       // [C] or null
  int64_t channels, patch_rows, patch_columns, rows, columns, height, width;
  Type type;
};

// The kernels of one instruction set.
struct Kernels {
  const char* name;
  int64_t panel;  // rows of a packed matrix that lie side by side; no two sets have the same
  void (*layer_norm_forward)(const LayerNormForward&, int64_t begin, int64_t end);
  void (*layer_norm_backward)(const LayerNormBackward&, int64_t begin, int64_t end);  // parts
  void (*product_pack)(const Product&, int64_t begin, int64_t end);  // panels of the packed operand
  void (*product)(const Product&, int worker, int64_t begin, int64_t end);  // tiles of rows of the other one
  int64_t (*product_panels)(const Product&);
  int64_t (*product_tiles)(const Product&);
  int64_t (*product_packed_size)(const Product&);
  int64_t (*product_scratch_size)(const Product&);
  void (*epilogue_backward)(const EpilogueBackward&, int64_t begin, int64_t end);  // parts
  void (*stochastic_depth)(const Dropout&, int64_t images, float* factors);
  int64_t (*attention_block)(const Attention&);
  int64_t (*attention_forward_scratch)(const Attention&);
  int64_t (*attention_backward_scratch)(const Attention&);
  void (*attention_forward)(const Attention&, int worker, int64_t begin, int64_t end);
  void (*attention_backward)(const Attention&, int worker, int64_t begin, int64_t end);  // heads
  void (*gather_patches)(const Patches&, int64_t begin, int64_t count, float* to);
  void (*patch_scatter)(const PatchScatter&, int64_t begin, int64_t end);  // images' channels
  void (*add_rows)(const float* parts, int64_t count, int64_t columns, void* sum, Type type);  // [count][columns] to [columns]
};

const Kernels& kernels();                    // of the instruction set in force: cpu.cpp
const char* set_with_panel(int64_t panel);   // the instruction set whose panels have so many rows, or null

}  // namespace vit_fast
