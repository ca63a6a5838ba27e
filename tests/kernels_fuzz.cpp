// Runs the kernel on exactly sized memory, so that a sanitizer sees every access beyond it.
// tests/test_kernels.py builds and runs this.

#include "../learned_optim/kernels/step.cpp"

#include <cstdio>
#include <cstdlib>
#include <random>

namespace {

using Memory = std::vector<std::vector<uint8_t>>;

std::mt19937 random_bits(1);

int64_t below(int64_t n) { return int64_t(random_bits() % uint64_t(n)); }

void expect(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

// Any bits, NaN and infinity included, or small numbers.
uint64_t filled(Memory& memory, int64_t bytes, bool any_bits) {
  memory.emplace_back(size_t(bytes));
  std::vector<uint8_t>& block = memory.back();
  for (auto& byte : block) byte = any_bits ? uint8_t(random_bits()) : uint8_t(0);
  return bytes == 0 ? 0 : uint64_t(reinterpret_cast<uintptr_t>(block.data()));
}

void run(int round) {
  const int64_t sizes_of[] = {0, 1, 2, 15, 16, 17, 1023, 1024, 1025, 5000, 32768, 32769, 200000};
  const int64_t m = 1 + below(5), units = 1 + below(20);
  const int inputs = kInputs - int(below(2));
  Memory memory;
  std::vector<int64_t> sizes;
  std::vector<uint8_t> types;
  std::vector<uint64_t> pointers(size_t(kPointers * m));
  std::vector<double> constants;
  for (int64_t i = 0; i < m; ++i) {
    const int64_t size = sizes_of[below(round % 20 == 0 ? 13 : 10)];
    const int type = int(below(kTypes));
    sizes.push_back(size);
    types.push_back(uint8_t(type));
    constants.insert(constants.end(), {0.05, 3.0, double(below(2)), 1.0});
    const bool wild = below(2) == 0;
    const auto put = [&](Pointer row, int64_t bytes, bool any_bits) {
      pointers[size_t(row * m + i)] = filled(memory, bytes, any_bits);
    };
    put(kParam, size * kParamSize[type], wild);
    put(kGrad, size * kParamSize[type], true);
    for (Pointer row : {kFast, kSlow, kSquare}) put(row, size * kStateSize[type], wild);
    put(kStatsOf, kStats * 4, wild);
    put(kStepOf, 4, false);
    put(kHidden, units * inputs * 4, wild);
    put(kHiddenBias, units * 4, wild);
    put(kReadout, units * kOutputs * 4, wild);
    put(kReadoutBias, kOutputs * 4, wild);
    put(kDirect, kOutputs * inputs * 4, wild);
  }
  const double total = below(2) ? 100.0 : 0.0;
  const double settings[kSettings] = {1,   1,    1e-3, total, double(below(3)), double(units),
                                      double(inputs), 0.9, .99, 0.99, 0.05, 0.1, 0.25, 0.05, 50,
                                      -3, 2};
  const auto step = [&] {
    return lo_step(m, sizes.data(), types.data(), pointers.data(), constants.data(), settings,
                   int32_t(1 + below(3)));
  };
  for (int i = 0; i < 2; ++i) expect(step() == kOk, "a step");

  // What must be refused, with nothing touched.
  const Memory before = memory;
  const size_t last = size_t(m - 1);
  if (sizes[last] > 1) {
    auto& grad = pointers[size_t(kGrad * m) + last];
    const uint64_t good = grad;
    grad = good + 1;
    expect(step() == kBadPointer, "a misaligned pointer");
    grad = 0;
    expect(step() == kBadPointer, "no pointer");
    grad = pointers[size_t(kParam * m) + last];
    expect(step() == kOverlap, "a gradient that is the parameter");
    grad = good;
    types[last] += kTypes;
    expect(step() == kBadType, "an unknown type");
    types[last] -= kTypes;
  }
  sizes[0] = -sizes[0] - 1;
  expect(step() == kBadType, "a negative size");
  expect(memory == before, "a refused call writes nothing");
}

}  // namespace

int main() {
  for (int round = 0; round < 200; ++round) run(round);
  std::printf("passed\n");
  return 0;
}
