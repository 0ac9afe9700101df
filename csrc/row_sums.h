// What a slice of a row is reduced to, the whole vocabulary or a part of it, for host and device: sums of exponentials
// by their logarithms, which no logit is too large for. Those of slices merge.
#pragma once

#include <cmath>

#include "call.h"
#include "elementary.h"
#include "row_rules.h"

namespace tnt {
inline namespace TNT_ISA {

// log(e^a + e^b); NaN if one of them is.
TNT_FN double log_add(double a, double b) {
  if (a == -INFINITY || b != b) return b;
  if (b == -INFINITY || a != a) return a;
  return a > b ? a + log1p(::exp(b - a)) : b + log1p(::exp(a - b));
}

// log Σ e^{(x - ref)/T} over some entries, and the entropy of their softmax where somebody asks for it. `ref` is finite
// and near their maximum; where there is no entry, or none but -inf, the logarithm is -inf and `ref` says nothing.
struct LogSum {
  double ref = 0, log = -INFINITY, entropy = 0;

  TNT_FN bool is_empty() const { return log == -INFINITY; }
  TNT_FN double relative_to(double other_ref, double inverse_t) const {
    return is_empty() ? -INFINITY : (ref - other_ref) * inverse_t + log;
  }
};

// Of one logit, with a weight. NaN if it is no number.
TNT_FN LogSum log_sum_of(double logit, double log_weight) {
  if (logit == -INFINITY) return {};
  return {logit, logit < INFINITY ? log_weight : NAN, 0};
}

TNT_FN LogSum merge(const LogSum& a, const LogSum& b, double inverse_t) {
  if (a.is_empty()) return b;
  if (b.is_empty()) return a;
  LogSum sum;
  sum.ref = a.ref < b.ref ? b.ref : a.ref;
  const double log_a = a.relative_to(sum.ref, inverse_t), log_b = b.relative_to(sum.ref, inverse_t);
  sum.log = log_add(log_a, log_b);
  const auto part = [&](double log, double entropy) {
    const double share = ::exp(log - sum.log);
    return share > 0 ? share * (entropy + sum.log - log) : 0;
  };
  sum.entropy = part(log_a, a.entropy) + part(log_b, b.entropy);
  return sum;
}

// The share of a part in the whole.
TNT_FN double share(const LogSum& part, const LogSum& whole, double inverse_t) {
  return part.is_empty() ? 0 : ::exp(part.relative_to(whole.ref, inverse_t) - whole.log);
}

// Of a KL, base and other are reference and policy if it is forward, policy and reference if it is reverse.
struct RowSums {
  LogSum policy, reference;                      // of what stays, without a y that is pushed down in part
  LogSum policy_set, reference_set;              // of what does not: a KL's removed tokens, S of UL and NL, y of LL
  double label_policy = 0, label_reference = 0;  // logits of that y, in the slice that holds it; else 0
  // Of a KL: that of base against other within the slice; the logarithm of the ratio of other's sum to the base's, less
  // the distance of their references. A slice without other has the mean of all log-ratios there.
  double kl = 0, log_ratio = 0;
  double total = 0;  // of LL under uniform smoothing: Σ (z - policy's ref)/T
  double kept = 0;   // number of entries that stay
};
template <class Sums>
TNT_FN auto& base_of(Sums& s, bool reverse) {
  return reverse ? s.policy : s.reference;
}
template <class Sums>
TNT_FN auto& other_of(Sums& s, bool reverse) {
  return reverse ? s.reference : s.policy;
}

// What shards add up between their statistics and the loss.
struct PartialSums {
  double loss = 0;    // of NL, Σ max(log p_s, floor)
  double active = 0;  // of NL: how many log p_s are not below the floor
};

// What follows from the sums of a whole vocabulary.
struct RowResult {
  double loss;
  bool lost;  // the gradient is NaN
};

// As it travels between devices, in ROW_STATISTICS numbers (docs/sharded.md).
template <class Real>
TNT_FN void pack(const RowSums& s, bool kl, Real* to) {
  const double values[] = {s.policy.ref,
                           s.policy.log,
                           s.policy.entropy,
                           s.reference.ref,
                           s.reference.log,
                           s.label_policy,
                           s.policy_set.ref,
                           s.policy_set.log,
                           s.policy_set.entropy,
                           s.reference_set.ref,
                           s.reference_set.log,
                           s.label_reference,
                           s.kl,
                           kl ? s.log_ratio : s.total,
                           s.kept};
  static_assert(sizeof values == ROW_STATISTICS * sizeof(double));
  for (int i = 0; i < ROW_STATISTICS; ++i) to[i] = static_cast<Real>(values[i]);
}
template <class Real>
TNT_FN RowSums unpack(const Real* from, bool kl) {
  RowSums s;
  s.policy = {from[0], from[1], from[2]};
  s.reference = {from[3], from[4], 0};
  s.label_policy = from[5];
  s.policy_set = {from[6], from[7], from[8]};
  s.reference_set = {from[9], from[10], 0};
  s.label_reference = from[11];
  s.kl = from[12];
  (kl ? s.log_ratio : s.total) = from[13];
  s.kept = from[14];
  return s;
}

// Of two slices: all but what a KL's slices merge by, kl and log_ratio.
TNT_FN RowSums merge(const RowSums& a, const RowSums& b, double inverse_t) {
  RowSums s;
  s.policy = merge(a.policy, b.policy, inverse_t);
  s.reference = merge(a.reference, b.reference, inverse_t);
  s.policy_set = merge(a.policy_set, b.policy_set, inverse_t);
  s.reference_set = merge(a.reference_set, b.reference_set, inverse_t);
  const auto total = [&](const RowSums& slice) {
    return slice.kept != 0 ? slice.total + slice.kept * (slice.policy.ref - s.policy.ref) * inverse_t : 0;
  };
  s.total = total(a) + total(b);
  s.kept = a.kept + b.kept;
  s.label_policy = a.label_policy + b.label_policy;
  s.label_reference = a.label_reference + b.label_reference;
  return s;
}

// log of the odds p(set) / p(outside).
TNT_FN double log_odds(const RowSums& s, double inverse_t) {
  if (s.policy_set.is_empty()) return -INFINITY;
  if (s.policy.is_empty()) return INFINITY;
  return s.policy_set.relative_to(s.policy.ref, inverse_t) - s.policy.log;
}

// --------------------------------------------------------------------------------------------- what is undefined
//
// A logit of -inf is a number, that of a token without probability. NaN and +inf are none: among the logits that a
// row's loss reads, those of its set included, they make a sum NaN. The policy is read by every loss, the reference by
// a KL. A row is undefined, its loss and gradient NaN, where a distribution that it needs does not exist: because it
// is broken in this way, or as all of it is -inf, or because a KL's target has nothing left outside the removed tokens.

TNT_FN bool exists(const LogSum& kept, const LogSum& set) {
  return kept.log < INFINITY && set.log < INFINITY && !(kept.is_empty() && set.is_empty());
}

TNT_FN bool is_undefined(int loss, const RowSums& s) {
  if (loss == NONE) return false;
  if (!exists(s.policy, s.policy_set)) return true;
  return is_kl(loss) && (!exists(s.reference, s.reference_set) || s.reference.is_empty());
}

// ------------------------------------------------------------------------------------------------- diagnostics

// NaN where the distribution that they are of does not exist, or is not read. Without a policy there are none.
struct RowDiagnosis {
  double negative_mass = NAN, ref_negative_mass = NAN, entropy = NAN;
};

// `log_kappa` is 0 where no y is pushed down in part.
TNT_FN RowDiagnosis diagnose(const RowSums& s, bool negative, bool kl, double log_kappa, double inverse_t) {
  const auto with_label = [&](const LogSum& set, double label) {
    return log_kappa != 0 ? merge(set, log_sum_of(label, 0), inverse_t) : set;
  };
  RowDiagnosis d;
  const LogSum set = with_label(s.policy_set, s.label_policy),
               reference_set = with_label(s.reference_set, s.label_reference);
  if (!exists(s.policy, set)) return d;
  const LogSum all = merge(s.policy, set, inverse_t);
  d.entropy = all.entropy;
  d.negative_mass = negative ? share(set, all, inverse_t) : 0;
  if (!kl || !exists(s.reference, reference_set)) return d;
  d.ref_negative_mass = negative ? share(reference_set, merge(s.reference, reference_set, inverse_t), inverse_t) : 0;
  return d;
}

}  // namespace TNT_ISA
}  // namespace tnt
