// One step of a learned rule for m tensors, on CPU: statistics of the step before -> features ->
// a small network -> gains -> one pass over the coordinates, which updates moments and parameter
// and gathers the statistics for the next step.
//
// Plain C interface without torch headers: one library serves every version of Python and torch.
// Nothing here may depend on the number of threads or on -ffast-math: sums are taken per block in
// a fixed order, and tests for NaN must stay tests.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#if defined(_MSC_VER) && !defined(__clang__)
#define LO_INLINE __forceinline
#define LO_INLINE_LAMBDA
#define LO_RESTRICT __restrict
#else
#define LO_INLINE inline __attribute__((always_inline))
#define LO_INLINE_LAMBDA __attribute__((always_inline))
#define LO_RESTRICT __restrict__
#endif

#if defined(_WIN32)
#define LO_EXPORT extern "C" __declspec(dllexport)
#else
#define LO_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// The loop over coordinates is compiled for several instruction sets; the loader picks one. That
// takes indirect functions: GCC with glibc on x86-64. Elsewhere the baseline has to do.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__) && \
    !defined(LO_NO_CLONES)
#define LO_CLONES __attribute__((target_clones("avx512f", "arch=haswell", "default")))
#else
#define LO_CLONES
#endif

// Says from which source the library was built, so that a stale one is not loaded.
#ifndef LO_SOURCE
#define LO_SOURCE "unknown"
#endif

