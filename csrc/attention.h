// Attention of one head at a time: its keys and values are packed once and stay in the cache while the queries pass in blocks, whose
// rows of scores are whole, so that softmax needs no rescaling.
//
// The backward pass computes the probabilities again from the sums that the forward pass kept. Per block of queries:
//   P = exp(scale q kᵀ - lse)   dP = M ∘ (dO vᵀ) + dprobs   dS = P ∘ (dP - rowsum(P ∘ dP))
//   dq = scale dS k   dk += scale dSᵀ q   dv += (M ∘ P)ᵀ dO
// M is what dropout multiplies the probabilities with, 1 without it.
#pragma once

#include "product.h"
#include "random.h"

namespace vit_fast::VIT_FAST_ISA {

enum { PROBS_NONE, PROBS_ALL, PROBS_CLASS_TOKEN, PROBS_HEAD_MEAN };

VIT_FAST_INLINE int64_t padded(int64_t count) { return panels_of(count) * PANEL; }

// As many queries as keep the block's scores within 192 KB, in whole tiles, at most 8 of them.
static int64_t attention_block(const Attention& a) {
  int64_t tiles = 49152 / (padded(a.tokens + 1) * TILE);
  tiles = tiles < 1 ? 1 : (tiles > 8 ? 8 : tiles);
  return tiles * TILE;
}

// A row of what dropout multiplies the probabilities with.
static int64_t factors_size(const Attention& a) { return a.dropout.on ? padded(a.tokens) : 0; }

// Scratch of a worker, in floats.
static int64_t attention_forward_scratch(const Attention& a) {
  const int64_t keys = padded(a.tokens), head = padded(a.head);
  return keys * a.head + head * a.tokens                        // keys and values, packed
         + a.block * (a.head + keys + head)                     // queries, scores, results
         + (a.kind == PROBS_HEAD_MEAN ? a.block * keys : 0) + a.head * PANEL + factors_size(a);
}
static int64_t attention_backward_scratch(const Attention& a) {
  const int64_t keys = padded(a.tokens), head = padded(a.head);
  return 2 * keys * a.head + head * a.tokens              // keys and values by channel, keys by token
         + 2 * a.tokens * head                            // dk, dv
         + a.block * (2 * a.head + 2 * head + 2 * keys)   // q and dO as rows and packed, P, dP
         + a.block * head + a.head * PANEL                // dq
         + factors_size(a);
}

template <class T>
struct Head {
  const T *query, *key, *value;
};

template <class T>
VIT_FAST_INLINE Head<T> head_of(const Attention& a, int64_t image, int64_t head) {
  const T* first = static_cast<const T*>(a.qkv) + image * a.image_stride + head * a.head_stride;
  return {first, first + a.part_stride, first + 2 * a.part_stride};
}

// `rows` become the columns of a product over channels: panels [head][PANEL].
template <class T>
static void pack_by_channel(const T* rows, int64_t stride, int64_t tokens, int64_t head, float* packed) {
  for (int64_t first = 0; first < tokens; first += PANEL) {
    const int64_t left = tokens - first;
    pack_rows(rows + first * stride, stride, left < PANEL ? left : PANEL, head, packed + first * head);
  }
}

// `rows` become the depth of a product whose columns are channels: panels [tokens][PANEL].
template <class T>
static void pack_by_token(const T* rows, int64_t stride, int64_t tokens, int64_t head, float* packed) {
  for (int64_t first = 0; first < head; first += PANEL) {
    const int64_t left = head - first;
    pack_columns(rows + first, stride, left < PANEL ? left : PANEL, tokens, packed + first * tokens);
  }
}

template <class T>
static void scaled_rows(const T* rows, int64_t stride, int64_t count, int64_t head, float scale, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    for_vectors(head, [&](int64_t k, int n) { store_up_to(to + i * head + k, load_up_to(rows + i * stride + k, n) * scale, n); });
  }
}

// Scores of a row become exp(score - max), in place; their sum and the maximum.
VIT_FAST_INLINE float exponentials(float* row, int64_t keys, float& largest) {
  vec most = all(-__builtin_inff());
  for_vectors(keys, [&](int64_t j, int n) {
    const vec values = load(row + j);  // the scratch is padded
    if (n == LANES) {
      most = maximum(most, values);
    } else {
      for (int i = 0; i < n; ++i) most = maximum(most, all(row[j + i]));
    }
  });
  largest = max(most);
  vec total = {};
  for_vectors(keys, [&](int64_t j, int n) {
    const vec e = exp(load(row + j) - largest);
    store_up_to(row + j, e, n);
    total += n == LANES ? e : load_first(row + j, n);
  });
  return sum(total);
}

template <class T>
static void scaled_store(const float* values, int64_t count, float scale, T* to) {
  for_vectors(count, [&](int64_t i, int n) { store_up_to(to + i, load_up_to(values + i, n) * scale, n); });
}

