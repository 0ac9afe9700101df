// The mathematics of one row, for host and device. MATH: a row is one token position with policy logits z,
// reference logits r, p = softmax(z / T), q = softmax(r / T), a set R of removed tokens (n of them) and the target
// q* (q without R, renormalised). Natural logarithms throughout; 1/T and log2(e) are folded into `exponent_scale`.
//
// Three stages, each a set of plain functions:
//   1. row statistics   (max, scaled sum, moment) over any slice of the vocabulary; mergeable
//   2. row coefficients statistics + the row's scalars -> the few numbers that loss and gradient need
//   3. row elements     loss and gradient of one vocabulary entry, side by side under their formula
// Before them stands what a call says of a row, beside them the rule for what is undefined and a row's diagnostics.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "call.h"

#if defined(__CUDACC__)
#define TNT_FN __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define TNT_FN inline __attribute__((always_inline))
#else
#define TNT_FN inline
#endif

// Every instruction set gets a namespace of its own: the same inline functions, compiled with other flags, would
// otherwise be merged by the linker, and an AVX-512 body could run on a machine without it.
#ifndef TNT_ISA
#define TNT_ISA host
#endif

namespace tnt {
inline namespace TNT_ISA {

enum RowLoss : int {  // as tnt_kernels.objectives.RowLoss
  NONE = 0,
  FORWARD_KL = 1,
  REVERSE_KL = 2,
  LOG_LIKELIHOOD = 3,
  UNLIKELIHOOD = 4,
  NEGATIVE_LIKELIHOOD = 5,
};
TNT_FN bool is_kl(int loss) { return loss == FORWARD_KL || loss == REVERSE_KL; }

// ------------------------------------------------------------------------------------- what a call says of its rows
// Real: what the call's weights, alpha and normaliser are stored in.

TNT_FN bool is_sharded(Kind kind) { return kind != Kind::FUSED && kind != Kind::BACKWARD; }
TNT_FN bool is_first(Kind kind) { return kind == Kind::FUSED || kind == Kind::STATISTICS; }  // launch of its rows

template <class Real>
TNT_FN Real row_weight(const RowCall& p, int64_t row) {
  return p.weights ? static_cast<const Real*>(p.weights)[row] : Real(1);
}

// A row counts if it has a label and a weight other than 0. The others are not read, and their gradient is 0.
template <class Number>
TNT_FN bool is_active(const RowCall& p, int64_t label, Number weight) {
  return label != p.ignore_index && weight != 0;
}
template <class Real>
TNT_FN bool is_active(const RowCall& p, int64_t row) {
  return is_active(p, p.labels[row], row_weight<Real>(p, row));
}

// What a row's loss is multiplied by: w on positive rows, alpha on negative ones, alpha |w| by UL and NL where w < 0.
template <class Real, class Number>
TNT_FN Number row_factor(const RowCall& p, int64_t row, int loss, bool negative, Number weight) {
  if (!negative) return weight;
  Number factor = p.alpha ? Number(static_cast<const Real*>(p.alpha)[row * p.alpha_stride]) : Number(p.alpha_value);
  if ((loss == UNLIKELIHOOD || loss == NEGATIVE_LIKELIHOOD) && weight < 0) factor *= -weight;
  return factor;
}

// Without eps the two smoothings are one.
TNT_FN bool smooths_uniformly(const RowCall& p) { return p.uniform_smoothing && p.eps > 0; }

// MEAN divides by the number of active rows, unless the call says by what.
TNT_FN bool counts_active_rows(const RowCall& p) { return !p.normalizer && p.normalizer_value != p.normalizer_value; }
template <class Real>
TNT_FN double inverse_normalizer(const RowCall& p, double active_rows) {
  const double value = counts_active_rows(p) ? active_rows
                       : p.normalizer        ? double(*static_cast<const Real*>(p.normalizer))
                                             : p.normalizer_value;
  return value == 0 ? 0 : 1 / value;
}

// ------------------------------------------------------------------------------------------ elementary functions

// Contraction is off in the build and every fused multiply-add is written out, so that the two log-sum-exps of a row
// come from the same instructions and p = q gives exactly 0. Without FMA hardware, std::fma would be a library call.
TNT_FN float fused_multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
TNT_FN double fused_multiply_add(double a, double b, double c) { return a * b + c; }

template <class To, class From>
TNT_FN To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To result;
  memcpy(&result, &value, sizeof result);
  return result;
}

constexpr double LOG2_E = 1.4426950408889634074;
constexpr double LN_2 = 0.69314718055994530942;

// What (x - max) is multiplied by before exponential(): log2(e)/T where exponential is 2^x, 1/T where it is e^x.
template <class Real>
TNT_FN Real exponent_scale(double inverse_temperature);
template <>
TNT_FN float exponent_scale<float>(double inverse_temperature) {
  return static_cast<float>(LOG2_E * inverse_temperature);
}
template <>
TNT_FN double exponent_scale<double>(double inverse_temperature) {
  return inverse_temperature;
}

// Adding this rounds to the nearest integer k, and leaves k + 127, the exponent bits of 2^k, in the low bits of the
// sum.
constexpr float ROUNDER = 12582912.0f + 127.0f;
TNT_FN float power_of_two(float shifted) { return bits_as<float>(bits_as<uint32_t>(shifted) << 23); }  // -127: 0.0f

// 2^x for x < 128, 0 below -127 (-inf gives exactly 0), NaN for NaN. Relative error 1.6e-7, 0 at 0: x is split at the
// nearest integer, 2^fraction is a minimax polynomial.
TNT_FN float exponential(float x) {
#if defined(__CUDA_ARCH__)
  float y;  // one instruction of the special-function unit, where exp2f adds three for subnormal results; 2 ulp
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  x = -127.0f > x ? -127.0f : x;  // in this order: NaN stays
  const float shifted = x + ROUNDER;
  const float f = x - (shifted - ROUNDER);
  float y = 0x1.5bba14p-10f;
  y = fused_multiply_add(y, f, 0x1.3cea88p-7f);
  y = fused_multiply_add(y, f, 0x1.c6b752p-5f);
  y = fused_multiply_add(y, f, 0x1.ebf9bcp-3f);
  y = fused_multiply_add(y, f, 0x1.62e42ap-1f);
  y = fused_multiply_add(y, f, 1.0f);
  return y * power_of_two(shifted);
#endif
}
TNT_FN double exponential(double x) { return ::exp(x); }

// log x for x >= 0, -inf for 0. Relative error 2e-7 (near 1: of x - 1).
TNT_FN float logarithm(float x) {
#if defined(__CUDA_ARCH__)
  return logf(x);
#else
  const bool tiny = x < 0x1p-126f;
  const uint32_t bits = bits_as<uint32_t>(tiny ? x * 0x1p25f : x);
  const uint32_t centred = bits - 0x3f3504f3u;  // the mantissa then lies in [sqrt(1/2), sqrt(2))
  const float exponent = static_cast<float>(static_cast<int32_t>(centred) >> 23) - (tiny ? 25.0f : 0.0f);
  const float f = bits_as<float>((centred & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  float y = -0x1.3e9698p-4f;
  y = fused_multiply_add(y, f, 0x1.05ae04p-3f);
  y = fused_multiply_add(y, f, -0x1.0c9354p-3f);
  y = fused_multiply_add(y, f, 0x1.22bcb0p-3f);
  y = fused_multiply_add(y, f, -0x1.5485dap-3f);
  y = fused_multiply_add(y, f, 0x1.99a22ep-3f);
  y = fused_multiply_add(y, f, -0x1.00020ap-2f);
  y = fused_multiply_add(y, f, 0x1.555550p-2f);
  y = fused_multiply_add(y, f, -0x1.fffffep-2f);
  y = fused_multiply_add(y * f, f, f);
  y = fused_multiply_add(exponent, static_cast<float>(LN_2), y);
  return x > 0.0f ? (x < INFINITY ? y : x) : (x == 0.0f ? -INFINITY : NAN);
#endif
}
TNT_FN double logarithm(double x) { return ::log(x); }

// e^d - 1 and φ(d) = e^d - 1 - d for |d| < BOUNDED, both without cancellation near 0. Relative error 2e-7 (float), a
// few ulp (double); beyond the bound anything but a trap.
constexpr int BOUNDED = 16;
template <class Real>
struct Expm1 {
  Real value, phi;
};
TNT_FN Expm1<float> expm1_phi(float d) {
  const float shifted = fused_multiply_add(d, static_cast<float>(LOG2_E), ROUNDER);
  const float k = shifted - ROUNDER;
  const float f = fused_multiply_add(k, static_cast<float>(-LN_2), d), f2 = f * f;  // |f| < 0.35
  const float y01 = fused_multiply_add(f, 0x1.555556p-3f, 0.5f);                    // φ(f)/f²
  const float y23 = fused_multiply_add(f, 0x1.11114cp-7f, 0x1.5554eap-5f);
  const float y45 = fused_multiply_add(f, 0x1.a072c0p-13f, 0x1.6d42cap-10f);
  const float phi = fused_multiply_add(fused_multiply_add(y45, f2, y23), f2, y01) * f2;
  const float power = power_of_two(shifted);
  Expm1<float> result;
  result.value = fused_multiply_add(power, f + phi, power - 1.0f);
  result.phi = k == 0.0f ? phi : result.value - d;
  return result;
}
TNT_FN Expm1<double> expm1_phi(double d) {
  double y = 1.0;  // φ(d) = d²/2 (1 + d/3 (1 + d/4 (...)))
  for (int k = 19; k >= 3; --k) y = 1.0 + y * d / k;
  const double value = ::expm1(d);
  return {value, d < 1 && d > -1 ? 0.5 * y * d * d : value - d};
}

// log(1 + e^x), right at both ends.
TNT_FN double softplus(double x) {
  return x > 0 ? x + log1p(::exp(-x)) : log1p(::exp(x));  // +inf -> +inf, -inf -> 0, NaN -> NaN
}

// ---------------------------------------------------------------------------------- the difference of two rows' logits

// z - r without a common shift: ((z - z_max) - (r - r_max)) in exact arithmetic, up to a constant of the row.
//
// Next to p = q, z - r is exact and the difference of two differences to a maximum is not. Where one row is shifted
// against the other, z - r has lost the digits that those differences keep. So the maxima decide, once a row: z - r
// comes first where they are within CLOSE of each other.
constexpr int CLOSE = 1;

template <class Real>
TNT_FN bool are_close(Real z_max, Real r_max) {
  const Real distance = z_max - r_max;
  return distance <= Real(CLOSE) && distance >= Real(-CLOSE);
}

template <class Real>
struct Difference {
  Real z_ref, r_ref, centre;
  TNT_FN Difference(Real z_max, Real r_max) : z_ref(z_max), r_ref(r_max), centre(0) {
    if (!are_close(z_max, r_max)) return;
    centre = z_max - r_max;
    z_ref = r_ref = 0;
  }
  template <class Number>
  TNT_FN Number operator()(Number z, Number r) const {
    return (z - z_ref) - (r - r_ref) - centre;
  }
};

// What is to be subtracted from a Difference, as its centre, z_max - r_max, may have been rounded.
template <class Real>
TNT_FN double excess_of_difference(Real z_max, Real r_max) {
  return are_close(z_max, r_max) ? (double(z_max) - double(r_max)) - double(z_max - r_max) : 0;
}

// What z - r loses when its maxima move from (z_from, r_from) to (z_to, r_to): 0 where both move alike.
template <class Real>
TNT_FN Real moved(Real z_from, Real z_to, Real r_from, Real r_to) {
  if (are_close(z_from, r_from) && are_close(z_to, r_to)) return (z_from - r_from) - (z_to - r_to);
  return (z_from - z_to) - (r_from - r_to);
}

// -------------------------------------------------------------------------------------------- 1. row statistics

// Σ e^{(x - max)/T} over some entries, and optionally Σ e^{(x - max)/T} (x - max)/T. `max` is their maximum or near it,
// and says nothing where the sum is 0: there is no entry then, or none but -inf.
struct ExpSum {
  double max = -3.4028234663852886e38;  // of a sum of 0: any number that a float holds
  double sum = 0;
  double moment = 0;
};

TNT_FN ExpSum merge(const ExpSum& a, const ExpSum& b, double inverse_temperature) {
  if (b.sum == 0) return a;
  if (a.sum == 0) return b;
  if (a.max == b.max) return {a.max, a.sum + b.sum, a.moment + b.moment};
  ExpSum result;
  result.max = a.max < b.max ? b.max : a.max;
  const double shift_a = (a.max - result.max) * inverse_temperature;
  const double shift_b = (b.max - result.max) * inverse_temperature;
  const double scale_a = ::exp(shift_a), scale_b = ::exp(shift_b);
  result.sum = scale_a * a.sum + scale_b * b.sum;
  result.moment = 0;
  if (scale_a != 0) result.moment += scale_a * (a.moment + a.sum * shift_a);
  if (scale_b != 0) result.moment += scale_b * (b.moment + b.sum * shift_b);
  return result;
}

// The share of a part in the whole.
TNT_FN double share(const ExpSum& part, const ExpSum& whole, double inverse_temperature) {
  if (part.sum == 0 && whole.sum > 0) return 0;
  return part.sum * ::exp((part.max - whole.max) * inverse_temperature) / whole.sum;
}

struct RowStatistics {
  ExpSum policy;         // z over the kept entries (for LL, UL, NL: those outside the set)
  ExpSum reference;      // r over the same entries, with κ
  ExpSum policy_set;     // z over the set
  ExpSum reference_set;  // r over the set (diagnostics only)
  // Σ e^{(z - max)/T} x over the kept entries, x = ((z - max) - (r - reference's max))/T - log κ
  double kl_moment = 0;
  double policy_total = 0;                       // Σ (z - max)/T over the kept entries, for uniformly smoothed LL
  double kept = 0;                               // their number, by which policy_total merges
  double label_policy = 0, label_reference = 0;  // z_y and r_y where -1 < w < 0, in the slice that holds y; else 0
};

// Statistics of two slices. An infinite moment (a reference of -inf) whose weight underflows to 0 is nothing, not NaN.
TNT_FN RowStatistics merge(const RowStatistics& a, const RowStatistics& b, double inverse_temperature) {
  RowStatistics s;
  s.policy = merge(a.policy, b.policy, inverse_temperature);
  s.reference = merge(a.reference, b.reference, inverse_temperature);
  s.policy_set = merge(a.policy_set, b.policy_set, inverse_temperature);
  s.reference_set = merge(a.reference_set, b.reference_set, inverse_temperature);
  const RowStatistics* const slices[] = {&a, &b};
  for (const RowStatistics* slice : slices) {
    const double shift = (slice->policy.max - s.policy.max) * inverse_temperature;
    const double scale = shift == 0 ? 1 : ::exp(shift);
    if (slice->policy.sum != 0 && scale != 0) {
      // In this order: where the reference is masked by the lowest number, x alone is almost too large.
      const double x = moved(slice->policy.max, s.policy.max, slice->reference.max, s.reference.max);
      s.kl_moment += scale * slice->kl_moment + scale * slice->policy.sum * x * inverse_temperature;
    }
    if (slice->kept != 0) s.policy_total += slice->policy_total + slice->kept * shift;
  }
  s.kept = a.kept + b.kept;
  s.label_policy = a.label_policy + b.label_policy;
  s.label_reference = a.label_reference + b.label_reference;
  return s;
}

// Statistics as they travel between devices, in ROW_STATISTICS numbers. All maxima are logits, and the sums of equal
// logits are equal still, so that rounding to Real takes nothing from p = q.
template <class Real>
TNT_FN void pack(const RowStatistics& s, Real* to) {
  const double values[] = {
      s.policy.max,        s.policy.sum,      s.policy.moment,  s.reference.max,     s.reference.sum,
      s.label_policy,      s.policy_set.max,  s.policy_set.sum, s.policy_set.moment, s.reference_set.max,
      s.reference_set.sum, s.label_reference, s.kl_moment,      s.policy_total,      s.kept};
  static_assert(sizeof values == ROW_STATISTICS * sizeof(double));
  for (int i = 0; i < ROW_STATISTICS; ++i) to[i] = static_cast<Real>(values[i]);
}
template <class Real>
TNT_FN RowStatistics unpack(const Real* from) {
  RowStatistics s;
  s.policy = {from[0], from[1], from[2]};
  s.reference = {from[3], from[4], 0};
  s.policy_set = {from[6], from[7], from[8]};
  s.reference_set = {from[9], from[10], 0};
  s.label_policy = from[5];
  s.label_reference = from[11];
  s.kl_moment = from[12];
  s.policy_total = from[13];
  s.kept = from[14];
  return s;
}

// --------------------------------------------------------------------------------------------- what is undefined
//
// A logit of -inf is a number, that of a token without probability. NaN and +inf are none: among the logits that a
// row's loss reads, those of its set included, they make a sum NaN. The policy is read by every loss, the reference by
// a KL. A row is undefined, its loss and gradient NaN, where a distribution that it needs does not exist: because it
// is broken in this way, or as all of it is -inf, or because a KL's target has nothing left outside the removed tokens.

TNT_FN bool has_policy(const RowStatistics& s) { return s.policy.sum + s.policy_set.sum > 0; }
TNT_FN bool has_reference(const RowStatistics& s) { return s.reference.sum + s.reference_set.sum > 0; }

TNT_FN bool is_undefined(int loss, const RowStatistics& s) {
  if (loss == NONE) return false;
  if (loss != FORWARD_KL && loss != REVERSE_KL) return !has_policy(s);
  return !(has_policy(s) && has_reference(s) && s.reference.sum > 0);
}

// ------------------------------------------------------------------------------------------ 2. row coefficients

struct RowScalars {  // what a row is, besides its logits
  int loss = NONE;
  bool uniform = false;
  double eps = 0;
  double nl_floor = 0;  // -inf: none
  double inverse_temperature = 1;
  int64_t vocab = 0;
  int64_t set_size = 0;
};

// Of a kept entry p_v = exponential((z_v - kept_max) * exponent_scale) * kept_inverse, of any entry the same with
// policy_max and policy_inverse; q*_v likewise. For the losses that compare p with a target, of a kept entry
// d_v = log p_v - log q*_v = x_v + offset, x_v = Difference(kept_max, reference_max)(z_v, r_v)/T - log κ_v.
// For LL, UL and NL, outside the set: gradient = weight * exponential((z_v - kept_max) * exponent_scale) + bias. The
// maximum is that of the entries outside, because under UL their shares stay finite while their p underflow.
struct RowCoefficients {
  double policy_max = 0, policy_inverse = 0, policy_log_sum = 0;
  double kept_max = 0, kept_inverse = 0;
  double reference_max = 0, reference_inverse = 0;
  double offset = 0;
  double kl_centre = 0;   // reverse KL: gradient p_v (x_v - kl_centre)
  double set_offset = 0;  // reverse KL, removed tokens: d_s = (z_s - policy_max)/T + set_offset,
  double set_centre = 0;  // gradient p_s ((z_s - policy_max)/T - set_centre)
  double set_value = 0;   // reverse KL: q̃ of a removed token; LL: the gradient of y
  double weight = 0, bias = 0;
  double loss = 0;  // the part of the loss that needs no second pass; NaN where there is no loss
};

// log of the odds p(set) / p(outside), from the two sums alone: right for p(set) near 0 and near 1.
TNT_FN double log_odds(const RowStatistics& s, double inverse_temperature) {
  if (s.policy_set.sum == 0) return -INFINITY;
  if (s.policy.sum == 0) return INFINITY;
  return (s.policy_set.max - s.policy.max) * inverse_temperature + ::log(s.policy_set.sum / s.policy.sum);
}

// Real: that of the kernel, whose x_v are rounded to it.
template <class Real>
TNT_FN RowCoefficients row_coefficients(const RowScalars& row, const RowStatistics& s) {
  RowCoefficients c;
  const double inverse_t = row.inverse_temperature;
  const ExpSum all = merge(s.policy, s.policy_set, inverse_t);
  const double removed = share(s.policy_set, all, inverse_t);
  const double odds = log_odds(s, inverse_t);

  c.policy_max = all.max;
  c.policy_inverse = 1 / all.sum;
  c.policy_log_sum = ::log(all.sum);
  c.kept_max = s.policy.sum != 0 ? s.policy.max : all.max;
  c.kept_inverse = ::exp((c.kept_max - all.max) * inverse_t) / all.sum;
  if (is_undefined(row.loss, s)) c.loss = NAN;

  const double n = static_cast<double>(row.set_size), v = static_cast<double>(row.vocab);
  if (row.loss == LOG_LIKELIHOOD) {  // -log p_y = softplus(-log odds of y)
    const double loss = softplus(-odds);
    c.loss += loss;
    c.weight = c.kept_inverse;
    c.set_value = -s.policy.sum * c.kept_inverse;  // p_y - 1 without the subtraction
    if (row.uniform) {                             // cross-entropy against the one-hot label, smoothed
      const double norm = 1 / (1 + v * row.eps);
      const double log_p_total =
          s.policy_total - (v - 1) * (c.policy_log_sum + (all.max - c.kept_max) * inverse_t) - loss;
      c.loss = (c.loss - row.eps * log_p_total) * norm;
      c.bias = -row.eps * norm;
      c.set_value += (v - 1) * row.eps * norm;
    }
  } else if (row.loss == UNLIKELIHOOD) {  // -log(1 - p(S)); outside S the gradient is -p(S) p_v / (1 - p(S))
    c.loss += softplus(odds);
    c.weight = -removed / s.policy.sum;
  } else if (row.loss == NEGATIVE_LIKELIHOOD) {  // Σ log p_s, taken over the set; outside it the gradient is -n p_v
    c.weight = -c.kept_inverse;                  // for one active token; their number and the loss come from the set
  } else if (is_kl(row.loss)) {
    c.reference_max = s.reference.max;
    c.reference_inverse = 1 / s.reference.sum;
    // log Σ_r - log Σ_z as the log of one ratio: exactly 0 where the sums are the same number. Where no kept entry has
    // any p, d is -inf whatever is added to it.
    const double kept = s.policy.sum * c.kept_inverse;
    const Real z_max = static_cast<Real>(s.policy.max), r_max = static_cast<Real>(s.reference.max);
    const double excess = excess_of_difference(z_max, r_max) * inverse_t;
    if (s.policy.sum != 0) c.offset = ::log(s.reference.sum / s.policy.sum) - softplus(odds) - excess;
    if (row.loss == REVERSE_KL && !row.uniform) {
      const double log_norm = log1p(row.eps * n);
      c.set_value = row.eps / (1 + row.eps * n);
      c.reference_inverse /= 1 + row.eps * n;
      c.offset += log_norm;
      c.set_offset = log_norm - ::log(row.eps) - c.policy_log_sum;
      // d - KL = (d - M) + p(other group) (M - M of the other group), with M the mean of d over the entry's own group,
      // kept or removed. Nothing cancels: not near p = q (M is 0 there), and not for p(R) near 1.
      if (s.policy.sum != 0) c.kl_centre = s.kl_moment / s.policy.sum + excess;
      if (removed > 0) {
        const double set_mean = s.policy_set.moment / s.policy_set.sum + (s.policy_set.max - all.max) * inverse_t;
        const double gap = c.kl_centre + c.offset - (set_mean + c.set_offset);  // M kept - M removed
        c.set_centre = set_mean;
        if (kept > 0) {
          c.set_centre += kept * gap;
          c.kl_centre -= removed * gap;
        }
        if (row.eps == 0) c.kl_centre = INFINITY;  // as is the loss
      }
    } else if (row.loss == FORWARD_KL && !row.uniform) {
      c.loss += removed;  // q* is 0 there, so each of them gives p_s
    }
  }
  return c;
}

// Whether the row's gradient is NaN: where the loss is undefined, or infinite without a finite gradient. A shard may
// not see the loss, but it sees why: in the coefficients.
TNT_FN bool is_lost(int loss, const RowCoefficients& c) {
  if (c.loss != c.loss) return true;
  if (loss == UNLIKELIHOOD) return c.loss == INFINITY;
  return loss == REVERSE_KL && (c.loss == INFINITY || !(c.kl_centre < INFINITY && c.kl_centre > -INFINITY));
}

// ------------------------------------------------------------------------------------------------- diagnostics

// NaN where the distribution that they are of does not exist, or is not read. Without a policy there are none.
struct RowDiagnosis {
  double negative_mass = NAN, ref_negative_mass = NAN, entropy = NAN;
};

// `kl`: the row's loss reads the reference. `pushed_part`: -w of a y with -1 < w < 0, else 0.
TNT_FN RowDiagnosis diagnose(const RowStatistics& s, bool negative, bool kl, double pushed_part, double inverse_t) {
  RowDiagnosis d;
  if (!has_policy(s)) return d;
  const ExpSum all = merge(s.policy, s.policy_set, inverse_t);
  d.entropy = ::log(all.sum) - all.moment / all.sum;
  d.negative_mass = 0;
  if (kl && has_reference(s)) d.ref_negative_mass = 0;
  if (!negative) return d;
  d.negative_mass = share(s.policy_set, all, inverse_t);
  if (pushed_part != 0) d.negative_mass += ::exp((s.label_policy - all.max) * inverse_t) / all.sum;
  if (!kl || !has_reference(s)) return d;
  // q itself: without κ on the partially pushed y
  ExpSum set = s.reference_set, everything = merge(s.reference, s.reference_set, inverse_t);
  if (pushed_part != 0 && s.label_reference != -INFINITY) {
    set = merge(set, {s.label_reference, 1, 0}, inverse_t);
    everything = merge(everything, {s.label_reference, pushed_part, 0}, inverse_t);
  }
  d.ref_negative_mass = share(set, everything, inverse_t);
  return d;
}

// ----------------------------------------------------------------------------------------------- 3. row elements

template <class Real>
struct Element {
  Real loss, gradient;
};

// KL(q*‖p): q* φ(d), d = log p - log q*; gradient p - q* = q* (e^d - 1).
template <class Real>
TNT_FN Element<Real> forward_kl_element(Real q, Real d) {  // |d| < BOUNDED
  const Expm1<Real> e = expm1_phi(d);
  return {q * e.phi, q * e.value};
}
template <class Real>
TNT_FN Element<Real> forward_kl_element(Real p, Real q, Real d) {  // any d, ±inf and NaN (0 against 0) too
  const bool bounded = d < Real(BOUNDED) && d > Real(-BOUNDED);
  const Element<Real> e = forward_kl_element(q, d);
  const Real difference = p - q;
  const Real loss = q == Real(0) ? p : fused_multiply_add(-q, d, difference);
  return {bounded ? e.loss : loss, bounded ? e.gradient : difference};
}

// KL(p‖q̃): p φ(-d), d = log p - log q̃; gradient p (d - KL), with d - KL given as `excess`.
template <class Real>
TNT_FN Element<Real> reverse_kl_element(Real p, Real d, Real excess) {  // |d| < BOUNDED
  return {p * expm1_phi(-d).phi, p * excess};
}
template <class Real>
TNT_FN Element<Real> reverse_kl_element(Real p, Real q, Real d, Real excess) {
  const bool bounded = d < Real(BOUNDED) && d > Real(-BOUNDED);
  const Element<Real> e = reverse_kl_element(p, d, excess);
  const Real loss = p == Real(0) ? q : fused_multiply_add(p, d, q - p);
  return {bounded ? e.loss : loss, p == Real(0) ? Real(0) : e.gradient};
}

}  // namespace TNT_ISA
}  // namespace tnt
