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

// Replaces the entries whose bits are set.
template <class Logit, class Real>
TNT_FN void leave_out(const BlockMasks<Logit>& masks, Vector<Real> (&x)[4], Real by) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) x[j] = select(masks[j], same(by), x[j]);
}

// Stores a pair in the order in which load_pair has it.
template <class Logit, class Gradient, class Real>
TNT_FN void store_as_loaded(Gradient* to, Vector<Real> a, Vector<Real> b) {
  if constexpr (std::is_same_v<Logit, BFloat16>)
    store_even_and_odd(to, {a, b});
  else
    store_pair(to, Pair<Real>{a, b});
}

template <class Logit, class Gradient, class Real>
TNT_FN void put(Gradient* to, const Vector<Real> (&g)[4]) {
  store_as_loaded<Logit, Gradient, Real>(to, g[0], g[1]);
  store_as_loaded<Logit, Gradient, Real>(to + 2 * LANES<Real>, g[2], g[3]);
}

// A tile's entries, a multiple of a block's, from `entry` of the row on; the bits of those kept apart are set.
template <class Logit>
struct TileEntries {
  const Logit *base, *other;  // the other is null where a loss reads one row alone
  int64_t n;
  const uint64_t* bits;  // null if none is
  int64_t entry;
  bool careful;  // of a KL: all blocks are far
  using Real = RealOf<Logit>;
  TNT_FN uint64_t apart(int64_t i) const { return bits ? block_bits<Real>(bits, entry + i) : 0; }
};

// ------------------------------------------------------------------------------------------------------------- tokens

// Those of the bits that are set in words [begin, end), in ascending order.
inline void append_positions(const uint64_t* words, size_t begin, size_t end, std::vector<int32_t>& to) {
  for (size_t i = begin; i < end; ++i)
    for (uint64_t word = words[i]; word; word &= word - 1)
      to.push_back(int32_t(i * 64 + size_t(__builtin_ctzll(word))));
}

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
    append_positions(words_.data(), 0, words_.size(), ids);
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

// One of a row's two streams of logits. Of a call with differences, the policy's is their sum with the reference's.
template <class Logit>
struct Stream {
  const Logit* at = nullptr;
  const Logit* addend = nullptr;  // null where `at` has the logits themselves
  TNT_FN RealOf<Logit> operator[](int64_t i) const { return addend ? load(at[i]) + load(addend[i]) : load(at[i]); }
};

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

// Of a row: the entries that are kept apart, in ascending order, and what a first pass saves for the second.
template <class Real>
struct TileScratch {
  std::vector<uint64_t> bits;        // of the row that it was made for: often the next one has the same
  std::vector<int32_t> columns;      // where the entries are
  std::vector<size_t> begin;         // of every tile, and the end of the last
  std::vector<Real> x, o, gradient;  // their logits, and their gradients of any type that is stored
  std::vector<Real> saved;

  void find(const uint64_t* row_bits, int64_t vocab) {
    constexpr size_t TILE_WORDS = TILE_ENTRIES<Real> / 64;
    const size_t words = size_t(vocab + 63) / 64;
    if (bits.size() == words && std::equal(bits.begin(), bits.end(), row_bits)) return;
    bits.assign(row_bits, row_bits + words);
    columns.clear();
    begin.assign(1, 0);
    for (size_t word = 0; word < words; word += TILE_WORDS) {
      append_positions(row_bits, word, std::min(words, word + TILE_WORDS), columns);
      begin.push_back(columns.size());
    }
    const size_t room = columns.size() + 2 * LANES<Real>;  // they are computed in pairs of vectors
    for (std::vector<Real>* const array : {&x, &o, &gradient})
      if (array->size() < room) array->resize(room);
  }
};

template <class Logit, class Gradient>
class RowTiles {
 public:
  using Real = RealOf<Logit>;
  static constexpr int64_t TILE = TILE_ENTRIES<Real>;

  RowTiles(int64_t vocab, int threads, TileScratch<Real>& scratch)
      : vocab_(vocab),
        count_((vocab + TILE - 1) / TILE),
        threads_(int(std::max<int64_t>(1, std::min<int64_t>(threads, count_ / LEAST_TILES)))),
        s_(scratch) {}

  static constexpr size_t MOST_SAVED = 1 << 20;  // bytes
  static constexpr int LEAST_TILES = 4;          // of a thread, below which waking it takes longer than they do

  // A row of one or two streams of logits; `apart`: the bits of the entries kept apart, null if there are none.
  void begin(const Stream<Logit>& base, const Stream<Logit>& other, const uint64_t* apart) {
    base_ = base, other_ = other, bits_ = apart;
    read_relative_to(0, 0);
    if (bits_) s_.find(bits_, vocab_);
  }
  void read_relative_to(Real x_zero, Real o_zero) { x_zero_ = x_zero, o_zero_ = o_zero; }

  // Room for some numbers of every entry, which a first pass saves for the second: what a cache holds is read in less
  // time than it is computed again. With vectors of 16 floats that holds for the two of a 16-bit KL alone.
  void save(int numbers) {
    const bool is_worth = FLOATS < 16 || (numbers == 2 && sizeof(Logit) == 2);
    const size_t size = size_t(numbers * count_ * TILE);
    saved_ = is_worth && size * sizeof(Real) <= MOST_SAVED ? numbers : 0;
    if (saved_ && s_.saved.size() < size) s_.saved.resize(size);
  }
  // Null if they are not saved.
  Real* saved(int64_t k) const { return saved_ ? s_.saved.data() + saved_ * k * TILE : nullptr; }

