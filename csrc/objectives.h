// The objectives of one row, for host and device. MATH: a row is one token position with policy logits z, reference
// logits r, p = softmax(z / T), q = softmax(r / T), a set R of removed tokens (n of them) and the target q* (q without
// R, renormalised). Natural logarithms throughout; 1/T and log2(e) are folded into `exponent_scale` (elementary.h).
//
// Three stages, each a set of plain functions:
//   1. row statistics   (max, scaled sum, moment) over any slice of the vocabulary; mergeable: statistics.h
//   2. row coefficients statistics + the row's scalars -> the few numbers that loss and gradient need
//   3. row elements     loss and gradient of one vocabulary entry, side by side under their formula
// On a CPU, a loss that reads the policy alone follows from the sums of row_sums.h instead.
// What a call says of a row stands in row_rules.h, the rule for what is undefined in row_sums.h.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "elementary.h"
#include "row_rules.h"
#include "row_sums.h"
#include "statistics.h"

namespace tnt {
inline namespace TNT_ISA {

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

// ------------------------------------------------------------------------------- losses that read the policy alone
//
// From the sums of row_sums.h. The set is y of LL, S of the others; K is what lies outside.

// A row's loss, and its gradient: kept p_K(v) + bias on K, set p_set(v) + push in the set. What is below `least` there,
// as (z - its ref)/T, is not pushed.
struct ExpLoss {
  double loss = 0, kept = 0, bias = 0, set = 0, push = 0, least = -INFINITY;
};

// log p of an entry of the set = (z - the set's ref)/T - this.
TNT_FN double set_normalizer(const RowSums& s, double inverse_t) {
  return merge(s.policy, s.policy_set, inverse_t).relative_to(s.policy_set.ref, inverse_t);
}

// That of the least log p that is pushed down. A Real holds it, as one below any floor is -inf where logits are huge.
template <class Real>
TNT_FN double least_log_weight(double floor, double normalizer) {
  constexpr double LOWEST_REAL = sizeof(Real) == sizeof(float) ? -FLT_MAX : -DBL_MAX;
  const double least = floor + normalizer;
  return floor > -INFINITY && least < LOWEST_REAL ? LOWEST_REAL : least;
}

// -log p_y; p - [v = y], which at y is -p(K).
TNT_FN ExpLoss log_likelihood(double odds) {
  const double kept = 1 / (1 + ::exp(odds));
  ExpLoss row;
  row.loss = softplus(-odds);
  row.kept = kept;
  row.push = -kept;
  return row;
}

// The cross-entropy against y~ = ([v = y] + ε)/(1 + V ε); p - y~.
TNT_FN ExpLoss smoothed_log_likelihood(const RowSums& s, double odds, double eps, double vocab, double inverse_t) {
  const double norm = 1 / (1 + vocab * eps), others = vocab - 1;
  ExpLoss row = log_likelihood(odds);
  const double log_sum = merge(s.policy, s.policy_set, inverse_t).relative_to(s.policy.ref, inverse_t);
  const double log_p_total = s.total - (others > 0 ? others * log_sum : 0) - row.loss;
  row.loss = (row.loss - eps * log_p_total) * norm;
  row.bias = -eps * norm;
  row.push += others * eps * norm;
  return row;
}

// -log(1 - p(S)) = -log p(K); p_v in S, -p(S) p_K(v) on K.
TNT_FN ExpLoss unlikelihood(double odds) {
  ExpLoss row;
  row.loss = softplus(odds);
  row.set = 1 / (1 + ::exp(-odds));
  row.kept = -row.set;
  return row;
}

// Σ_{s∈S} max(log p_s, floor); Σ ([v = s] - p_v) over the active s, whose log p_s is not below the floor.
TNT_FN ExpLoss negative_likelihood(double odds, const PartialSums& of_set, double least) {
  ExpLoss row;
  row.loss = of_set.loss;
  row.kept = -of_set.active / (1 + ::exp(odds));
  row.set = -of_set.active / (1 + ::exp(-odds));
  row.push = 1;
  row.least = least;
  return row;
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
