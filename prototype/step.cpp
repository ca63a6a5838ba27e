// One step of the horizon rule for m tensors: features -> network -> coordinates -> statistics.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {
constexpr int kFeatures = 21, kUnits = 16, kOutputs = 5, kStats = 14;
constexpr float kTiny2 = 1e-30f, kLargest = 281474976710656.0f;  // 2^48
constexpr int kBlock = 2048;

struct Sums { double g2, v, f2, s2, r, p2, nf2, ns2, ng2, a1, a2, of2, os2, live; };

struct Coefs { float bf, bs, bv, bfo, bso, c1, c2, c3, c4, decay, sign; float beta_f, beta_s, beta_v; };

// Sixteen-lane partial sums keep float32 accumulation short (kBlock / 16 terms per lane).
#define LANES 16

template <bool dummy>
__attribute__((always_inline)) inline void block(
    int64_t n, float* __restrict p, const float* __restrict g, float* __restrict f,
    float* __restrict s, float* __restrict v, const Coefs& k, Sums& out) {
  float a[14][LANES] = {};
  int64_t i = 0;
  auto one = [&](int64_t j, int l) __attribute__((always_inline)) {
    float x = g[j] * k.sign;
    x = (x - x == 0.0f) ? x : 0.0f;
    x = std::min(std::max(x, -kLargest), kLargest);
    const float fo = f[j], so = s[j];
    const float fn = fo + (x - fo) * (1.0f - k.beta_f);
    const float sn = so + (x - so) * (1.0f - k.beta_s);
    const float vn = v[j] * k.beta_v + x * x * (1.0f - k.beta_v);
    f[j] = fn; s[j] = sn; v[j] = vn;
    const float vh = vn * k.bv, r = std::sqrt(vh + kTiny2), ir = 1.0f / r;
    const float fh = fn * k.bf, sh = sn * k.bs;
    const float F = fh * ir, S = sh * ir, G0 = x * ir;
    const float G = std::min(std::max(G0, -3.0f), 3.0f);
    const float FO = fo * k.bfo * ir, SO = so * k.bso * ir;
    const float C = F * x > 0.0f ? F : 0.0f;
    const float q = p[j];
    p[j] = q * k.decay + (k.c1 * F + k.c2 * S + k.c3 * G + k.c4 * C);
    a[0][l] += x * x; a[1][l] += vh; a[2][l] += fh * fh; a[3][l] += sh * sh; a[4][l] += r;
    a[5][l] += q * q; a[6][l] += F * F; a[7][l] += S * S; a[8][l] += G * G;
    a[9][l] += G * FO; a[10][l] += G * SO; a[11][l] += FO * FO; a[12][l] += SO * SO;
    a[13][l] += x != 0.0f ? 1.0f : 0.0f;
  };
  for (; i + LANES <= n; i += LANES)
    for (int l = 0; l < LANES; ++l) one(i + l, l);
  for (int l = 0; i < n; ++i, ++l) one(i, l);
  double t[14];
  for (int q = 0; q < 14; ++q) { double z = 0; for (int l = 0; l < LANES; ++l) z += a[q][l]; t[q] = z; }
  out.g2 += t[0]; out.v += t[1]; out.f2 += t[2]; out.s2 += t[3]; out.r += t[4]; out.p2 += t[5];
  out.nf2 += t[6]; out.ns2 += t[7]; out.ng2 += t[8]; out.a1 += t[9]; out.a2 += t[10];
  out.of2 += t[11]; out.os2 += t[12]; out.live += t[13];
}

__attribute__((target_clones("avx512f", "arch=haswell", "default")))
void run_block(int64_t n, float* p, const float* g, float* f, float* s, float* v, const Coefs& k, Sums& out) {
  block<true>(n, p, g, f, s, v, k, out);
}

double lg(double x, double y) { return std::log(std::min(std::max(x / y, 1e-7), 1e7)); }

}  // namespace

extern "C" int lo_sizes(int* out) { out[0] = kFeatures; out[1] = kUnits; out[2] = kOutputs; out[3] = kStats; return 0; }

