// SPDX-License-Identifier: MIT
// A ConvNet block on a GPU in one kernel: checks, allocation, launches.
#ifdef DMFAST_CUDA
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

#include "check.h"
#include "conv_block_checks.h"
#include "conv_block_cuda.h"
#include "norm_pool_cuda.h"
#include "stable_compat.h"

namespace dmfast {
namespace {

bool is_aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}

// In channels_last, from where the kernels can load.
Tensor readable_images(const char* op, const Tensor& images) {
  const Tensor dense = dense_channels_last(op, images);
  if (dense.numel() == 0 || is_aligned(dense)) return dense;
  return allocated(op, sizes_of(dense), [&] { return torch::stable::clone(dense); });
}

// [networks, filters, channels, 3, 3] in memory, for images of that size.
FusedBlock block_of(const char* op, const Tensor& conv_weight, int64_t images, int64_t height,
                    int64_t width, int64_t padding, double eps) {
  const int64_t axes = conv_weight.dim();
  check(axes == 4 || axes == 5, op,
        ": conv_weight must have shape [filters, channels, 3, 3] or "
        "[networks, filters, channels, 3, 3], got ",
        shape(conv_weight));
  check(conv_weight.size(axes - 1) == 3 && conv_weight.size(axes - 2) == 3, op,
        ": conv_weight must have 3x3 taps, got ", shape(conv_weight));
  check_dtype(op, "conv_weight", conv_weight, ScalarType::Float);
  check(height > 0 && width > 0 && padding >= 0 && padding <= 8, op, ": images of ", height, "x",
        width, " and a padding of ", padding, " are not taken");
  return {images,
          axes == 5 ? conv_weight.size(0) : 1,
          conv_weight.size(axes - 3),
          conv_weight.size(axes - 4),
          height,
          width,
          padding,
          static_cast<float>(eps)};
}

// The arguments of a block in memory.
struct Arguments {
  FusedBlock block;
  Tensor x, conv_weight;
  std::optional<Tensor> weight, bias;

