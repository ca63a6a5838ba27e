// One step of the rule `horizon` for m tensors on the CPU. Per tensor: inputs from the statistics of
// the step before, a small network, gains; then one pass over the coordinates, which updates moments
// and parameter and sums what the next step will read. It must equal the pure form,
// rules/horizon.py.
//
// A plain C interface without torch's headers: one library serves every version of Python and torch.
// No result depends on the number of threads: sums are taken per block, in a fixed order. Built
// without -ffast-math, which would drop the tests for NaN and make the process flush denormals.

#include "library.h"

#include <cmath>
#include <cstring>

// The loops over coordinates are compiled for several instruction sets, of which the loader picks
// one. That takes indirect functions: glibc on x86-64, and GCC. Elsewhere only the baseline exists.
// Targets are features or levels: "arch=haswell" would exclude processors of other makers.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__) && \
    !defined(LO_NO_CLONES)
#if __GNUC__ >= 12
#define LO_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LO_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define LO_CLONES
#endif

#ifndef LO_BASE_STEP
#error "kernels/_build.py defines the constants of kernels/constants.py"
#endif

// Hash of the sources, so that a library built from other sources is not used.
#ifndef LO_SOURCE
#define LO_SOURCE "unknown"
#endif

namespace {

enum Output { kStepSize, kFastGain, kSlowGain, kGradGain, kCautiousGain, kOutputs };

// Entries of the state `stats`, explained in rules/_history.py.
enum Stat {
  kStatFirstRms,
  kStatRms,
  kStatLevel,
  kStatMeanLevel,
  kStatFastShare,
  kStatSlowShare,
  kStatFastSignal,
  kStatSlowSignal,
  kStatInequality,
  kStatFastCorrelation,
  kStatMeanCorrelation,
  kStatSlowCorrelation,
  kStatLive,
  kStatConfidence,
  kStats
};
static_assert(kStats == LO_NUM_STATS);

// Sums over the coordinates of a tensor; "ratio": in units of the coordinate's r.
enum Sum {
  kSumParam2,
  kSumSquare,
  kSumFast2,
  kSumSlow2,
  kSumR,
  kSumRatioFast2,
  kSumRatioSlow2,
  kSumRatio2,
  kSumRatioOldFast,  // ratio of the gradient times that of the fast momentum before it
  kSumRatioOldSlow,
  kSumOldFast2,
  kSumOldSlow2,
  kSumLive,
  kSums
};

// Arguments of a call: addresses and constants per tensor, settings per call.
enum Pointer {
  kParam,
  kGrad,
  kUpdate,  // where the update goes, float32; null: onto the parameter
  kFast,
  kSlow,
  kSquare,
  kStatsOf,
  kStepOf,
  kHidden,
  kHiddenBias,
  kReadout,
  kReadoutBias,
  kDirect,
  kPointers
};
enum Constant { kInitScale, kLogFanIn, kVector, kConstants };
enum Setting {
  kSign,
  kLr,
  kDecay,
  kTotalSteps,  // 0: unknown
  kWarmUp,      // steps of the optimizer's own warm-up; 0: none
  kUnits,       // of the hidden layer
  kSettings
};

constexpr int kInputs = LO_NUM_INPUTS, kMostUnits = LO_MOST_UNITS;
constexpr float kTiny2 = float(LO_TINY * LO_TINY);
constexpr float kLargestGrad = float(LO_LARGEST_GRAD), kLargestRatio = float(LO_LARGEST_RATIO);
constexpr float kFastRate = float(1 - LO_FAST_BETA), kSlowRate = float(1 - LO_SLOW_BETA);
constexpr float kSquareRate = float(1 - LO_SQUARE_BETA);
constexpr double kPi = 3.14159265358979323846;

// Sums are float32 within a block and float64 across blocks. So their relative errors stay near
// 1e-6 for tensors of any size.
constexpr int64_t kBlock = 1024;
// Coordinates that a thread takes at a time. Each chunk has its own sums, so that the order of
// additions does not depend on the threads.
constexpr int64_t kChunk = 32 * kBlock;
// Least number of coordinates per thread. Starting a thread costs tens of microseconds, waking one
// of OpenMP's a few.
constexpr int64_t kPerNewThread = 4 * kChunk, kPerThread = kChunk;

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
  // Without branches, so that it becomes vector code; without float32 denormals, so that
  // processors that flush them give the same result.
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
LO_INLINE void narrow(float x, float& to) { to = x; }
LO_INLINE void narrow(double x, double& to) { to = x; }

LO_INLINE void narrow(float x, BFloat16& to) {
  const uint32_t bits = as_bits(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

LO_INLINE void narrow(float x, Float16& to) {
  const uint32_t bits = as_bits(x), sign = bits & 0x80000000u, a = bits ^ sign;
  const uint32_t magic = uint32_t(127 - 15 + 23 - 10 + 1) << 23;  // rounds denormals by adding
  const uint32_t denormal = as_bits(as_float(a) + as_float(magic)) - magic;
  const uint32_t normal = (a - (uint32_t(127 - 15) << 23) + 0xfff + ((a >> 13) & 1)) >> 13;
  const uint32_t special = a > 0x7f800000u ? 0x7e00 : 0x7c00;
  const uint32_t magnitude =
      a >= (uint32_t(127 + 16) << 23) ? special : (a < (uint32_t(113) << 23) ? denormal : normal);
  to.bits = uint16_t(magnitude | sign >> 16);
}

// Numbers of a tensor that the loop over its coordinates reads.
struct Gains {
  float sign;
  float fast_correction, slow_correction, square_correction;  // 1 / (1 - beta^t), t with this step
  float fast_before, slow_before;  // the same without this step; 0 at the first
  float fast, slow, grad, cautious;
  double decay;  // factor on coordinates that have a gradient
};

struct Tensor {
  int64_t size;
  uint8_t type;
  void* pointers[kPointers];
  const double* constants;

  template <class T = float>
  LO_INLINE T* at(Pointer row, int64_t offset = 0) const {
    return static_cast<T*>(pointers[row]) + offset;
  }
};

// Coordinates begin..end of a tensor, and their sums.
struct Chunk {
  const Tensor* tensor;
  const Gains* gains;
  int64_t begin, end;
  double sums[kSums];
};

// The parameter after weight decay, which spares coordinates without a gradient. It is not rounded:
// decay and update together are one rounding.
template <class P, class W>
LO_INLINE W decayed(P param, float grad, W decay) {
  return grad != 0.0f ? widen(param) * decay : widen(param);
}

// NaN and infinity count as zero; sums of squares of the others fit into float32.
template <class P, class W>
LO_INLINE float sanitized(P grad, W sign, W largest) {
  W wide = widen(grad) * sign;
  wide = wide - wide == W(0) ? wide : W(0);
  return float(std::min(std::max(wide, -largest), largest));
}

// One block of coordinates of parameter type P and state type S. The pragma permits sums in as many
// lanes as the processor has; otherwise only -ffast-math would. With `kApart` the update is written
// to `update`, and the parameter only decays.
template <bool kApart, class P, class S>
LO_INLINE void block(int64_t n, P* LO_RESTRICT param, const P* LO_RESTRICT grad,
                     float* LO_RESTRICT update, S* LO_RESTRICT fast, S* LO_RESTRICT slow, S* LO_RESTRICT square,
                     const Gains& gains, double* sums) {
  using W = decltype(widen(P{}));
  const Gains k = gains;  // a copy: stores through the pointers above cannot change it
  const W sign = W(k.sign), largest = W(kLargestGrad);
  const W decay = W(k.decay);
  float param2 = 0, square1 = 0, fast2 = 0, slow2 = 0, r1 = 0, ratio_fast2 = 0, ratio_slow2 = 0;
  float ratio2 = 0, ratio_old_fast = 0, ratio_old_slow = 0, old_fast2 = 0, old_slow2 = 0, live = 0;

#pragma omp simd reduction(+ : param2, square1, fast2, slow2, r1, ratio_fast2, ratio_slow2, ratio2, \
                               ratio_old_fast, ratio_old_slow, old_fast2, old_slow2, live)
  for (int64_t i = 0; i < n; ++i) {
    const float g = sanitized(grad[i], sign, largest);
    const float fast_old = widen(fast[i]), slow_old = widen(slow[i]), square_old = widen(square[i]);
    const float fast_new = fast_old + (g - fast_old) * kFastRate;
    const float slow_new = slow_old + (g - slow_old) * kSlowRate;
    const float square_new = square_old + (g * g - square_old) * kSquareRate;
    narrow(fast_new, fast[i]);
    narrow(slow_new, slow[i]);
    narrow(square_new, square[i]);

    const float v = square_new * k.square_correction, r = std::sqrt(v + kTiny2);
    const float inverse = 1.0f / r;
    const float f = fast_new * k.fast_correction, s = slow_new * k.slow_correction;
    const float rf = f * inverse, rs = s * inverse;
    const float rg = std::min(std::max(g * inverse, -kLargestRatio), kLargestRatio);
    const float old_f = fast_old * k.fast_before * inverse;
    const float old_s = slow_old * k.slow_before * inverse;
    const float cautious = rf * g > 0.0f ? rf : 0.0f;
    const float step = k.fast * rf + k.slow * rs + k.grad * rg + k.cautious * cautious;
    const W before = decayed(param[i], g, decay);
    narrow(kApart ? before : before + W(step), param[i]);
    if (kApart) update[i] = step;
    const float q = float(before);

    param2 += q * q;
    square1 += v;
    fast2 += f * f;
    slow2 += s * s;
    r1 += r;
    ratio_fast2 += rf * rf;
    ratio_slow2 += rs * rs;
    ratio2 += rg * rg;
    ratio_old_fast += rg * old_f;
    ratio_old_slow += rg * old_s;
    old_fast2 += old_f * old_f;
    old_slow2 += old_s * old_s;
    live += g != 0.0f ? 1.0f : 0.0f;
  }
  // In the order of Sum.
  const float block_sums[kSums] = {param2, square1, fast2, slow2, r1, ratio_fast2, ratio_slow2,
                                   ratio2, ratio_old_fast, ratio_old_slow, old_fast2, old_slow2,
                                   live};
  for (int q = 0; q < kSums; ++q) sums[q] += block_sums[q];
}

// Sum of the squares of the parameters after weight decay.
template <class P>
LO_INLINE double param_squares(int64_t n, const P* LO_RESTRICT param, const P* LO_RESTRICT grad,
                               const Gains& gains) {
  using W = decltype(widen(P{}));
  const W decay = W(gains.decay), largest = W(kLargestGrad);
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const float q = float(decayed(param[i], sanitized(grad[i], W(1), largest), decay));
    sum += q * q;
  }
  return sum;
}

// What depends on the types of a tensor's parameter and state.
struct Type {
  void (*block)(int64_t, const Tensor&, int64_t, const Gains&, double*);
  double (*squares)(int64_t, const Tensor&, int64_t, const Gains&);
  int64_t param_bytes, state_bytes;
};

// Templates cannot have LO_CLONES: plain functions per pair of types.
#define LO_TYPE(NAME, P, S)                                                                      \
  LO_CLONES void block_##NAME(int64_t n, const Tensor& t, int64_t at, const Gains& gains,        \
                              double* sums) {                                                    \
    P* const param = t.at<P>(kParam, at);                                                        \
    const P* const grad = t.at<P>(kGrad, at);                                                    \
    S *const fast = t.at<S>(kFast, at), *const slow = t.at<S>(kSlow, at);                        \
    S* const square = t.at<S>(kSquare, at);                                                      \
    if (t.pointers[kUpdate] != nullptr)                                                          \
      block<true>(n, param, grad, t.at(kUpdate, at), fast, slow, square, gains, sums);           \
    else                                                                                         \
      block<false>(n, param, grad, nullptr, fast, slow, square, gains, sums);                    \
  }                                                                                              \
  LO_CLONES double squares_##NAME(int64_t n, const Tensor& t, int64_t at, const Gains& gains) {  \
    return param_squares(n, t.at<const P>(kParam, at), t.at<const P>(kGrad, at), gains);         \
  }                                                                                              \
  constexpr Type NAME = {block_##NAME, squares_##NAME, sizeof(P), sizeof(S)};
LO_TYPE(float32, float, float)
LO_TYPE(float64, double, float)
LO_TYPE(bfloat16, BFloat16, float)
LO_TYPE(float16, Float16, float)
LO_TYPE(float32_half_state, float, BFloat16)
LO_TYPE(float64_half_state, double, BFloat16)
LO_TYPE(bfloat16_half_state, BFloat16, BFloat16)
LO_TYPE(float16_half_state, Float16, BFloat16)
#undef LO_TYPE

// By type code, see kernels/_cpu.py.
constexpr Type kTypes[] = {float32,
                           float64,
                           bfloat16,
                           float16,
                           float32_half_state,
                           float64_half_state,
                           bfloat16_half_state,
                           float16_half_state};
constexpr int kTypeCount = sizeof kTypes / sizeof *kTypes;

void run_chunk(Chunk& chunk) {
  const auto run = kTypes[chunk.tensor->type].block;
  double sums[kSums] = {};  // not chunk.sums, whose line of the cache other threads may write
  for (int64_t at = chunk.begin; at < chunk.end; at += kBlock)
    run(std::min(kBlock, chunk.end - at), *chunk.tensor, at, *chunk.gains, sums);
  std::copy(sums, sums + kSums, chunk.sums);
}

void run_chunks(std::vector<Chunk>& chunks, int64_t coordinates, int threads) {
  const int64_t worth = openmp_parallel.load() == nullptr ? kPerNewThread : kPerThread;
  const int64_t useful = std::min<int64_t>(coordinates / worth, int64_t(chunks.size()));
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
  in_parallel(helpers, work);
}

double clamp(double x, double low, double high) { return std::min(std::max(x, low), high); }
double log_ratio(double x, double reference) {
  return std::log(clamp(x / (reference + kTiny2), 1e-7, 1e7));
}
// 1 - beta^t; expm1 keeps the digits that the difference would lose.
double bias_correction(double beta, double t) { return -std::expm1(t * std::log(beta)); }

double first_rms(const Tensor& tensor, const Gains& gains) {
  double total = 0;
  const auto squares = kTypes[tensor.type].squares;
  for (int64_t at = 0; at < tensor.size; at += kBlock)
    total += squares(std::min(kBlock, tensor.size - at), tensor, at, gains);
  return std::sqrt(total / double(std::max<int64_t>(1, tensor.size)));
}

// The network's inputs, in the order of network_inputs in rules/_history.py. `rms` and `first` are
// root mean squares of the parameters: of the step before, and of the first.
void inputs_of(const Tensor& tensor, double total, double rms, double first, float* x) {
  const float* z = tensor.at(kStatsOf);
  const double t = *tensor.at(kStepOf);
  const double natural = tensor.constants[kInitScale];
  const bool started = t > 0, known = total > 0;
  const double progress = known ? std::min(t / total, 1.0) : 0.0;
  const auto average = [&](Stat stat, double beta) {
    return started ? z[stat] / bias_correction(beta, t) : 0.0;
  };
  const auto seen = [&](double value) { return started ? value : 0.0; };
  const auto told = [&](double value) { return known ? value : 0.0; };
  const double inputs[] = {
      std::log(std::max(rms / natural, std::exp(-8.0))) / 4,
      tensor.constants[kLogFanIn] / 4 - 1,
      std::log(double(std::max<int64_t>(1, tensor.size))) / 6 - 1,
      tensor.constants[kVector],
      std::log(std::min(t, LO_LARGEST_COUNT) + 1) / 4 - 1,
      std::exp(-t / 10),
      told(1),
      progress,
      told(std::log(1.02 - progress) / 2),
      told(std::log(std::min(total, LO_LARGEST_COUNT)) / 4 - 1.5),
      seen(z[kStatFastShare] / 4),
      seen(z[kStatSlowShare] / 4),
      seen(z[kStatFastSignal] / 4),
      seen(z[kStatSlowSignal] / 4),
      seen(z[kStatInequality] / 4),
      average(kStatFastCorrelation, LO_SHORT_BETA),
      average(kStatMeanCorrelation, LO_LONG_BETA),
      average(kStatSlowCorrelation, LO_SHORT_BETA),
      seen(std::log(average(kStatLive, LO_SHORT_BETA) + 1e-3) / 4),
      std::log(std::max(rms, 1e-8) / std::max(first, 0.01 * natural)) / 2,
      seen((double(z[kStatLevel]) - z[kStatMeanLevel]) / 4),
      z[kStatConfidence] / 4,
      tensor.pointers[kUpdate] != nullptr ? 1.0 : 0.0,  // of rotated matrices
  };
  static_assert(sizeof inputs == kInputs * sizeof(double));
  for (int i = 0; i < kInputs; ++i) x[i] = float(inputs[i]);
}

void respond(const Tensor& tensor, int units, const float* x, float* outputs) {
  const float *weight = tensor.at(kHidden), *bias = tensor.at(kHiddenBias);
  const float *readout = tensor.at(kReadout), *direct = tensor.at(kDirect);
  float hidden[kMostUnits];
  for (int u = 0; u < units; ++u) {
    float sum = bias[u];
    for (int j = 0; j < kInputs; ++j) sum += weight[u * kInputs + j] * x[j];
    hidden[u] = std::tanh(sum);
  }
  for (int o = 0; o < kOutputs; ++o) {
    float sum = tensor.at(kReadoutBias)[o];
    for (int u = 0; u < units; ++u) sum += readout[o * units + u] * hidden[u];
    for (int j = 0; j < kInputs; ++j) sum += direct[o * kInputs + j] * x[j];
    outputs[o] = sum;
  }
}

// Linear warm-up; with a known length of the run, a cosine to its end as well.
double schedule(double t, double total) {
  if (!(total > 0)) return std::min(1.0, (t + 1) / LO_WARMUP_STEPS);
  const double warm_up = clamp(LO_WARMUP_SHARE * total, LO_SHORTEST_WARMUP, LO_LONGEST_WARMUP);
  const double fall = 0.5 * (1 + std::cos(kPi * std::min(1.0, (t + 1) / (total + 1))));
  return std::min(1.0, (t + 1) / warm_up) * std::max(LO_LAST_RATE, fall);
}

Gains gains_of(const Tensor& tensor, const double* settings) {
  float x[kInputs], out[kOutputs];
  const float* stats = tensor.at(kStatsOf);
  const double t = *tensor.at(kStepOf), natural = tensor.constants[kInitScale], lr = settings[kLr];
  const double rate = schedule(t, settings[kTotalSteps]), confidence = stats[kStatConfidence];
  Gains k;
  k.decay = 1 - settings[kDecay] * lr * std::pow(rate, LO_DECAY_POWER) * std::exp(confidence);
  // At the first step both are measured now.
  const double at_first = t > 0 ? stats[kStatFirstRms] : first_rms(tensor, k);
  const double rms = t > 0 ? stats[kStatRms] : at_first;
  inputs_of(tensor, settings[kTotalSteps], rms, at_first, x);
  respond(tensor, int(settings[kUnits]), x, out);
  const double single = tensor.size == 1 ? LO_SINGLE_SHARE : 1.0;
  const double least = LO_SMALLEST_SHARE * natural;
  const double scale = single * std::max(std::min(rms, LO_LARGEST_SCALE), least);
  const double ramp = settings[kWarmUp] > 0 ? std::min(1.0, (t + 1) / settings[kWarmUp]) : 1.0;
  const double factor = LO_STEP_BOUND * std::tanh(out[kStepSize] / LO_STEP_BOUND);
  const auto bounded = [](double gain) { return LO_MIX_BOUND * std::tanh(gain / LO_MIX_BOUND); };
  const double fast = 1 + bounded(out[kFastGain]), slow = bounded(out[kSlowGain]);
  const double grad = bounded(out[kGradGain]), cautious = bounded(out[kCautiousGain]);
  // Root mean square of the directions' sum, at most, by the statistics of the step before.
  const double length = std::abs(fast + cautious) * std::exp(0.5 * stats[kStatFastSignal]) +
                        std::abs(slow) * std::exp(0.5 * stats[kStatSlowSignal]) + std::abs(grad);
  const double longest = LO_LONGEST_STEP * single * std::max(rms, least) / length;
  const double size = -lr * ramp *
      std::min(LO_BASE_STEP * rate * scale * std::exp(factor + confidence), longest);
  k.sign = float(settings[kSign]);
  k.fast_correction = float(1 / bias_correction(LO_FAST_BETA, t + 1));
  k.slow_correction = float(1 / bias_correction(LO_SLOW_BETA, t + 1));
  k.square_correction = float(1 / bias_correction(LO_SQUARE_BETA, t + 1));
  k.fast_before = t > 0 ? float(1 / bias_correction(LO_FAST_BETA, t)) : 0.0f;
  k.slow_before = t > 0 ? float(1 / bias_correction(LO_SLOW_BETA, t)) : 0.0f;
  k.fast = float(size * fast);
  k.slow = float(size * slow);
  k.grad = float(size * grad);
  k.cautious = float(size * cautious);
  return k;
}

// The log of the step confidence after a step. It grows with the correlation of gradient and
// momentum. Once saturated, which a value above the floor shows, it falls in runs of unknown length
// with that correlation, and in runs of known length where gradients grow and oppose each other.
float next_confidence(double log, double agreement, double mean_agreement, double growth, double t,
                      bool known) {
  const double floor = std::max(LO_CONFIDENCE_START, -0.5 * std::log(1 + t / LO_WARMUP_STEPS));
  if (!(t >= LO_WARMUP_STEPS && log >= floor)) {
    const double gain = log < 0 ? LO_CONFIDENCE_GAIN : 0.0;
    return float(clamp(log + gain * agreement, LO_CONFIDENCE_START, 0));
  }
  double change = LO_UNKNOWN_GAIN * agreement;
  if (known) {
    const bool opposed = mean_agreement < -LO_LEAST_OPPOSITION;
    const double lost = opposed ? LO_GROWTH_LOSS * std::max(0.0, growth - LO_LEAST_GROWTH) : 0.0;
    change = agreement > 0 ? LO_KNOWN_GAIN * agreement : -lost;
  }
  return float(clamp(log + change, floor, 0));
}

void update_stats(const Tensor& tensor, bool known, const double* sums) {
  float *z = tensor.at(kStatsOf), *step = tensor.at(kStepOf);
  const double t = *step;
  const bool started = t > 0;
  const double n = double(std::max<int64_t>(1, tensor.size));
  double mean[kSums];
  for (int q = 0; q < kSums; ++q) mean[q] = sums[q] / n;
  const auto average = [&](Stat stat, double beta, double value) {
    z[stat] = float(value + beta * (z[stat] - value));
  };
  z[kStatRms] = float(std::sqrt(mean[kSumParam2]));
  if (!started) z[kStatFirstRms] = z[kStatRms];
  if (mean[kSumSquare] > 0) {  // statistics of gradients begin with the first gradient
    const double level = std::log(mean[kSumSquare] + kTiny2);
    const double growth = started ? float(level) - z[kStatMeanLevel] : 0.0f;
    z[kStatLevel] = float(level);
    average(kStatMeanLevel, started ? LO_LONG_BETA : 0.0, level);
    z[kStatFastShare] = float(log_ratio(mean[kSumFast2], mean[kSumSquare]));
    z[kStatSlowShare] = float(log_ratio(mean[kSumSlow2], mean[kSumSquare]));
    z[kStatFastSignal] = float(std::log(mean[kSumRatioFast2] + 1e-4));
    z[kStatSlowSignal] = float(std::log(mean[kSumRatioSlow2] + 1e-4));
    z[kStatInequality] = float(log_ratio(mean[kSumR] * mean[kSumR], mean[kSumSquare]));
    const double with_fast =
        mean[kSumRatioOldFast] / std::sqrt(mean[kSumRatio2] * mean[kSumOldFast2] + 1e-20);
    const double with_slow =
        mean[kSumRatioOldSlow] / std::sqrt(mean[kSumRatio2] * mean[kSumOldSlow2] + 1e-20);
    average(kStatFastCorrelation, LO_SHORT_BETA, with_fast);
    average(kStatMeanCorrelation, LO_LONG_BETA, with_fast);
    average(kStatSlowCorrelation, LO_SHORT_BETA, with_slow);
    average(kStatLive, LO_SHORT_BETA, mean[kSumLive]);
    const double agreement =
        clamp(with_fast / std::sqrt(std::max(mean[kSumLive], 1e-3)), -1, 1);
    const double mean_agreement = z[kStatMeanCorrelation] / bias_correction(LO_LONG_BETA, t + 1);
    z[kStatConfidence] =
        next_confidence(z[kStatConfidence], agreement, mean_agreement, growth, t, known);
  }
  *step += 1;
}

int check(const std::vector<Tensor>& tensors, int64_t units) {
  std::vector<Range> ranges;
  ranges.reserve(kPointers * tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& t = tensors[i];
    const int64_t n = t.size, p = kTypes[t.type].param_bytes, s = kTypes[t.type].state_bytes;
    constexpr int64_t f = sizeof(float);
    // By Pointer: how many numbers, and bytes of each.
    const int64_t counts[kPointers] = {
        n, n, n, n, n, n, kStats, 1, units * kInputs, units, kOutputs * units, kOutputs,
        kOutputs * kInputs};
    const int64_t items[kPointers] = {p, p, f, s, s, s, f, f, f, f, f, f, f};
    // Most tensors share a network.
    const bool checked = i > 0 && tensors[i - 1].pointers[kHidden] == t.pointers[kHidden];
    for (int row = 0; row < (checked ? kHidden : kPointers); ++row) {
      if (row == kUpdate && t.pointers[row] == nullptr) continue;
      const bool written = row < kHidden && row != kGrad;
      if (!take(ranges, t.pointers[row], counts[row], items[row], written)) return kBadPointer;
    }
  }
  return overlapping(ranges) ? kOverlap : kOk;
}

}  // namespace

