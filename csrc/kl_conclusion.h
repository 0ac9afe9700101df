// From the sums of a KL row, of all its slices, to its loss and to what its second pass takes, for host and device.
// docs/numerics.md derives the formulas; kl_slices.h has the names.
#pragma once

#include <cmath>

#include "kl_shift.h"
#include "kl_slices.h"
#include "plans.h"
#include "row_sums.h"

namespace tnt {
inline namespace TNT_ISA {

// What a KL row is, besides its logits.
struct KlScalars {
  bool reverse;
  double inverse_t;               // 1/T as the loops have it: next to p = q, another rounding would show
  double exact_inverse_t;         // 1/T
  double eps;                     // of the reverse KL's target, on removed tokens
  double removed;                 // their number, of the whole vocabulary
  double log_kappa;               // of a y with -1 < w < 0, wherever it lies; else 0
  bool has_label;                 // whether that y lies in this slice of the vocabulary
  double x_zero = 0, o_zero = 0;  // what this launch reads its logits relative to, as it does the references of slices
};

// log2 of what weights add up to in a second pass: about 4, or less where the factor on them, about 2^exponent, is
// small. What underflows is then below what a float's gradient holds, and the largest weights' exponents are next to
// 0, where they are rounded least. Powers take EXPONENT_UNIT for a factor of 2.
template <class Real>
constexpr double EXPONENT_UNIT = UNIT<Real> / LOG2_E;
template <class Real>
TNT_FN double second_sum(double exponent) {
  const double lowered = (exponent + 32) * EXPONENT_UNIT<Real>;
  return 2 + (lowered > 0 ? 0 : lowered < -64 ? -64 : lowered);
}

// What a first pass found of the entries that stay, for any reader: references as Reals, and relative to nothing.
template <class Real>
TNT_FN void describe(const KlSlice& kept, const KlScalars& row, RowSums& sums) {
  const double x_ref = kept.x_ref + row.x_zero, o_ref = kept.o_ref + row.o_zero;
  const double x_rest = x_ref - double(Real(x_ref)), o_rest = o_ref - double(Real(o_ref));
  LogSum &base = base_of(sums, row.reverse), &other = other_of(sums, row.reverse);
  base.ref = double(Real(x_ref)), base.log = kept.log_base + x_rest * row.inverse_t;
  other.ref = double(Real(o_ref)), other.log = kept.log_other + o_rest * row.inverse_t;
  sums.policy.entropy = kept.policy_entropy;
  sums.kl = kept.kl;
  if (kept.has_base()) sums.log_ratio = kept.log_ratio + (o_rest - x_rest) * row.inverse_t;
}

// With references that are relative to these.
TNT_FN void read_relative_to(double x_zero, double o_zero, KlScalars& row, KlSlice& kept) {
  const double x_by = (kept.x_ref - x_zero) * row.inverse_t, o_by = (kept.o_ref - o_zero) * row.inverse_t;
  kept.log_base += x_by, kept.log_other += o_by, kept.log_ratio += o_by - x_by;
  kept.x_ref = kept.o_ref = 0;
  row.x_zero = x_zero, row.o_zero = o_zero;
}

// Of a y that is pushed down in part.
template <class Real>
TNT_FN KlSlice slice_of_label(const KlScalars& row, const RowSums& sums, const KlSlice& others) {
  const double x = (row.reverse ? sums.label_policy : sums.label_reference) - row.x_zero,
               o = (row.reverse ? sums.label_reference : sums.label_policy) - row.o_zero;
  const double log_kappa_x = row.reverse ? 0 : row.log_kappa, log_kappa_o = row.reverse ? row.log_kappa : 0;
  KlSlice slice;
  slice.x_ref = KlShift<Real>::usable(Real(x)), slice.o_ref = KlShift<Real>::usable(Real(o));
  // Next to log κ, how the loops round 1/T would show: the distance to the others' logits makes up for it.
  const double rounding = row.exact_inverse_t - row.inverse_t;
  if (x != -INFINITY) slice.log_base = (x - slice.x_ref) * row.inverse_t + (x - others.x_ref) * rounding + log_kappa_x;
  if (o != -INFINITY) slice.log_other = (o - slice.o_ref) * row.inverse_t + (o - others.o_ref) * rounding + log_kappa_o;
  if (!slice.has_other()) {
    slice.log_ratio = -INFINITY;
    if (slice.has_base()) slice.kl = INFINITY;
    return slice;
  }
  const double difference = o - x;
  slice.log_ratio = (difference - (slice.o_ref - slice.x_ref)) * row.inverse_t +
                    (difference - (others.o_ref - others.x_ref)) * rounding + (log_kappa_o - log_kappa_x);
  if (fabs(slice.log_ratio) < 32) slice.log_other = slice.log_base + slice.log_ratio;
  return slice;
}

struct TwoSlices {
  const KlSlice &a, &b;
  template <class F>
  TNT_FN double sum(F f) const {
    return f(a) + f(b);
  }
  template <class F>
  TNT_FN double max(F f) const {
    return fmax(double(-INFINITY), fmax(double(f(a)), double(f(b))));
  }
  TNT_FN const KlSlice& first() const { return a; }
};

// Puts a label that is pushed down in part to the entries that stay, and returns what it is among them.
template <class Real>
TNT_FN KlEntry complete(const KlScalars& row, const RowSums& sums, KlSlice& kept) {
  KlEntry label{};
  if (row.log_kappa != 0) {
    const KlSlice others = kept, slice = slice_of_label<Real>(row, sums, others);
    kept = merged(TwoSlices{others, slice}, row.reverse, row.inverse_t);
    label = entry_of(slice, kept, row.inverse_t);
  }
  if (kept.has_base() && !kept.has_other()) kept.kl = INFINITY, kept.log_ratio = -INFINITY;
  return label;
}

struct KlMasses {
  double odds;           // log of p(R)/p(K)
  double kept, removed;  // p(K), p(R)
  double pushed;         // -log p(K)
};

// Of the second pass's weights, and the mean of y.
struct KlWeights {
  double sum = 0, moment = 0;
};

template <class Real>
TNT_FN double forward_coefficients(const KlScalars& row, const KlSlice& kept, const LogSum& set, const KlMasses& masses,
                                   const KlShift<Real>& shift, const KlWeights& weights, KlPlan<Real>& plan) {
  // Of the policy's whole sum: the logarithm, and that of its ratio to the base's sum. Where K has next to none of p,
  // terms of theirs would be large.
  double log_policy = kept.log_other + masses.pushed, whole = kept.log_ratio + masses.pushed;
  if (masses.odds > 40) {
    log_policy = set.relative_to(row.o_zero + double(shift.o_ref), row.inverse_t) + softplus(-masses.odds);
    whole = log_policy - kept.log_base;
  }
  constexpr double MOST = sizeof(Real) == sizeof(float) ? 4e37 : 2e307;
  whole += (double(shift.o_ref) - double(shift.x_ref)) * row.inverse_t;
  whole = whole > MOST ? MOST : whole < -MOST ? -MOST : whole;
  plan.shift = shift.stored(whole);
  plan.rest = Real(whole - shift.value(plan.shift));
  plan.u0 = Real(1 / weights.sum);
  plan.u1 = Real(-UNIT<Real> * log_policy);
  return kept.kl + masses.pushed;
}

template <class Real>
TNT_FN double reverse_coefficients(const KlScalars& row, const KlSlice& kept, const LogSum& set, const KlMasses& masses,
                                   const KlWeights& weights, KlPlan<Real>& plan) {
  const double log_norm = log1p(row.eps * row.removed);
  double loss = kept.kl + log_norm, extra = 0;
  if (!set.is_empty()) {
    const double log_eps = ::log(row.eps);
    const double delta = kept.kl - (masses.odds - set.entropy - log_eps);  // D_K - D_R
    const double small = ::exp(-fabs(masses.odds)),
                 entropy = log1p(small) + (small > 0 ? small / (1 + small) * fabs(masses.odds) : 0);
    // p(R) times the log-odds is in the entropy: apart from log p(K) it would cancel against it.
    loss = log_norm - entropy;
    if (masses.kept > 0) loss += masses.kept * kept.kl;
    if (masses.removed > 0) loss -= masses.removed * (set.entropy + log_eps);
    if (masses.removed > 0 && masses.kept > 0) extra = masses.removed * delta;
    plan.set_shift = Real(set.entropy - set.log - (masses.kept > 0 ? masses.kept * delta : 0));
  }
  const double h = masses.kept > 0 ? masses.kept / weights.sum : 0;
  plan.u1 = Real(-h);
  plan.u0 = Real(h > 0 ? h * (weights.moment + extra) : 0);
  // Weights of 0, as 0 times an infinite log-ratio would be NaN.
  if (plan.u1 == 0) plan.u0 = 0, plan.c = sizeof(Real) == sizeof(float) ? Real(4e37) : Real(2e307);
  return loss;
}

// Of a label that is pushed down in part, as p - q* or p (log p - log q~ - loss).
TNT_FN double label_gradient(const KlScalars& row, const KlEntry& label, double pushed, double loss) {
  if (row.reverse) {
    const double p = ::exp(label.log_base - pushed), log_norm = log1p(row.eps * row.removed);
    return p == 0 ? 0 : p * (log_norm - pushed - label.y - loss);
  }
  const double q = ::exp(label.log_base), d = label.y - pushed;
  if (fabs(d) < 1) return q * ::expm1(d);
  return ::exp(label.log_other - pushed) - q;
}

// `sums`: as `describe` left them, with those of the set; `kept` and `label`: as `complete` did. `found`: the shift of
// a first pass whose sums are all of the entries that stay, and what its weights are; null if there is none.
template <class Real>
TNT_FN RowResult conclude(const KlScalars& row, const RowSums& sums, const KlSlice& kept, const KlEntry& label,
                          const KlShift<Real>* found, KlWeights weights, KlPlan<Real>& plan) {
  RowSums with_label;
  if (row.log_kappa != 0) {
    with_label = sums;
    base_of(with_label, row.reverse) = {kept.x_ref + row.x_zero, kept.log_base, 0};
    other_of(with_label, row.reverse) = {kept.o_ref + row.o_zero, kept.log_other, 0};
  }
  const RowSums& all = row.log_kappa != 0 ? with_label : sums;
  KlShift<Real> own;
  if (!found) {
    const double more = fabs(kept.log_ratio) < 1e29 ? kept.log_ratio : 0;
    own = KlShift<Real>(row.inverse_t, Real(kept.x_ref), Real(kept.o_ref), more);
    weights.moment = kept.log_ratio - own.log_ratio() - kept.kl;  // A = M + Φ is 0, of y relative to log_ratio
  }
  const KlShift<Real>& shift = found ? *found : own;  // it has kept's references
  const LogSum& set = all.policy_set;
  KlMasses masses{log_odds(all, row.inverse_t), 1, 0, 0};
  const bool removes = !set.is_empty();
  if (removes) {
    masses.kept = 1 / (1 + ::exp(masses.odds)), masses.removed = 1 / (1 + ::exp(-masses.odds));
    masses.pushed = softplus(masses.odds);
  }
  const bool undefined = is_undefined(row.reverse ? REVERSE_KL : FORWARD_KL, all);
  plan = {};
  plan.x_ref = shift.x_ref, plan.o_ref = shift.o_ref, plan.c = shift.c;
  // Where they will do, the second pass takes the first's weights.
  const double wanted = second_sum<Real>(row.reverse ? -masses.pushed * LOG2_E : 0);
  if (!(found && wanted == second_sum<Real>(0) && weights.sum > 0x1p-2 && weights.sum < 0x1p6)) {
    const KlShift<Real> second = shift.with_sum(kept.log_base, wanted);
    plan.c = second.c;
    weights.sum = ::exp(kept.log_base + second.lead() / UNIT<Real>);
  }
  plan.x_zero = Real(row.x_zero), plan.o_zero = Real(row.o_zero);
  plan.set_max = Real(removes ? set.ref : 0);
  if (removes) plan.set_scale = Real(masses.removed * ::exp(-set.log));
  RowResult result;
  result.loss = row.reverse ? reverse_coefficients(row, kept, set, masses, weights, plan)
                            : forward_coefficients(row, kept, set, masses, shift, weights, plan);
  if (row.reverse) plan.shift = shift.a;
  result.lost = undefined || (row.reverse && !(fabs(result.loss) < INFINITY));
  if (undefined) result.loss = NAN;
  if (row.has_label && !result.lost) plan.partial = Real(label_gradient(row, label, masses.pushed, result.loss));
  return result;
}

}  // namespace TNT_ISA
}  // namespace tnt
