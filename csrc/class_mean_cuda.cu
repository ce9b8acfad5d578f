// SPDX-License-Identifier: MIT
// Class means on a GPU. A block takes some columns of one class: a thread of it a pack of adjacent
// columns, loaded at once, over every kLanes-th row; the lanes are then added in order.
#include <cmath>
#include <type_traits>

#include "class_mean_cuda.h"
#include "cuda_host.h"
#include "cuda_types.h"

namespace dmfast {
namespace {

constexpr int kColumns = 32;  // packs of columns a block
constexpr int kLanes = 8;     // rows it adds at a time
constexpr int kRun = 4;       // rows a thread has in flight
constexpr int kSumThreads = 256;

template <typename T, int kWide, typename acc_t>
struct PackSum {
  acc_t sum[kWide];

  __device__ void add(const T* from) {
    const Pack<T, kWide> pack = *reinterpret_cast<const Pack<T, kWide>*>(from);
    DMFAST_UNROLL
    for (int i = 0; i < kWide; ++i) sum[i] += static_cast<acc_t>(pack.element[i]);
  }
};

// With `other`, the means are taken from what means holds, and the block's sum of squares goes to
// sums[block].
template <typename T, int kWide, typename acc_t>
__global__ void __launch_bounds__(kColumns* kLanes, 1)
    mean_kernel(const T* const rows, const int64_t stride, const ClampedGroups groups,
                const int64_t width, acc_t* const means, const bool subtracts,
                const ClampedGroups other, acc_t* const sums) {
  DMFAST_SHARED(acc_t, partial, kLanes * kColumns * kWide);
  const int column = static_cast<int>(threadIdx.x), lane = static_cast<int>(threadIdx.y);
  const int64_t across = kColumns * kWide, runs = (width + across - 1) / across;
  for (int64_t task = blockIdx.x; task < groups.groups * runs; task += gridDim.x) {
    const int64_t group = task / runs, d = task % runs * across + column * kWide;
    const int64_t first = groups.first(group), count = groups.count(group);
    PackSum<T, kWide, acc_t> total = {};
    if (d < width) {
      const T* from = rows + first * stride + d;
      int64_t row = lane;
      for (; row + (kRun - 1) * kLanes < count; row += kRun * kLanes) {
        // A run is summed by itself: rounding grows with the length of a chain of additions.
        PackSum<T, kWide, acc_t> run = {};
        DMFAST_UNROLL
        for (int i = 0; i < kRun; ++i) run.add(from + (row + i * kLanes) * stride);
        DMFAST_UNROLL
        for (int i = 0; i < kWide; ++i) total.sum[i] += run.sum[i];
      }
      DMFAST_ROLLED
      for (; row < count; row += kLanes) total.add(from + row * stride);
    }
    __syncthreads();  // partial has been read
    DMFAST_UNROLL
    for (int i = 0; i < kWide; ++i) {
      partial[(lane * kColumns + column) * kWide + i] = total.sum[i];
    }
    __syncthreads();
    acc_t squares = 0;
    if (lane == 0 && d < width) {
      DMFAST_UNROLL
      for (int i = 0; i < kWide; ++i) {
        acc_t sum = 0;
        for (int l = 0; l < kLanes; ++l) sum += partial[(l * kColumns + column) * kWide + i];
        acc_t mean = count > 0 ? sum / static_cast<acc_t>(count) : acc_t(0);
        acc_t& to = means[group * width + d + i];
        if (subtracts) {
          mean = to - mean;
          if ((other.count(group) > 0) != (count > 0)) mean = static_cast<acc_t>(NAN);
          squares += mean * mean;
        }
        to = mean;
      }
    }
    if (subtracts && lane == 0) {  // one warp
      for (unsigned distance = kColumns / 2; distance > 0; distance /= 2) {
        squares += __shfl_down_sync(0xFFFFFFFF, squares, distance);
      }
      if (column == 0) sums[task] = squares;
    }
  }
}

template <typename acc_t>
__global__ void __launch_bounds__(kSumThreads, 1)
    sum_kernel(const acc_t* const values, const int64_t count, acc_t* const result) {
  DMFAST_SHARED(acc_t, partial, kSumThreads);
  acc_t sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kSumThreads) sum += values[i];
  partial[threadIdx.x] = sum;
  for (unsigned half = kSumThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *result = partial[0];
}

// A block takes a row at a time; a thread packs of adjacent columns.
template <typename T, int kWide, typename acc_t>
__global__ void __launch_bounds__(kSumThreads, 1)
    spread_kernel(const acc_t* const gradient, const ClampedGroups groups, const int64_t width,
                  T* const rows) {
  for (int64_t row = blockIdx.x; row < groups.rows; row += gridDim.x) {
    const int64_t group = groups.of(row);
    const acc_t count = static_cast<acc_t>(group < 0 ? 1 : groups.count(group));
    for (int64_t d = threadIdx.x * kWide; d < width; d += blockDim.x * kWide) {
      Pack<T, kWide> pack;
      DMFAST_UNROLL
      for (int i = 0; i < kWide; ++i) {
        const acc_t mean = group < 0 ? acc_t(0) : gradient[group * width + d + i];
        pack.element[i] = static_cast<T>(mean / count);
      }
      *reinterpret_cast<Pack<T, kWide>*>(rows + row * width + d) = pack;
    }
  }
}

// ---- Launches ----------------------------------------------------------------------------------

unsigned grid(int64_t tasks) {
  return static_cast<unsigned>(tasks < INT32_MAX ? tasks : INT32_MAX);
}

// Calls body with how many elements a pack holds: many where the alignment of the rows allows it.
template <typename T, typename Body>
int with_pack(const void* data, int64_t width, int64_t stride, const Body& body) {
  constexpr int kWide = kPack<T>;
  const bool aligned = is_aligned(data, 16) && width % kWide == 0 && stride % kWide == 0;
  if (aligned) return body(std::integral_constant<int, kWide>{});
  return body(std::integral_constant<int, 1>{});
}

// launched: how many blocks, each of which leaves a sum.
template <typename acc_t>
int means(const Embeddings& rows, int64_t width, void* result, bool subtracts,
          const ClampedGroups& other, void* sums, void* stream, int64_t* launched) {
  return with_cuda_type(rows.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) > sizeof(acc_t)) {
      return 1;  // cudaErrorInvalidValue: float64 is summed in float64
    } else {
      return with_pack<T>(rows.data, width, rows.stride, [&](auto pack) {
        constexpr int kWide = decltype(pack)::value;
        const int64_t across = kColumns * kWide, runs = (width + across - 1) / across;
        *launched = rows.groups.groups * runs;
        if (*launched == 0) return 0;
        const auto kernel = mean_kernel<T, kWide, acc_t>;
        const T* const from = static_cast<const T*>(rows.data);
        const int64_t stride = rows.stride;
        const ClampedGroups groups = rows.groups;
        acc_t* const to = static_cast<acc_t*>(result);
        acc_t* const squares = static_cast<acc_t*>(sums);
        return DMFAST_LAUNCH(kernel, grid(*launched), dim3(kColumns, kLanes), stream, from, stride,
                             groups, width, to, subtracts, other, squares);
      });
    }
  });
}

