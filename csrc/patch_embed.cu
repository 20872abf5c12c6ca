// Launchers of patch_embed on a GPU: patches gathered as rows, normalised on the way, then one batched product by cuBLASLt with the bias
// and the position table in its epilogue, written behind each image's class row.

#include "cublaslt.cuh"

namespace vit_fast {
namespace {

constexpr int THREADS = 256;

struct Patches {
  const void* images;
  const float *mean, *std;  // [C], or both null
  int64_t image_stride, channel_stride, row_stride, column_stride;
  int64_t batch, channels, patch_rows, patch_columns;  // B, C, P, Q
  int64_t rows, columns;                               // of patches in an image
  float unit;                                          // 1/255 for bytes
};

// patches[(b · rows + r) · columns + c][channel, p, q] = (pixel · unit - mean) / std. A thread has N neighbours along q.
template <int N, class I, class T>
__global__ void __launch_bounds__(THREADS) gather_kernel(const Patches a, T* patches, int64_t size) {
  const int64_t i = (int64_t(blockIdx.x) * THREADS + threadIdx.x) * N;
  if (i >= size) return;
  int64_t rest = i;
  const int64_t q = rest % a.patch_columns;
  rest /= a.patch_columns;
  const int64_t p = rest % a.patch_rows;
  rest /= a.patch_rows;
  const int64_t channel = rest % a.channels;
  rest /= a.channels;
  const int64_t column = rest % a.columns;
  rest /= a.columns;
  const int64_t row = rest % a.rows, image = rest / a.rows;
  const I* from = static_cast<const I*>(a.images) + image * a.image_stride + channel * a.channel_stride +
                  (row * a.patch_rows + p) * a.row_stride + (column * a.patch_columns + q) * a.column_stride;
  float values[N];
  if constexpr (N > 1) {
    load<N>(from, values);
  } else {
    values[0] = as_float(*from);
  }
  if (a.mean != nullptr) {
    const float scale = a.unit / a.std[channel], shift = -a.mean[channel] / a.std[channel];
#pragma unroll
    for (int k = 0; k < N; ++k) values[k] = values[k] * scale + shift;
  }
  store<N>(patches + i, values);
}

// y[b, 0] = cls_token + position_embeddings[0].
template <class C, class Y>
__global__ void class_row_kernel(const C* cls_token, const C* position, Y* y, int64_t batch, int64_t tokens, int64_t width) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= batch * width) return;
  assign(y[i / width * tokens * width + i % width], as_float(cls_token[i % width]) + as_float(position[i % width]));
}

// The gradient of each pixel from its place in the patches; zero in the rest that fills none.
template <class T, class I>
__global__ void __launch_bounds__(THREADS) scatter_kernel(
    const Patches a, const T* dpatches, I* dimages, int64_t height, int64_t width, int64_t size) {
  const int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= size) return;
  const int64_t w = i % width, h = i / width % height, channel = i / width / height % a.channels;
  const int64_t image = i / width / height / a.channels, row = h / a.patch_rows, column = w / a.patch_columns;
  float d = 0;
  if (row < a.rows && column < a.columns) {
    const int64_t patch = (image * a.rows + row) * a.columns + column;
    const int64_t k = (channel * a.patch_rows + h % a.patch_rows) * a.patch_columns + w % a.patch_columns;
    d = as_float(dpatches[patch * a.channels * a.patch_rows * a.patch_columns + k]);
    if (a.std != nullptr) d /= a.std[channel];
  }
  assign(dimages[i], d);
}

// What is gathered from images [B, C, H, W] for a weight [D, C, P, Q]; checks all of it.
Patches take_patches(
    const char* op, const Tensor& images, const Tensor& weight, const std::optional<Tensor>& mean, const std::optional<Tensor>& std) {
  check_rank(op, "images", images, 4);
  check_rank(op, "weight", weight, 4);
  check_device(op, "weight", weight, "images", images);
  check_dtype(op, "weight", weight, FLOATS);
  check_contiguous(op, "weight", weight);
  STD_TORCH_CHECK(weight.numel() > 0, op, ": weight must have elements, got shape ", text_of(weight.sizes()));
  const int64_t channels = weight.size(1);
  check_shape(op, "images", images, {images.size(0), channels, images.size(2), images.size(3)});
  const bool bytes = images.scalar_type() == ScalarType::Byte;
  if (!bytes) check_dtype(op, "images", images, {weight.scalar_type(), ScalarType::Float});
  STD_TORCH_CHECK(mean.has_value() == std.has_value(), op, ": mean and std come together, got only one of them");
  STD_TORCH_CHECK(mean || !bytes, op, ": uint8 images need mean and std, got neither");
  Patches a = {};
  if (mean) {
    for (const auto& [name, tensor] : {std::make_pair("mean", &*mean), std::make_pair("std", &*std)}) {
      check_shape(op, name, *tensor, {channels});
      check_dtype(op, name, *tensor, {ScalarType::Float});
      check_contiguous(op, name, *tensor);
      check_device(op, name, *tensor, "images", images);
    }
    a.mean = static_cast<const float*>(mean->data_ptr());
    a.std = static_cast<const float*>(std->data_ptr());
  }
  a.images = images.data_ptr();
  a.image_stride = images.stride(0);
  a.channel_stride = images.stride(1);
  a.row_stride = images.stride(2);
  a.column_stride = images.stride(3);
  a.batch = images.size(0);
  a.channels = channels;
  a.patch_rows = weight.size(2);
  a.patch_columns = weight.size(3);
  a.rows = images.size(2) / a.patch_rows;
  a.columns = images.size(3) / a.patch_columns;
  a.unit = bytes ? 1.f / 255.f : 1.f;
  return a;
}

