// The CPU kernel: rows over OpenMP threads, a row in tiles that stay in the L1 cache, SIMD by the compiler. This file
// is compiled once per instruction set (TNT_ISA names its namespace); bind.cpp picks one at run time.
//
// KL rows of a whole vocabulary, but for uniform smoothing, are kl_row.h's. All others are computed here, and those of
// shards. Such a row takes two passes. The first reads z and r from memory, tile by tile: maximum, then sums of
// exponentials. The second finds the row in the cache and yields the loss and the gradient. Removed tokens would break
// both loops, so they are patched out: a tile that holds some is copied, they become -inf there (which adds exactly 0
// to every sum and has gradient 0), and their logits go to short arrays that the same loops process as a group of their
// own.
#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "cpu/kl_row.h"
#include "elementary.h"
#include "objectives.h"
#include "row_rules.h"
#include "statistics.h"

namespace tnt {
inline namespace TNT_ISA {
namespace {

constexpr int TILE = 1024;  // three float tiles fill 12 KiB of a 32 KiB L1 cache

// -------------------------------------------------------------------------------------------------- tile kernels
// Each runs over n <= TILE entries. Float sums stay within a tile; across tiles they are added in double. They are
// functions of their own, not inlined: inside the large row functions the vectoriser gives up on some of them.
//
// Entries to leave out have -inf in `mask`, which is 0 elsewhere. Added to their logits, it makes their exponentials 0,
// and leaves a NaN NaN. It costs a tenth of copying the tile to overwrite them. Without MASKED there is no mask.
//
// A tile's loss, and what else grows with the vocabulary, is summed in blocks, so that its rounding error is small
// where the compiler does not vectorise, too: one after the other, 1024 terms would lose 2e-6 of their sum, or more.
constexpr int64_t BLOCK = 128;

#if defined(__GNUC__)
#define TNT_TILE __attribute__((noinline))
#else
#define TNT_TILE
#endif

template <class Real>
constexpr Real LOWEST = std::numeric_limits<Real>::lowest();  // where a maximum starts

template <bool MASKED, class Real>
TNT_FN Real masked(const Real* x, const Real* mask, int64_t i) {
  return MASKED ? x[i] + mask[i] : x[i];
}

// Relative to `zero`.
template <class Logit, class Real>
TNT_TILE void load_tile(const Logit* from, Real* to, int64_t n, Real zero) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = load(from[i]) - zero;
}

template <class Logit, class Real>
TNT_TILE void store_tile(const Real* from, Logit* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) store(to + i, from[i]);
}

// Σ e^{(x-max)/T} relative to a maximum that the tile may exceed, and the tile's own maximum, which tells whether the
// sum is good: the further its largest entries are from the maximum that they are taken relative to, the more their
// exponents are rounded.
template <class Real>
struct TileSums {
  Real policy, reference, moment, policy_max, reference_max;
};

// Policy and reference in one loop and by the same instructions: equal inputs give equal sums.
template <bool MASKED, class Real>
TNT_TILE TileSums<Real> tile_pair_sums(const Real* z, const Real* r, const Real* mask, int64_t n, Real z_max,
                                       Real r_max, Real scale) {
  Real z_sum = 0, r_sum = 0, z_top = LOWEST<Real>, r_top = LOWEST<Real>;
#pragma omp simd reduction(+ : z_sum, r_sum) reduction(max : z_top, r_top)
  for (int64_t i = 0; i < n; ++i) {
    const Real z_i = masked<MASKED>(z, mask, i);
    const Real r_i = masked<MASKED>(r, mask, i);
    z_sum += exponential((z_i - z_max) * scale);
    r_sum += exponential((r_i - r_max) * scale);
    z_top = z_i > z_top ? z_i : z_top;
    r_top = r_i > r_top ? r_i : r_top;
  }
  return {z_sum, r_sum, 0, z_top, r_top};
}

// As tile_pair_sums, and T times the moment of the reverse KL: Σ e^{(z-mz)/T} x, x being `difference`.
template <bool MASKED, class Real>
TNT_TILE TileSums<Real> tile_pair_moment(const Real* z, const Real* r, const Real* mask, int64_t n, Real z_max,
                                         Real r_max, Real scale, Difference<Real> difference) {
  Real z_sum = 0, r_sum = 0, moment = 0, z_top = LOWEST<Real>, r_top = LOWEST<Real>;
#pragma omp simd reduction(+ : z_sum, r_sum, moment) reduction(max : z_top, r_top)
  for (int64_t i = 0; i < n; ++i) {
    const Real z_i = masked<MASKED>(z, mask, i);
    const Real r_i = masked<MASKED>(r, mask, i);
    const Real weight = exponential((z_i - z_max) * scale);
    z_sum += weight;
    r_sum += exponential((r_i - r_max) * scale);
    moment += weight == Real(0) ? Real(0) : weight * difference(z_i, r_i);
    z_top = z_i > z_top ? z_i : z_top;
    r_top = r_i > r_top ? r_i : r_top;
  }
  return {z_sum, r_sum, moment, z_top, r_top};
}

template <bool MASKED, class Real>
TNT_TILE TileSums<Real> tile_sum(const Real* x, const Real* mask, int64_t n, Real max, Real scale) {
  Real sum = 0, top = LOWEST<Real>;
#pragma omp simd reduction(+ : sum) reduction(max : top)
  for (int64_t i = 0; i < n; ++i) {
    const Real x_i = masked<MASKED>(x, mask, i);
    sum += exponential((x_i - max) * scale);
    top = x_i > top ? x_i : top;
  }
  return {sum, 0, 0, top, 0};
}

template <bool MASKED, class Real>
TNT_TILE double tile_moment(const Real* x, const Real* mask, int64_t n, Real max, Real scale, Real inverse_t) {
  Real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const Real x_i = masked<MASKED>(x, mask, i);
    const Real centred = x_i - max, weight = exponential(centred * scale);
    sum += weight == Real(0) ? Real(0) : weight * (centred * inverse_t);
  }
  return sum;
}

template <class Real>
TNT_TILE double tile_total(const Real* x, int64_t n, Real max, Real inverse_t) {
  double total = 0;
  for (int64_t at = 0; at < n; at += BLOCK) {
    const int64_t end = std::min(n, at + BLOCK);
    Real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = at; i < end; ++i) sum += (x[i] - max) * inverse_t;
    total += sum;
  }
  return total;
}

// What a row's tile loops take: its RowCoefficients as Real, with all that is the same for every entry folded in.
template <class Real>
struct LoopConstants {
  Real scale, inverse_t;  // of exponents; of differences
  // What tiles are loaded relative to, and `kept_max` and `q_max` are: not 0 where the two rows are shifted against
  // each other. Then x = z - r - centre is their Difference.
  Real z_ref = 0, r_ref = 0, centre = 0;
  Real p_max, p_inverse, p_log_sum, q_max, q_inverse, offset, kl_centre, kept_max, kept_inverse, weight, bias;
  Real eps, smoothing_norm, log_smoothing_norm, loss;
  Real row_scale;  // factor on the gradient

