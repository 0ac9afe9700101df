// A row's statistics while they are summed in float on a GPU, what its element loops take, and the stored types. The
// formulas stand in statistics.h and objectives.h.
#pragma once

#include "cuda/device.cuh"
#include "elementary.h"
#include "objectives.h"
#include "row_rules.h"
#include "statistics.h"

namespace tnt {
inline namespace TNT_ISA {

using device::Vector;

#define TNT_DEVICE __device__ __forceinline__

constexpr float LOWEST = -3.4028234663852886e38f;  // where a maximum starts

// --------------------------------------------------------------------------------------------------- stored types

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class Logit>
struct Stored;

template <>
struct Stored<float> {
  static constexpr DType DTYPE = DType::FLOAT32;
  static constexpr int GROUP = 4;  // in 16 bytes
  static TNT_DEVICE float nothing() { return -INFINITY; }
  static TNT_DEVICE float load(const float* from) { return *from; }
  static TNT_DEVICE void unpack(const Vector& x, float (&to)[GROUP]) {
#pragma unroll
    for (int i = 0; i < GROUP; ++i) to[i] = bits_as<float>(x.words[i]);
  }
  static TNT_DEVICE Vector pack(const float (&x)[GROUP]) {
    Vector to;
#pragma unroll
    for (int i = 0; i < GROUP; ++i) to.words[i] = bits_as<uint32_t>(x[i]);
    return to;
  }
};

template <>
struct Stored<BFloat16> {
  static constexpr DType DTYPE = DType::BFLOAT16;
  static constexpr int GROUP = 8;
  static TNT_DEVICE BFloat16 nothing() { return {0xff80}; }  // -inf
  static TNT_DEVICE float load(const BFloat16* from) { return bits_as<float>(uint32_t(from->bits) << 16); }
  static TNT_DEVICE void unpack(const Vector& x, float (&to)[GROUP]) {
#pragma unroll
    for (int i = 0; i < GROUP / 2; ++i) {
      to[2 * i] = bits_as<float>(x.words[i] << 16);
      to[2 * i + 1] = bits_as<float>(x.words[i] & 0xffff0000u);
    }
  }
  static TNT_DEVICE Vector pack(const float (&x)[GROUP]) {
    Vector to;
#pragma unroll
    for (int i = 0; i < GROUP / 2; ++i) to.words[i] = device::floats_to_bfloats(x[2 * i], x[2 * i + 1]);
    return to;
  }
};

template <>
struct Stored<Float16> {
  static constexpr DType DTYPE = DType::FLOAT16;
  static constexpr int GROUP = 8;
  static TNT_DEVICE Float16 nothing() { return {0xfc00}; }  // -inf
  static TNT_DEVICE float load(const Float16* from) { return device::half_to_float(from->bits); }
  static TNT_DEVICE void unpack(const Vector& x, float (&to)[GROUP]) {
#pragma unroll
    for (int i = 0; i < GROUP / 2; ++i) {
      to[2 * i] = device::half_to_float(x.words[i] & 0xffffu);
      to[2 * i + 1] = device::half_to_float(x.words[i] >> 16);
    }
  }
  static TNT_DEVICE Vector pack(const float (&x)[GROUP]) {
    Vector to;
#pragma unroll
    for (int i = 0; i < GROUP / 2; ++i) to.words[i] = device::floats_to_halves(x[2 * i], x[2 * i + 1]);
    return to;
  }
};

// Entry i of a packed group, to its place behind `to`.
template <class Number>
TNT_DEVICE void store_entry(Number* to, const Vector& packed, int i) {
  if constexpr (sizeof(Number) == 4)
    reinterpret_cast<uint32_t*>(to)[i] = packed.words[i];
  else
    reinterpret_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(packed.words[i / 2] >> (i % 2 * 16));
}

// Bytes [offset, offset + 16) of two vectors in a row; 0 < offset < 16, even.
TNT_DEVICE Vector join(const Vector& a, const Vector& b, int offset) {
  uint32_t w[8] = {a.words[0], a.words[1], a.words[2], a.words[3], b.words[0], b.words[1], b.words[2], b.words[3]};
  if (offset & 8) {
#pragma unroll
    for (int i = 0; i < 6; ++i) w[i] = w[i + 2];
  }
  if (offset & 4) {
#pragma unroll
    for (int i = 0; i < 5; ++i) w[i] = w[i + 1];
  }
  if (offset & 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = device::funnel_right(w[i], w[i + 1], 16);
  }
  return {{w[0], w[1], w[2], w[3]}};
}

// ----------------------------------------------------------------------------------------------------- around a row

enum RowFlags : uint32_t { HAS_IDS = 1, ID_OUTSIDE = 2, LABEL_AMONG_IDS = 4 };

// `losses` are summed by another kernel.
TNT_DEVICE void write_loss(const RowCall& p, double* losses, int64_t row, double weighted) {
  if (!p.loss) return;
  if (p.reduction == Reduction::NONE)
    static_cast<float*>(p.loss)[row] = float(weighted);
  else
    losses[row] = weighted;
}

// ----------------------------------------------------------------------------------------------------- statistics

struct Scales {
  float exponent, inverse_t;  // of exponents; of differences
};

TNT_DEVICE float max_of_warp(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) x = fmaxf(x, device::shuffle_xor(x, mask));
  return x;
}
// The same number on all lanes: addition commutes.
template <class Number>
TNT_DEVICE Number sum_of_warp(Number x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) x += device::shuffle_xor(x, mask);
  return x;
}

