// KL divergences by one read and one exponential an entry (docs/numerics.md). x is the base row's
// logit (forward KL(q* || p): the reference's, reverse KL(p || q~): the policy's), o the other's. With one shift for
// the whole row,
//   e = 2^(x scale - c)     y = (o - x)/T - a     phi(y) = e^y - 1 - y
//   S = sum e    A = sum e (e^y - 1)    M = sum e y    Phi = sum e phi(y), all terms >= 0    A = M + Phi
//   L = log1p(A/S)    KL(base || other) over the kept entries = Phi/S - phi(L)
// so p = q gives exactly 0, and next to it no digit is lost. Sums of slices with the same shift just add. Forward sums
// A, because p needs S + A to all digits; reverse sums M, because its gradient needs M/S.
#pragma once

#include "cuda/math.cuh"
#include "plans.h"

namespace tnt {
inline namespace TNT_ISA {

constexpr float LOG2_E_F = float(LOG2_E), LN_2_F = float(LN_2);
constexpr float AWAY = -1e30f;  // a logit that weighs nothing: shifts are held below 1e29
constexpr float LOWEST = -3.4028234663852886e38f;

using device::power;

// ------------------------------------------------------------------------------------------------------- first pass

struct RowShift {          // the same in every block
  float scale;             // log2(e)/T
  float c;                 // base weights are 2^(x scale - c)
  float y_scale, y_shift;  // Y = 2y = (o - x) y_scale - y_shift: |y| >= 1 shows in one bit of Y, as do NaN and infinity
  float a, inverse_t, x_ref;
  float o_ref, rho;      // e e^y = 2^((o - o_ref) scale + rho)
  float more, less;      // what a exceeds the references' distance by; log2 of what weights are lowered by
  float x_zero, o_zero;  // x and o, and their references, are read relative to these
  static constexpr double LOG_UNIT = LOG2_E;                       // weights and their logarithms are of base 2
  TNT_DEVICE float own() const { return fmaf(x_ref, scale, -c); }  // log2 of the weight of an x of x_ref
  TNT_DEVICE double lead() const { return double(x_ref) * double(scale) - double(c); }
  // Of the other's sum to the base's, where A is 0, less the distance of the references.
  TNT_DEVICE double log_ratio() const { return double(a) - (double(o_ref) - double(x_ref)) * double(inverse_t); }
  TNT_DEVICE double log_lead_of_other() const { return lead() * LN_2 - log_ratio(); }
};

// Near the maxima of x and of o.
struct References {
  float x, o, x_zero = 0.0f, o_zero = 0.0f;
};

struct Scales {
  float exponent, inverse_t;  // log2(e)/T, of exponents; 1/T, of differences
};

// rho makes c, a and the reference of o agree, though each was rounded. `more` should be near L.
TNT_DEVICE RowShift row_shift(const References& at, const Scales& t, float more, float less = 0.0f) {
  RowShift s;
  s.x_zero = at.x_zero, s.o_zero = at.o_zero;
  s.x_ref = fabsf(at.x) < 1e29f ? at.x : 0.0f;
  s.o_ref = fabsf(at.o) < 1e29f ? at.o : 0.0f;
  s.scale = t.exponent;
  const float inverse_t = t.inverse_t;
  s.c = fmaf(s.x_ref, s.scale, less);
  const float d = s.o_ref - s.x_ref, back = s.o_ref - d, lost = (back - s.x_ref) + (s.o_ref - (d + back));
  s.a = fmaf(d, inverse_t, more);  // d + lost is exact
  s.inverse_t = inverse_t;
  s.y_scale = 2.0f * inverse_t, s.y_shift = 2.0f * s.a;
  s.more = more, s.less = less;
  s.rho = fmaf(fmaf(d, inverse_t, -s.a) + lost * inverse_t, LOG2_E_F, s.own());
  return s;
}
TNT_DEVICE RowShift with(const RowShift& s, float more, float less) {
  return row_shift({s.x_ref, s.o_ref, s.x_zero, s.o_zero}, {s.scale, s.inverse_t}, more, less);
}

// Levels between which o - x keeps its digits.
template <class Logit>
constexpr float MOST_APART = sizeof(Logit) == 4 ? 8.0f : 64.0f;

// Of maxima: where the two rows lie further apart than `apart`, o - x has lost digits that differences to the maxima
// keep, and logits are read relative to them.
TNT_DEVICE References references_of(float x_top, float o_top, float apart) {
  const bool numbers = fabsf(x_top) < 1e29f && fabsf(o_top) < 1e29f;
  if (numbers && fabsf(o_top - x_top) <= apart) return {x_top, o_top};
  const float x_zero = fabsf(x_top) < INFINITY ? x_top : 0.0f, o_zero = fabsf(o_top) < INFINITY ? o_top : 0.0f;
  return {x_top - x_zero, o_top - o_zero, x_zero, o_zero};
}

struct KlSums {
  float s = 0, m = 0, f = 0;   // sum e, of near pairs sum e Y and sum e phi
  float far_m = 0, far_f = 0;  // of other pairs: A or M, and Phi
  float h = 0, a = 0;          // for the statistics: of the policy's weights times their log2; A of a reverse KL
  TNT_DEVICE float a_or_m(bool reverse) const { return (reverse ? 0.5f * m : fmaf(0.5f, m, f)) + far_m; }
  TNT_DEVICE float phi() const { return f + far_f; }
};

// phi(y)/Y for |y| <= 1, relative error 1.6e-6.
TNT_DEVICE float phi_over_y(float y2) {
  float p = 0x1.a2f5cep-20f;
  p = fmaf(p, y2, 0x1.75e242p-16f);
  p = fmaf(p, y2, 0x1.112132p-12f);
  p = fmaf(p, y2, 0x1.55383ep-9f);
  p = fmaf(p, y2, 0x1.5554eep-6f);
  p = fmaf(p, y2, 0x1.00001ap-3f);
  return p * y2;
}
TNT_DEVICE float phi(float y) {  // any y
  return fabsf(y) < 1.0f ? 2.0f * y * phi_over_y(2.0f * y) : power(y * LOG2_E_F) - 1.0f - y;
}
TNT_DEVICE float expm1_of(float y) {  // next to phi
  return fabsf(y) < 1.0f ? fmaf(2.0f * y, phi_over_y(2.0f * y), y) : power(y * LOG2_E_F) - 1.0f;
}

// `at`: log2 of the base weight e; `excess`: e (e^y - 1); p = e e^y, which e + excess has lost where it is small. A
// logarithm of -inf has no weight. A of a reverse KL, which M + Phi would lose digits of, is for the reference's mass
// alone.
template <bool REVERSE>
TNT_DEVICE void add_diagnostics(KlSums& t, float e, float excess, float p, float at, float y2) {
  if (REVERSE) {
    t.h = fmaf(e, fmaxf(at, -256.0f), t.h);
    t.a += excess;
  } else {
    t.h = fmaf(p, fmaxf(fmaf(y2, 0.5f * LOG2_E_F, at), -256.0f), t.h);
  }
}

// `at` is log2 of the base weight. The policy is the base of a reverse KL, the other row of a forward KL.
template <bool REVERSE, bool DIAGNOSTICS>
TNT_DEVICE void add_near(KlSums& t, const RowShift& k, float x, float y2) {  // |y| < 1
  const float at = fmaf(x, k.scale, -k.c), e = power(at), w = e * y2, phi_over = phi_over_y(y2);
  t.s += e;
  t.m += w;
  t.f = fmaf(w, phi_over, t.f);
  const float excess = w * (phi_over + 0.5f);
  if (DIAGNOSTICS) add_diagnostics<REVERSE>(t, e, excess, e + excess, at, y2);
}
template <bool REVERSE, bool DIAGNOSTICS>
TNT_DEVICE void add_middle(KlSums& t, const RowShift& k, float x, float y2) {  // |y| < 64; phi to 5e-6
  const float at = fmaf(x, k.scale, -k.c), e = power(at), ratio = power(y2 * (0.5f * LOG2_E_F));
  float p = 0x1.1133b0p-12f;  // |y| < 1/4
  p = fmaf(p, y2, 0x1.560b70p-9f);
  p = fmaf(p, y2, 0x1.55557cp-6f);
  p = fmaf(p, y2, 0x1.ffffd2p-4f);
  const float f = fabsf(y2) < 0.5f ? (p * y2) * y2 : fmaf(-0.5f, y2, ratio - 1.0f);
  t.s += e;
  if (REVERSE)
    t.m = fmaf(e, y2, t.m);
  else
    t.far_m = fmaf(e, fmaf(0.5f, y2, f), t.far_m);
  t.far_f = fmaf(e, f, t.far_f);
  if (DIAGNOSTICS) add_diagnostics<REVERSE>(t, e, e * fmaf(0.5f, y2, f), e * ratio, at, y2);
}
template <bool REVERSE, bool DIAGNOSTICS>
TNT_DEVICE void add_far(KlSums& t, const RowShift& k, float x, float o) {  // any logits
  const float at = fmaf(x, k.scale, -k.c), other_at = fmaf(o - k.o_ref, k.scale, k.rho);
  const float e = power(at), p = power(other_at);
  const float y = fmaf(o - x, k.inverse_t, -k.a), u = p - e;  // not Y, which overflows at the lowest finite logits
  const bool near = fabsf(y) < 1.0f;
  const float yn = near ? y : 0.0f, w = e * yn, all = e == 0.0f ? 0.0f : e * y;  // 0 against an infinite y is nothing
  t.s += e;
  t.f = fmaf(2.0f * w, phi_over_y(2.0f * yn), t.f);
  if (REVERSE) {
    t.far_m += all;
  } else {
    t.m = fmaf(2.0f, w, t.m);
    if (!near) t.far_m += u;
  }
  if (!near) t.far_f += u - all;
  if (DIAGNOSTICS && REVERSE) {
    t.h += e == 0.0f ? 0.0f : e * at;
    t.a += near ? w * (2.0f * phi_over_y(2.0f * yn) + 1.0f) : u;
  }
  if (DIAGNOSTICS && !REVERSE) t.h += p == 0.0f ? 0.0f : p * other_at;
}

template <int N>
struct KlGroup {
  float x[N], o[N];
};
template <int N>
TNT_DEVICE void remove(uint32_t bits, KlGroup<N>& g) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    g.x[i] = bits >> i & 1 ? AWAY : g.x[i];
    g.o[i] = bits >> i & 1 ? AWAY : g.o[i];
  }
}
// By all of a warp. Returns whether it had a pair that is not near. `careful`: a weight may underflow where e e^y does
// not.
template <bool REVERSE, bool DIAGNOSTICS, int N>
TNT_DEVICE bool add_group(KlSums& t, const RowShift& k, const KlGroup<N>& g, bool careful) {
  float y2[N];
  uint32_t any = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    y2[i] = fmaf(g.o[i] - g.x[i], k.y_scale, -k.y_shift);
    any |= bits_as<uint32_t>(y2[i]);
  }
  if (!device::any_of_warp(!(fabsf(bits_as<float>(any)) < 2.0f))) {  // bit 30
#pragma unroll
    for (int i = 0; i < N; ++i) add_near<REVERSE, DIAGNOSTICS>(t, k, g.x[i], y2[i]);
    return false;
  }
  uint32_t top = 0;  // the bits of |Y| order as numbers, infinity and NaN above all
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const uint32_t bits = bits_as<uint32_t>(fabsf(y2[i]));
    top = bits > top ? bits : top;
  }
  if (!careful && device::all_of_warp(top < 0x43000000u)) {  // 128
#pragma unroll
    for (int i = 0; i < N; ++i) add_middle<REVERSE, DIAGNOSTICS>(t, k, g.x[i], y2[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) add_far<REVERSE, DIAGNOSTICS>(t, k, g.x[i], g.o[i]);
  }
  return true;
}