  FusedNorm norm() const {
    const auto data = [](const std::optional<Tensor>& parameter) {
      return parameter ? parameter->const_data_ptr<float>() : nullptr;
    };
    return {data(weight), data(bias), block.filters, block.filters};
  }
};

Arguments checked_arguments(const char* op, const Tensor& x, const Tensor& conv_weight,
                            const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                            double eps, int64_t padding) {
  check_rank(op, "x", x, 4, "[images, channels, height, width]");
  check_dtype(op, "x", x, ScalarType::BFloat16);
  const FusedBlock block = block_of(op, conv_weight, x.size(0), x.size(2), x.size(3), padding, eps);
  check(x.size(1) == block.channels, op, ": conv_weight must have ", x.size(1),
        " channels as x has, got ", shape(conv_weight));
  check_same_device(op, "conv_weight", conv_weight, "x", x);
  check(block.networks > 0 && block.images % block.networks == 0, op, ": the ", block.images,
        " images of x must divide evenly into the ", block.networks, " networks");
  const auto dense = [&](const char* argument, const std::optional<Tensor>& tensor) {
    if (!tensor) return tensor;
    check_dtype(op, argument, *tensor, ScalarType::Float);
    check_same_device(op, argument, *tensor, "x", x);
    check(tensor->numel() == block.networks * block.filters, op, ": ", argument, " must have ",
          block.networks * block.filters, " elements, got ", shape(*tensor));
    const Tensor kept = contiguous(op, *tensor);
    if (is_aligned(kept)) return std::optional<Tensor>(kept);
    return std::optional<Tensor>(
        allocated(op, sizes_of(kept), [&] { return torch::stable::clone(kept); }));
  };
  return {block, readable_images(op, x), contiguous(op, conv_weight), dense("weight", weight),
          dense("bias", bias)};
}

Tensor images_like(const char* op, const Tensor& x, const FusedBlock& block, int64_t channels,
                   int64_t height, int64_t width) {
  return new_images(op, x, {block.images, channels, height, width}, ScalarType::BFloat16, true);
}

void check_taken(const char* op, const FusedBlock& block, const Tensor& on_device, bool backward) {
  bool taken = false;
  launch_on(op, on_device, [&](void*) {
    taken = conv_block_fused(block, backward);
    return 0;
  });
  check(taken, op, ": the kernels do not take blocks of ", block.channels, " channels and ",
        block.filters, " filters on images of ", block.height, "x", block.width,
        " with a padding of ", block.padding);
}

Tensor packed_weights(const char* op, const FusedBlock& block, const Tensor& conv_weight,
                      bool turned) {
  Tensor packed =
      new_tensor(op, conv_weight, {conv_block_packed_bytes(block, turned)}, ScalarType::Byte);
  const float* weights = conv_weight.const_data_ptr<float>();
  launch_on(op, conv_weight, [&](void* stream) {
    return conv_block_pack_launch(block, weights, turned, packed.mutable_data_ptr(), stream);
  });
  return packed;
}

// Whether the kernels take a block on that GPU.
bool fused_block_takes(int64_t channels, int64_t filters, int64_t height, int64_t width,
                       int64_t padding, bool backward, int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  return conv_block_fused({1, 1, channels, filters, height, width, padding, 0.0f}, backward);
}

// conv_weight [R, K, C, 3, 3] or [K, C, 3, 3] for images of height x width -> bytes
Tensor fused_block_pack(const Tensor& conv_weight, int64_t height, int64_t width, int64_t padding) {
  const char* op = "fused_block_pack";
  const FusedBlock block = block_of(op, conv_weight, 0, height, width, padding, 0.0);
  check_taken(op, block, conv_weight, false);
  return packed_weights(op, block, contiguous(op, conv_weight), false);
}

// x [N, C, H, W], packed: what fused_block_pack made of conv_weight, or none -> out
// [N, K, H'/2, W'/2], statistics [N, 2, K]
std::tuple<Tensor, Tensor> fused_block(const Tensor& x, const Tensor& conv_weight,
                                       std::optional<Tensor> weight, std::optional<Tensor> bias,
                                       std::optional<Tensor> packed, double eps, int64_t padding,
                                       bool wgmma) {
  const char* op = "fused_block";
  const Arguments arguments = checked_arguments(op, x, conv_weight, weight, bias, eps, padding);
  check_taken(op, arguments.block, x, false);
  const FusedBlock& block = arguments.block;
  if (packed) {
    check_dtype(op, "packed", *packed, ScalarType::Byte);
    check_same_device(op, "packed", *packed, "x", x);
    check(packed->numel() == conv_block_packed_bytes(block, false) && packed->is_contiguous(), op,
          ": packed must be what fused_block_pack made of conv_weight");
  }
  Tensor out =
      images_like(op, x, block, block.filters, block.conv_height() / 2, block.conv_width() / 2);
  Tensor statistics = new_tensor(op, x, {block.images, 2, block.filters}, ScalarType::Float);
  if (block.images == 0) return {out, statistics};
  const Tensor weights = packed ? *packed : packed_weights(op, block, arguments.conv_weight, false);
  launch_on(op, x, [&](void* stream) {
    return conv_block_forward_launch(block, arguments.x.const_data_ptr(), weights.const_data_ptr(),
                                     arguments.norm(), out.mutable_data_ptr(),
                                     statistics.mutable_data_ptr<float>(),
                                     wgmma && conv_block_wgmma(block), stream);
  });
  return {out, statistics};
}

// gradient [N, K, H'/2, W'/2] -> what is wanted of the gradients of x, of the convolution's output
// [N, K, H', W'], of weight and of bias; the others are empty
std::tuple<Tensor, Tensor, Tensor, Tensor> fused_block_backward(
    const Tensor& gradient, const Tensor& x, const Tensor& conv_weight,
    std::optional<Tensor> weight, std::optional<Tensor> bias, const Tensor& statistics,
    int64_t padding, std::vector<bool> wanted) {
  const char* op = "fused_block_backward";
  const Arguments arguments = checked_arguments(op, x, conv_weight, weight, bias, 0.0, padding);
  check_taken(op, arguments.block, x, true);
  const FusedBlock& block = arguments.block;
  const int64_t filters = block.filters;
  check(wanted.size() == 4, op, ": wanted must have 4 elements, got ", wanted.size());
  check(gradient.dim() == 4 && gradient.size(0) == block.images && gradient.size(1) == filters &&
            gradient.size(2) == block.conv_height() / 2 &&
            gradient.size(3) == block.conv_width() / 2,
        op, ": gradient must have the shape of the output, got ", shape(gradient));
  check_dtype(op, "gradient", gradient, ScalarType::BFloat16);
  check_same_device(op, "gradient", gradient, "x", x);
  check(statistics.dim() == 3 && statistics.size(0) == block.images && statistics.size(1) == 2 &&
            statistics.size(2) == filters,
        op, ": statistics must have shape [images, 2, filters], got ", shape(statistics));
  check_dtype(op, "statistics", statistics, ScalarType::Float);
  check_same_device(op, "statistics", statistics, "x", x);

  const auto empty = [&](const Tensor& like) { return torch::stable::new_empty(like, {0}); };
  Tensor of_x =
      wanted[0] ? images_like(op, x, block, block.channels, block.height, block.width) : empty(x);
  Tensor of_z = wanted[1]
                    ? images_like(op, x, block, filters, block.conv_height(), block.conv_width())
                    : empty(x);
  const auto parameter = [&](bool want, const std::optional<Tensor>& tensor) {
    return want && tensor ? new_tensor(op, *tensor, sizes_of(*tensor), ScalarType::Float)
                          : empty(statistics);
  };
  Tensor of_weight = parameter(wanted[2], weight), of_bias = parameter(wanted[3], bias);
  const bool norms = of_weight.numel() > 0 || of_bias.numel() > 0;
  Tensor sums =
      norms ? new_tensor(op, x, {block.images, 2, filters}, ScalarType::Float) : empty(statistics);
  const auto floats = [](Tensor& tensor) {
    return tensor.numel() > 0 ? tensor.mutable_data_ptr<float>() : nullptr;
  };
  if (block.images > 0) {
    const Tensor weights = packed_weights(op, block, arguments.conv_weight, false);
    const Tensor turned =
        wanted[0] ? packed_weights(op, block, arguments.conv_weight, true) : Tensor();
    const Tensor of_out = readable_images(op, gradient);
    const Tensor found = contiguous(op, statistics);
    FusedGradients gradients{};
    gradients.out_gradient = of_out.const_data_ptr();
    gradients.statistics = found.const_data_ptr<float>();
    gradients.x_gradient = wanted[0] ? of_x.mutable_data_ptr() : nullptr;
    gradients.conv_gradient = wanted[1] ? of_z.mutable_data_ptr() : nullptr;
    gradients.norm_gradients = floats(sums);
    launch_on(op, x, [&](void* stream) {
      return conv_block_backward_launch(block, arguments.x.const_data_ptr(),
                                        weights.const_data_ptr(),
                                        turned.defined() ? turned.const_data_ptr() : nullptr,
                                        arguments.norm(), gradients, stream);
    });
  }
  if (norms) {
    NormPool call{};
    call.dtype = DType::kBFloat16;
    call.size = {block.images,       filters,        block.conv_height(),
                 block.conv_width(), block.networks, true};
    launch_on(op, x, [&](void* stream) {
      return norm_pool_parameter_gradient_launch(call, floats(sums), floats(of_weight),
                                                 floats(of_bias), stream);
    });
  }
  return {of_x, of_z, of_weight, of_bias};
}

}  // namespace
}  // namespace dmfast

STABLE_TORCH_LIBRARY_IMPL(dmfast, CUDA, m) {
  m.impl("_fused_block", TORCH_BOX(&dmfast::fused_block));
  m.impl("_fused_block_backward", TORCH_BOX(&dmfast::fused_block_backward));
  m.impl("_fused_block_pack", TORCH_BOX(&dmfast::fused_block_pack));
}

STABLE_TORCH_LIBRARY_IMPL(dmfast, CompositeExplicitAutograd, m) {
  m.impl("_fused_block_takes", TORCH_BOX(&dmfast::fused_block_takes));
}
#endif