  LoopConstants(const RowCoefficients& c, const RowScalars& row, double row_scale_)
      : scale(exponent_scale<Real>(row.inverse_temperature)),
        inverse_t(Real(row.inverse_temperature)),
        p_max(Real(c.policy_max)),
        p_inverse(Real(c.policy_inverse)),
        p_log_sum(Real(c.policy_log_sum)),
        q_max(Real(c.reference_max)),
        q_inverse(Real(c.reference_inverse)),
        offset(Real(c.offset)),
        kl_centre(Real(c.kl_centre)),
        kept_max(Real(c.kept_max)),
        kept_inverse(Real(c.kept_inverse)),
        weight(Real(c.weight * row_scale_)),
        bias(Real(c.bias * row_scale_)),
        eps(Real(row.eps)),
        smoothing_norm(Real(1 / (1 + row.vocab * row.eps))),
        log_smoothing_norm(Real(-log1p(row.vocab * row.eps))),
        loss(Real(c.loss)),
        row_scale(Real(row_scale_)) {
    if (row.uniform || (row.loss != FORWARD_KL && row.loss != REVERSE_KL)) return;
    const Difference<Real> difference(kept_max, q_max);
    z_ref = difference.z_ref;
    r_ref = difference.r_ref;
    centre = difference.centre;
    kept_max -= z_ref;
    q_max -= r_ref;
  }
};

// LL, UL, NL outside the set.
template <bool MASKED, class Real>
TNT_TILE void tile_weighted_exp(const Real* z, const Real* mask, Real* gradient, int64_t n, LoopConstants<Real> c) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    gradient[i] = c.weight * exponential((masked<MASKED>(z, mask, i) - c.kept_max) * c.scale) + c.bias;
}

// The KLs come in two versions. While |d| < BOUNDED on all of a tile, e^d needs no second exponential of its own: the
// first version computes only with that and returns the largest |d|, by which the caller sees whether it may be used.
template <class Real>
struct TileKL {
  Real loss, largest;
};

// Left out with the entry: next to a share of 0, the size of d says nothing.
template <bool MASKED, class Real>
TNT_FN Real masked_size(Real d, const Real* mask, int64_t i) {
  const Real size = d < 0 ? -d : d;
  return MASKED ? size + mask[i] : size;
}

template <bool MASKED, class Real>
TNT_TILE TileKL<Real> tile_forward_kl_bounded(const Real* z, const Real* r, const Real* mask, Real* gradient, int64_t n,
                                              LoopConstants<Real> c) {
  Real loss = 0, largest = 0;
  for (int64_t at = 0; at < n; at += BLOCK) {
    const int64_t end = std::min(n, at + BLOCK);
    Real sum = 0;
#pragma omp simd reduction(+ : sum) reduction(max : largest)
    for (int64_t i = at; i < end; ++i) {
      const Real q = exponential((masked<MASKED>(r, mask, i) - c.q_max) * c.scale) * c.q_inverse;
      const Real d = fused_multiply_add(z[i] - r[i] - c.centre, c.inverse_t, c.offset);
      const Element<Real> e = forward_kl_element(q, d);
      sum += e.loss;
      gradient[i] = e.gradient * c.row_scale;
      const Real size = masked_size<MASKED>(d, mask, i);
      largest = size > largest ? size : largest;
    }
    loss += sum;
  }
  return {loss, largest};
}

template <bool MASKED, class Real>
TNT_TILE Real tile_forward_kl(const Real* z, const Real* r, const Real* mask, Real* gradient, int64_t n,
                              LoopConstants<Real> c) {
  Real loss = 0;
  for (int64_t at = 0; at < n; at += BLOCK) {
    const int64_t end = std::min(n, at + BLOCK);
    Real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = at; i < end; ++i) {
      const Real p = exponential((masked<MASKED>(z, mask, i) - c.kept_max) * c.scale) * c.kept_inverse;
      const Real q = exponential((masked<MASKED>(r, mask, i) - c.q_max) * c.scale) * c.q_inverse;
      const Real d = fused_multiply_add(z[i] - r[i] - c.centre, c.inverse_t, c.offset);
      const Element<Real> e = forward_kl_element(p, q, d);
      sum += e.loss;
      gradient[i] = e.gradient * c.row_scale;
    }
    loss += sum;
  }
  return loss;
}

template <bool MASKED, class Real>
TNT_TILE TileKL<Real> tile_reverse_kl_bounded(const Real* z, const Real* r, const Real* mask, Real* gradient, int64_t n,
                                              LoopConstants<Real> c) {
  Real loss = 0, largest = 0;
  for (int64_t at = 0; at < n; at += BLOCK) {
    const int64_t end = std::min(n, at + BLOCK);
    Real sum = 0;
#pragma omp simd reduction(+ : sum) reduction(max : largest)
    for (int64_t i = at; i < end; ++i) {
      const Real p = exponential((masked<MASKED>(z, mask, i) - c.kept_max) * c.scale) * c.kept_inverse;
      const Real x = (z[i] - r[i] - c.centre) * c.inverse_t, d = x + c.offset;
      const Element<Real> e = reverse_kl_element(p, d, x - c.kl_centre);
      sum += e.loss;
      gradient[i] = e.gradient * c.row_scale;
      const Real size = masked_size<MASKED>(d, mask, i);
      largest = size > largest ? size : largest;
    }
    loss += sum;
  }
  return {loss, largest};
}

template <bool MASKED, class Real>
TNT_TILE Real tile_reverse_kl(const Real* z, const Real* r, const Real* mask, Real* gradient, int64_t n,
                              LoopConstants<Real> c) {
  Real loss = 0;
  for (int64_t at = 0; at < n; at += BLOCK) {
    const int64_t end = std::min(n, at + BLOCK);
    Real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = at; i < end; ++i) {
      const Real p = exponential((masked<MASKED>(z, mask, i) - c.kept_max) * c.scale) * c.kept_inverse;
      const Real q = exponential((masked<MASKED>(r, mask, i) - c.q_max) * c.scale) * c.q_inverse;
      const Real x = (z[i] - r[i] - c.centre) * c.inverse_t;
      const Element<Real> e = reverse_kl_element(p, q, x + c.offset, x - c.kl_centre);
      sum += e.loss;
      gradient[i] = e.gradient * c.row_scale;
    }
    loss += sum;
  }
  return loss;
}

// Uniform smoothing: the target is (q* + eps) / (1 + V eps) everywhere, and log q̃ takes a logarithm per entry.
template <bool MASKED, bool REVERSE, class Real>
TNT_TILE double tile_uniform_kl(const Real* z, const Real* r, const Real* mask, Real* gradient, int64_t n,
                                LoopConstants<Real> c) {
  Real loss = 0;
  for (int64_t at = 0; at < n; at += BLOCK) {
    const int64_t end = std::min(n, at + BLOCK);
    Real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = at; i < end; ++i) {
      const Real r_i = masked<MASKED>(r, mask, i);
      const Real centred = z[i] - c.p_max;
      const Real p = exponential(centred * c.scale) * c.p_inverse;
      const Real smoothed = exponential((r_i - c.q_max) * c.scale) * c.q_inverse + c.eps;
      const Real q = smoothed * c.smoothing_norm;
      const Real log_p = centred * c.inverse_t - c.p_log_sum;
      const Real d = log_p - (logarithm(smoothed) + c.log_smoothing_norm);
      const Element<Real> e = REVERSE ? reverse_kl_element(p, q, d, d - c.loss) : forward_kl_element(p, q, d);
      sum += e.loss;
      gradient[i] = e.gradient * c.row_scale;
    }
    loss += sum;
  }
  return loss;
}