namespace {

enum Feature {
  kRms,            // log of the tensor's root mean square, in initial scales
  kFanIn,          // log fan-in
  kSize,           // log number of coordinates
  kIsVector,       // 1 for biases, gains and scalars
  kLogStep,        // log number of earlier updates
  kStart,          // 1 at the first step, fading over tens of them
  kHorizonKnown,   // 1 where the total number of steps is known; else this and the next three are 0
  kProgress,       // share of the steps behind us
  kLogRemaining,   // log of the share before us
  kLogHorizon,     // log total number of steps
  kFastAgreement,  // log |fast|^2 / |gradient|^2: how far gradients of ten steps point one way
  kSlowAgreement,  // the same for a hundred steps
  kFastShare,      // log mean square of fast over its coordinates' own scale
  kSlowShare,      // the same for slow
  kEvenness,       // log of (mean root / root mean) of the second moment: 0 where all are alike
  kFastCosine,     // gradient and fast before it, averaged over ten steps
  kFastCosineLong, // the same over a hundred steps
  kSlowCosine,     // gradient and slow before it, averaged over ten steps
  kLive,           // log share of non-zero gradients
  kGrowth,         // log root mean square now over the initial one
  kGradTrend,      // log second moment against its own average
  kFeatures
};

enum Output { kStepSize, kFastGain, kSlowGain, kGradGain, kCautiousGain, kOutputs };

// What a tensor's statistics hold, float32, from one step to the next.
enum Stat {
  kInitialRms,  // set by whoever makes the state; the others start at 0
  kStatRms,
  kLogSquare,
  kLogSquareAverage,
  kStatFastAgreement,
  kStatSlowAgreement,
  kStatFastShare,
  kStatSlowShare,
  kStatEvenness,
  kStatFastCosine,
  kStatFastCosineLong,
  kStatSlowCosine,
  kStatLive,
  kStats
};

// Sums over a tensor's coordinates. "Normed": divided by the root of the coordinate's second moment.
enum Sum {
  kSumGrad2,  // gradient squared
  kSumSquare,
  kSumFast2,
  kSumSlow2,
  kSumRoot,
  kSumParam2,
  kSumNormedFast2,
  kSumNormedSlow2,
  kSumNormedGrad2,
  kSumGradFast,  // normed gradient times fast before this step
  kSumGradSlow,
  kSumFastBefore2,
  kSumSlowBefore2,
  kSumLive,
  kSums
};

enum Constant { kInitScale, kLogFanIn, kVector, kConstants };
enum Pointer { kParam, kGrad, kFast, kSlow, kSquare, kStatsOf, kStepOf, kWeightsOf, kPointers };
enum Code { kOk = 0, kBadPointer = 1, kOverlap = 2, kBadType = 3, kNoMemory = 4 };

constexpr int kUnits = 16;
constexpr int kWeights =
    kUnits * kFeatures + kUnits + kOutputs * kUnits + kOutputs + kOutputs * kFeatures;

constexpr double kFastDecay = 0.9, kSlowDecay = 0.99, kSquareDecay = 0.99;
// Averages of statistics: over ten steps and over a hundred.
constexpr float kShortRate = 0.1f, kLongRate = 0.01f;
constexpr float kTiny = 1e-30f;
// Finite gradients are cut off here, so that sums of their squares fit into float32.
constexpr float kLargestGrad = 281474976710656.0f;  // 2^48
constexpr float kLargestNormed = 3.0f;
constexpr double kDecayUnit = 1e-3;  // weight decay in AdamW's units at its usual lr
constexpr double kPi = 3.14159265358979323846;
// Training of unknown length warms up for this many steps; of known length for a share within
// these bounds, and it ends at the last share of the step size.
constexpr double kWarmUp = 50, kShortestWarmUp = 10, kLongestWarmUp = 250, kLastShare = 0.01;
constexpr double kLongestHorizon = 10000;

// Sums run in float32 within a block, in lanes of 128 terms each, and in float64 beyond it.
constexpr int kLanes = 16;
constexpr int64_t kBlock = 2048;
// Coordinates that one thread takes at a time; their sums are kept apart, so that the order of
// additions does not depend on who took what.
constexpr int64_t kChunk = 16 * kBlock;
// A thread costs tens of microseconds to start: it must have several times as much to do.
constexpr int64_t kPerThread = 4 * kChunk;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

LO_INLINE float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

LO_INLINE uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

LO_INLINE float widen(float x) { return x; }
LO_INLINE double widen(double x) { return x; }
LO_INLINE float widen(BFloat16 x) { return as_float(uint32_t(x.bits) << 16); }

LO_INLINE float widen(Float16 x) {
  // Without a branch or a float32 denormal, so that it becomes vector code and a processor that
  // flushes denormals gives the same.
  const uint32_t moved = uint32_t(x.bits & 0x7fff) << 13, exponent = moved & 0x0f800000;
  const uint32_t normal = moved + (uint32_t(127 - 15) << 23);
  const uint32_t special = normal + (uint32_t(128 - 16) << 23);  // infinite or NaN
  const uint32_t denormal =
      as_bits(as_float(normal + (1u << 23)) - as_float(uint32_t(113) << 23));
  const uint32_t magnitude =
      exponent == 0x0f800000 ? special : (exponent == 0 ? denormal : normal);
  return as_float(magnitude | uint32_t(x.bits & 0x8000) << 16);
}

// Rounds to nearest, ties to even, as torch does.
template <class T>
T narrow(float x);

template <>
LO_INLINE float narrow<float>(float x) {
  return x;
}

template <>
LO_INLINE BFloat16 narrow<BFloat16>(float x) {
  const uint32_t bits = as_bits(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return {uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded)};
}

template <>
LO_INLINE Float16 narrow<Float16>(float x) {
  const uint32_t bits = as_bits(x), sign = bits & 0x80000000u, a = bits ^ sign;
  const uint32_t magic = uint32_t(127 - 15 + 23 - 10 + 1) << 23;  // rounds denormals by adding
  const uint32_t denormal = as_bits(as_float(a) + as_float(magic)) - magic;
  const uint32_t normal = (a - (uint32_t(127 - 15) << 23) + 0xfff + ((a >> 13) & 1)) >> 13;
  const uint32_t special = a > 0x7f800000u ? 0x7e00 : 0x7c00;
  const uint32_t magnitude =
      a >= (uint32_t(127 + 16) << 23) ? special : (a < (uint32_t(113) << 23) ? denormal : normal);
  return {uint16_t(magnitude | sign >> 16)};
}

// The new parameter, in float64 where the parameter is.
template <class P>
LO_INLINE P moved(float old, float decay, float update) {
  return narrow<P>(old * decay + update);
}

// What the loop over coordinates needs to know of a tensor.
struct Gains {
  float sign;
  float fast_correction, slow_correction, square_correction;  // 1 / (1 - decay^t), t with this step
  float fast_before, slow_before;  // the same without this step; 0 at the first
  float fast, slow, grad, cautious;
  double decay;
};

struct Tensor {
  int64_t size;
  uint8_t type;
  void* param;
  const void* grad;
  void *fast, *slow, *square;
  float *stats, *step;
  const float* weights;
  const double* constants;
};

// Coordinates begin..end of a tensor, and their sums.
struct Chunk {
  const Tensor* tensor;
  const Gains* gains;
  int64_t begin, end;
  double sums[kSums];
};

// One block of coordinates of parameter type P and state type S. The inner loop has a fixed length
// and independent lanes, which compilers turn into vector code without leave to reorder additions.
template <class P, class S>
LO_INLINE void block(int64_t n, P* LO_RESTRICT param, const P* LO_RESTRICT grad,
                     S* LO_RESTRICT fast, S* LO_RESTRICT slow, S* LO_RESTRICT square,
                     const Gains& gains, double* sums) {
  using W = decltype(widen(P{}));
  constexpr float fast_decay = float(kFastDecay), slow_decay = float(kSlowDecay);
  constexpr float square_decay = float(kSquareDecay);
  const Gains k = gains;  // a copy: stores through the pointers above cannot change it
  const W sign = W(k.sign), decay = W(k.decay), largest = W(kLargestGrad);
  float lane[kSums][kLanes] = {};

  const auto coordinate = [&](int64_t i, int l) LO_INLINE_LAMBDA {
    W wide = widen(grad[i]) * sign;
    wide = wide - wide == W(0) ? wide : W(0);  // NaN and infinite count as zero
    const float g = float(std::min(std::max(wide, -largest), largest));
    const float fast_old = widen(fast[i]), slow_old = widen(slow[i]);
    const float fast_new = fast_old + (g - fast_old) * (1.0f - fast_decay);
    const float slow_new = slow_old + (g - slow_old) * (1.0f - slow_decay);
    const float square_new =
        widen(square[i]) * square_decay + g * g * (1.0f - square_decay);
    fast[i] = narrow<S>(fast_new);
    slow[i] = narrow<S>(slow_new);
    square[i] = narrow<S>(square_new);

    const float v = square_new * k.square_correction, root = std::sqrt(v + kTiny);
    const float inverse = 1.0f / root;
    const float f = fast_new * k.fast_correction, s = slow_new * k.slow_correction;
    const float nf = f * inverse, ns = s * inverse;
    const float ng = std::min(std::max(g * inverse, -kLargestNormed), kLargestNormed);
    const float nf_old = fast_old * k.fast_before * inverse;
    const float ns_old = slow_old * k.slow_before * inverse;
    const float cautious = nf * g > 0.0f ? nf : 0.0f;
    const float update = k.fast * nf + k.slow * ns + k.grad * ng + k.cautious * cautious;
    const W old = widen(param[i]);
    const float q = float(old);
    if constexpr (sizeof(W) == sizeof(double)) {
      param[i] = old * decay + W(update);
    } else {
      param[i] = moved<P>(old, decay, update);
    }

    lane[kSumGrad2][l] += g * g;
    lane[kSumSquare][l] += v;
    lane[kSumFast2][l] += f * f;
    lane[kSumSlow2][l] += s * s;
    lane[kSumRoot][l] += root;
    lane[kSumParam2][l] += q * q;
    lane[kSumNormedFast2][l] += nf * nf;
    lane[kSumNormedSlow2][l] += ns * ns;
    lane[kSumNormedGrad2][l] += ng * ng;
    lane[kSumGradFast][l] += ng * nf_old;
    lane[kSumGradSlow][l] += ng * ns_old;
    lane[kSumFastBefore2][l] += nf_old * nf_old;
    lane[kSumSlowBefore2][l] += ns_old * ns_old;
    lane[kSumLive][l] += g != 0.0f ? 1.0f : 0.0f;
  };

  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) coordinate(i + l, l);
  for (int l = 0; i < n; ++i, ++l) coordinate(i, l);
  for (int q = 0; q < kSums; ++q) {
    double total = 0;
    for (int l = 0; l < kLanes; ++l) total += lane[q][l];
    sums[q] += total;
  }
}

