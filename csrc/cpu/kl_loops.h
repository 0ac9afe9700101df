// The loops of a KL row, over one tile: each logit is read once for the loss, with one exponential a pair, and once
// more for the gradient, with one again. docs/numerics.md derives the formulas. x is the base row's logit (forward
// KL(q*‖p): the reference's, reverse KL(p‖q~): the policy's), o the other's:
//   e = 2^(x scale - c)    y = (o - x)/T - a    φ(y) = e^y - 1 - y
//   S = Σ e    M = Σ e y    Φ = Σ e φ(y)    A = Σ e (e^y - 1) = M + Φ    L = log1p(A/S)
//   KL(base‖other) over the kept entries = Φ/S - φ(L)
// Pairs go through a loop in blocks. Most blocks are near, all their |y| < 1, or wide, < 4, where polynomials do. In
// the middle, e^y is a second exponential; far blocks hold what is infinite, or might overflow.
#pragma once

#include "cpu/tiles.h"
#include "kl_shift.h"

namespace tnt {
inline namespace TNT_ISA {

// Of a tile: a lane adds up 32 entries as Real, stretches add up as double.
template <class Real>
constexpr int KL_STRETCH = 64 * LANES<Real>;

// |y| up to which φ is a polynomial, with few coefficients and with more.
constexpr float PHI_NEAR_BOUND = 1, PHI_WIDE_BOUND = 4;
// |y| beyond is far: where e is 0, which a float below 2^-127 may be, e e^y is below 2^-103.
constexpr int MIDDLE = 16;

// The same in all lanes.
template <class Real>
struct KlLanes {
  using V = Vector<Real>;
  V scale, inverse_t, x_ref, o_ref, c, a, rho;
  explicit KlLanes(const KlShift<Real>& k)
      : scale(same(k.scale)),
        inverse_t(same(k.inverse_t)),
        x_ref(same(k.x_ref)),
        o_ref(same(k.o_ref)),
        c(same(k.c)),
        a(same(k.a)),
        rho(same(k.rho)) {}
  TNT_FN V y(V x, V o, V level) const {
    return FUSED<Real> ? fused_multiply_add(o - x, inverse_t, -level) : ((o - x) - level) * inverse_t;
  }
  TNT_FN V at(V x) const {  // log2 of the weight
    return FUSED<Real> ? fused_multiply_add(x, scale, -c) : (x - x_ref) * scale - c;
  }
};

struct KlSums {
  double s = 0, phi = 0, a = 0;  // S, Φ, A
  double other = 0;              // S + A: of tiles, sums of it have digits that sums of S and of A may lack
  double m = 0;                  // M, of reverse KLs
  double broken = 0;             // other than 0 if some e is no number: it is left out of the rest
  bool infinite = false;         // some y was, or if it is reverse may be with a factor
  double entropy = 0;            // of the policy's weights times their log2, where it is asked for
  KlSums& operator+=(const KlSums& t) {
    s += t.s, phi += t.phi, a += t.a, other += t.other, m += t.m;
    broken += t.broken, entropy += t.entropy, infinite |= t.infinite;
    return *this;
  }
};

// What a gradient takes of an entry: its weight e, and e (e^y - 1) if it is forward, e y if it is reverse.
template <class Real>
struct KlWeight {
  Vector<Real> e, product;
};

template <class Real, bool REVERSE>
struct KlAccumulators {
  using V = Vector<Real>;
  V s{}, m{}, phi{}, broken{}, entropy{};
  V excess{};  // Σ e (e^y - 1) of pairs that are not near

  // A logarithm of a weight is at least -256: without weight it counts for nothing.
  TNT_FN void add_entropy(V e, V excess_of_e, V at, V y) {
    if (REVERSE)
      entropy = fused_multiply_add(e, greater_of(at, same(Real(-256))), entropy);
    else
      entropy = fused_multiply_add(
          e + excess_of_e, greater_of(fused_multiply_add(y, same(Real(UNIT<Real>)), at), same(Real(-256))), entropy);
  }
  template <bool ENTROPY, bool WIDE>
  TNT_FN KlWeight<Real> add_near(const KlLanes<Real>& k, V x, V y) {
    const V at = k.at(x), e = power(at), e_y = e * y, e_phi = e_y * (y * phi_ratio<WIDE>(y)), own_excess = e_y + e_phi;
    s = s + e;
    m = m + e_y;
    phi = phi + e_phi;
    if (ENTROPY) add_entropy(e, own_excess, at, y);
    return {e, REVERSE ? e_y : own_excess};
  }
  template <bool ENTROPY>
  TNT_FN KlWeight<Real> add_middle(const KlLanes<Real>& k, V x, V y) {
    const V at = k.at(x), e = power(at), one = same(Real(1)), rise = power(y * same(Real(UNIT<Real>))) - one;
    const auto near = less(absolute(y), one);
    const V near_phi = phi_near(y), own_phi = select(near, near_phi, rise - y);
    const V own_excess = e * select(near, y + near_phi, rise), product = REVERSE ? e * y : own_excess;
    s = s + e;
    if (REVERSE) m = m + product;
    phi = fused_multiply_add(e, own_phi, phi);
    excess = excess + own_excess;
    if (ENTROPY) add_entropy(e, own_excess, at, y);
    return {e, product};
  }
  // An e of 0 wins over an infinite y.
  template <bool ENTROPY>
  TNT_FN KlWeight<Real> add_far(const KlLanes<Real>& k, V x, V o, V y) {
    const V none = same(Real(0)), one = same(Real(1)), at = k.at(x), any_e = power(at);
    const V e = select(less(any_e, same(Real(INFINITY))), any_e, none);
    const V other_at = fused_multiply_add(o - k.o_ref, k.scale, k.rho), p = power(other_at);
    const auto near = less(absolute(y), one);
    const V near_y = select(near, y, none), own_phi = phi_near(near_y);
    const V e_y = select(equal(e, none), none, e * y), rise = select(near, e * (near_y + own_phi), p - e);
    s = s + e;
    broken = broken + (any_e - e);
    if (REVERSE) m = m + e_y;
    phi = phi + select(near, e * own_phi, rise - e_y);
    excess = excess + rise;
    if (ENTROPY) {
      const V weight = REVERSE ? e : p, log = REVERSE ? at : other_at;
      entropy = entropy + select(equal(weight, none), none, weight * greater_of(log, same(Real(-256))));
    }
    return {e, REVERSE ? e_y : rise};
  }
};

// The same as double.
template <class Real>
struct KlTotals {
  decltype(wide(Vector<Real>{})) s, near_m, near_phi, m, phi, excess, broken, entropy;
  bool others = false;    // some pair was not near
  bool infinite = false;  // see KlSums
  template <bool REVERSE>
  TNT_FN void add_near(const KlAccumulators<Real, REVERSE>& t, const KlAccumulators<Real, REVERSE>& odd) {
    s.add(t.s + odd.s);
    near_m.add(t.m + odd.m);
    near_phi.add(t.phi + odd.phi);
  }
  template <bool REVERSE>
  TNT_FN void add_others(const KlAccumulators<Real, REVERSE>& t) {
    others = true;
    s.add(t.s);
    m.add(t.m);
    phi.add(t.phi);
    excess.add(t.excess);
    broken.add(t.broken);
  }
  template <bool ENTROPY>
  void write(KlSums& t) const {
    t.s = s.sum(), t.m = near_m.sum(), t.phi = near_phi.sum();
    t.entropy = ENTROPY ? entropy.sum() : 0;
    t.a = t.m + t.phi;
    t.broken = 0;
    t.infinite = infinite;
    if (others) t.m += m.sum(), t.phi += phi.sum(), t.a += excess.sum(), t.broken = broken.sum();
    t.other = t.s + t.a;
  }
};

template <class Real>
struct Block {
  Vector<Real> x[4], o[4];
  template <class Logit>
  TNT_FN Block(const TileEntries<Logit>& in, int64_t i) {
    load_block(in.base + i, x);
    load_block(in.other + i, o);
  }
};

template <class Real>
TNT_FN void differences(const Block<Real>& b, const KlLanes<Real>& k, Vector<Real> level, Vector<Real> (&y)[4]) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) y[j] = k.y(b.x[j], b.o[j], level);
}