struct KlSetSums {  // over removed entries: of 2^((z - max) scale), their moment in units of log2, their number
  float max = LOWEST, sum = 0, moment = 0, n = 0;
  TNT_DEVICE void raise(float to, float scale) {
    const float by = (max - to) * scale, factor = power(by);
    moment = factor == 0.0f ? 0.0f : factor * fmaf(sum, by, moment);
    sum *= factor;
    max = to;
  }
  TNT_DEVICE void add(float z, float scale) {
    if (z > max) raise(z, scale);
    const float by = (z - max) * scale, e = power(by);
    sum += e;
    moment += e == 0.0f ? 0.0f : e * by;
    n += 1.0f;
  }
  TNT_DEVICE void merge(KlSetSums other, float scale) {
    if (other.max > max)
      raise(other.max, scale);
    else
      other.raise(max, scale);
    sum += other.sum;
    moment += other.moment;
    n += other.n;
  }
  TNT_DEVICE void merge_warp(float scale) {
    raise(max_of_warp(max), scale);
    sum = sum_of_warp(sum);
    moment = sum_of_warp(moment);
    n = sum_of_warp(n);
  }
};

// ------------------------------------------------------------------------------------------------------ second pass

enum KlForm { KL_NEAR, KL_DIRECT, KL_FAR };  // which form of a gradient holds for a row