// consts per tensor: natural scale, log fan-in, is vector, lr, weight decay, total steps (0: unknown), step (before)
extern "C" void lo_step(int64_t m, const int64_t* n, float** p, const float** g, float** f, float** s,
                        float** v, float** stats, const float** weights, const double* consts, double sign,
                        double base, double warm_fraction, double* log_out) {
  for (int64_t i = 0; i < m; ++i) {
    const double* c = consts + 7 * i;
    const double natural = c[0], log_fan_in = c[1], is_vector = c[2], lr = c[3], wd = c[4], T = c[5], t = c[6];
    float* z = stats[i];
    const double rms = t > 0 ? z[1] : z[0];
    auto debias = [&](double e, double beta) { return t > 0 ? e / (1.0 - std::pow(beta, t)) : 0.0; };
    const double p_ = T > 0 ? std::min(t / T, 1.0) : 0.0;
    float x[kFeatures];
    x[0] = std::log(std::max(rms / natural, std::exp(-8.0))) / 4;
    x[1] = log_fan_in / 4 - 1;
    x[2] = std::log((double)std::max<int64_t>(1, n[i])) / 6 - 1;
    x[3] = is_vector;
    x[4] = std::log(std::min(t, 10000.0) + 1) / 4 - 1;
    x[5] = std::exp(-t / 10);
    x[6] = T > 0 ? 1.0 : 0.0;
    x[7] = p_;
    x[8] = T > 0 ? std::log(1.02 - p_) / 2 : 0.0;
    x[9] = T > 0 ? std::log(std::min(T, 10000.0)) / 4 - 1.5 : 0.0;
    x[10] = t > 0 ? z[4] / 4 : 0.0;
    x[11] = t > 0 ? z[5] / 4 : 0.0;
    x[12] = t > 0 ? z[6] / 4 : 0.0;
    x[13] = t > 0 ? z[7] / 4 : 0.0;
    x[14] = t > 0 ? z[8] / 4 : 0.0;
    x[15] = debias(z[9], 0.9);
    x[16] = debias(z[10], 0.99);
    x[17] = debias(z[11], 0.9);
    x[18] = t > 0 ? std::log(debias(z[12], 0.9) + 1e-3) / 4 : 0.0;
    x[19] = std::log(std::max(rms, 1e-8) / std::max((double)z[0], 1e-2 * natural)) / 2;
    x[20] = t > 0 ? (z[2] - z[3]) / 4 : 0.0;
    const float *w1 = weights[i], *b1 = w1 + kUnits * kFeatures, *w2 = b1 + kUnits, *b2 = w2 + kOutputs * kUnits, *d = b2 + kOutputs;
    float h[kUnits], o[kOutputs];
    for (int u = 0; u < kUnits; ++u) {
      float q = b1[u];
      for (int j = 0; j < kFeatures; ++j) q += w1[u * kFeatures + j] * x[j];
      h[u] = std::tanh(q);
    }
    for (int u = 0; u < kOutputs; ++u) {
      float q = b2[u];
      for (int j = 0; j < kUnits; ++j) q += w2[u * kUnits + j] * h[j];
      for (int j = 0; j < kFeatures; ++j) q += d[u * kFeatures + j] * x[j];
      o[u] = q;
    }
    const double W = T > 0 ? std::min(std::max(warm_fraction * T, 10.0), 250.0) : 50.0;
    double sched = std::min(1.0, (t + 1) / W);
    if (T > 0) sched *= std::max(0.01, 0.5 * (1 + std::cos(M_PI * std::min(1.0, (t + 1) / (T + 1)))));
    const double scale = std::max(std::min(rms, 0.1), natural);
    const double c0 = -lr * sched * scale * base * std::exp(3 * std::tanh(o[0] / 3));
    auto bounded = [](double b) { return 2 * std::tanh(b / 2); };
    Coefs k;
    const double t1 = t + 1;
    k.beta_f = 0.9f; k.beta_s = 0.99f; k.beta_v = 0.99f;
    k.bf = 1 / (1 - std::pow(0.9, t1)); k.bs = 1 / (1 - std::pow(0.99, t1)); k.bv = k.bs;
    k.bfo = t > 0 ? 1 / (1 - std::pow(0.9, t)) : 0; k.bso = t > 0 ? 1 / (1 - std::pow(0.99, t)) : 0;
    k.c1 = c0 * (1 + bounded(o[1])); k.c2 = c0 * bounded(o[2]); k.c3 = c0 * bounded(o[3]); k.c4 = c0 * bounded(o[4]);
    k.decay = 1 - 1e-3 * lr * wd; k.sign = sign;
    Sums a{};
    for (int64_t at = 0; at < n[i]; at += kBlock) {
      const int64_t len = std::min<int64_t>(kBlock, n[i] - at);
      run_block(len, p[i] + at, g[i] + at, f[i] + at, s[i] + at, v[i] + at, k, a);
    }
    const double N = std::max<double>(1, n[i]);
    z[1] = std::sqrt(a.p2 / N);
    if (a.v > 0) {
      z[2] = std::log(a.v / N + 1e-30);
      z[3] = t > 0 ? z[3] + 0.01f * (z[2] - z[3]) : z[2];
      z[4] = lg(a.f2, a.v); z[5] = lg(a.s2, a.v);
      z[6] = std::log(a.nf2 / N + 1e-4); z[7] = std::log(a.ns2 / N + 1e-4);
      z[8] = lg(a.r * a.r / N, a.v);
      const double q1 = a.a1 / std::sqrt(a.ng2 * a.of2 + 1e-20), q2 = a.a2 / std::sqrt(a.ng2 * a.os2 + 1e-20);
      z[9] += 0.1f * (float)(q1 - z[9]); z[10] += 0.01f * (float)(q1 - z[10]); z[11] += 0.1f * (float)(q2 - z[11]);
      z[12] += 0.1f * (float)(a.live / N - z[12]);
    }
    if (log_out) { for (int j = 0; j < kFeatures; ++j) log_out[i * 32 + j] = x[j]; for (int j = 0; j < kOutputs; ++j) log_out[i * 32 + kFeatures + j] = o[j]; log_out[i*32+30]=c0; log_out[i*32+31]=sched; }
  }
}
