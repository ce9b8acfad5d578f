// SPDX-License-Identifier: MIT
// convnet_class_mean on the CPU: the whole pass of the real images, of which nothing is kept but
// the mean embedding of each group. A few images go through all blocks while they are in the cache.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "augment_cpu.h"
#include "check.h"
#include "conv_block_checks.h"
#include "cpu_kernels.h"
#include "gather_checks.h"

namespace dmfast {
namespace {

// Embeddings are summed over so many images of a group, then over these sums: in this order on any
// number of threads.
constexpr int64_t kImagesOfSum = 16;

constexpr const char* kOp = "convnet_class_mean";

class ConvNet {
 public:
  ConvNet(const Gathering& gathering, const std::vector<Tensor>& weights, int64_t padding,
          double eps, bool bfloat16)
      : gathering_(gathering), kernels_(conv_block_kernels()) {
    check(!weights.empty() && weights.size() % 3 == 0, kOp,
          ": weights must be a convolution's weight, a norm's weight and its bias for each block, "
          "got ",
          weights.size(), " tensors");
    int64_t channels = gathering.size.channels;
    int64_t height = gathering.size.height, width = gathering.size.width;
    for (size_t i = 0; i < weights.size(); i += 3) {
      check_rank(kOp, "a convolution's weight", weights[i], 4, "[filters, channels, 3, 3]");
      const ConvBlock shape = checked_block(kOp, "a convolution's weight", weights[i], channels,
                                            height, width, i == 0 ? padding : 1, bfloat16);
      for (const size_t j : {i + 1, i + 2}) {
        const char* argument = j == i + 1 ? "a norm's weight" : "a norm's bias";
        check_dtype(kOp, argument, weights[j], ScalarType::Float);
        check(weights[j].dim() == 1 && weights[j].size(0) == shape.filters, kOp, ": ", argument,
              " must have shape [", shape.filters, "], got ", dmfast::shape(weights[j]));
      }
      for (size_t j = i; j < i + 3; ++j) dense_.push_back(contiguous(kOp, weights[j]));
      blocks_.push_back({shape,
                         {dense_[i + 1].const_data_ptr<float>(),
                          dense_[i + 2].const_data_ptr<float>(), static_cast<float>(eps), nullptr},
                         kernels_.images_at_once(shape)});
      channels = shape.filters;
      height = shape.out_height();
      width = shape.out_width();
    }
    pack();
  }

  const ConvBlock& last() const { return blocks_.back().shape; }

  // Of a thread: the inputs of every block, and what its kernels need.
  int64_t workspace_bytes() const {
    int64_t inputs = 0, scratch = 0;
    for (const Block& block : blocks_) {
      inputs += block.input_floats();
      scratch = std::max(scratch, kernels_.workspace_bytes(block.shape, false));
    }
    return inputs * 4 + scratch;
  }

  // The embeddings of images first to first + count - 1 of the index, in channels_last.
  void run(int64_t first, int64_t count, float* out, void* workspace) const {
    std::vector<float*> inputs;
    float* rest = static_cast<float*>(workspace);
    for (const Block& block : blocks_) {
      inputs.push_back(rest);
      rest += block.input_floats();
    }
    run(blocks_.size() - 1, inputs, rest, first, count, out);
  }

 private:
  struct Block {
    ConvBlock shape;
    Norm norm;
    int64_t images_at_once;
    const void* packed = nullptr;

    int64_t input_floats() const { return (images_at_once * shape.input_size() + 15) / 16 * 16; }
  };

  void pack() {
    thread_local Kept kept;
    int64_t bytes = 0;
    for (const Block& block : blocks_) bytes += kernels_.packed_bytes(block.shape);
    char* memory = static_cast<char*>(kept.bytes(kOp, bytes));
    for (Block& block : blocks_) {
      block.packed = memory;
      memory += kernels_.packed_bytes(block.shape);
    }
    for_each_unit(kOp, static_cast<int64_t>(blocks_.size()), 0, [&](int64_t i, void*) {
      kernels_.pack(blocks_[i].shape, dense_[3 * i].const_data_ptr<float>(), false,
                    const_cast<void*>(blocks_[i].packed));
    });
  }