struct ForwardGradient {     // factor (p - q*)
  float y_scale, y_shift;    // near: e y* (h0 + h1 y*^2 + h2 y*^4), e at the geometric mean of p and q*,
  float h0, h1, h2;          //   where y* = log p - log q* = (o - x) y_scale - y_shift, and h are of 2 sinh(y/2)/y
  float rest;                // what rounding took from y_shift
  float p_direct, q_direct;  // direct: 2^(o scale + p_direct) - 2^(x scale + q_direct)
  float x_ref, p_shift, q_shift, sign;  // far: sign (2^((o - o_ref) scale + p_shift) - 2^((x - x_ref) scale + q_shift))
};
struct ReverseGradient {  // factor p (M/S - y + p(R) (D_K - D_R))
  float k1, k0;           // near: e (k1 Y + k0)
  float slope, level;     // direct: e ((o - x) slope + level)
};
// Of removed entries: at = (z - ref) scale + shift = log2 p, gradient p (k0 + k1 at).
struct SetGradient {
  float ref, shift, k0, k1;
};

// 2 sinh(y/2) = y (SINH_0 + SINH_1 y^2 + SINH_2 y^4) for |y| <= 1.25.
constexpr float SINH_0 = 0x1.000006p+0f, SINH_1 = 0x1.554c74p-5f, SINH_2 = 0x1.14e172p-11f;
TNT_DEVICE float two_sinh(float y) {
  const float square = y * y;
  return y * fmaf(fmaf(SINH_2, square, SINH_1), square, SINH_0);
}

