// What the parts of the library share: how functions are declared, what a call returns, threads,
// and the check that memory which is written is nobody else's.

#ifndef LEARNED_OPTIM_LIBRARY_H
#define LEARNED_OPTIM_LIBRARY_H

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(_MSC_VER) && !defined(__clang__)
#define LO_INLINE __forceinline
#define LO_RESTRICT __restrict
#else
#define LO_INLINE inline __attribute__((always_inline))
#define LO_RESTRICT __restrict__
#endif

#if defined(_WIN32)
#define LO_EXPORT extern "C" __declspec(dllexport)
#else
#define LO_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// Runs a function on as many threads: what compilers turn `#pragma omp parallel` into.
using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
// That of the process's OpenMP runtime, if the caller has found one.
inline std::atomic<Parallel> openmp_parallel{nullptr};

namespace {

enum Code { kOk = 0, kBadPointer = 1, kOverlap = 2, kBadType = 3, kNoMemory = 4 };

// Memory that a call reads or writes.
struct Range {
  uint64_t begin, end;
  bool written;
};

// Whether anything written is also read or written elsewhere: order would matter then.
inline bool overlapping(std::vector<Range>& ranges) {
  std::sort(ranges.begin(), ranges.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  uint64_t end = 0, end_of_written = 0;
  for (const Range& range : ranges) {
    if (range.begin < end_of_written || (range.written && range.begin < end)) return true;
    end = std::max(end, range.end);
    if (range.written) end_of_written = std::max(end_of_written, range.end);
  }
  return false;
}

// Runs `work`, which does not throw, on this thread and on up to `helpers` others; returns when all
// have ended. The threads are those of torch's OpenMP, which still spin after the backward pass and
// would keep others from their cores. Without it they start anew in every call: a pool of our own
// would not outlive fork.
template <class Work>
void in_parallel(int64_t helpers, const Work& work) {
  if (const Parallel parallel = openmp_parallel.load(); parallel != nullptr && helpers > 0) {
    const auto run = [](void* given) { (*static_cast<const Work*>(given))(); };
    return parallel(run, const_cast<Work*>(&work), unsigned(helpers + 1), 0);
  }
  std::vector<std::thread> pool;
  try {
    if (helpers > 0) pool.reserve(size_t(helpers));
    for (int64_t i = 0; i < helpers; ++i) pool.emplace_back(work);
  } catch (...) {  // no further thread to be had: the others do its work
  }
  work();
  for (std::thread& thread : pool) thread.join();
}

}  // namespace

#endif