Tensor gathered(const char* op, const Patches& a, const Tensor& images, const Tensor& weight) {
  const int64_t rows = a.batch * a.rows * a.columns, depth = a.channels * a.patch_rows * a.patch_columns, size = rows * depth;
  Tensor patches = empty_like(weight, {rows, depth}, weight.scalar_type());
  if (size == 0) return patches;
  const cudaStream_t stream = current_stream(images);
  with_type(weight.scalar_type(), [&](auto t) {
    using T = decltype(t);
    constexpr int N = 16 / sizeof(T);
    const auto launch = [&](auto i) {
      using I = decltype(i);
      // N pixels in one access, at any patch: every stride and the base must be multiples of it.
      const int64_t bytes = std::min<int64_t>(16, N * sizeof(I));
      bool chunks = a.column_stride == 1 && a.patch_columns % N == 0 && reinterpret_cast<uintptr_t>(a.images) % bytes == 0;
      for (const int64_t stride : {a.image_stride, a.channel_stride, a.row_stride}) chunks = chunks && stride * int64_t(sizeof(I)) % bytes == 0;
      if (chunks) {
        gather_kernel<N, I, T><<<unsigned((size / N + THREADS - 1) / THREADS), THREADS, 0, stream>>>(a, static_cast<T*>(patches.data_ptr()), size);
      } else {
        gather_kernel<1, I, T><<<unsigned((size + THREADS - 1) / THREADS), THREADS, 0, stream>>>(a, static_cast<T*>(patches.data_ptr()), size);
      }
    };
    if (images.scalar_type() == ScalarType::Byte) {
      launch(uint8_t{});
    } else if (images.scalar_type() == weight.scalar_type()) {
      launch(T{});
    } else {
      launch(float{});
    }
  });
  check_launch(op);
  return patches;
}

