// SPDX-License-Identifier: MIT
// What torch's stable ABI lacks. Each shim says when it can go.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>

#include <vector>

#include "check.h"

#ifdef DMFAST_CUDA
#include <dlfcn.h>

#include "cuda_launch.h"
#endif

namespace dmfast {

// Tensor::is_contiguous() takes no memory format; goes when it does.
inline bool is_channels_last(const Tensor& x) {
  int64_t expected = 1;
  for (const int d : {1, 3, 2, 0}) {
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return true;
}

// empty() wants every option spelled out; goes when new_empty() takes a memory format.
inline Tensor new_images(const char* op, const Tensor& like, const std::vector<int64_t>& sizes,
                         ScalarType dtype, bool channels_last) {
  const auto format = channels_last ? torch::headeronly::MemoryFormat::ChannelsLast
                                    : torch::headeronly::MemoryFormat::Contiguous;
  return allocated(op, sizes, [&] {
    return torch::stable::empty(sizes, dtype, std::nullopt, like.device(), std::nullopt, format);
  });
}

#ifdef DMFAST_CUDA
// torch's current stream on a device. The function that tells it lives in a library that only a
// CUDA torch has, so it is looked up when it is first needed: linking to it would keep the
// extension from loading beside a CPU torch. Goes for Stream::nativeHandle() when torch 2.13 is the
// oldest.
inline void* current_cuda_stream(const char* op, int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return reinterpret_cast<Function>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream")
                                              : nullptr);
  }();
  check(function != nullptr, op, ": CUDA tensors need a CUDA build of torch");
  void* stream = nullptr;
  check(function(device, &stream) == 0, op, ": torch gave no current CUDA stream");
  return stream;
}

// Calls launch(stream) with the device of `like` as the current one.
template <typename Launch>
void launch_on(const char* op, const Tensor& like, const Launch& launch) {
  const int32_t device = static_cast<int32_t>(like.get_device_index());
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int error = launch(current_cuda_stream(op, device));
  check(error == 0, op, ": a kernel did not launch: ", cuda_error_text(error));
}
#endif

}  // namespace dmfast