// RowStatistics of some entries in float: their exact image, as the sums are formed in float. Maxima may be
// lower than the largest entry, by less than e^40.
struct Sums {
  float z_max = LOWEST, z_sum = 0, z_moment = 0;
  float r_max = LOWEST, r_sum = 0, label_z = 0;
  float zs_max = LOWEST, zs_sum = 0, zs_moment = 0;
  float rs_max = LOWEST, rs_sum = 0, label_r = 0;
  float kl_moment = 0;
  float total = 0, kept = 0;  // Σ (z - z_max)/T over the kept entries, and their number

  static TNT_DEVICE bool too_low(float max, float top, Scales t) { return (top - max) * t.exponent > 40.0f; }
  // Both rows' maxima rise together, so that rows which are close keep maxima which are.
  TNT_DEVICE bool too_low(float z_top, float r_top, bool pair, Scales t) const {
    return too_low(z_max, z_top, t) || (pair && too_low(r_max, r_top, t));
  }

  TNT_DEVICE void raise(float z_top, float r_top, bool pair, Scales t) {
    const float z_new = fmaxf(z_max, z_top), r_new = pair ? fmaxf(r_max, r_top) : r_max;
    const float shift = z_max - z_new, factor = exponential(shift * t.exponent);
    if (z_sum != 0.0f) {
      z_moment = factor == 0.0f ? 0.0f : factor * fused_multiply_add(z_sum, shift * t.inverse_t, z_moment);
      // An infinite moment (a reference of -inf) whose weight underflows to 0 is nothing, not NaN.
      // In this order: where the reference is masked by the lowest number, x alone is almost too large.
      const float x = moved(z_max, z_new, r_max, r_new);
      kl_moment = factor == 0.0f ? 0.0f : factor * kl_moment + factor * z_sum * x * t.inverse_t;
    }
    if (kept != 0.0f) total = fused_multiply_add(kept, shift * t.inverse_t, total);
    z_sum *= factor;
    z_max = z_new;
    if (!pair) return;
    r_sum *= exponential((r_max - r_new) * t.exponent);
    r_max = r_new;
  }
  TNT_DEVICE void raise_zs(float max, Scales t) {
    const float shift = zs_max - max, factor = exponential(shift * t.exponent);
    if (zs_sum != 0.0f)
      zs_moment = factor == 0.0f ? 0.0f : factor * fused_multiply_add(zs_sum, shift * t.inverse_t, zs_moment);
    zs_sum *= factor;
    zs_max = max;
  }
  TNT_DEVICE void raise_rs(float max, Scales t) {
    rs_sum *= exponential((rs_max - max) * t.exponent);
    rs_max = max;
  }

