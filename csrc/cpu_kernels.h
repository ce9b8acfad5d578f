// SPDX-License-Identifier: MIT
// What the operators that call the network's kernels share: memory and threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <memory>

#include "check.h"
#include "conv_block.h"

namespace dmfast {

// Memory that is kept from call to call: fresh pages cost more than what is computed in them.
class Kept {
 public:
  // At least so many bytes, 64-byte aligned; what was in them before may be gone.
  void* bytes(const char* op, int64_t count) {
    if (count > size_) {
      memory_.reset();
      size_ = 0;
      const int64_t rounded = (count + 4095) / 4096 * 4096;
      memory_.reset(std::aligned_alloc(4096, rounded));
      check(memory_ != nullptr, op, ": no memory for ", rounded, " bytes to work in");
      // Zeros once, so that what nobody wrote is no denormal number either.
      std::fill_n(static_cast<char*>(memory_.get()), rounded, char{0});
      size_ = rounded;
    }
    return memory_.get();
  }
  float* floats(const char* op, int64_t count) { return static_cast<float*>(bytes(op, count * 4)); }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
  int64_t size_ = 0;
};

// Calls body(unit, workspace) for the units 0 to count - 1, on torch's threads, each of which takes
// the next unit when it is done with one: shared machines do not give them the same speed. What a
// thread throws is thrown again as it is: parallel_for() would replace its message.
template <typename Body>
void for_each_unit(const char* op, int64_t count, int64_t workspace_bytes, const Body& body) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr failure;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    thread_local Kept kept;
    try {
      void* workspace = kept.bytes(op, workspace_bytes);
      for (int64_t unit; (unit = next++) < count;) body(unit, workspace);
    } catch (...) {
      if (!failed.exchange(true)) failure = std::current_exception();
    }
  });
  if (failure) std::rethrow_exception(failure);
}

}  // namespace dmfast
