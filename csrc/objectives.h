// The objectives of one row, for host and device. MATH: a row is one token position with policy logits z, reference
// logits r, p = softmax(z / T), q = softmax(r / T), a set R of removed tokens (n of them) and the target q* (q without
// R, renormalised). Natural logarithms throughout; 1/T and log2(e) are folded into `exponent_scale` (elementary.h).
//
// A first pass leaves a row's sums (row_sums.h). From these follow its loss and what the second pass takes (plans.h):
// here of the losses that read the policy alone and of KLs under uniform smoothing, in kl_conclusion.h of other KLs.
// What a call says of a row stands in row_rules.h, the rule for what is undefined in row_sums.h.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "elementary.h"
#include "plans.h"
#include "row_rules.h"
#include "row_sums.h"

namespace tnt {
inline namespace TNT_ISA {

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

// Of any of these losses, or none. `totals`: of all slices.
template <class Real>
TNT_FN ExpLoss exp_loss(int loss, const RowSums& s, const PartialSums& totals, const RowCall& p, double inverse_t) {
  const double odds = log_odds(s, inverse_t);  // p(set)/p(K)
  switch (loss) {
    case LOG_LIKELIHOOD:
      if (!smooths_uniformly(p)) return log_likelihood(odds);
      return smoothed_log_likelihood(s, odds, p.eps, double(p.vocab_size), inverse_t);
    case UNLIKELIHOOD: return unlikelihood(odds);
    case NEGATIVE_LIKELIHOOD:
      return negative_likelihood(odds, totals, least_log_weight<Real>(p.nl_floor, set_normalizer(s, inverse_t)));
    default: return {};
  }
}
TNT_FN RowResult result_of(int loss, const RowSums& s, const ExpLoss& row) {
  const bool undefined = is_undefined(loss, s);
  return {undefined ? NAN : row.loss, undefined || (loss == UNLIKELIHOOD && row.loss == INFINITY)};
}

// ------------------------------------------------------------------------------------- KLs under uniform smoothing

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

// What follows from the sums of a whole vocabulary; `log_kappa` is that of a y with -1 < w < 0, else 0. Whether the row
// has a loss.
template <class Real>
TNT_FN bool conclude_uniform(RowSums s, bool reverse, double log_kappa, double inverse_t, UniformPlan<Real>& plan) {
  if (log_kappa != 0) {
    s.policy = merge(s.policy, log_sum_of(s.label_policy, 0), inverse_t);
    s.reference = merge(s.reference, log_sum_of(s.label_reference, log_kappa), inverse_t);
  }
  const LogSum all = merge(s.policy, s.policy_set, inverse_t);
  plan = {};
  plan.z_ref = Real(all.ref), plan.p_inverse = Real(::exp(-all.log)), plan.p_log_sum = Real(all.log);
  plan.r_ref = Real(s.reference.ref), plan.q_inverse = Real(::exp(-s.reference.log));
  return !is_undefined(reverse ? REVERSE_KL : FORWARD_KL, s);
}

// What entries take: the row's numbers, with what is the call's.
template <class Real>
struct UniformNumbers {
  UniformPlan<Real> row;
  Real scale, inverse_t;     // of exponents; of differences
  Real eps, norm, log_norm;  // 1/(1 + V ε)
  Real factor;               // on the gradient
  template <class Number>
  TNT_FN Element<Number> element(bool reverse, Number log_p, Number p, Number q_star) const {
    const Number smoothed = q_star + eps, q = smoothed * norm, d = log_p - (logarithm(smoothed) + log_norm);
    return reverse ? reverse_kl_element(p, q, d, d - row.loss) : forward_kl_element(p, q, d);
  }
};
template <class Real>
TNT_FN UniformNumbers<Real> uniform_numbers(const UniformPlan<Real>& row, const RowCall& p, double inverse_t,
                                            double factor) {
  const double v_eps = double(p.vocab_size) * p.eps;
  return {row,         exponent_scale<Real>(inverse_t), Real(inverse_t),
          Real(p.eps), Real(1 / (1 + v_eps)),           Real(-log1p(v_eps)),
          Real(factor)};
}

}  // namespace TNT_ISA
}  // namespace tnt