// Logits of 16 bits do not tell how y_shift was rounded.
template <bool EXACT>
TNT_DEVICE float near_gradient(const ForwardGradient& g, const RowShift& k, float x, float o) {
  const float shifted = fmaf(o - x, g.y_scale, -g.y_shift), y = EXACT ? shifted - g.rest : shifted, square = y * y;
  const float e = power(fmaf(y, 0.5f * LOG2_E_F, fmaf(x, k.scale, -k.c)));
  return (e * y) * fmaf(fmaf(g.h2, square, g.h1), square, g.h0);
}
TNT_DEVICE float direct_gradient(const ForwardGradient& g, const RowShift& k, float x, float o) {
  return power(fmaf(o, k.scale, g.p_direct)) - power(fmaf(x, k.scale, g.q_direct));
}
template <bool EXACT>
TNT_DEVICE float far_gradient(const ForwardGradient& g, const RowShift& k, float x, float o) {
  const float p = power(fmaf(o - k.o_ref, k.scale, g.p_shift)), at = fmaf(x - g.x_ref, k.scale, g.q_shift);
  if (!EXACT) return g.sign * (p - power(at));
  const float y = fmaf(o - x, g.y_scale, -g.y_shift) - g.rest;
  const bool near = fabsf(y) <= 1.25f;  // without a branch: lanes differ
  const float q = power(near ? fmaf(y, 0.5f * LOG2_E_F, at) : at);
  const float sinh = two_sinh(y);
  return g.sign * (near ? q * sinh : p - q);
}
template <bool EXACT>
TNT_DEVICE float near_gradient(const ReverseGradient& g, const RowShift& k, float x, float o) {
  const float y2 = fmaf(o - x, k.y_scale, -k.y_shift);
  return power(fmaf(x, k.scale, -k.c)) * fmaf(y2, g.k1, g.k0);
}
TNT_DEVICE float direct_gradient(const ReverseGradient& g, const RowShift& k, float x, float o) {
  return power(fmaf(x, k.scale, -k.c)) * fmaf(o - x, g.slope, g.level);
}
template <bool EXACT>
TNT_DEVICE float far_gradient(const ReverseGradient& g, const RowShift& k, float x, float o) {
  const float e = power(fmaf(x, k.scale, -k.c)), y = fmaf(o - x, k.inverse_t, -k.a);
  return e == 0.0f ? 0.0f : e * fmaf(y, 2.0f * g.k1, g.k0);
}
TNT_DEVICE float set_gradient(const SetGradient& s, const RowShift& k, float z) {
  const float at = fmaf(z - s.ref, k.scale, s.shift), p = power(at);
  return p == 0.0f ? 0.0f : p * fmaf(at, s.k1, s.k0);
}