// Removed entries weigh nothing, and are next to each other.
template <class Logit, class Real>
TNT_FN void leave_out(uint64_t removed, Block<Real>& b, Vector<Real> (&y)[4]) {
  const BlockMasks<Logit> masks(removed);
  leave_out(masks, b.x, Real(AWAY));
  leave_out(masks, b.o, Real(AWAY));
  leave_out(masks, y, Real(0));
}

template <class V>
TNT_FN V greatest_of(const V (&x)[4]) {
  return greater_of(greater_of(x[0], x[1]), greater_of(x[2], x[3]));
}
template <class V>
TNT_FN V greatest_size(const V (&y)[4]) {
  return greater_size(greater_size(y[0], y[1]), greater_size(y[2], y[3]));
}

// Saves the weights of a block's j-th vector.
template <class Real>
TNT_FN void save(const KlWeight<Real>& weight, int j, Real* block) {
  store_vector(block + j * LANES<Real>, weight.e);
  store_vector(block + (j + 4) * LANES<Real>, weight.product);
}

template <bool WIDE, class V>
TNT_FN bool is_near(V size) {
  return is_everywhere(less(size, same(decltype(greatest(size))(WIDE ? PHI_WIDE_BOUND : PHI_NEAR_BOUND))));
}

// The loops take turns, so that their sums stay in registers. That of near blocks is another one where entries may be
// removed (REMOVED), as they would take registers from the rest. The first stops at a block that is not near; the
// second, WIDE, at one that is not wide, or is the second near one in turn; the last behind a wide one, at one that is
// wide. They return where. A stretch is as long as a lane's sum may be.
template <bool REVERSE, bool ENTROPY, bool REMOVED, bool SAVED, bool WIDE, class Logit, class Real>
__attribute__((noinline)) int64_t add_near_blocks(const TileEntries<Logit>& in, int64_t i, const KlShift<Real>& shift,
                                                  Real* saved, KlTotals<Real>& totals, bool& near_before) {
  using V = Vector<Real>;
  const KlLanes<Real> k(shift);
  const int64_t end = std::min<int64_t>(in.n, i + KL_STRETCH<Real>);
  KlAccumulators<Real, REVERSE> even, odd;
  for (; i < end; i += BLOCK_ENTRIES<Real>) {
    Block<Real> b(in, i);
    V y[4];
    differences(b, k, k.a, y);
    if (const uint64_t removed = REMOVED ? in.apart(i) : 0) leave_out<Logit>(removed, b, y);
    const V size = greatest_size(y);
    if (__builtin_expect(!is_near<WIDE>(size), 0)) break;
    if (WIDE) {
      const bool near = is_near<false>(size);
      if (near && near_before) break;
      near_before = near;
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const KlWeight<Real> weight = (j % 2 == 0 ? even : odd).template add_near<ENTROPY, WIDE>(k, b.x[j], y[j]);
      if (SAVED) save(weight, j, saved + 2 * i);
    }
  }
  totals.add_near(even, odd);
  if (ENTROPY) totals.entropy.add(even.entropy + odd.entropy);
  return i;
}

