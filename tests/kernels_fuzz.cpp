// Runs the kernels on exactly sized memory, so that a sanitizer sees every access beyond it.
// tests/test_kernels.py builds and runs this.

#include "../learned_optim/kernels/step.cpp"
// Sanitizers do not go with the indirect functions of step.cpp; lstm.cpp has none.
#undef LO_NO_CLONES
#include "../learned_optim/kernels/lstm.cpp"

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

// A step with a wrong value in the place of another.
template <class Step, class T, class W>
void refused(const Step& step, T& value, W wrong, int code, const char* what) {
  const T right = value;
  value = T(wrong);
  expect(step() == code, what);
  value = right;
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
  Memory memory;
  std::vector<int64_t> sizes;
  std::vector<uint8_t> types;
  std::vector<uint64_t> pointers(size_t(kPointers * m));
  std::vector<double> constants;
  for (int64_t i = 0; i < m; ++i) {
    const int64_t size = sizes_of[below(round % 20 == 0 ? 13 : 10)];
    const int type = int(below(kTypeCount));
    sizes.push_back(size);
    types.push_back(uint8_t(type));
    constants.insert(constants.end(), {0.05, 3.0, double(below(2))});
    const bool wild = below(2) == 0;
    const auto put = [&](Pointer row, int64_t bytes, bool any_bits) {
      pointers[size_t(row * m + i)] = filled(memory, bytes, any_bits);
    };
    put(kParam, size * kTypes[type].param_bytes, wild);
    put(kGrad, size * kTypes[type].param_bytes, true);
    if (below(2)) put(kUpdate, size * 4, true);
    for (Pointer row : {kFast, kSlow, kSquare}) put(row, size * kTypes[type].state_bytes, wild);
    put(kStatsOf, kStats * 4, wild);
    put(kStepOf, 4, false);
    put(kHidden, units * kInputs * 4, wild);
    put(kHiddenBias, units * 4, wild);
    put(kReadout, units * kOutputs * 4, wild);
    put(kReadoutBias, kOutputs * 4, wild);
    put(kDirect, kOutputs * kInputs * 4, wild);
  }
  const double total = below(2) ? 100.0 : 0.0;
  const double settings[kSettings] = {1, 1, 1e-3, total, double(below(3)), double(units)};
  const auto step = [&] {
    return lo_step(m, sizes.data(), types.data(), pointers.data(), constants.data(), settings,
                   int32_t(1 + below(3)));
  };
  for (int i = 0; i < 2; ++i) expect(step() == kOk, "a step");

  // What must be refused, with nothing touched.
  const Memory before = memory;
  const size_t last = size_t(m - 1);
  if (sizes[last] > 1) {
    const uint64_t param = pointers[size_t(kParam * m) + last];
    uint64_t &grad = pointers[size_t(kGrad * m) + last], &slow = pointers[size_t(kSlow * m) + last];
    refused(step, grad, grad + 1, kBadPointer, "a misaligned pointer");
    refused(step, grad, 0, kBadPointer, "no pointer");
    refused(step, grad, param, kOverlap, "a gradient that is the parameter");
    refused(step, pointers[size_t(kUpdate * m) + last], slow, kOverlap, "an update in the state");
    refused(step, types[last], types[last] + kTypeCount, kBadType, "an unknown type");
  }
  refused(step, sizes[0], -1, kBadType, "a negative size");
  expect(memory == before, "a refused call writes nothing");
}

#ifdef LO_LSTM

// A matrix of columns, of rows, or with gaps; in memory that ends with its last element.
void fill_matrix(Memory& memory, int64_t rows, int64_t columns, uint64_t& address,
                 int64_t* strides) {
  const int64_t gap = 1 + below(2);
  const bool by_row = below(2) == 0;
  strides[0] = gap * (by_row ? columns : 1);
  strides[1] = by_row ? 1 : gap * rows;
  const int64_t last = (rows - 1) * strides[0] + (columns - 1) * strides[1];
  address = filled(memory, rows == 0 ? 0 : 4 * (last + 1), below(2) == 0);
}

void run_lstm() {
  const int64_t rows_of[] = {0, 1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 1000, 5000};
  int64_t rows = rows_of[below(13)], sizes[] = {1 + below(20), 1 + below(20), 1 + below(3)};
  const int64_t inputs = sizes[0], units = sizes[1], layers = sizes[2];
  Memory memory;
  std::vector<uint64_t> pointers(size_t(kEntries + kWeights * layers));
  std::vector<int64_t> strides(2 * kEntries);
  for (int entry = 0; entry < kEntries; ++entry)
    fill_matrix(memory, rows, entry == kFeatures ? inputs : units * layers, pointers[size_t(entry)],
                &strides[size_t(2 * entry)]);
  for (int64_t layer = 0; layer < layers; ++layer) {
    const int64_t columns[] = {layer == 0 ? inputs : units, units, 1, 1};
    for (int weight = 0; weight < kWeights; ++weight)
      pointers[size_t(kEntries + kWeights * layer + weight)] =
          filled(memory, 4 * units * columns[weight] * 4, below(2) == 0);
  }
  const auto step = [&] {
    return lo_lstm_step(rows, sizes, pointers.data(), strides.data(), int32_t(1 + below(3)));
  };
  expect(step() == kOk, "a step of a stack");
  if (rows == 0) return;

  // Every instruction set that this processor knows, and in portions, as threads take them.
  Stack stack{rows, int(inputs), int(units), int(layers), {}, {}};
  std::vector<const float*> weights;
  for (uint64_t pointer : pointers) weights.push_back(reinterpret_cast<float*>(pointer));
  for (int e = 0; e < kEntries; ++e)
    stack.entries[e] = {reinterpret_cast<float*>(pointers[size_t(e)]), strides[size_t(2 * e)],
                        strides[size_t(2 * e + 1)]};
  pack(stack, weights.data() + kEntries);
  for (const Variant& variant : variants())
    if (variant.usable) run(stack, variant, 3);

  const Memory before = memory;
  for (uint64_t& pointer : pointers) {
    refused(step, pointer, pointer + 1, kBadPointer, "a misaligned matrix");
    refused(step, pointer, 0, kBadPointer, "no matrix");
  }
  refused(step, pointers[kCellState], pointers[kHiddenState], kOverlap, "cell and hidden state in one");
  refused(step, pointers[kFeatures], pointers[kHiddenState], kOverlap, "features in the hidden state");
  for (int64_t wrong : {int64_t(0), int64_t(-1), int64_t(100000)})
    for (int64_t& size : sizes) refused(step, size, wrong, kBadType, "a size out of range");
  refused(step, rows, -1, kBadType, "a negative number of rows");
  for (int64_t& stride : strides) refused(step, stride, -1, kBadType, "a negative stride");
  if (rows > 1) refused(step, strides[2 * kCellState], 0, kOverlap, "one row for all");
  expect(memory == before, "a refused call writes nothing");
}

#else
void run_lstm() {}
#endif

}  // namespace

int main() {
  for (int round = 0; round < 100; ++round) run(round);
  for (int round = 0; round < 100; ++round) run_lstm();
  std::printf("passed\n");
  return 0;
}
