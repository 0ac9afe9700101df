// log Σ e^{x/T} over what is kept of one stream of a row's logits, the policy's or the reference's.
//
// Every tile takes the level of the row's first entries, so that sums just add. One whose entries lie far above is
// summed anew with a level of its own: what a tile yields depends on itself and on the first entries alone.
#pragma once

#include <cmath>
#include <vector>

#include "cpu/exp_loops.h"
#include "row_sums.h"

namespace tnt {
inline namespace TNT_ISA {

template <class Real>
class StreamSum {
 public:
  // `stream(entries)`: their base or their other.
  template <class Tiles, class Stream>
  void begin(const Tiles& tiles, double inverse_t, Stream stream) {
    inverse_t_ = inverse_t;
    tiles_.assign(size_t(tiles.count()), {});
    level_ = ExpLevel<Real>(inverse_t, first_of(tiles, stream), 0);
  }
  Real ref() const { return level_.ref; }
  // Of the weights of a tile, if add was to save them and they are relative to it.
  bool has_level(int64_t k) const { return tiles_[size_t(k)].ref == level_.ref && level_.is_fine(); }
  const ExpLevel<Real>& level() const { return level_; }

  // `saved`: where the tile's weights are saved; null: they are not.
  template <bool ENTROPY, class Logit>
  void add(int64_t k, const TileEntries<Logit>& in, const Logit* x, int64_t n, Real* saved = nullptr) {
    Tile& tile = tiles_[size_t(k)];
    tile = {level_.ref, sums<ENTROPY>(in, x, n, level_, saved)};
    if (tile.sums.sum < MOST) return;
    const Real top = greatest_of(in, x, n, n);
    if (top > -INFINITY) tile = {top, sums<ENTROPY>(in, x, n, ExpLevel<Real>(inverse_t_, top, 0))};
  }

  LogSum sum() const {
    ExpSums total;
    for (const Tile& tile : tiles_) {
      if (tile.ref != level_.ref) continue;
      total.sum += tile.sums.sum;
      total.moment += tile.sums.moment;
    }
    LogSum all = log_sum({level_.ref, total});
    for (const Tile& tile : tiles_)
      if (tile.ref != level_.ref) all = merge(all, log_sum(tile), inverse_t_);
    return all;
  }

 private:
  struct Tile {
    Real ref;
    ExpSums sums;
  };
  static constexpr double MOST = 0x1p16;  // a power's argument has lost four bits there

  // The greatest of the first entries. Masks by huge numbers are no level for others.
  template <class Tiles, class Stream>
  static Real first_of(const Tiles& tiles, Stream stream) {
    for (const bool are_few : {true, false})
      for (int64_t k = 0; k < tiles.count(); ++k) {
        Real top = 0;
        tiles.on(k, false, [&](const auto& in, int64_t n) {
          top = greatest_of(in, stream(in), n, are_few ? std::min<int64_t>(n, 256) : n);
        });
        if (are_few ? std::abs(top) < Real(1e29) : top > -INFINITY) return top;
      }
    return 0;
  }

  template <bool ENTROPY, class Logit>
  ExpSums sums(const TileEntries<Logit>& in, const Logit* x, int64_t n, const ExpLevel<Real>& level,
               Real* saved = nullptr) const {
    if (level.is_fine()) return exp_sums<ENTROPY>(in, x, n, level, saved);
    Real* const centred = TileCopy<Real>::of_this_thread().gradient;  // nothing is written in a first pass
    for (int64_t i = 0; i < in.n; ++i) centred[i] = load(x[i]) - level.ref;
    return exp_sums<ENTROPY>(TileEntries<Real>{centred, nullptr, in.n, in.bits, in.entry, false}, centred, n,
                             ExpLevel<Real>(inverse_t_, 0, 0));
  }

  LogSum log_sum(const Tile& tile) const {
    if (tile.sums.sum == 0) return {};
    const ExpLevel<Real> level(inverse_t_, tile.ref, 0);
    const double log = ::log(tile.sums.sum), lead = level.is_fine() ? level.lead() : 0;
    return {double(tile.ref), log - lead / UNIT<Real>, log - tile.sums.moment / UNIT<Real> / tile.sums.sum};
  }

  double inverse_t_ = 1;
  ExpLevel<Real> level_{1, 0, 0};
  std::vector<Tile> tiles_;
};

}  // namespace TNT_ISA
}  // namespace tnt