template <bool REVERSE, bool ENTROPY, class Logit, class Real>
__attribute__((noinline)) int64_t add_other_blocks(const TileEntries<Logit>& in, int64_t i, const KlShift<Real>& shift,
                                                   Real* saved, KlTotals<Real>& totals, bool& near) {
  using V = Vector<Real>;
  const KlLanes<Real> k(shift);
  const V wide_bound = same(Real(in.careful ? 0 : PHI_WIDE_BOUND)), middle_bound = same(Real(in.careful ? 0 : MIDDLE));
  const int64_t end = std::min<int64_t>(in.n, i + KL_STRETCH<Real> / 2);  // their pairs share an accumulator
  KlAccumulators<Real, REVERSE> t, wide_ones;
  bool wide_before = false;
  for (; i < end; i += BLOCK_ENTRIES<Real>) {
    Block<Real> b(in, i);
    V y[4];
    differences(b, k, k.a, y);
    if (const uint64_t removed = in.apart(i)) leave_out<Logit>(removed, b, y);
    const V size = greatest_size(y);
    const bool wide = is_everywhere(less(size, wide_bound));
    if (wide && wide_before) {
      near = is_near<false>(size);
      break;
    }
    wide_before = wide;
    KlWeight<Real> weights[4];
    if (wide) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) weights[j] = wide_ones.template add_near<ENTROPY, true>(k, b.x[j], y[j]);
    } else if (is_everywhere(less(size, middle_bound))) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) weights[j] = t.template add_middle<ENTROPY>(k, b.x[j], y[j]);
    } else {
#pragma GCC unroll 1
      for (int j = 0; j < 4; ++j) {
        weights[j] = t.template add_far<ENTROPY>(k, b.x[j], b.o[j], y[j]);
        totals.infinite |=
            !is_everywhere(less(absolute(y[j]), same(std::numeric_limits<Real>::max() / (REVERSE ? 4 : 1))));
      }
    }
    if (saved) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) save(weights[j], j, saved + 2 * i);
    }
  }
  totals.add_near(wide_ones, {});
  if (ENTROPY) totals.entropy.add(t.entropy + wide_ones.entropy);
  totals.add_others(t);
  return i;
}