Tensor patch_embed_fwd(
    Tensor images, Tensor weight, Tensor bias, Tensor cls_token, Tensor position_embeddings, std::optional<Tensor> mean,
    std::optional<Tensor> std) {
  const char* op = "patch_embed_fwd";
  const Patches a = take_patches(op, images, weight, mean, std);
  const int64_t in_image = a.rows * a.columns, tokens = 1 + in_image, width = weight.size(0), depth = weight.numel() / width;
  STD_TORCH_CHECK(in_image > 0, op, ": images of ", text_of(images.sizes()), " hold no patch of ", text_of(weight.sizes()));
  check_shape(op, "bias", bias, {width});
  check_shape(op, "cls_token", cls_token, {1, 1, width});
  check_shape(op, "position_embeddings", position_embeddings, {1, tokens, width});
  check_dtype(op, "bias", bias, {weight.scalar_type(), ScalarType::Float});
  check_dtype(op, "cls_token", cls_token, {weight.scalar_type(), ScalarType::Float});
  check_dtype(op, "position_embeddings", position_embeddings, {cls_token.scalar_type()});
  for (const auto& [name, tensor] : {std::make_pair("bias", &bias), std::make_pair("cls_token", &cls_token),
                                     std::make_pair("position_embeddings", &position_embeddings)}) {
    check_contiguous(op, name, *tensor);
    check_device(op, name, *tensor, "images", images);
  }

  const auto guard = guard_of(images);
  const ScalarType type = wider(weight, position_embeddings);
  Tensor y = empty_like(weight, {a.batch, tokens, width}, type);
  if (a.batch == 0) return y;
  Tensor patches = gathered(op, a, images, weight);
  if (bias.scalar_type() != weight.scalar_type()) bias = torch::stable::to(bias, weight.scalar_type());  // under autocast: D values
  LtProduct p = {};
  p.rows = in_image;
  p.columns = width;
  p.depth = p.x_row = p.w_row = depth;
  p.w_step = 1;
  p.batch = a.batch;
  p.x = patches.data_ptr();
  p.x_batch = in_image * depth;
  p.w = weight.data_ptr();
  p.bias = bias.data_ptr();
  p.epilogue = CUBLASLT_EPILOGUE_BIAS;
  p.type = weight.scalar_type();
  p.y_row = width;
  if (type == weight.scalar_type()) {
    const int64_t skipped = width * (type == ScalarType::Float ? 4 : 2);  // the class token's row
    p.y = static_cast<char*>(y.data_ptr()) + skipped;
    p.y_batch = tokens * width;
    p.residual = static_cast<const char*>(position_embeddings.data_ptr()) + skipped;
    p.residual_row = width;
    Lt::instance().run(op, p, weight);
  } else {  // 16-bit products, float32 positions: the additions promote
    Tensor product = empty_like(weight, {a.batch, in_image, width}, weight.scalar_type());
    p.y = product.data_ptr();
    p.y_batch = in_image * width;
    Lt::instance().run(op, p, weight);
    Tensor rows = torch::stable::narrow(y, 1, 1, in_image);
    torch::stable::copy_(
        rows, torch::stable::subtract(torch::stable::narrow(position_embeddings, 1, 1, in_image), product, -1.0));
  }
  const unsigned blocks = unsigned((a.batch * width + 255) / 256);
  with_type(cls_token.scalar_type(), [&](auto c) {
    with_type(type, [&](auto t) {
      using C = decltype(c);
      using Y = decltype(t);
      class_row_kernel<C, Y><<<blocks, 256, 0, current_stream(images)>>>(
          static_cast<const C*>(cls_token.data_ptr()), static_cast<const C*>(position_embeddings.data_ptr()),
          static_cast<Y*>(y.data_ptr()), a.batch, tokens, width);
    });
  });
  check_launch(op);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> patch_embed_bwd(
    Tensor dout, Tensor images, Tensor weight, std::optional<Tensor> mean, std::optional<Tensor> std, bool images_wanted) {
  const char* op = "patch_embed_bwd";
  const Patches a = take_patches(op, images, weight, mean, std);
  const int64_t in_image = a.rows * a.columns, width = weight.size(0), depth = weight.numel() / width;
  check_shape(op, "dout", dout, {a.batch, 1 + in_image, width});
  check_dtype(op, "dout", dout, FLOATS);
  check_device(op, "dout", dout, "images", images);
  STD_TORCH_CHECK(
      !images_wanted || images.scalar_type() != ScalarType::Byte, op, ": images of bytes have no gradient, it was asked for");

  const auto guard = guard_of(images);
  // The sums over the batch in float32, rounded once.
  const std::vector<int64_t> over_images = {0}, over_patches = {1}, rows_sizes = {a.batch * in_image, width};
  Tensor positions = torch::stable::sum(dout, over_images, true, ScalarType::Float);
  Tensor bias = torch::stable::sum(torch::stable::narrow(positions, 1, 1, in_image), over_patches, false);
  Tensor cls_token = torch::stable::clone(torch::stable::narrow(positions, 1, 0, 1));
  const auto rounded = [&](const Tensor& sum) { return torch::stable::to(sum, dout.scalar_type()); };

  Tensor drows = torch::stable::reshape(torch::stable::narrow(dout, 1, 1, in_image), rows_sizes);
  if (drows.scalar_type() != weight.scalar_type()) drows = torch::stable::to(drows, weight.scalar_type());
  Tensor patches = gathered(op, a, images, weight);
  Tensor dweight = torch::stable::reshape(torch::stable::matmul(torch::stable::transpose(drows, 0, 1), patches), weight.sizes());

  Tensor dimages = empty_like(images, images_wanted ? sizes_of(images) : std::vector<int64_t>{0}, images.scalar_type());
  const int64_t size = dimages.numel();
  if (images_wanted && size > 0) {
    const std::vector<int64_t> matrix = {width, depth};
    Tensor dpatches = torch::stable::matmul(drows, torch::stable::reshape(weight, matrix));
    with_type(weight.scalar_type(), [&](auto t) {
      with_type(images.scalar_type(), [&](auto i) {
        using T = decltype(t);
        using I = decltype(i);
        scatter_kernel<T, I><<<unsigned((size + THREADS - 1) / THREADS), THREADS, 0, current_stream(images)>>>(
            a, static_cast<const T*>(dpatches.data_ptr()), static_cast<I*>(dimages.data_ptr()), images.size(2), images.size(3), size);
      });
    });
    check_launch(op);
  }
  const std::vector<int64_t> vector = {width};
  return {dimages, dweight, rounded(torch::stable::reshape(bias, vector)), rounded(cls_token), rounded(positions)};
}

}  // namespace
}  // namespace vit_fast

STABLE_TORCH_LIBRARY_IMPL(vit_fast_cpp, CUDA, m) {
  m.impl("patch_embed_fwd", TORCH_BOX(&vit_fast::patch_embed_fwd));
  m.impl("patch_embed_bwd", TORCH_BOX(&vit_fast::patch_embed_bwd));
}
