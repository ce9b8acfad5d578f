// SPDX-License-Identifier: MIT
// As much of CUDA as the kernels use, on the CPU. Each thread of a block is a fiber with a stack of
// its own; fibers run one at a time and change only in barriers and warp operations, in an order
// that can be chosen: forward, reverse, or shuffled by a seed. So a result that depends on the
// order of threads shows as one, and the sanitizers see ordinary C++: AddressSanitizer every access
// (shared memory is heap blocks of their own size, filled anew for each block with bytes that make
// a NaN), UndefinedBehaviorSanitizer misaligned vector loads, ThreadSanitizer accesses that no
// barrier orders (fibers are told to it as threads, ordered by nothing else).
//
// Stricter than a GPU: a barrier must be reached by every thread of the block, at the same line; no
// thread may return while others wait; lanes of a warp operation name one mask. Not shown: races
// between blocks (which run one after another), the memory model, speed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <vector>

#if defined(__x86_64__) && !defined(DMFAST_EMULATION_UCONTEXT)
#define DMFAST_EMULATION_ASSEMBLY 1
#else
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#define DMFAST_NO_TSAN __attribute__((no_sanitize("thread")))
#else
#define DMFAST_NO_TSAN
#endif

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_size = 1, unsigned y_size = 1, unsigned z_size = 1)
      : x(x_size), y(y_size), z(z_size) {}
};

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)

namespace dmfast::emulation {

// The emulation's own bookkeeping is no race of the kernel's.
struct Quiet {
#if defined(__SANITIZE_THREAD__)
  Quiet() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Quiet() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  Quiet() {}
#endif
  Quiet(const Quiet&) = delete;
};

inline void acquire([[maybe_unused]] void* what) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(what);
#endif
}

inline void release([[maybe_unused]] void* what) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(what);
#endif
}

constexpr size_t kStackBytes = size_t{256} << 10;
constexpr unsigned kWarpSize = 32;

// A copy to shared memory that is under way, of the group that is open or one that is committed.
struct Copy {
  char* to;
  const char* from;
  unsigned group;
};

struct Fiber {
#if defined(DMFAST_EMULATION_ASSEMBLY)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  std::unique_ptr<char[]> stack;
  void* tsan = nullptr;        // ThreadSanitizer's name for it
  void* fake_stack = nullptr;  // AddressSanitizer's
  dim3 thread{0, 0, 0};
  unsigned lane = 0, warp = 0;
  bool done = true;
  const void* waits_for = nullptr;  // a barrier; null: can run
  std::vector<Copy> copies;
  unsigned groups = 0;  // of copies that are committed
};

// What a lane leaves for the others: as much as its parts of two matrices.
struct Slot {
  uint64_t word[3];
};

struct Warp {
  Slot slot[2][kWarpSize];  // two, so that the next exchange can begin before all have read
  unsigned phase = 0, mask = 0, arrived = 0;
};

struct SharedArray {
  const void* place;  // where it is declared
  char* data;
};

// The one block that runs.
struct Block {
  dim3 index, size, grid;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<SharedArray> shared;
  unsigned dynamic_bytes = 0;  // of shared memory, by the launch
  char* dynamic = nullptr;
  unsigned live = 0, arrived = 0, phase = 0;
  int barrier_line = 0;
  char meeting[2];  // what ThreadSanitizer sees the threads meet at: two, as for a warp's slots
  const std::function<void()>* body = nullptr;
  Fiber main;
  Fiber* current = nullptr;
  const void* main_stack = nullptr;
  size_t main_stack_bytes = 0;
};

inline Block block;
inline unsigned thread_order = 0;  // 0 forward, 1 reverse, above that the seed of a shuffle
inline int multiprocessor_shared = 228 << 10;  // bytes that blocks of a multiprocessor share

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_emulation: %s (block %u,%u,%u)\n", what, block.index.x, block.index.y,
               block.index.z);
  for (const Fiber& fiber : block.fibers) {
    if (fiber.done || !fiber.waits_for) continue;
    std::fprintf(stderr, "  thread %u,%u,%u waits in %s\n", fiber.thread.x, fiber.thread.y,
                 fiber.thread.z,
                 fiber.waits_for == &block.arrived ? "__syncthreads" : "a warp operation");
    break;
  }
  std::abort();
}