// The set's own entries, gathered: removed tokens of a reverse KL, tokens of NL, and those whose gradient is p_s.
template <class Real>
TNT_TILE double set_reverse_kl(const Real* z, Real* gradient, int64_t n, LoopConstants<Real> c, Real target,
                               Real offset, Real centre) {
  Real loss = 0;
#pragma omp simd reduction(+ : loss)
  for (int64_t i = 0; i < n; ++i) {
    const Real p = exponential((z[i] - c.p_max) * c.scale) * c.p_inverse;
    const Real log_weight = (z[i] - c.p_max) * c.inverse_t;
    const Element<Real> e = reverse_kl_element(p, target, log_weight + offset, log_weight - centre);
    loss += e.loss;
    gradient[i] = e.gradient * c.row_scale;
  }
  return loss;
}

// Tokens below the floor, `least` relative to p_max, are at rest; `active` counts the others.
template <class Real>
TNT_TILE void set_negative_likelihood(const Real* z, Real* gradient, int64_t n, LoopConstants<Real> c, Real least,
                                      Real active) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Real p = exponential((z[i] - c.p_max) * c.scale) * c.p_inverse;
    const Real pushed = (z[i] - c.p_max) * c.inverse_t >= least ? Real(1) : Real(0);
    gradient[i] = (pushed - active * p) * c.row_scale;
  }
}

template <class Real>
TNT_TILE void set_probabilities(const Real* z, Real* gradient, int64_t n, LoopConstants<Real> c) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) gradient[i] = exponential((z[i] - c.p_max) * c.scale) * c.p_inverse * c.row_scale;
}

// ------------------------------------------------------------------------------------------------------ the memory

template <class Real>
struct alignas(CACHE_LINE) Scratch {
  // One a thread, kept from call to call: to allocate it takes as long as a short row.
  static Scratch& of_this_thread() {
    static thread_local const auto scratch = std::make_unique<Scratch>();
    return *scratch;
  }

  alignas(CACHE_LINE) Real z[TILE], r[TILE], gradient[TILE];
  alignas(CACHE_LINE) Real mask[TILE] = {};      // all 0 between tiles
  std::vector<int32_t> ids;                      // the row's set, ascending
  std::vector<Real> set_z, set_r, set_gradient;  // their logits, gathered, and their gradients
  KlScratch<Real> kl;
  TokenSet here, everywhere;  // a KL row's tokens apart: by column, and where the vocabulary is sharded all of them
};

// Past the cache, so that zeroing a row reads nothing.
void stream_zeros(void* to, size_t bytes) {
#if defined(__SSE2__)
  char* at = static_cast<char*>(to);
  const size_t head = std::min(bytes, (CACHE_LINE - reinterpret_cast<uintptr_t>(at) % CACHE_LINE) % CACHE_LINE);
  memset(at, 0, head);
  at += head;
  bytes -= head;
  for (; bytes >= CACHE_LINE; at += CACHE_LINE, bytes -= CACHE_LINE)
    for (int k = 0; k < 4; ++k) _mm_stream_si128(reinterpret_cast<__m128i*>(at) + k, _mm_setzero_si128());
  memset(at, 0, bytes);
#else
  memset(to, 0, bytes);
#endif
}

// -------------------------------------------------------------------------------------------------------- one row

// Those of all rows, without padding and duplicates. A bit for each token sorts thousands of them in a tenth of a
// sort's time.
struct SharedIds {
  std::vector<int32_t> all, here;  // of the whole vocabulary, ascending; the columns of those that lie here

  explicit SharedIds(const RowCall& p) {
    if (!p.negative_ids || p.negative_ids_stride != 0) return;
    TokenSet set(p.vocab_size);
    for (int64_t k = 0; k < p.negative_ids_count; ++k)
      if (p.negative_ids[k] >= 0) set.insert(p.negative_ids[k]);
    all = set.ascending();
    for (const int32_t id : all)
      if (id >= p.vocab_offset && id < p.vocab_offset + p.vocab) here.push_back(int32_t(id - p.vocab_offset));
  }
};

template <class Logit, class Gradient>
class Row {
 public:
  using Real = RealOf<Logit>;

  Row(const RowCall& call, const SharedIds& shared_ids, int threads, Scratch<Real>& scratch)
      : p_(call), shared_ids_(shared_ids.all), shared_here_(shared_ids.here), threads_(threads), s_(scratch) {
    row_.uniform = smooths_uniformly(p_);
    row_.eps = p_.eps;
    row_.nl_floor = p_.nl_floor;
    row_.inverse_temperature = 1 / p_.temperature;
    row_.vocab = p_.vocab_size;
    scale_ = exponent_scale<Real>(row_.inverse_temperature);
    inverse_t_ = Real(row_.inverse_temperature);
    has_kl_rows_ = !row_.uniform && (is_kl(p_.positive_loss) || is_kl(p_.negative_loss));
    if (!has_kl_rows_) return;
    s_.here.begin_call(p_.vocab, shared_here_);
    if (is_shard()) s_.everywhere.begin_call(p_.vocab_size, shared_ids_);
  }
  ~Row() {
    if (!has_kl_rows_) return;
    s_.here.end_call(shared_here_);
    if (is_shard()) s_.everywhere.end_call(shared_ids_);
  }
  Row(const Row&) = delete;