template <typename acc_t>
int discrepancy(const ClampedGroups& real_groups, const Embeddings& syn, int64_t width,
                void* difference, void* loss, void* sums, void* stream) {
  int64_t count = 0;
  const int error = means<acc_t>(syn, width, difference, true, real_groups, sums, stream, &count);
  if (error != 0) return error;
  const acc_t* const squares = static_cast<const acc_t*>(sums);
  acc_t* const result = static_cast<acc_t*>(loss);
  return DMFAST_LAUNCH(sum_kernel<acc_t>, 1, kSumThreads, stream, squares, count, result);
}

}  // namespace

int class_mean_launch(const Embeddings& rows, int64_t width, bool doubles, void* means_of_groups,
                      void* stream) {
  int64_t launched = 0;
  const auto launch = doubles ? means<double> : means<float>;
  return launch(rows, width, means_of_groups, false, rows.groups, nullptr, stream, &launched);
}

int64_t class_mean_workspace(int64_t groups, int64_t width) {
  return groups * ((width + kColumns - 1) / kColumns);
}

int class_mean_discrepancy_launch(const ClampedGroups& real_groups, const Embeddings& syn,
                                  int64_t width, bool doubles, void* difference, void* loss,
                                  void* sums, void* stream) {
  const auto launch = doubles ? discrepancy<double> : discrepancy<float>;
  return launch(real_groups, syn, width, difference, loss, sums, stream);
}

int class_mean_backward_launch(const void* mean_gradient, DType dtype, const ClampedGroups& groups,
                               int64_t width, void* rows, void* stream) {
  return with_cuda_type(dtype, [&](auto element) {
    using T = decltype(element);
    using acc_t = typename Accumulator<T>::type;
    return with_pack<T>(rows, width, width, [&](auto pack) {
      if (groups.rows * width == 0) return 0;
      const auto kernel = spread_kernel<T, decltype(pack)::value, acc_t>;
      const acc_t* const gradient = static_cast<const acc_t*>(mean_gradient);
      T* const to = static_cast<T*>(rows);
      const ClampedGroups spread = groups;
      return DMFAST_LAUNCH(kernel, grid(groups.rows), kSumThreads, stream, gradient, spread, width,
                           to);
    });
  });
}

}  // namespace dmfast
