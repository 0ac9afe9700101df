// A row in tiles that stay in the L1 cache, and the entries of it that are kept apart: the loops over a tile leave them
// out, and they lie side by side in arrays of their own.
#pragma once

#include <algorithm>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "cpu/vector.h"

namespace tnt {
inline namespace TNT_ISA {

template <class Real>
constexpr int BLOCK_ENTRIES = 4 * LANES<Real>;  // that share a branch
template <class Real>
constexpr int TILE_ENTRIES = 128 * LANES<Real>;

constexpr float AWAY = -1e30f;  // a logit that weighs nothing, and whose difference to another is finite
constexpr size_t CACHE_LINE = 64;

// ------------------------------------------------------------------------------------------------------------ blocks

// The bits of a block that begins at an entry of the row.
template <class Real>
TNT_FN uint64_t block_bits(const uint64_t* bits, int64_t entry) {
  constexpr uint64_t ALL = BLOCK_ENTRIES<Real> == 64 ? ~uint64_t(0) : (uint64_t(1) << BLOCK_ENTRIES<Real> % 64) - 1;
  return bits[entry / 64] >> (entry % 64) & ALL;
}

template <class Logit>
TNT_FN void load_block(const Logit* from, Vector<RealOf<Logit>> (&x)[4]) {
  const auto first = load_pair(from), second = load_pair(from + 2 * LANES<RealOf<Logit>>);
  x[0] = first.a, x[1] = first.b, x[2] = second.a, x[3] = second.b;
}

template <class Logit>
struct BlockMasks {
  using Real = RealOf<Logit>;
  PairMasks<Logit> first, second;
  TNT_FN explicit BlockMasks(uint64_t bits) : first(uint32_t(bits)), second(uint32_t(bits >> 2 * LANES<Real>)) {}
  TNT_FN auto operator[](int j) const { return j == 0 ? first.a : j == 1 ? first.b : j == 2 ? second.a : second.b; }
};

// Appends the logits of the block that begins at `from` whose bit is set. Their order is the loops' own.
template <class Logit, class Real>
TNT_FN void take(uint64_t bits, const Logit* from, Real*& to) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Real) == sizeof(float)) {
    const BlockMasks<Logit> masks(bits);
    Vector<Real> x[4];
    load_block(from, x);
    for (int j = 0; j < 4; ++j) {
      const int count = __builtin_popcount(masks[j]);
      _mm512_mask_storeu_ps(to, Mask((1u << count) - 1), _mm512_maskz_compress_ps(masks[j], x[j]));
      to += count;
    }
    return;
  }
#endif
  for (; bits; bits &= bits - 1) *to++ = load(from[__builtin_ctzll(bits)]);
}

// Stores a pair in the order in which load_pair has it.
template <class Logit, class Gradient, class Real>
TNT_FN void store_as_loaded(Gradient* to, Vector<Real> a, Vector<Real> b) {
  if constexpr (std::is_same_v<Logit, BFloat16>)
    store_even_and_odd(to, {a, b});
  else
    store_pair(to, Pair<Real>{a, b});
}

// Stores a block, its entries kept apart from `set`.
template <class Logit, class Gradient, class Real>
TNT_FN void put(Gradient* to, const Vector<Real> (&g)[4]) {
  store_as_loaded<Logit, Gradient, Real>(to, g[0], g[1]);
  store_as_loaded<Logit, Gradient, Real>(to + 2 * LANES<Real>, g[2], g[3]);
}
template <class Logit, class Gradient, class Real>
TNT_FN void put(Gradient* to, const Vector<Real> (&g)[4], uint64_t apart, const Real*& set) {
  if (!apart) return put<Logit, Gradient, Real>(to, g);
#if defined(__AVX512F__)
  if constexpr (sizeof(Real) == sizeof(float)) {
    Floats all[4];
    const BlockMasks<Logit> masks(apart);
    for (int j = 0; j < 4; ++j) {
      all[j] = _mm512_mask_expand_ps(g[j], masks[j], _mm512_loadu_ps(set));
      set += __builtin_popcount(masks[j]);
    }
    return put<Logit, Gradient, Real>(to, all);
  }
#endif
  put<Logit, Gradient, Real>(to, g);
  for (; apart; apart &= apart - 1) store(to + __builtin_ctzll(apart), *set++);
}
// How many entries past a set's last one `put` may read.
constexpr int PUT_SLACK = FLOATS;

