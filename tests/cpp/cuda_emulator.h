// Runs CUDA kernels on the host, so that their own source is tested where no GPU is.
//
// Every thread of a block is a fiber; a barrier or a shuffle switches to another one. Blocks run
// one after the other, so shared memory is static. A run is deterministic, and `reversed` turns
// the order of the fibers around: results that depend on it lack a barrier.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)

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

enum class State { kReady, kAtBarrier, kInShuffle, kInMma, kDone };

struct Fiber {
  jmp_buf where;
  bool begun = false;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state;
  // What the lane offers to its warp; two, because it may be one exchange ahead of its neighbours.
  double offered[2];
  struct {
    float a[8], b[4];
  } fragments[2];
  unsigned exchanges;
};

inline jmp_buf scheduler;
inline std::vector<Fiber> fibers;
inline const std::function<void()>* body;

inline Fiber& self() { return fibers[threadIdx.x]; }

inline void wait(State state) {
  Fiber& fiber = self();
  fiber.state = state;
  if (_setjmp(fiber.where) == 0) _longjmp(scheduler, 1);
}

// One thread of each block, one after the other.
inline void enter() {
  for (;;) {
    (*body)();
    wait(State::kDone);
  }
}

// Runs a fiber until it waits. A context begins it, on its stack; from then on it jumps, because a
// switch of contexts is a system call.
inline void go_on(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) return;
  if (fiber.begun) _longjmp(fiber.where, 1);
  fiber.begun = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, enter, 0);
  setcontext(&context);
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
    fibers[t].state = State::kReady;
    fibers[t].exchanges = 0;
  }
  for (unsigned done = 0; done < threads;) {
    bool stuck = true;
    for (unsigned i = 0; i < threads; ++i) {
      threadIdx.x = reversed ? threads - 1 - i : i;
      if (self().state != State::kReady) continue;
      stuck = false;
      go_on(self());
      done += self().state == State::kDone;
    }
    if (stuck) fail("not every thread reaches a barrier, a shuffle or a matrix product");
    release(0, threads, State::kAtBarrier);
    for (unsigned warp = 0; warp < threads; warp += kWarpSize) {
      release(warp, warp + kWarpSize, State::kInShuffle);
      release(warp, warp + kWarpSize, State::kInMma);
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

inline float bfloat16(uint32_t word, int half) {
  const uint32_t bits = half == 0 ? word << 16 : word & 0xFFFF0000u;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// c += A B by a warp: mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32. Where a value lies is
// told from its row and column, as the PTX ISA has it; the sum is truncated, as tensor cores do.
[[gnu::no_sanitize_undefined]] inline void mma_m16n8k16_bf16(float* c, const uint32_t* a,
                                                             const uint32_t* b) {
  Fiber& fiber = self();
  const unsigned turn = fiber.exchanges++ % 2;
  for (int i = 0; i < 8; ++i) fiber.fragments[turn].a[i] = bfloat16(a[i / 2], i % 2);
  for (int i = 0; i < 4; ++i) fiber.fragments[turn].b[i] = bfloat16(b[i / 2], i % 2);
  wait(State::kInMma);
  const unsigned lane = threadIdx.x % kWarpSize;
  const Fiber* warp = &fibers[threadIdx.x - lane];
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; k += 2) {
      const float* of_a = &warp[row % 8 * 4 + k % 8 / 2].fragments[turn].a[k / 8 * 4 + row / 8 * 2];
      const float* of_b = &warp[column * 4 + k % 8 / 2].fragments[turn].b[k / 8 * 2];
      sum += static_cast<double>(of_a[0]) * of_b[0];
      sum += static_cast<double>(of_a[1]) * of_b[1];
    }
    c[i] = static_cast<float>(sum);
    if (std::fabs(c[i]) > std::fabs(sum)) c[i] = std::nextafterf(c[i], 0.0f);
  }
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::State::kAtBarrier); }

// Lanes exchange nothing through memory, so there is nothing to wait for.
inline void __syncwarp() {}

namespace emulator {

// What each lane of the warp offers: 32-bit integers and floats fit a double.
inline double offer(unsigned mask, double value, unsigned& turn) {
  if (mask != 0xFFFFFFFFu) fail("a shuffle of part of a warp is not emulated");
  Fiber& fiber = self();
  turn = fiber.exchanges++ % 2;
  fiber.offered[turn] = value;
  wait(State::kInShuffle);
  return value;
}

template <class F>
unsigned reduce(unsigned mask, unsigned value, const F& f) {
  unsigned turn;
  offer(mask, value, turn);
  const unsigned first = threadIdx.x / kWarpSize * kWarpSize;
  unsigned result = static_cast<unsigned>(fibers[first].offered[turn]);
  for (unsigned t = first + 1; t < first + kWarpSize; ++t) {
    result = f(result, static_cast<unsigned>(fibers[t].offered[turn]));
  }
  return result;
}

}  // namespace emulator

inline double __shfl_xor_sync(unsigned mask, double value, int distance) {
  unsigned turn;
  emulator::offer(mask, value, turn);
  return emulator::fibers[threadIdx.x ^ distance].offered[turn];
}
inline unsigned __shfl_up_sync(unsigned mask, unsigned value, unsigned distance) {
  unsigned turn;
  emulator::offer(mask, value, turn);
  if (threadIdx.x % emulator::kWarpSize < distance) return value;
  return static_cast<unsigned>(emulator::fibers[threadIdx.x - distance].offered[turn]);
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return emulator::reduce(mask, value, [](unsigned a, unsigned b) { return a + b; });
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return emulator::reduce(mask, value, [](unsigned a, unsigned b) { return a | b; });
}

// Fibers run one at a time, and see what others wrote.
inline void __threadfence() {}
template <class T>
T __ldcg(const T* from) {
  return *from;
}
template <class T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to += value;
  return before;
}
inline unsigned atomicOr(unsigned* to, unsigned value) {
  const unsigned before = *to;
  *to |= value;
  return before;
}

#define FLATKERN_LAUNCH(kernel, grid, threads, stream, ...) \
  emulator::launch(#kernel, grid, threads, stream, [&] { kernel(__VA_ARGS__); })
