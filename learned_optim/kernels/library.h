// Shared by the parts of the library: declarations, return codes, the check of memory, threads.

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

// The function that compilers call for `#pragma omp parallel`: runs a function on some threads.
using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
// The function of the process's OpenMP runtime, if the caller has found one.
inline std::atomic<Parallel> openmp_parallel{nullptr};

namespace {

enum Code { kOk = 0, kBadPointer = 1, kOverlap = 2, kBadType = 3, kNoMemory = 4 };

// Memory that a call reads or writes.
struct Range {
  uint64_t begin, end;
  bool written;
};

// Adds `count` items of `bytes` each; false if the pointer is null or not aligned to an item.
inline bool take(std::vector<Range>& ranges, const void* pointer, int64_t count, int64_t bytes,
                 bool written) {
  const auto at = uint64_t(reinterpret_cast<uintptr_t>(pointer));
  if (count == 0) return true;
  if (at == 0 || at % uint64_t(bytes) != 0) return false;
  ranges.push_back({at, at + uint64_t(count * bytes), written});
  return true;
}

// True if written memory is also read or written by another range: order would matter then.
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
// have ended. It uses the threads of torch's OpenMP: they still spin after the backward pass, and
// other threads would wait for their cores. Without OpenMP each call starts new threads, because a
// pool would not survive fork.
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
  } catch (...) {  // no more threads: those that have started do the work
  }
  work();
  for (std::thread& thread : pool) thread.join();
}

}  // namespace

#endif