LO_EXPORT const char* lo_source() { return LO_SOURCE; }

// Sets the address of GOMP_parallel for later calls; null: each call starts its own threads.
LO_EXPORT void lo_use_openmp(void* parallel) {
  openmp_parallel.store(reinterpret_cast<Parallel>(parallel));
}

// One step of m tensors. `pointers` has a row of m addresses for each Pointer, `constants` a row of
// kConstants numbers for each tensor, `settings` one for each Setting. Returns a Code; unless it is
// kOk, nothing has been written.
LO_EXPORT int32_t lo_step(int64_t m, const int64_t* sizes, const uint8_t* types,
                          const uint64_t* pointers, const double* constants,
                          const double* settings, int32_t threads) try {
  const double units = settings[kUnits];
  if (!(units >= 1 && units <= kMostUnits)) return kBadType;
  std::vector<Tensor> tensors;
  tensors.reserve(size_t(m));
  int64_t coordinates = 0, chunk_count = 0;
  for (int64_t i = 0; i < m; ++i) {
    if (types[i] >= kTypeCount || sizes[i] < 0) return kBadType;
    Tensor tensor{sizes[i], types[i], {}, constants + kConstants * i};
    for (int row = 0; row < kPointers; ++row)
      tensor.pointers[row] = reinterpret_cast<void*>(uintptr_t(pointers[row * m + i]));
    tensors.push_back(tensor);
    coordinates += sizes[i];
    chunk_count += (sizes[i] + kChunk - 1) / kChunk;
  }
  if (const int code = check(tensors, int64_t(units))) return code;

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
    update_stats(tensor, settings[kTotalSteps] > 0, sums);
  }
  return kOk;
} catch (...) {  // out of memory, before anything was written
  return kNoMemory;
}
