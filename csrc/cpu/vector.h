// Vectors of the instruction set that a file is compiled for: 16, 8 or 4 floats, and one double. Loops are written
// once, over Vector<Real>; float arithmetic is the compiler's vector extension, and intrinsics stand where it has no
// operator. double is a vector of one lane: its logits are for checks, not for speed.
#pragma once

#include "cpu/storage.h"
#include "elementary.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace tnt {
inline namespace TNT_ISA {

#if defined(__AVX512F__)
constexpr int FLOATS = 16;
#elif defined(__AVX2__)
constexpr int FLOATS = 8;
#else
constexpr int FLOATS = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * FLOATS)));
typedef int32_t Ints __attribute__((vector_size(4 * FLOATS)));
typedef uint32_t Words __attribute__((vector_size(4 * FLOATS)));
// The same where memory may begin at any element.
typedef float LooseFloats __attribute__((vector_size(4 * FLOATS), aligned(4), may_alias));
typedef uint32_t LooseWords __attribute__((vector_size(4 * FLOATS), aligned(2), may_alias));

template <class Real>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = Floats;
};
template <>
struct VectorOf<double> {
  using type = double;
};
template <class Real>
using Vector = typename VectorOf<Real>::type;
template <class Real>
constexpr int LANES = int(sizeof(Vector<Real>) / sizeof(Real));

TNT_FN Floats same(float x) { return Floats{} + x; }
TNT_FN Floats same(Floats x) { return x; }
TNT_FN double same(double x) { return x; }

// ------------------------------------------------------------------------------------------------------------- masks
// A lane of a Mask is on or off. Comparisons with NaN are false.

#if defined(__AVX512F__)
using Mask = __mmask16;
TNT_FN Mask less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
TNT_FN Mask equal(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
TNT_FN bool is_everywhere(Mask m) { return m == 0xffff; }
TNT_FN Floats select(Mask m, Floats a, Floats b) { return _mm512_mask_mov_ps(b, m, a); }
TNT_FN Mask lanes(uint32_t bits) { return Mask(bits); }  // lane i: bit i
#else
using Mask = Ints;
TNT_FN Mask less(Floats a, Floats b) { return a < b; }
TNT_FN Mask equal(Floats a, Floats b) { return a == b; }
#if defined(__AVX2__)
TNT_FN bool is_everywhere(Mask m) { return _mm256_movemask_ps(Floats(m)) == 0xff; }
TNT_FN Floats select(Mask m, Floats a, Floats b) { return _mm256_blendv_ps(b, a, Floats(m)); }
TNT_FN Mask lanes(uint32_t bits) {
  const Ints each = {1, 2, 4, 8, 16, 32, 64, 128};
  return ((Ints{} + int32_t(bits)) & each) != 0;
}
#else
TNT_FN bool is_everywhere(Mask m) { return (m[0] & m[1] & m[2] & m[3]) != 0; }
TNT_FN Floats select(Mask m, Floats a, Floats b) { return m ? a : b; }
TNT_FN Mask lanes(uint32_t bits) {
  const Ints each = {1, 2, 4, 8};
  return ((Ints{} + int32_t(bits)) & each) != 0;
}
#endif
#endif
TNT_FN bool less(double a, double b) { return a < b; }
TNT_FN bool equal(double a, double b) { return a == b; }
TNT_FN bool is_everywhere(bool m) { return m; }
TNT_FN double select(bool m, double a, double b) { return m ? a : b; }

// -------------------------------------------------------------------------------------------------------- arithmetic

#if defined(__AVX512F__)
TNT_FN Floats fused_multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__FMA__)
TNT_FN Floats fused_multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
#else
TNT_FN Floats fused_multiply_add(Floats a, Floats b, Floats c) {
#if defined(__ARM_FEATURE_FMA)
  for (int i = 0; i < FLOATS; ++i) a[i] = fmaf(a[i], b[i], c[i]);
  return a;
#else
  return a * b + c;
#endif
}
#endif