// A tile's entries, a multiple of a block's, from `entry` of the row on; the bits of those kept apart are set.
template <class Logit>
struct TileEntries {
  const Logit *base, *other;  // the other is null where a loss reads one row alone
  int64_t n;
  const uint64_t* bits;
  int64_t entry;
  bool careful;  // of a KL: all blocks are far
  using Real = RealOf<Logit>;
  TNT_FN uint64_t apart(int64_t i) const { return bits ? block_bits<Real>(bits, entry + i) : 0; }
};

// ------------------------------------------------------------------------------------------------------------- tokens

// A set of a vocabulary's tokens, a bit each. Between rows it holds the tokens that all rows share.
class TokenSet {
 public:
  TokenSet() = default;
  explicit TokenSet(int64_t vocab) { reserve(vocab); }

  void begin_call(int64_t vocab, const std::vector<int32_t>& shared) {
    reserve(vocab);
    for (const int32_t id : shared) insert(id);
  }
  void end_call(const std::vector<int32_t>& shared) {
    for (const int32_t id : shared) erase(id);
  }
  bool insert(int64_t id) {  // whether it is new
    uint64_t& word = words_[size_t(id / 64)];
    const uint64_t before = word;
    word |= uint64_t(1) << (id % 64);
    return word != before;
  }
  void erase(int64_t id) { words_[size_t(id / 64)] &= ~(uint64_t(1) << (id % 64)); }
  const uint64_t* words() const { return words_.data(); }
  std::vector<int32_t> ascending() const {
    std::vector<int32_t> ids;
    for (size_t i = 0; i < words_.size(); ++i)
      for (uint64_t word = words_[i]; word; word &= word - 1)
        ids.push_back(int32_t(i * 64 + size_t(__builtin_ctzll(word))));
    return ids;
  }

 private:
  void reserve(int64_t vocab) {
    const size_t words = size_t(vocab / 64) + 8;  // a tile's last block may end beyond the vocabulary
    if (words_.size() < words) words_.resize(words);
  }
  std::vector<uint64_t> words_;
};

// -------------------------------------------------------------------------------------------------------------- tiles

// A thread's copy of a tile: one that is not read where it lies, or not written where it goes.
template <class Real>
struct alignas(CACHE_LINE) TileCopy {
  Real x[TILE_ENTRIES<Real>], o[TILE_ENTRIES<Real>];
  Real gradient[TILE_ENTRIES<Real>];  // of any type that is stored
  static TileCopy& of_this_thread() {
    static thread_local const auto copy = std::make_unique<TileCopy>();
    return *copy;
  }
};

// The entries of a row that are kept apart, tile after tile.
template <class Real>
struct SetScratch {
  std::vector<int32_t> begin;        // of every tile, and the end of the last
  std::vector<Real> x, o, gradient;  // their logits and gradients
};

template <class Logit, class Gradient>
class RowTiles {
 public:
  using Real = RealOf<Logit>;
  static constexpr int64_t TILE = TILE_ENTRIES<Real>;

  RowTiles(int64_t vocab, int threads, SetScratch<Real>& scratch)
      : vocab_(vocab),
        count_((vocab + TILE - 1) / TILE),
        threads_(int(std::max<int64_t>(1, std::min<int64_t>(threads, count_ / LEAST_TILES)))),
        set_(scratch) {}

  static constexpr int LEAST_TILES = 4;  // of a thread, below which waking it takes longer than they do

  // A row of one or two streams of logits; `apart`: the bits of the entries kept apart, null if there are none.
  void begin(const Logit* base, const Logit* other, const uint64_t* apart) {
    base_ = base, other_ = other, bits_ = apart;
    read_relative_to(0, 0);
    set_.begin.assign(size_t(count_) + 1, 0);
    if (!bits_) return;
    for (int64_t k = 0; k < count_; ++k) {
      uint64_t any = 0;
      int32_t size = 0;
      for (int64_t word = k * TILE / 64; word <= (end_of(k) - 1) / 64; ++word) any |= bits_[word];
      if (any)
        for (int64_t word = k * TILE / 64; word <= (end_of(k) - 1) / 64; ++word)
          size += __builtin_popcountll(bits_[word]);
      set_.begin[size_t(k) + 1] = set_.begin[size_t(k)] + size;
    }
    const size_t room = size_t(set_size()) + PUT_SLACK;
    for (std::vector<Real>* const array : {&set_.x, &set_.o, &set_.gradient})
      if (array->size() < room) array->resize(room);
  }
  void read_relative_to(Real x_zero, Real o_zero) { x_zero_ = x_zero, o_zero_ = o_zero; }

