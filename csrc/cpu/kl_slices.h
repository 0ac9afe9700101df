// Slices of a KL row, with sums of their own: tiles that took another shift than the row's, shards of the vocabulary, a
// label with -1 < w < 0. docs/numerics.md has how they merge.
#pragma once

#include <cmath>
#include <vector>

#include "cpu/kl_loops.h"
#include "row_sums.h"

namespace tnt {
inline namespace TNT_ISA {

// φ(L) of L = log1p(ratio): next to 0, where the difference loses its digits, as Σ L^k/k!.
TNT_FN double phi_of_log(double ratio, double log_ratio) {
  const double x = log_ratio, square = x * x;
  if (!(std::abs(x) < 0x1p-6)) return ratio - x;
  return square * ((1. / 2 + square * (1. / 24 + square / 720)) + x * (1. / 6 + square * (1. / 120 + square / 5040)));
}

// Part of the kept entries, with sums of its own.
struct KlSlice {
  double x_ref = 0, o_ref = 0;   // near its maxima
  double log_base = -INFINITY;   // of its base's sum, relative to x_ref/T
  double log_other = -INFINITY;  // of the other's, relative to o_ref/T
  // Of the other's sum to the base's, where there is a base, less the distance of the references; of a slice without
  // the other, the mean of all log-ratios.
  double log_ratio = 0;
  double kl = 0;              // of base against other within the slice
  double policy_entropy = 0;  // within the slice
  bool has_base() const { return log_base > -INFINITY; }
};

template <class Number>
TNT_FN KlSlice slice_of(const KlSums& t, const KlShift<Number>& shift, bool reverse, bool entropy) {
  const double other = t.other;
  KlSlice slice;
  slice.x_ref = shift.x_ref, slice.o_ref = shift.o_ref;
  if (t.broken != 0) {
    slice.log_base = slice.log_ratio = slice.kl = NAN;
  } else if (t.s != 0) {
    const double ratio = t.a / t.s, excess_log = ratio > -0.5 ? log1p(ratio) : ::log(other / t.s);
    slice.log_base = ::log(t.s) - shift.lead() / UNIT<Number>;
    slice.log_ratio = shift.log_ratio() + excess_log;
    const double kl = t.phi / t.s - phi_of_log(ratio, excess_log);
    slice.kl = kl < 0 ? 0 : kl;
    if (other <= 0) slice.log_ratio = shift.log_ratio() - 1 - t.phi / t.s, slice.kl = 0;
  }
  // e e^y is 2^rho at o_ref.
  if (t.broken == 0 && t.s > 0 && other > 0)
    slice.log_other = slice.log_base + slice.log_ratio;
  else if (other > 0 || other != other)
    slice.log_other = ::log(other) - shift.log_lead_of_other();
  const double weight = reverse ? t.s : other;
  if (entropy && weight > 0) slice.policy_entropy = ::log(weight) - t.entropy / UNIT<Number> / weight;
  return slice;
}

// From the sums that a shard tells.
inline KlSlice slice_of(const RowSums& s, bool reverse) {
  const LogSum &base = reverse ? s.policy : s.reference, &other = reverse ? s.reference : s.policy;
  KlSlice slice;
  slice.x_ref = base.ref, slice.o_ref = other.ref;
  slice.log_base = base.log;
  // Where both exist, the logarithm of their ratio has digits that its own has lost.
  slice.log_other = base.is_empty() || other.is_empty() ? other.log : base.log + s.log_ratio;
  slice.log_ratio = s.log_ratio;
  slice.kl = s.kl;
  slice.policy_entropy = s.policy.entropy;
  return slice;
}

// A slice as an entry of the row: logarithms of its shares in the base's sum and in the other's, and its log-ratio less
// the row's.
struct KlEntry {
  double log_base, log_other, y;
};

// The slices as entries of a row of their own: all terms are >= 0. Also the last one's entry.
inline KlSlice merged(const std::vector<KlSlice>& slices, bool reverse, double inverse_t, KlEntry& last) {
  // Relative to those that weigh most. They are found relative to the first.
  KlSlice all;
  const KlSlice* top = &slices[0];
  double top_base = -INFINITY, top_other = -INFINITY;
  all.x_ref = slices[0].x_ref, all.o_ref = slices[0].o_ref;
  for (const KlSlice& slice : slices) {
    const double base = slice.log_base + (slice.x_ref - slices[0].x_ref) * inverse_t;
    const double other = slice.log_other + (slice.o_ref - slices[0].o_ref) * inverse_t;
    if (base > top_base) top_base = base, all.x_ref = slice.x_ref, top = &slice;
    if (other > top_other) top_other = other, all.o_ref = slice.o_ref;
  }
  const auto log_ratio = [&](const KlSlice& slice) {
    return slice.log_ratio + ((slice.o_ref - all.o_ref) - (slice.x_ref - all.x_ref)) * inverse_t;
  };
  const auto log_base = [&](const KlSlice& slice) { return slice.log_base + (slice.x_ref - all.x_ref) * inverse_t; };
  const auto log_other = [&](const KlSlice& slice) { return slice.log_other + (slice.o_ref - all.o_ref) * inverse_t; };
  for (const KlSlice& slice : slices) {
    all.log_base = log_add(all.log_base, log_base(slice));
    all.log_other = log_add(all.log_other, log_other(slice));
  }
  const bool lacks_other = all.has_base() && all.log_other == -INFINITY;
  double masses = 0;
  if (lacks_other) {
    for (const KlSlice& slice : slices)
      if (slice.has_base()) all.log_ratio += ::exp(log_base(slice) - all.log_base) * log_ratio(slice);
  } else {
    // Next to that of the slice that weighs most, where all have both. Of large sums, logarithms have lost digits.
    double rise = 0;
    for (const KlSlice& slice : slices)
      rise += slice.has_base() && slice.log_other > -INFINITY
                  ? ::exp(log_base(slice) - all.log_base) * ::expm1(log_ratio(slice) - log_ratio(*top))
                  : NAN;
    all.log_ratio = std::abs(rise) < 0.5 ? log_ratio(*top) + log1p(rise) : all.log_other - all.log_base;
  }
  for (const KlSlice& slice : slices) {
    const double log_base_share = slice.has_base() ? log_base(slice) - all.log_base : -INFINITY;
    const double log_other_share = slice.log_other > -INFINITY ? log_other(slice) - all.log_other : -INFINITY;
    const double base_share = ::exp(log_base_share), other_share = ::exp(log_other_share);
    const bool whole = base_share != 0 && other_share != 0;
    // A large log-ratio has lost digits that shares have: of a slice with nearly all the mass, both are 1.
    const bool by_shares = slice.has_base() && slice.log_other > -INFINITY && std::abs(log_ratio(slice)) > 32;
    const double y = by_shares ? log_other_share - log_base_share : log_ratio(slice) - all.log_ratio;
    last = {log_base_share, log_other_share, y};
    if (whole && std::abs(y) < 1) {
      all.kl += base_share * (expm1_phi(y).phi + slice.kl);
    } else if (!lacks_other) {
      // share φ(y) = other's share - share - share y: the first two add up apart, to about 0
      masses += other_share - base_share;
      if (base_share != 0) all.kl += base_share * (slice.kl - y);
    }
    const double share = reverse ? base_share : other_share;
    if (share > 0) all.policy_entropy += share * (slice.policy_entropy - ::log(share));
  }
  all.kl += masses;
  if (all.kl < 0) all.kl = 0;
  return all;
}

}  // namespace TNT_ISA
}  // namespace tnt
