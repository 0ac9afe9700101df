// Slices of a KL row, with sums of their own, for host and device: tiles that took another shift than the row's, shards
// of the vocabulary, a label with -1 < w < 0. docs/numerics.md has how they merge. Of a row's two streams, base and
// other are reference and policy if the KL is forward, policy and reference if it is reverse; x and o are their logits.
#pragma once

#include <cmath>

#include "elementary.h"
#include "row_sums.h"

namespace tnt {
inline namespace TNT_ISA {

// φ(L) of L = log1p(ratio): next to 0, where the difference loses its digits, as Σ L^k/k!.
TNT_FN double phi_of_log(double ratio, double log_ratio) {
  const double x = log_ratio, square = x * x;
  if (!(fabs(x) < 0x1p-6)) return ratio - x;
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

  TNT_FN bool has_base() const { return log_base > -INFINITY; }
  TNT_FN bool has_other() const { return log_other > -INFINITY; }
  TNT_FN double log_base_relative_to(double ref, double inverse_t) const {
    return log_base + (x_ref - ref) * inverse_t;
  }
  TNT_FN double log_other_relative_to(double ref, double inverse_t) const {
    return log_other + (o_ref - ref) * inverse_t;
  }
  TNT_FN double log_ratio_relative_to(const KlSlice& refs, double inverse_t) const {
    return log_ratio + ((o_ref - refs.o_ref) - (x_ref - refs.x_ref)) * inverse_t;
  }
};

// From sums over entries, and what their weights are relative to: of Sums it takes s, a, phi, other, broken and
// entropy, of Shift x_ref, o_ref, lead(), log_ratio(), log_lead_of_other() and LOG_UNIT, as cpu/kl_loops.h has them.
template <class Sums, class Shift>
TNT_FN KlSlice slice_of(const Sums& t, const Shift& shift, bool reverse, bool entropy) {
  const double other = t.other;
  KlSlice slice;
  slice.x_ref = shift.x_ref, slice.o_ref = shift.o_ref;
  if (t.broken != 0) {
    slice.log_base = slice.log_ratio = slice.kl = NAN;
  } else if (t.s != 0) {
    const double ratio = t.a / t.s, excess_log = ratio > -0.5 ? log1p(ratio) : ::log(other / t.s);
    slice.log_base = ::log(t.s) - shift.lead() / Shift::LOG_UNIT;
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
  if (entropy && weight > 0) slice.policy_entropy = ::log(weight) - t.entropy / Shift::LOG_UNIT / weight;
  return slice;
}

// From the sums that a shard tells.
TNT_FN KlSlice slice_of(const RowSums& s, bool reverse) {
  const LogSum &base = base_of(s, reverse), &other = other_of(s, reverse);
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

// `all`: the row, as `merged` has it.
TNT_FN KlEntry entry_of(const KlSlice& slice, const KlSlice& all, double inverse_t) {
  KlEntry entry;
  entry.log_base = slice.has_base() ? slice.log_base_relative_to(all.x_ref, inverse_t) - all.log_base : -INFINITY;
  entry.log_other = slice.has_other() ? slice.log_other_relative_to(all.o_ref, inverse_t) - all.log_other : -INFINITY;
  // A large log-ratio has lost digits that shares have: of a slice with nearly all the mass, both are 1.
  const double log_ratio = slice.log_ratio_relative_to(all, inverse_t);
  const bool by_shares = slice.has_base() && slice.has_other() && fabs(log_ratio) > 32;
  entry.y = by_shares ? entry.log_other - entry.log_base : log_ratio - all.log_ratio;
  return entry;
}

// log Σ e^{log_of(slice)} over the slices; NaN if one of the logarithms is, which `max` leaves out and `sum` does not.
template <class Slices, class LogOf>
TNT_FN double log_of_sum(const Slices& slices, LogOf log_of) {
  const double top = slices.max(log_of), ref = fabs(top) < INFINITY ? top : 0;
  return ref + ::log(slices.sum([&](const KlSlice& slice) { return ::exp(log_of(slice) - ref); }));
}

// The slices as entries of a row of their own: all terms are >= 0.
//
// `slices` may lie in a list, or in a warp's lanes, one in each: then all lanes run this, and those without a slice add
// nothing. It has
//   sum(f)     of f(slice) over all slices, in an order that is always the same
//   max(f)     the greatest f(slice) that is a number, -inf if none is
//   first()    any one of them: all lanes get the same
template <class Slices>
TNT_FN KlSlice merged(const Slices& slices, bool reverse, double inverse_t) {
  KlSlice all;
  // Relative to those that weigh most. They are found relative to the first.
  const KlSlice first = slices.first();
  const auto base_weight = [&](const KlSlice& slice) { return slice.log_base_relative_to(first.x_ref, inverse_t); };
  const auto other_weight = [&](const KlSlice& slice) { return slice.log_other_relative_to(first.o_ref, inverse_t); };
  const double top_base = slices.max(base_weight), top_other = slices.max(other_weight);
  all.x_ref = first.x_ref, all.o_ref = first.o_ref;
  if (top_base > -INFINITY)
    all.x_ref =
        slices.max([&](const KlSlice& slice) { return base_weight(slice) == top_base ? slice.x_ref : -INFINITY; });
  if (top_other > -INFINITY)
    all.o_ref =
        slices.max([&](const KlSlice& slice) { return other_weight(slice) == top_other ? slice.o_ref : -INFINITY; });
  const auto log_base = [&](const KlSlice& slice) { return slice.log_base_relative_to(all.x_ref, inverse_t); };
  const auto log_other = [&](const KlSlice& slice) { return slice.log_other_relative_to(all.o_ref, inverse_t); };
  const auto log_ratio = [&](const KlSlice& slice) { return slice.log_ratio_relative_to(all, inverse_t); };
  all.log_base = log_of_sum(slices, log_base);
  all.log_other = log_of_sum(slices, log_other);
  const bool lacks_other = all.has_base() && all.log_other == -INFINITY;
  if (lacks_other) {
    all.log_ratio = slices.sum([&](const KlSlice& slice) {
      return slice.has_base() ? ::exp(log_base(slice) - all.log_base) * log_ratio(slice) : 0;
    });
  } else {
    // Next to that of the slice that weighs most, where all have both. Of large sums, logarithms have lost digits.
    const double top_ratio =
        slices.max([&](const KlSlice& slice) { return base_weight(slice) == top_base ? log_ratio(slice) : -INFINITY; });
    const double rise = slices.sum([&](const KlSlice& slice) {
      return slice.has_base() && slice.has_other()
                 ? ::exp(log_base(slice) - all.log_base) * ::expm1(log_ratio(slice) - top_ratio)
                 : NAN;
    });
    all.log_ratio = fabs(rise) < 0.5 ? top_ratio + log1p(rise) : all.log_other - all.log_base;
  }
  // Unless y is next to 0, share φ(y) is other's share - share - share y: the first two add up apart, to about 0.
  const auto is_close = [&](const KlEntry& entry, double base_share, double other_share) {
    return base_share != 0 && other_share != 0 && fabs(entry.y) < 1;
  };
  const double kl = slices.sum([&](const KlSlice& slice) {
    const KlEntry entry = entry_of(slice, all, inverse_t);
    const double base_share = ::exp(entry.log_base);
    if (is_close(entry, base_share, ::exp(entry.log_other))) return base_share * (expm1_phi(entry.y).phi + slice.kl);
    return !lacks_other && base_share != 0 ? base_share * (slice.kl - entry.y) : 0;
  });
  const double masses = slices.sum([&](const KlSlice& slice) {
    const KlEntry entry = entry_of(slice, all, inverse_t);
    const double base_share = ::exp(entry.log_base), other_share = ::exp(entry.log_other);
    return lacks_other || is_close(entry, base_share, other_share) ? 0 : other_share - base_share;
  });
  all.kl = kl + masses < 0 ? 0 : kl + masses;
  all.policy_entropy = slices.sum([&](const KlSlice& slice) {
    const KlEntry entry = entry_of(slice, all, inverse_t);
    const double log_share = reverse ? entry.log_base : entry.log_other, share = ::exp(log_share);
    return share > 0 ? share * (slice.policy_entropy - log_share) : 0;
  });
  return all;
}

}  // namespace TNT_ISA
}  // namespace tnt
