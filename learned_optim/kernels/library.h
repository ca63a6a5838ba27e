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

// Runs `work` on this thread and on up to `helpers` others; returns when all have ended. Threads
// start anew in every call, which costs little beside the work: a pool would not outlive fork.
template <class Work>
void in_parallel(int64_t helpers, const Work& work) {
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