  // One entry of the set. These are few, so their maxima are exact: where p(S) is near 1, the moment's digits count.
  TNT_DEVICE void add_set(float z, float r, bool pair, Scales t) {
    if (z > zs_max) raise_zs(z, t);
    const float centred = z - zs_max, weight = exponential(centred * t.exponent);
    zs_sum += weight;
    zs_moment += weight == 0.0f ? 0.0f : weight * (centred * t.inverse_t);
    if (!pair) return;
    if (r > rs_max) raise_rs(r, t);
    rs_sum += exponential((r - rs_max) * t.exponent);
  }

  // y of which a part kappa is left: it stays in the target.
  TNT_DEVICE void add_partial(float z, float r, float kappa, float log_kappa, Scales t) {
    label_z = z;
    label_r = r;
    kept += 1.0f;
    if (too_low(z, r, true, t)) raise(z, r, true, t);
    const float weight = exponential((z - z_max) * t.exponent);
    z_sum += weight;
    if (weight != 0.0f) {
      z_moment = fused_multiply_add(weight, (z - z_max) * t.inverse_t, z_moment);
      const Difference<float> difference(z_max, r_max);
      kl_moment = fused_multiply_add(weight, difference(z, r) * t.inverse_t - log_kappa, kl_moment);
    }
    r_sum = fused_multiply_add(kappa, exponential((r - r_max) * t.exponent), r_sum);
  }

  // Over the lanes of a warp, the same on all of them. The order is fixed: the result has the same bits every time.
  TNT_DEVICE void merge_warp(bool pair, bool set, Scales t) {
    raise(max_of_warp(z_max), pair ? max_of_warp(r_max) : r_max, pair, t);
    if (pair) r_sum = sum_of_warp(r_sum);
    z_sum = sum_of_warp(z_sum);
    z_moment = sum_of_warp(z_moment);
    kept = sum_of_warp(kept);
    total = sum_of_warp(total);
    if (pair) kl_moment = sum_of_warp(kl_moment);
    if (!set) return;
    raise_zs(max_of_warp(zs_max), t);
    zs_sum = sum_of_warp(zs_sum);
    zs_moment = sum_of_warp(zs_moment);
    if (!pair) return;
    raise_rs(max_of_warp(rs_max), t);
    rs_sum = sum_of_warp(rs_sum);
    label_z = sum_of_warp(label_z);
    label_r = sum_of_warp(label_r);
  }

  // The moment that is kept here is that of a Difference<float>.
  TNT_DEVICE float moment_excess() const { return z_sum * float(excess_of_difference(z_max, r_max)); }

  // As statistics.h packs RowStatistics: number by number what is kept here.
  TNT_DEVICE void pack(float* to) const {
    Sums packed = *this;
    packed.kl_moment -= moment_excess();
    const float* const values = reinterpret_cast<const float*>(&packed);
#pragma unroll
    for (int i = 0; i < ROW_STATISTICS; ++i) to[i] = values[i];
  }
  // Of a slice without entries a maximum says nothing.
  TNT_DEVICE void unpack(const float* from) {
    float* const values = reinterpret_cast<float*>(this);
#pragma unroll
    for (int i = 0; i < ROW_STATISTICS; ++i) values[i] = from[i];
    kl_moment += moment_excess();
    if (z_sum == 0.0f) z_max = LOWEST;
    if (r_sum == 0.0f) r_max = LOWEST;
    if (zs_sum == 0.0f) zs_max = LOWEST;
    if (rs_sum == 0.0f) rs_max = LOWEST;
  }

  TNT_DEVICE RowStatistics statistics() const {
    RowStatistics s;
    s.policy = {z_max, z_sum, z_moment};
    s.reference = {r_max, r_sum, 0};
    s.policy_set = {zs_max, zs_sum, zs_moment};
    s.reference_set = {rs_max, rs_sum, 0};
    s.kl_moment = kl_moment - moment_excess();
    s.policy_total = total;
    s.label_policy = label_z;
    s.label_reference = label_r;
    return s;
  }
};
constexpr int SUMS = sizeof(Sums) / sizeof(float);
static_assert(SUMS == ROW_STATISTICS, "Sums are what statistics.h packs");

// -------------------------------------------------------------------------------------------------- element loops