// Queries [first, first + rows) of one head. `mean`: where the probabilities of all heads add up, or null.
template <class T, class L>
static void attention_queries(
    const Attention& a, int64_t image, int64_t head, int64_t first, int64_t rows, const float* keys, const float* values, float* scratch,
    float* mean) {
  const int64_t N = a.tokens, d = a.head, width = padded(N), columns = padded(d);
  float* factors = scratch;
  float* query = factors + factors_size(a);
  float* scores = query + a.block * d;
  float* result = scores + a.block * width;
  scaled_rows(head_of<T>(a, image, head).query + first * a.token_stride, a.token_stride, rows, d, a.scale, query);
  small_product(rows, N, d, query, d, 1, keys, scores, width, false);
  const int64_t of_head = (image * a.heads + head) * N + first;
  float inverse[8 * TILE];
  for (int64_t i = 0; i < rows; ++i) {
    float largest;
    float* row = scores + i * width;
    const float total = exponentials(row, N, largest);
    inverse[i] = 1.f / total;
    if (a.lse) static_cast<L*>(a.lse)[of_head + i] = L(largest) + L(__builtin_log(total));
    if (a.kind == PROBS_ALL) {
      scaled_store(row, N, inverse[i], static_cast<T*>(a.probs) + (of_head + i) * N);
    } else if (a.kind == PROBS_CLASS_TOKEN && first + i == 0) {
      scaled_store(row, N, inverse[i], static_cast<T*>(a.probs) + (image * a.heads + head) * N);
    } else if (mean) {
      const float share = inverse[i] / float(a.heads);
      for_vectors(N, [&](int64_t j, int n) {
        store_up_to(mean + i * width + j, load_up_to(mean + i * width + j, n) + load_up_to(row + j, n) * share, n);
      });
    }
    if (a.dropout.on) {
      probability_factors(a.dropout, image * a.heads + head, first + i, N, factors);
      for_vectors(N, [&](int64_t j, int n) { store_up_to(row + j, load_up_to(row + j, n) * load(factors + j), n); });
    }
  }
  small_product(rows, d, N, scores, width, 1, values, result, columns, false);
  for (int64_t i = 0; i < rows; ++i) {
    T* out = static_cast<T*>(a.out) + image * a.out_image + (first + i) * a.out_token + head * d;
    scaled_store(result + i * columns, d, inverse[i], out);
  }
}

template <class T, class L>
static void attention_forward_units(const Attention& a, int worker, int64_t begin, int64_t end) {
  const int64_t N = a.tokens, d = a.head, blocks = (N + a.block - 1) / a.block;
  float* keys = a.scratch + worker * attention_forward_scratch(a);
  float* values = keys + padded(N) * d;
  float* scratch = values + padded(d) * N;
  int64_t packed = -1;
  const auto pack = [&](int64_t image, int64_t head) {
    if (packed == image * a.heads + head) return;
    packed = image * a.heads + head;
    const Head<T> h = head_of<T>(a, image, head);
    pack_by_channel(h.key, a.token_stride, N, d, keys);
    pack_by_token(h.value, a.token_stride, N, d, values);
  };
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit % blocks * a.block, rows = N - first < a.block ? N - first : a.block;
    if (a.kind != PROBS_HEAD_MEAN) {
      const int64_t head = unit / blocks;
      pack(head / a.heads, head % a.heads);
      attention_queries<T, L>(a, head / a.heads, head % a.heads, first, rows, keys, values, scratch, nullptr);
      continue;
    }
    const int64_t image = unit / blocks;
    float* mean = scratch + factors_size(a) + a.block * (d + padded(N) + padded(d));
    for (int64_t i = 0; i < rows * padded(N); ++i) mean[i] = 0;
    for (int64_t head = 0; head < a.heads; ++head) {
      pack(image, head);
      attention_queries<T, L>(a, image, head, first, rows, keys, values, scratch, mean);
    }
    for (int64_t i = 0; i < rows; ++i) {
      scaled_store(mean + i * padded(N), N, 1.f, static_cast<T*>(a.probs) + (image * N + first + i) * N);
    }
  }
}

// The gradient of the loss by one row of probabilities, beyond what comes through the result; null where there is none.
template <class T>
VIT_FAST_INLINE const T* dprobs_row(const Attention& a, int64_t image, int64_t head, int64_t row, float& factor) {
  factor = 1.f;
  const T* dprobs = static_cast<const T*>(a.dprobs);
  if (!dprobs) return nullptr;
  if (a.kind == PROBS_ALL) return dprobs + ((image * a.heads + head) * a.tokens + row) * a.tokens;
  if (a.kind == PROBS_CLASS_TOKEN) return row == 0 ? dprobs + (image * a.heads + head) * a.tokens : nullptr;
  factor = 1.f / float(a.heads);
  return dprobs + (image * a.tokens + row) * a.tokens;
}