#if defined(DMFAST_EMULATION_ASSEMBLY)
// Keeps the registers that a function must, and changes stacks: twenty times faster than
// swapcontext, which asks the kernel about signals each time.
extern "C" void dmfast_emulation_switch(void** save, void* to);
asm(R"(
.text
.weak dmfast_emulation_switch
.type dmfast_emulation_switch,@function
dmfast_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size dmfast_emulation_switch, .-dmfast_emulation_switch
)");
#endif

DMFAST_NO_TSAN inline void jump(Fiber& from, Fiber& to, [[maybe_unused]] bool for_good = false) {
#if defined(__SANITIZE_ADDRESS__)
  const bool to_main = &to == &block.main;
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack,
                                 to_main ? block.main_stack : to.stack.get(),
                                 to_main ? block.main_stack_bytes : kStackBytes);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  block.current = &to;
#if defined(DMFAST_EMULATION_ASSEMBLY)
  dmfast_emulation_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  const bool in_main = &from == &block.main;
  __sanitizer_finish_switch_fiber(from.fake_stack, in_main ? nullptr : &block.main_stack,
                                  in_main ? nullptr : &block.main_stack_bytes);
#endif
}

DMFAST_NO_TSAN inline void run_thread() {
  acquire(&block.main);
  (*block.body)();
  release(&block.live);
  Quiet quiet;
  if (!block.current->copies.empty()) fail("a thread returned before its copies had landed");
  block.current->done = true;
  --block.live;
  if (block.arrived) fail("a thread returned while others wait in __syncthreads");
}

DMFAST_NO_TSAN inline void fiber_entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block.main_stack, &block.main_stack_bytes);
#endif
  run_thread();
  jump(*block.current, block.main, true);
  std::abort();
}

inline void wake(const void* barrier) {
  for (Fiber& fiber : block.fibers) {
    if (fiber.waits_for == barrier) fiber.waits_for = nullptr;
  }
}

inline void wait_for(const void* barrier) {
  block.current->waits_for = barrier;
  jump(*block.current, block.main);
}

inline void barrier(int line) {
  Quiet quiet;
  // A thread that wakes late must not be ordered after what others did since: they may be at the
  // next barrier already, so that one is another place.
  char* const meeting = &block.meeting[block.phase & 1];
  release(meeting);
  if (block.arrived && block.barrier_line != line) {
    fail("threads of a block wait in different __syncthreads");
  }
  block.barrier_line = line;
  if (++block.arrived == block.live) {
    block.arrived = 0;
    ++block.phase;
    wake(&block.arrived);
  } else {
    wait_for(&block.arrived);
  }
  acquire(meeting);
}

// All lanes of the mask meet; each leaves a value, and reads what the others left.
inline const Slot* exchange(unsigned mask, const Slot& value) {
  Quiet quiet;
  const Fiber& fiber = *block.current;
  Warp& warp = block.warps[fiber.warp];
  if (!(mask >> fiber.lane & 1)) fail("warp operation: a lane is not in its own mask");
  if (warp.arrived && warp.mask != mask) fail("warp operation: lanes disagree on the mask");
  const unsigned phase = warp.phase;
  warp.mask = mask;
  warp.slot[phase & 1][fiber.lane] = value;
  release(warp.slot[phase & 1]);
  if (++warp.arrived == static_cast<unsigned>(__builtin_popcount(mask))) {
    warp.arrived = 0;
    ++warp.phase;
    wake(&warp);
  } else {
    wait_for(&warp);
  }
  acquire(warp.slot[phase & 1]);
  return warp.slot[phase & 1];
}

template <typename T>
T shuffle(unsigned mask, T value, unsigned from) {
  static_assert(sizeof(T) <= sizeof(Slot), "one slot a lane");
  Slot bits{};
  std::memcpy(&bits, &value, sizeof value);
  const Slot* slots = exchange(mask, bits);
  Quiet quiet;
  if (!(mask >> from & 1)) fail("shuffle: the source lane is not in the mask");
  T result;
  std::memcpy(&result, &slots[from], sizeof result);
  return result;
}