  // Loss times its weight; `inverse_normalizer` enters the gradient alone. While this row's second pass computes from
  // the cache, memory is idle: it brings `next`, the row that this thread takes up after it.
  double run(int64_t index, int64_t next, double inverse_normalizer) {
    index_ = index;
    next_ = next;
    z_ = static_cast<const Logit*>(p_.logits) + index * p_.logits_stride;
    r_ = p_.ref_logits ? static_cast<const Logit*>(p_.ref_logits) + index * p_.ref_logits_stride : nullptr;
    g_ = p_.gradient ? static_cast<Gradient*>(p_.gradient) + index * p_.gradient_stride : nullptr;
    label_ = p_.labels[index];
    label_policy_ = label_reference_ = 0;
    const double weight = row_weight<Real>(p_, index);
    if (!is_active(p_, label_, weight)) return inactive();
    if (has_kl_rows_) {
      const bool is_kl_row = mark_set(weight);
      const double loss = is_kl_row ? kl_row(weight, inverse_normalizer) : 0;
      clear_set();
      if (is_kl_row) return loss;
    }

    collect_set(weight);
    const bool negative = !s_.ids.empty();
    row_.loss = negative ? p_.negative_loss : p_.positive_loss;
    // y pushed down in part (kappa = 1 + w) stays in the target: it is neither removed nor an ordinary entry.
    const bool kl = reads_reference();
    const bool in_part = kl && weight < 0 && weight > -1 && label_pushed_;
    log_kappa_ = in_part ? log1p(weight) : 0;
    if (in_part) s_.ids.erase(std::lower_bound(s_.ids.begin(), s_.ids.end(), label_));
    if (row_.loss == LOG_LIKELIHOOD) s_.ids.assign(1, static_cast<int32_t>(label_));
    row_.set_size = static_cast<int64_t>(s_.ids.size());
    if (p_.vocab_size != p_.vocab) localise();
    partial_ = in_part && label_ >= 0 && label_ < p_.vocab ? label_ : -1;

    s_.set_z.resize(s_.ids.size());
    s_.set_gradient.resize(s_.ids.size());
    if (kl) s_.set_r.resize(s_.ids.size());
    if (partial_ >= 0 && p_.kind != Kind::FINISH) {
      label_policy_ = load(z_[partial_]);
      label_reference_ = load(r_[partial_]);
    }
    const double factor = row_.loss == NONE ? 0 : row_factor<Real>(p_, index, row_.loss, negative, weight);
    const double scale = factor * inverse_normalizer * row_.inverse_temperature;
    switch (p_.kind) {
      case Kind::FUSED: return fused(negative, factor, scale);
      case Kind::BACKWARD: backward(); break;
      case Kind::STATISTICS: shard_statistics(); break;
      case Kind::PARTIAL_SUMS: partial_sums(scale); break;
      case Kind::FINISH: return finish(negative, factor, scale);
    }
    return 0;
  }

 private:
  double inactive() {
    if (g_) stream_zeros(g_, static_cast<size_t>(p_.vocab) * sizeof(Gradient));
    switch (p_.kind) {
      case Kind::BACKWARD: break;
      case Kind::STATISTICS: pack(RowSums(), false, packed(p_.statistics)); break;
      case Kind::PARTIAL_SUMS: write_partial_sums(0, 0); break;
      case Kind::FUSED:
        if (p_.coefficients) coefficients()[ROW_COEFFICIENTS - 1] = 0;
        [[fallthrough]];
      case Kind::FINISH: write_diagnostics(0, NAN, NAN, NAN, NAN); write_loss(0);
    }
    return 0;
  }

  // The row's own negative ids, which may be duplicates; none where all rows share a list.
  template <class Body>
  void for_each_own_id(Body body) const {
    if (!p_.negative_ids || p_.negative_ids_stride == 0) return;
    const int64_t* ids = p_.negative_ids + index_ * p_.negative_ids_stride;
    for (int64_t k = 0; k < p_.negative_ids_count; ++k)
      if (ids[k] >= 0) body(ids[k]);
  }

  // ---- KL rows, but for uniform smoothing

  bool is_shard() const { return p_.vocab_size != p_.vocab; }
  int64_t column_of(int64_t id) const {
    const int64_t column = id - p_.vocab_offset;
    return column >= 0 && column < p_.vocab ? column : -1;
  }
  // Puts a token into the row's set. Whether it is new, wherever it lies.
  bool mark(int64_t id) {
    const int64_t column = column_of(id);
    const bool is_new_here = column >= 0 && s_.here.insert(column);
    return is_shard() ? s_.everywhere.insert(id) : is_new_here;
  }
  void unmark(int64_t id) {
    if (const int64_t column = column_of(id); column >= 0) s_.here.erase(column);
    if (is_shard()) s_.everywhere.erase(id);
  }

  // Puts the row's removed tokens, and a y with -1 < w < 0, into the scratch's set. Returns whether the row is a KL's.
  bool mark_set(double weight) {
    task_ = {};
    task_.removed = static_cast<int64_t>(shared_ids_.size());
    label_added_ = false;
    for_each_own_id([&](int64_t id) { task_.removed += mark(id); });
    if (weight < 0 && mark(label_)) {
      label_added_ = true;
      if (weight > -1) {
        task_.partial = column_of(label_);
        task_.log_kappa = log1p(weight);
      } else {
        ++task_.removed;
      }
    }
    task_.apart = task_.removed || task_.partial >= 0 ? s_.here.words() : nullptr;
    row_.loss = task_.removed || label_added_ ? p_.negative_loss : p_.positive_loss;
    return reads_reference();
  }

  void clear_set() {
    for_each_own_id([&](int64_t id) { unmark(id); });
    if (label_added_) unmark(label_);
  }

  double kl_row(double weight, double inverse_normalizer) {
    const bool negative = task_.removed || label_added_;
    const double factor = row_factor<Real>(p_, index_, row_.loss, negative, weight);
    double scale = factor * inverse_normalizer * row_.inverse_temperature;
    task_.z = z_, task_.r = r_, task_.gradient = g_;
    task_.reverse = row_.loss == REVERSE_KL;
    task_.entropy = p_.diagnostics != nullptr;
    KlRow<Logit, Gradient> row(p_, threads_, s_.kl);
    KlPlan<Real> plan;
    const auto write_gradient = [&](double by, bool resume) {
      if (by == 0 || by != by) return fill(by);
      if (resume) row.resume(task_, plan);
      row.second_pass(plan, by, [&](int64_t at, int64_t n) { prefetch_next(at, n); });
    };
    static_assert(sizeof plan <= (ROW_COEFFICIENTS - 1) * sizeof(Real));
    if (p_.kind == Kind::BACKWARD) {
      memcpy(&plan, coefficients(), sizeof plan);
      write_gradient(with_upstream(double(coefficients()[ROW_COEFFICIENTS - 1])), true);
      return 0;
    }
    if (p_.kind == Kind::STATISTICS) {
      pack(row.sums(task_), true, packed(p_.statistics));
      return 0;
    }
    const auto result = is_sharded(p_.kind) ? row.merged(task_, gathered_sums(true), plan) : row.whole(task_, plan);
    if (p_.kind == Kind::FINISH && p_.upstream) scale = with_upstream(scale);
    if (scale != 0 && result.lost) scale = NAN;
    if (g_) write_gradient(scale, is_sharded(p_.kind));
    if (p_.kind == Kind::PARTIAL_SUMS) {
      write_partial_sums(0, 0);
      return 0;
    }
    if (p_.coefficients) {
      std::fill_n(coefficients(), ROW_COEFFICIENTS, Real(0));
      memcpy(coefficients(), &plan, sizeof plan);
      coefficients()[ROW_COEFFICIENTS - 1] = Real(scale);
    }
    return report(result.sums, result.loss, negative, factor, task_.log_kappa);
  }

  std::vector<RowSums> gathered_sums(bool kl) const {
    const Real* const first = packed(p_.gathered);
    std::vector<RowSums> shards;
    for (int64_t shard = 0; shard < p_.shards; ++shard)
      shards.push_back(unpack(first + shard * p_.gathered_stride, kl));
    return shards;
  }

