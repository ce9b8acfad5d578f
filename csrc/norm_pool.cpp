// SPDX-License-Identifier: MIT
// instance_norm_relu_pool: checks, allocation, dispatch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

#include "check.h"
#include "norm_pool_cpu.h"
#include "norm_pool_cuda.h"
#include "stable_compat.h"

namespace dmfast {
namespace {

using torch::headeronly::MemoryFormat;

// About 16,000 elements are worth waking a thread for.
int64_t grain(const NormPoolSize& size) { return 16384 / norm_pool_elements_of_a_task(size) + 1; }

ScalarType accumulation_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// How many networks the parameter has a row for.
int64_t checked_networks(const char* op, const char* argument, const Tensor& parameter,
                         const Tensor& x) {
  const int64_t channels = x.size(1);
  check((parameter.dim() == 1 || parameter.dim() == 2) &&
            parameter.size(parameter.dim() - 1) == channels,
        op, ": ", argument, " must have shape [", channels, "] or [networks, ", channels, "], got ",
        shape(parameter));
  check(
      parameter.scalar_type() == x.scalar_type() || parameter.scalar_type() == accumulation_type(x),
      op, ": ", argument, " must be ", name(x.scalar_type()),
      x.scalar_type() == accumulation_type(x) ? "" : " or float32", ", got ",
      name(parameter.scalar_type()));
  check_same_device(op, argument, parameter, "x", x);
  return parameter.dim() == 1 ? 1 : parameter.size(0);
}

// A call, and the tensors that it points into.
struct Call {
  Tensor x, weight, bias;  // weight and bias in the accumulation type
  NormPool loops;
};

Call checked_call(const char* op, const Tensor& x, const std::optional<Tensor>& weight,
                  const std::optional<Tensor>& bias) {
  check_rank(op, "x", x, 4, "[images, channels, height, width]");
  const DType dtype = floating_dtype(op, "x", x.scalar_type());
  check(x.size(1) > 0, op, ": x must have channels, got ", shape(x));
  check(x.size(2) >= 2 && x.size(3) >= 2, op, ": x must be at least 2 pixels high and wide, got ",
        shape(x));
  const bool channels_last = !x.is_contiguous() && is_channels_last(x);
  Call call{channels_last ? x : contiguous(op, x), {}, {}, {}};
  int64_t networks = 1;
  const auto parameter = [&](const char* argument, const std::optional<Tensor>& given,
                             Tensor& kept) -> const void* {
    if (!given) return nullptr;
    networks = checked_networks(op, argument, *given, x);
    kept = contiguous(op, allocated(op, sizes_of(*given), [&] {
                        return torch::stable::to(*given, accumulation_type(x));
                      }));
    return kept.const_data_ptr();
  };
  const void* weights = parameter("weight", weight, call.weight);
  const void* biases = parameter("bias", bias, call.bias);
  check(!weight || !bias || shape(*weight) == shape(*bias), op,
        ": weight and bias must have one shape, got ", weight ? shape(*weight) : "", " and ",
        bias ? shape(*bias) : "");
  check(networks > 0 && x.size(0) % networks == 0, op, ": the ", x.size(0),
        " images of x must divide evenly into the ", networks, " networks");
  check(x.is_cpu() || (x.size(1) < kNormPoolLargestSide && x.size(2) < kNormPoolLargestSide &&
                       x.size(3) < kNormPoolLargestSide),
        op, ": sides and channels of x must be below 2^30 on a GPU");
  const NormPoolSize size{x.size(0), x.size(1), x.size(2), x.size(3), networks, channels_last};
  call.loops = {size, dtype, weights, biases, nullptr};
  return call;
}

// x [N, C, H, W], weight and bias [C] or [R, C] -> out [N, C, H/2, W/2], statistics [N, 2, C]
std::tuple<Tensor, Tensor> instance_norm_relu_pool(const Tensor& x, std::optional<Tensor> weight,
                                                   std::optional<Tensor> bias, double eps) {
  const char* op = "instance_norm_relu_pool";
  check(eps >= 0, op, ": eps must be 0 or more, got ", eps);
  Call call = checked_call(op, x, weight, bias);
  const NormPoolSize& size = call.loops.size;
  Tensor out = new_images(op, x, {size.images, size.channels, size.height / 2, size.width / 2},
                          x.scalar_type(), size.channels_last);
  Tensor statistics = new_tensor(op, x, {size.images, 2, size.channels}, accumulation_type(x));
  if (x.numel() == 0) return {out, statistics};
  call.loops.statistics = statistics.mutable_data_ptr();
  const void* from = call.x.const_data_ptr();
  void* to = out.mutable_data_ptr();
#ifdef DMFAST_CUDA
  if (!x.is_cpu()) {
    launch_on(op, x,
              [&](void* stream) { return norm_pool_launch(call.loops, from, eps, to, stream); });
    return {out, statistics};
  }
#endif
  torch::stable::parallel_for(
      0, norm_pool_tasks(size), grain(size),
      [&](int64_t begin, int64_t end) { norm_pool_range(call.loops, from, eps, to, begin, end); });
  return {out, statistics};
}

// The pointers of a backward; null: not wanted, or without elements.
struct Backward {
  const NormPool& call;
  const void *of_out = nullptr, *x = nullptr;
  void *of_x = nullptr, *sums = nullptr, *of_weight = nullptr, *of_bias = nullptr;

