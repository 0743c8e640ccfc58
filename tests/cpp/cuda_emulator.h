// Runs CUDA kernels on the host, so that their own source is tested where no GPU is.
//
// Every thread of a block is a fiber; a barrier or a shuffle switches to another one. Blocks run
// one after the other, so shared memory is static. A run is deterministic, and `reversed` turns
// the order of the fibers around: results that depend on it lack a barrier.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(threads)

using cudaStream_t = void*;

struct Dim {
  unsigned x, y = 1, z = 1;
};
inline Dim threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

struct Launch {
  std::string kernel;
  int grid, threads;
  cudaStream_t stream;
};
inline std::vector<Launch> launches;
inline bool reversed = false;
// Blocks before this one are left out.
inline int64_t first_block = 0;

[[noreturn]] inline void fail(const char* what) {
  std::printf("FAILED in %s: %s\n", launches.back().kernel.c_str(), what);
  std::fflush(stdout);
  std::_Exit(1);
}

constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 1 << 17;

enum class State { kReady, kAtBarrier, kInShuffle, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state;
  // What the lane offers; two, because a lane may be one shuffle ahead of its neighbours.
  double offered[2];
  unsigned shuffles;
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline const std::function<void()>* body;

inline Fiber& self() { return fibers[threadIdx.x]; }

inline void wait(State state) {
  Fiber& fiber = self();
  fiber.state = state;
  swapcontext(&fiber.context, &scheduler);
}

inline void enter() {
  (*body)();
  wait(State::kDone);
}

// Lets fibers go on where all whom they wait for have arrived.
inline void release(unsigned begin, unsigned end, State state) {
  for (unsigned t = begin; t < end; ++t) {
    if (fibers[t].state != state) return;
  }
  for (unsigned t = begin; t < end; ++t) fibers[t].state = State::kReady;
}

inline void run_block(unsigned threads) {
  if (fibers.size() < threads) fibers = std::vector<Fiber>(threads);
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    fiber.state = State::kReady;
    fiber.shuffles = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  for (unsigned done = 0; done < threads;) {
    bool stuck = true;
    for (unsigned i = 0; i < threads; ++i) {
      threadIdx.x = reversed ? threads - 1 - i : i;
      if (self().state != State::kReady) continue;
      stuck = false;
      swapcontext(&scheduler, &self().context);
      done += self().state == State::kDone;
    }
    if (stuck) fail("not every thread reaches a barrier or a shuffle");
    release(0, threads, State::kAtBarrier);
    for (unsigned warp = 0; warp < threads; warp += kWarpSize) {
      release(warp, warp + kWarpSize, State::kInShuffle);
    }
  }
}

inline void launch(const char* kernel, int grid, int threads, cudaStream_t stream,
                   const std::function<void()>& call) {
  launches.push_back({kernel, grid, threads, stream});
  if (grid < 1) fail("an empty grid is an error");
  if (threads < 1 || threads > 1024 || threads % kWarpSize != 0) fail("not whole warps, or > 1024");
  body = &call;
  gridDim.x = grid;
  blockDim.x = threads;
  for (int64_t block = first_block; block < grid; ++block) {
    blockIdx.x = static_cast<unsigned>(block);
    run_block(threads);
  }
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::State::kAtBarrier); }

inline double __shfl_xor_sync(unsigned mask, double value, int distance) {
  if (mask != 0xFFFFFFFFu) emulator::fail("a shuffle of part of a warp is not emulated");
  emulator::Fiber& fiber = emulator::self();
  const unsigned turn = fiber.shuffles++ % 2;
  fiber.offered[turn] = value;
  emulator::wait(emulator::State::kInShuffle);
  return emulator::fibers[threadIdx.x ^ distance].offered[turn];
}

#define FLATKERN_LAUNCH(kernel, grid, threads, stream, ...) \
  emulator::launch(#kernel, grid, threads, stream, [&] { kernel(__VA_ARGS__); })