  // The row's negative set S, ascending and without duplicates.
  void collect_set(double weight) {
    label_pushed_ = weight < 0;
    s_.ids.clear();
    if (p_.negative_ids && p_.negative_ids_stride == 0) {
      s_.ids = shared_ids_;
    } else if (p_.negative_ids) {
      for_each_own_id([&](int64_t id) { s_.ids.push_back(static_cast<int32_t>(id)); });
      if (!std::is_sorted(s_.ids.begin(), s_.ids.end())) std::sort(s_.ids.begin(), s_.ids.end());
      s_.ids.erase(std::unique(s_.ids.begin(), s_.ids.end()), s_.ids.end());
    }
    if (weight < 0) {
      const auto at = std::lower_bound(s_.ids.begin(), s_.ids.end(), label_);
      if (at != s_.ids.end() && *at == label_)
        label_pushed_ = false;  // named as a negative: removed, whatever w is
      else
        s_.ids.insert(at, static_cast<int32_t>(label_));
    }
  }

  // From the whole vocabulary's numbers to this shard's columns; what lies elsewhere is left out.
  void localise() {
    const int64_t first = p_.vocab_offset, last = first + p_.vocab;
    const auto begin = std::lower_bound(s_.ids.begin(), s_.ids.end(), first);
    const auto end = std::lower_bound(begin, s_.ids.end(), last);
    s_.ids.erase(std::transform(begin, end, s_.ids.begin(), [&](int32_t id) { return int32_t(id - first); }),
                 s_.ids.end());
    label_ -= first;
  }

  bool reads_reference() const { return is_kl(row_.loss); }
  bool uniform_kl() const { return row_.uniform && reads_reference(); }

  struct Tile {
    const Real *z, *r;
    bool masked;         // the scratch's mask leaves out the set and the partially pushed y
    int64_t at, n;       // columns [at, at + n)
    int64_t begin, end;  // its part of the set: ids[begin, end)
  };

  // Calls body(tile) for every tile, the last one first if `backwards`. Tiles of Real logits are read where they are,
  // unless they are to be relative to something. Others are converted first, and the next one is prefetched, as a
  // conversion hides little of the memory's latency.
  template <class Body>
  void for_each_tile(bool backwards, Real z_ref, Real r_ref, Body body) {
    constexpr bool direct = std::is_same_v<Logit, Real>;
    const bool pair = reads_reference(), relative = z_ref != 0 || r_ref != 0, in_place = direct && !relative;
    const int64_t tiles = (p_.vocab + TILE - 1) / TILE;
    const int32_t* const ids = s_.ids.data();
    const int64_t set_size = static_cast<int64_t>(s_.ids.size());
    int64_t begin = backwards ? set_size : 0, end = begin;
    for (int64_t k = 0; k < tiles; ++k) {
      const int64_t at = (backwards ? tiles - 1 - k : k) * TILE;
      const int64_t n = std::min<int64_t>(TILE, p_.vocab - at);
      if (backwards) {
        end = begin;
        while (begin > 0 && ids[begin - 1] >= at) --begin;
      } else {
        begin = end;
        while (end < set_size && ids[end] < at + n) ++end;
      }
      const bool has_partial = partial_ >= at && partial_ < at + n;
      Tile tile{nullptr, nullptr, begin != end || has_partial, at, n, begin, end};
      const int64_t ahead = backwards ? at - TILE : at + TILE;
      if (!direct && ahead >= 0 && ahead < p_.vocab) {
        prefetch(z_ + ahead, std::min<int64_t>(TILE, p_.vocab - ahead));
        if (pair) prefetch(r_ + ahead, std::min<int64_t>(TILE, p_.vocab - ahead));
      }
      if (!in_place) {
        load_tile(z_ + at, s_.z, n, z_ref);
        if (pair) load_tile(r_ + at, s_.r, n, r_ref);
        tile.z = s_.z;
        tile.r = s_.r;
      } else if constexpr (direct) {
        tile.z = z_ + at;
        tile.r = pair ? r_ + at : nullptr;
      }
      const auto set_left_out = [&](Real* to, Real value) {
        for (int64_t i = begin; i < end; ++i) to[ids[i] - at] = value;
        if (has_partial) to[partial_ - at] = value;
      };
      set_left_out(s_.mask, -INFINITY);
      if (relative) {  // what is left out may lie further from the maxima than the largest number
        set_left_out(s_.z, 0);
        set_left_out(s_.r, 0);
      }
      body(tile);
      set_left_out(s_.mask, 0);
    }
  }

  // Puts the logits of a tile's part of the set aside. Best when the tile has been read: taken from memory one by one
  // they would cost as much as the rest of the row.
  void gather(const Tile& tile) {
    for (int64_t i = tile.begin; i < tile.end; ++i) s_.set_z[size_t(i)] = load(z_[s_.ids[size_t(i)]]);
    if (!reads_reference()) return;
    for (int64_t i = tile.begin; i < tile.end; ++i) s_.set_r[size_t(i)] = load(r_[s_.ids[size_t(i)]]);
  }

  static void prefetch(const Logit* from, int64_t n) {
    for (int64_t i = 0; i < n; i += CACHE_LINE / sizeof(Logit)) __builtin_prefetch(from + i, 0, 2);
  }

  void prefetch_next(int64_t at, int64_t n) const {
    if (next_ >= p_.rows || !is_active<Real>(p_, next_)) return;
    prefetch(static_cast<const Logit*>(p_.logits) + next_ * p_.logits_stride + at, n);
    if (reads_reference()) prefetch(static_cast<const Logit*>(p_.ref_logits) + next_ * p_.ref_logits_stride + at, n);
  }

  // body(begin, n) for [0, n) without `column`, where it lies in there.
  template <class Body>
  static void around(int64_t column, int64_t n, Body body) {
    if (column < 0 || column >= n) return body(0, n);
    body(0, column);
    body(column + 1, n - column - 1);
  }

  // ---- first pass

  // Whether entries exceed `max` by more than their sums should.
  bool too_low(Real max, Real top) const { return (top - max) * scale_ > Real(8); }

  ExpSum exp_sum(const Real* x, bool masked, int64_t n, Real& max, bool moment) const {
    const auto sum = [&] {
      return masked ? tile_sum<true>(x, s_.mask, n, max, scale_) : tile_sum<false>(x, s_.mask, n, max, scale_);
    };
    TileSums<Real> sums = sum();
    if (too_low(max, sums.policy_max)) {
      max = sums.policy_max;
      sums = sum();
    }
    return {double(max), double(sums.policy), moment ? entropy_moment(x, masked, n, max) : 0};
  }

  double entropy_moment(const Real* x, bool masked, int64_t n, Real max) const {
    return masked ? tile_moment<true>(x, s_.mask, n, max, scale_, inverse_t_)
                  : tile_moment<false>(x, s_.mask, n, max, scale_, inverse_t_);
  }

  ExpSum set_sum(const std::vector<Real>& x, bool moment) const {
    ExpSum sum;
    Real max = LOWEST<Real>;
    const int64_t size = static_cast<int64_t>(x.size());
    for (int64_t at = 0; at < size; at += TILE) {
      const int64_t n = std::min<int64_t>(TILE, size - at);
      sum = merge(sum, exp_sum(x.data() + at, false, n, max, moment), row_.inverse_temperature);
    }
    return sum;
  }