template <class T, class L>
static void attention_backward_heads(const Attention& a, int worker, int64_t begin, int64_t end) {
  const int64_t N = a.tokens, d = a.head, width = padded(N), columns = padded(d);
  float* keys = a.scratch + worker * attention_backward_scratch(a);  // by channel
  float* values = keys + width * d;                                  // by channel
  float* keys_by_token = values + width * d;
  float* dkey = keys_by_token + columns * N;
  float* dvalue = dkey + N * columns;
  float* query = dvalue + N * columns;
  float* dout = query + a.block * d;
  float* packed_query = dout + a.block * d;
  float* packed_dout = packed_query + a.block * columns;
  float* probs = packed_dout + a.block * columns;
  float* dscores = probs + a.block * width;
  float* dquery = dscores + a.block * width;
  float* factors = dquery + a.block * columns + d * PANEL;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / a.heads, head = unit % a.heads;
    const Head<T> h = head_of<T>(a, image, head);
    pack_by_channel(h.key, a.token_stride, N, d, keys);
    pack_by_channel(h.value, a.token_stride, N, d, values);
    pack_by_token(h.key, a.token_stride, N, d, keys_by_token);
    const T* dout_head = static_cast<const T*>(a.dout) + image * a.dout_image + head * d;
    T* dqkv = static_cast<T*>(a.dqkv) + (image * N * 3 * a.heads + head) * d;  // contiguous [B, N, 3, H, d]
    const int64_t part = a.heads * d, token = 3 * part;
    for (int64_t first = 0; first < N; first += a.block) {
      const int64_t rows = N - first < a.block ? N - first : a.block;
      scaled_rows(h.query + first * a.token_stride, a.token_stride, rows, d, a.scale, query);
      scaled_rows(dout_head + first * a.dout_token, a.dout_token, rows, d, 1.f, dout);
      small_product(rows, N, d, query, d, 1, keys, probs, width, false);
      small_product(rows, N, d, dout, d, 1, values, dscores, width, false);
      const L* lse = static_cast<const L*>(a.lse) + unit * N + first;
      for (int64_t i = 0; i < rows; ++i) {
        float* p = probs + i * width;
        float* ds = dscores + i * width;
        float factor;
        const T* extra = dprobs_row<T>(a, image, head, first + i, factor);
        // lse as two floats: at logits of 1e4 one float holds it to a thousandth only.
        const float high = float(lse[i]), low = float(lse[i] - L(high));
        if (a.dropout.on) probability_factors(a.dropout, unit, first + i, N, factors);
        vec delta = {};
        for_vectors(N, [&](int64_t j, int n) {
          const vec e = exp(load_up_to(p + j, n) - high - low);
          vec dp = load_up_to(ds + j, n);
          if (a.dropout.on) dp *= load(factors + j);
          if (extra) dp += load_up_to(extra + j, n) * factor;
          store_up_to(p + j, e, n);
          store_up_to(ds + j, dp, n);
          if (n == LANES) {
            delta += e * dp;
          } else {
            delta += load_first(p + j, n) * dp;
          }
        });
        const float row_sum = sum(delta);
        for_vectors(N, [&](int64_t j, int n) {
          const vec e = load_up_to(p + j, n);
          store_up_to(ds + j, e * (load_up_to(ds + j, n) - row_sum), n);
          if (a.dropout.on) store_up_to(p + j, e * load(factors + j), n);
        });
      }
      small_product(rows, d, N, dscores, width, 1, keys_by_token, dquery, columns, false);
      for (int64_t i = 0; i < rows; ++i) scaled_store(dquery + i * columns, d, a.scale, dqkv + (first + i) * token);
      pack_by_token(query, d, rows, d, packed_query);
      pack_by_token(dout, d, rows, d, packed_dout);
      small_product(N, d, rows, dscores, 1, width, packed_query, dkey, columns, first > 0);
      small_product(N, d, rows, probs, 1, width, packed_dout, dvalue, columns, first > 0);
    }
    for (int64_t i = 0; i < N; ++i) {
      scaled_store(dkey + i * columns, d, 1.f, dqkv + i * token + part);
      scaled_store(dvalue + i * columns, d, 1.f, dqkv + i * token + 2 * part);
    }
  }
}

static void attention_forward(const Attention& a, int worker, int64_t begin, int64_t end) {
  if (a.type == Type::f32) {
    attention_forward_units<float, double>(a, worker, begin, end);
  } else {
    attention_forward_units<bf16, float>(a, worker, begin, end);
  }
}
static void attention_backward(const Attention& a, int worker, int64_t begin, int64_t end) {
  if (a.type == Type::f32) {
    attention_backward_heads<float, double>(a, worker, begin, end);
  } else {
    attention_backward_heads<bf16, float>(a, worker, begin, end);
  }
}

}  // namespace vit_fast::VIT_FAST_ISA