  int64_t count() const { return count_; }
  int64_t set_size() const { return bits_ ? int64_t(s_.columns.size()) : 0; }
  Gradient* set_gradient() const { return reinterpret_cast<Gradient*>(s_.gradient.data()); }
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
    const int64_t at = k * TILE, n = end_of(k) - at, padded = padded_size(k);
    const uint64_t* const bits = apart_begin(k) == apart_begin(k + 1) ? nullptr : bits_;
    if (is_read_in_place(k))
      return body(TileEntries<Logit>{base_.at + at, other_.at ? other_.at + at : nullptr, padded, bits, at, careful},
                  n);
    TileCopy<Real>& copy = TileCopy<Real>::of_this_thread();
    load(base_, x_zero_, at, n, padded, copy.x);
    if (other_.at) load(other_, o_zero_, at, n, padded, copy.o);
    body(TileEntries<Real>{copy.x, other_.at ? copy.o : nullptr, padded, bits, at, careful}, n);
  }

  // write(entries, to): writes the gradients of the tile's entries to `to`.
  template <class Write>
  void write(int64_t k, bool careful, Gradient* row, Write write) const {
    to_row(k, row, [&](Gradient* to) { on(k, careful, [&](const auto& in, int64_t) { write(in, to); }); });
  }

  // write(saved, n, stored, to): the same from what the first pass saved of n entries, which it read as `stored` is.
  template <class Write>
  void write_saved(int64_t k, Gradient* row, Write write) const {
    to_row(k, row, [&](Gradient* to) {
      is_read_in_place(k) ? write(saved(k), padded_size(k), Logit{}, to) : write(saved(k), padded_size(k), Real{}, to);
    });
  }

  // Writes the gradients of the tile's entries that are kept apart, over whatever is there.
  void scatter(int64_t k, Gradient* row) const {
    const Gradient* const apart = set_gradient();
    // A copy of bits: processors store twice as many integers a cycle as floats.
    each_apart(k, [&](int64_t column, size_t i) { memcpy(row + column, apart + i, sizeof(Gradient)); });
  }

  // Puts the tile's logits that are kept apart beside each other: best when the tile has just been read.
  void gather(int64_t k) const {
    Real *const x = s_.x.data(), *const o = s_.o.data();
    each_apart(k, [&](int64_t column, size_t i) {
      x[i] = base_[column];
      if (other_.at) o[i] = other_[column];
    });
  }

  int64_t end_of(int64_t k) const { return std::min((k + 1) * TILE, vocab_); }

 private:
  // n entries from `at` on, and such that weigh nothing up to `padded`. One copy of this code, not one a loop over
  // tiles.
  __attribute__((noinline)) static void load(const Stream<Logit>& row, Real zero, int64_t at, int64_t n, int64_t padded,
                                             Real* to) {
    const Logit* const from = row.at + at;
    if (row.addend) {
      const Logit* const addend = row.addend + at;
      for (int64_t i = 0; i < n; ++i) to[i] = (tnt::load(from[i]) + tnt::load(addend[i])) - zero;
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = tnt::load(from[i]) - zero;
    }
    std::fill(to + n, to + padded, Real(AWAY));
  }

  size_t apart_begin(int64_t k) const { return bits_ ? s_.begin[size_t(k)] : 0; }
  template <class Body>
  TNT_FN void each_apart(int64_t k, Body body) const {
    const int32_t* const columns = s_.columns.data();
    for (size_t i = apart_begin(k), end = apart_begin(k + 1); i < end; ++i) body(columns[i], i);
  }
  int64_t padded_size(int64_t k) const {  // of a tile, in whole blocks
    return (end_of(k) - k * TILE + BLOCK_ENTRIES<Real> - 1) / BLOCK_ENTRIES<Real> * BLOCK_ENTRIES<Real>;
  }
  bool is_whole(int64_t k) const { return k * TILE + padded_size(k) == end_of(k); }
  bool is_read_in_place(int64_t k) const {
    return x_zero_ == 0 && o_zero_ == 0 && !base_.addend && !other_.addend && is_whole(k);
  }

  // write(to), which writes whole blocks, where they end beyond the row by way of a copy.
  template <class Write>
  void to_row(int64_t k, Gradient* row, Write write) const {
    Gradient* const own = row + k * TILE;
    if (is_whole(k)) return write(own);
    Gradient* const copy = reinterpret_cast<Gradient*>(TileCopy<Real>::of_this_thread().gradient);
    write(copy);
    memcpy(own, copy, size_t(end_of(k) - k * TILE) * sizeof(Gradient));
  }

  const int64_t vocab_, count_;
  const int threads_;
  TileScratch<Real>& s_;
  Stream<Logit> base_, other_;
  const uint64_t* bits_ = nullptr;
  Real x_zero_ = 0, o_zero_ = 0;  // logits are read relative to these
  int saved_ = 0;                 // numbers of an entry
};

}  // namespace TNT_ISA
}  // namespace tnt