  RowStatistics statistics() {
    RowStatistics s;
    const bool pair = reads_reference(), entropy = p_.diagnostics != nullptr;
    const bool moment = row_.loss == REVERSE_KL && !row_.uniform;
    const double inverse_t = row_.inverse_temperature;
    // Tiles are summed relative to the maxima so far, in the loop that finds their own.
    Real z_max = LOWEST<Real>, r_max = LOWEST<Real>;
    const auto pair_sums = [&](const Tile& t, auto masked) {
      return moment ? tile_pair_moment<masked()>(t.z, t.r, s_.mask, t.n, z_max, r_max, scale_,
                                                 Difference<Real>(z_max, r_max))
                    : tile_pair_sums<masked()>(t.z, t.r, s_.mask, t.n, z_max, r_max, scale_);
    };
    for_each_tile(false, 0, 0, [&](const Tile& tile) {
      if (!pair) {
        s.policy = merge(s.policy, exp_sum(tile.z, tile.masked, tile.n, z_max, entropy), inverse_t);
        return gather(tile);
      }
      TileSums<Real> sums = tile.masked ? pair_sums(tile, std::true_type()) : pair_sums(tile, std::false_type());
      if (too_low(z_max, sums.policy_max) || too_low(r_max, sums.reference_max)) {
        // Both, so that rows which are close keep maxima which are.
        z_max = std::max(z_max, sums.policy_max);
        r_max = std::max(r_max, sums.reference_max);
        sums = tile.masked ? pair_sums(tile, std::true_type()) : pair_sums(tile, std::false_type());
      }
      RowStatistics of_tile;
      const double policy_moment = entropy ? entropy_moment(tile.z, tile.masked, tile.n, z_max) : 0;
      of_tile.policy = {double(z_max), double(sums.policy), policy_moment};
      of_tile.reference = {double(r_max), double(sums.reference), 0};
      if (moment) {
        const double excess = excess_of_difference(z_max, r_max);
        of_tile.kl_moment = (double(sums.moment) - double(sums.policy) * excess) * inverse_t;
        if (!(std::abs(sums.moment) < INFINITY) && std::abs(s.kl_moment) < INFINITY)
          of_tile.kl_moment = wide_moment(tile, z_max, r_max) * inverse_t;
      }
      s = merge(s, of_tile, inverse_t);
      gather(tile);
    });
    s.label_policy = label_policy_;
    s.label_reference = label_reference_;
    s.kept = double(p_.vocab) - double(s_.ids.size());
    s.policy_set = set_sum(s_.set_z, entropy || moment);
    if (pair && entropy) s.reference_set = set_sum(s_.set_r, false);  // a NaN in it is in `reference` too
    if (row_.loss == LOG_LIKELIHOOD && row_.uniform) {
      for_each_tile(true, 0, 0, [&](const Tile& tile) {
        around(label_ - tile.at, tile.n, [&](int64_t begin, int64_t count) {
          s.policy_total += tile_total(tile.z + begin, count, Real(s.policy.max), inverse_t_);
        });
      });
    }
    return s;
  }

  // The moment of a tile of which no float holds the sum, as where the lowest number masks the reference alone.
  double wide_moment(const Tile& tile, Real z_max, Real r_max) const {
    double sum = 0;
    for (int64_t i = 0; i < tile.n; ++i) {
      const Real z = tile.z[i] + s_.mask[i];  // which is 0 but for what the tile leaves out
      const double weight = exponential((z - z_max) * scale_);
      if (weight != 0) sum += weight * ((double(z) - double(z_max)) - (double(tile.r[i]) - double(r_max)));
    }
    return sum;
  }

  // ---- second pass: the gradient (if `write`) times `scale`; returns what the loss still lacks

  double second_pass(const RowCoefficients& c, double scale, bool write) {
    const LoopConstants<Real> t(c, row_, scale);
    double loss = 0;
    bool bounded = true;  // until a tile says otherwise
    for_each_tile(true, t.z_ref, t.r_ref, [&](const Tile& tile) {
      if (!is_first(p_.kind)) gather(tile);  // there was no first pass
      loss +=
          tile.masked ? tile_loss(tile, t, bounded, std::true_type()) : tile_loss(tile, t, bounded, std::false_type());
      if (write) store_tile(s_.gradient, g_ + tile.at, tile.n);
      if (tile.begin != tile.end && !uniform_kl()) loss += set_elements(c, t, tile, write);
      prefetch_next(p_.vocab - tile.at - tile.n, tile.n);
    });
    if (partial_ >= 0) loss += partial_element(c, scale, write);
    return loss;
  }

  // The tile's gradient goes to the scratch: a bounded version that turns out not to be must leave its inputs alone.
  template <class Masked>
  double tile_loss(const Tile& tile, const LoopConstants<Real>& t, bool& bounded, Masked) {
    constexpr bool masked = Masked::value;
    const Real *z = tile.z, *r = tile.r, *mask = s_.mask;
    Real* gradient = s_.gradient;
    const bool forward = row_.loss == FORWARD_KL;
    if (!reads_reference()) {
      tile_weighted_exp<masked>(z, mask, gradient, tile.n, t);
      return 0;
    }
    if (uniform_kl()) {
      double loss = 0;
      around(partial_ - tile.at, tile.n, [&](int64_t at, int64_t n) {
        loss += forward ? tile_uniform_kl<masked, false>(z + at, r + at, mask + at, gradient + at, n, t)
                        : tile_uniform_kl<masked, true>(z + at, r + at, mask + at, gradient + at, n, t);
      });
      return loss;
    }
    if (bounded) {
      const TileKL<Real> kl = forward ? tile_forward_kl_bounded<masked>(z, r, mask, gradient, tile.n, t)
                                      : tile_reverse_kl_bounded<masked>(z, r, mask, gradient, tile.n, t);
      bounded = kl.largest < BOUNDED && kl.loss == kl.loss;
      if (bounded) return kl.loss;
    }
    return forward ? tile_forward_kl<masked>(z, r, mask, gradient, tile.n, t)
                   : tile_reverse_kl<masked>(z, r, mask, gradient, tile.n, t);
  }

  // Loss and gradient of a tile's part of the set: removed tokens of a KL, S of UL and NL, y of LL.
  double set_elements(const RowCoefficients& c, const LoopConstants<Real>& t, const Tile& tile, bool write) {
    const int64_t n = tile.end - tile.begin;
    const Real* z = s_.set_z.data() + tile.begin;
    Real* gradient = s_.set_gradient.data() + tile.begin;
    double loss = 0;
    if (row_.loss == LOG_LIKELIHOOD) {
      gradient[0] = Real(c.set_value) * t.row_scale;
    } else if (row_.loss == REVERSE_KL) {
      loss = set_reverse_kl(z, gradient, n, t, Real(c.set_value), Real(c.set_offset), Real(c.set_centre));
    } else if (row_.loss == NEGATIVE_LIKELIHOOD) {
      set_negative_likelihood(z, gradient, n, t, Real(row_.nl_floor + c.policy_log_sum), Real(c.set_value));
    } else {  // UL and the forward KL: p_s
      set_probabilities(z, gradient, n, t);
    }
    for (int64_t i = 0; write && i < n; ++i) store(g_ + s_.ids[size_t(tile.begin + i)], gradient[i]);
    return loss;
  }

