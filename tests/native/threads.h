// A stand-in for torch's thread pool: real threads, as many as a test asks for.
#pragma once

#include <algorithm>
#include <thread>
#include <vector>

#include "../../csrc/cpu/parallel.h"

inline int num_threads = 1;

extern "C" AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain_size,
                                             void (*func)(int64_t, int64_t, void*), void* ctx) {
  const int64_t n = end - begin;
  const int64_t count = std::min<int64_t>(num_threads, (n + grain_size - 1) / grain_size);
  if (count <= 1) {
    func(begin, end, ctx);
    return 0;
  }
  std::vector<std::thread> threads;
  for (int64_t t = 0; t < count; ++t) {
    threads.emplace_back([=] { func(begin + n * t / count, begin + n * (t + 1) / count, ctx); });
  }
  for (std::thread& thread : threads) thread.join();
  return 0;
}
