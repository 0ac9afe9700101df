// A KL row, of a whole vocabulary or of a shard: from the sums of its tiles to its loss, to the numbers of its
// gradient, to the gradient. docs/numerics.md derives the formulas; kl_loops.h has the names.
#pragma once

#include <cmath>
#include <optional>
#include <vector>

#include "cpu/kl_first_pass.h"
#include "cpu/kl_gradient.h"
#include "cpu/log_sum.h"

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
  // log2 of what weights add up to in a second pass: about 4, or less where the factor on them, about 2^exponent, is
  // small. What underflows is then below what a float's gradient holds, and the largest weights' exponents are next to
  // 0, where they are rounded least.
  static double second_sum(double exponent) {
    return 2 + std::max(-64.0, std::min(0.0, (exponent + 32) * EXPONENT_UNIT));
  }
  static constexpr double EXPONENT_UNIT = UNIT<Real> / LOG2_E;  // power()'s argument per factor of 2

  struct Task {
    const Logit *z, *r;
    Gradient* gradient;
    bool reverse, entropy;
    int64_t removed;        // number of tokens, of the whole vocabulary
    const uint64_t* apart;  // the bits of those here and of a partial y; null: there are none
    int64_t partial;        // the column of a y with -1 < w < 0, if it lies here; else -1
    double log_kappa;       // of that y, wherever it lies; else 0
  };

  KlRow(const RowCall& call, int threads, KlScratch<Real>& scratch, const Task& task)
      : p_(call),
        s_(scratch),
        inverse_t_(double(Real(1 / call.temperature))),
        tiles_(call.vocab, threads, scratch.entries),
        t_(task) {
    tiles_.begin(task.reverse ? task.z : task.r, task.reverse ? task.r : task.z, task.apart);
    tiles_.save(task.gradient ? 2 : 0);
    if (task.partial >= 0) label_z_ = double(load(task.z[task.partial])), label_r_ = double(load(task.r[task.partial]));
  }

  // Of this slice of the vocabulary behind first_pass, of all shards behind merge.
  const RowSums& sums() const { return sums_; }

  void first_pass() {
    pass().run(t_.reverse, t_.entropy, found_);
    sum_up();
  }

  // In place of a first pass.
  void merge(const std::vector<RowSums>& shards) {
    sums_ = tnt::merge(shards, inverse_t_);
    s_.slices.clear();
    for (const RowSums& s : shards)
      if (!s.policy.is_empty() || !s.reference.is_empty()) s_.slices.push_back(slice_of(s, t_.reverse));
    if (s_.slices.empty()) s_.slices.emplace_back();
    found_.kept = s_.slices.size() == 1 ? s_.slices[0] : merged(SliceVector{s_.slices}, t_.reverse, inverse_t_);
    merged_ = true;
  }

  PartialSums partial_sums() const { return {}; }  // its statistics say all

  // What follows from the sums of a whole vocabulary.
  RowResult conclude(const PartialSums&, KlPlan<Real>& plan) {
    KlSlice& kept = found_.kept;
    if (t_.log_kappa != 0) add_partial(kept);
    if (kept.has_base() && kept.log_other == -INFINITY) kept.kl = INFINITY, kept.log_ratio = -INFINITY;
    RowSums with_partial;
    if (t_.log_kappa != 0) {
      with_partial = sums_;
      base_of(with_partial) = {kept.x_ref + tiles_.x_zero(), kept.log_base, 0};
      other_of(with_partial) = {kept.o_ref + tiles_.o_zero(), kept.log_other, 0};
    }
    const RowSums& all = t_.log_kappa != 0 ? with_partial : sums_;
    if (merged_ && t_.gradient) refer_to_here(kept);
    KlShift<Real> own;
    if (!found_.shift) {
      const double more = std::abs(kept.log_ratio) < 1e29 ? kept.log_ratio : 0;
      own = KlShift<Real>(inverse_t_, Real(kept.x_ref), Real(kept.o_ref), more);
      found_.moment = kept.log_ratio - own.log_ratio() - kept.kl;  // A = M + Φ is 0, of y relative to log_ratio
    }
    const KlShift<Real>& shift = found_.shift ? *found_.shift : own;  // it has kept's references
    return t_.reverse ? conclude<true>(kept, shift, all, plan) : conclude<false>(kept, shift, all, plan);
  }

  // A second pass whose first was in another launch.
  void resume(const KlPlan<Real>& plan) {
    tiles_.read_relative_to(plan.x_zero, plan.o_zero);
    s_.tiles.resize(size_t(tiles_.count()));
    tiles_.each(false, [&](int64_t k) {
      tiles_.on(k, false, [&](const auto& in, int64_t) { s_.tiles[size_t(k)].careful = has_infinite(in); });
      tiles_.gather(k);
    });
  }

  // Writes the gradient times `factor`; calls done(first, n) with as many columns as are written, for prefetches.
  template <class Done>
  void second_pass(const KlPlan<Real>& plan, double factor, Done done) {
    if (tiles_.set_size() > 0) set_gradients(plan, factor);
    int exponent = 0;
    const double mantissa = ::frexp(factor, &exponent);
    const Real c = Real(double(plan.c) + second_sum(0) - second_sum(exponent));
    const double by = c == plan.c ? factor : factor * ::exp((double(c) - double(plan.c)) / UNIT<Real>);
    const KlShift<Real> shift(inverse_t_, plan.x_ref, plan.o_ref, plan.shift, c);
    const ForwardGradient<Real> forward{plan.shift, plan.rest, Real(plan.u0 * by),
                                        Real(double(plan.u1) + exponent * EXPONENT_UNIT), Real(mantissa)};
    const ReverseGradient<Real> reverse{Real(plan.u0 * by), Real(plan.u1 * by)};
    const std::optional<SavedGradient<Real>> saved = saved_gradient(plan, shift, by);
    tiles_.each(true, [&](int64_t k) {
      const KlTile<Real>& tile = s_.tiles[size_t(k)];
      if (saved && !tile.careful && tile.shift == *found_.first && !Pass::is_too_wide(tile.sums)) {
        tiles_.write_saved(k, t_.gradient, [&](const Real* weights, int64_t n, auto stored, Gradient* to) {
          write_saved<decltype(stored)>(weights, n, *saved, to);
        });
      } else {
        tiles_.write(k, tile.careful, t_.gradient, [&](const auto& in, Gradient* to) {
          t_.reverse ? write_gradient(in, shift, reverse, to) : write_gradient(in, shift, forward, to);
        });
      }
      tiles_.scatter(k, t_.gradient);
      done(p_.vocab - tiles_.end_of(k), tiles_.end_of(k) - k * TILE);
    });
    if (t_.partial >= 0) store(t_.gradient + t_.partial, Real(double(plan.partial) * factor));
  }

 private:
  using Pass = KlFirstPass<Logit, Gradient>;
  Pass pass() {
    const double z = t_.partial >= 0 ? label_z_ : NAN, r = t_.partial >= 0 ? label_r_ : NAN;
    return t_.reverse ? Pass(tiles_, s_, inverse_t_, z, r) : Pass(tiles_, s_, inverse_t_, r, z);
  }

  // Where this launch's first pass saved its weights. `by`: the factor on those of the second pass.
  std::optional<SavedGradient<Real>> saved_gradient(const KlPlan<Real>& plan, const KlShift<Real>& second,
                                                    double by) const {
    if (!found_.first || !tiles_.saved(0)) return {};
    const KlShift<Real>& first = *found_.first;
    // By as much the y of the plan is less.
    const double more = second.value(second.a) - first.value(first.a) + (t_.reverse ? 0 : double(plan.rest));
    if (second.x_ref != first.x_ref || !(std::abs(more) < 1)) return {};  // far apart, products would cancel
    if (second.c != first.c) by *= ::exp((second.lead() - first.lead()) / UNIT<Real>);
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

  // What the first pass found, for any reader: references as Reals, and relative to nothing.
  void sum_up() {
    const KlSlice& kept = found_.kept;
    const double x_ref = kept.x_ref + tiles_.x_zero(), o_ref = kept.o_ref + tiles_.o_zero();
    const double x_rest = x_ref - double(Real(x_ref)), o_rest = o_ref - double(Real(o_ref));
    LogSum &base = base_of(sums_), &other = other_of(sums_);
    base.ref = double(Real(x_ref)), base.log = kept.log_base + x_rest * inverse_t_;
    other.ref = double(Real(o_ref)), other.log = kept.log_other + o_rest * inverse_t_;
    sums_.policy.entropy = kept.policy_entropy;
    sums_.kl = kept.kl;
    if (kept.has_base()) sums_.log_ratio = kept.log_ratio + (o_rest - x_rest) * inverse_t_;
    sums_.label_policy = label_z_, sums_.label_reference = label_r_;
    sums_.kept = double(p_.vocab - tiles_.set_size());
    if (tiles_.set_size() == 0) return;
    const auto sum_of_set = [&](std::vector<Real>& logits, double partial) {
      return log_sum_of_set(logits.data(), tiles_.set_size(), t_.partial >= 0, partial, inverse_t_);
    };
    sums_.policy_set = sum_of_set(policy_set(), label_z_);
    sums_.reference_set = t_.entropy ? sum_of_set(reference_set(), label_r_) : existence_of_set(reference_set());
  }

  LogSum& base_of(RowSums& s) const { return t_.reverse ? s.policy : s.reference; }
  LogSum& other_of(RowSums& s) const { return t_.reverse ? s.reference : s.policy; }

  // In a second pass a shard reads its logits as it did in its first: other roundings would not add up to 0.
  void refer_to_here(KlSlice& kept) {
    int64_t first = 0;
    if (tiles_.count() > 0) pass().sample_row(false, first);
    const double x_zero = double(tiles_.x_zero()), o_zero = double(tiles_.o_zero());
    if (x_zero == 0 && o_zero == 0 && Pass::is_usable(Real(kept.x_ref)) && Pass::is_usable(Real(kept.o_ref))) return;
    const double x_by = (kept.x_ref - x_zero) * inverse_t_, o_by = (kept.o_ref - o_zero) * inverse_t_;
    kept.log_base += x_by, kept.log_other += o_by, kept.log_ratio += o_by - x_by;
    kept.x_ref = kept.o_ref = 0;
  }

  // Puts the partially pushed y to the rest of the row's slices.
  void add_partial(KlSlice& kept) {
    if (!merged_) s_.slices.assign(1, kept);
    label_z_ = sums_.label_policy, label_r_ = sums_.label_reference;
    s_.slices.push_back(t_.reverse ? slice_of_partial<true>(kept) : slice_of_partial<false>(kept));
    found_.shift = nullptr;
    kept = merged(SliceVector{s_.slices}, t_.reverse, inverse_t_);
    partial_ = entry_of(s_.slices.back(), kept, inverse_t_);
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
  RowResult conclude(const KlSlice& kept, const KlShift<Real>& shift, const RowSums& all, KlPlan<Real>& plan) const {
    const LogSum& set = all.policy_set;
    const double odds = log_odds(all, inverse_t_);  // p(R)/p(K)
    const bool removes = !set.is_empty();
    const double kept_mass = removes ? 1 / (1 + ::exp(odds)) : 1, removed_mass = removes ? 1 / (1 + ::exp(-odds)) : 0;
    const double pushed = removes ? softplus(odds) : 0;  // -log p(K)
    const bool undefined = is_undefined(REVERSE ? REVERSE_KL : FORWARD_KL, all);
    plan = {};
    plan.x_ref = shift.x_ref, plan.o_ref = shift.o_ref, plan.c = shift.c;
    double base_sum = found_.sum;  // of the second pass's weights: where it will do, the first's
    const double wanted = second_sum(REVERSE ? -pushed * LOG2_E : 0);
    if (!(found_.shift && wanted == second_sum(0) && base_sum > 0x1p-2 && base_sum < 0x1p6)) {
      const KlShift<Real> second = shift.with_sum(kept.log_base, wanted);
      plan.c = second.c;
      base_sum = ::exp(kept.log_base + second.lead() / UNIT<Real>);
    }
    plan.x_zero = tiles_.x_zero(), plan.o_zero = tiles_.o_zero();
    plan.set_max = Real(removes ? set.ref : 0);
    if (removes) plan.set_scale = Real(removed_mass * ::exp(-set.log));
    RowResult result;
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
      const double p = ::exp(partial_.log_base - pushed), log_norm = log1p(p_.eps * double(t_.removed));
      return p == 0 ? 0 : p * (log_norm - pushed - partial_.y - loss);
    }
    const double q = ::exp(partial_.log_base), d = partial_.y - pushed;
    if (std::abs(d) < 1) return q * ::expm1(d);
    return ::exp(partial_.log_other - pushed) - q;
  }

  const RowCall& p_;
  KlScratch<Real>& s_;
  const double inverse_t_;  // as the loops have it: next to p = q, another rounding would show
  RowTiles<Logit, Gradient> tiles_;
  const Task& t_;
  RowSums sums_;
  double label_z_ = 0, label_r_ = 0;  // of the partially pushed y
  KlFound<Real> found_;               // by this launch's first pass
  bool merged_ = false;               // not by it, but of all shards
  KlEntry partial_{};                 // of the partially pushed y
};

}  // namespace TNT_ISA
}  // namespace tnt
