// The types that logits and gradients are stored in on a CPU, and how one number of each is read and written. Those of
// CUDA stand in cuda/math.cuh: they are read and written 16 bytes at a time.
#pragma once

#include <cstdint>

#include "elementary.h"

namespace tnt {
inline namespace TNT_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

TNT_FN float load(float x) { return x; }
TNT_FN double load(double x) { return x; }
TNT_FN float load(BFloat16 x) { return bits_as<float>(static_cast<uint32_t>(x.bits) << 16); }
TNT_FN float load(Float16 x) {  // in integers, because compilers vectorise that for every instruction set
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const float scaled = bits_as<float>(magnitude) * 0x1p112f;  // exact, subnormals included
  const uint32_t bits = magnitude >= 0x0f800000u ? (magnitude | 0x7f800000u) : bits_as<uint32_t>(scaled);
  return bits_as<float>(bits | (x.bits & 0x8000u) << 16);
}

TNT_FN void store(float* to, float x) { *to = x; }
TNT_FN void store(double* to, double x) { *to = x; }
TNT_FN void store(BFloat16* to, float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
TNT_FN void store(Float16* to, float x) {
  const uint32_t bits = bits_as<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  to->bits = static_cast<uint16_t>(half | (bits >> 16 & 0x8000u));
}

template <class Logit>
using RealOf = decltype(load(Logit{}));

}  // namespace TNT_ISA
}  // namespace tnt