// Every thread of the block gets the same array for the same place in the source.
inline void* shared_array(const void* place, size_t bytes) {
  Quiet quiet;
  for (const SharedArray& array : block.shared) {
    if (array.place == place) return array.data;
  }
  char* data = new char[bytes];  // aligned to 16, as operator new is
  std::memset(data, 0xFF, bytes);
  block.shared.push_back({place, data});
  return data;
}

// Sixteen bytes to shared memory. What is there is lost when the copy is asked for and comes when
// the thread waits: a GPU may be as early and as late.
inline void copy_async(void* to, const void* from) {
  for (const void* address : {static_cast<const void*>(to), from}) {
    if (reinterpret_cast<uintptr_t>(address) % 16) fail("an asynchronous copy is misaligned");
  }
  // A copy, for ThreadSanitizer does not see a memset of so few bytes.
  const uint64_t lost[2] = {~uint64_t{0}, ~uint64_t{0}};
  std::memcpy(to, lost, sizeof lost);
  Quiet quiet;
  Fiber& fiber = *block.current;
  fiber.copies.push_back({static_cast<char*>(to), static_cast<const char*>(from), fiber.groups});
}

inline void commit_copies() {
  Quiet quiet;
  ++block.current->groups;
}

// Until all groups but the last so many have landed; copies that no group holds stay under way.
inline void wait_for_copies(unsigned left) {
  std::vector<Copy> landed;
  {
    Quiet quiet;
    Fiber& fiber = *block.current;
    const auto is_early = [&](const Copy& copy) { return copy.group + left < fiber.groups; };
    const auto end = std::find_if_not(fiber.copies.begin(), fiber.copies.end(), is_early);
    landed.assign(fiber.copies.begin(), end);
    fiber.copies.erase(fiber.copies.begin(), end);
  }
  for (const Copy& copy : landed) std::memcpy(copy.to, copy.from, 16);
}

inline std::vector<unsigned> order_of(unsigned threads) {
  std::vector<unsigned> order(threads);
  std::iota(order.begin(), order.end(), 0u);
  if (thread_order == 1) std::reverse(order.begin(), order.end());
  uint64_t state = thread_order;
  for (unsigned i = threads; thread_order > 1 && i > 1; --i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    std::swap(order[i - 1], order[(state >> 33) % i]);
  }
  return order;
}

inline void start(Fiber& fiber, unsigned number) {
  const dim3 size = block.size;
  fiber.done = false;
  fiber.waits_for = nullptr;
  fiber.groups = 0;
  fiber.lane = number % kWarpSize;
  fiber.warp = number / kWarpSize;
  fiber.thread = dim3(number % size.x, number / size.x % size.y, number / (size.x * size.y));
  if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
#if defined(DMFAST_EMULATION_ASSEMBLY)
  // The switch pops six registers and returns into the entry, with the stack as a call leaves it.
  const uintptr_t top =
      reinterpret_cast<uintptr_t>(fiber.stack.get() + kStackBytes) & ~uintptr_t{15};
  void** stack = reinterpret_cast<void**>(top) - 1;
  *stack = nullptr;
  *--stack = reinterpret_cast<void*>(&fiber_entry);
  fiber.stack_pointer = stack - 6;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, &fiber_entry, 0);
#endif
#if defined(__SANITIZE_THREAD__)
  if (!fiber.tsan) fiber.tsan = __tsan_create_fiber(0);
#endif
}

