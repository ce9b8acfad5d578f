// SPDX-License-Identifier: MIT
// Plays a tape of calls to the kernels, which are compiled with it for the CPU, and writes what
// they made. A tape is a text of one command a line; values of tensors stand in a file beside it:
//
//   buffer NAME BYTES OFFSET   a heap block of its own size, so that one byte beyond it is seen;
//                              filled from the file, or with 0xFF where OFFSET is -1
//   order N                    of threads: 0 forward, 1 reverse, above that the seed of a shuffle
//   OPERATOR ARGUMENTS...      a launch; a pointer is NAME:BYTES into it, or 0
//   save NAME                  appends the block to the output
//   clear                      frees all blocks
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "augment_cuda.h"
#include "class_mean_cuda.h"
#include "conv_block_cuda.h"
#include "cuda_host.h"
#include "cuda_launch.h"
#include "draw_cuda.h"
#include "matrix_product.h"
#include "norm_pool_cuda.h"

namespace {

using namespace dmfast;

[[noreturn]] void stop(const std::string& what) {
  std::cerr << "tape: " << what << '\n';
  std::exit(2);
}

struct Free {
  void operator()(char* data) const { std::free(data); }
};

struct Buffer {
  std::unique_ptr<char, Free> data;
  size_t bytes = 0;
};

std::map<std::string, Buffer> buffers;

// The words of one command, read in turn.
class Command {
 public:
  explicit Command(const std::string& line) : in_(line) {}

  std::string word() {
    std::string word;
    if (!(in_ >> word)) stop("a command is too short");
    return word;
  }
  int64_t integer() { return std::stoll(word()); }
  double real() { return std::stod(word()); }

  template <typename T = void>
  T* pointer() {
    const std::string all = word();
    if (all == "0") return nullptr;
    const size_t colon = all.find(':');
    const auto found = buffers.find(all.substr(0, colon));
    if (found == buffers.end()) stop("no buffer " + all);
    return reinterpret_cast<T*>(found->second.data.get() + std::stoll(all.substr(colon + 1)));
  }

  Images images() {
    Images images{};
    images.data = pointer();
    images.dtype = static_cast<DType>(integer());
    for (int64_t* stride : {&images.sn, &images.sc, &images.sy, &images.sx}) *stride = integer();
    return images;
  }
  ImageSize size() {
    ImageSize size{};
    for (int64_t* side : {&size.channels, &size.height, &size.width}) *side = integer();
    return size;
  }
  Rows rows() {
    Rows rows{};
    rows.params = pointer<float>();
    rows.offsets = pointer<int64_t>();
    rows.groups = integer();
    rows.images = integer();
    return rows;
  }
  ClampedGroups groups() {
    ClampedGroups groups{};
    groups.offsets = pointer<int64_t>();
    groups.groups = integer();
    groups.rows = integer();
    return groups;
  }
  Embeddings embeddings() {
    Embeddings rows{};
    rows.data = pointer();
    rows.dtype = static_cast<DType>(integer());
    rows.stride = integer();
    rows.groups = groups();
    return rows;
  }
  NormPool norm_pool() {
    NormPool call{};
    call.dtype = static_cast<DType>(integer());
    NormPoolSize& size = call.size;
    for (int64_t* axis :
         {&size.images, &size.channels, &size.height, &size.width, &size.networks}) {
      *axis = integer();
    }
    size.channels_last = integer() != 0;
    call.weight = pointer();
    call.bias = pointer();
    call.statistics = pointer();
    return call;
  }
  DeviceDraw draw() {
    DeviceDraw draw{};
    draw.draw.seed = static_cast<uint64_t>(integer());
    draw.draw.step = static_cast<uint32_t>(integer());
    draw.draw.stream = static_cast<uint32_t>(integer());
    draw.step = pointer<int64_t>();
    return draw;
  }

