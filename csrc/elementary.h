// Elementary functions, for host and device: what a row's mathematics is made of, in float and in double. As math.h,
// in a folder on the include path, this file would be found in place of the C library's.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define TNT_FN __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define TNT_FN inline __attribute__((always_inline))
#else
#define TNT_FN inline
#endif

// Every instruction set gets a namespace of its own: the same inline functions, compiled with other flags, would
// otherwise be merged by the linker, and an AVX-512 body could run on a machine without it.
#ifndef TNT_ISA
#define TNT_ISA host
#endif

namespace tnt {
inline namespace TNT_ISA {

// Contraction is off in the build and every fused multiply-add is written out, so that the two log-sum-exps of a row
// come from the same instructions and p = q gives exactly 0. Without FMA hardware, std::fma would be a library call.
TNT_FN float fused_multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
TNT_FN double fused_multiply_add(double a, double b, double c) { return a * b + c; }

// Whether loops over many entries fuse multiply-adds, with vectors of Real on a CPU.
#if defined(__CUDACC__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
template <class Real>
constexpr bool FUSED = sizeof(Real) == sizeof(float);
#else
template <class Real>
constexpr bool FUSED = false;
#endif

template <class To, class From>
TNT_FN To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To result;
  memcpy(&result, &value, sizeof result);
  return result;
}

constexpr double LOG2_E = 1.4426950408889634074;
constexpr double LN_2 = 0.69314718055994530942;

// 1 / log of the base of exponential() and of the loops' powers: 2 for float, e for double.
template <class Real>
constexpr double UNIT = sizeof(Real) == sizeof(float) ? LOG2_E : 1;

// What (x - max) is multiplied by before exponential(): log2(e)/T where exponential is 2^x, 1/T where it is e^x.
template <class Real>
TNT_FN Real exponent_scale(double inverse_temperature);
template <>
TNT_FN float exponent_scale<float>(double inverse_temperature) {
  return static_cast<float>(LOG2_E * inverse_temperature);
}
template <>
TNT_FN double exponent_scale<double>(double inverse_temperature) {
  return inverse_temperature;
}

// Adding this rounds to the nearest integer k, and leaves k + 127, the exponent bits of 2^k, in the low bits of the
// sum.
constexpr float ROUNDER = 12582912.0f + 127.0f;
TNT_FN float power_of_two(float shifted) { return bits_as<float>(bits_as<uint32_t>(shifted) << 23); }  // -127: 0.0f

// 2^x for x < 128, 0 below -127 (-inf gives exactly 0), NaN for NaN. Relative error 1.6e-7, 0 at 0: x is split at the
// nearest integer, 2^fraction is a minimax polynomial.
TNT_FN float exponential(float x) {
  x = -127.0f > x ? -127.0f : x;  // in this order: NaN stays
  const float shifted = x + ROUNDER;
  const float f = x - (shifted - ROUNDER);
  float y = 0x1.5bba14p-10f;
  y = fused_multiply_add(y, f, 0x1.3cea88p-7f);
  y = fused_multiply_add(y, f, 0x1.c6b752p-5f);
  y = fused_multiply_add(y, f, 0x1.ebf9bcp-3f);
  y = fused_multiply_add(y, f, 0x1.62e42ap-1f);
  y = fused_multiply_add(y, f, 1.0f);
  return y * power_of_two(shifted);
}
TNT_FN double exponential(double x) { return ::exp(x); }

// log x for x >= 0, -inf for 0. Relative error 2e-7 (near 1: of x - 1).
TNT_FN float logarithm(float x) {
#if defined(__CUDA_ARCH__)
  return logf(x);
#else
  const bool tiny = x < 0x1p-126f;
  const uint32_t bits = bits_as<uint32_t>(tiny ? x * 0x1p25f : x);
  const uint32_t centred = bits - 0x3f3504f3u;  // the mantissa then lies in [sqrt(1/2), sqrt(2))
  const float exponent = static_cast<float>(static_cast<int32_t>(centred) >> 23) - (tiny ? 25.0f : 0.0f);
  const float f = bits_as<float>((centred & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  float y = -0x1.3e9698p-4f;
  y = fused_multiply_add(y, f, 0x1.05ae04p-3f);
  y = fused_multiply_add(y, f, -0x1.0c9354p-3f);
  y = fused_multiply_add(y, f, 0x1.22bcb0p-3f);
  y = fused_multiply_add(y, f, -0x1.5485dap-3f);
  y = fused_multiply_add(y, f, 0x1.99a22ep-3f);
  y = fused_multiply_add(y, f, -0x1.00020ap-2f);
  y = fused_multiply_add(y, f, 0x1.555550p-2f);
  y = fused_multiply_add(y, f, -0x1.fffffep-2f);
  y = fused_multiply_add(y * f, f, f);
  y = fused_multiply_add(exponent, static_cast<float>(LN_2), y);
  return x > 0.0f ? (x < INFINITY ? y : x) : (x == 0.0f ? -INFINITY : NAN);
#endif
}
TNT_FN double logarithm(double x) { return ::log(x); }

// e^d - 1 and φ(d) = e^d - 1 - d for |d| < BOUNDED, both without cancellation near 0. Relative error 5e-7 (float;
// 7e-7 without a fused multiply-add), a few ulp (double); beyond the bound anything but a trap.
constexpr int BOUNDED = 16;
template <class Real>
struct Expm1 {
  Real value, phi;
};
TNT_FN Expm1<float> expm1_phi(float d) {
  const float shifted = fused_multiply_add(d, static_cast<float>(LOG2_E), ROUNDER);
  const float k = shifted - ROUNDER;
  const float f = fused_multiply_add(k, static_cast<float>(-LN_2), d), f2 = f * f;  // |f| < 0.35
  const float y01 = fused_multiply_add(f, 0x1.555556p-3f, 0.5f);                    // φ(f)/f²
  const float y23 = fused_multiply_add(f, 0x1.11114cp-7f, 0x1.5554eap-5f);
  const float y45 = fused_multiply_add(f, 0x1.a072c0p-13f, 0x1.6d42cap-10f);
  const float phi = fused_multiply_add(fused_multiply_add(y45, f2, y23), f2, y01) * f2;
  const float power = power_of_two(shifted);
  Expm1<float> result;
  result.value = fused_multiply_add(power, f + phi, power - 1.0f);
  result.phi = k == 0.0f ? phi : result.value - d;
  return result;
}
TNT_FN Expm1<double> expm1_phi(double d) {
  double y = 1.0;  // φ(d) = d²/2 (1 + d/3 (1 + d/4 (...)))
  for (int k = 19; k >= 3; --k) y = 1.0 + y * d / k;
  const double value = ::expm1(d);
  return {value, d < 1 && d > -1 ? 0.5 * y * d * d : value - d};
}

// log(1 + e^x), right at both ends.
TNT_FN double softplus(double x) {
  return x > 0 ? x + log1p(::exp(-x)) : log1p(::exp(x));  // +inf -> +inf, -inf -> 0, NaN -> NaN
}

}  // namespace TNT_ISA
}  // namespace tnt
