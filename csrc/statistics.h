// Statistics of a row as CUDA's kernels have them, for host and device: the sums over its logits that loss and gradient
// begin from, of the whole vocabulary or of any slice of it; those of slices merge. z are the policy's logits, r the
// reference's (objectives.h). The CPU's are in row_sums.h.
#pragma once

#include <cmath>
#include <cstdint>

#include "call.h"
#include "elementary.h"
#include "row_rules.h"
#include "row_sums.h"

namespace tnt {
inline namespace TNT_ISA {

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

// ------------------------------------------------------------------------------ what is undefined; diagnostics

// Whether the distribution exists. Its sum is NaN where a logit is NaN or +inf, and 0 where all are -inf.
TNT_FN bool has_policy(const RowStatistics& s) { return s.policy.sum + s.policy_set.sum > 0; }
TNT_FN bool has_reference(const RowStatistics& s) { return s.reference.sum + s.reference_set.sum > 0; }

// The rule stands in row_sums.h.
TNT_FN bool is_undefined(int loss, const RowStatistics& s) {
  if (loss == NONE) return false;
  if (loss != FORWARD_KL && loss != REVERSE_KL) return !has_policy(s);
  return !(has_policy(s) && has_reference(s) && s.reference.sum > 0);
}

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

}  // namespace TNT_ISA
}  // namespace tnt