// ----------------------------------------------------------------------------------------------------- coefficients

struct Odds {  // p(R) and p(K) = 1 - p(R), each with all its digits; the entropy of that choice in bits
  float log2_odds, log2_kept, log2_removed, kept, removed, entropy;
};
TNT_DEVICE Odds odds_of(float log2_odds) {
  const float ratio = power(-fabsf(log2_odds)), small = ratio / (1.0f + ratio), soft = log1pf(ratio) * LOG2_E_F;
  Odds o;
  o.log2_odds = log2_odds;
  o.log2_kept = -soft - fmaxf(log2_odds, 0.0f);
  o.log2_removed = -soft - fmaxf(-log2_odds, 0.0f);
  o.kept = log2_odds > 0.0f ? small : 1.0f - small;
  o.removed = log2_odds > 0.0f ? 1.0f - small : small;
  o.entropy = soft + (small > 0.0f ? small * fabsf(log2_odds) : 0.0f);
  return o;
}

struct KlRow {  // the row's sums, over all slices; of removed entries those of the policy, and of the reference
  float s = 0, a_or_m = 0, phi = 0, h = 0, a = 0, inverse = 0, l = 0, kl = 0;  // inverse: 1/s
  KlSetSums set, reference_set;
};

// y that is pushed down in part, -1 < w < 0: what is left of it in the target is kappa = 1 + w.
struct PartialLabel {
  float z, r, log_kappa;
};
struct PartialEntry {
  float e, p, y;  // p = e e^y
};
template <bool REVERSE>
TNT_DEVICE PartialEntry entry_of(const PartialLabel& label, const RowShift& k) {
  const float x = (REVERSE ? label.z : label.r) - k.x_zero, o = (REVERSE ? label.r : label.z) - k.o_zero;
  const float of_x = REVERSE ? 0.0f : label.log_kappa, of_o = REVERSE ? label.log_kappa : 0.0f;
  return {power(fmaf(of_x, LOG2_E_F, fmaf(x, k.scale, -k.c))),
          power(fmaf(of_o, LOG2_E_F, fmaf(o - k.o_ref, k.scale, k.rho))),
          fmaf(o - x, k.inverse_t, -k.a) + (of_o - of_x)};
}
template <bool REVERSE>
TNT_DEVICE void add(KlRow& row, const PartialEntry& label) {
  const bool near = fabsf(label.y) < 1.0f;
  const float e_y = label.e == 0.0f ? 0.0f : label.e * label.y;
  const float excess = near ? label.e * expm1_of(label.y) : label.p - label.e;
  row.s += label.e;
  row.a_or_m += REVERSE ? e_y : excess;
  row.phi += near ? label.e * phi(label.y) : excess - e_y;
  row.a += excess;
}

enum KlVerdict { KL_GOOD, KL_INFINITE, KL_AGAIN, KL_BY_MAXIMA, KL_LEFT };  // left: to another kernel

