// The loops over a stream of logits, one tile at a time: the sum of its weights e = 2^(x scale - c) in a first pass, a
// gradient of weight e + bias in a second, with one exponential an entry in each.
#pragma once

#include <cmath>

#include "cpu/tiles.h"

namespace tnt {
inline namespace TNT_ISA {

// What weights are relative to.
template <class Real>
struct ExpLevel {
  Real scale;  // log2(e)/T
  Real ref;    // near the greatest x that counts
  Real c;      // without a fused multiply-add, x scale - c would lose digits that (x - ref) scale - c keeps

  // An x of `ref_` weighs 2^shift, but for what rounds c.
  ExpLevel(double inverse_t, Real ref_, double shift)
      : scale(exponent_scale<Real>(inverse_t)), ref(ref_), c(Real(start() - shift)) {}
  double lead() const { return start() - double(c); }  // log2 of the weight of an x of `ref`
  // Whether c holds what x - ref would. Else x is to be taken relative to ref, and ref to be 0.
  bool is_fine() const { return std::abs(start()) < 0x1p22; }

 private:
  double start() const { return FUSED<Real> ? double(ref) * double(scale) : 0; }
};

// The same in all lanes.
template <class Real>
struct ExpLanes {
  using V = Vector<Real>;
  V scale, ref, c;
  explicit ExpLanes(const ExpLevel<Real>& level) : scale(same(level.scale)), ref(same(level.ref)), c(same(level.c)) {}
  TNT_FN V at(V x) const {  // log2 of the weight
    return FUSED<Real> ? fused_multiply_add(x, scale, -c) : (x - ref) * scale - c;
  }
};

// Σ e, and where the entropy is asked for Σ e log2 e.
struct ExpSums {
  double sum = 0, moment = 0;
};

// The bits of a block's entries that do not count: those kept apart, and those behind the tile's n.
template <class Logit>
TNT_FN uint64_t left_out(const TileEntries<Logit>& in, int64_t n, int64_t i) {
  return in.apart(i) | (n - i < BLOCK_ENTRIES<RealOf<Logit>> ? ~uint64_t(0) << (n - i) : 0);
}

template <class V>
TNT_FN double sum_of(const V (&x)[4]) {
  return sum_of((x[0] + x[1]) + (x[2] + x[3]));
}

// `x`: the tile's part of the stream, in.base or in.other. `saved`: where the weights are saved; null: they are not.
template <bool ENTROPY, class Logit, class Real>
__attribute__((noinline)) ExpSums exp_sums(const TileEntries<Logit>& in, const Logit* x, int64_t n,
                                           const ExpLevel<Real>& level, Real* saved = nullptr) {
  static_assert(TILE_ENTRIES<Real> <= 32 * BLOCK_ENTRIES<Real>);  // what a lane adds up as Real
  using V = Vector<Real>;
  const ExpLanes<Real> lanes(level);
  V sums[4]{}, moments[4]{};
  for (int64_t i = 0; i < in.n; i += BLOCK_ENTRIES<Real>) {
    V at[4], e[4];
    load_block(x + i, at);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      at[j] = lanes.at(at[j]);
      e[j] = power(at[j]);
    }
    if (saved) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) store_vector(saved + i + j * LANES<Real>, e[j]);
    }
    if (const uint64_t bits = left_out(in, n, i); __builtin_expect(bits != 0, 0)) {
      const BlockMasks<Logit> masks(bits);
      leave_out(masks, e, Real(0));
      if (ENTROPY) leave_out(masks, at, Real(0));
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      sums[j] = sums[j] + e[j];
      // A logarithm of a weight is at least -256: without weight it counts for nothing.
      if (ENTROPY) moments[j] = fused_multiply_add(e[j], greater_of(at[j], same(Real(-256))), moments[j]);
    }
  }
  return {sum_of(sums), ENTROPY ? sum_of(moments) : 0};
}

// Σ (x - ref) of the base.
template <class Logit, class Real>
__attribute__((noinline)) double sum_of_differences(const TileEntries<Logit>& in, int64_t n, Real ref) {
  using V = Vector<Real>;
  V sums[4]{};
  for (int64_t i = 0; i < in.n; i += BLOCK_ENTRIES<Real>) {
    V x[4];
    load_block(in.base + i, x);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) x[j] = x[j] - same(ref);
    if (const uint64_t bits = left_out(in, n, i)) leave_out(BlockMasks<Logit>(bits), x, Real(0));
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[j] = sums[j] + x[j];
  }
  return sum_of(sums);
}

// The greatest finite x of the first `most` entries; -inf if there is none.
template <class Logit, class Real = RealOf<Logit>>
__attribute__((noinline)) Real greatest_of(const TileEntries<Logit>& in, const Logit* x, int64_t n, int64_t most) {
  const Vector<Real> infinity = same(Real(INFINITY)), nothing = same(Real(-INFINITY));
  Vector<Real> top = nothing;
  for (int64_t i = 0; i < std::min(n, most); i += BLOCK_ENTRIES<Real>) {
    Vector<Real> block[4];
    load_block(x + i, block);
    leave_out(BlockMasks<Logit>(left_out(in, n, i)), block, Real(-INFINITY));
    for (int j = 0; j < 4; ++j) top = greater_of(select(less(block[j], infinity), block[j], nothing), top);
  }
  return greatest(top);
}

// Writes the tile's gradients: numbers that say nothing where an entry is kept apart. `to` may lie where the row does.
template <class Logit, class Gradient, class Real>
__attribute__((noinline)) void write_weights(const TileEntries<Logit>& in, const ExpLevel<Real>& level, Real weight,
                                             Real bias, Gradient* to) {
  using V = Vector<Real>;
  const ExpLanes<Real> lanes(level);
  const Weighted<Logit> weighted{weight};
  const V more = same(bias);
  for (int64_t i = 0; i < in.n; i += BLOCK_ENTRIES<Real>) {
    V x[4];
    load_block(in.base + i, x);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) x[j] = weighted(lanes.at(x[j])) + more;
    put<Logit, Gradient, Real>(to + i, x);
  }
}

// The same from the weights of a first pass, which lie in the order of `Stored`.
template <class Stored, class Gradient, class Real>
__attribute__((noinline)) void write_saved_weights(const Real* saved, int64_t n, Real weight, Real bias, Gradient* to) {
  using V = Vector<Real>;
  const V by = same(weight), more = same(bias);
  for (int64_t i = 0; i < n; i += BLOCK_ENTRIES<Real>) {
    V x[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) x[j] = fused_multiply_add(load_vector(saved + i + j * LANES<Real>), by, more);
    put<Stored, Gradient, Real>(to + i, x);
  }
}

}  // namespace TNT_ISA
}  // namespace tnt
