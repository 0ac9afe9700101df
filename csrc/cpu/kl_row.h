// A KL row, of a whole vocabulary or of a shard: from the sums of its tiles to its loss, to the numbers of its
// gradient, to the gradient. docs/numerics.md derives the formulas; kl_loops.h has the names.
#pragma once

#include <cmath>
#include <optional>
#include <vector>

#include "cpu/kl_first_pass.h"
#include "cpu/kl_gradient.h"
#include "cpu/log_sum.h"
#include "kl_conclusion.h"

namespace tnt {
inline namespace TNT_ISA {

template <class Logit, class Gradient>
class KlRow {
 public:
  using Real = RealOf<Logit>;
  static constexpr int64_t TILE = TILE_ENTRIES<Real>;
  struct Task {
    Stream<Logit> z, r;
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
        t_(task),
        row_{task.reverse,         inverse_t_,     1 / call.temperature, call.eps,
             double(task.removed), task.log_kappa, task.partial >= 0} {
    tiles_.begin(task.reverse ? task.z : task.r, task.reverse ? task.r : task.z, task.apart);
    tiles_.save(task.gradient ? 2 : 0);
    if (task.partial >= 0) label_z_ = double(task.z[task.partial]), label_r_ = double(task.r[task.partial]);
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
    const KlEntry label = complete<Real>(row_, sums_, kept);
    if (row_.log_kappa != 0) found_.shift = nullptr;
    if (merged_ && t_.gradient) refer_to_here(kept);
    return tnt::conclude(row_, sums_, kept, label, found_.shift, {found_.sum, found_.moment}, plan);
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
    const Real c = Real(double(plan.c) + second_sum<Real>(0) - second_sum<Real>(exponent));
    const double by = c == plan.c ? factor : factor * ::exp((double(c) - double(plan.c)) / UNIT<Real>);
    const KlShift<Real> shift(inverse_t_, plan.x_ref, plan.o_ref, plan.shift, c);
    const ForwardGradient<Real> forward{plan.shift, plan.rest, Real(plan.u0 * by),
                                        Real(double(plan.u1) + exponent * EXPONENT_UNIT<Real>), Real(mantissa)};
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

  void sum_up() {
    row_.x_zero = double(tiles_.x_zero()), row_.o_zero = double(tiles_.o_zero());
    describe<Real>(found_.kept, row_, sums_);
    sums_.label_policy = label_z_, sums_.label_reference = label_r_;
    sums_.kept = double(p_.vocab - tiles_.set_size());
    if (tiles_.set_size() == 0) return;
    const auto sum_of_set = [&](std::vector<Real>& logits, double partial) {
      return log_sum_of_set(logits.data(), tiles_.set_size(), t_.partial >= 0, partial, inverse_t_);
    };
    sums_.policy_set = sum_of_set(policy_set(), label_z_);
    sums_.reference_set = t_.entropy ? sum_of_set(reference_set(), label_r_) : existence_of_set(reference_set());
  }

  // In a second pass a shard reads its logits as it did in its first: other roundings would not add up to 0.
  void refer_to_here(KlSlice& kept) {
    int64_t first = 0;
    if (tiles_.count() > 0) pass().sample_row(false, first);
    const double x_zero = double(tiles_.x_zero()), o_zero = double(tiles_.o_zero());
    const bool usable = Pass::is_usable(Real(kept.x_ref)) && Pass::is_usable(Real(kept.o_ref));
    if (x_zero != 0 || o_zero != 0 || !usable) read_relative_to(x_zero, o_zero, row_, kept);
  }

  const RowCall& p_;
  KlScratch<Real>& s_;
  const double inverse_t_;  // as the loops have it: next to p = q, another rounding would show
  RowTiles<Logit, Gradient> tiles_;
  const Task& t_;
  KlScalars row_;
  RowSums sums_;
  double label_z_ = 0, label_r_ = 0;  // of the partially pushed y
  KlFound<Real> found_;               // by this launch's first pass
  bool merged_ = false;               // not by it, but of all shards
};

}  // namespace TNT_ISA
}  // namespace tnt
