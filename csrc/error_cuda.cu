// SPDX-License-Identifier: MIT
#include "cuda_host.h"
#include "cuda_launch.h"

namespace dmfast {

const char* cuda_error_text(int error) {
#if defined(__CUDACC__)
#ifdef DMFAST_CUDA_ARCHITECTURES
  if (error == cudaErrorNoKernelImageForDevice) {
    return "this build of dmfast is for GPUs of " DMFAST_CUDA_ARCHITECTURES
           " (TORCH_CUDA_ARCH_LIST), and this is none of them";
  }
#endif
  return cudaGetErrorString(static_cast<cudaError_t>(error));
#else
  return error == 0 ? "no error" : "the emulation refused the launch";
#endif
}

}  // namespace dmfast