inline void run_block(dim3 index, const std::function<void()>& body) {
  Quiet quiet;
  const unsigned threads = block.size.x * block.size.y * block.size.z;
  block.index = index;
  block.body = &body;
  block.live = threads;
  block.arrived = 0;
  if (block.fibers.size() < threads) block.fibers.resize(threads);
  block.warps.assign((threads + kWarpSize - 1) / kWarpSize, Warp{});
  block.dynamic = new char[block.dynamic_bytes];
  std::memset(block.dynamic, 0xFF, block.dynamic_bytes);
#if defined(__SANITIZE_THREAD__)
  block.main.tsan = __tsan_get_current_fiber();
#endif
  for (unsigned i = 0; i < threads; ++i) start(block.fibers[i], i);
  const std::vector<unsigned> order = order_of(threads);
  release(&block.main);
  while (block.live) {
    bool moved = false;
    for (const unsigned i : order) {
      Fiber& fiber = block.fibers[i];
      if (fiber.done || fiber.waits_for) continue;
      moved = true;
      jump(block.main, fiber);
    }
    if (!moved) fail("deadlock: some threads never reach what the others wait for");
  }
  acquire(&block.live);
  delete[] block.dynamic;
  for (const SharedArray& array : block.shared) delete[] array.data;
  block.shared.clear();
}

// Gives the error code of a launch, as cudaGetLastError() does after one.
template <typename Body>
int launch(dim3 grid, dim3 size, int shared_bytes, const Body& body) {
  const uint64_t threads = uint64_t{size.x} * size.y * size.z;
  const bool fits = grid.x >= 1 && grid.x <= INT32_MAX && grid.y >= 1 && grid.y <= 65535 &&
                    grid.z >= 1 && grid.z <= 65535;
  if (threads < 1 || threads > 1024 || !fits) return 9;       // cudaErrorInvalidConfiguration
  if (shared_bytes > multiprocessor_shared - 1024) return 1;  // cudaErrorInvalidValue
  block.dynamic_bytes = static_cast<unsigned>(shared_bytes);
  block.grid = grid;
  block.size = size;
  const std::function<void()> function(body);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) run_block(dim3(x, y, z), function);
    }
  }
  return 0;
}

}  // namespace dmfast::emulation

#define threadIdx (::dmfast::emulation::block.current->thread)
#define blockIdx (::dmfast::emulation::block.index)
#define blockDim (::dmfast::emulation::block.size)
#define gridDim (::dmfast::emulation::block.grid)

#define DMFAST_SHARED(type, name, count) \
  static const char name##_place = 0;    \
  type* const name =                     \
      static_cast<type*>(::dmfast::emulation::shared_array(&name##_place, sizeof(type) * (count)))

#define DMFAST_SHARED_BYTES(name) char* const name = ::dmfast::emulation::block.dynamic

#define DMFAST_LAUNCH_SHARED(kernel, grid, block, bytes, stream, ...) \
  (static_cast<void>(stream),                                         \
   ::dmfast::emulation::launch((grid), (block), (bytes), [=] { kernel(__VA_ARGS__); }))

#define DMFAST_LAUNCH(kernel, grid, block, stream, ...) \
  DMFAST_LAUNCH_SHARED(kernel, grid, block, 0, stream, __VA_ARGS__)

namespace dmfast {

inline int multiprocessor_shared_bytes() { return emulation::multiprocessor_shared; }

inline bool has_tensor_cores() { return true; }

inline int block_shared_bytes() { return emulation::multiprocessor_shared - 1024; }

template <auto kKernel>
int allow_shared_bytes() {
  return 0;
}

}  // namespace dmfast

inline void __syncthreads(int line = __builtin_LINE()) { dmfast::emulation::barrier(line); }

inline void __syncwarp(unsigned mask = 0xFFFFFFFF) { dmfast::emulation::exchange(mask, {}); }

template <typename T>
T __shfl_sync(unsigned mask, T value, unsigned from) {
  return dmfast::emulation::shuffle(mask, value, from % 32);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, unsigned bits) {
  return dmfast::emulation::shuffle(mask, value, dmfast::emulation::block.current->lane ^ bits);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance) {
  const unsigned lane = dmfast::emulation::block.current->lane, from = lane + distance;
  return dmfast::emulation::shuffle(mask, value, from < 32 ? from : lane);
}

template <typename T>
T atomicAdd(T* to, T value) {
  T old, sum;
  __atomic_load(to, &old, __ATOMIC_RELAXED);
  do sum = old + value;
  while (!__atomic_compare_exchange(to, &old, &sum, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}