  int64_t count() const { return count_; }
  int64_t set_size() const { return set_.begin.back(); }
  Real x_zero() const { return x_zero_; }
  Real o_zero() const { return o_zero_; }

  // body(k) for every tile, by all threads of the row. A thread takes the same ones backwards, which it then finds in
  // its cache. What a tile yields must not depend on the order.
  template <class Body>
  void each(bool backwards, Body body) const {
    const auto part = [&](int64_t thread) {
      const int64_t begin = count_ * thread / threads_, end = count_ * (thread + 1) / threads_;
      for (int64_t i = begin; i < end; ++i) body(backwards ? begin + end - 1 - i : i);
    };
    if (threads_ <= 1) return part(0);
#pragma omp parallel for num_threads(threads_) schedule(static, 1)
    for (int thread = 0; thread < threads_; ++thread) part(thread);
  }

  // body(entries, n): the tile's entries, where they lie or as Real, with n of the row and up to a whole block others
  // that weigh nothing.
  template <class Body>
  void on(int64_t k, bool careful, Body body) const {
    const int64_t at = k * TILE, n = end_of(k) - at;
    const int64_t padded = (n + BLOCK_ENTRIES<Real> - 1) / BLOCK_ENTRIES<Real> * BLOCK_ENTRIES<Real>;
    if (n == padded && is_read_in_place())
      return body(TileEntries<Logit>{base_ + at, other_ ? other_ + at : nullptr, padded, bits_, at, careful}, n);
    TileCopy<Real>& copy = TileCopy<Real>::of_this_thread();
    const auto load_row = [&](const Logit* from, Real zero, Real* to) {
      for (int64_t i = 0; i < n; ++i) to[i] = load(from[at + i]) - zero;
      std::fill(to + n, to + padded, Real(AWAY));
    };
    load_row(base_, x_zero_, copy.x);
    if (other_) load_row(other_, o_zero_, copy.o);
    body(TileEntries<Real>{copy.x, other_ ? copy.o : nullptr, padded, bits_, at, careful}, n);
  }

  // write(entries, to, set): writes the gradients of the tile's entries to `to`, those kept apart from `set`.
  template <class Write>
  void write(int64_t k, bool careful, Gradient* row, Write write) const {
    on(k, careful, [&](const auto& in, int64_t n) {
      Gradient* const own = row + in.entry;
      Gradient* const to = n == in.n ? own : reinterpret_cast<Gradient*>(TileCopy<Real>::of_this_thread().gradient);
      write(in, to, static_cast<const Real*>(set_.gradient.data() + set_.begin[size_t(k)]));
      if (n != in.n) memcpy(own, to, size_t(n) * sizeof(Gradient));
    });
  }

  // Puts the tile's logits that are kept apart beside each other: best when the tile has just been read.
  void gather(int64_t k) const {
    const int32_t first = set_.begin[size_t(k)];
    if (!bits_ || first == set_.begin[size_t(k) + 1]) return;
    Real *x = set_.x.data() + first, *o = set_.o.data() + first;
    const int64_t begin = k * TILE, end = end_of(k);
    // A padded tile is Real, and its order that of Real.
    const bool in_place = is_read_in_place() && (end - begin) % BLOCK_ENTRIES<Real> == 0;
    for (int64_t at = begin; at < end; at += BLOCK_ENTRIES<Real>) {
      uint64_t apart = block_bits<Real>(bits_, at);
      if (!apart) continue;
      if (in_place) {
        take(apart, base_ + at, x);
        if (other_) take(apart, other_ + at, o);
        continue;
      }
      for (; apart; apart &= apart - 1) {
        *x++ = load(base_[at + __builtin_ctzll(apart)]);
        if (other_) *o++ = load(other_[at + __builtin_ctzll(apart)]);
      }
    }
  }

  int64_t end_of(int64_t k) const { return std::min((k + 1) * TILE, vocab_); }

 private:
  bool is_read_in_place() const { return x_zero_ == 0 && o_zero_ == 0; }

  const int64_t vocab_, count_;
  const int threads_;
  SetScratch<Real>& set_;
  const Logit *base_ = nullptr, *other_ = nullptr;
  const uint64_t* bits_ = nullptr;
  Real x_zero_ = 0, o_zero_ = 0;  // logits are read relative to these
};

}  // namespace TNT_ISA
}  // namespace tnt
