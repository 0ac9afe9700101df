// KL divergences by one read and one exponential an entry (MATH: "One read, one exponential"). x is the base row's
// logit (forward KL(q* || p): the reference's, reverse KL(p || q~): the policy's), o the other's. With one shift for
// the whole row,
//   e = 2^(x scale - c)     y = (o - x)/T - a     phi(y) = e^y - 1 - y
//   S = sum e    A = sum e (e^y - 1)    M = sum e y    Phi = sum e phi(y), all terms >= 0    A = M + Phi
//   L = log1p(A/S)    KL(base || other) over the kept entries = Phi/S - phi(L)
// so p = q gives exactly 0, and next to it no digit is lost. Sums of slices with the same shift just add. Forward sums
// A, because p needs S + A to all digits; reverse sums M, because its gradient needs M/S.
#pragma once

#include "cuda/math.cuh"

namespace tnt {
inline namespace TNT_ISA {

constexpr float LOG2_E_F = float(LOG2_E), LN_2_F = float(LN_2);
constexpr float AWAY = -1e30f;  // a logit that weighs nothing: shifts are held below 1e29

// 2^x to 2 ulp, 0 below 2^-126, infinity from 2^128.
TNT_DEVICE float power(float x) {
#if defined(__CUDA_ARCH__)
  return exponential(x);
#else
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
#endif
}

// ------------------------------------------------------------------------------------------------------- first pass

struct KlShift {           // of a row, the same in every block
  float scale;             // log2(e)/T
  float c;                 // base weights are 2^(x scale - c)
  float y_scale, y_shift;  // Y = 2y = (o - x) y_scale - y_shift: |y| >= 1 shows in one bit of Y, as do NaN and infinity
  float a, inverse_t, x_ref;
  float o_ref, rho;  // e e^y = 2^((o - o_ref) scale + rho)
  float more;
};

// x_ref and o_ref: near the maxima of x and of o. rho makes c, a and o_ref agree, though each was rounded. `more` is
// added to a, which should be near L.
TNT_DEVICE KlShift kl_shift(float x_ref, float o_ref, float inverse_t, float more) {
  if (!(fabsf(x_ref) < 1e29f)) x_ref = 0.0f;
  if (!(fabsf(o_ref) < 1e29f)) o_ref = 0.0f;
  KlShift s;
  s.scale = LOG2_E_F * inverse_t;
  s.c = x_ref * s.scale;
  const float d = o_ref - x_ref, back = o_ref - d, lost = (back - x_ref) + (o_ref - (d + back));  // d + lost is exact
  const float a = fmaf(d, inverse_t, more);
  s.a = a, s.inverse_t = inverse_t, s.x_ref = x_ref;
  s.y_scale = 2.0f * inverse_t, s.y_shift = 2.0f * a;
  s.o_ref = o_ref, s.more = more;
  s.rho = fmaf(fmaf(d, inverse_t, -a) + lost * inverse_t, LOG2_E_F, fmaf(x_ref, s.scale, -s.c));
  return s;
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

// `at`: log2 of the base weight e; `excess`: e (e^y - 1). A logarithm of -inf has no weight. A of a reverse KL, which
// M + Phi would lose digits of, is for the reference's mass alone.
template <bool REVERSE>
TNT_DEVICE void add_diagnostics(KlSums& t, float e, float excess, float at, float y2) {
  if (REVERSE) {
    t.h = fmaf(e, fmaxf(at, -256.0f), t.h);
    t.a += excess;
  } else {
    t.h = fmaf(e + excess, fmaxf(fmaf(y2, 0.5f * LOG2_E_F, at), -256.0f), t.h);
  }
}

// `at` is log2 of the base weight. The policy is the base of a reverse KL, the other row of a forward KL.
template <bool REVERSE, bool DIAGNOSTICS>
TNT_DEVICE void add_near(KlSums& t, const KlShift& k, float x, float y2) {  // |y| < 1
  const float at = fmaf(x, k.scale, -k.c), e = power(at), w = e * y2, phi_over = phi_over_y(y2);
  t.s += e;
  t.m += w;
  t.f = fmaf(w, phi_over, t.f);
  if (DIAGNOSTICS) add_diagnostics<REVERSE>(t, e, w * (phi_over + 0.5f), at, y2);
}
template <bool REVERSE, bool DIAGNOSTICS>
TNT_DEVICE void add_middle(KlSums& t, const KlShift& k, float x, float y2) {  // |y| < 64; phi to 5e-6
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
  if (DIAGNOSTICS) add_diagnostics<REVERSE>(t, e, e * fmaf(0.5f, y2, f), at, y2);
}
template <bool REVERSE, bool DIAGNOSTICS>
TNT_DEVICE void add_far(KlSums& t, const KlShift& k, float x, float o) {  // any logits
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

struct KlSetSums {  // over removed entries: of 2^((z - max) scale), their moment in units of log2, their number
  float max = AWAY, sum = 0, moment = 0, n = 0;
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

TNT_DEVICE float near_gradient(const ForwardGradient& g, const KlShift& k, float x, float o) {
  const float y = fmaf(o - x, g.y_scale, -g.y_shift), square = y * y;
  const float e = power(fmaf(y, 0.5f * LOG2_E_F, fmaf(x, k.scale, -k.c)));
  return (e * y) * fmaf(fmaf(g.h2, square, g.h1), square, g.h0);
}
TNT_DEVICE float direct_gradient(const ForwardGradient& g, const KlShift& k, float x, float o) {
  return power(fmaf(o, k.scale, g.p_direct)) - power(fmaf(x, k.scale, g.q_direct));
}
TNT_DEVICE float far_gradient(const ForwardGradient& g, const KlShift& k, float x, float o) {
  return g.sign * (power(fmaf(o - k.o_ref, k.scale, g.p_shift)) - power(fmaf(x - g.x_ref, k.scale, g.q_shift)));
}
TNT_DEVICE float near_gradient(const ReverseGradient& g, const KlShift& k, float x, float o) {
  const float y2 = fmaf(o - x, k.y_scale, -k.y_shift);
  return power(fmaf(x, k.scale, -k.c)) * fmaf(y2, g.k1, g.k0);
}
TNT_DEVICE float direct_gradient(const ReverseGradient& g, const KlShift& k, float x, float o) {
  return power(fmaf(x, k.scale, -k.c)) * fmaf(o - x, g.slope, g.level);
}
TNT_DEVICE float far_gradient(const ReverseGradient& g, const KlShift& k, float x, float o) {
  const float e = power(fmaf(x, k.scale, -k.c)), y = fmaf(o - x, k.inverse_t, -k.a);
  return e == 0.0f ? 0.0f : e * fmaf(y, 2.0f * g.k1, g.k0);
}
TNT_DEVICE float set_gradient(const SetGradient& s, const KlShift& k, float z) {
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

// The policy's sum over the kept entries, and log2 of the odds of the set, for the policy and for the reference.
template <bool REVERSE>
TNT_DEVICE float kept_sum(const KlRow& row, bool policy) {
  const float other = row.s + (REVERSE ? row.a : row.a_or_m);
  return policy == REVERSE ? row.s : other;
}
template <bool REVERSE>
TNT_DEVICE float log2_odds(const KlShift& k, const KlRow& row, bool policy) {
  const KlSetSums& set = policy ? row.set : row.reference_set;
  const float at = policy == REVERSE ? fmaf(set.max - k.x_ref, k.scale, fmaf(k.x_ref, k.scale, -k.c))
                                     : fmaf(set.max - k.o_ref, k.scale, k.rho);
  return at + (log2f(set.sum) - log2f(kept_sum<REVERSE>(row, policy)));
}

// `factor` is that on the gradient, not 0. The forward loss is KL(q* || p) = KL over the kept entries - log p(K).
// Returns the form of the gradient. In the direct one p and q* are off by up to 2^-18 of their size: good enough for 16
// bits, unless they are almost equal.
template <bool SET, bool DIRECT>
TNT_DEVICE KlForm kl_coefficients(const KlShift& k, const KlRow& row, float factor, float, ForwardGradient& g,
                                  SetGradient& sg, float& loss) {
  const float own = fmaf(k.x_ref, k.scale, -k.c);
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
  g.h0 = 0x1.000006p+0f * h, g.h1 = 0x1.554c74p-5f * h, g.h2 = 0x1.14e172p-11f * h;
  g.x_ref = k.x_ref;
  g.sign = factor < 0.0f ? -1.0f : 1.0f;
  g.q_shift = own + log2f(fabsf(h));
  g.p_shift = g.q_shift + (k.rho - own) - (row.l * LOG2_E_F - log2_kept);
  g.p_direct = fmaf(-k.o_ref, k.scale, g.p_shift), g.q_direct = fmaf(-k.x_ref, k.scale, g.q_shift);
  const bool apart = row.kl > 0x1p-16f || fabsf(up) > 0x1p-7f;
  if (DIRECT && apart && factor > 0.0f && fabsf(g.p_direct) < 64.0f && fabsf(g.q_direct) < 64.0f) return KL_DIRECT;
  return fabsf(up) > 0.25f ? KL_FAR : KL_NEAR;  // |y*| <= 1.25 elsewhere
}

// The reverse loss is p(K) KL + log(1 + eps n) - H(p(R)) - p(R) (H_R + log eps); its gradient takes
// D_K - D_R = KL - o + H_R + log eps, where o are the log-odds of R and H_R the entropy of p within R.
template <bool SET, bool DIRECT>
TNT_DEVICE KlForm kl_coefficients(const KlShift& k, const KlRow& row, float factor, float eps, ReverseGradient& g,
                                  SetGradient& sg, float& loss) {
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
  const float h = factor * kept * row.inverse;
  g.k1 = -0.5f * h;
  g.k0 = h * (row.a_or_m * row.inverse + extra);
  g.slope = g.k1 * k.y_scale, g.level = fmaf(-g.k1, k.y_shift, g.k0);
  return DIRECT && fabsf(k.y_shift) < 4.0f ? KL_DIRECT : KL_NEAR;
}

// Of LL and UL, whose only row is the policy's. LL's set is y: loss -log p(R), gradient p - 1 there, p elsewhere.
// UL: loss -log p(K), gradient p there, -p p(R)/p(K) elsewhere.
struct LikelihoodGradient {
  float kept;       // times e
  SetGradient set;  // UL
  float label;      // LL
};
TNT_DEVICE LikelihoodGradient likelihood_coefficients(const KlShift& k, const KlRow& row, bool unlikelihood,
                                                      float factor, float& loss) {
  LikelihoodGradient g{0.0f, {0.0f, -INFINITY, 0.0f, 0.0f}, 0.0f};
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
  return kept_entropy<REVERSE>(row) < fabsf(log2f(kept_sum<REVERSE>(row, true))) * 0x1p-8f;
}
// The entropy of p is p(K) (H_K - log p(K)) + p(R) (H_R - log p(R)).
template <bool REVERSE, bool SET>
TNT_DEVICE KlDiagnosis kl_diagnosis(const KlShift& k, const KlRow& row) {
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