// The second operand where one of them is NaN, as x86 has it.
#if defined(__AVX512F__)
// With a mask, as GCC 12 takes the operand that the plain intrinsics leave undefined for an uninitialised one.
constexpr Mask EVERYWHERE = 0xffff;
TNT_FN Floats greater_of(Floats a, Floats b) { return _mm512_maskz_max_ps(EVERYWHERE, a, b); }
#elif defined(__AVX2__)
TNT_FN Floats greater_of(Floats a, Floats b) { return _mm256_max_ps(a, b); }
TNT_FN Floats lesser_of(Floats a, Floats b) { return _mm256_min_ps(a, b); }
#elif defined(__SSE2__)
TNT_FN Floats greater_of(Floats a, Floats b) { return _mm_max_ps(a, b); }
TNT_FN Floats lesser_of(Floats a, Floats b) { return _mm_min_ps(a, b); }
#else
TNT_FN Floats greater_of(Floats a, Floats b) { return a > b ? a : b; }
TNT_FN Floats lesser_of(Floats a, Floats b) { return a < b ? a : b; }
#endif
TNT_FN double greater_of(double a, double b) { return a > b ? a : b; }

TNT_FN Floats absolute(Floats x) { return Floats(Ints(x) & 0x7fffffff); }
TNT_FN double absolute(double x) { return ::fabs(x); }

// The greater of |a| and |b|; nothing is said of NaN.
#if defined(__AVX512F__)
TNT_FN Floats greater_size(Floats a, Floats b) { return _mm512_maskz_range_ps(EVERYWHERE, a, b, 3 | 8); }
#else
TNT_FN Floats greater_size(Floats a, Floats b) { return greater_of(absolute(a), absolute(b)); }
#endif
TNT_FN double greater_size(double a, double b) { return greater_of(absolute(a), absolute(b)); }

// The polynomial of given coefficients, that of the highest power first.
template <class Number, int N>
TNT_FN Floats polynomial(const Number (&coefficients)[N], Floats x) {
  Floats p = same(coefficients[0]);
#pragma GCC unroll 16
  for (int k = 1; k < N; ++k) p = fused_multiply_add(p, x, same(coefficients[k]));
  return p;
}

// 2^f of the fraction that power() leaves: relative error 1.6e-7, and 2.7e-6.
#if defined(__AVX512F__)
constexpr float POWER[] = {0x1.ec320ap-10f, 0x1.26900ep-7f, 0x1.c95446p-5f,
                           0x1.ebd5a8p-3f,  0x1.62e4f6p-1f, 0x1.fffffep-1f};
constexpr float SHORT_POWER[] = {0x1.bb7cd4p-7f, 0x1.aa13f0p-5f, 0x1.ee798ap-3f, 0x1.62d166p-1f, 0x1.00002cp+0f};
#else
constexpr float POWER[] = {0x1.5bba14p-10f, 0x1.3cea88p-7f, 0x1.c6b752p-5f, 0x1.ebf9bcp-3f, 0x1.62e42ap-1f, 1.0f};
constexpr float SHORT_POWER[] = {0x1.3997d6p-7f, 0x1.ca1440p-5f, 0x1.ec06dap-3f, 0x1.62e0dcp-1f, 0x1.ffffe8p-1f};
#endif

// 2^x: 0 below -150, infinity from 129, NaN for NaN. It is multiplied by what the coefficients are.
template <class Number, int N>
TNT_FN Floats power(Floats x, const Number (&coefficients)[N]) {
#if defined(__AVX512F__)
  const Floats f = _mm512_maskz_reduce_ps(EVERYWHERE, x, _MM_FROUND_TO_NEG_INF);  // x - floor(x)
  return _mm512_maskz_scalef_ps(EVERYWHERE, polynomial(coefficients, f), x);      // y 2^floor(x)
#else
  x = lesser_of(same(128.0f), greater_of(same(-127.0f), x));
  const Floats shifted = x + ROUNDER, f = x - (shifted - ROUNDER);
  return polynomial(coefficients, f) * Floats(Words(shifted) << 23);
#endif
}
TNT_FN Floats power(Floats x) { return power(x, POWER); }
TNT_FN double power(double x) { return exponential(x); }

