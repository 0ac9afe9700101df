// A KL row of a whole vocabulary: from the sums of its tiles to its loss, to the numbers of its gradient, to the
// gradient. docs/numerics.md derives the formulas; kl_loops.h has the names.
//
// Every tile takes the shift of the row's first one, so that sums just add. A tile whose sums do not fit is summed anew
// with a shift of its own, and becomes a slice: what a tile yields depends on itself and on the first one alone.
#pragma once

#include <cmath>
#include <vector>

#include "cpu/kl_loops.h"
#include "row_rules.h"
#include "statistics.h"

namespace tnt {
inline namespace TNT_ISA {

// φ(L) of L = log1p(ratio), without cancellation.
TNT_FN double phi_of_log(double ratio, double log_ratio) {
  return std::abs(log_ratio) < 0.5 ? expm1_phi(log_ratio).phi : ratio - log_ratio;
}

// A set of a vocabulary's tokens, a bit each. Between rows it holds the tokens that all rows share.
class TokenSet {
 public:
  TokenSet() = default;
  explicit TokenSet(int64_t vocab) { reserve(vocab); }

  void begin_call(int64_t vocab, const std::vector<int32_t>& shared) {
    reserve(vocab);
    for (const int32_t id : shared) insert(id);
  }
  void end_call(const std::vector<int32_t>& shared) {
    for (const int32_t id : shared) erase(id);
  }
  bool insert(int64_t id) {  // whether it is new
    uint64_t& word = words_[size_t(id / 64)];
    const uint64_t before = word;
    word |= uint64_t(1) << (id % 64);
    return word != before;
  }
  void erase(int64_t id) { words_[size_t(id / 64)] &= ~(uint64_t(1) << (id % 64)); }
  const uint64_t* words() const { return words_.data(); }
  std::vector<int32_t> ascending() const {
    std::vector<int32_t> ids;
    for (size_t i = 0; i < words_.size(); ++i)
      for (uint64_t word = words_[i]; word; word &= word - 1)
        ids.push_back(int32_t(i * 64 + size_t(__builtin_ctzll(word))));
    return ids;
  }

 private:
  void reserve(int64_t vocab) {
    const size_t words = size_t(vocab / 64) + 8;  // a tile's last block may end beyond the vocabulary
    if (words_.size() < words) words_.resize(words);
  }
  std::vector<uint64_t> words_;
};

// Part of the kept entries, with sums of its own.
struct KlSlice {
  double x_ref = 0, o_ref = 0;   // near its maxima
  double log_base = -INFINITY;   // of its base's sum, relative to x_ref/T
  double log_other = -INFINITY;  // of the other's, relative to o_ref/T
  // Of the other's sum to the base's, where there is a base; of a slice without the other, the mean of all log-ratios.
  double log_ratio = 0;
  double kl = 0;              // of base against other within the slice
  double policy_entropy = 0;  // within the slice
  bool has_base() const { return log_base > -INFINITY; }
};

template <class Real>
struct KlScratch {
  TokenSet removed;
  alignas(64) Real x[KL_TILE<Real>], o[KL_TILE<Real>];  // a tile that is not read where it lies
  alignas(64) Real gradient[KL_TILE<Real>];             // of any type that is stored
  std::vector<int32_t> set_begin;                       // of every tile: its first place in the set's arrays
  std::vector<char> careful;                            // of every tile
  std::vector<Real> set_x, set_o, set_gradient;         // the removed entries' logits and gradients
  std::vector<KlSlice> slices;
};

// What a row's second pass takes, for a factor of 1. It may have to wait for its factor: as Reals it is kept till then.
template <class Real>
struct KlPlan {
  Real x_ref, o_ref, c;  // of KlShift
  Real x_zero, o_zero;   // what logits are read relative to
  Real shift, rest;      // forward: of y*; reverse: the shift of y
  Real u0, u1;           // forward: h, p_shift; reverse: k0, k1
  Real careful;          // for a second pass alone: 1 if some tile was
  Real set_max, set_scale,
      set_shift;  // of removed entries: t = (z - set_max)/T, gradient set_scale e^t (t + set_shift)
  Real partial;   // the gradient of a y with -1 < w < 0
};

template <class Logit, class Gradient>
class KlRow {
 public:
  using Real = RealOf<Logit>;
  static constexpr int64_t TILE = KL_TILE<Real>;
  // In a second pass weights add up to about 4, or less where the factor on them is small: what underflows is then
  // below what a float's gradient holds. The largest weights' exponents are next to 0, where they are rounded least.
  static double second_sum(double log_factor) { return 2 + std::max(-64.0, std::min(0.0, log_factor + 32)); }

  struct Task {
    const Logit *z, *r;
    Gradient* gradient;
    bool reverse, entropy;
    int64_t removed = 0;   // number of tokens
    int64_t partial = -1;  // y with -1 < w < 0: among the scratch's removed tokens, but none
    double log_kappa = 0;  // of that y
  };
  struct Result {
    double loss;
    bool lost;  // the gradient is NaN
    RowStatistics statistics;
  };

  KlRow(const RowCall& call, KlScratch<Real>& scratch)
      : p_(call), s_(scratch), inverse_t_(double(Real(1 / call.temperature))), tiles_((call.vocab + TILE - 1) / TILE) {}

  Result first_pass(const Task& task, KlPlan<Real>& plan) {
    start(task);
    return task.reverse ? (task.entropy ? first_pass<true, true>(plan) : first_pass<true, false>(plan))
                        : (task.entropy ? first_pass<false, true>(plan) : first_pass<false, false>(plan));
  }

  // A second pass whose first was in another launch.
  void resume(const Task& task, const KlPlan<Real>& plan) {
    start(task);
    x_zero_ = plan.x_zero, o_zero_ = plan.o_zero;
    s_.careful.assign(size_t(tiles_), plan.careful != 0);
    for (int64_t k = 0; k < tiles_; ++k) gather_set(k);
  }

  // Writes the gradient times `factor`; calls done(first, n) with as many columns as are written, for prefetches.
  template <class Done>
  void second_pass(const KlPlan<Real>& plan, double factor, Done done) {
    set_gradients(plan, factor);
    const double log_factor = ::log(std::abs(factor)) * UNIT<Real>;
    const Real c = Real(double(plan.c) + second_sum(0) - second_sum(log_factor));
    const KlShift<Real> shift(inverse_t_, plan.x_ref, plan.o_ref, plan.shift, c);
    const double by = factor * ::exp((double(c) - double(plan.c)) / UNIT<Real>);
    const ForwardGradient<Real> forward{plan.shift, plan.rest, Real(plan.u0 * by), Real(double(plan.u1) + log_factor),
                                        Real(factor < 0 ? -1 : 1)};
    const ReverseGradient<Real> reverse{Real(plan.u0 * by), Real(plan.u1 * by)};
    for (int64_t k = tiles_ - 1; k >= 0; --k) {
      const Real* const set = s_.set_gradient.data() + s_.set_begin[size_t(k)];
      on_tile(k, [&](const auto* x, const auto* o, int64_t at, int64_t n, int64_t padded) {
        Gradient* const to = n == padded ? t_.gradient + at : reinterpret_cast<Gradient*>(s_.gradient);
        const auto in = entries(x, o, padded, at, s_.careful[size_t(k)] != 0);
        t_.reverse ? write_gradient(in, shift, reverse, to, set) : write_gradient(in, shift, forward, to, set);
        if (n != padded) memcpy(t_.gradient + at, to, size_t(n) * sizeof(Gradient));
        done(p_.vocab - at - n, n);
      });
    }
    if (t_.partial >= 0) store(t_.gradient + t_.partial, Real(double(plan.partial) * factor));
  }

 private:
  void start(const Task& task) {
    t_ = task;
    base_ = task.reverse ? task.z : task.r;
    other_ = task.reverse ? task.r : task.z;
    bits_ = task.removed || task.partial >= 0 ? s_.removed.words() : nullptr;
    set_size_ = task.removed + (task.partial >= 0);
    x_zero_ = o_zero_ = 0;
    label_z_ = label_r_ = 0;
    s_.set_begin.assign(size_t(tiles_), 0);
    s_.careful.assign(size_t(tiles_), 0);
    gathered_ = 0;
    const size_t room = size_t(set_size_) + TAKE_SLACK;
    if (s_.set_x.size() < room) {
      s_.set_x.resize(room);
      s_.set_o.resize(room);
      s_.set_gradient.resize(room);
    }
  }

  bool is_read_in_place() const { return x_zero_ == 0 && o_zero_ == 0; }

  // body(x, o, at, n, padded): the tile's columns [at, at + n), where they lie or as Real, with entries that weigh
  // nothing up to a whole block.
  template <class Body>
  void on_tile(int64_t k, Body body) {
    const int64_t at = k * TILE, n = std::min(TILE, p_.vocab - at);
    const int64_t padded = (n + BLOCK_ENTRIES<Real> - 1) / BLOCK_ENTRIES<Real> * BLOCK_ENTRIES<Real>;
    if (n == padded && is_read_in_place()) return body(base_ + at, other_ + at, at, n, padded);
    for (int64_t i = 0; i < n; ++i) s_.x[i] = load(base_[at + i]) - x_zero_;
    for (int64_t i = 0; i < n; ++i) s_.o[i] = load(other_[at + i]) - o_zero_;
    std::fill(s_.x + n, s_.x + padded, Real(AWAY));
    std::fill(s_.o + n, s_.o + padded, Real(AWAY));
    body(static_cast<const Real*>(s_.x), static_cast<const Real*>(s_.o), at, n, padded);
  }

  template <class Stored>
  KlEntries<Stored> entries(const Stored* x, const Stored* o, int64_t n, int64_t at, bool careful) const {
    return {x, o, n, bits_, at, careful};
  }

  // ---- the removed entries

  // Of a tile, after those before it.
  void gather_set(int64_t k) {
    s_.set_begin[size_t(k)] = gathered_;
    if (!bits_) return;
    const int64_t begin = k * TILE, end = std::min(begin + TILE, p_.vocab);
    uint64_t any = 0;
    for (int64_t word = begin / 64; word <= (end - 1) / 64; ++word) any |= bits_[word];
    if (!any) return;
    Real *x = s_.set_x.data() + gathered_, *o = s_.set_o.data() + gathered_;
    // A padded tile is Real, and its order that of Real.
    const bool in_place = end - begin == TILE || (end - begin) % BLOCK_ENTRIES<Real> == 0;
    for (int64_t at = begin; at < end; at += BLOCK_ENTRIES<Real>) {
      uint64_t removed = block_bits<Real>(bits_, at);
      if (!removed) continue;
      if (in_place && is_read_in_place()) {
        take(removed, base_ + at, x);
        take(removed, other_ + at, o);
        continue;
      }
      for (; removed; removed &= removed - 1) {
        *x++ = load(base_[at + __builtin_ctzll(removed)]);
        *o++ = load(other_[at + __builtin_ctzll(removed)]);
      }
    }
    gathered_ = int32_t(x - s_.set_x.data());
  }

  // Σ e^{(x - max)/T} and its moment; NaN if a logit is none. The partially pushed y is among them, as `partial`: an
  // entry that equals it stands in for it, and is left out.
  ExpSum exp_sum_of_set(std::vector<Real>& logits, Real partial) const {
    ExpSum sum;
    if (t_.removed == 0) return sum;
    Real* const x = logits.data();
    Real* const out = t_.partial >= 0 ? std::find(x, x + set_size_, partial) : x + set_size_;
    if (out != x + set_size_) *out = -INFINITY;
    const Real scale = exponent_scale<Real>(inverse_t_), inverse_t = Real(inverse_t_);
    Real top = -std::numeric_limits<Real>::max();
    for (int64_t i = 0; i < set_size_; ++i) top = x[i] > top ? x[i] : top;
    for (int64_t at = 0; at < set_size_; at += TILE) {
      const int64_t end = std::min(set_size_, at + TILE);
      Real total = 0, moment = 0;
#pragma omp simd reduction(+ : total, moment)
      for (int64_t i = at; i < end; ++i) {
        const Real centred = x[i] - top, weight = exponential(centred * scale);
        total += weight;
        moment += weight == Real(0) ? Real(0) : weight * (centred * inverse_t);
      }
      sum.sum += total;
      sum.moment += moment;
    }
    sum.max = double(top);
    if (out != x + set_size_) *out = partial;
    return sum;
  }

  void set_gradients(const KlPlan<Real>& plan, double factor) {
    const std::vector<Real>& policy = t_.reverse ? s_.set_x : s_.set_o;
    const Real scale = exponent_scale<Real>(inverse_t_), inverse_t = Real(inverse_t_),
               by = Real(plan.set_scale * factor);
    const Real max = plan.set_max, shift = plan.set_shift;
    Real* const to = s_.set_gradient.data();
    const Real* const z = policy.data();
    const bool reverse = t_.reverse;
#pragma omp simd
    for (int64_t i = 0; i < set_size_; ++i) {
      const Real centred = z[i] - max, weight = by * exponential(centred * scale);
      const Real slope = reverse ? centred * inverse_t + shift : Real(1);
      to[i] = weight == Real(0) ? Real(0) : weight * slope;
    }
  }

  // ---- the sums of tiles

  enum class Fit { GOOD, REFERENCES, LEVEL };  // what its shift lacks
  static constexpr double MOST = 0x1p100;

  static bool has_numbers(const KlSums& t) {
    return t.s < MOST && t.s + t.a() < MOST && t.phi() == t.phi() && t.broken == 0;
  }
  static bool is_usable(Real top) { return KlShift<Real>::usable(top) == top; }

  // Next to p = q, φ(L) against Φ/S says how many digits of the KL are lost.
  static Fit judge(const KlSums& t, double most_log_ratio, double& log_ratio) {
    const double a = t.a(), other = t.s + a, phi = t.phi();
    log_ratio = 0;
    if (!has_numbers(t)) return Fit::REFERENCES;
    if (t.s == 0 || a == 0) return Fit::GOOD;
    if (!(other > 0)) return Fit::REFERENCES;
    const double ratio = a / t.s;
    if (std::abs(ratio) < 0.2 && ratio * a <= 1.5 * phi) return Fit::GOOD;
    log_ratio = log1p(ratio);
    const double excess = phi_of_log(ratio, log_ratio);
    const bool good = std::abs(log_ratio) < most_log_ratio && excess <= 8 * (phi / t.s - excess);
    return good ? Fit::GOOD : Fit::LEVEL;
  }

  template <bool REVERSE, bool ENTROPY>
  KlSums sums_of(int64_t k, const KlShift<Real>& shift) {
    KlSums t;
    char& careful = s_.careful[size_t(k)];
    on_tile(k, [&](const auto* x, const auto* o, int64_t at, int64_t, int64_t padded) {
      t = kl_sums<REVERSE, ENTROPY>(entries(x, o, padded, at, careful != 0), shift);
      // Infinite logits, met in a block that was taken for a near one, make a sum NaN. The second pass is told of all.
      const bool again = !careful && !(t.m == t.m && t.f == t.f && t.far_f == t.far_f);
      if (again) t = kl_sums<REVERSE, ENTROPY>(entries(x, o, padded, at, true), shift);
      careful |= t.infinite;
    });
    return t;
  }

  KlSample<Real> sample_of(int64_t k, int64_t most) {
    KlSample<Real> sample;
    on_tile(k, [&](const auto* x, const auto* o, int64_t at, int64_t n, int64_t) {
      sample = kl_sample(x, o, std::min(n, most), bits_, at);
    });
    return sample;
  }

  // Of both rows, with the partially pushed y and without the mean.
  KlSample<Real> maxima() {
    KlSample<Real> all;
    for (int64_t k = 0; k < tiles_; ++k) {
      const KlSample<Real> sample = sample_of(k, TILE);
      all.x_top = std::max(all.x_top, sample.x_top);
      all.o_top = std::max(all.o_top, sample.o_top);
    }
    if (t_.partial >= 0) {
      const Real x = load(base_[t_.partial]), o = load(other_[t_.partial]);
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
  static constexpr double CLOSE_LOGITS = sizeof(Logit) == 2 ? 64 : 8;

  // The row's, from the `first` tile that has usable maxima, or `from_maxima` of all its logits.
  KlShift<Real> first_shift(bool from_maxima, int64_t& first) {
    KlSample<Real> sample;
    while (!from_maxima && first < tiles_) {
      sample = sample_of(first, 256);
      if (is_usable(sample.x_top) && is_usable(sample.o_top)) break;
      ++first;
    }
    if (from_maxima || first == tiles_) {  // as where all that is kept is masked by huge numbers
      first = 0;
      sample = maxima();
    }
    const double apart = std::abs(sample.mean) < INFINITY ? sample.mean : double(sample.o_top) - double(sample.x_top);
    if (!(is_usable(sample.x_top) && is_usable(sample.o_top) && std::abs(apart) <= CLOSE_LOGITS)) {
      x_zero_ = std::abs(sample.x_top) < INFINITY ? sample.x_top : 0;
      o_zero_ = std::abs(sample.o_top) < INFINITY ? sample.o_top : 0;
      sample = sample_of(first, 256);
    }
    return shift_of(sample);
  }

  // A tile's sums, and the shift that they took.
  template <bool REVERSE, bool ENTROPY>
  KlSums fitted(int64_t k, KlShift<Real>& shift, double most_log_ratio) {
    KlSums t = sums_of<REVERSE, ENTROPY>(k, shift);
    for (int attempt = 0; attempt < 3; ++attempt) {
      double log_ratio;
      const Fit fit = judge(t, most_log_ratio, log_ratio);
      if (fit == Fit::GOOD) break;
      if (fit == Fit::REFERENCES) {
        // Masked by huge numbers, a tile may have nothing of the other row, and is added as it is.
        const KlSample<Real> sample = sample_of(k, TILE);
        if (attempt > 0 || !(is_usable(sample.x_top) && is_usable(sample.o_top))) {
          unfit_ |= !has_numbers(t);
          break;
        }
        shift = shift_of(sample);
      } else {
        shift = KlShift<Real>(inverse_t_, shift.x_ref, shift.o_ref, shift.more + log_ratio);
      }
      most_log_ratio = 3;
      t = sums_of<REVERSE, ENTROPY>(k, shift);
    }
    return t;
  }

  // Whether there is an infinite log-ratio, or one that no sum of floats holds, as where the lowest number masks one
  // row.
  static bool is_too_wide(const KlSums& t) { return !(t.phi() < INFINITY && t.far_m > -INFINITY) && t.s < MOST; }

  // The tile as slices that are summed in double.
  template <bool REVERSE, bool ENTROPY>
  void add_wide(int64_t k, const KlShift<Real>& shift) {
    const KlShift<double> wide(inverse_t_, double(shift.x_ref), double(shift.o_ref), shift.more);
    on_tile(k, [&](const auto* x, const auto* o, int64_t at, int64_t, int64_t padded) {
      constexpr int64_t SOME = BLOCK_ENTRIES<double>;
      double wide_x[SOME], wide_o[SOME];
      KlSums t;
      for (int64_t i = 0; i < padded; i += SOME) {
        for (int64_t j = 0; j < SOME; ++j) wide_x[j] = double(load(x[i + j])), wide_o[j] = double(load(o[i + j]));
        t += kl_sums<REVERSE, ENTROPY>(entries<double>(wide_x, wide_o, SOME, at + i, true), wide);
      }
      s_.slices.push_back(slice_of(t, wide, REVERSE));
    });
  }

  template <class Number>
  KlSlice slice_of(const KlSums& t, const KlShift<Number>& shift, bool reverse) const {
    const double a = t.a(), other = t.s + a;
    KlSlice slice;
    slice.x_ref = shift.x_ref, slice.o_ref = shift.o_ref;
    if (t.broken != 0) {
      slice.log_base = slice.log_ratio = slice.kl = NAN;
    } else if (t.s != 0) {
      const double ratio = a / t.s, excess_log = log1p(ratio);
      slice.log_base = ::log(t.s) - shift.lead() / UNIT<Number>;
      slice.log_ratio = shift.value(shift.a) + excess_log;
      const double kl = t.phi() / t.s - phi_of_log(ratio, excess_log);
      slice.kl = kl < 0 ? 0 : kl;
      if (other <= 0) slice.log_ratio = shift.value(shift.a) - 1 - t.phi() / t.s, slice.kl = 0;
    }
    // e e^y is 2^rho at o_ref. log1p keeps what log(other) would lose next to equal sums.
    if (t.broken == 0 && t.s > 0 && other > 0)
      slice.log_other = ::log(t.s) + log1p(a / t.s) - shift.log_lead_of_other();
    else if (other > 0 || other != other)
      slice.log_other = ::log(other) - shift.log_lead_of_other();
    const double weight = reverse ? t.s : other;
    if (t_.entropy && weight > 0) slice.policy_entropy = ::log(weight) - t.entropy / UNIT<Number> / weight;
    return slice;
  }

  static double log_sum(double a, double b) {  // log(e^a + e^b)
    if (a == -INFINITY || b != b) return b;
    if (b == -INFINITY || a != a) return a;
    return a > b ? a + log1p(::exp(b - a)) : b + log1p(::exp(a - b));
  }

  // The slices as entries of a row of their own: all terms are >= 0.
  KlSlice merged(const std::vector<KlSlice>& slices, bool reverse) {
    // Relative to those that weigh most. They are found relative to the first.
    KlSlice all;
    double top_base = -INFINITY, top_other = -INFINITY;
    all.x_ref = slices[0].x_ref, all.o_ref = slices[0].o_ref;
    for (const KlSlice& slice : slices) {
      const double base = slice.log_base + (slice.x_ref - slices[0].x_ref) * inverse_t_;
      const double other = slice.log_other + (slice.o_ref - slices[0].o_ref) * inverse_t_;
      if (base > top_base) top_base = base, all.x_ref = slice.x_ref;
      if (other > top_other) top_other = other, all.o_ref = slice.o_ref;
    }
    const auto log_base = [&](const KlSlice& slice) { return slice.log_base + (slice.x_ref - all.x_ref) * inverse_t_; };
    const auto log_other = [&](const KlSlice& slice) {
      return slice.log_other + (slice.o_ref - all.o_ref) * inverse_t_;
    };
    for (const KlSlice& slice : slices) {
      all.log_base = log_sum(all.log_base, log_base(slice));
      all.log_other = log_sum(all.log_other, log_other(slice));
    }
    // Of equal rows, the sums are equal.
    all.log_ratio = (all.log_other - all.log_base) + (all.o_ref - all.x_ref) * inverse_t_;
    double masses = 0;
    for (const KlSlice& slice : slices) {
      const double base_share = slice.has_base() ? ::exp(log_base(slice) - all.log_base) : 0;
      const double other_share = slice.log_other > -INFINITY ? ::exp(log_other(slice) - all.log_other) : 0;
      // Of a slice with nearly all the mass, both differences are 0, where a large log-ratio has lost those digits.
      const bool whole = base_share != 0 && other_share != 0;
      const double y = whole && std::abs(slice.log_ratio) > 32
                           ? (log_other(slice) - all.log_other) - (log_base(slice) - all.log_base)
                           : slice.log_ratio - all.log_ratio;
      last_y_ = y;
      if (whole && std::abs(y) < 1) {
        all.kl += base_share * (expm1_phi(y).phi + slice.kl);
      } else {  // share φ(y) = other's share - share - share y: the first two add up apart, to about 0
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

  template <bool REVERSE, bool ENTROPY>
  Result first_pass(KlPlan<Real>& plan) {
    unfit_ = false;
    Result result = first_pass<REVERSE, ENTROPY>(plan, false);
    if (!unfit_) return result;
    start(t_);  // some logits are larger than the first ones let expect
    return first_pass<REVERSE, ENTROPY>(plan, true);
  }

  template <bool REVERSE, bool ENTROPY>
  Result first_pass(KlPlan<Real>& plan, bool from_maxima) {
    int64_t first = 0;
    KlShift<Real> shift = first_shift(from_maxima, first);
    KlSums total = fitted<REVERSE, ENTROPY>(first, shift, 0.25);
    s_.slices.clear();
    if (is_too_wide(total)) {
      add_wide<REVERSE, ENTROPY>(first, shift);
      total = {};
    }
    for (int64_t k = 0; k < tiles_; ++k) {
      gather_set(k);
      if (k == first) continue;
      KlShift<Real> own = shift;
      const KlSums t = fitted<REVERSE, ENTROPY>(k, own, 3);
      if (is_too_wide(t))
        add_wide<REVERSE, ENTROPY>(k, own);
      else if (own == shift)
        total += t;
      else
        s_.slices.push_back(slice_of(t, own, REVERSE));
    }

    // All that was read may have nothing of the other row, unless other maxima show it.
    const bool lacks_other = total.s > 0 && total.s + total.a() <= 0;
    unfit_ |= lacks_other && total.phi() < INFINITY && s_.slices.empty();
    KlSlice kept = slice_of(total, shift, REVERSE);
    if (t_.partial >= 0) {
      label_z_ = double(load(t_.z[t_.partial])), label_r_ = double(load(t_.r[t_.partial]));
      s_.slices.push_back(slice_of_partial<REVERSE>(shift));
    }
    if (s_.slices.empty() && lacks_other) kept.kl = INFINITY, kept.log_ratio = -INFINITY;
    double moment = total.moment() / total.s;  // of y relative to shift.a
    if (!s_.slices.empty()) {
      if (kept.log_base != -INFINITY || kept.log_other != -INFINITY) s_.slices.insert(s_.slices.begin(), kept);
      kept = merged(s_.slices, REVERSE);
      const double more = kept.log_ratio - (kept.o_ref - kept.x_ref) * inverse_t_;
      shift = KlShift<Real>(inverse_t_, Real(kept.x_ref), Real(kept.o_ref), std::abs(more) < 1e29 ? more : 0);
      moment = -kept.kl + (kept.log_ratio - shift.value(shift.a));  // A = M + Φ is 0, of y relative to log_ratio
    }
    return finish<REVERSE>(kept, shift, moment, plan);
  }

  // Of the partially pushed y, with the log-ratio as the row's shift has it.
  template <bool REVERSE>
  KlSlice slice_of_partial(const KlShift<Real>& shift) const {
    const double x = (REVERSE ? label_z_ : label_r_) - x_zero_, o = (REVERSE ? label_r_ : label_z_) - o_zero_;
    const double log_kappa_x = REVERSE ? 0 : t_.log_kappa, log_kappa_o = REVERSE ? t_.log_kappa : 0;
    KlSlice slice;
    slice.x_ref = KlShift<Real>::usable(Real(x)), slice.o_ref = KlShift<Real>::usable(Real(o));
    slice.log_base = (x - slice.x_ref) * inverse_t_ + log_kappa_x;
    slice.log_other = (o - slice.o_ref) * inverse_t_ + log_kappa_o;
    if (slice.log_other == -INFINITY) {
      slice.log_ratio = -INFINITY;
      if (slice.has_base()) slice.kl = INFINITY;
      return slice;
    }
    // Where (o - x)/T is as large as log κ, their sum would show the rounding of 1/T.
    const double apart = double(shift.o_ref) - double(shift.x_ref);
    slice.log_ratio = (o - x - apart) / p_.temperature + apart * inverse_t_ + (log_kappa_o - log_kappa_x);
    if (std::abs(slice.log_ratio) < 32)
      slice.log_other = slice.log_base + slice.log_ratio + (slice.x_ref - slice.o_ref) * inverse_t_;
    return slice;
  }

  // `shift` has kept's references.
  template <bool REVERSE>
  Result finish(const KlSlice& kept, const KlShift<Real>& shift, double moment, KlPlan<Real>& plan) {
    std::vector<Real>&policy_set = REVERSE ? s_.set_x : s_.set_o, &reference_set = REVERSE ? s_.set_o : s_.set_x;
    const ExpSum set = exp_sum_of_set(policy_set, Real(label_z_)),
                 of_reference = exp_sum_of_set(reference_set, Real(label_r_));

    Result result;
    RowStatistics& s = result.statistics;
    const double x_max = double(shift.x_ref) + x_zero_, o_max = double(shift.o_ref) + o_zero_;
    const double log_policy = REVERSE ? kept.log_base : kept.log_other;
    const double log_reference = REVERSE ? kept.log_other : kept.log_base;
    const auto sum_of_log = [](double x) { return x < INFINITY ? ::exp(x) : NAN; };
    const double policy_sum = sum_of_log(log_policy), policy_max = REVERSE ? x_max : o_max;
    s.policy = {policy_max, policy_sum, policy_sum > 0 ? policy_sum * (log_policy - kept.policy_entropy) : 0};
    s.reference = {REVERSE ? o_max : x_max, sum_of_log(log_reference), 0};
    s.policy_set = set;
    s.reference_set = of_reference;
    s.label_policy = label_z_;
    s.label_reference = label_r_;

    double odds = -INFINITY;  // log p(R)/p(K)
    if (set.sum > 0)
      odds = log_policy > -INFINITY ? (set.max - policy_max) * inverse_t_ + ::log(set.sum) - log_policy : INFINITY;
    const double kept_mass = 1 / (1 + ::exp(odds)), removed_mass = 1 / (1 + ::exp(-odds));
    // Of the policy's whole sum to that of the kept entries' base: softplus(odds) is -log p(K). Where K has next to
    // none of p, both would be large.
    double whole = kept.log_ratio + softplus(odds);
    if (!REVERSE && odds > 40)
      whole = (set.max - o_zero_ - double(shift.x_ref)) * inverse_t_ + ::log(set.sum) + softplus(-odds) - kept.log_base;
    const bool broken = !(kept.log_base < INFINITY && kept.log_other < INFINITY && set.sum == set.sum &&
                          of_reference.sum == of_reference.sum);
    const bool undefined = broken || is_undefined(REVERSE ? REVERSE_KL : FORWARD_KL, s);
    const KlShift<Real> second = shift.with_sum(kept.log_base, second_sum(REVERSE ? ::log(kept_mass) * UNIT<Real> : 0));
    const double base_sum = ::exp(kept.log_base + second.lead() / UNIT<Real>);  // of the second pass's weights
    plan = {};
    plan.x_ref = shift.x_ref, plan.o_ref = shift.o_ref, plan.c = second.c, plan.x_zero = x_zero_, plan.o_zero = o_zero_;
    for (const char careful : s_.careful)
      if (careful) plan.careful = 1;
    plan.set_max = Real(set.sum > 0 ? set.max : 0);
    if (set.sum > 0) plan.set_scale = Real(removed_mass / set.sum);
    if (REVERSE)
      result.loss = reverse_coefficients(kept, set, odds, kept_mass, removed_mass, base_sum, moment, plan);
    else
      result.loss = forward_coefficients(kept, shift, whole, odds, base_sum, plan);
    if (REVERSE) plan.shift = shift.a;
    result.lost = undefined || (REVERSE && !(std::abs(result.loss) < INFINITY));
    if (undefined) result.loss = NAN;
    if (t_.partial >= 0 && !result.lost) plan.partial = Real(partial_gradient<REVERSE>(kept, shift, odds, result.loss));
    return result;
  }

  double forward_coefficients(const KlSlice& kept, const KlShift<Real>& shift, double whole, double odds,
                              double base_sum, KlPlan<Real>& plan) const {
    constexpr double MOST_SHIFT = std::numeric_limits<Real>::max() / 8;
    whole = std::max(-MOST_SHIFT, std::min(MOST_SHIFT, whole));
    plan.shift = shift.stored(whole);
    plan.rest = Real(whole - shift.value(plan.shift));
    plan.u0 = Real(1 / base_sum);
    plan.u1 = Real(-UNIT<Real> * (whole + kept.log_base + (double(plan.x_ref) - double(plan.o_ref)) * inverse_t_));
    return kept.kl + softplus(odds);
  }

  double reverse_coefficients(const KlSlice& kept, const ExpSum& set, double odds, double kept_mass,
                              double removed_mass, double base_sum, double moment, KlPlan<Real>& plan) const {
    const double log_norm = log1p(p_.eps * double(t_.removed));
    double loss = kept.kl + log_norm, extra = 0;
    if (set.sum > 0) {
      const double log_eps = ::log(p_.eps), log_sum = ::log(set.sum);
      const double mean = set.moment / set.sum - log_sum;      // of log p_R within R, -H_R
      const double delta = kept.kl - (odds + mean - log_eps);  // D_K - D_R
      const double small = ::exp(-std::abs(odds)),
                   entropy = log1p(small) + (small > 0 ? small / (1 + small) * std::abs(odds) : 0);
      // p(R) times the log-odds is in the entropy: apart from log p(K) it would cancel against it.
      loss = log_norm - entropy;
      if (kept_mass > 0) loss += kept_mass * kept.kl;
      if (removed_mass > 0) loss += removed_mass * (mean - log_eps);
      if (removed_mass > 0 && kept_mass > 0) extra = removed_mass * delta;
      plan.set_shift = Real(-set.moment / set.sum - (kept_mass > 0 ? kept_mass * delta : 0));
    }
    const double h = kept_mass > 0 ? kept_mass / base_sum : 0;
    plan.u1 = Real(-h);
    plan.u0 = Real(h > 0 ? h * (moment + extra) : 0);
    return loss;
  }

  // Of the partially pushed y, as p - q* or p (log p - log q~ - loss).
  template <bool REVERSE>
  double partial_gradient(const KlSlice& kept, const KlShift<Real>& shift, double odds, double loss) const {
    const double x = (REVERSE ? label_z_ : label_r_) - x_zero_;
    const double log_x = (x - double(shift.x_ref)) * inverse_t_ - kept.log_base;
    if (REVERSE) {
      const double log_p = log_x - softplus(odds), log_norm = log1p(p_.eps * double(t_.removed));
      const double d = log_norm - softplus(odds) - last_y_;
      return log_p == -INFINITY ? 0 : ::exp(log_p) * (d - loss);
    }
    const double q = ::exp(log_x + t_.log_kappa), d = last_y_ - softplus(odds);
    if (std::abs(d) < 1) return q * ::expm1(d);
    const double o = label_z_ - o_zero_;
    return ::exp((o - double(shift.o_ref)) * inverse_t_ - kept.log_other - softplus(odds)) - q;
  }

  const RowCall& p_;
  KlScratch<Real>& s_;
  const double inverse_t_;  // as the loops have it: next to p = q, another rounding would show
  const int64_t tiles_;
  Task t_;
  const Logit *base_ = nullptr, *other_ = nullptr;
  const uint64_t* bits_ = nullptr;
  int64_t set_size_ = 0;              // of the entries apart, the partially pushed y among them
  bool unfit_ = false;                // some tile's sums are no numbers
  double label_z_ = 0, label_r_ = 0;  // of the partially pushed y
  double last_y_ = 0;                 // of the last slice merged: its log-ratio less the row's
  int32_t gathered_ = 0;              // of which so many are in the set's arrays
  Real x_zero_ = 0, o_zero_ = 0;      // logits are read relative to these
};

}  // namespace TNT_ISA
}  // namespace tnt