using BlockFunction = void (*)(int64_t, const Tensor&, int64_t, const Gains&, double*);

// Attributes for several instruction sets do not go with templates: a plain function per type.
#define LO_BLOCK(NAME, P, S)                                                                     \
  LO_CLONES void NAME(int64_t n, const Tensor& t, int64_t at, const Gains& gains, double* sums) { \
    block<P, S>(n, static_cast<P*>(t.param) + at, static_cast<const P*>(t.grad) + at,            \
                static_cast<S*>(t.fast) + at, static_cast<S*>(t.slow) + at,                      \
                static_cast<S*>(t.square) + at, gains, sums);                                    \
  }
LO_BLOCK(block_float32, float, float)
LO_BLOCK(block_float64, double, float)
LO_BLOCK(block_bfloat16, BFloat16, float)
LO_BLOCK(block_float16, Float16, float)
LO_BLOCK(block_float32_half_state, float, BFloat16)
LO_BLOCK(block_float64_half_state, double, BFloat16)
LO_BLOCK(block_bfloat16_half_state, BFloat16, BFloat16)
LO_BLOCK(block_float16_half_state, Float16, BFloat16)
#undef LO_BLOCK

// Type codes: parameter float32, float64, bfloat16, float16; plus 4 where state is bfloat16.
constexpr BlockFunction kBlockOf[] = {block_float32,
                                      block_float64,
                                      block_bfloat16,
                                      block_float16,
                                      block_float32_half_state,
                                      block_float64_half_state,
                                      block_bfloat16_half_state,
                                      block_float16_half_state};
