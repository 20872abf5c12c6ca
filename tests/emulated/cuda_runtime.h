// A CUDA runtime for kernels compiled as host code; only what csrc/ uses. Blocks run one after the other, the threads of a block as
// fibers on one thread of the operating system: a fiber gives way only where it waits for others, at __syncthreads() and in a shuffle.
// What CUDA leaves open is made hard: the order of blocks and threads changes from block to block, by a fixed sequence, and fresh
// shared memory is NaN. What hangs or is undefined on a GPU is an error that cudaGetLastError() reports.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __launch_bounds__(...)

// ---- Host -----------------------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchOutOfResources = 701, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0, cudaStreamCaptureStatusActive = 1 };
using cudaStream_t = struct CUstream_st*;
using cudaEvent_t = struct CUevent_st*;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr uint64_t count() const { return uint64_t(x) * y * z; }
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {
inline cudaError_t last_error = cudaSuccess;
inline std::string last_message;
inline void report(cudaError_t error, const char* kernel, const char* why) {
  last_error = error;
  last_message = std::string(kernel) + ": " + why;
}
}  // namespace emulated

inline cudaError_t cudaGetLastError() { return std::exchange(emulated::last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t) { return emulated::last_message.c_str(); }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
// One, so that small shapes, too, have kernels walk down several rows.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 1, cudaSuccess; }
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = std::getenv("EMULATED_CAPTURE") ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaEventCreate(cudaEvent_t* event) { return *event = nullptr, cudaSuccess; }
inline cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) { return *ms = 1.f, cudaSuccess; }

// ---- A block --------------------------------------------------------------------------------------------------------

namespace emulated {

enum class State { ready, at_barrier, at_shuffle, ended, failed };

struct Fiber {
  static constexpr size_t STACK = 256 << 10;
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK]};
  void* fake_stack = nullptr;  // AddressSanitizer's
  State state = State::ended;
  unsigned shuffles;  // so far
  float shuffled[2];  // what it gives in the last two: nobody is further than one ahead of a lane of its warp
};

struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;  // kept from block to block
  std::function<void()> body;
  ucontext_t scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;
  unsigned running = 0;
  const char* kernel = "";
  const char* why = "";
  std::vector<const void*> declared;  // the shared arrays that were reached
  uint32_t order = 1;
};
inline Block block;

inline void give_way(State state) {
  Fiber& self = *block.fibers[block.running];
  self.state = state;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&self.fake_stack, block.scheduler_stack, block.scheduler_size);
#endif
  swapcontext(&self.context, &block.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self.fake_stack, &block.scheduler_stack, &block.scheduler_size);
#endif
}

inline void fail(const char* why) {
  block.why = why;
  give_way(State::failed);
}

inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_size);
#endif
  for (;;) {
    block.body();
    give_way(State::ended);
  }
}

inline void resume(unsigned thread) {
  Fiber& fiber = *block.fibers[thread];
  block.running = thread;
  threadIdx = dim3(thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / blockDim.x / blockDim.y);
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack.get(), Fiber::STACK);
#endif
  swapcontext(&block.scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

inline bool backwards() {
  block.order = block.order * 1664525u + 1013904223u;
  return block.order >> 31;
}

// Whether all threads came to their end.
inline bool run_block() {
  const unsigned threads = unsigned(blockDim.count());
  while (block.fibers.size() < threads) {
    Fiber& fiber = *block.fibers.emplace_back(new Fiber);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Fiber::STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  for (unsigned i = 0; i < threads; ++i) {
    block.fibers[i]->state = State::ready;
    block.fibers[i]->shuffles = 0;
  }
  block.declared.clear();
  const auto all = [&](unsigned first, unsigned last, State state) {
    for (unsigned i = first; i < last; ++i) {
      if (block.fibers[i]->state != state) return false;
    }
    return true;
  };
  // Lets threads go on if all of them wait in that way.
  const auto released = [&](unsigned first, unsigned last, State state) {
    if (!all(first, last, state)) return false;
    for (unsigned i = first; i < last; ++i) block.fibers[i]->state = State::ready;
    return true;
  };
  const unsigned warps = (threads + 31) / 32;
  do {
    // One warp as far as it gets before the next one starts: nothing but a barrier keeps them together.
    const bool reverse_warps = backwards(), reverse_lanes = backwards();
    for (unsigned i = 0; i < warps; ++i) {
      const unsigned first = (reverse_warps ? warps - 1 - i : i) * 32, last = std::min(first + 32, threads);
      do {
        for (unsigned k = 0; k < last - first; ++k) {
          const unsigned thread = reverse_lanes ? last - 1 - k : first + k;
          if (block.fibers[thread]->state == State::ready) resume(thread);
          if (block.fibers[thread]->state == State::failed) return false;
        }
      } while (released(first, last, State::at_shuffle));
    }
    if (all(0, threads, State::ended)) return true;
  } while (released(0, threads, State::at_barrier));
  block.why = "threads wait at __syncthreads() or in a shuffle for others that never come there";
  return false;
}

template <class F>
void launch(const char* kernel, int most_threads, dim3 grid, dim3 threads, size_t dynamic_shared, cudaStream_t, const F& body) {
  if (grid.count() == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 || threads.count() == 0 || threads.count() > 1024 ||
      threads.z > 64 || dynamic_shared != 0) {
    return report(cudaErrorInvalidConfiguration, kernel, "invalid configuration of the launch");
  }
  if (threads.count() > uint64_t(most_threads)) return report(cudaErrorLaunchOutOfResources, kernel, "more threads than its launch bounds");
  gridDim = grid;
  blockDim = threads;
  block.body = body;
  const bool reverse = backwards();
  for (uint64_t i = 0; i < grid.count(); ++i) {
    const uint64_t at = reverse ? grid.count() - 1 - i : i;
    blockIdx = dim3(unsigned(at % grid.x), unsigned(at / grid.x % grid.y), unsigned(at / grid.x / grid.y));
    if (!run_block()) {
      block.fibers.clear();  // they stand in the middle of the kernel
      return report(cudaErrorLaunchFailure, kernel, block.why);
    }
  }
}

// Where the first thread of a block reaches a __shared__ array, it holds nothing yet.
template <class T>
void fresh(T& array) {
  if (std::find(block.declared.begin(), block.declared.end(), &array) != block.declared.end()) return;
  block.declared.push_back(&array);
  std::memset(&array, 0xff, sizeof(array));
}

}  // namespace emulated

// ---- Device ---------------------------------------------------------------------------------------------------------

inline void __syncthreads() { emulated::give_way(emulated::State::at_barrier); }

inline float __shfl_xor_sync(unsigned mask, float value, int distance) {
  using emulated::block;
  if (mask != 0xffffffffu || blockDim.count() % 32 != 0 || distance < 0 || distance > 31) emulated::fail("a shuffle not of whole warps");
  const unsigned self = block.running, turn = block.fibers[self]->shuffles++ % 2;
  block.fibers[self]->shuffled[turn] = value;
  emulated::give_way(emulated::State::at_shuffle);
  return block.fibers[self ^ unsigned(distance)]->shuffled[turn];
}

// As far from exact as is documented: two units in the last place.
inline float __fdividef(float a, float b) {
  const float exact = a / b;
  if (std::fabs(b) > 0x1p126f) return std::isinf(a) ? NAN : 0.f;
  return std::nextafter(std::nextafter(exact, INFINITY), INFINITY);
}
