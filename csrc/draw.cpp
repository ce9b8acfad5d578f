// SPDX-License-Identifier: MIT
// draw_augmentation_, draw_batch and draw_weights_: checks, allocation, loops on the CPU.
#include "draw.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "check.h"
#include "cpu_types.h"
#include "draw_cuda.h"
#include "stable_compat.h"

namespace dmfast {
namespace {

// Ranges of the parameters for images of height x width. `strength` holds, in this order,
// brightness, saturation, contrast, ratio_crop_pad, ratio_cutout, prob_flip, ratio_scale and
// ratio_rotate (degrees) of the published ParamDiffAug.
AugmentationRanges ranges(const char* op, const std::vector<double>& strength, int64_t height,
                          int64_t width) {
  check(strength.size() == 8, op, ": strength must have 8 elements, got ", strength.size());
  check(height >= 0 && width >= 0 && height <= 1 << 24 && width <= 1 << 24, op,
        ": size must be from 0 to 2^24 pixels, got ", height, " x ", width);
  for (const double value : strength) {
    check(value >= 0 && value <= 1e6, op, ": strength must be from 0 to 1e6, got ", value);
  }
  const double crop = strength[3], cutout = strength[4], scale = strength[6];
  check(crop <= 1 && cutout <= 1 && scale >= 1, op,
        ": strength must have crop and cutout of at most 1 and a scale of at least 1");
  const auto fraction = [](double ratio, int64_t size) {
    return static_cast<int>(static_cast<double>(size) * ratio + 0.5);
  };
  AugmentationRanges range;
  range.brightness = static_cast<float>(strength[0]);
  range.saturation = static_cast<float>(strength[1]);
  range.contrast = static_cast<float>(strength[2]);
  range.crop_y = fraction(crop, height);
  range.crop_x = fraction(crop, width);
  range.cut_height = fraction(cutout, height);
  range.cut_width = fraction(cutout, width);
  // Centres 0 .. size - 1 for an odd cutout, 0 .. size for an even one, as published.
  range.cut_y_count = static_cast<int>(height) + 1 - range.cut_height % 2;
  range.cut_x_count = static_cast<int>(width) + 1 - range.cut_width % 2;
  range.flip = static_cast<float>(strength[5]);
  range.scale_low = static_cast<float>(1 / scale);
  range.scale_span = static_cast<float>(scale - 1 / scale);
  range.angle = static_cast<float>(strength[7] / 180 * 3.14159265358979323846);
  return range;
}

#ifdef DMFAST_CUDA
DeviceDraw device_draw(const char* op, int64_t seed, int64_t step,
                       const std::optional<Tensor>& step_tensor, int64_t stream,
                       const Tensor& like) {
  if (!step_tensor) return {draw_key(op, seed, step, std::nullopt, stream), nullptr};
  check_dtype(op, "step", *step_tensor, ScalarType::Long);
  check(step_tensor->numel() == 1, op, ": step must have one element, got ", step_tensor->numel());
  check_same_device(op, "step", *step_tensor, "the other tensors", like);
  return {draw_key(op, seed, 0, std::nullopt, stream), step_tensor->const_data_ptr<int64_t>()};
}
#endif

// params [groups * rows, 13]
void draw_augmentation(const Tensor& params, std::vector<int64_t> words, bool all, int64_t groups,
                       int64_t rows, int64_t height, int64_t width, std::vector<double> strength,
                       int64_t seed, int64_t step, std::optional<Tensor> step_tensor,
                       int64_t first_group, int64_t stream) {
  const char* op = "draw_augmentation";
  check_rank(op, "params", params, 2, "[groups * rows, 13]");
  check_dtype(op, "params", params, ScalarType::Float);
  check(params.is_contiguous(), op, ": params must be contiguous");
  check(groups >= 0 && rows >= 0 && rows < (int64_t{1} << 32) / 3, op,
        ": groups and rows must be 0 or more (rows below 2^32 / 3), got ", groups, " and ", rows);
  check_numbers(op, "first_group", first_group, groups);
  check(params.size(0) == groups * rows && params.size(1) == kColumns, op,
        ": params must have shape [", groups * rows, ", ", static_cast<int>(kColumns), "], got ",
        shape(params));
  for (const int64_t word : words) {
    check(word >= 0 && word < kWords, op, ": words must be from 0 to ", kWords - 1, ", got ", word);
  }
  const AugmentationRanges range = ranges(op, strength, height, width);
#ifdef DMFAST_CUDA
  if (!params.is_cpu()) {
    check(words.size() <= kMostWords, op, ": words must have at most ", kMostWords,
          " elements on a GPU, got ", words.size());
    const DeviceDraw device = device_draw(op, seed, step, step_tensor, stream, params);
    Strategy strategy{{}, static_cast<int>(words.size()), all};
    std::copy(words.begin(), words.end(), strategy.word);
    launch_on(op, params, [&](void* cuda_stream) {
      return draw_augmentation_launch(device, strategy, range, groups, rows,
                                      static_cast<uint32_t>(first_group),
                                      static_cast<float*>(params.mutable_data_ptr()), cuda_stream);
    });
    return;
  }
#endif
  const Draw draw = draw_key(op, seed, step, step_tensor, stream);
  unsigned every_word = 0;
  for (const int64_t word : words) every_word |= 1u << word;
  if (params.numel() == 0) return;
  float* table = static_cast<float*>(params.mutable_data_ptr());
  const int count = static_cast<int>(words.size());
  for (int64_t g = 0; g < groups; ++g) {
    const uint32_t group = static_cast<uint32_t>(first_group + g);
    const unsigned selected =
        all || count == 0 ? every_word : 1u << words[draw_choice(draw, group, count)];
    for (int64_t r = 0; r < rows; ++r) {
      draw_row(draw, group, static_cast<uint32_t>(r), selected, range,
               table + (g * rows + r) * kColumns);
    }
  }
}

// order [M], class_offsets [K + 1] into it, offsets [K + 1] -> [rows]
Tensor draw_batch(const Tensor& order, const Tensor& class_offsets, const Tensor& offsets,
                  int64_t rows, int64_t seed, int64_t step, std::optional<Tensor> step_tensor,
                  int64_t first_class, int64_t stream) {
  const char* op = "draw_batch";
  check_rank(op, "order", order, 1, "[images]");
  check_rank(op, "class_offsets", class_offsets, 1, "[classes + 1]");
  for (const auto& [argument, tensor] :
       {std::pair{"order", &order}, std::pair{"class_offsets", &class_offsets}}) {
    check_dtype(op, argument, *tensor, ScalarType::Long);
    check_same_device(op, argument, *tensor, "order", order);
    check(tensor->is_contiguous(), op, ": ", argument, " must be contiguous");
  }
  const int64_t classes = class_offsets.size(0) - 1;
  check(classes >= 0, op, ": class_offsets must have at least one element");
  const Groups batch = checked_groups(op, "offsets", offsets, classes, rows, order);
  check_numbers(op, "first_class", first_class, classes);
#ifdef DMFAST_CUDA
  if (!order.is_cpu()) {
    check(rows >= 0, op, ": rows must be 0 or more, got ", rows);
    const DeviceDraw device = device_draw(op, seed, step, step_tensor, stream, order);
    const ClampedGroups images{class_offsets.const_data_ptr<int64_t>(), classes, order.size(0)};
    Tensor index = new_tensor(op, order, {rows}, ScalarType::Long);
    launch_on(op, order, [&](void* cuda_stream) {
      return draw_batch_launch(device, order.const_data_ptr<int64_t>(), images,
                               {batch.offsets, batch.groups, batch.rows},
                               static_cast<uint32_t>(first_class),
                               static_cast<int64_t*>(index.mutable_data_ptr()), cuda_stream);
    });
    return index;
  }
#endif
  const Draw draw = draw_key(op, seed, step, step_tensor, stream);
  const int64_t* starts = class_offsets.const_data_ptr<int64_t>();
  for (int64_t k = 0; k < classes; ++k) {
    check(0 <= starts[k] && starts[k] <= starts[k + 1] && starts[k + 1] <= order.size(0), op,
          ": class_offsets must ascend from 0 at least to ", order.size(0), " at most, got ",
          starts[k], " before ", starts[k + 1], " at position ", k);
    const int64_t size = starts[k + 1] - starts[k], count = batch.first(k + 1) - batch.first(k);
    check(count <= size, op, ": class ", k, " has ", size, " images, fewer than the ", count,
          " to draw");
    check(size <= UINT32_MAX, op, ": a class must have fewer than 2^32 images, got ", size);
  }
  Tensor index = new_tensor(op, order, {rows}, ScalarType::Long);
  if (rows == 0) return index;
  const int64_t* images = order.const_data_ptr<int64_t>();
  int64_t* picks = static_cast<int64_t*>(index.mutable_data_ptr());
  torch::stable::parallel_for(0, classes, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const Permutation permutation(draw, static_cast<uint32_t>(first_class + k),
                                    static_cast<uint32_t>(starts[k + 1] - starts[k]));
      for (int64_t i = batch.first(k); i < batch.first(k + 1); ++i) {
        picks[i] = images[starts[k] + permutation(static_cast<uint32_t>(i - batch.first(k)))];
      }
    }
  });
  return index;
}