constexpr int64_t kParamSize[] = {4, 8, 2, 2, 4, 8, 2, 2};
constexpr int64_t kStateSize[] = {4, 4, 4, 4, 2, 2, 2, 2};
constexpr int kTypes = 8;

void run_chunk(Chunk& chunk) {
  const BlockFunction run = kBlockOf[chunk.tensor->type];
  double sums[kSums] = {};  // not those of the chunk: neighbours may share a line of the cache
  for (int64_t at = chunk.begin; at < chunk.end; at += kBlock)
    run(std::min(kBlock, chunk.end - at), *chunk.tensor, at, *chunk.gains, sums);
  std::copy(sums, sums + kSums, chunk.sums);
}

void run_chunks(std::vector<Chunk>& chunks, int64_t coordinates, int threads) {
  const int64_t useful = std::min<int64_t>(coordinates / kPerThread, int64_t(chunks.size()));
  const int64_t helpers = std::min<int64_t>(threads, useful) - 1;
  if (helpers < 1) {
    for (Chunk& chunk : chunks) run_chunk(chunk);
    return;
  }
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < chunks.size();)
      run_chunk(chunks[i]);
  };
  // Started anew in every call, which costs little beside the work: a pool would not outlive fork.
  std::vector<std::thread> pool;
  pool.reserve(size_t(helpers));
  try {
    for (int64_t i = 0; i < helpers; ++i) pool.emplace_back(work);
  } catch (...) {  // no further thread to be had: the others do its work
  }
  work();
  for (std::thread& thread : pool) thread.join();
}

double clamp(double x, double low, double high) { return std::min(std::max(x, low), high); }
double log_ratio(double x, double y) { return std::log(clamp(x / y, 1e-7, 1e7)); }
double bias_correction(double decay, double steps) { return 1 / (1 - std::pow(decay, steps)); }

struct Settings {
  double sign, lr, weight_decay, total_steps, base, warm_up_share;
};