// Completes a row's sums, and says what to do with them: they are good; they have an infinite term; again, with L added
// to the shift; again, with the maxima as references. `has_a`: whether A of a reverse KL was summed, where M + Phi
// would be the difference of large numbers. `readable`: the references lie near enough for o - x to keep its digits.
template <bool REVERSE>
TNT_DEVICE KlVerdict judge_sums(KlRow& row, bool has_a, bool first, bool readable, bool entropy_cancels) {
  const float a = !REVERSE ? row.a_or_m : has_a ? row.a : row.a_or_m + row.phi;
  row.inverse = 1.0f / row.s;
  row.l = log1pf(a * row.inverse);
  const float excess = phi(row.l);
  row.kl = row.phi * row.inverse - excess;
  // With more, factors on weights would underflow. Below -3, S + A has lost its digits.
  const bool usable = row.s > 0x1p-40f && row.s < 0x1p40f;
  const bool in_range = usable && row.s + a < 0x1p60f && row.l > -3.0f;
  const bool again = (first && entropy_cancels) || (REVERSE && !has_a && row.phi > 0x1p16f * row.s);
  // Phi/S and phi(L) are good to 2e-6 of their size: where KL is much less than they, L has to be nearer to 0.
  if (in_range && row.phi < INFINITY && !(excess > 0.5f * fabsf(row.kl)) && readable && !again) {
    row.kl = row.kl > 0.0f ? row.kl : 0.0f;  // what rounding leaves of 0
    return KL_GOOD;
  }
  if (usable && row.phi == INFINITY) return KL_INFINITE;
  return (in_range && readable && !again) || !first ? KL_AGAIN : KL_BY_MAXIMA;
}

// The policy's sum over the kept entries, and log2 of the odds of the set, for the policy and for the reference.
template <bool REVERSE>
TNT_DEVICE float kept_sum(const KlRow& row, bool policy) {
  const float other = row.s + (REVERSE ? row.a : row.a_or_m);
  return policy == REVERSE ? row.s : other;
}
template <bool REVERSE>
TNT_DEVICE float log2_odds(const RowShift& k, const KlRow& row, bool policy) {
  const KlSetSums& set = policy ? row.set : row.reference_set;
  const float at = policy == REVERSE ? fmaf((set.max - k.x_zero) - k.x_ref, k.scale, k.own())
                                     : fmaf((set.max - k.o_zero) - k.o_ref, k.scale, k.rho);
  return at + (log2f(set.sum) - log2f(kept_sum<REVERSE>(row, policy)));
}

// `factor` is that on the gradient, not 0; `label` is one that is pushed down in part, if the row has any, whose
// gradient goes to `of_label`. The forward loss is KL(q* || p) = KL over the kept entries - log p(K). Returns the form
// of the gradient. In the direct one p and q* are off by up to 2^-18 of their size: good enough for 16 bits, unless
// they are almost equal.
template <bool SET, bool DIRECT>
TNT_DEVICE KlForm kl_coefficients(const RowShift& k, const KlRow& row, const PartialEntry& label, bool has_label,
                                  float factor, float, ForwardGradient& g, SetGradient& sg, float& of_label,
                                  float& loss) {
  const float own = k.own();
  float log2_kept = 0.0f;
  loss = row.kl;
  sg = {0.0f, -INFINITY, 0.0f, 0.0f};  // a set without mass
  if (SET && row.set.sum > 0.0f) {
    const Odds o = odds_of(log2_odds<false>(k, row, true));
    log2_kept = o.log2_kept;
    loss -= LN_2_F * log2_kept;
    sg = {row.set.max, o.log2_removed - log2f(row.set.sum), factor, 0.0f};
  }
  const float up = row.l - LN_2_F * log2_kept;  // y* = y - up
  const float h = factor * row.inverse;
  g.y_scale = k.inverse_t;
  g.y_shift = k.a + up;
  g.rest = up - (g.y_shift - k.a);
  g.h0 = SINH_0 * h, g.h1 = SINH_1 * h, g.h2 = SINH_2 * h;
  g.x_ref = k.x_ref;
  g.sign = factor < 0.0f ? -1.0f : 1.0f;
  const float whole = log2_kept - row.l * LOG2_E_F;  // log2 of the base's sum over the policy's whole one
  g.q_shift = own + log2f(fabsf(h));
  g.p_shift = g.q_shift + (k.rho - own) + whole;
  g.p_direct = fmaf(-k.o_ref, k.scale, g.p_shift), g.q_direct = fmaf(-k.x_ref, k.scale, g.q_shift);
  if (SET && has_label) {
    const float d = label.y - up;
    of_label = h * (fabsf(d) < 1.0f ? label.e * expm1_of(d) : label.p * power(whole) - label.e);
  }
  const bool apart = row.kl > 0x1p-16f || fabsf(up) > 0x1p-7f;
  if (DIRECT && apart && factor > 0.0f && fabsf(g.p_direct) < 64.0f && fabsf(g.q_direct) < 64.0f) return KL_DIRECT;
  return fabsf(up) > 0.25f ? KL_FAR : KL_NEAR;  // |y*| <= 1.25 elsewhere
}

