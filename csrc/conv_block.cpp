// SPDX-License-Identifier: MIT
// conv_norm_relu_pool and conv_batch_norm_relu_pool on the CPU: checks, allocation, the spreading
// of images over threads.
#include "conv_block.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "check.h"
#include "conv_block_checks.h"
#include "cpu_kernels.h"
#include "stable_compat.h"

namespace dmfast {
namespace {

// The arguments of a block in memory. `networks` of them have weights of their own and as many of
// the images each.
struct Arguments {
  ConvBlock block;
  int64_t images, networks;
  Tensor x, conv_weight;
  std::optional<Tensor> weight, bias;
  const float* given = nullptr;  // see Norm

  int64_t images_of_network() const { return networks > 0 ? images / networks : 0; }

  const float* conv_weights(int64_t network) const {
    return conv_weight.const_data_ptr<float>() + network * block.filters * block.channels * 9;
  }

  Norm norm(int64_t network, double eps) const {
    const auto of = [&](const std::optional<Tensor>& tensor) -> const float* {
      if (!tensor) return nullptr;
      return tensor->const_data_ptr<float>() + (tensor->dim() == 2 ? network * block.filters : 0);
    };
    return {of(weight), of(bias), static_cast<float>(eps), given};
  }

  BlockInput input(int64_t image) const {
    return {x.const_data_ptr<float>() + image * x.stride(0), x.stride(0), x.stride(1), x.stride(2),
            x.stride(3)};
  }
};

Arguments checked_arguments(const char* op, const Tensor& x, const Tensor& conv_weight,
                            const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                            int64_t padding, bool bfloat16) {
  check_rank(op, "x", x, 4, "[images, channels, height, width]");
  check_dtype(op, "x", x, ScalarType::Float);
  const bool several = conv_weight.dim() == 5;
  check(several || conv_weight.dim() == 4, op,
        ": conv_weight must have shape [filters, channels, 3, 3] or "
        "[networks, filters, channels, 3, 3], got ",
        shape(conv_weight));
  const int64_t networks = several ? conv_weight.size(0) : 1;
  check(networks > 0 ? x.size(0) % networks == 0 : x.size(0) == 0, op, ": the ", x.size(0),
        " images must divide evenly into the ", networks, " networks");
  const ConvBlock block = checked_block(op, "conv_weight", conv_weight, x.size(1), x.size(2),
                                        x.size(3), padding, bfloat16);
  const auto dense = [&](const char* argument, const std::optional<Tensor>& tensor) {
    if (!tensor) return tensor;
    check_dtype(op, argument, *tensor, ScalarType::Float);
    const bool fits =
        (tensor->dim() == 1 && tensor->size(0) == block.filters) ||
        (tensor->dim() == 2 && tensor->size(0) == networks && tensor->size(1) == block.filters);
    check(fits, op, ": ", argument, " must have shape [", block.filters, "] or [", networks, ", ",
          block.filters, "], got ", shape(*tensor));
    return std::optional<Tensor>(contiguous(op, *tensor));
  };
  return {block,
          x.size(0),
          networks,
          block.thin() ? x : dense_channels_last(op, x),
          contiguous(op, conv_weight),
          dense("weight", weight),
          dense("bias", bias)};
}

// Of the statistics of single images: so that there is something to divide by. It is taken out
// again.
constexpr double kTinyEps = 1e-12;

Tensor empty(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

// The packed weights of every network, in memory that is kept.
const char* packed_weights(const char* op, const Arguments& arguments,
                           const ConvBlockKernels& kernels, bool turned, Kept& kept) {
  const int64_t bytes = kernels.packed_bytes(arguments.block);
  char* packed = static_cast<char*>(kept.bytes(op, bytes * arguments.networks));
  for_each_unit(op, arguments.networks, 0, [&](int64_t network, void*) {
    kernels.pack(arguments.block, arguments.conv_weights(network), turned,
                 packed + network * bytes);
  });
  return packed;
}

// Runs of at most `most` images of one network.
struct Runs {
  int64_t images, most;  // of a network

  int64_t of_network() const { return (images + most - 1) / most; }
  // Of run r of all: its network, and its first image and number of images.
  std::tuple<int64_t, int64_t, int64_t> at(int64_t run) const {
    const int64_t network = run / of_network(), first = run % of_network() * most;
    return {network, network * images + first, std::min(most, images - first)};
  }
};

Tensor new_outputs(const char* op, const Arguments& arguments, int64_t height, int64_t width) {
  return new_images(op, arguments.x, {arguments.images, arguments.block.filters, height, width},
                    ScalarType::Float, true);
}

Tensor new_out(const char* op, const Arguments& arguments) {
  return new_outputs(op, arguments, arguments.block.out_height(), arguments.block.out_width());
}

Tensor new_z(const char* op, const Arguments& arguments) {
  return new_outputs(op, arguments, arguments.block.conv_height(), arguments.block.conv_width());
}

float* data_or_null(Tensor& tensor) {
  return tensor.numel() > 0 ? tensor.mutable_data_ptr<float>() : nullptr;
}

// The forward kernel on all images; what is null is left out.
void forward(const char* op, const Arguments& arguments, double eps, float* out, float* z,
             float* statistics) {
  const ConvBlock& block = arguments.block;
  const ConvBlockKernels& kernels = conv_block_kernels();
  thread_local Kept kept_weights;
  const char* packed = packed_weights(op, arguments, kernels, false, kept_weights);
  const Runs runs{arguments.images_of_network(), kernels.images_at_once(block)};
  for_each_unit(op, arguments.networks * runs.of_network(), kernels.workspace_bytes(block, false),
                [&](int64_t run, void* workspace) {
                  const auto [network, first, count] = runs.at(run);
                  kernels.forward(block, packed + network * kernels.packed_bytes(block),
                                  arguments.norm(network, eps), arguments.input(first), count,
                                  out ? out + first * block.out_size() : nullptr,
                                  z ? z + first * block.conv_size() : nullptr,
                                  statistics ? statistics + first * 2 * block.filters : nullptr,
                                  workspace);
                });
}

// x [N, C, H, W] -> out [N, K, H'/2, W'/2], z [N, K, H', W'] if it is to be kept, statistics
// [N, 2, K]
std::tuple<Tensor, Tensor, Tensor> conv_norm_relu_pool(const Tensor& x, const Tensor& conv_weight,
                                                       std::optional<Tensor> weight,
                                                       std::optional<Tensor> bias, double eps,
                                                       int64_t padding, bool bfloat16, bool keep) {
  const char* op = "conv_norm_relu_pool";
  const Arguments arguments =
      checked_arguments(op, x, conv_weight, weight, bias, padding, bfloat16);
  const ConvBlock& block = arguments.block;
  Tensor out = new_out(op, arguments);
  Tensor z = keep && !block.thin() ? new_z(op, arguments) : empty(x);
  Tensor statistics = new_tensor(op, x, {arguments.images, 2, block.filters}, ScalarType::Float);
  if (arguments.images > 0) {
    forward(op, arguments, eps, out.mutable_data_ptr<float>(), data_or_null(z),
            statistics.mutable_data_ptr<float>());
  }
  return {out, z, statistics};
}

// Sums partials [images of network][rows, filters] over the images, in their order, into
// put(network, row, filter, sum).
template <typename Put>
void sum_over_images(const char* op, const float* partials, int64_t networks, int64_t images,
                     int64_t rows, int64_t filters, const Put& put) {
  for_each_unit(op, networks * rows, 0, [&](int64_t unit, void*) {
    const int64_t network = unit / rows, row = unit % rows;
    std::vector<float> sums(filters);
    for (int64_t image = 0; image < images; ++image) {
      const float* from = partials + ((network * images + image) * rows + row) * filters;
      for (int64_t k = 0; k < filters; ++k) sums[k] += from[k];
    }
    for (int64_t k = 0; k < filters; ++k) put(network, row, k, sums[k]);
  });
}

// The upstream gradient and the convolution's output as the kernels read them.
struct Upstream {
  Tensor gradient, z;

  Upstream(const char* op, const Arguments& arguments, const Tensor& from, const Tensor& z)
      : gradient(checked(op, arguments, from)),
        z(arguments.block.thin() ? z : dense_channels_last(op, z)) {
    check(arguments.block.thin() || z.numel() == arguments.images * arguments.block.conv_size(), op,
          ": z must be that of a forward with keep");
  }

  // What does not depend on the norm.
  BlockGradient of(const Arguments& arguments) const {
    BlockGradient all{};
    all.gradient = gradient.const_data_ptr<float>();
    if (!arguments.block.thin()) all.z = z.const_data_ptr<float>();
    return all;
  }

 private:
  static Tensor checked(const char* op, const Arguments& arguments, const Tensor& gradient) {
    const ConvBlock& block = arguments.block;
    check_rank(op, "gradient", gradient, 4, "[images, filters, height, width]");
    check_dtype(op, "gradient", gradient, ScalarType::Float);
    check(gradient.size(0) == arguments.images && gradient.size(1) == block.filters &&
              gradient.size(2) == block.out_height() && gradient.size(3) == block.out_width(),
          op, ": gradient must have shape [", arguments.images, ", ", block.filters, ", ",
          block.out_height(), ", ", block.out_width(), "], got ", shape(gradient));
    return dense_channels_last(op, gradient);
  }
};

// The part of `all` that begins with image `first`.
BlockGradient part_of(const BlockGradient& all, const Arguments& arguments, int64_t first) {
  const ConvBlock& block = arguments.block;
  BlockGradient part = all;
  part.x = arguments.input(first);
  if (part.z) part.z += first * block.conv_size();
  if (part.statistics) part.statistics += first * 2 * block.filters;
  part.gradient += first * block.out_size();
  if (part.x_gradient) part.x_gradient += first * block.input_size();
  if (part.norm_gradients) part.norm_gradients += first * 2 * block.filters;
  if (part.weight_partials) part.weight_partials += first * 9 * block.channels * block.filters;
  return part;
}

// Zeros like a tensor if that is wanted, else an empty one.
Tensor zeros_like(const char* op, bool is_wanted, const Tensor& tensor) {
  if (!is_wanted) return empty(tensor);
  return torch::stable::fill_(new_tensor(op, tensor, sizes_of(tensor), ScalarType::Float), 0.0);
}

// The gradients of x and conv_weight, if wanted, and all.norm_gradients, if there is room for them.
std::tuple<Tensor, Tensor> gradients(const char* op, const Arguments& arguments, BlockGradient all,
                                     bool of_x, bool of_conv_weight) {
  const ConvBlock& block = arguments.block;
  const int64_t images = arguments.images, networks = arguments.networks, filters = block.filters;
  Tensor x_gradient =
      of_x ? new_images(op, arguments.x, {images, block.channels, block.height, block.width},
                        ScalarType::Float, true)
           : empty(arguments.x);
  Tensor conv_weight_gradient = zeros_like(op, of_conv_weight, arguments.conv_weight);
  if (images == 0) return {x_gradient, conv_weight_gradient};

  const ConvBlockKernels& kernels = conv_block_kernels();
  thread_local Kept kept_weights, kept_turned, kept_inputs, kept_outputs;
  const int64_t packed_bytes = kernels.packed_bytes(block);
  const char* packed =
      block.thin() ? packed_weights(op, arguments, kernels, false, kept_weights) : nullptr;
  const char* turned = of_x ? packed_weights(op, arguments, kernels, true, kept_turned) : nullptr;
  const int64_t taps = 9 * block.channels;
  const bool wide_weights = of_conv_weight && !block.thin();

  Tensor partials;  // not kept: they grow with the images
  if (of_x) all.x_gradient = x_gradient.mutable_data_ptr<float>();
  if (of_conv_weight && block.thin()) {
    partials = new_tensor(op, arguments.x, {images, taps, filters}, ScalarType::Float);
    all.weight_partials = partials.mutable_data_ptr<float>();
  }
  if (wide_weights) {
    all.inputs = kept_inputs.bytes(op, kernels.transforms_bytes(block, true));
    all.outputs = kept_outputs.bytes(op, kernels.transforms_bytes(block, false));
  }
  const auto run = [&](int64_t network, int64_t first, int64_t count, int64_t first_tile,
                       void* workspace) {
    BlockGradient part = part_of(all, arguments, first);
    part.first_tile = first_tile;
    kernels.backward(block, packed ? packed + network * packed_bytes : nullptr,
                     turned ? turned + network * packed_bytes : nullptr,
                     arguments.norm(network, 0.0), part, count, workspace);
  };

  // No more than have room in the transforms: much padding makes more tiles than the input has.
  const int64_t at_once =
      std::min(kernels.images_at_once(block.adjoint()), block.gradient_tiles() / block.tiles());
  const int64_t workspace_bytes = kernels.workspace_bytes(block, true);
  if (!wide_weights) {
    const Runs runs{arguments.images_of_network(), at_once};
    for_each_unit(op, networks * runs.of_network(), workspace_bytes,
                  [&](int64_t i, void* workspace) {
                    const auto [network, first, count] = runs.at(i);
                    run(network, first, count, 0, workspace);
                  });
  } else {
    // The tiles of a few images are taken into the domain by all threads, which then sum the
    // products at a point each: the order does not depend on how many there are.
    thread_local Kept kept_sums;
    const int64_t pairs = block.channels * filters;
    float* sums = kept_sums.floats(op, kPoints * pairs);
    const Runs parts{
        arguments.images_of_network(),
        std::max<int64_t>(block.gradient_tiles() / block.tiles() / at_once, 1) * at_once};
    for (int64_t part = 0; part < networks * parts.of_network(); ++part) {
      const auto [network, part_first, part_count] = parts.at(part);
      const int64_t begin = part_first, images_now = part_count, of = network;
      if (part % parts.of_network() == 0) std::fill_n(sums, kPoints * pairs, 0.0f);
      const Runs runs{images_now, at_once};
      for_each_unit(op, runs.of_network(), workspace_bytes, [&](int64_t i, void* workspace) {
        const auto [_, first, count] = runs.at(i);
        run(of, begin + first, count, first * block.tiles(), workspace);
      });
      for_each_unit(op, kPoints, workspace_bytes, [&](int64_t point, void* workspace) {
        kernels.weight_gradient(block, all.inputs, all.outputs, point, images_now * block.tiles(),
                                sums + point * pairs, workspace);
      });
      if ((part + 1) % parts.of_network() == 0) {
        float* to = conv_weight_gradient.mutable_data_ptr<float>() + of * pairs * 9;
        for_each_unit(op, filters / kChannelStep, 0, [&](int64_t step, void*) {
          kernels.weight_gradient_out(block, sums, step * kChannelStep, (step + 1) * kChannelStep,
                                      to);
        });
      }
    }
  }

  if (all.weight_partials) {
    float* to = conv_weight_gradient.mutable_data_ptr<float>();
    sum_over_images(op, all.weight_partials, networks, arguments.images_of_network(), taps, filters,
                    [&](int64_t network, int64_t row, int64_t k, float sum) {
                      const int64_t tap = row / block.channels, c = row % block.channels;
                      to[((network * filters + k) * block.channels + c) * 9 + tap] = sum;
                    });
  }
  return {x_gradient, conv_weight_gradient};
}

// The gradients that are wanted of x, conv_weight, weight, bias; the others are empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> conv_norm_relu_pool_backward(
    const Tensor& gradient, const Tensor& x, const Tensor& conv_weight,
    std::optional<Tensor> weight, std::optional<Tensor> bias, const Tensor& z,
    const Tensor& statistics, int64_t padding, bool bfloat16, std::vector<bool> wanted) {
  const char* op = "conv_norm_relu_pool_backward";
  const Arguments arguments =
      checked_arguments(op, x, conv_weight, weight, bias, padding, bfloat16);
  const int64_t images = arguments.images, networks = arguments.networks;
  const int64_t filters = arguments.block.filters;
  check(wanted.size() == 4, op, ": wanted must have 4 elements, got ", wanted.size());
  const Upstream upstream(op, arguments, gradient, z);
  check(statistics.numel() == images * 2 * filters && statistics.is_contiguous(), op,
        ": statistics must be those of the forward");
  thread_local Kept kept_norm;
  BlockGradient all = upstream.of(arguments);
  all.statistics = statistics.const_data_ptr<float>();
  all.norm_gradients = kept_norm.floats(op, images * 2 * filters);
  auto [x_gradient, conv_weight_gradient] = gradients(op, arguments, all, wanted[0], wanted[1]);
  Tensor weight_gradient = weight ? zeros_like(op, wanted[2], *weight) : empty(x);
  Tensor bias_gradient = bias ? zeros_like(op, wanted[3], *bias) : empty(x);
  if (images == 0) return {x_gradient, conv_weight_gradient, weight_gradient, bias_gradient};
  if (weight_gradient.numel() > 0 || bias_gradient.numel() > 0) {
    float* to[2] = {
        weight_gradient.numel() > 0 ? weight_gradient.mutable_data_ptr<float>() : nullptr,
        bias_gradient.numel() > 0 ? bias_gradient.mutable_data_ptr<float>() : nullptr};
    // Networks that share one [K] sum over all images.
    for (int which = 0; which < 2; ++which) {
      if (!to[which]) continue;
      const bool shared = (which == 0 ? *weight : *bias).dim() == 1;
      sum_over_images(op, all.norm_gradients, shared ? 1 : networks,
                      shared ? images : arguments.images_of_network(), 2, filters,
                      [&](int64_t network, int64_t row, int64_t k, float sum) {
                        if (row == which) to[which][network * filters + k] = sum;
                      });
    }
  }
  return {x_gradient, conv_weight_gradient, weight_gradient, bias_gradient};
}

// ---- Batch norm --------------------------------------------------------------------------------

// Statistics of all images, [2, filters]: mean and variance, from those of each, [images, 2,
// filters].
void merge_statistics(const char* op, const Arguments& arguments, const float* of_each, float* to) {
  const int64_t images = arguments.images, filters = arguments.block.filters;
  const double share = images > 0 ? 1.0 / static_cast<double>(images) : 0.0;
  for_each_unit(op, filters / kChannelStep, 0, [&](int64_t step, void*) {
    for (int64_t k = step * kChannelStep; k < (step + 1) * kChannelStep; ++k) {
      double mean = 0, variance = 0;
      for (int64_t i = 0; i < images; ++i) mean += of_each[i * 2 * filters + k];
      mean *= share;
      for (int64_t i = 0; i < images; ++i) {
        const double deviation = of_each[(i * 2 + 1) * filters + k];
        const double away = of_each[i * 2 * filters + k] - mean;
        variance += 1 / (deviation * deviation) - kTinyEps + away * away;
      }
      variance *= share;
      to[k] = static_cast<float>(mean);
      to[filters + k] = static_cast<float>(variance < 0 ? 0 : variance);
    }
  });
}

// What Norm::given is of a mean and a variance.
void give(const float* statistics, int64_t filters, double eps, float* given) {
  for (int64_t k = 0; k < filters; ++k) {
    given[k] = statistics[k];
    given[filters + k] =
        static_cast<float>(1 / std::sqrt(static_cast<double>(statistics[filters + k]) + eps));
  }
}

const float* checked_statistics(const char* op, const Arguments& arguments,
                                const Tensor& statistics) {
  check_dtype(op, "statistics", statistics, ScalarType::Float);
  check(statistics.numel() == 2 * arguments.block.filters && statistics.is_contiguous(), op,
        ": statistics must have shape [2, ", arguments.block.filters, "], got ", shape(statistics));
  return statistics.const_data_ptr<float>();
}

Arguments checked_single(const char* op, const Tensor& x, const Tensor& conv_weight,
                         const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                         int64_t padding, bool bfloat16) {
  check_rank(op, "conv_weight", conv_weight, 4, "[filters, channels, 3, 3]");
  return checked_arguments(op, x, conv_weight, weight, bias, padding, bfloat16);
}

// As conv_norm_relu_pool, but by the statistics of all images, or by those that are given; these,
// [2, K], are the last result.
std::tuple<Tensor, Tensor, Tensor> conv_batch_norm_relu_pool(
    const Tensor& x, const Tensor& conv_weight, std::optional<Tensor> weight,
    std::optional<Tensor> bias, std::optional<Tensor> statistics, double eps, int64_t padding,
    bool bfloat16, bool keep) {
  const char* op = "conv_batch_norm_relu_pool";
  Arguments arguments = checked_single(op, x, conv_weight, weight, bias, padding, bfloat16);
  const ConvBlock& block = arguments.block;
  const int64_t images = arguments.images, filters = block.filters;
  // A thin block is convolved again rather than kept.
  const bool convolved = !block.thin() && (keep || !statistics);
  Tensor out = new_out(op, arguments), z = convolved ? new_z(op, arguments) : empty(x);
  Tensor found = new_tensor(op, x, {2, filters}, ScalarType::Float);
  float* found_data = found.mutable_data_ptr<float>();
  if (statistics) {
    std::copy_n(checked_statistics(op, arguments, *statistics), 2 * filters, found_data);
  } else {
    Tensor of_each = new_tensor(op, x, {images, 2, filters}, ScalarType::Float);
    if (images > 0) {
      forward(op, arguments, kTinyEps, nullptr, data_or_null(z), of_each.mutable_data_ptr<float>());
    }
    merge_statistics(op, arguments, of_each.const_data_ptr<float>(), found_data);
  }
  std::vector<float> given(2 * filters);
  give(found_data, filters, eps, given.data());
  arguments.given = given.data();
  if (images == 0) return {out, z, found};
  float* to = out.mutable_data_ptr<float>();
  if (statistics || block.thin()) {
    forward(op, arguments, eps, to, data_or_null(z), nullptr);
  } else {
    const float* from = z.const_data_ptr<float>();
    const ConvBlockKernels& kernels = conv_block_kernels();
    for_each_unit(op, images, 0, [&](int64_t image, void*) {
      kernels.pool(block, arguments.norm(0, eps), from + image * block.conv_size(), 1,
                   to + image * block.out_size());
    });
  }
  return {out, keep ? z : empty(x), found};
}

// The statistics of all images, [2, K], alone.
Tensor conv_batch_statistics(const Tensor& x, const Tensor& conv_weight, int64_t padding,
                             bool bfloat16) {
  const char* op = "conv_batch_statistics";
  const Arguments arguments =
      checked_single(op, x, conv_weight, std::nullopt, std::nullopt, padding, bfloat16);
  const int64_t filters = arguments.block.filters;
  Tensor found = new_tensor(op, x, {2, filters}, ScalarType::Float);
  Tensor of_each = new_tensor(op, x, {arguments.images, 2, filters}, ScalarType::Float);
  if (arguments.images > 0) {
    forward(op, arguments, kTinyEps, nullptr, nullptr, of_each.mutable_data_ptr<float>());
  }
  merge_statistics(op, arguments, of_each.const_data_ptr<float>(), found.mutable_data_ptr<float>());
  return found;
}

// The gradients that are wanted of x, conv_weight, weight, bias; the others are empty. Statistics
// that were given are constants.
std::tuple<Tensor, Tensor, Tensor, Tensor> conv_batch_norm_relu_pool_backward(
    const Tensor& gradient, const Tensor& x, const Tensor& conv_weight,
    std::optional<Tensor> weight, std::optional<Tensor> bias, const Tensor& z,
    const Tensor& statistics, bool is_given, double eps, int64_t padding, bool bfloat16,
    std::vector<bool> wanted) {
  const char* op = "conv_batch_norm_relu_pool_backward";
  Arguments arguments = checked_single(op, x, conv_weight, weight, bias, padding, bfloat16);
  const ConvBlock& block = arguments.block;
  const int64_t images = arguments.images, filters = block.filters;
  check(wanted.size() == 4, op, ": wanted must have 4 elements, got ", wanted.size());
  const Upstream upstream(op, arguments, gradient, z);
  std::vector<float> given(2 * filters), shares(2 * filters);
  give(checked_statistics(op, arguments, statistics), filters, eps, given.data());
  arguments.given = given.data();
  BlockGradient all = upstream.of(arguments);
  Tensor weight_gradient = weight ? zeros_like(op, wanted[2], *weight) : empty(x);
  Tensor bias_gradient = bias ? zeros_like(op, wanted[3], *bias) : empty(x);
  if (images > 0 && (!is_given || wanted[2] || wanted[3])) {
    const ConvBlockKernels& kernels = conv_block_kernels();
    thread_local Kept kept_weights, kept_norm;
    const char* packed =
        block.thin() ? packed_weights(op, arguments, kernels, false, kept_weights) : nullptr;
    all.norm_gradients = kept_norm.floats(op, images * 2 * filters);
    for_each_unit(op, images, kernels.workspace_bytes(block, true),
                  [&](int64_t image, void* workspace) {
                    kernels.norm_backward(block, packed, arguments.norm(0, eps),
                                          part_of(all, arguments, image), 1, workspace);
                  });
    float* to[2] = {data_or_null(weight_gradient), data_or_null(bias_gradient)};
    const float pixels = static_cast<float>(images * block.conv_height() * block.conv_width());
    sum_over_images(op, all.norm_gradients, 1, images, 2, filters,
                    [&](int64_t, int64_t row, int64_t k, float sum) {
                      if (to[row]) to[row][k] = sum;
                      if (!is_given) shares[row * filters + k] = sum / pixels;
                    });
    all.norm_gradients = nullptr;
  }
  all.shares = shares.data();
  auto [x_gradient, conv_weight_gradient] = gradients(op, arguments, all, wanted[0], wanted[1]);
  return {x_gradient, conv_weight_gradient, weight_gradient, bias_gradient};
}

}  // namespace
}  // namespace dmfast

STABLE_TORCH_LIBRARY_IMPL(dmfast, CPU, m) {
  m.impl("conv_norm_relu_pool", TORCH_BOX(&dmfast::conv_norm_relu_pool));
  m.impl("_conv_norm_relu_pool_backward", TORCH_BOX(&dmfast::conv_norm_relu_pool_backward));
  m.impl("conv_batch_norm_relu_pool", TORCH_BOX(&dmfast::conv_batch_norm_relu_pool));
  m.impl("_conv_batch_norm_relu_pool_backward",
         TORCH_BOX(&dmfast::conv_batch_norm_relu_pool_backward));
  m.impl("_conv_batch_statistics", TORCH_BOX(&dmfast::conv_batch_statistics));
}