void features_of(const Tensor& tensor, double total, float* x) {
  const float* z = tensor.stats;
  const double t = *tensor.step, scale = tensor.constants[kInitScale];
  const bool later = t > 0, known = total > 0;
  const double rms = later ? z[kStatRms] : z[kInitialRms];
  const double progress = known ? std::min(t / total, 1.0) : 0.0;
  // Averages over ten steps, which began at zero (so does the one over a hundred).
  const auto average = [&](Stat stat, double decay) {
    return later ? z[stat] / (1.0 - std::pow(decay, t)) : 0.0;
  };
  const auto said = [&](double value) { return later ? value : 0.0; };
  std::fill(x, x + kFeatures, 0.0f);
  x[kRms] = float(std::log(std::max(rms / scale, std::exp(-8.0))) / 4);
  x[kFanIn] = float(tensor.constants[kLogFanIn] / 4 - 1);
  x[kSize] = float(std::log(double(std::max<int64_t>(1, tensor.size))) / 6 - 1);
  x[kIsVector] = float(tensor.constants[kVector]);
  x[kLogStep] = float(std::log(std::min(t, kLongestHorizon) + 1) / 4 - 1);
  x[kStart] = float(std::exp(-t / 10));
  if (known) {
    x[kHorizonKnown] = 1;
    x[kProgress] = float(progress);
    x[kLogRemaining] = float(std::log(1.02 - progress) / 2);
    x[kLogHorizon] = float(std::log(std::min(total, kLongestHorizon)) / 4 - 1.5);
  }
  x[kFastAgreement] = float(said(z[kStatFastAgreement] / 4));
  x[kSlowAgreement] = float(said(z[kStatSlowAgreement] / 4));
  x[kFastShare] = float(said(z[kStatFastShare] / 4));
  x[kSlowShare] = float(said(z[kStatSlowShare] / 4));
  x[kEvenness] = float(said(z[kStatEvenness] / 4));
  x[kFastCosine] = float(average(kStatFastCosine, 0.9));
  x[kFastCosineLong] = float(average(kStatFastCosineLong, 0.99));
  x[kSlowCosine] = float(average(kStatSlowCosine, 0.9));
  x[kLive] = float(said(std::log(average(kStatLive, 0.9) + 1e-3) / 4));
  x[kGrowth] = float(
      std::log(std::max(rms, 1e-8) / std::max(double(z[kInitialRms]), 1e-2 * scale)) / 2);
  x[kGradTrend] = float(said((z[kLogSquare] - z[kLogSquareAverage]) / 4));
}

// Weights, float32, one after another, rows first: hidden (16, 21), its bias (16), output (5, 16),
// its bias (5), and the direct path (5, 21).
void respond(const float* weights, const float* x, float* outputs) {
  const float* hidden = weights;
  const float* hidden_bias = hidden + kUnits * kFeatures;
  const float* output = hidden_bias + kUnits;
  const float* output_bias = output + kOutputs * kUnits;
  const float* direct = output_bias + kOutputs;
  float units[kUnits];
  for (int u = 0; u < kUnits; ++u) {
    float sum = hidden_bias[u];
    for (int j = 0; j < kFeatures; ++j) sum += hidden[u * kFeatures + j] * x[j];
    units[u] = std::tanh(sum);
  }
  for (int o = 0; o < kOutputs; ++o) {
    float sum = output_bias[o];
    for (int j = 0; j < kUnits; ++j) sum += output[o * kUnits + j] * units[j];
    for (int j = 0; j < kFeatures; ++j) sum += direct[o * kFeatures + j] * x[j];
    outputs[o] = sum;
  }
}

// Linear warm-up; with a known horizon, a cosine to the last step as well.
double schedule(double t, double total, double warm_up_share) {
  const bool known = total > 0;
  const double warm_up =
      known ? clamp(warm_up_share * total, kShortestWarmUp, kLongestWarmUp) : kWarmUp;
  const double rise = std::min(1.0, (t + 1) / warm_up);
  if (!known) return rise;
  const double fall = 0.5 * (1 + std::cos(kPi * std::min(1.0, (t + 1) / (total + 1))));
  return rise * std::max(kLastShare, fall);
}