  // y of a KL row with -1 < w < 0.
  double partial_element(const RowCoefficients& c, double scale, bool write) {
    const double inverse_t = row_.inverse_temperature, z = label_policy_, r = label_reference_;
    double p = ::exp((z - c.kept_max) * inverse_t) * c.kept_inverse;
    double q = ::exp((r - c.reference_max) * inverse_t + log_kappa_) * c.reference_inverse;
    double x = Difference<Real>(Real(c.kept_max), Real(c.reference_max))(z, r) * inverse_t - log_kappa_;
    double d = x + c.offset, kl_centre = c.kl_centre;
    if (row_.uniform) {
      const double log_p = (z - c.policy_max) * inverse_t - c.policy_log_sum;
      p = ::exp(log_p);
      q = (q + row_.eps) / (1 + row_.vocab * row_.eps);
      x = d = log_p - ::log(q);
      kl_centre = c.loss;
    }
    const Element<double> e =
        row_.loss == FORWARD_KL ? forward_kl_element(p, q, d) : reverse_kl_element(p, q, d, x - kl_centre);
    if (write) store(g_ + partial_, Real(e.gradient * scale));
    return e.loss;
  }

  struct NegativeLikelihood {
    double total;
    int64_t active;
  };

  NegativeLikelihood negative_likelihood(const RowCoefficients& c) const {
    const Real max = Real(c.policy_max), least = Real(row_.nl_floor + c.policy_log_sum);
    NegativeLikelihood sum{0, 0};
    for (const Real z : s_.set_z) {
      const Real log_weight = (z - max) * inverse_t_;
      if (log_weight < least) {
        sum.total += row_.nl_floor;
      } else {
        sum.total += double(log_weight) - c.policy_log_sum;
        ++sum.active;
      }
    }
    return sum;
  }

  static void set_active(RowCoefficients& c, double active) {
    c.weight *= active;
    c.set_value = active;
  }

  // ---- what a launch does, by its kind. `factor` is the row's, `scale` the gradient's.

  double fused(bool negative, double factor, double scale) {
    RowStatistics s;
    RowCoefficients c;
    if (row_.loss != NONE || p_.diagnostics) {
      s = statistics();
      c = row_coefficients<Real>(row_, with_label(s));
    }
    if (row_.loss == NEGATIVE_LIKELIHOOD) {
      const NegativeLikelihood sum = negative_likelihood(c);
      c.loss += sum.total;
      set_active(c, double(sum.active));
    }
    const bool write = g_ && scale != 0;
    if (gradient_needs_loss()) {
      c.loss += second_pass(c, 0, false);
      if (write) second_pass(c, scale, true);
    } else if (reads_reference()) {
      c.loss += second_pass(c, scale, write);
    } else if (write) {
      second_pass(c, scale, true);
    }
    scale = settle(c, scale);
    if (p_.coefficients) write_coefficients(c, scale);
    return report(sums_of(s), c.loss, negative, factor, log_kappa_);
  }

  void backward() {
    double scale;
    const RowCoefficients c = read_coefficients(scale);
    scale = with_upstream(scale);
    if (scale == 0 || scale != scale) return fill(scale);
    second_pass(c, scale, true);
  }

  void shard_statistics() {
    pack(sums_of(row_.loss != NONE || p_.diagnostics ? statistics() : RowStatistics()), false, packed(p_.statistics));
  }

  // What this shard's second pass adds up, and the gradient unless that has to wait for total sums.
  void partial_sums(double scale) {
    const RowStatistics s = gathered();
    RowCoefficients c = row_coefficients<Real>(row_, with_label(s));
    double loss = 0, active = 0;
    if (row_.loss == NEGATIVE_LIKELIHOOD) {
      for (size_t i = 0; i < s_.ids.size(); ++i) s_.set_z[i] = load(z_[s_.ids[i]]);
      const NegativeLikelihood sum = negative_likelihood(c);
      loss = sum.total;
      active = double(sum.active);
      set_active(c, double(row_.set_size));
    }
    const bool write = g_ && scale != 0;
    if (reads_reference())
      loss = second_pass(c, gradient_needs_loss() ? 0 : scale, write);
    else if (write)
      second_pass(c, scale, true);
    settle(c, scale);
    write_partial_sums(loss, active);
  }

  // The loss, or a gradient that had to wait.
  double finish(bool negative, double factor, double scale) {
    const RowStatistics s = gathered();
    RowCoefficients c = row_coefficients<Real>(row_, with_label(s));
    label_policy_ = s.label_policy;
    label_reference_ = s.label_reference;
    const Real* total_sums = static_cast<const Real*>(p_.total_sums) + index_ * ROW_PARTIAL_SUMS;
    c.loss += double(total_sums[0]);
    if (row_.loss == NEGATIVE_LIKELIHOOD) set_active(c, double(total_sums[1]));
    if (g_) {
      if (p_.upstream) scale = with_upstream(scale);
      if (scale != 0) second_pass(c, scale, true);
      settle(c, scale);
    }
    return report(sums_of(s), c.loss, negative, factor, log_kappa_);
  }

  bool gradient_needs_loss() const { return uniform_kl() && row_.loss == REVERSE_KL; }

  // Fills rows whose gradient is not what the second pass wrote; returns its factor.
  double settle(const RowCoefficients& c, double scale) {
    if (scale != 0 && is_lost(row_.loss, c)) scale = NAN;
    if (g_ && (scale == 0 || scale != scale)) fill(scale);
    return scale;
  }

  // Writes the row's diagnostics and its loss times its factor, which is returned.
  double report(const RowSums& s, double loss, bool negative, double factor, double log_kappa) {
    if (p_.diagnostics) {
      const bool kl = reads_reference();
      const RowDiagnosis d = diagnose(s, negative, kl, log_kappa, row_.inverse_temperature);
      write_diagnostics(loss, kl ? loss : NAN, d.negative_mass, d.ref_negative_mass, d.entropy);
    }
    const double weighted = factor == 0 ? 0 : factor * loss;
    write_loss(weighted);
    return weighted;
  }
  void write_loss(double weighted) const {  // the sum of all rows is written at the end
    if (p_.loss && p_.reduction == Reduction::NONE) static_cast<Real*>(p_.loss)[index_] = Real(weighted);
  }

  RowStatistics gathered() const {
    RowSums all;
    for (const RowSums& s : gathered_sums(false)) all = merge(all, s, row_.inverse_temperature);
    return statistics_of(all);
  }

