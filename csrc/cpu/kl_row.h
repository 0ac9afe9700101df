// A KL row, of a whole vocabulary or of a shard: from the sums of its tiles to its loss, to the numbers of its
// gradient, to the gradient. docs/numerics.md derives the formulas; kl_loops.h has the names.
//
// Every tile takes the shift of the row's first one, so that sums just add. A tile whose sums do not fit is summed anew
// with a shift of its own, and becomes a slice: what a tile yields depends on itself and on the first one alone.
#pragma once

#include <cmath>
#include <optional>
#include <vector>

#include "cpu/kl_gradient.h"
#include "cpu/kl_slices.h"

namespace tnt {
inline namespace TNT_ISA {

// Of a tile of the first pass.
template <class Real>
struct KlTile {
  KlSums sums;
  KlShift<Real> shift;  // that they took
  bool has_sums;        // false: they are no numbers
};

template <class Real>
struct KlScratch {
  TileScratch<Real> entries;  // the removed entries, and a partially pushed y
  std::vector<char> careful;  // of every tile: its blocks are far
  std::vector<KlTile<Real>> tiles;
  std::vector<KlSlice> slices;
};

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
  static constexpr int64_t TILE = TILE_ENTRIES<Real>, SAMPLE = 256;
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
    const KlSlice kept = t_.reverse ? (t_.entropy ? first_pass<true, true>() : first_pass<true, false>())
                                    : (t_.entropy ? first_pass<false, true>() : first_pass<false, false>());
    s_.slices.clear();
    s_.slices.push_back(kept);
    return sums_of(kept);
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
    shift_.reset();
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
      if (saved && !is_careful && s_.tiles[size_t(k)].shift == *saved_shift_) {
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
    saved_shift_.reset();
    tiles_.save(t_.gradient ? 2 : 0);
  }

  // Where this launch's first pass saved its weights.
  std::optional<SavedGradient<Real>> saved_gradient(const KlPlan<Real>& plan, double factor) const {
    if (!saved_shift_) return {};
    const KlShift<Real>& first = *saved_shift_;
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

  // ---- the sums of tiles

  enum class Fit { GOOD, REFERENCES, LEVEL };  // what its shift lacks
  static constexpr double MOST = 0x1p100, LEAST = 0x1p-60;

  static bool has_numbers(const KlSums& t) { return t.s < MOST && t.s + t.a < MOST && t.phi == t.phi; }
  static bool is_usable(Real top) { return KlShift<Real>::usable(top) == top; }

  // Next to p = q, φ(L) against Φ/S says how many digits of the KL are lost.
  // Weights may be too large for a level, but not for one of their own: then a logit is no number.
  static Fit judge(const KlSums& t, bool has_own_level, double most_log_ratio, double& log_ratio) {
    const double a = t.a, other = t.s + a, phi = t.phi;
    log_ratio = 0;
    if (!has_numbers(t) || (t.broken != 0 && !has_own_level)) return Fit::REFERENCES;
    if (t.s == 0 || a == 0) return Fit::GOOD;
    if (!(other > 0)) return Fit::REFERENCES;
    const double ratio = a / t.s;
    if (std::abs(ratio) < 0.2 && ratio * a <= 1.5 * phi) return Fit::GOOD;
    log_ratio = log1p(ratio);
    const double excess = phi_of_log(ratio, log_ratio);
    const bool good = std::abs(log_ratio) < most_log_ratio && excess <= 8 * (phi / t.s - excess);
    if (good) return Fit::GOOD;
    return t.s < LEAST ? Fit::REFERENCES : Fit::LEVEL;  // weights that nearly underflow have few digits
  }

  template <bool REVERSE, bool ENTROPY>
  KlSums sums_of(int64_t k, const KlShift<Real>& shift, Real* saved) {
    KlSums t;
    char& careful = s_.careful[size_t(k)];
    const auto sum = [&](const auto& in, int64_t) { t = kl_sums<REVERSE, ENTROPY>(in, shift, saved); };
    tiles_.on(k, careful, sum);
    // Infinite logits, met in a block that was taken for a near one, make a sum NaN. The second pass is told of all.
    if (!careful && !(t.a == t.a && t.phi == t.phi)) tiles_.on(k, true, sum);
    careful |= t.infinite;
    return t;
  }

  KlSample<Real> sample_of(int64_t k, int64_t most) const {
    KlSample<Real> sample;
    tiles_.on(k, false, [&](const auto& in, int64_t n) {
      sample = kl_sample<false>(in, std::min(n, most));
      // NaN hides the maxima, and is in the mean.
      if (!(std::abs(sample.mean) < INFINITY)) sample = kl_sample<true>(in, std::min(n, most));
    });
    return sample;
  }

  // Of both rows, with the partially pushed y and without the mean.
  KlSample<Real> maxima() {
    KlSample<Real> all;
    all.mean = NAN;
    for (int64_t k = 0; k < tiles_.count(); ++k) {
      const KlSample<Real> sample = sample_of(k, TILE);
      all.x_top = std::max(all.x_top, sample.x_top);
      all.o_top = std::max(all.o_top, sample.o_top);
    }
    if (t_.partial >= 0) {
      const Real x = Real(t_.reverse ? label_z_ : label_r_), o = Real(t_.reverse ? label_r_ : label_z_);
      if (x < INFINITY) all.x_top = std::max(all.x_top, x);
      if (o < INFINITY) all.o_top = std::max(all.o_top, o);
    }
    return all;
  }

  KlShift<Real> shift_of(const KlSample<Real>& sample) const {
    const double apart = double(KlShift<Real>::usable(sample.o_top)) - double(KlShift<Real>::usable(sample.x_top));
    const double more = (sample.mean - apart) * inverse_t_;  // the mean is nearer to L than the distance of the maxima
    const bool takes_mean = std::abs(more) > 0.125 && std::abs(more) < 16;
    return {inverse_t_, sample.x_top, sample.o_top, takes_mean ? more : 0};
  }

  // Where x and o are further apart than either from its maximum, o - x has lost digits that differences to the maxima
  // keep: then a row is read relative to them. 16-bit logits have few digits.
  static bool are_close(double x_top, double o_top) { return std::abs(o_top - x_top) <= (sizeof(Logit) == 2 ? 64 : 8); }

  // The row's, from the `first` tile that has usable maxima, or `from_maxima` of all its logits.
  KlShift<Real> first_shift(bool from_maxima, int64_t& first) {
    KlSample<Real> sample;
    while (!from_maxima && first < tiles_.count()) {
      sample = sample_of(first, SAMPLE);
      if (is_usable(sample.x_top) && is_usable(sample.o_top)) break;
      ++first;
    }
    if (from_maxima || first == tiles_.count()) {  // as where all that is kept is masked by huge numbers
      first = 0;
      sample = maxima();
    }
    if (!(is_usable(sample.x_top) && is_usable(sample.o_top) && are_close(sample.x_top, sample.o_top))) {
      const Real x_zero = std::abs(sample.x_top) < INFINITY ? sample.x_top : 0;
      const Real o_zero = std::abs(sample.o_top) < INFINITY ? sample.o_top : 0;
      tiles_.read_relative_to(x_zero, o_zero);
      sample.x_top -= x_zero, sample.o_top -= o_zero, sample.mean -= double(o_zero) - double(x_zero);
    }
    return shift_of(sample);
  }

  template <bool REVERSE, bool ENTROPY>
  KlTile<Real> fitted(int64_t k, const KlShift<Real>& first_shift, double most_log_ratio) {
    KlTile<Real> tile{sums_of<REVERSE, ENTROPY>(k, first_shift, tiles_.saved(k)), first_shift, true};
    for (int attempt = 0; attempt < 3; ++attempt) {
      double log_ratio;
      const Fit fit = judge(tile.sums, attempt > 0, most_log_ratio, log_ratio);
      if (fit == Fit::GOOD) break;
      if (fit == Fit::REFERENCES) {
        // Masked by huge numbers, a tile may have nothing of the other row, and is added as it is.
        const KlSample<Real> sample = sample_of(k, TILE);
        if (attempt > 0 || !(is_usable(sample.x_top) && is_usable(sample.o_top))) {
          tile.has_sums = has_numbers(tile.sums) && tile.sums.broken == 0;
          break;
        }
        tile.shift = shift_of(sample);
      } else {
        const KlShift<Real>& was = tile.shift;
        tile.shift = KlShift<Real>(inverse_t_, was.x_ref, was.o_ref, was.more + log_ratio);
      }
      most_log_ratio = 3;
      tile.sums = sums_of<REVERSE, ENTROPY>(k, tile.shift, tiles_.saved(k));
    }
    if (ENTROPY) refine_entropy<REVERSE>(k, !(tile.shift == first_shift), tile);
    return tile;
  }

  // Where weights add up to much, their logarithms hide the entropy: it is taken from weights that add up to about 1.
  // So it is where they add up to little, unless the row's other tiles, which share the shift, have more.
  template <bool REVERSE>
  void refine_entropy(int64_t k, bool has_own_shift, KlTile<Real>& tile) {
    const double weight = REVERSE ? tile.sums.s : tile.sums.s + tile.sums.a;
    if (!(weight < MOST && (weight > 0x1p10 || (has_own_shift && weight < 0x1p-10 && weight > 1 / MOST)))) return;
    const double by = ::log(weight) / inverse_t_;
    const KlShift<Real> shift(inverse_t_, Real(tile.shift.x_ref + by), Real(tile.shift.o_ref + by), tile.shift.more);
    const KlSlice slice = slice_of(sums_of<REVERSE, true>(k, shift, nullptr), shift, REVERSE, true);
    tile.sums.entropy = weight * (::log(weight) - slice.policy_entropy) * UNIT<Real>;
  }

  // Whether there is an infinite log-ratio, or one that no sum of floats holds, as where the lowest number masks one
  // row.
  static bool is_too_wide(const KlSums& t) { return !(t.phi < INFINITY && t.m > -INFINITY) && t.s < MOST; }

  // Whether a tile has nothing of the base, but so much of the other that the row's KL would lose digits to its L.
  static bool lacks_base(const KlSums& t) { return t.s == 0 && t.a > 0.125; }

  // The tile as slices that are summed in double.
  template <bool REVERSE, bool ENTROPY>
  void add_wide(int64_t k, const KlShift<Real>& shift) {
    const KlShift<double> wide(inverse_t_, double(shift.x_ref), double(shift.o_ref), shift.more);
    tiles_.on(k, true, [&](const auto& in, int64_t) {
      constexpr int64_t SOME = BLOCK_ENTRIES<double>;
      double x[SOME], o[SOME];
      KlSums t;
      for (int64_t i = 0; i < in.n; i += SOME) {
        for (int64_t j = 0; j < SOME; ++j) x[j] = double(load(in.base[i + j])), o[j] = double(load(in.other[i + j]));
        t += kl_sums<REVERSE, ENTROPY>(TileEntries<double>{x, o, SOME, in.bits, in.entry + i, true}, wide);
      }
      s_.slices.push_back(slice_of(t, wide, REVERSE, ENTROPY));
    });
  }

  KlSlice merged_slices() { return tnt::merged(s_.slices, t_.reverse, inverse_t_, last_); }

  template <bool REVERSE, bool ENTROPY>
  KlSlice first_pass() {
    bool has_sums = true;
    const KlSlice kept = first_pass<REVERSE, ENTROPY>(false, has_sums);
    if (has_sums && are_close(kept.x_ref, kept.o_ref)) return kept;
    start(t_);  // some logits are larger than the first ones let expect
    return first_pass<REVERSE, ENTROPY>(true, has_sums);
  }

  template <bool REVERSE, bool ENTROPY>
  KlSlice first_pass(bool from_maxima, bool& has_sums) {
    s_.slices.clear();
    shift_.reset();
    if (tiles_.count() == 0) return {};
    int64_t first = 0;
    const KlShift<Real> sampled = first_shift(from_maxima, first);
    const KlTile<Real> first_tile = fitted<REVERSE, ENTROPY>(first, sampled, 0.25);
    const KlShift<Real> shift = first_tile.shift;
    if (tiles_.saved(0)) saved_shift_ = shift;
    s_.tiles.assign(size_t(tiles_.count()), first_tile);
    tiles_.each(false, [&](int64_t k) {
      if (k != first) s_.tiles[size_t(k)] = fitted<REVERSE, ENTROPY>(k, shift, 3);
      tiles_.gather(k);
    });
    // The first tile's sums come first.
    KlSums total;
    const auto add = [&](int64_t k) {
      const KlTile<Real>& tile = s_.tiles[size_t(k)];
      has_sums &= tile.has_sums;
      if (is_too_wide(tile.sums))
        add_wide<REVERSE, ENTROPY>(k, tile.shift);
      else if (tile.shift == shift && !lacks_base(tile.sums))
        total += tile.sums;
      else
        s_.slices.push_back(slice_of(tile.sums, tile.shift, REVERSE, ENTROPY));
    };
    add(first);
    for (int64_t k = 0; k < tiles_.count(); ++k)
      if (k != first) add(k);

    // All that was read may have nothing of the other row, unless other maxima show it.
    const bool lacks_other = total.s > 0 && total.s + total.a <= 0;
    has_sums &= !(lacks_other && total.phi < INFINITY && s_.slices.empty());
    const KlSlice kept = slice_of(total, shift, REVERSE, ENTROPY);
    if (s_.slices.empty()) {
      shift_ = shift;
      moment_ = total.m / total.s;
      return kept;
    }
    if (kept.log_base != -INFINITY || kept.log_other != -INFINITY) s_.slices.insert(s_.slices.begin(), kept);
    return merged_slices();
  }

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
    if (tiles_.count() > 0) first_shift(false, first);
    const double x_zero = double(tiles_.x_zero()), o_zero = double(tiles_.o_zero());
    if (x_zero == 0 && o_zero == 0 && is_usable(Real(kept.x_ref)) && is_usable(Real(kept.o_ref))) return;
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
      shift_.reset();
      kept = merged_slices();
    }
    if (kept.has_base() && kept.log_other == -INFINITY) kept.kl = INFINITY, kept.log_ratio = -INFINITY;
    RowSums all = s;  // with the partially pushed y
    LogSum base{kept.x_ref + tiles_.x_zero(), kept.log_base, 0}, other{kept.o_ref + tiles_.o_zero(), kept.log_other, 0};
    all.policy = t_.reverse ? base : other;
    all.reference = t_.reverse ? other : base;
    if (gathered && t_.gradient) refer_to_here(kept);
    if (!shift_) {
      const double more = std::abs(kept.log_ratio) < 1e29 ? kept.log_ratio : 0;
      shift_ = KlShift<Real>(inverse_t_, Real(kept.x_ref), Real(kept.o_ref), more);
      moment_ = kept.log_ratio - shift_->log_ratio() - kept.kl;  // A = M + Φ is 0, of y relative to log_ratio
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
    const KlShift<Real>& shift = *shift_;  // it has kept's references
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
    plan.u0 = Real(h > 0 ? h * (moment_ + extra) : 0);
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
  double label_z_ = 0, label_r_ = 0;          // of the partially pushed y
  std::optional<KlShift<Real>> shift_;        // of the whole row, if its sums are of one shift
  std::optional<KlShift<Real>> saved_shift_;  // of the weights that a first pass saved
  double moment_ = 0;                         // mean of y, relative to that shift
  KlEntry last_{};                            // of the last slice merged
};

}  // namespace TNT_ISA
}  // namespace tnt