Gains gains_of(const Tensor& tensor, const Settings& settings) {
  float x[kFeatures], out[kOutputs];
  features_of(tensor, settings.total_steps, x);
  respond(tensor.weights, x, out);
  const double t = *tensor.step, init_scale = tensor.constants[kInitScale];
  const double rms = t > 0 ? tensor.stats[kStatRms] : tensor.stats[kInitialRms];
  // Steps are relative to the tensor's own scale, but never below its initial one nor above 1.
  const double scale = std::max(std::min(rms, 1.0), init_scale);
  const double size = -settings.lr *
                      schedule(t, settings.total_steps, settings.warm_up_share) * scale *
                      settings.base * std::exp(3 * std::tanh(double(out[kStepSize]) / 3));
  const auto bounded = [](double gain) { return 2 * std::tanh(gain / 2); };
  Gains k;
  k.sign = float(settings.sign);
  k.fast_correction = float(bias_correction(kFastDecay, t + 1));
  k.slow_correction = float(bias_correction(kSlowDecay, t + 1));
  k.square_correction = float(bias_correction(kSquareDecay, t + 1));
  k.fast_before = t > 0 ? float(bias_correction(kFastDecay, t)) : 0.0f;
  k.slow_before = t > 0 ? float(bias_correction(kSlowDecay, t)) : 0.0f;
  k.fast = float(size * (1 + bounded(out[kFastGain])));
  k.slow = float(size * bounded(out[kSlowGain]));
  k.grad = float(size * bounded(out[kGradGain]));
  k.cautious = float(size * bounded(out[kCautiousGain]));
  k.decay = 1 - kDecayUnit * settings.lr * settings.weight_decay;
  return k;
}

void update_stats(const Tensor& tensor, const double* a) {
  float* z = tensor.stats;
  const double n = double(std::max<int64_t>(1, tensor.size));
  const auto approach = [&](Stat stat, float rate, double value) {
    z[stat] += rate * float(value - z[stat]);
  };
  z[kStatRms] = float(std::sqrt(a[kSumParam2] / n));
  if (a[kSumSquare] > 0) {  // until the first gradient there is nothing to tell
    z[kLogSquare] = float(std::log(a[kSumSquare] / n + 1e-30));
    z[kLogSquareAverage] =
        *tensor.step > 0
            ? z[kLogSquareAverage] + kLongRate * (z[kLogSquare] - z[kLogSquareAverage])
            : z[kLogSquare];
    z[kStatFastAgreement] = float(log_ratio(a[kSumFast2], a[kSumSquare]));
    z[kStatSlowAgreement] = float(log_ratio(a[kSumSlow2], a[kSumSquare]));
    z[kStatFastShare] = float(std::log(a[kSumNormedFast2] / n + 1e-4));
    z[kStatSlowShare] = float(std::log(a[kSumNormedSlow2] / n + 1e-4));
    z[kStatEvenness] = float(log_ratio(a[kSumRoot] * a[kSumRoot] / n, a[kSumSquare]));
    const double fast_cosine =
        a[kSumGradFast] / std::sqrt(a[kSumNormedGrad2] * a[kSumFastBefore2] + 1e-20);
    const double slow_cosine =
        a[kSumGradSlow] / std::sqrt(a[kSumNormedGrad2] * a[kSumSlowBefore2] + 1e-20);
    approach(kStatFastCosine, kShortRate, fast_cosine);
    approach(kStatFastCosineLong, kLongRate, fast_cosine);
    approach(kStatSlowCosine, kShortRate, slow_cosine);
    approach(kStatLive, kShortRate, a[kSumLive] / n);
  }
  *tensor.step += 1;
}

// Memory that a call reads or writes.
struct Range {
  uint64_t begin, end;
  bool written;
};