  // Through the blocks up to and with block b; each takes as many images at once as suit it.
  void run(size_t b, const std::vector<float*>& inputs, void* scratch, int64_t first, int64_t count,
           float* out) const {
    const Block& block = blocks_[b];
    const ConvBlock& shape = block.shape;
    for (int64_t done = 0; done < count; done += block.images_at_once) {
      const int64_t now = std::min(block.images_at_once, count - done);
      if (b == 0) {
        gather(first + done, now, inputs[0]);
      } else {
        run(b - 1, inputs, scratch, first + done, now, inputs[b]);
      }
      const BlockInput x{inputs[b], shape.input_size(), 1, shape.width * shape.channels,
                         shape.channels};
      kernels_.forward(shape, block.packed, block.norm, x, now, out + done * shape.out_size(),
                       nullptr, nullptr, scratch);
    }
  }

  void gather(int64_t first, int64_t count, float* to) const {
    const ImageSize size = gathering_.size;
    const int64_t image = size.channels * size.height * size.width;
    const Images there{to - first * image,         DType::kFloat32, image, 1,
                       size.width * size.channels, size.channels};
    gather_augment_range(gathering_.images, gathering_.index, gathering_.normalisation(), there,
                         size, gathering_.rows, first, first + count);
  }

  const Gathering& gathering_;
  const ConvBlockKernels& kernels_;
  std::vector<Tensor> dense_;  // the weights
  std::vector<Block> blocks_;
};

// Consecutive images of one group, whose embeddings are summed first.
struct Run {
  int64_t group, first, count;
};

Tensor convnet_class_mean(const Tensor& images, const Tensor& index, const Tensor& offsets,
                          const Tensor& params, const Tensor& mean, const Tensor& std,
                          std::vector<Tensor> weights, int64_t padding, double eps, bool bfloat16) {
  const Gathering gathering = checked_gathering(kOp, images, index, params, mean, std, offsets);
  const ConvNet network(gathering, weights, padding, eps, bfloat16);
  const int64_t filters = network.last().filters, size = network.last().out_size();
  const int64_t pixels = size / filters;
  const int64_t groups = gathering.rows.groups;
  const int64_t* starts = offsets.const_data_ptr<int64_t>();
  std::vector<Run> runs;
  std::vector<size_t> first_run;
  for (int64_t g = 0; g < groups; ++g) {
    first_run.push_back(runs.size());
    for (int64_t first = starts[g]; first < starts[g + 1]; first += kImagesOfSum) {
      runs.push_back({g, first, std::min(kImagesOfSum, starts[g + 1] - first)});
    }
  }
  first_run.push_back(runs.size());
  Tensor result = new_tensor(kOp, mean, {groups, size}, ScalarType::Float);
  thread_local Kept kept_sums;
  float* sums = kept_sums.floats(kOp, static_cast<int64_t>(runs.size()) * size);
  const int64_t embeddings = (kImagesOfSum * size + 15) / 16 * 16;
  for_each_unit(kOp, static_cast<int64_t>(runs.size()), embeddings * 4 + network.workspace_bytes(),
                [&](int64_t i, void* workspace) {
                  float* embedded = static_cast<float*>(workspace);
                  network.run(runs[i].first, runs[i].count, embedded, embedded + embeddings);
                  float* sum = std::copy_n(embedded, size, sums + i * size) - size;
                  for (int64_t image = 1; image < runs[i].count; ++image) {
                    for (int64_t d = 0; d < size; ++d) sum[d] += embedded[image * size + d];
                  }
                });
  float* to = result.mutable_data_ptr<float>();
  for_each_unit(kOp, groups, 0, [&](int64_t g, void*) {
    std::vector<float> sum(size);
    for (size_t run = first_run[g]; run < first_run[g + 1]; ++run) {
      for (int64_t d = 0; d < size; ++d) sum[d] += sums[run * size + d];
    }
    const float count = static_cast<float>(std::max<int64_t>(starts[g + 1] - starts[g], 1));
    // From channels_last to the order of an embedding.
    for (int64_t k = 0; k < filters; ++k) {
      for (int64_t p = 0; p < pixels; ++p) {
        to[g * size + k * pixels + p] = sum[p * filters + k] / count;
      }
    }
  });
  return result;
}

}  // namespace
}  // namespace dmfast

STABLE_TORCH_LIBRARY_IMPL(dmfast, CPU, m) {
  m.impl("convnet_class_mean", TORCH_BOX(&dmfast::convnet_class_mean));
}