  void run() const {
    const NormPoolSize& size = call.size;
    if (x) {
      torch::stable::parallel_for(
          0, norm_pool_tasks(size), grain(size), [&](int64_t begin, int64_t end) {
            norm_pool_backward_range(call, of_out, x, of_x, sums, begin, end);
          });
    }
    if (of_weight) norm_pool_parameter_gradient(call, sums, 0, of_weight);
    if (of_bias) norm_pool_parameter_gradient(call, sums, 1, of_bias);
  }
#ifdef DMFAST_CUDA
  int launch(void* stream) const {
    const int error = x ? norm_pool_backward_launch(call, of_out, x, of_x, sums, stream) : 0;
    if (error != 0 || !(of_weight || of_bias)) return error;
    return norm_pool_parameter_gradient_launch(call, sums, of_weight, of_bias, stream);
  }
#endif
};

// gradient [N, C, H/2, W/2] -> those of x, weight and bias; what is not wanted is empty
std::tuple<Tensor, Tensor, Tensor> instance_norm_relu_pool_backward(
    const Tensor& gradient, const Tensor& x, std::optional<Tensor> weight,
    std::optional<Tensor> bias, const Tensor& statistics, double, std::vector<bool> wanted) {
  const char* op = "instance_norm_relu_pool_backward";
  Call call = checked_call(op, x, weight, bias);
  const NormPoolSize& size = call.loops.size;
  check(wanted.size() == 3, op, ": wanted must have 3 elements, got ", wanted.size());
  check(gradient.dim() == 4 && gradient.size(0) == size.images &&
            gradient.size(1) == size.channels && gradient.size(2) == size.height / 2 &&
            gradient.size(3) == size.width / 2,
        op, ": gradient must have the shape of the output, got ", shape(gradient));
  check_dtype(op, "gradient", gradient, x.scalar_type());
  check_same_device(op, "gradient", gradient, "x", x);
  check(statistics.dim() == 3 && statistics.size(0) == size.images && statistics.size(1) == 2 &&
            statistics.size(2) == size.channels,
        op, ": statistics must have shape [images, 2, channels], got ", shape(statistics));
  check_dtype(op, "statistics", statistics, accumulation_type(x));
  check_same_device(op, "statistics", statistics, "x", x);

  Tensor x_gradient = wanted[0]
                          ? new_images(op, x, {size.images, size.channels, size.height, size.width},
                                       x.scalar_type(), size.channels_last)
                          : torch::stable::new_empty(x, {0});
  Tensor sums = new_tensor(op, x, {size.images, 2, size.channels}, accumulation_type(x));
  const auto new_gradient = [&](bool want, const std::optional<Tensor>& parameter) {
    return want && parameter ? new_tensor(op, sums, sizes_of(*parameter), sums.scalar_type())
                             : Tensor();
  };
  Tensor of_weight = new_gradient(wanted[1], weight), of_bias = new_gradient(wanted[2], bias);
  const Tensor kept = contiguous(op, statistics);
  call.loops.statistics = const_cast<void*>(kept.const_data_ptr());
  Backward backward{call.loops};
  const auto data = [](const Tensor& tensor) -> void* {
    return tensor.defined() && tensor.numel() > 0 ? tensor.mutable_data_ptr() : nullptr;
  };
  backward.sums = data(sums);
  backward.of_weight = data(of_weight);
  backward.of_bias = data(of_bias);
  Tensor dense;
  if (x.numel() > 0) {
    dense = allocated(op, sizes_of(gradient), [&] {
      return torch::stable::contiguous(
          gradient, size.channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
    });
    backward.of_out = dense.const_data_ptr();
    backward.x = call.x.const_data_ptr();
    backward.of_x = wanted[0] ? x_gradient.mutable_data_ptr() : nullptr;
  }
#ifdef DMFAST_CUDA
  if (!x.is_cpu()) {
    launch_on(op, x, [&](void* stream) { return backward.launch(stream); });
  }
#endif
  if (x.is_cpu()) backward.run();
  const auto in_its_type = [&](const Tensor& tensor, const std::optional<Tensor>& parameter) {
    return tensor.defined() ? torch::stable::to(tensor, parameter->scalar_type())
                            : torch::stable::new_empty(x, {0});
  };
  return {x_gradient, in_its_type(of_weight, weight), in_its_type(of_bias, bias)};
}

}  // namespace
}  // namespace dmfast

STABLE_TORCH_LIBRARY_IMPL(dmfast, CPU, m) {
  m.impl("instance_norm_relu_pool", TORCH_BOX(&dmfast::instance_norm_relu_pool));
  m.impl("_instance_norm_relu_pool_backward", TORCH_BOX(&dmfast::instance_norm_relu_pool_backward));
}

#ifdef DMFAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(dmfast, CUDA, m) {
  m.impl("instance_norm_relu_pool", TORCH_BOX(&dmfast::instance_norm_relu_pool));
  m.impl("_instance_norm_relu_pool_backward", TORCH_BOX(&dmfast::instance_norm_relu_pool_backward));
}
#endif
