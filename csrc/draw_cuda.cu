// SPDX-License-Identifier: MIT
// What is drawn, on a GPU: a thread for each row of parameters, each row of a batch, each block of
// four weights. Compiled without contraction, so that the numbers are the CPU's.
#include "cuda_host.h"
#include "cuda_types.h"
#include "draw_cuda.h"

namespace dmfast {
namespace {

constexpr int kThreads = 128;

unsigned grid(int64_t items) {
  const int64_t blocks = (items + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < INT32_MAX ? blocks : INT32_MAX);
}

__device__ int64_t first_item() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ int64_t all_threads() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

__global__ void __launch_bounds__(kThreads, 1)
    augmentation_kernel(const DeviceDraw device_draw, const Strategy strategy,
                        const AugmentationRanges range, const int64_t groups, const int64_t rows,
                        const uint32_t first_group, float* const params) {
  const Draw draw = device_draw.read();
  unsigned every_word = 0;
  for (int i = 0; i < strategy.count; ++i) every_word |= 1u << strategy.word[i];
  for (int64_t item = first_item(); item < groups * rows; item += all_threads()) {
    const uint32_t group = first_group + static_cast<uint32_t>(item / rows);
    unsigned selected = every_word;
    if (!strategy.all && strategy.count > 0) {
      selected = 1u << strategy.word[draw_choice(draw, group, strategy.count)];
    }
    draw_row(draw, group, static_cast<uint32_t>(item % rows), selected, range,
             params + item * kColumns);
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    batch_kernel(const DeviceDraw device_draw, const int64_t* const order,
                 const ClampedGroups images, const ClampedGroups batch, const uint32_t first_class,
                 int64_t* const index) {
  const Draw draw = device_draw.read();
  for (int64_t row = first_item(); row < batch.rows; row += all_threads()) {
    const int64_t k = batch.of(row);
    int64_t size = k < 0 ? 0 : images.count(k);
    if (size > UINT32_MAX) size = UINT32_MAX;
    if (size == 0) {
      index[row] = 0;
      continue;
    }
    const Permutation permutation(draw, first_class + static_cast<uint32_t>(k),
                                  static_cast<uint32_t>(size));
    const uint32_t i = static_cast<uint32_t>((row - batch.first(k)) % size);
    index[row] = order[images.first(k) + permutation(i)];
  }
}

struct Batch {
  Weights tensor[kMostTensors];
  int64_t first_item[kMostTensors + 1];  // the number of its first block, networks counted in
  int count;
};

template <typename T>
__device__ void store(const Weights& tensor, const Words& words, int64_t network, int64_t block) {
  T* const to = static_cast<T*>(tensor.data) + network * tensor.elements;
  for (int lane = 0; lane < 4; ++lane) {
    const int64_t element = 4 * block + lane;
    if (element >= tensor.elements) break;
    to[element] = static_cast<T>(draw_weight(words, lane, tensor.bound));
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    weights_kernel(const DeviceDraw device_draw, const Batch batch, const uint32_t first_network) {
  const Draw draw = device_draw.read();
  for (int64_t item = first_item(); item < batch.first_item[batch.count]; item += all_threads()) {
    int t = 0;
    while (item >= batch.first_item[t + 1]) ++t;
    const Weights& tensor = batch.tensor[t];
    const int64_t blocks = (tensor.elements + 3) / 4, within = item - batch.first_item[t];
    const int64_t network = within / blocks, block = within % blocks;
    const Words words = draw_words(draw, first_network + static_cast<uint32_t>(network),
                                   tensor.first_block + static_cast<uint32_t>(block));
    switch (tensor.dtype) {
      case DType::kFloat64: store<double>(tensor, words, network, block); break;
      case DType::kFloat32: store<float>(tensor, words, network, block); break;
      case DType::kFloat16: store<Half>(tensor, words, network, block); break;
      default: store<BFloat16>(tensor, words, network, block); break;
    }
  }
}

}  // namespace

int draw_augmentation_launch(const DeviceDraw& draw, const Strategy& strategy,
                             const AugmentationRanges& range, int64_t groups, int64_t rows,
                             uint32_t first_group, float* params, void* stream) {
  if (groups * rows == 0) return 0;
  return DMFAST_LAUNCH(augmentation_kernel, grid(groups * rows), kThreads, stream, draw, strategy,
                       range, groups, rows, first_group, params);
}

int draw_batch_launch(const DeviceDraw& draw, const int64_t* order, const ClampedGroups& images,
                      const ClampedGroups& batch, uint32_t first_class, int64_t* index,
                      void* stream) {
  if (batch.rows == 0) return 0;
  return DMFAST_LAUNCH(batch_kernel, grid(batch.rows), kThreads, stream, draw, order, images, batch,
                       first_class, index);
}

int draw_weights_launch(const DeviceDraw& draw, const Weights* tensors, int count, int64_t networks,
                        uint32_t first_network, void* stream) {
  for (int first = 0; first < count; first += kMostTensors) {
    Batch batch = {};
    while (batch.count < kMostTensors && first + batch.count < count) {
      const Weights& tensor = tensors[first + batch.count];
      batch.tensor[batch.count] = tensor;
      batch.first_item[batch.count + 1] =
          batch.first_item[batch.count] + networks * ((tensor.elements + 3) / 4);
      ++batch.count;
    }
    const int64_t items = batch.first_item[batch.count];
    if (items == 0) continue;
    const int error =
        DMFAST_LAUNCH(weights_kernel, grid(items), kThreads, stream, draw, batch, first_network);
    if (error != 0) return error;
  }
  return 0;
}

}  // namespace dmfast