// power times a weight, which is in its coefficients. SHORT: for logits of 16 bits, to whose gradients an error of
// 2.7e-6 is nothing.
template <bool SHORT>
struct WeightedPower {
  static constexpr int N = SHORT ? 5 : 6;
  Floats coefficients[N];
  explicit WeightedPower(float weight) {
    for (int k = 0; k < N; ++k) coefficients[k] = same(weight * (SHORT ? SHORT_POWER : POWER)[k]);
  }
  TNT_FN Floats operator()(Floats x) const { return power(x, coefficients); }
};
struct WeightedExponential {
  double weight;
  TNT_FN double operator()(double x) const { return weight * power(x); }
};
template <class Logit>
using Weighted =
    std::conditional_t<std::is_same_v<Logit, double>, WeightedExponential, WeightedPower<sizeof(Logit) == 2>>;

// φ(y)/y² = (e^y - 1 - y)/y² for |y| <= 1, and for |y| <= 4; relative error of the polynomials 1.7e-7.
constexpr float PHI_NEAR[] = {2.4891523e-05f, 0.00020324344f, 0.0013892363f, 0.0083309449f,
                              0.041666478f,   0.16666695f,    0.5f};
constexpr float PHI_WIDE[] = {0x1.78ecp-33f,  0x1.6dc6cp-29f,  0x1.b708f8p-26f, 0x1.1d78bap-22f,
                              0x1.702bbp-19f, 0x1.a14f4ap-16f, 0x1.a04f3ep-13f, 0x1.6c076ap-10f,
                              0x1.110ebp-7f,  0x1.5555d8p-5f,  0x1.555572p-3f,  0x1.fffffep-2f};
template <bool WIDE>
TNT_FN Floats phi_ratio(Floats y) {
  if constexpr (WIDE)
    return polynomial(PHI_WIDE, y);
  else
    return polynomial(PHI_NEAR, y);
}
template <bool WIDE>
TNT_FN double phi_ratio(double y) {
  return ::fabs(y) < 1e-100 ? 0.5 : expm1_phi(y).phi / (y * y);
}
TNT_FN Floats phi_near(Floats y) { return phi_ratio<false>(y) * (y * y); }
TNT_FN double phi_near(double y) { return expm1_phi(y).phi; }

// 2 sinh(y/2) / y of y's square, for |y| <= 1.25, and for |y| <= 12; relative error of the polynomials below 6e-8.
constexpr float SINH_NEAR[] = {0x1.a49f14p-19f, 0x1.110cacp-11f, 0x1.55555ap-5f, 1.0f};
constexpr float SINH_WIDE[] = {0x1.58369ap-54f, 0x1.2992c2p-45f, 0x1.ba1e2ep-36f, 0x1.708f2p-27f,
                               0x1.a040b4p-19f, 0x1.110fp-11f,   0x1.55557ep-5f,  0x1.fffffep-1f};
template <bool WIDE>
TNT_FN Floats sinh_ratio(Floats square) {
  if constexpr (WIDE)
    return polynomial(SINH_WIDE, square);
  else
    return polynomial(SINH_NEAR, square);
}
template <bool WIDE>
TNT_FN double sinh_ratio(double square) {
  if (WIDE && square >= 1) {
    const double y = ::sqrt(square);
    return 2 * ::sinh(y / 2) / y;
  }
  double ratio = 1.0;  // Σ square^k / (4^k (2k + 1)!)
  for (int k = 8; k >= 1; --k) ratio = 1.0 + ratio * square / (4.0 * (2 * k) * (2 * k + 1));
  return ratio;
}