 private:
  std::istringstream in_;
};

// The workspace that the operators of images take, on the heap as torch's is.
std::unique_ptr<double[]> workspace(ImageSize size, const Rows& rows) {
  const int64_t count = rows.images * augment_workspace(size);
  return std::unique_ptr<double[]>(count > 0 ? new double[count] : nullptr);
}

// On the heap, of their own size.
std::unique_ptr<char[]> pack_weights(const FusedBlock& block, const float* weights, bool turned) {
  std::unique_ptr<char[]> packed(new char[conv_block_packed_bytes(block, turned)]);
  if (conv_block_pack_launch(block, weights, turned, packed.get(), nullptr)) stop("packing failed");
  return packed;
}

int call(const std::string& op, Command& words) {
  if (op == "siamese_augment" || op == "siamese_augment_backward") {
    const Images from = words.images(), to = words.images();
    const ImageSize size = words.size();
    const Rows rows = words.rows();
    const auto launch =
        op == "siamese_augment" ? siamese_augment_launch : siamese_augment_backward_launch;
    return launch(from, to, size, rows, workspace(size, rows).get(), nullptr);
  }
  if (op == "gather_augment") {
    const Images from = words.images();
    const int64_t count = words.integer();
    const int64_t* index = words.pointer<int64_t>();
    const float* mean = words.pointer<float>();
    const float* std = words.pointer<float>();
    const Images to = words.images();
    const ImageSize size = words.size();
    const Rows rows = words.rows();
    return gather_augment_launch(from, count, index, {nullptr, mean, std}, to, size, rows,
                                 workspace(size, rows).get(), nullptr);
  }
  if (op == "fused_block" || op == "fused_block_backward") {
    const bool backward = op == "fused_block_backward";
    emulation::multiprocessor_shared = static_cast<int>(words.integer());
    FusedBlock block{};
    for (int64_t* value : {&block.images, &block.networks, &block.channels, &block.filters,
                           &block.height, &block.width, &block.padding}) {
      *value = words.integer();
    }
    block.eps = static_cast<float>(words.real());
    const void* const x = words.pointer();
    const float* const weights = words.pointer<float>();
    FusedNorm norm{};
    norm.weight = words.pointer<float>();
    norm.weight_stride = words.integer();
    norm.bias = words.pointer<float>();
    norm.bias_stride = words.integer();
    if (!conv_block_fused(block, backward)) stop("the fused kernels do not take the block");
    const auto packed = pack_weights(block, weights, false);
    if (!backward) {
      void* const out = words.pointer();
      float* const statistics = words.pointer<float>();
      const bool wgmma = words.integer() != 0;
      return conv_block_forward_launch(block, x, packed.get(), norm, out, statistics, wgmma,
                                       nullptr);
    }
    const auto turned = pack_weights(block, weights, true);
    FusedGradients gradients{};
    gradients.out_gradient = words.pointer();
    gradients.statistics = words.pointer<float>();
    gradients.x_gradient = words.pointer();
    gradients.conv_gradient = words.pointer();
    gradients.norm_gradients = words.pointer<float>();
    return conv_block_backward_launch(block, x, packed.get(), turned.get(), norm, gradients,
                                      nullptr);
  }
  if (op == "matrix_product") {
    const void* const a = words.pointer();
    const void* const b = words.pointer();
    const int depth = static_cast<int>(words.integer());
    return matrix_product_launch(a, b, depth, words.pointer<float>());
  }
  if (op == "class_mean") {
    const Embeddings rows = words.embeddings();
    const int64_t width = words.integer();
    const bool doubles = words.integer() != 0;
    return class_mean_launch(rows, width, doubles, words.pointer(), nullptr);
  }
  if (op == "class_mean_discrepancy") {
    const ClampedGroups real = words.groups();
    const Embeddings syn = words.embeddings();
    const int64_t width = words.integer();
    const bool doubles = words.integer() != 0;
    void* difference = words.pointer();
    void* loss = words.pointer();
    const int64_t bytes = class_mean_workspace(syn.groups.groups, width) * (doubles ? 8 : 4);
    const std::unique_ptr<char[]> sums(new char[bytes]);
    return class_mean_discrepancy_launch(real, syn, width, doubles, difference, loss, sums.get(),
                                         nullptr);
  }
  if (op == "class_mean_backward") {
    const void* gradient = words.pointer();
    const DType dtype = static_cast<DType>(words.integer());
    const ClampedGroups groups = words.groups();
    const int64_t width = words.integer();
    return class_mean_backward_launch(gradient, dtype, groups, width, words.pointer(), nullptr);
  }
  if (op == "instance_norm_relu_pool") {
    const NormPool norm = words.norm_pool();
    const void* x = words.pointer();
    const double eps = words.real();
    return norm_pool_launch(norm, x, eps, words.pointer(), nullptr);
  }
  if (op == "instance_norm_relu_pool_backward") {
    const NormPool norm = words.norm_pool();
    const void *gradient = words.pointer(), *x = words.pointer();
    void *x_gradient = words.pointer(), *of_weight = words.pointer(), *of_bias = words.pointer();
    const int64_t bytes =
        norm.size.images * 2 * norm.size.channels * (norm.dtype == DType::kFloat64 ? 8 : 4);
    const std::unique_ptr<char[]> sums(new char[bytes]);
    const int error = norm_pool_backward_launch(norm, gradient, x, x_gradient, sums.get(), nullptr);
    if (error != 0) return error;
    return norm_pool_parameter_gradient_launch(norm, sums.get(), of_weight, of_bias, nullptr);
  }
  if (op == "draw_augmentation") {
    const DeviceDraw draw = words.draw();
    Strategy strategy{};
    strategy.all = words.integer() != 0;
    strategy.count = static_cast<int>(words.integer());
    for (int i = 0; i < strategy.count; ++i) {
      strategy.word[i] = static_cast<unsigned char>(words.integer());
    }
    AugmentationRanges range{};
    for (float* value : {&range.brightness, &range.saturation, &range.contrast}) {
      *value = static_cast<float>(words.real());
    }
    for (int* value : {&range.crop_y, &range.crop_x, &range.cut_height, &range.cut_width,
                       &range.cut_y_count, &range.cut_x_count}) {
      *value = static_cast<int>(words.integer());
    }
    for (float* value : {&range.flip, &range.scale_low, &range.scale_span, &range.angle}) {
      *value = static_cast<float>(words.real());
    }
    const int64_t groups = words.integer(), rows = words.integer(), first = words.integer();
    return draw_augmentation_launch(draw, strategy, range, groups, rows,
                                    static_cast<uint32_t>(first), words.pointer<float>(), nullptr);
  }
  if (op == "draw_batch") {
    const DeviceDraw draw = words.draw();
    const int64_t* order = words.pointer<int64_t>();
    const ClampedGroups images = words.groups(), batch = words.groups();
    const int64_t first = words.integer();
    return draw_batch_launch(draw, order, images, batch, static_cast<uint32_t>(first),
                             words.pointer<int64_t>(), nullptr);
  }
  if (op == "draw_weights") {
    const DeviceDraw draw = words.draw();
    const int64_t networks = words.integer(), first = words.integer(), count = words.integer();
    std::vector<Weights> tensors;
    for (int64_t t = 0; t < count; ++t) {
      Weights tensor{};
      tensor.data = words.pointer();
      tensor.dtype = static_cast<DType>(words.integer());
      tensor.bound = static_cast<float>(words.real());
      tensor.elements = words.integer();
      tensor.first_block = static_cast<uint32_t>(words.integer());
      tensors.push_back(tensor);
    }
    return draw_weights_launch(draw, tensors.data(), static_cast<int>(count), networks,
                               static_cast<uint32_t>(first), nullptr);
  }
  stop("no operator " + op);
}

}  // namespace