// Whether anything written is also read or written elsewhere: order would matter then.
bool overlapping(std::vector<Range>& ranges) {
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

int check(const std::vector<Tensor>& tensors) {
  std::vector<Range> ranges;
  ranges.reserve(kPointers * tensors.size());
  const auto take = [&](const void* pointer, int64_t bytes, int64_t aligned, bool written) {
    const auto at = uint64_t(reinterpret_cast<uintptr_t>(pointer));
    if (bytes == 0) return true;
    if (at == 0 || at % uint64_t(aligned) != 0) return false;
    // Many tensors have the same weights.
    if (!written && !ranges.empty() && ranges.back().begin == at && !ranges.back().written)
      return true;
    ranges.push_back({at, at + uint64_t(bytes), written});
    return true;
  };
  for (const Tensor& t : tensors) {
    const int64_t p = kParamSize[t.type], s = kStateSize[t.type];
    if (!take(t.param, t.size * p, p, true) || !take(t.grad, t.size * p, p, false) ||
        !take(t.fast, t.size * s, s, true) || !take(t.slow, t.size * s, s, true) ||
        !take(t.square, t.size * s, s, true) ||
        !take(t.stats, kStats * sizeof(float), alignof(float), true) ||
        !take(t.step, sizeof(float), alignof(float), true))
      return kBadPointer;
  }
  for (const Tensor& t : tensors)
    if (!take(t.weights, kWeights * sizeof(float), alignof(float), false)) return kBadPointer;
  return overlapping(ranges) ? kOverlap : kOk;
}

}  // namespace

LO_EXPORT const char* lo_source() { return LO_SOURCE; }

// Sizes that a caller has to agree with: constants and pointers per tensor, statistics, weights.
LO_EXPORT void lo_sizes(int32_t* out) {
  out[0] = kConstants;
  out[1] = kPointers;
  out[2] = kStats;
  out[3] = kWeights;
}

// One step of m tensors. `pointers` has eight rows of m addresses, in the order of Pointer;
// `constants` three per tensor, in the order of Constant. Returns a Code; unless it is 0, nothing
// has been written.
LO_EXPORT int32_t lo_step(int64_t m, const int64_t* sizes, const uint8_t* types,
                          const uint64_t* pointers, const double* constants, double sign,
                          double lr, double weight_decay, double total_steps, double base,
                          double warm_up_share, int32_t threads) try {
  const Settings settings{sign, lr, weight_decay, total_steps, base, warm_up_share};
  std::vector<Tensor> tensors;
  tensors.reserve(size_t(m));
  int64_t coordinates = 0, chunk_count = 0;
  for (int64_t i = 0; i < m; ++i) {
    if (types[i] >= kTypes || sizes[i] < 0) return kBadType;
    const auto at = [&](Pointer row) {
      return reinterpret_cast<void*>(uintptr_t(pointers[row * m + i]));
    };
    tensors.push_back({sizes[i], types[i], at(kParam), at(kGrad), at(kFast), at(kSlow),
                       at(kSquare), static_cast<float*>(at(kStatsOf)),
                       static_cast<float*>(at(kStepOf)),
                       static_cast<const float*>(at(kWeightsOf)), constants + kConstants * i});
    coordinates += sizes[i];
    chunk_count += (sizes[i] + kChunk - 1) / kChunk;
  }
  if (const int code = check(tensors)) return code;

  std::vector<Gains> gains(static_cast<size_t>(m));
  std::vector<Chunk> chunks;
  chunks.reserve(size_t(chunk_count));
  for (size_t i = 0; i < tensors.size(); ++i) {
    gains[i] = gains_of(tensors[i], settings);
    for (int64_t at = 0; at < tensors[i].size; at += kChunk)
      chunks.push_back({&tensors[i], &gains[i], at, std::min(at + kChunk, tensors[i].size), {}});
  }
  run_chunks(chunks, coordinates, threads);

  auto chunk = chunks.begin();
  for (const Tensor& tensor : tensors) {
    double sums[kSums] = {};
    for (; chunk != chunks.end() && chunk->tensor == &tensor; ++chunk)
      for (int q = 0; q < kSums; ++q) sums[q] += chunk->sums[q];
    update_stats(tensor, sums);
  }
  return kOk;
} catch (...) {  // out of memory, before anything was written
  return kNoMemory;
}