// A vector's two halves as one by `combine`, and so on down to 16 bytes.
template <class Number, int BYTES>
struct VectorOfBytes;
template <>
struct VectorOfBytes<float, 32> {
  typedef float type __attribute__((vector_size(32)));
};
template <>
struct VectorOfBytes<float, 16> {
  typedef float type __attribute__((vector_size(16)));
};
template <>
struct VectorOfBytes<double, 32> {
  typedef double type __attribute__((vector_size(32)));
};
template <>
struct VectorOfBytes<double, 16> {
  typedef double type __attribute__((vector_size(16)));
};
template <class Number, class V, class Combine>
TNT_FN auto folded(V x, Combine combine) {
  if constexpr (sizeof(V) == 16) {
    return x;
  } else {
    typename VectorOfBytes<Number, sizeof(V) / 2>::type half[2];
    memcpy(half, &x, sizeof half);
    return folded<Number>(combine(half[0], half[1]), combine);
  }
}

// Sums of many floats: a lane takes a few of them, and is then added to one of double.
typedef float HalfFloats __attribute__((vector_size(2 * FLOATS)));
typedef double HalfDoubles __attribute__((vector_size(4 * FLOATS)));
struct WideFloats {
  HalfDoubles low{}, high{};
  TNT_FN void add(Floats x) {
    HalfFloats half[2];
    memcpy(half, &x, sizeof half);
    low += __builtin_convertvector(half[0], HalfDoubles);
    high += __builtin_convertvector(half[1], HalfDoubles);
  }
  TNT_FN double sum() const {
    const auto two = folded<double>(low + high, [](auto a, auto b) { return a + b; });
    return two[0] + two[1];
  }
};
struct WideDouble {
  double value = 0;
  TNT_FN void add(double x) { value += x; }
  TNT_FN double sum() const { return value; }
};
TNT_FN WideFloats wide(Floats) { return {}; }
TNT_FN WideDouble wide(double) { return {}; }
TNT_FN double sum_of(Floats x) {
  WideFloats sum;
  sum.add(x);
  return sum.sum();
}
TNT_FN double sum_of(double x) { return x; }
TNT_FN float greatest(Floats x) {
  const auto greater = [](auto a, auto b) { return a > b ? a : b; };
  const auto four = folded<float>(x, greater);
  return greater(greater(four[0], four[2]), greater(four[1], four[3]));
}
TNT_FN double greatest(double x) { return x; }

// ------------------------------------------------------------------------------------------------- loading and storing
// Two vectors of entries at a time. Those of bfloat16 are the even and the odd ones, which takes one instruction each.

template <class Real>
struct Pair {
  Vector<Real> a, b;
};

TNT_FN Floats load_vector(const float* from) { return Floats(*reinterpret_cast<const LooseFloats*>(from)); }
TNT_FN void store_vector(float* to, Floats x) { *reinterpret_cast<LooseFloats*>(to) = LooseFloats(x); }

TNT_FN double load_vector(const double* from) { return *from; }
TNT_FN void store_vector(double* to, double x) { *to = x; }

TNT_FN Pair<float> load_pair(const float* from) { return {load_vector(from), load_vector(from + FLOATS)}; }
TNT_FN Pair<double> load_pair(const double* from) { return {from[0], from[1]}; }
TNT_FN void store_pair(float* to, Pair<float> x) {
  store_vector(to, x.a);
  store_vector(to + FLOATS, x.b);
}
TNT_FN void store_pair(double* to, Pair<double> x) {
  to[0] = x.a;
  to[1] = x.b;
}

