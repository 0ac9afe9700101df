// The first pass over a KL row: the sums of its tiles, and what they add up to.
//
// Every tile takes the shift of the row's first one, so that sums just add. A tile whose sums do not fit is summed anew
// with a shift of its own, and becomes a slice: what a tile yields depends on itself and on the first one alone.
#pragma once

#include <cmath>
#include <vector>

#include "cpu/kl_loops.h"
#include "kl_slices.h"

namespace tnt {
inline namespace TNT_ISA {

// Of a tile of the first pass.
template <class Real>
struct KlTile {
  KlSums sums;
  KlShift<Real> shift;   // that they took
  bool has_sums = true;  // false: they are no numbers
  bool careful = false;  // its blocks are far
};

template <class Real>
struct KlScratch {
  TileScratch<Real> entries;  // the removed entries, and a partially pushed y
  std::vector<KlTile<Real>> tiles;
  std::vector<KlSlice> slices;
};

// As `merged` takes slices; of one at least.
struct SliceVector {
  const std::vector<KlSlice>& slices;

  const KlSlice& first() const { return slices.front(); }
  template <class Function>
  double sum(Function f) const {
    double sum = 0;
    for (const KlSlice& slice : slices) sum += f(slice);
    return sum;
  }
  template <class Function>
  double max(Function f) const {
    double top = -INFINITY;
    for (const KlSlice& slice : slices) {
      const double value = f(slice);
      if (value > top) top = value;
    }
    return top;
  }
};

// What a first pass finds. Its shifts lie in the scratch.
template <class Real>
struct KlFound {
  KlSlice kept;                          // all entries that stay, without a y that is pushed down in part
  const KlShift<Real>* shift = nullptr;  // of the whole row, if its sums are of one
  double sum = 0, moment = 0;            // of its weights, and the mean of y, relative to that
  const KlShift<Real>* first = nullptr;  // of the first tile, which others take, too
};

template <class Logit, class Gradient>
class KlFirstPass {
 public:
  using Real = RealOf<Logit>;
  static constexpr int64_t TILE = TILE_ENTRIES<Real>, SAMPLE = 128;

  // `label_x`, `label_o`: the logits of a y that is pushed down in part; NaN if there is none.
  KlFirstPass(RowTiles<Logit, Gradient>& tiles, KlScratch<Real>& scratch, double inverse_t, double label_x,
              double label_o)
      : tiles_(tiles), s_(scratch), inverse_t_(inverse_t), label_x_(Real(label_x)), label_o_(Real(label_o)) {}

  void run(bool reverse, bool entropy, KlFound<Real>& found) {
    reverse ? (entropy ? run<true, true>(found) : run<true, false>(found))
            : (entropy ? run<false, true>(found) : run<false, false>(found));
  }

  static bool is_usable(Real top) { return KlShift<Real>::usable(top) == top; }

  // Whether there is an infinite log-ratio, or one that no sum of floats holds, as where the lowest number masks one
  // row.
  static bool is_too_wide(const KlSums& t) { return !(t.phi < INFINITY && t.m > -INFINITY) && t.s < MOST; }

  // For the row's shift: of the `first` tile that has usable maxima, or `from_maxima` of all its logits.
  KlSample<Real> sample_row(bool from_maxima, int64_t& first) {
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
    return sample;
  }

 private:
  enum class Fit { GOOD, REFERENCES, LEVEL };  // what its shift lacks
  static constexpr double MOST = 0x1p100, LEAST = 0x1p-60;

  static bool has_numbers(const KlSums& t) { return t.s < MOST && t.other < MOST && t.phi == t.phi; }

  // Next to p = q, φ(L) against Φ/S says how many digits of the KL are lost.
  // Weights may be too large for a level, but not for one of their own: then a logit is no number.
  static Fit judge(const KlSums& t, bool has_own_level, double most_log_ratio, double& log_ratio) {
    const double a = t.a, phi = t.phi;
    log_ratio = 0;
    if (!has_numbers(t) || (t.broken != 0 && !has_own_level)) return Fit::REFERENCES;
    if (t.s == 0 || a == 0) return Fit::GOOD;
    if (!(t.other > 0)) return Fit::REFERENCES;
    const double ratio = a / t.s;
    if (std::abs(ratio) < 0.2 && ratio * a <= 1.5 * phi) return Fit::GOOD;
    log_ratio = log1p(ratio);
    const double excess = phi_of_log(ratio, log_ratio);
    const bool good = std::abs(log_ratio) < most_log_ratio && excess <= 8 * (phi / t.s - excess);
    if (good) return Fit::GOOD;
    return t.s < LEAST ? Fit::REFERENCES : Fit::LEVEL;  // weights that nearly underflow have few digits
  }

  template <bool REVERSE, bool ENTROPY>
  void sum(int64_t k, const KlShift<Real>& shift, Real* saved, KlSums& t) {
    bool& careful = s_.tiles[size_t(k)].careful;
    const auto body = [&](const auto& in, int64_t) { write_kl_sums<REVERSE, ENTROPY>(in, shift, saved, t); };
    tiles_.on(k, careful, body);
    // Infinite logits, met in a block that was taken for a near one, make a sum NaN. The second pass is told of all.
    if (!careful && !(t.a == t.a && t.phi == t.phi)) tiles_.on(k, true, body);
    careful |= t.infinite;
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
    if (label_x_ < INFINITY) all.x_top = std::max(all.x_top, label_x_);
    if (label_o_ < INFINITY) all.o_top = std::max(all.o_top, label_o_);
    return all;
  }

  TNT_FN KlShift<Real> shift_of(const KlSample<Real>& sample) const {
    const double apart = double(KlShift<Real>::usable(sample.o_top)) - double(KlShift<Real>::usable(sample.x_top));
    const double more = (sample.mean - apart) * inverse_t_;  // the mean is nearer to L than the distance of the maxima
    const bool takes_mean = std::abs(more) > 0.125 && std::abs(more) < 16;
    return {inverse_t_, sample.x_top, sample.o_top, takes_mean ? more : 0};
  }

  // Where x and o are further apart than either from its maximum, o - x has lost digits that differences to the maxima
  // keep: then a row is read relative to them. 16-bit logits have few digits.
  static bool are_close(double x_top, double o_top) { return std::abs(o_top - x_top) <= (sizeof(Logit) == 2 ? 64 : 8); }

  // The tile's sums with the shift that it has, or with another where that does not fit.
  template <bool REVERSE, bool ENTROPY>
  void fit(int64_t k, double most_log_ratio) {
    KlTile<Real>& tile = s_.tiles[size_t(k)];
    tile.has_sums = true, tile.careful = false;
    sum<REVERSE, ENTROPY>(k, tile.shift, tiles_.saved(k), tile.sums);
    int attempt = 0;
    for (; attempt < 3; ++attempt) {
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
      sum<REVERSE, ENTROPY>(k, tile.shift, tiles_.saved(k), tile.sums);
    }
    if (ENTROPY) refine_entropy<REVERSE>(k, attempt > 0, tile);
  }

  // Where weights add up to much, their logarithms hide the entropy: it is taken from weights that add up to about 1.
  // So it is where they add up to little, unless the row's other tiles, which share the shift, have more.
  template <bool REVERSE>
  void refine_entropy(int64_t k, bool has_own_shift, KlTile<Real>& tile) {
    const double weight = REVERSE ? tile.sums.s : tile.sums.other;
    if (!(weight < MOST && (weight > 0x1p10 || (has_own_shift && weight < 0x1p-10 && weight > 1 / MOST)))) return;
    const double by = ::log(weight) / inverse_t_;
    const KlShift<Real> shift(inverse_t_, Real(tile.shift.x_ref + by), Real(tile.shift.o_ref + by), tile.shift.more);
    KlSums sums;
    sum<REVERSE, true>(k, shift, nullptr, sums);
    const KlSlice slice = slice_of(sums, shift, REVERSE, true);
    tile.sums.entropy = weight * (::log(weight) - slice.policy_entropy) * UNIT<Real>;
  }

  // Whether a tile has nothing of the base, but so much of the other that the row's KL would lose digits to its L.
  static bool lacks_base(const KlSums& t) { return t.s == 0 && t.a > 0.125; }

  // The tile as slices that are summed in double.
  template <bool REVERSE, bool ENTROPY>
  void add_wide(int64_t k, const KlShift<Real>& shift) {
    const KlShift<double> wide(inverse_t_, double(shift.x_ref), double(shift.o_ref), shift.more);
    tiles_.on(k, true, [&](const auto& in, int64_t) {
      constexpr int64_t SOME = BLOCK_ENTRIES<double>;
      double x[SOME], o[SOME];
      KlSums t, some;
      for (int64_t i = 0; i < in.n; i += SOME) {
        for (int64_t j = 0; j < SOME; ++j) x[j] = double(load(in.base[i + j])), o[j] = double(load(in.other[i + j]));
        const TileEntries<double> entries{x, o, SOME, in.bits, in.entry + i, true};
        write_kl_sums<REVERSE, ENTROPY>(entries, wide, static_cast<double*>(nullptr), some);
        t += some;
      }
      s_.slices.push_back(slice_of(t, wide, REVERSE, ENTROPY));
    });
  }

  template <bool REVERSE, bool ENTROPY>
  void run(KlFound<Real>& found) {
    if (run<REVERSE, ENTROPY>(false, found) && are_close(found.kept.x_ref, found.kept.o_ref)) return;
    tiles_.read_relative_to(0, 0);  // some logits are larger than the first ones let expect
    run<REVERSE, ENTROPY>(true, found);
  }

  // Whether all tiles have sums.
  template <bool REVERSE, bool ENTROPY>
  bool run(bool from_maxima, KlFound<Real>& found) {
    bool has_sums = true;
    s_.slices.clear();
    found.shift = nullptr;
    if (tiles_.count() == 0) return true;
    s_.tiles.resize(size_t(tiles_.count()));
    int64_t first = 0;
    const KlSample<Real> sample = sample_row(from_maxima, first);
    KlShift<Real>& shift = s_.tiles[size_t(first)].shift;
    shift = shift_of(sample);
    fit<REVERSE, ENTROPY>(first, 0.25);
    tiles_.each(false, [&](int64_t k) {
      if (k != first) {
        s_.tiles[size_t(k)].shift = shift;
        fit<REVERSE, ENTROPY>(k, 3);
      }
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
    const bool lacks_other = total.s > 0 && total.other <= 0;
    has_sums &= !(lacks_other && total.phi < INFINITY && s_.slices.empty());
    found.kept = slice_of(total, shift, REVERSE, ENTROPY);
    found.first = &shift;
    if (s_.slices.empty()) {
      found.shift = &shift;
      found.sum = total.s, found.moment = total.m / total.s;
      return has_sums;
    }
    if (found.kept.log_base != -INFINITY || found.kept.log_other != -INFINITY)
      s_.slices.insert(s_.slices.begin(), found.kept);
    found.kept = merged(SliceVector{s_.slices}, REVERSE, inverse_t_);
    return has_sums;
  }

  RowTiles<Logit, Gradient>& tiles_;
  KlScratch<Real>& s_;
  const double inverse_t_;
  const Real label_x_, label_o_;
};

}  // namespace TNT_ISA
}  // namespace tnt
