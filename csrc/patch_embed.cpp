// Launchers of patch_embed on a CPU.

#include "launch.h"

namespace vit_fast {
namespace {

constexpr auto FLOATS = {ScalarType::Float, ScalarType::BFloat16};

// What the product gathers from images [B, C, H, W] as they are, in patches of P rows and Q columns.
Patches take_images(const Tensor& images, int64_t patch_rows, int64_t patch_columns) {
  Patches a = {};
  a.images = images.data_ptr();
  a.image_stride = images.stride(0);
  a.channel_stride = images.stride(1);
  a.row_stride = images.stride(2);
  a.column_stride = images.stride(3);
  a.channels = images.size(1);
  a.patch_rows = patch_rows;
  a.patch_columns = patch_columns;
  a.rows = images.size(2) / patch_rows;
  a.columns = images.size(3) / patch_columns;
  a.source = images.scalar_type() == ScalarType::Byte   ? Patches::Source::u8
             : images.scalar_type() == ScalarType::Float ? Patches::Source::f32
                                                         : Patches::Source::bf16;
  return a;
}

// The same for a weight [D, C, P, Q], normalised by mean and std; checks all of it.
Patches take_patches(
    const char* op, const Tensor& images, const Tensor& weight, const std::optional<Tensor>& mean, const std::optional<Tensor>& std) {
  check_rank(op, "images", images, 4);
  check_rank(op, "weight", weight, 4);
  check_device(op, "weight", weight, "images", images);
  check_dtype(op, "weight", weight, FLOATS);
  check_contiguous(op, "weight", weight);
  STD_TORCH_CHECK(weight.numel() > 0, op, ": weight must have elements, got shape ", text_of(weight.sizes()));
  const int64_t channels = weight.size(1), height = weight.size(2), width = weight.size(3);
  check_shape(op, "images", images, {images.size(0), channels, images.size(2), images.size(3)});
  check_dtype(op, "images", images, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Byte});
  STD_TORCH_CHECK(mean.has_value() == std.has_value(), op, ": mean and std come together, got only one of them");
  STD_TORCH_CHECK(mean || images.scalar_type() != ScalarType::Byte, op, ": uint8 images need mean and std, got neither");
  Patches a = take_images(images, height, width);
  if (mean) {
    for (const auto& [name, tensor] : {std::make_pair("mean", &*mean), std::make_pair("std", &*std)}) {
      check_shape(op, name, *tensor, {channels});
      check_dtype(op, name, *tensor, {ScalarType::Float});
      check_contiguous(op, name, *tensor);
      check_device(op, name, *tensor, "images", images);
    }
    a.mean = floats_of(*mean);
    a.std = floats_of(*std);
  }
  a.round_to_bf16 = type_of(weight) == Type::bf16 && (a.mean || a.source != Patches::Source::bf16);
  return a;
}

Tensor patch_embed_fwd(
    Tensor images, Tensor weight, Tensor bias, Tensor cls_token, Tensor position_embeddings, std::optional<Tensor> mean,
    std::optional<Tensor> std) {
  const char* op = "patch_embed_fwd";
  const Patches patches = take_patches(op, images, weight, mean, std);
  const int64_t batch = images.size(0), in_image = patches.rows * patches.columns, tokens = 1 + in_image, width = weight.size(0);
  STD_TORCH_CHECK(in_image > 0, op, ": images of ", text_of(images.sizes()), " hold no patch of ", text_of(weight.sizes()));
  check_shape(op, "bias", bias, {width});
  check_shape(op, "cls_token", cls_token, {1, 1, width});
  check_shape(op, "position_embeddings", position_embeddings, {1, tokens, width});
  check_dtype(op, "bias", bias, FLOATS);
  check_dtype(op, "cls_token", cls_token, FLOATS);
  check_dtype(op, "position_embeddings", position_embeddings, {cls_token.scalar_type()});
  STD_TORCH_CHECK(
      type_of(position_embeddings) == Type::f32 || type_of(weight) == Type::bf16,
      op, ": position_embeddings must be at least as wide as weight, float32, got bfloat16");
  for (const auto& [name, tensor] : {std::make_pair("bias", &bias), std::make_pair("cls_token", &cls_token),
                                     std::make_pair("position_embeddings", &position_embeddings)}) {
    check_contiguous(op, name, *tensor);
    check_device(op, name, *tensor, "images", images);
  }

  const ScalarType type = wider(weight, position_embeddings);
  Tensor y = empty({batch, tokens, width}, type);
  if (batch == 0) return y;
  if (bias.scalar_type() != weight.scalar_type()) bias = torch::stable::to(bias, weight.scalar_type());  // under autocast: D values
  Product a = {};
  a.patches = &patches;
  a.w = weight.data_ptr();
  a.bias = bias.data_ptr();
  a.rows = batch * in_image;
  a.columns = width;
  a.depth = weight.numel() / width;
  a.w_row = a.depth;
  a.w_step = 1;
  a.group = in_image;
  a.y_group = tokens * width;
  a.y_row = a.residual_row = width;
  a.residual_group = 0;  // every image gets the same positions
  a.x_type = a.bias_type = type_of(weight);
  a.residual_type = a.y_type = type_of(y);
  // Row 0 of an image and of the table are the class token's.
  const int64_t skipped = width * (a.y_type == Type::f32 ? 4 : 2);
  a.y = static_cast<char*>(y.data_ptr()) + skipped;
  a.residual = static_cast<const char*>(position_embeddings.data_ptr()) + skipped;
  run_product(a);
  Tensor class_row = torch::stable::narrow(y, 1, 0, 1);
  torch::stable::copy_(class_row, torch::stable::subtract(
      torch::stable::narrow(position_embeddings, 1, 0, 1), cls_token, -1.0));
  return y;
}

void patch_embed_out(
    Tensor images, Tensor packed, std::optional<Tensor> bias, std::optional<Tensor> positions, int64_t patch_rows,
    int64_t patch_columns, Tensor out) {
  const char* op = "patch_embed_out";
  check_rank(op, "images", images, 4);
  check_dtype(op, "images", images, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Byte});
  STD_TORCH_CHECK(
      patch_rows > 0 && patch_columns > 0, op, ": a patch must have rows and columns, got ", patch_rows, " and ", patch_columns);
  const Patches patches = take_images(images, patch_rows, patch_columns);
  const int64_t batch = images.size(0), in_image = patches.rows * patches.columns;
  check_out(op, "out", out);
  check_rank(op, "out", out, 3);
  check_dtype(op, "out", out, FLOATS);
  const int64_t width = out.size(2);
  check_shape(op, "out", out, {batch, in_image, width});
  check_apart(op, "images", images, out);
  Product a = {};
  take_packed(op, a, packed, width);
  STD_TORCH_CHECK(
      a.depth == patches.channels * patch_rows * patch_columns, op, ": packed must be ", patches.channels * patch_rows * patch_columns,
      " deep for patches of ", text_of(std::vector<int64_t>{patches.channels, patch_rows, patch_columns}), ", got ", a.depth);
  if (bias) take_bias(op, a, *bias, out.scalar_type());
  if (positions) {
    check_shape(op, "positions", *positions, {in_image, width});
    check_dtype(op, "positions", *positions, {ScalarType::Float, out.scalar_type()});
    check_device(op, "positions", *positions, "images", images);
    a.residual_row = check_rows(op, "positions", *positions);
    a.residual = positions->data_ptr();
    a.residual_type = type_of(*positions);
    check_apart(op, "positions", *positions, out);
  }
  if (batch * in_image == 0) return;
  a.patches = &patches;
  a.rows = batch * in_image;
  a.group = in_image;
  a.y = out.data_ptr();
  a.y_group = out.stride(0);
  a.y_row = out.stride(1);
  a.y_type = type_of(out);
  run_packed_product(a);  // x, gathered, is float32
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> patch_embed_bwd(
    Tensor dout, Tensor images, Tensor weight, std::optional<Tensor> mean, std::optional<Tensor> std, bool images_wanted) {
  const char* op = "patch_embed_bwd";
  const Patches patches = take_patches(op, images, weight, mean, std);
  const int64_t batch = images.size(0), in_image = patches.rows * patches.columns, width = weight.size(0);
  const int64_t depth = weight.numel() / width;
  check_shape(op, "dout", dout, {batch, 1 + in_image, width});
  check_dtype(op, "dout", dout, FLOATS);
  STD_TORCH_CHECK(
      !images_wanted || images.scalar_type() != ScalarType::Byte, op, ": images of bytes have no gradient, it was asked for");

  // The sums over the batch in float32, rounded once.
  const std::vector<int64_t> over_images = {0}, over_patches = {1};
  Tensor positions = batch == 1 ? torch::stable::clone(torch::stable::to(dout, ScalarType::Float))
                                : torch::stable::sum(dout, over_images, true, ScalarType::Float);
  Tensor bias = torch::stable::sum(torch::stable::narrow(positions, 1, 1, in_image), over_patches, false);
  Tensor cls_token = torch::stable::clone(torch::stable::narrow(positions, 1, 0, 1));
  const auto rounded = [&](const Tensor& sum) { return torch::stable::to(sum, dout.scalar_type()); };

  const std::vector<int64_t> rows_sizes = {batch * in_image, width};
  Tensor drows = torch::stable::reshape(torch::stable::narrow(dout, 1, 1, in_image), rows_sizes);
  if (drows.scalar_type() != weight.scalar_type()) drows = torch::stable::to(drows, weight.scalar_type());
  drows = torch::stable::contiguous(drows);
  Tensor gathered = empty({batch * in_image, depth});
  const Kernels& kernel = kernels();
  share(workers_for(batch * in_image, 8), batch * in_image, [&](int, int64_t begin, int64_t end) {
    kernel.gather_patches(patches, begin, end - begin, floats_of(gathered) + begin * depth);
  });
  Tensor rows = type_of(weight) == Type::f32 ? gathered : torch::stable::to(gathered, weight.scalar_type());
  Tensor dweight = torch::stable::reshape(torch::stable::matmul(torch::stable::transpose(drows, 0, 1), rows), weight.sizes());

  Tensor dimages = images_wanted ? empty(sizes_of(images), images.scalar_type()) : empty({0}, images.scalar_type());
  if (images_wanted && batch > 0) {
    Product a = {};
    a.x = drows.data_ptr();
    a.x_row = width;
    a.w = weight.data_ptr();
    a.w_row = 1;
    a.w_step = depth;
    a.rows = a.group = std::max<int64_t>(1, batch * in_image);
    a.columns = depth;
    a.depth = width;
    a.x_type = type_of(weight);
    a.residual_type = a.y_type = Type::f32;
    a.y = gathered.data_ptr();  // no longer needed
    a.y_row = depth;
    if (in_image > 0) run_product(a);
    const PatchScatter scatter = {
        floats_of(gathered), dimages.data_ptr(), patches.std, patches.channels, patches.patch_rows, patches.patch_columns,
        patches.rows, patches.columns, images.size(2), images.size(3), type_of(images)};
    const int64_t planes = batch * patches.channels;
    share(workers_for(planes), planes, [&](int, int64_t begin, int64_t end) { kernel.patch_scatter(scatter, begin, end); });
  }
  return {dimages, dweight, rounded(torch::stable::reshape(bias, std::vector<int64_t>{width})), rounded(cls_token), rounded(positions)};
}

}  // namespace
}  // namespace vit_fast

STABLE_TORCH_LIBRARY_IMPL(vit_fast_cpp, CPU, m) {
  m.impl("patch_embed_fwd", TORCH_BOX(&vit_fast::patch_embed_fwd));
  m.impl("patch_embed_out", TORCH_BOX(&vit_fast::patch_embed_out));
  m.impl("patch_embed_bwd", TORCH_BOX(&vit_fast::patch_embed_bwd));
}
