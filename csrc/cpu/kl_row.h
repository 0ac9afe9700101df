// A KL row, of a whole vocabulary or of a shard: from the sums of its tiles to its loss, to the numbers of its
// gradient, to the gradient. docs/numerics.md derives the formulas; kl_loops.h has the names.
#pragma once

#include <cmath>
#include <optional>
#include <vector>

#include "cpu/kl_first_pass.h"
#include "cpu/kl_gradient.h"

namespace tnt {
inline namespace TNT_ISA {

// What a row's second pass takes, for a factor of 1. It may have to wait for its factor: as Reals it is kept till then.
template <class Real>
struct KlPlan {
  Real x_ref, o_ref, c;  // of KlShift
  Real x_zero, o_zero;   // what logits are read relative to
  Real shift, rest;      // forward: of y*; reverse: the shift of y
  Real u0, u1;           // forward: h, p_shift; reverse: k0, k1
  // Of removed entries: t = (z - set_max)/T, gradient set_scale e^t (t + set_shift).
  Real set_max, set_scale, set_shift;
  Real partial;  // the gradient of a y with -1 < w < 0
};

template <class Logit, class Gradient>
class KlRow {
 public:
  using Real = RealOf<Logit>;
  static constexpr int64_t TILE = TILE_ENTRIES<Real>;
  // In a second pass weights add up to about 4, or less where the factor on them is small: what underflows is then
  // below what a float's gradient holds. The largest weights' exponents are next to 0, where they are rounded least.
  static double second_sum(double log_factor) { return 2 + std::max(-64.0, std::min(0.0, log_factor + 32)); }

  struct Task {
    const Logit *z, *r;
    Gradient* gradient;
    bool reverse, entropy;
    int64_t removed = 0;    // number of tokens, of the whole vocabulary
    const uint64_t* apart;  // the bits of those here and of a partial y; null: there are none
    int64_t partial = -1;   // the column of a y with -1 < w < 0, if it lies here
    double log_kappa = 0;   // of that y, wherever it lies; else 0
  };
  struct Result {
    double loss;
    bool lost;  // the gradient is NaN
    RowSums sums;
  };

  KlRow(const RowCall& call, int threads, KlScratch<Real>& scratch)
      : p_(call),
        s_(scratch),
        inverse_t_(double(Real(1 / call.temperature))),
        tiles_(call.vocab, threads, scratch.entries) {}

  // The first pass over this slice of the vocabulary.
  RowSums sums(const Task& task) {
    start(task);
    first_pass().run(t_.reverse, t_.entropy, found_);
    s_.slices.assign(1, found_.kept);
    return sums_of(found_.kept);
  }

  // The first pass over a whole vocabulary, and what follows from it.
  Result whole(const Task& task, KlPlan<Real>& plan) {
    const RowSums s = sums(task);
    return conclude(s, false, plan);
  }

  // What follows from the sums of all shards.
  Result merged(const Task& task, const std::vector<RowSums>& shards, KlPlan<Real>& plan) {
    start(task);
    s_.slices.clear();
    for (const RowSums& s : shards)
      if (!s.policy.is_empty() || !s.reference.is_empty()) s_.slices.push_back(slice_of(s, t_.reverse));
    if (s_.slices.empty()) s_.slices.emplace_back();
    return conclude(merge(shards, inverse_t_), true, plan);
  }

  // A second pass whose first was in another launch.
  void resume(const Task& task, const KlPlan<Real>& plan) {
    start(task);
    tiles_.read_relative_to(plan.x_zero, plan.o_zero);
    tiles_.each(false, [&](int64_t k) {
      tiles_.on(k, false, [&](const auto& in, int64_t) { s_.careful[size_t(k)] = has_infinite(in); });
      tiles_.gather(k);
    });
  }

  // Writes the gradient times `factor`; calls done(first, n) with as many columns as are written, for prefetches.
  template <class Done>
  void second_pass(const KlPlan<Real>& plan, double factor, Done done) {
    set_gradients(plan, factor);
    const double log_factor = ::log(std::abs(factor)) * UNIT<Real>;
    const Real c = Real(double(plan.c) + second_sum(0) - second_sum(log_factor));
    const KlShift<Real> shift(inverse_t_, plan.x_ref, plan.o_ref, plan.shift, c);
    const double by = c == plan.c ? factor : factor * ::exp((double(c) - double(plan.c)) / UNIT<Real>);
    const ForwardGradient<Real> forward{plan.shift, plan.rest, Real(plan.u0 * by), Real(double(plan.u1) + log_factor),
                                        Real(factor < 0 ? -1 : 1)};
    const ReverseGradient<Real> reverse{Real(plan.u0 * by), Real(plan.u1 * by)};
    const std::optional<SavedGradient<Real>> saved = saved_gradient(plan, factor);
    tiles_.each(true, [&](int64_t k) {
      const bool is_careful = s_.careful[size_t(k)] != 0;  // an infinite y is no factor
      if (saved && !is_careful && s_.tiles[size_t(k)].shift == *found_.first) {
        tiles_.write_saved(k, t_.gradient, [&](const Real* weights, int64_t n, auto stored, Gradient* to) {
          write_saved<decltype(stored)>(weights, n, *saved, to);
        });
      } else {
        tiles_.write(k, is_careful, t_.gradient, [&](const auto& in, Gradient* to) {
          t_.reverse ? write_gradient(in, shift, reverse, to) : write_gradient(in, shift, forward, to);
        });
      }
      tiles_.scatter(k, t_.gradient);
      done(p_.vocab - tiles_.end_of(k), tiles_.end_of(k) - k * TILE);
    });
    if (t_.partial >= 0) store(t_.gradient + t_.partial, Real(double(plan.partial) * factor));
  }

 private:
  void start(const Task& task) {
    t_ = task;
    tiles_.begin(task.reverse ? task.z : task.r, task.reverse ? task.r : task.z, task.apart);
    label_z_ = label_r_ = 0;
    if (t_.partial >= 0) label_z_ = double(load(t_.z[t_.partial])), label_r_ = double(load(t_.r[t_.partial]));
    s_.careful.assign(size_t(tiles_.count()), 0);
    tiles_.save(t_.gradient ? 2 : 0);
  }

  using Pass = KlFirstPass<Logit, Gradient>;
  Pass first_pass() {
    const double z = t_.partial >= 0 ? label_z_ : NAN, r = t_.partial >= 0 ? label_r_ : NAN;
    return t_.reverse ? Pass(tiles_, s_, inverse_t_, z, r) : Pass(tiles_, s_, inverse_t_, r, z);
  }

  // Where this launch's first pass saved its weights.
  std::optional<SavedGradient<Real>> saved_gradient(const KlPlan<Real>& plan, double factor) const {
    if (!found_.first || !tiles_.saved(0)) return {};
    const KlShift<Real>& first = *found_.first;
    const KlShift<Real> second(inverse_t_, plan.x_ref, plan.o_ref, plan.shift, plan.c);
    const double by = factor * ::exp((second.lead() - first.lead()) / UNIT<Real>);  // the weights' factor
    // By as much the y of the plan is less.
    const double more = second.value(second.a) - first.value(first.a) + (t_.reverse ? 0 : double(plan.rest));
    if (second.x_ref != first.x_ref || !(std::abs(more) < 1)) return {};  // far apart, products would cancel
    const double fall = ::expm1(-more);
    if (t_.reverse) return SavedGradient<Real>{Real(plan.u1 * by), Real((plan.u0 - plan.u1 * more) * by)};
    return SavedGradient<Real>{Real(plan.u0 * by * (1 + fall)), Real(plan.u0 * by * fall)};
  }

  std::vector<Real>& policy_set() const { return t_.reverse ? s_.entries.x : s_.entries.o; }
  std::vector<Real>& reference_set() const { return t_.reverse ? s_.entries.o : s_.entries.x; }

  // ---- the removed entries

  // All that the NaN rule asks of a set: NaN if a logit is NaN or +inf, else empty.
  LogSum existence_of_set(const std::vector<Real>& logits) const {
    const int64_t size = tiles_.set_size();
    const Real* const x = logits.data();
    int missing = 0;
#pragma omp simd reduction(| : missing)
    for (int64_t i = 0; i < size; ++i) missing |= !(x[i] < INFINITY);
    LogSum sum;
    if (missing) sum.log = NAN;
    return sum;
  }

  void set_gradients(const KlPlan<Real>& plan, double factor) {
    using V = Vector<Real>;
    const V max = same(plan.set_max), scale = same(exponent_scale<Real>(inverse_t_)), none = same(Real(0)),
            by = same(Real(plan.set_scale * factor)), inverse_t = same(Real(inverse_t_)), shift = same(plan.set_shift);
    const auto gradient = [&](V z) {
      const V centred = z - max, weight = by * power(centred * scale);
      if (!t_.reverse) return weight;
      return select(equal(weight, none), none, weight * fused_multiply_add(centred, inverse_t, shift));
    };
    for (int64_t i = 0; i < tiles_.set_size(); i += 2 * LANES<Real>) {
      const auto z = load_pair(policy_set().data() + i);
      store_pair(tiles_.set_gradient() + i, Pair<Real>{gradient(z.a), gradient(z.b)});
    }
  }

  // ---- from sums to the loss

  KlSlice merged_slices() { return tnt::merged(s_.slices, t_.reverse, inverse_t_, last_); }

  // The sums of what first_pass found, for any reader: references as Reals, and relative to nothing.
  RowSums sums_of(const KlSlice& kept) {
    RowSums s;
    const double x_ref = kept.x_ref + tiles_.x_zero(), o_ref = kept.o_ref + tiles_.o_zero();
    const double x_rest = x_ref - double(Real(x_ref)), o_rest = o_ref - double(Real(o_ref));
    LogSum base{double(Real(x_ref)), kept.log_base + x_rest * inverse_t_, 0},
        other{double(Real(o_ref)), kept.log_other + o_rest * inverse_t_, 0};
    (t_.reverse ? base : other).entropy = kept.policy_entropy;
    s.policy = t_.reverse ? base : other;
    s.reference = t_.reverse ? other : base;
    const auto sum_of_set = [&](std::vector<Real>& logits, double partial) {
      return log_sum_of_set(logits.data(), tiles_.set_size(), t_.partial >= 0, partial, inverse_t_);
    };
    s.policy_set = sum_of_set(policy_set(), label_z_);
    s.reference_set = t_.entropy ? sum_of_set(reference_set(), label_r_) : existence_of_set(reference_set());
    s.label_policy = label_z_, s.label_reference = label_r_;
    s.kl = kept.kl;
    s.log_ratio = kept.has_base() ? kept.log_ratio + (o_rest - x_rest) * inverse_t_ : 0;
    s.kept = double(p_.vocab - tiles_.set_size());
    return s;
  }

  // In a second pass a shard reads its logits as it did in its first: other roundings would not add up to 0.
  void refer_to_here(KlSlice& kept) {
    int64_t first = 0;
    if (tiles_.count() > 0) first_pass().first_shift(false, first);
    const double x_zero = double(tiles_.x_zero()), o_zero = double(tiles_.o_zero());
    if (x_zero == 0 && o_zero == 0 && Pass::is_usable(Real(kept.x_ref)) && Pass::is_usable(Real(kept.o_ref))) return;
    const double x_by = (kept.x_ref - x_zero) * inverse_t_, o_by = (kept.o_ref - o_zero) * inverse_t_;
    kept.log_base += x_by, kept.log_other += o_by, kept.log_ratio += o_by - x_by;
    kept.x_ref = kept.o_ref = 0;
  }

  // From the slices of a whole vocabulary.
  Result conclude(const RowSums& s, bool gathered, KlPlan<Real>& plan) {
    KlSlice kept = s_.slices.size() == 1 ? s_.slices[0] : merged_slices();
    if (t_.log_kappa != 0) {
      label_z_ = s.label_policy, label_r_ = s.label_reference;
      s_.slices.push_back(t_.reverse ? slice_of_partial<true>(kept) : slice_of_partial<false>(kept));
      found_.shift.reset();
      kept = merged_slices();
    }
    if (kept.has_base() && kept.log_other == -INFINITY) kept.kl = INFINITY, kept.log_ratio = -INFINITY;
    RowSums all = s;  // with the partially pushed y
    LogSum base{kept.x_ref + tiles_.x_zero(), kept.log_base, 0}, other{kept.o_ref + tiles_.o_zero(), kept.log_other, 0};
    all.policy = t_.reverse ? base : other;
    all.reference = t_.reverse ? other : base;
    if (gathered && t_.gradient) refer_to_here(kept);
    if (!found_.shift) {
      const double more = std::abs(kept.log_ratio) < 1e29 ? kept.log_ratio : 0;
      found_.shift = KlShift<Real>(inverse_t_, Real(kept.x_ref), Real(kept.o_ref), more);
      found_.moment =
          kept.log_ratio - found_.shift->log_ratio() - kept.kl;  // A = M + Φ is 0, of y relative to log_ratio
    }
    Result result = t_.reverse ? finish<true>(kept, all, plan) : finish<false>(kept, all, plan);
    result.sums = s;
    return result;
  }

  // Of the partially pushed y.
  template <bool REVERSE>
  KlSlice slice_of_partial(const KlSlice& others) const {
    const double x = (REVERSE ? label_z_ : label_r_) - tiles_.x_zero(),
                 o = (REVERSE ? label_r_ : label_z_) - tiles_.o_zero();
    const double log_kappa_x = REVERSE ? 0 : t_.log_kappa, log_kappa_o = REVERSE ? t_.log_kappa : 0;
    KlSlice slice;
    slice.x_ref = KlShift<Real>::usable(Real(x)), slice.o_ref = KlShift<Real>::usable(Real(o));
    // Next to log κ, how the loops round 1/T would show: the distance to the others' logits makes up for it.
    const double rounding = 1 / p_.temperature - inverse_t_;
    if (x != -INFINITY) slice.log_base = (x - slice.x_ref) * inverse_t_ + (x - others.x_ref) * rounding + log_kappa_x;
    if (o != -INFINITY) slice.log_other = (o - slice.o_ref) * inverse_t_ + (o - others.o_ref) * rounding + log_kappa_o;
    if (slice.log_other == -INFINITY) {
      slice.log_ratio = -INFINITY;
      if (slice.has_base()) slice.kl = INFINITY;
      return slice;
    }
    const double difference = o - x;
    slice.log_ratio = (difference - (slice.o_ref - slice.x_ref)) * inverse_t_ +
                      (difference - (others.o_ref - others.x_ref)) * rounding + (log_kappa_o - log_kappa_x);
    if (std::abs(slice.log_ratio) < 32) slice.log_other = slice.log_base + slice.log_ratio;
    return slice;
  }

  template <bool REVERSE>
  Result finish(const KlSlice& kept, const RowSums& all, KlPlan<Real>& plan) const {
    const KlShift<Real>& shift = *found_.shift;  // it has kept's references
    const LogSum& set = all.policy_set;
    const double odds = log_odds(all, inverse_t_);  // p(R)/p(K)
    const bool removes = !set.is_empty();
    const double kept_mass = removes ? 1 / (1 + ::exp(odds)) : 1, removed_mass = removes ? 1 / (1 + ::exp(-odds)) : 0;
    const double pushed = removes ? softplus(odds) : 0;  // -log p(K)
    const bool undefined = is_undefined(REVERSE ? REVERSE_KL : FORWARD_KL, all);
    const KlShift<Real> second = shift.with_sum(kept.log_base, second_sum(REVERSE ? -pushed * UNIT<Real> : 0));
    const double base_sum = ::exp(kept.log_base + second.lead() / UNIT<Real>);  // of the second pass's weights
    plan = {};
    plan.x_ref = shift.x_ref, plan.o_ref = shift.o_ref, plan.c = second.c;
    plan.x_zero = tiles_.x_zero(), plan.o_zero = tiles_.o_zero();
    plan.set_max = Real(removes ? set.ref : 0);
    if (removes) plan.set_scale = Real(removed_mass * ::exp(-set.log));
    Result result;
    if (REVERSE)
      result.loss = reverse_coefficients(kept, set, odds, kept_mass, removed_mass, base_sum, plan);
    else
      result.loss = forward_coefficients(kept, shift, set, odds, pushed, base_sum, plan);
    if (REVERSE) plan.shift = shift.a;
    result.lost = undefined || (REVERSE && !(std::abs(result.loss) < INFINITY));
    if (undefined) result.loss = NAN;
    if (t_.partial >= 0 && !result.lost) plan.partial = Real(partial_gradient<REVERSE>(pushed, result.loss));
    return result;
  }

  double forward_coefficients(const KlSlice& kept, const KlShift<Real>& shift, const LogSum& set, double odds,
                              double pushed, double base_sum, KlPlan<Real>& plan) const {
    // Of the policy's whole sum: the logarithm, and that of its ratio to the base's sum. Where K has next to none of p,
    // terms of theirs would be large.
    double log_policy = kept.log_other + pushed, whole = kept.log_ratio + pushed;
    if (odds > 40) {
      log_policy = set.relative_to(double(tiles_.o_zero()) + double(shift.o_ref), inverse_t_) + softplus(-odds);
      whole = log_policy - kept.log_base;
    }
    constexpr double MOST_SHIFT = std::numeric_limits<Real>::max() / 8;
    whole += (double(shift.o_ref) - double(shift.x_ref)) * inverse_t_;
    whole = std::max(-MOST_SHIFT, std::min(MOST_SHIFT, whole));
    plan.shift = shift.stored(whole);
    plan.rest = Real(whole - shift.value(plan.shift));
    plan.u0 = Real(1 / base_sum);
    plan.u1 = Real(-UNIT<Real> * log_policy);
    return kept.kl + pushed;
  }

  double reverse_coefficients(const KlSlice& kept, const LogSum& set, double odds, double kept_mass,
                              double removed_mass, double base_sum, KlPlan<Real>& plan) const {
    const double log_norm = log1p(p_.eps * double(t_.removed));
    double loss = kept.kl + log_norm, extra = 0;
    if (!set.is_empty()) {
      const double log_eps = ::log(p_.eps);
      const double delta = kept.kl - (odds - set.entropy - log_eps);  // D_K - D_R
      const double small = ::exp(-std::abs(odds)),
                   entropy = log1p(small) + (small > 0 ? small / (1 + small) * std::abs(odds) : 0);
      // p(R) times the log-odds is in the entropy: apart from log p(K) it would cancel against it.
      loss = log_norm - entropy;
      if (kept_mass > 0) loss += kept_mass * kept.kl;
      if (removed_mass > 0) loss -= removed_mass * (set.entropy + log_eps);
      if (removed_mass > 0 && kept_mass > 0) extra = removed_mass * delta;
      plan.set_shift = Real(set.entropy - set.log - (kept_mass > 0 ? kept_mass * delta : 0));
    }
    const double h = kept_mass > 0 ? kept_mass / base_sum : 0;
    plan.u1 = Real(-h);
    plan.u0 = Real(h > 0 ? h * (found_.moment + extra) : 0);
    // Weights of 0, as 0 times an infinite log-ratio would be NaN.
    if (plan.u1 == 0) plan.u0 = 0, plan.c = std::numeric_limits<Real>::max() / 8;
    return loss;
  }

  // Of the partially pushed y, as p - q* or p (log p - log q~ - loss).
  template <bool REVERSE>
  double partial_gradient(double pushed, double loss) const {
    if (REVERSE) {
      const double p = ::exp(last_.log_base - pushed), log_norm = log1p(p_.eps * double(t_.removed));
      return p == 0 ? 0 : p * (log_norm - pushed - last_.y - loss);
    }
    const double q = ::exp(last_.log_base), d = last_.y - pushed;
    if (std::abs(d) < 1) return q * ::expm1(d);
    return ::exp(last_.log_other - pushed) - q;
  }

  const RowCall& p_;
  KlScratch<Real>& s_;
  const double inverse_t_;  // as the loops have it: next to p = q, another rounding would show
  RowTiles<Logit, Gradient> tiles_;
  Task t_;
  double label_z_ = 0, label_r_ = 0;  // of the partially pushed y
  KlFound<Real> found_;               // by this launch's first pass
  KlEntry last_{};                    // of the last slice merged
};

}  // namespace TNT_ISA
}  // namespace tnt