// Arguments: the tape, the file of values, the file of output.
int main(int argc, char** argv) {
  if (argc != 4) stop("takes a tape, values and an output");
  std::ifstream tape(argv[1]), values(argv[2], std::ios::binary);
  std::ofstream output(argv[3], std::ios::binary);
  for (std::string line; std::getline(tape, line);) {
    Command words(line);
    const std::string op = words.word();
    if (op == "buffer") {
      const std::string name = words.word();
      Buffer buffer;
      buffer.bytes = static_cast<size_t>(words.integer());
      buffer.data.reset(static_cast<char*>(std::malloc(buffer.bytes)));
      const int64_t offset = words.integer();
      if (offset < 0) {
        std::memset(buffer.data.get(), 0xFF, buffer.bytes);
      } else {
        values.seekg(offset);
        values.read(buffer.data.get(), static_cast<std::streamsize>(buffer.bytes));
      }
      buffers[name] = std::move(buffer);
    } else if (op == "order") {
      emulation::thread_order = static_cast<unsigned>(words.integer());
    } else if (op == "save") {
      const Buffer& buffer = buffers.at(words.word());
      output.write(buffer.data.get(), static_cast<std::streamsize>(buffer.bytes));
    } else if (op == "clear") {
      buffers.clear();
    } else if (const int error = call(op, words)) {
      stop(op + ": " + cuda_error_text(error) + " (" + std::to_string(error) + ")");
    }
  }
  return 0;
}
