// The loops that write a KL row's gradient, over one tile. kl_loops.h has the names, docs/numerics.md the formulas.
#pragma once

#include "cpu/kl_loops.h"

namespace tnt {
inline namespace TNT_ISA {

// What a row's gradient takes besides its shift. All are kept for a gradient that has to wait.

template <class Real>
struct ForwardGradient {  // factor (p - q*)
  Real shift;             // y* = log p - log q* = (o - x)/T - shift - rest, shift as KlShift stores levels
  Real rest;              // what rounding took from it: next to p = q, y* is as small
  Real h;                 // factor q* = h e
  Real p_shift, p_by;     // factor p = p_by 2^((o - o_ref) scale + p_shift), |p_by| < 1
};
template <class Real>
struct ReverseGradient {  // factor p (M/S - y + p(R) Δ) = e (k0 + k1 y)
  Real k0, k1;
};

// |y*| up to which p - q* = e e^{y*/2} 2 sinh(y*/2) is one exponential, with few coefficients and with more.
constexpr float SINH_NEAR_BOUND = 1.25f, SINH_WIDE_BOUND = 12.0f;

// The loops that write take turns, too. `to` may lie where either row does.
template <bool WIDE, class Logit, class Gradient, class Real>
__attribute__((noinline)) int64_t write_near_blocks(const TileEntries<Logit>& in, int64_t i, const KlShift<Real>& shift,
                                                    const ForwardGradient<Real>& g, Gradient* to) {
  using V = Vector<Real>;
  const KlLanes<Real> k(shift);
  const Weighted<Logit> weighted{g.h};
  const V near_bound = same(Real(SINH_NEAR_BOUND)), bound = same(Real(WIDE ? SINH_WIDE_BOUND : SINH_NEAR_BOUND));
  bool near_before = false;
  const V level = same(g.shift), rest = same(g.rest), half = same(Real(0.5 * UNIT<Real>));
  for (; i < in.n; i += BLOCK_ENTRIES<Real>) {
    const Block<Real> b(in, i);
    V y[4], d[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) y[j] = k.y(b.x[j], b.o[j], level) - rest;
    const V size = greatest_size(y);
    if (__builtin_expect(!is_everywhere(less(size, bound)), 0)) break;
    if (WIDE) {
      const bool near = is_everywhere(less(size, near_bound));
      if (near && near_before) break;
      near_before = near;
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      d[j] = weighted(fused_multiply_add(y[j], half, k.at(b.x[j]))) * (y[j] * sinh_ratio<WIDE>(y[j] * y[j]));
    put<Logit, Gradient, Real>(to + i, d);
  }
  return i;
}

template <class Logit, class Gradient, class Real>
__attribute__((noinline)) int64_t write_other_blocks(const TileEntries<Logit>& in, int64_t i,
                                                     const KlShift<Real>& shift, const ForwardGradient<Real>& g,
                                                     Gradient* to) {
  using V = Vector<Real>;
  const KlLanes<Real> k(shift);
  const V wide_bound = same(Real(in.careful ? 0 : SINH_WIDE_BOUND)), middle_bound = same(Real(in.careful ? 0 : MIDDLE));
  const V level = same(g.shift), rest = same(g.rest), half = same(Real(0.5 * UNIT<Real>)), h = same(g.h),
          unit = same(Real(UNIT<Real>));
  for (; i < in.n; i += BLOCK_ENTRIES<Real>) {
    const Block<Real> b(in, i);
    V y[4], d[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) y[j] = k.y(b.x[j], b.o[j], level) - rest;
    const V size = greatest_size(y);
    if (is_everywhere(less(size, wide_bound))) break;
    if (is_everywhere(less(size, middle_bound))) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {  // e^y of an e that underflows need not
        const V at = k.at(b.x[j]), square = y[j] * y[j];
        const V near = (power(fused_multiply_add(y[j], half, at)) * y[j]) * sinh_ratio<false>(square);
        const V apart = power(fused_multiply_add(y[j], unit, at)) - power(at);
        d[j] = h * select(less(absolute(y[j]), same(Real(SINH_NEAR_BOUND))), near, apart);
      }
    } else {
#pragma GCC unroll 1
      for (int j = 0; j < 4; ++j) {
        const auto is_near = less(absolute(y[j]), same(Real(SINH_NEAR_BOUND)));
        const V y_near = select(is_near, y[j], same(Real(0))), q = power(k.at(b.x[j])) * h;
        const V p = power(fused_multiply_add(b.o[j] - k.o_ref, k.scale, same(g.p_shift))) * same(g.p_by);
        const V near = (power(y_near * half) * y_near) * sinh_ratio<false>(y_near * y_near);
        d[j] = select(is_near, q * near, p - q);
      }
    }
    put<Logit, Gradient, Real>(to + i, d);
  }
  return i;
}

template <bool CAREFUL, class Logit, class Gradient, class Real>
__attribute__((noinline)) void write_all_blocks(const TileEntries<Logit>& in, const KlShift<Real>& shift,
                                                const ReverseGradient<Real>& g, Gradient* to) {
  using V = Vector<Real>;
  const KlLanes<Real> k(shift);
  const V k0 = same(g.k0), k1 = same(g.k1), none = same(Real(0));
  for (int64_t i = 0; i < in.n; i += BLOCK_ENTRIES<Real>) {
    const Block<Real> b(in, i);
    V y[4], d[4];
    differences(b, k, k.a, y);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const V e = power(k.at(b.x[j]));
      d[j] = e * fused_multiply_add(y[j], k1, k0);
      if (CAREFUL) d[j] = select(equal(e, none), none, d[j]);  // it wins over an infinite y
    }
    put<Logit, Gradient, Real>(to + i, d);
  }
}

// Writes the tile's gradients: numbers that say nothing where an entry is removed.
template <class Logit, class Gradient, class Real>
void write_gradient(const TileEntries<Logit>& in, const KlShift<Real>& shift, const ForwardGradient<Real>& g,
                    Gradient* to) {
  for (int64_t i = 0; i < in.n;) {
    if (!in.careful) i = write_near_blocks<false>(in, i, shift, g, to);
    if (!in.careful && i < in.n) i = write_near_blocks<true>(in, i, shift, g, to);
    if (i < in.n) i = write_other_blocks(in, i, shift, g, to);
  }
}
template <class Logit, class Gradient, class Real>
void write_gradient(const TileEntries<Logit>& in, const KlShift<Real>& shift, const ReverseGradient<Real>& g,
                    Gradient* to) {
  in.careful ? write_all_blocks<true>(in, shift, g, to) : write_all_blocks<false>(in, shift, g, to);
}

// The same without an exponential, from what a first pass saved: of_product product + of_weight e.
template <class Real>
struct SavedGradient {
  Real of_product, of_weight;
};
// `Stored`: what the first pass read, whose order the weights have.
template <class Stored, class Gradient, class Real>
__attribute__((noinline)) void write_saved(const Real* saved, int64_t n, const SavedGradient<Real>& g, Gradient* to) {
  using V = Vector<Real>;
  const V of_product = same(g.of_product), of_weight = same(g.of_weight);
  for (int64_t i = 0; i < n; i += BLOCK_ENTRIES<Real>) {
    const Real *const e = saved + 2 * i, *const product = e + BLOCK_ENTRIES<Real>;
    V d[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      d[j] = fused_multiply_add(load_vector(product + j * LANES<Real>), of_product,
                                load_vector(e + j * LANES<Real>) * of_weight);
    put<Stored, Gradient, Real>(to + i, d);
  }
}

}  // namespace TNT_ISA
}  // namespace tnt