// What a row's element loops take: its RowCoefficients as float, with all that is the same for every entry folded in.
struct LoopConstants {
  Scales t;
  Difference<float> difference;  // of kept entries
  // What a KL's loop takes for removed entries: logits that vanish next to the maxima, whose difference is 0, nearly,
  // unless these are huge.
  float z_removed, r_removed;
  float p_max, p_inverse, p_log_sum, q_max, q_inverse, offset, kl_centre, kept_max, kept_inverse, weight, bias;
  float set_value, set_offset, set_centre;
  float eps, smoothing_norm, log_smoothing_norm, loss;
  float least;  // NL: tokens whose log-weight is below this are at rest
  float scale;  // factor on the gradient

  TNT_DEVICE void fill(const RowCoefficients& c, const RowScalars& row, double factor) {
    t = {exponent_scale<float>(row.inverse_temperature), float(row.inverse_temperature)};
    difference = Difference<float>(float(c.kept_max), float(c.reference_max));
    const float far = fmaxf(256.0f / t.exponent, (fabsf(float(c.kept_max)) + fabsf(float(c.reference_max))) * 0x1p-18f);
    z_removed = float(c.kept_max) - far;
    r_removed = float(c.reference_max) - far;
    p_max = float(c.policy_max);
    p_inverse = float(c.policy_inverse);
    p_log_sum = float(c.policy_log_sum);
    q_max = float(c.reference_max);
    q_inverse = float(c.reference_inverse);
    offset = float(c.offset);
    kl_centre = float(c.kl_centre);
    kept_max = float(c.kept_max);
    kept_inverse = float(c.kept_inverse);
    weight = float(c.weight * factor);
    bias = float(c.bias * factor);
    set_value = float(c.set_value);
    set_offset = float(c.set_offset);
    set_centre = float(c.set_centre);
    eps = float(row.eps);
    smoothing_norm = float(1 / (1 + double(row.vocab) * row.eps));
    log_smoothing_norm = float(-log1p(double(row.vocab) * row.eps));
    loss = float(c.loss);
    least = float(row.nl_floor + c.policy_log_sum);
    scale = float(factor);
  }
};

// A set element of a second pass; `loss` receives its term.
TNT_DEVICE float set_element(const LoopConstants& c, int row_loss, float z, float& loss) {
  const float log_weight = (z - c.p_max) * c.t.inverse_t;
  const float p = exponential((z - c.p_max) * c.t.exponent) * c.p_inverse;
  if (row_loss == LOG_LIKELIHOOD) return c.set_value * c.scale;
  if (row_loss == NEGATIVE_LIKELIHOOD) return ((log_weight >= c.least ? 1.0f : 0.0f) - c.set_value * p) * c.scale;
  if (row_loss == REVERSE_KL) {
    const Element<float> e = reverse_kl_element(p, c.set_value, log_weight + c.set_offset, log_weight - c.set_centre);
    loss += e.loss;
    return e.gradient * c.scale;
  }
  return p * c.scale;  // UL and the forward KL
}

// An entry of a uniformly smoothed KL, whose target is (q* + eps) / (1 + V eps) everywhere.
TNT_DEVICE Element<float> uniform_element(const LoopConstants& c, bool forward, float z, float r, float kappa) {
  const float centred = z - c.p_max;
  const float p = exponential(centred * c.t.exponent) * c.p_inverse;
  const float smoothed = fused_multiply_add(exponential((r - c.q_max) * c.t.exponent) * c.q_inverse, kappa, c.eps);
  const float q = smoothed * c.smoothing_norm;
  const float d = centred * c.t.inverse_t - c.p_log_sum - (logarithm(smoothed) + c.log_smoothing_norm);
  return forward ? forward_kl_element(p, q, d) : reverse_kl_element(p, q, d, d - c.loss);
}

// Any entry of a KL: infinite logits too, and y of which a part kappa is left.
TNT_DEVICE Element<float> kl_element(const LoopConstants& c, bool forward, float z, float r, float kappa,
                                     float log_kappa) {
  const float p = exponential((z - c.kept_max) * c.t.exponent) * c.kept_inverse;
  const float q = exponential((r - c.q_max) * c.t.exponent) * c.q_inverse * kappa;
  const float x = c.difference(z, r) * c.t.inverse_t - log_kappa, d = x + c.offset;
  return forward ? forward_kl_element(p, q, d) : reverse_kl_element(p, q, d, x - c.kl_centre);
}

}  // namespace TNT_ISA
}  // namespace tnt