TNT_FN Pair<float> load_pair(const BFloat16* from) {
  const Words x = Words(*reinterpret_cast<const LooseWords*>(from));
  return {Floats(x << 16), Floats(x & 0xffff0000u)};
}
// To the nearest, in the upper half of a word; a tie goes away from 0, which takes two instructions fewer than to the
// even one. Not for NaN.
TNT_FN Words rounded_to_bfloat16(Floats x) { return Words(x) + 0x8000u; }
TNT_FN void store_even_and_odd(BFloat16* to, Pair<float> x) {  // as load_pair has them
  const Words even = rounded_to_bfloat16(x.a) >> 16, odd = rounded_to_bfloat16(x.b);
#if defined(__AVX512BW__)
  _mm512_storeu_si512(to, _mm512_mask_blend_epi16(0xaaaaaaaau, __m512i(even), __m512i(odd)));
#else
  *reinterpret_cast<LooseWords*>(to) = LooseWords(even | (odd & 0xffff0000u));
#endif
}
// One after the other; a tie goes to the even one, as where PyTorch rounds the float32 gradient.
TNT_FN void store_pair(BFloat16* to, Pair<float> x) {
  const Words a = Words(x.a) + 0x7fffu + (Words(x.a) >> 16 & 1u), b = Words(x.b) + 0x7fffu + (Words(x.b) >> 16 & 1u);
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtepi32_epi16(EVERYWHERE, __m512i(a >> 16)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + FLOATS),
                      _mm512_maskz_cvtepi32_epi16(EVERYWHERE, __m512i(b >> 16)));
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packs_epi32(__m256i(Ints(a) >> 16), __m256i(Ints(b) >> 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(packed, 0xd8));
#elif defined(__SSE2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_packs_epi32(__m128i(Ints(a) >> 16), __m128i(Ints(b) >> 16)));
#else
  for (int i = 0; i < FLOATS; ++i) {
    to[i].bits = uint16_t(a[i] >> 16);
    to[i + FLOATS].bits = uint16_t(b[i] >> 16);
  }
#endif
}

#if defined(__AVX512F__)
TNT_FN Floats load_vector(const Float16* from) {
  return _mm512_maskz_cvtph_ps(EVERYWHERE, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
TNT_FN void store_vector(Float16* to, Floats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_maskz_cvtps_ph(EVERYWHERE, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
TNT_FN Floats load_vector(const Float16* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
TNT_FN void store_vector(Float16* to, Floats x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
TNT_FN Floats load_vector(const Float16* from) {
  Floats x;
  for (int i = 0; i < FLOATS; ++i) x[i] = load(from[i]);
  return x;
}
TNT_FN void store_vector(Float16* to, Floats x) {
  for (int i = 0; i < FLOATS; ++i) store(to + i, x[i]);
}
#endif
TNT_FN Pair<float> load_pair(const Float16* from) { return {load_vector(from), load_vector(from + FLOATS)}; }
TNT_FN void store_pair(Float16* to, Pair<float> x) {
  store_vector(to, x.a);
  store_vector(to + FLOATS, x.b);
}

// ------------------------------------------------------------------------------------------------- lanes apart
// Of a pair's entries, those whose bit is set. `bits`: bit i is entry i's.

template <class Stored>
struct PairMasks {
  Mask a, b;
  TNT_FN explicit PairMasks(uint32_t bits) : a(lanes(bits)), b(lanes(bits >> FLOATS)) {}
};
template <>
struct PairMasks<BFloat16> {
  Mask a, b;
  TNT_FN explicit PairMasks(uint32_t bits) : a(lanes(every_other(bits))), b(lanes(every_other(bits >> 1))) {}
  TNT_FN static uint32_t every_other(uint32_t bits) {
#if defined(__AVX512F__)  // older processors may take a hundred cycles for it
    return _pext_u32(bits, 0x55555555u);
#else
    bits &= 0x55555555u;
    bits = (bits | bits >> 1) & 0x33333333u;
    bits = (bits | bits >> 2) & 0x0f0f0f0fu;
    bits = (bits | bits >> 4) & 0x00ff00ffu;
    return (bits | bits >> 8) & 0xffffu;
#endif
  }
};
template <>
struct PairMasks<double> {
  bool a, b;
  TNT_FN explicit PairMasks(uint32_t bits) : a(bits & 1), b(bits & 2) {}
};

}  // namespace TNT_ISA
}  // namespace tnt
