// One step of a stack of LSTM layers for n rows, in place. Rows are coordinates, or tensors, each
// with a state of its own; all share the weights. It must equal LSTMStack.sequence of
// rules/_lstm.py.
//
// The rows of a tile are the lanes of a few vectors. The sums of one unit's four gates stay in
// registers, so that each weight is loaded once per tile. A tile's buffers fit into the first cache.

#include "library.h"

#include <cstring>

// Vector types are an extension of GCC and Clang. Other compilers' libraries refuse every call.
#if defined(__GNUC__) && !defined(LO_NO_VECTORS)
#define LO_LSTM 1
#endif

namespace {

constexpr int kMostLstmUnits = 1024, kMostLayers = 64;
// Least number of multiplications per thread: several times the tens of microseconds of its start.
constexpr double kProductsPerThread = 8e6;

enum Entry { kFeatures, kHiddenState, kCellState, kEntries };           // with a row per row
enum Weight { kWeightX, kWeightHidden, kBiasX, kBiasHidden, kWeights };  // of each layer

struct Matrix {
  float* data;
  int64_t row_stride, column_stride;  // in floats
};

struct Stack {
  int64_t rows;
  int inputs, units, layers;
  Matrix entries[kEntries];
  std::vector<float> packed;  // see pack()

  int inputs_of(int layer) const { return layer == 0 ? inputs : units; }
  int widest() const { return std::max(inputs, units) + units; }
  // Per row of a tile: two inputs of a layer, the present one's and the next one's, and gates.
  int64_t floats() const { return 2 * widest() + 4 * units; }
};

#ifdef LO_LSTM

// Packs, unit by unit, the four biases, then the four weights of each input and hidden unit. Weights
// take up the signs of sigmoid and the factor 2 of tanh, so that gates are passed to expm1 directly.
void pack(Stack& stack, const float* const* weights) {
  constexpr float kFactors[4] = {-1, -1, 2, -1};  // input, forget, candidate, output
  const int units = stack.units;
  for (int layer = 0; layer < stack.layers; ++layer, weights += kWeights) {
    const int inputs = stack.inputs_of(layer);
    for (int u = 0; u < units; ++u) {
      const auto put = [&](auto value_of) {
        for (int gate = 0; gate < 4; ++gate)
          stack.packed.push_back(kFactors[gate] * value_of(gate * units + u));
      };
      put([&](int row) { return weights[kBiasX][row] + weights[kBiasHidden][row]; });
      for (int j = 0; j < inputs; ++j)
        put([&](int row) { return weights[kWeightX][int64_t(row) * inputs + j]; });
      for (int j = 0; j < units; ++j)
        put([&](int row) { return weights[kWeightHidden][int64_t(row) * units + j]; });
    }
  }
}

template <int N>
struct Lanes {
  typedef float Float __attribute__((vector_size(4 * N)));
  typedef uint32_t Int __attribute__((vector_size(4 * N)));
};

// Replaces x by exp(x) - 1, with a relative error below 3e-7. It clamps x to [-40, 40], so that
// products of two results are finite; sigmoid and tanh are constant far earlier. By reference,
// because each instruction set passes vectors by value in another way.
template <int N>
LO_INLINE void expm1(typename Lanes<N>::Float& x) {
  using Float = typename Lanes<N>::Float;
  constexpr float kFar = 40.0f;
  x = x > kFar ? Float{} + kFar : x;
  x = x < -kFar ? Float{} - kFar : x;
  // x = n log 2 + r with |r| < 0.35. Adding 1.5 * 2^23 rounds to an integer, in the lowest bits.
  constexpr float kRound = 12582912.0f;
  const Float shifted = x * 1.44269504f + kRound, n = shifted - kRound;
  const Float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // log 2 in two parts
  // Minimax fit of (exp(r) - 1 - r) / r^2, by iterated reweighting; relative error 1.3e-8.
  const Float q = (((1.38825197e-3f * r + 8.36653059e-3f) * r + 4.16672002e-2f) * r +
                   1.66665435e-1f) * r + 4.99999982e-1f;
  const Float p = q * (r * r) + r;
  typename Lanes<N>::Int bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000u;  // 2^n
  Float power;
  std::memcpy(&power, &bits, sizeof power);
  x = power * p + (power - 1.0f);
}

// Loads `count` of the tile's T rows of a column; the other rows are 0.
template <int T>
LO_INLINE void load(const Matrix& from, int64_t row, int64_t column, int64_t count, float* to) {
  const float* data = from.data + row * from.row_stride + column * from.column_stride;
  if (from.row_stride == 1 && count == T) {
    std::memcpy(to, data, T * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < T; ++i) to[i] = i < count ? data[i * from.row_stride] : 0.0f;
}

template <int T>
LO_INLINE void store(const float* from, const Matrix& to, int64_t row, int64_t column,
                     int64_t count) {
  float* data = to.data + row * to.row_stride + column * to.column_stride;
  if (to.row_stride == 1 && count == T) {
    std::memcpy(data, from, T * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < count; ++i) data[i * to.row_stride] = from[i];
}

// Inputs of the four gates of one unit, gate by gate, for a tile of V vectors of N lanes.
template <int N, int V>
LO_INLINE void gates_of_unit(int inputs, const float* LO_RESTRICT weights,
                             const float* LO_RESTRICT x, float* LO_RESTRICT gates) {
  using Float = typename Lanes<N>::Float;
  Float sums[4][V];
  for (int v = 0; v < V; ++v)
    for (int gate = 0; gate < 4; ++gate) sums[gate][v] = Float{} + weights[gate];
  for (int j = 0; j < inputs; ++j) {
    weights += 4;
    for (int v = 0; v < V; ++v, x += N) {
      Float value;
      std::memcpy(&value, x, sizeof value);
      for (int gate = 0; gate < 4; ++gate) sums[gate][v] += weights[gate] * value;
    }
  }
  std::memcpy(gates, sums, sizeof sums);
}

// Cell and hidden state of N rows of a unit, whose gates are T floats apart.
template <int N, int T>
LO_INLINE void activate(const float* LO_RESTRICT gates, float* LO_RESTRICT cell,
                        float* LO_RESTRICT hidden) {
  using Float = typename Lanes<N>::Float;
  Float gate[4], c;
  for (int i = 0; i < 4; ++i) {
    std::memcpy(&gate[i], gates + i * T, sizeof gate[i]);
    expm1<N>(gate[i]);
  }
  const Float in = gate[0], forget = gate[1], candidate = gate[2], out = gate[3];
  // sigmoid(z) = 1 / (2 + expm1(-z)) and tanh(z) = e / (2 + e) with e = expm1(2z). Divisions are
  // slow, so each product of two such factors takes one.
  std::memcpy(&c, cell, sizeof c);
  c = c / (forget + 2.0f) + candidate / ((in + 2.0f) * (candidate + 2.0f));
  Float squashed = c * 2.0f;
  expm1<N>(squashed);
  const Float h = squashed / ((out + 2.0f) * (squashed + 2.0f));
  std::memcpy(cell, &c, sizeof c);
  std::memcpy(hidden, &h, sizeof h);
}

// Rows first..last, tile by tile. `buffer` holds two inputs of a layer and its gates, see floats().
template <int N, int V>
LO_INLINE void run_rows(const Stack& stack, int64_t first, int64_t last, float* buffer) {
  constexpr int T = N * V;
  const int units = stack.units;
  float* x = buffer;
  float* next = x + int64_t(stack.widest()) * T;
  float* const gates = next + int64_t(stack.widest()) * T;
  for (int64_t row = first; row < last; row += T) {
    const int64_t count = std::min<int64_t>(T, last - row);
    for (int j = 0; j < stack.inputs; ++j)
      load<T>(stack.entries[kFeatures], row, j, count, x + j * T);
    const float* weights = stack.packed.data();
    for (int layer = 0; layer < stack.layers; ++layer) {
      const int inputs = stack.inputs_of(layer), column = layer * units;
      for (int u = 0; u < units; ++u)
        load<T>(stack.entries[kHiddenState], row, column + u, count, x + (inputs + u) * T);
      // In a loop of its own: the activations' constants would push the sums out of registers.
      for (int u = 0; u < units; ++u, weights += 4 * (1 + inputs + units))
        gates_of_unit<N, V>(inputs + units, weights, x, gates + 4 * u * T);
      for (int u = 0; u < units; ++u) {
        alignas(64) float cell[T];
        float* const hidden = next + u * T;
        load<T>(stack.entries[kCellState], row, column + u, count, cell);
        for (int v = 0; v < V; ++v)
          activate<N, T>(gates + 4 * u * T + v * N, cell + v * N, hidden + v * N);
        store<T>(cell, stack.entries[kCellState], row, column + u, count);
        store<T>(hidden, stack.entries[kHiddenState], row, column + u, count);
      }
      std::swap(x, next);
    }
  }
}

using RowsFunction = void (*)(const Stack&, int64_t, int64_t, float*);
struct Variant {
  RowsFunction run;
  int tile;
  bool usable;
};

// The largest tiles that fit into 32 or 16 registers, with 4 V sums and a few more values.
#define LO_VARIANT(NAME, TARGET, N, V)                                                \
  TARGET void NAME(const Stack& stack, int64_t first, int64_t last, float* buffer) { \
    run_rows<N, V>(stack, first, last, buffer);                                      \
  }
#if defined(__x86_64__) && !defined(LO_NO_CLONES)
LO_VARIANT(run_avx512, __attribute__((target("avx512f,avx512vl,avx2,fma"))), 16, 4)
LO_VARIANT(run_avx2, __attribute__((target("avx2,fma"))), 8, 2)
#endif
#if defined(__aarch64__)
LO_VARIANT(run_baseline, , 4, 4)
constexpr int kBaselineTile = 16;
#else
LO_VARIANT(run_baseline, , 4, 2)
constexpr int kBaselineTile = 8;
#endif
#undef LO_VARIANT

// The fastest first; the last one is always usable.
std::vector<Variant> variants() {
  return {
#if defined(__x86_64__) && !defined(LO_NO_CLONES)
      {run_avx512, 64, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl")},
      {run_avx2, 16, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {run_baseline, kBaselineTile, true}};
}

void run(const Stack& stack, const Variant& variant, int32_t threads) {
  const int64_t tile = variant.tile, tiles = (stack.rows + tile - 1) / tile;
  const double products = double(stack.rows) * double(stack.packed.size());
  const int64_t useful = std::min(tiles, int64_t(std::min(products / kProductsPerThread, 1e6)));
  const int64_t helpers = std::max<int64_t>(std::min<int64_t>(threads, useful) - 1, 0);
  // Several portions per thread, in case another process delays one.
  const int64_t portion = tile * ((tiles + 4 * helpers) / (4 * helpers + 1));
  constexpr int64_t kLine = 16;  // floats of a line of the cache
  const int64_t size = stack.floats() * tile + kLine;
  std::vector<float> buffers(size_t((helpers + 1) * size));
  std::atomic<int64_t> next{0}, next_buffer{0};
  in_parallel(helpers, [&] {
    float* buffer = buffers.data() + next_buffer.fetch_add(1) * size;
    while (reinterpret_cast<uintptr_t>(buffer) % (4 * kLine) != 0) ++buffer;
    for (int64_t at; (at = next.fetch_add(portion)) < stack.rows;)
      variant.run(stack, at, std::min(at + portion, stack.rows), buffer);
  });
}

int check(const Stack& stack, const float* const* weights) {
  std::vector<Range> ranges;
  const auto take_floats = [&](const float* data, int64_t count, bool written) {
    return take(ranges, data, count, sizeof(float), written);
  };
  const int64_t width = int64_t(stack.layers) * stack.units;
  for (int entry = 0; entry < kEntries; ++entry) {
    const Matrix& m = stack.entries[entry];
    const int64_t columns = entry == kFeatures ? stack.inputs : width;
    if (m.row_stride < 0 || m.column_stride < 0) return kBadType;
    // Written elements must be distinct: rows lie within columns, or columns within rows.
    const bool by_column = m.row_stride > 0 && m.column_stride >= stack.rows * m.row_stride;
    const bool by_row = m.column_stride > 0 && m.row_stride >= columns * m.column_stride;
    if (entry != kFeatures && !by_column && !by_row) return kOverlap;
    const int64_t last = (stack.rows - 1) * m.row_stride + (columns - 1) * m.column_stride;
    if (!take_floats(m.data, last + 1, entry != kFeatures)) return kBadPointer;
  }
  for (int layer = 0; layer < stack.layers; ++layer, weights += kWeights) {
    const int64_t gates = 4 * stack.units;
    if (!take_floats(weights[kWeightX], gates * stack.inputs_of(layer), false) ||
        !take_floats(weights[kWeightHidden], gates * stack.units, false) ||
        !take_floats(weights[kBiasX], gates, false) ||
        !take_floats(weights[kBiasHidden], gates, false))
      return kBadPointer;
  }
  return overlapping(ranges) ? kOverlap : kOk;
}

#endif  // LO_LSTM

}  // namespace

// One step of a stack for `rows` rows. `sizes` holds inputs, units and layers; `pointers` addresses
// of the Entries, then of each layer's Weights, contiguous, as torch has them; `strides` those of
// rows and columns of each Entry, in floats. Returns a Code; unless it is kOk, nothing has been
// written.
LO_EXPORT int32_t lo_lstm_step(int64_t rows, const int64_t* sizes, const uint64_t* pointers,
                               const int64_t* strides, int32_t threads) try {
#ifdef LO_LSTM
  const int64_t inputs = sizes[0], units = sizes[1], layers = sizes[2];
  if (rows < 0 || inputs < 1 || inputs > kMostLstmUnits || units < 1 || units > kMostLstmUnits ||
      layers < 1 || layers > kMostLayers)
    return kBadType;
  if (rows == 0) return kOk;
  Stack stack{rows, int(inputs), int(units), int(layers), {}, {}};
  const auto at = [&](int64_t i) { return reinterpret_cast<float*>(uintptr_t(pointers[i])); };
  for (int entry = 0; entry < kEntries; ++entry)
    stack.entries[entry] = {at(entry), strides[2 * entry], strides[2 * entry + 1]};
  std::vector<const float*> weights;
  for (int64_t i = 0; i < layers * kWeights; ++i) weights.push_back(at(kEntries + i));
  if (const int code = check(stack, weights.data())) return code;
  const int64_t per_layer = 4 * units * (1 + units);
  stack.packed.reserve(size_t(layers * per_layer + 4 * units * (inputs + (layers - 1) * units)));
  pack(stack, weights.data());
  for (const Variant& variant : variants())
    if (variant.usable) {
      run(stack, variant, threads);
      break;
    }
  return kOk;
#else
  return kBadType;
#endif
} catch (...) {  // out of memory, before anything was written
  return kNoMemory;
}