template <bool REVERSE, bool ENTROPY, bool REMOVED, bool SAVED, class Logit, class Real>
void write_kl_sums(const TileEntries<Logit>& in, const KlShift<Real>& shift, Real* saved, KlSums& sums) {
  KlTotals<Real> totals;
  bool near = true;  // the first loop goes on
  for (int64_t i = 0; i < in.n;) {
    if (!in.careful && near)
      i = add_near_blocks<REVERSE, ENTROPY, REMOVED, SAVED, false>(in, i, shift, saved, totals, near);
    near = false;
    if (!in.careful && i < in.n)
      i = add_near_blocks<REVERSE, ENTROPY, REMOVED, SAVED, true>(in, i, shift, saved, totals, near);
    if (!near && i < in.n) i = add_other_blocks<REVERSE, ENTROPY>(in, i, shift, saved, totals, near);
  }
  totals.template write<ENTROPY>(sums);
}
// `saved`: where weights are saved for write_saved, two numbers an entry; null: they are not.
template <bool REVERSE, bool ENTROPY, class Logit, class Real>
void write_kl_sums(const TileEntries<Logit>& in, const KlShift<Real>& shift, Real* saved, KlSums& sums) {
  const auto write = [&](auto removed) {
    constexpr bool REMOVED = decltype(removed)::value;
    saved ? write_kl_sums<REVERSE, ENTROPY, REMOVED, true>(in, shift, saved, sums)
          : write_kl_sums<REVERSE, ENTROPY, REMOVED, false>(in, shift, saved, sums);
  };
  in.bits ? write(std::true_type()) : write(std::false_type());
}

// Whether some o - x is no number that the near loops may meet.
template <class Logit, class Real = RealOf<Logit>>
__attribute__((noinline)) bool has_infinite(const TileEntries<Logit>& in) {
  const Vector<Real> bound = same(std::numeric_limits<Real>::max() / 4);
  bool all = true;
  for (int64_t i = 0; i < in.n; i += BLOCK_ENTRIES<Real>) {
    const Block<Real> b(in, i);
    for (int j = 0; j < 4; ++j) all &= is_everywhere(less(absolute(b.o[j] - b.x[j]), bound));
  }
  return !all;
}

// For a shift: of n entries without the removed ones the maxima, -inf if there is none, and the mean of o - x.
template <class Real>
struct KlSample {
  Real x_top = -INFINITY, o_top = -INFINITY;
  double mean = 0;
};
template <bool MAY_BE_INFINITE, class Logit, class Real = RealOf<Logit>>
__attribute__((noinline)) KlSample<Real> kl_sample(const TileEntries<Logit>& in, int64_t n) {
  using V = Vector<Real>;
  const V infinity = same(Real(INFINITY)), nothing = same(Real(-INFINITY)), none = same(Real(0));
  V x_top = nothing, o_top = nothing, above = none;
  int64_t count = n;
  for (int64_t i = 0; i < n; i += BLOCK_ENTRIES<Real>) {
    Block<Real> b(in, i);
    V apart[4];
    for (int j = 0; j < 4; ++j) apart[j] = b.o[j] - b.x[j];
    uint64_t removed = in.apart(i);
    count -= __builtin_popcountll(removed);
    if (n - i < BLOCK_ENTRIES<Real>) removed |= ~uint64_t(0) << (n - i);
    if (removed) {
      const BlockMasks<Logit> masks(removed);
      leave_out(masks, b.x, Real(-INFINITY));
      leave_out(masks, b.o, Real(-INFINITY));
      leave_out(masks, apart, Real(0));
    }
    for (int j = 0; MAY_BE_INFINITE && j < 4; ++j) {  // +inf is no maximum
      b.x[j] = select(less(b.x[j], infinity), b.x[j], nothing);
      b.o[j] = select(less(b.o[j], infinity), b.o[j], nothing);
    }
    x_top = greater_of(greatest_of(b.x), x_top);
    o_top = greater_of(greatest_of(b.o), o_top);
    above = above + ((apart[0] + apart[1]) + (apart[2] + apart[3]));
  }
  return {greatest(x_top), greatest(o_top), count > 0 ? sum_of(above) / double(count) : 0};
}

}  // namespace TNT_ISA
}  // namespace tnt