  static RowSums sums_of(const RowStatistics& s) {
    const auto log_sum = [](const ExpSum& sum) {
      if (sum.sum == 0) return LogSum();
      const double log = ::log(sum.sum);
      return LogSum{sum.max, log, log - sum.moment / sum.sum};
    };
    RowSums sums;
    sums.policy = log_sum(s.policy), sums.reference = log_sum(s.reference);
    sums.policy_set = log_sum(s.policy_set), sums.reference_set = log_sum(s.reference_set);
    sums.label_policy = s.label_policy, sums.label_reference = s.label_reference;
    sums.total = s.policy_total, sums.kept = s.kept;
    return sums;
  }
  RowStatistics statistics_of(const RowSums& s) const {
    const auto exp_sum = [](const LogSum& sum) {
      if (sum.is_empty()) return ExpSum();
      return ExpSum{sum.ref, ::exp(sum.log), ::exp(sum.log) * (sum.log - sum.entropy)};
    };
    RowStatistics sums;
    sums.policy = exp_sum(s.policy), sums.reference = exp_sum(s.reference);
    sums.policy_set = exp_sum(s.policy_set), sums.reference_set = exp_sum(s.reference_set);
    sums.label_policy = s.label_policy, sums.label_reference = s.label_reference;
    sums.policy_total = s.total, sums.kept = s.kept;
    return sums;
  }
  // With the partially pushed y.
  RowStatistics with_label(const RowStatistics& s) const {
    if (log_kappa_ == 0) return s;
    RowStatistics label;
    if (s.label_policy != -INFINITY) label.policy = {s.label_policy, 1, 0};
    if (s.label_reference != -INFINITY) label.reference = {s.label_reference, ::exp(log_kappa_), 0};
    return merge(s, label, row_.inverse_temperature);
  }

  Real* packed(void* to) const { return static_cast<Real*>(to) + index_ * ROW_STATISTICS; }
  const Real* packed(const void* from) const { return static_cast<const Real*>(from) + index_ * ROW_STATISTICS; }

  void write_partial_sums(double loss, double active) const {
    Real* to = static_cast<Real*>(p_.partial_sums) + index_ * ROW_PARTIAL_SUMS;
    to[0] = Real(loss);
    to[1] = Real(active);
  }

  // A row that does not count or that nobody asks about is 0, whatever the other factor is.
  double with_upstream(double scale) const {
    const Real upstream = static_cast<const Real*>(p_.upstream)[index_ * p_.upstream_stride];
    return scale == 0 || upstream == 0 ? 0 : scale * upstream;
  }

  void fill(double value) {
    if (value == 0) return stream_zeros(g_, static_cast<size_t>(p_.vocab) * sizeof(Gradient));
    for (int64_t i = 0; i < p_.vocab; ++i) store(g_ + i, Real(value));
  }

  Real* coefficients() const { return static_cast<Real*>(p_.coefficients) + index_ * ROW_COEFFICIENTS; }

  void write_coefficients(const RowCoefficients& c, double scale) const {
    static_assert(sizeof(RowCoefficients) == (ROW_COEFFICIENTS - 1) * sizeof(double));
    double values[ROW_COEFFICIENTS];
    memcpy(values, &c, sizeof c);
    values[ROW_COEFFICIENTS - 1] = scale;
    std::transform(values, values + ROW_COEFFICIENTS, coefficients(), [](double x) { return Real(x); });
  }

  RowCoefficients read_coefficients(double& scale) const {
    double values[ROW_COEFFICIENTS];
    std::copy_n(coefficients(), ROW_COEFFICIENTS, values);
    RowCoefficients c;
    memcpy(&c, values, sizeof c);
    scale = values[ROW_COEFFICIENTS - 1];
    return c;
  }

  void write_diagnostics(double loss, double kl, double mass, double ref_mass, double entropy) const {
    if (!p_.diagnostics) return;
    Real* at = static_cast<Real*>(p_.diagnostics) + index_;
    for (const double value : {loss, kl, mass, ref_mass, entropy}) {
      *at = Real(value);
      at += p_.rows;
    }
  }

  const RowCall& p_;
  const std::vector<int32_t>&shared_ids_, &shared_here_;  // of the whole vocabulary; the columns here
  const int threads_;
  Scratch<Real>& s_;
  RowScalars row_;
  Real scale_, inverse_t_;
  int64_t index_ = 0, next_ = 0, label_ = 0;
  int64_t partial_ = -1;                           // the column of a y with -1 < w < 0, if it lies in this shard
  double log_kappa_ = 0;                           // of that y, wherever it lies
  double label_policy_ = 0, label_reference_ = 0;  // its logits
  bool label_pushed_ = false;
  bool has_kl_rows_ = false, label_added_ = false;
  typename KlRow<Logit, Gradient>::Task task_{};
  const Logit *z_ = nullptr, *r_ = nullptr;
  Gradient* g_ = nullptr;
};

// ------------------------------------------------------------------------------------------------------- all rows

template <class Logit, class Gradient = Logit>
void run(const RowCall& p, int most_threads) {
  using Real = RealOf<Logit>;
  double inverse = 1;  // of the normaliser
  if (p.reduction == Reduction::MEAN) {
    int64_t active = 0;
    if (counts_active_rows(p))
      for (int64_t i = 0; i < p.rows; ++i) active += is_active<Real>(p, i);
    inverse = inverse_normalizer<Real>(p, double(active));
  }
  const SharedIds shared_ids(p);

  std::vector<double> losses(static_cast<size_t>(p.rows));
  // Rows are handed out in blocks as threads become free, because ignored rows cost next to nothing. A thread takes its
  // next block before it works on the present one, to know what to prefetch.
  const int64_t block = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, p.vocab));
  // A row is split over threads where there are fewer rows than threads.
  const bool splits = p.rows < most_threads;
  const int threads = splits ? 1 : int(std::min<int64_t>(most_threads, (p.rows + block - 1) / block));
  std::atomic<int64_t> taken{0};
  const auto work = [&] {
    Scratch<Real>& scratch = Scratch<Real>::of_this_thread();
    Row<Logit, Gradient> row(p, shared_ids, splits ? most_threads : 1, scratch);
    for (int64_t begin = taken.fetch_add(block), next; begin < p.rows; begin = next) {
      next = taken.fetch_add(block);
      const int64_t end = std::min(begin + block, p.rows);
      for (int64_t i = begin; i < end; ++i) losses[size_t(i)] = row.run(i, i + 1 < end ? i + 1 : next, inverse);
    }
  };
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    work();
  } else {
    work();  // a team of one takes as long to gather as a short row
  }
  if (p.reduction == Reduction::NONE || !p.loss) return;
  double total = 0;
  for (const double loss : losses) total += loss;
  *static_cast<Real*>(p.loss) = Real(inverse == 0 ? 0 : total * inverse);
}

}  // namespace

void run_rows(const RowCall& p, int threads) {
  switch (p.dtype) {
    case DType::FLOAT32:
      return p.gradient_dtype == DType::BFLOAT16 ? run<float, BFloat16>(p, threads) : run<float>(p, threads);
    case DType::BFLOAT16: return run<BFloat16>(p, threads);
    case DType::FLOAT16: return run<Float16>(p, threads);
    case DType::FLOAT64: return run<double>(p, threads);
  }
}

}  // namespace TNT_ISA
}  // namespace tnt