// The reverse loss is p(K) KL + log(1 + eps n) - H(p(R)) - p(R) (H_R + log eps); its gradient takes
// D_K - D_R = KL - o + H_R + log eps, where o are the log-odds of R and H_R the entropy of p within R.
template <bool SET, bool DIRECT>
TNT_DEVICE KlForm kl_coefficients(const RowShift& k, const KlRow& row, const PartialEntry& label, bool has_label,
                                  float factor, float eps, ReverseGradient& g, SetGradient& sg, float& of_label,
                                  float& loss) {
  float kept = 1.0f, extra = 0.0f;
  loss = SET ? row.kl + log1pf(eps * row.set.n) : row.kl;
  sg = {0.0f, -INFINITY, 0.0f, 0.0f};  // a set without mass
  if (SET && row.set.sum > 0.0f) {
    const float log2_sum = log2f(row.set.sum);
    const Odds o = odds_of(log2_odds<true>(k, row, true));
    const float mean = row.set.moment / row.set.sum - log2_sum;  // of log2 p within R, -H_R
    const float rest = LN_2_F * (o.log2_odds + mean - log2f(eps)), delta = row.kl - rest;
    kept = o.kept;
    extra = o.removed > 0.0f ? o.removed * delta : 0.0f;
    // p(R) times the log-odds is in the entropy: apart from log p(K) it would cancel against it.
    loss =
        fmaf(kept, row.kl, (log1pf(eps * row.set.n) - LN_2_F * o.entropy) + LN_2_F * o.removed * (mean - log2f(eps)));
    sg.ref = row.set.max;
    sg.shift = o.log2_removed - log2_sum;
    sg.k1 = factor * LN_2_F;
    sg.k0 = -sg.k1 * (mean + o.log2_removed) - factor * kept * delta;
  }
  const float h = factor * kept * row.inverse, centre = row.a_or_m * row.inverse + extra;
  g.k1 = -0.5f * h;
  g.k0 = h * centre;
  g.slope = g.k1 * k.y_scale, g.level = fmaf(-g.k1, k.y_shift, g.k0);
  if (SET && has_label) of_label = label.e == 0.0f ? 0.0f : h * label.e * (centre - label.y);
  return DIRECT && fabsf(k.y_shift) < 4.0f ? KL_DIRECT : KL_NEAR;
}

// For a gradient that waits for its factor, where the coefficients are those of a factor of 1.
TNT_DEVICE void plan_gradient(const RowShift& k, const KlRow& row, const ForwardGradient& g, KlPlan<float>& plan) {
  plan.shift = g.y_shift, plan.rest = g.rest;
  plan.u0 = row.inverse, plan.u1 = g.p_shift;
}
TNT_DEVICE void plan_gradient(const RowShift& k, const KlRow&, const ReverseGradient& g, KlPlan<float>& plan) {
  plan.shift = k.a, plan.rest = 0.0f;
  plan.u0 = g.k0, plan.u1 = 2.0f * g.k1;
}
template <class KlGradient>
TNT_DEVICE KlPlan<float> plan_of(bool reverse, const RowShift& k, const KlRow& row, const KlGradient& g,
                                 const SetGradient& sg, float of_label) {
  KlPlan<float> plan;
  plan.x_ref = k.x_ref, plan.o_ref = k.o_ref, plan.c = k.c;
  plan.x_zero = k.x_zero, plan.o_zero = k.o_zero;
  plan_gradient(k, row, g, plan);
  plan.set_max = sg.ref, plan.set_scale = power(sg.shift);
  plan.set_shift = reverse && plan.set_scale > 0.0f ? fmaf(LN_2_F, sg.shift, sg.k0) : 0.0f;
  plan.partial = of_label;
  return plan;
}

