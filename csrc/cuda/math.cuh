// What all kernels for rows have in common: the types in which logits are stored, what is written of a row, numbers of
// a warp.
#pragma once

#include <cstring>

#include "cuda/device.cuh"
#include "elementary.h"
#include "row_rules.h"

namespace tnt {
inline namespace TNT_ISA {

using device::Vector;

#define TNT_DEVICE __device__ __forceinline__

// --------------------------------------------------------------------------------------------------- stored types

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// nothing(): stands for logits that are not there, in both rows. It weighs nothing, and the difference of two is small.
template <class Logit>
struct Stored;

template <>
struct Stored<float> {
  static constexpr DType DTYPE = DType::FLOAT32;
  static constexpr int GROUP = 4;  // in 16 bytes
  static TNT_DEVICE float nothing() { return -1e30f; }
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
  static TNT_DEVICE BFloat16 nothing() { return {0xf14a}; }  // -1e30
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
  static TNT_DEVICE Float16 nothing() { return {0xfc00}; }  // -inf, as its lowest number may weigh something
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

// Of a call that asks for them. What is not known of a row is NaN.
template <class Diagnosis>
TNT_DEVICE void write_diagnostics(const RowCall& p, int64_t row, float loss, float kl, const Diagnosis& d) {
  const float values[ROW_DIAGNOSTICS] = {loss, kl, float(d.negative_mass), float(d.ref_negative_mass),
                                         float(d.entropy)};
#pragma unroll
  for (int i = 0; i < ROW_DIAGNOSTICS; ++i) static_cast<float*>(p.diagnostics)[i * p.rows + row] = values[i];
}

// For a gradient that waits: what it takes but for its factor, and that.
template <class Plan>
TNT_DEVICE void write_plan(const Plan& plan, float factor, float* coefficients) {
  static_assert(sizeof plan <= (ROW_COEFFICIENTS - 1) * sizeof(float));
  memcpy(coefficients, &plan, sizeof plan);
  coefficients[ROW_COEFFICIENTS - 1] = factor;
}

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

}  // namespace TNT_ISA
}  // namespace tnt
