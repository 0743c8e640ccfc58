// Runs a CPU kernel over its units, in ranges on threads of their own where the build asks for
// several: `make sanitize` looks for races between them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

#ifndef FLATKERN_TEST_THREADS
#define FLATKERN_TEST_THREADS 1
#endif

namespace flatkern::cpu {

template <class Args>
void on_threads(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t units) {
  constexpr int64_t threads = FLATKERN_TEST_THREADS;
  if (threads == 1) return kernel(args, 0, units);
  std::vector<std::thread> running;
  for (int64_t t = 0; t < threads; ++t) {
    running.emplace_back(kernel, std::cref(args), units * t / threads, units * (t + 1) / threads);
  }
  for (std::thread& thread : running) thread.join();
}

}  // namespace flatkern::cpu