// Of LL and UL, whose only row is the policy's. LL's set is y: loss -log p(R), gradient p - 1 there, p elsewhere.
// UL: loss -log p(K), gradient p there, -p p(R)/p(K) elsewhere.
struct LikelihoodGradient {
  float kept;       // times e
  SetGradient set;  // UL
  float label;      // LL
};
TNT_DEVICE LikelihoodGradient likelihood_coefficients(const RowShift& k, const KlRow& row, bool unlikelihood,
                                                      float factor, float& loss) {
  LikelihoodGradient g{0.0f, {row.set.max, -INFINITY, 0.0f, 0.0f}, 0.0f};
  loss = 0.0f;
  if (!(row.set.sum > 0.0f)) return g;  // UL of a set without mass
  const Odds o = odds_of(log2_odds<true>(k, row, true));
  if (unlikelihood) {
    loss = -LN_2_F * o.log2_kept;
    g.kept = -factor * o.removed / row.s;
    g.set = {row.set.max, o.log2_removed - log2f(row.set.sum), factor, 0.0f};
  } else {
    loss = -LN_2_F * o.log2_removed;
    g.kept = factor * o.kept / row.s;
    g.label = -factor * o.kept;
  }
  return g;
}

TNT_DEVICE ExpPlan<float> plan_of(const RowShift& k, const LikelihoodGradient& g) {  // of a factor of 1
  return {0.0f, k.x_ref, k.c, g.kept, 0.0f, g.set.ref, power(g.set.shift), g.label, -INFINITY};
}

// ------------------------------------------------------------------------------------------------------ diagnostics

struct KlDiagnosis {
  float negative_mass, ref_negative_mass, entropy;
};
template <bool REVERSE>
TNT_DEVICE float kept_entropy(const KlRow& row) {  // of p within K, in bits
  const float kept = kept_sum<REVERSE>(row, true);
  return log2f(kept) - row.h / kept;
}
// Whether too few digits are left of it, as the row's level is far from its maximum.
template <bool REVERSE>
TNT_DEVICE bool entropy_cancels(const KlRow& row) {
  const float kept = kept_sum<REVERSE>(row, true), lost = fabsf(log2f(kept)) * (1.0f + row.s / kept);
  return kept_entropy<REVERSE>(row) < lost * 0x1p-6f || lost > 32.0f;
}
// The entropy of p is p(K) (H_K - log p(K)) + p(R) (H_R - log p(R)).
template <bool REVERSE, bool SET>
TNT_DEVICE KlDiagnosis kl_diagnosis(const RowShift& k, const KlRow& row) {
  const float of_kept = kept_entropy<REVERSE>(row);
  KlDiagnosis d{0.0f, 0.0f, LN_2_F * of_kept};
  if (!SET) return d;
  if (row.reference_set.sum > 0.0f) d.ref_negative_mass = odds_of(log2_odds<REVERSE>(k, row, false)).removed;
  if (!(row.set.sum > 0.0f)) return d;
  const Odds o = odds_of(log2_odds<REVERSE>(k, row, true));
  const float of_removed = log2f(row.set.sum) - row.set.moment / row.set.sum;
  d.negative_mass = o.removed;
  d.entropy = o.kept > 0.0f ? o.kept * (of_kept - o.log2_kept) : 0.0f;
  if (o.removed > 0.0f) d.entropy += o.removed * (of_removed - o.log2_removed);
  d.entropy *= LN_2_F;
  return d;
}

}  // namespace TNT_ISA
}  // namespace tnt
