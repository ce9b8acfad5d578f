// SPDX-License-Identifier: MIT
// siamese_augment and gather_augment: checks, allocation, dispatch.
#include "augment.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <optional>
#include <vector>

#include "augment_cpu.h"
#include "augment_cuda.h"
#include "augment_plan.h"
#include "check.h"
#include "gather_checks.h"
#include "stable_compat.h"

namespace dmfast {
namespace {

// The table for so many images, which lie where `like` does.
Rows checked_rows(const char* op, const Tensor& params, const std::optional<Tensor>& offsets,
                  int64_t images, const Tensor& like) {
  check_rank(op, "params", params, 2, "[groups, 13]");
  check(params.size(1) == kColumns, op, ": params must have ", static_cast<int>(kColumns),
        " columns, got ", params.size(1));
  check_dtype(op, "params", params, ScalarType::Float);
  check_same_device(op, "params", params, "the images", like);
  check(params.is_contiguous(), op, ": params must be contiguous");
  const Groups groups = checked_groups(op, "offsets", offsets, params.size(0), images, like);
  const float* data = params.const_data_ptr<float>();
  for (int64_t i = 0; like.is_cpu() && i < params.numel(); ++i) {
    check(!std::isnan(data[i]), op, ": params must not hold NaN, got one in row ", i / kColumns,
          ", column ", i % kColumns);
  }
  return {data, groups.offsets, groups.groups, images};
}

Images as_images(const Tensor& x, DType dtype, void* data) {
  return {data, dtype, x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

// The loops number the pixels of an image in 32 bits.
void check_pixels(const char* op, ImageSize size) {
  check(size.height < kMostPixels / size.width, op, ": images must have fewer than ", kMostPixels,
        " pixels, got ", size.height, " x ", size.width);
}

// About 16,000 elements are worth waking a thread for.
int64_t grain(ImageSize size) {
  const int64_t elements = size.channels * size.height * size.width;
  return elements > 0 ? (16384 + elements - 1) / elements : 1;
}

#ifdef DMFAST_CUDA
// Calls launch(workspace, stream) for images on a GPU.
template <typename Launch>
void launch_images(const char* op, const Tensor& like, int64_t images, ImageSize size,
                   const Launch& launch) {
  check(size.channels < kLargestSide && size.height < kLargestSide && size.width < kLargestSide, op,
        ": sides and channels of images must be below 2^30");
  Tensor sums;
  if (augment_workspace(size) > 0) {
    sums = torch::stable::new_empty(like, {images * augment_workspace(size)}, ScalarType::Double);
  }
  launch_on(op, like, [&](void* stream) {
    double* workspace = sums.defined() ? static_cast<double*>(sums.mutable_data_ptr()) : nullptr;
    return launch(workspace, stream);
  });
}
#endif

// The images of x through one of the two directions, in loops or kernels.
struct Direction {
  const char *op, *argument;
  decltype(&siamese_augment_range) range;
#ifdef DMFAST_CUDA
  decltype(&siamese_augment_launch) launch;
#endif
};

Tensor map(const Direction& direction, const Tensor& x, const Tensor& params,
           const std::optional<Tensor>& offsets) {
  const char* op = direction.op;
  check_rank(op, direction.argument, x, 4, "[images, channels, height, width]");
  const DType dtype = floating_dtype(op, direction.argument, x.scalar_type());
  const Rows rows = checked_rows(op, params, offsets, x.size(0), x);
  const ImageSize size{x.size(1), x.size(2), x.size(3)};
  Tensor y = new_images(op, x, {x.size(0), size.channels, size.height, size.width}, x.scalar_type(),
                        !x.is_contiguous() && is_channels_last(x));
  if (y.numel() == 0) return y;
  const Images from = as_images(x, dtype, const_cast<void*>(x.const_data_ptr()));
  const Images to = as_images(y, dtype, y.mutable_data_ptr());
#ifdef DMFAST_CUDA
  if (!x.is_cpu()) {
    launch_images(op, x, x.size(0), size, [&](double* sums, void* stream) {
      return direction.launch(from, to, size, rows, sums, stream);
    });
    return y;
  }
#endif
  check_pixels(op, size);
  torch::stable::parallel_for(0, x.size(0), grain(size), [&](int64_t begin, int64_t end) {
    direction.range(from, to, size, rows, begin, end);
  });
  return y;
}

// x [N, C, H, W], params [G, 13], offsets [G + 1]
Tensor siamese_augment(const Tensor& x, const Tensor& params, std::optional<Tensor> offsets) {
  Direction forward{};
  forward.op = "siamese_augment";
  forward.argument = "x";
  forward.range = siamese_augment_range;
#ifdef DMFAST_CUDA
  forward.launch = siamese_augment_launch;
#endif
  return map(forward, x, params, offsets);
}

Tensor siamese_augment_backward(const Tensor& gradient, const Tensor& params,
                                std::optional<Tensor> offsets) {
  Direction backward{};
  backward.op = "siamese_augment_backward";
  backward.argument = "gradient";
  backward.range = siamese_augment_backward_range;
#ifdef DMFAST_CUDA
  backward.launch = siamese_augment_backward_launch;
#endif
  return map(backward, gradient, params, offsets);
}

// images [M, H, W, C], index [N], params [G, 13], mean [C], std [C], offsets [G + 1]
Tensor gather_augment(const Tensor& images, const Tensor& index, const Tensor& params,
                      const Tensor& mean, const Tensor& std, ScalarType dtype,
                      std::optional<Tensor> offsets) {
  const char* op = "gather_augment";
  const DType out_dtype = floating_dtype(op, "dtype", dtype);
  const Gathering from = checked_gathering(op, images, index, params, mean, std, offsets);
  const ImageSize size = from.size;
  Tensor y =
      new_images(op, images, {from.count, size.channels, size.height, size.width}, dtype, true);
  if (y.numel() == 0) return y;
  const Images to = as_images(y, out_dtype, y.mutable_data_ptr());
#ifdef DMFAST_CUDA
  if (!images.is_cpu()) {
    launch_images(op, images, from.count, size, [&](double* sums, void* stream) {
      return gather_augment_launch(from.images, from.image_count, from.index, from.normalisation(),
                                   to, size, from.rows, sums, stream);
    });
    return y;
  }
#endif
  check_pixels(op, size);
  torch::stable::parallel_for(0, from.count, grain(size), [&](int64_t begin, int64_t end) {
    gather_augment_range(from.images, from.index, from.normalisation(), to, size, from.rows, begin,
                         end);
  });
  return y;
}

}  // namespace

Gathering checked_gathering(const char* op, const Tensor& images, const Tensor& index,
                            const Tensor& params, const Tensor& mean, const Tensor& std,
                            const std::optional<Tensor>& offsets) {
  check_rank(op, "images", images, 4, "[images, height, width, channels]");
  const bool bytes = images.scalar_type() == ScalarType::Byte;
  check(bytes || images.scalar_type() == ScalarType::Float, op,
        ": images must be uint8 or float32, got ", name(images.scalar_type()));
  check_rank(op, "index", index, 1, "[N]");
  check_dtype(op, "index", index, ScalarType::Long);
  check_same_device(op, "index", index, "the images", images);
  check(index.is_contiguous(), op, ": index must be contiguous");
  const ImageSize size{images.size(3), images.size(1), images.size(2)};
  for (const auto& [argument, tensor] : {std::pair{"mean", &mean}, std::pair{"std", &std}}) {
    check_dtype(op, argument, *tensor, ScalarType::Float);
    check(tensor->dim() == 1 && tensor->size(0) == size.channels, op, ": ", argument,
          " must have one element a channel (", size.channels, "), got ", shape(*tensor));
    check_same_device(op, argument, *tensor, "the images", images);
    check(tensor->is_contiguous(), op, ": ", argument, " must be contiguous");
  }
  const int64_t count = index.size(0);
  const Rows rows = checked_rows(op, params, offsets, count, images);
  check(count == 0 || images.size(0) > 0, op, ": images must not be empty where an index is given");
  const int64_t* picks = index.const_data_ptr<int64_t>();
  for (int64_t n = 0; images.is_cpu() && n < count; ++n) {
    check(picks[n] >= 0 && picks[n] < images.size(0), op, ": index must be from 0 to ",
          images.size(0) - 1, ", got ", picks[n], " at position ", n);
  }
  Gathering gathering{
      {const_cast<void*>(images.const_data_ptr()), bytes ? DType::kUInt8 : DType::kFloat32,
       images.stride(0), images.stride(3), images.stride(1), images.stride(2)},
      images.size(0),
      picks,
      count,
      size,
      rows,
      mean.const_data_ptr<float>(),
      std.const_data_ptr<float>(),
      {}};
  if (bytes && images.is_cpu()) {
    gathering.lookup.resize(size.channels * 256);
    for (size_t i = 0; i < gathering.lookup.size(); ++i) {
      gathering.lookup[i] =
          (static_cast<float>(i % 256) / 255.0f - gathering.mean[i / 256]) / gathering.std[i / 256];
    }
  }
  return gathering;
}

}  // namespace dmfast

STABLE_TORCH_LIBRARY_IMPL(dmfast, CPU, m) {
  m.impl("siamese_augment", TORCH_BOX(&dmfast::siamese_augment));
  m.impl("_siamese_augment_backward", TORCH_BOX(&dmfast::siamese_augment_backward));
  m.impl("gather_augment", TORCH_BOX(&dmfast::gather_augment));
}

#ifdef DMFAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(dmfast, CUDA, m) {
  m.impl("siamese_augment", TORCH_BOX(&dmfast::siamese_augment));
  m.impl("_siamese_augment_backward", TORCH_BOX(&dmfast::siamese_augment_backward));
  m.impl("gather_augment", TORCH_BOX(&dmfast::gather_augment));
}
#endif