template <typename T>
void draw_tensor(const Draw& draw, uint32_t network, uint32_t first_block, float bound, T* to,
                 int64_t count) {
  const int64_t blocks = (count + 3) / 4;
  torch::stable::parallel_for(0, blocks, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const Words words = draw_words(draw, network, first_block + static_cast<uint32_t>(block));
      const int lanes = static_cast<int>(std::min<int64_t>(4, count - 4 * block));
      for (int lane = 0; lane < lanes; ++lane) {
        to[4 * block + lane] = static_cast<T>(draw_weight(words, lane, bound));
      }
    }
  });
}

// tensors: each [...] or, with networks, [networks, ...]
void draw_weights(std::vector<Tensor> tensors, std::vector<double> bounds, int64_t seed,
                  int64_t step, std::optional<Tensor> step_tensor, std::optional<int64_t> networks,
                  int64_t first_network, int64_t stream) {
  const char* op = "draw_weights_";
  check(tensors.size() == bounds.size(), op, ": bounds must have one element a tensor (",
        tensors.size(), "), got ", bounds.size());
  const int64_t count = networks.value_or(1);
  check(count >= 0, op, ": networks must be 0 or more, got ", count);
  check_numbers(op, "first_network", first_network, count);
  const bool on_cpu = tensors.empty() || tensors[0].is_cpu();
#ifdef DMFAST_CUDA
  const DeviceDraw device =
      on_cpu ? DeviceDraw{} : device_draw(op, seed, step, step_tensor, stream, tensors[0]);
  std::vector<Weights> weights;
#endif
  const Draw draw = on_cpu ? draw_key(op, seed, step, step_tensor, stream) : Draw{};
  std::vector<std::pair<Tensor, Tensor>> copies;  // of tensors that are not contiguous
  int64_t first_block = 0;
  for (size_t t = 0; t < tensors.size(); ++t) {
    const Tensor& tensor = tensors[t];
    check(bounds[t] >= 0 && std::isfinite(static_cast<float>(bounds[t])), op,
          ": bounds must be finite in float32 and 0 or more, got ", bounds[t], " at position ", t);
    check(!networks || (tensor.dim() >= 1 && tensor.size(0) == count), op, ": tensor ", t,
          " must have ", count, " networks on its leading axis, got shape ", shape(tensor));
    check_same_device(op, "tensors", tensor, "one another", tensors[0]);
    const DType dtype = floating_dtype(op, "tensors", tensor.scalar_type());
    check_no_overlap(op, "tensor", static_cast<int64_t>(t), tensor);
    const int64_t elements = count > 0 ? tensor.numel() / count : 0;
    const int64_t blocks = (elements + 3) / 4;
    check(first_block + blocks <= UINT32_MAX, op, ": a network must have fewer than 2^34 weights");
    if (tensor.numel() == 0) continue;
    // Elements are numbered in logical order, whatever the strides.
    Tensor dense =
        tensor.is_contiguous() ? tensor : torch::stable::new_empty(tensor, tensor.sizes());
    if (!tensor.is_contiguous()) copies.emplace_back(tensor, dense);
    const float bound = static_cast<float>(bounds[t]);
    if (on_cpu) {
      with_dtype(dtype, [&](auto element) {
        using T = decltype(element);
        T* to = static_cast<T*>(dense.mutable_data_ptr());
        for (int64_t r = 0; r < count; ++r) {
          draw_tensor(draw, static_cast<uint32_t>(first_network + r),
                      static_cast<uint32_t>(first_block), bound, to + r * elements, elements);
        }
      });
    }
#ifdef DMFAST_CUDA
    if (!on_cpu) {
      weights.push_back(
          {dense.mutable_data_ptr(), dtype, bound, elements, static_cast<uint32_t>(first_block)});
    }
#endif
    first_block += blocks;
  }
#ifdef DMFAST_CUDA
  if (!weights.empty()) {
    launch_on(op, tensors[0], [&](void* cuda_stream) {
      return draw_weights_launch(device, weights.data(), static_cast<int>(weights.size()), count,
                                 static_cast<uint32_t>(first_network), cuda_stream);
    });
  }
#endif
  for (auto& [tensor, dense] : copies) torch::stable::copy_(tensor, dense);
}

}  // namespace
}  // namespace dmfast

STABLE_TORCH_LIBRARY_IMPL(dmfast, CPU, m) {
  m.impl("draw_augmentation_", TORCH_BOX(&dmfast::draw_augmentation));
  m.impl("draw_batch", TORCH_BOX(&dmfast::draw_batch));
  m.impl("draw_weights_", TORCH_BOX(&dmfast::draw_weights));
}

#ifdef DMFAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(dmfast, CUDA, m) {
  m.impl("draw_augmentation_", TORCH_BOX(&dmfast::draw_augmentation));
  m.impl("draw_batch", TORCH_BOX(&dmfast::draw_batch));
  m.impl("draw_weights_", TORCH_BOX(&dmfast::draw_weights));
}
#endif
