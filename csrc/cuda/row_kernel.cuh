// One row, by the blocks of a cluster, each with a slice of the columns. First pass: statistics, as the data arrives.
// Merge: threads of a warp, warps of a block, blocks of the cluster, always in the same order. Second pass: what the
// loss still lacks, and the gradient. ON_CHIP the slices of both rows lie in shared memory by then (sm_90 and later);
// otherwise the second pass reads them again, backwards, as the L2 cache holds what came last. Launches of a sharded
// vocabulary (call.h) are never ON_CHIP: between its passes the devices exchange what they found.
#pragma once

#include <type_traits>

#include "cuda/entry_points.h"
#include "cuda/math.cuh"

namespace tnt {
inline namespace TNT_ISA {

constexpr int MAX_CLUSTER = 16, MAX_WARPS = device::STREAM_THREADS / device::WARP;
constexpr int CHUNKS = 4;  // of the bulk copies: the statistics begin when the first quarter is there

struct RowLaunch {
  int64_t slice;                     // columns of a block, a multiple of 32
  int mask_bytes;                    // of the slice's bits
  int row_bytes;                     // of one row's slice in shared memory (ON_CHIP), alignment included
  const double* inverse_normalizer;  // null: 1
  double* losses;                    // (N) weighted, or null
};

struct RowShared {
  uint64_t arrivals[CHUNKS];
  uint32_t flags;
  Sums sums;  // of the row: no register holds them through the second pass
  RowCoefficients row;
  LoopConstants c;
  float warps[MAX_WARPS][SUMS];
  float peers[MAX_CLUSTER][SUMS];
  float warp_sums[MAX_WARPS][2];
  float peer_sums[MAX_CLUSTER][2];
};
constexpr int SHARED_HEADER = (sizeof(RowShared) + 127) / 128 * 128;

template <class Logit, class Gradient, bool ON_CHIP>
class RowBlock {
 public:
  static constexpr int THREADS = ON_CHIP ? device::ROW_THREADS : device::STREAM_THREADS;
  static constexpr int WARPS = THREADS / device::WARP;
  static constexpr int GROUP = Stored<Logit>::GROUP;
  static constexpr int AHEAD = ON_CHIP ? 1 : 2;  // groups loaded before the first is used

  TNT_DEVICE RowBlock(const RowCall& call, const RowLaunch& launch, int64_t row)
      : p_(call),
        l_(launch),
        s_(*reinterpret_cast<RowShared*>(device::shared_memory())),
        mask_(reinterpret_cast<uint32_t*>(device::shared_memory() + SHARED_HEADER)),
        thread_(device::thread_index()),
        rank_(device::cluster_rank()),
        blocks_(device::cluster_size()),
        index_(row) {
    begin_ = rank_ * l_.slice < p_.vocab ? rank_ * l_.slice : p_.vocab;
    end_ = begin_ + l_.slice < p_.vocab ? begin_ + l_.slice : p_.vocab;
    z_ = static_cast<const Logit*>(p_.logits) + index_ * p_.logits_stride;
    r_ = p_.ref_logits ? static_cast<const Logit*>(p_.ref_logits) + index_ * p_.ref_logits_stride : nullptr;
    g_ = p_.gradient ? static_cast<Gradient*>(p_.gradient) + index_ * p_.gradient_stride : nullptr;
    t_ = {exponent_scale<float>(1 / p_.temperature), float(1 / p_.temperature)};
  }

  TNT_DEVICE void run() {
    label_ = p_.labels[index_];
    weight_ = row_weight<float>(p_, index_);
    if (!is_active(p_, label_, weight_)) return inactive();
    device::cluster_arrive();  // a block must have started before its shared memory is written to
    if (ON_CHIP) begin_copies();
    collect_set();
    if (invalid_) {
      if (ON_CHIP) await_copies(EVERYTHING);  // a block does not leave while copies are on their way to it
      device::cluster_wait();
      return lost();
    }
    if (ON_CHIP && pair_ && !r_copied_) copy_late_reference();
    compute();
  }

 private:
  TNT_DEVICE bool leader() const { return rank_ == 0 && thread_ == 0; }
  // Launches of a sharded vocabulary are never ON_CHIP: what they do is not compiled into those kernels.
  TNT_DEVICE bool is(Kind kind) const { return !(ON_CHIP && is_sharded(kind)) && p_.kind == kind; }
  TNT_DEVICE bool gathers() const { return is(Kind::PARTIAL_SUMS) || is(Kind::FINISH); }
  TNT_DEVICE bool is_kl() const { return tnt::is_kl(row_loss_); }
  TNT_DEVICE bool is_negative() const { return weight_ < 0.0f || (s_.flags & HAS_IDS); }
  // y pushed down in part (kappa = 1 + w) stays in the target: it is neither removed nor an ordinary entry.
  TNT_DEVICE bool is_in_part() const {
    return is_kl() && weight_ < 0.0f && weight_ > -1.0f && !(s_.flags & LABEL_AMONG_IDS);
  }
  TNT_DEVICE bool is_partial(int64_t column) const { return column == label_ - p_.vocab_offset && is_in_part(); }
  TNT_DEVICE float kappa() const { return 1.0f + weight_; }  // of that y
  TNT_DEVICE float log_kappa() const { return log1pf(weight_); }
  TNT_DEVICE bool uniform() const { return smooths_uniformly(p_); }

  // ---- rows that are not computed

  TNT_DEVICE void inactive() {
    if (g_) fill(0.0f);
    if (!leader()) return;
    report_uncomputed(0, 0);
  }

  // A label or an id is out of range.
  TNT_DEVICE void lost() {
    if (g_) fill(gradient_factor() == 0 ? 0.0f : NAN);
    if (!leader()) return;
    report_uncomputed(NAN, factor_ == 0 ? 0.0f : NAN);
  }

  // `value` stands for what the row yields, `counted` for that times the row's factor.
  TNT_DEVICE void report_uncomputed(float value, float counted) {
    if (is(Kind::FUSED) && p_.coefficients) coefficients()[ROW_COEFFICIENTS - 1] = counted;
    if (is(Kind::STATISTICS)) return write_statistics(Sums());
    if (is(Kind::PARTIAL_SUMS)) return write_partial_sums(value, value);
    write_diagnostics(value, NAN, NAN, NAN, NAN);
    write_loss(counted);
  }

  TNT_DEVICE void fill(float value) {
    float x[GROUP];
#pragma unroll
    for (int i = 0; i < GROUP; ++i) x[i] = value;
    for (int64_t base = begin_; base < end_; base += THREADS * GROUP) store_group(base + thread_ * GROUP, x);
  }

  // ---- the row's set: bits of this block's columns

  TNT_DEVICE void collect_set() {
    invalid_ = label_ < 0 || label_ >= p_.vocab_size;
    for (int64_t i = thread_; i < l_.mask_bytes / 4; i += THREADS) mask_[i] = 0;
    if (thread_ == 0) s_.flags = 0;
    device::sync_block();
    if (p_.negative_ids) {
      const int64_t* ids = p_.negative_ids + index_ * p_.negative_ids_stride;
      uint32_t flags = 0;
      for (int64_t k = thread_; k < p_.negative_ids_count; k += THREADS) {
        const int64_t id = ids[k];
        if (id == -1) continue;
        flags |= HAS_IDS | (id < 0 || id >= p_.vocab_size ? ID_OUTSIDE : 0) | (id == label_ ? LABEL_AMONG_IDS : 0);
        mark(id);
      }
      if (flags) device::atomic_or(&s_.flags, flags);
      device::sync_block();
    }
    const uint32_t flags = s_.flags;
    invalid_ |= (flags & ID_OUTSIDE) != 0;
    const bool negative = is_negative();
    row_loss_ = negative ? p_.negative_loss : p_.positive_loss;
    pair_ = is_kl();
    factor_ = row_factor<float>(p_, index_, row_loss_, negative, weight_);
    set_ = negative || row_loss_ == LOG_LIKELIHOOD;
    if ((weight_ < 0.0f || row_loss_ == LOG_LIKELIHOOD) && thread_ == 0) mark(label_);
    device::sync_block();
  }

  // Whether an id of the whole vocabulary is one of these columns. Any 64-bit number may come.
  TNT_DEVICE bool here(int64_t id) const { return id >= p_.vocab_offset && id < p_.vocab_offset + p_.vocab; }

  // Ids that another block or device holds, or that lie outside, are not marked.
  TNT_DEVICE void mark(int64_t id) {
    const int64_t at = here(id) ? id - p_.vocab_offset - begin_ : -1;
    if (at >= 0 && at < end_ - begin_) device::atomic_or(mask_ + at / 32, 1u << (at & 31));
  }

  // ---- reading. Element v belongs to a thread by v alone, wherever the row begins in memory: equal rows give equal
  // sums. A misaligned group is joined from the two aligned vectors that hold it.

  TNT_DEVICE static int misalignment(const void* at) { return int(reinterpret_cast<uintptr_t>(at) & 15); }

  TNT_DEVICE char* slot(bool reference) const {
    return device::shared_memory() + SHARED_HEADER + l_.mask_bytes + (reference ? l_.row_bytes : 0);
  }

  TNT_DEVICE float element(const Logit* row, bool reference, int64_t v) const {
    if (!ON_CHIP) return Stored<Logit>::load(row + v);
    const char* at = slot(reference) + misalignment(row + begin_) + (v - begin_) * int(sizeof(Logit));
    return Stored<Logit>::load(reinterpret_cast<const Logit*>(at));
  }

  TNT_DEVICE Vector load_group(const Logit* row, bool reference, int64_t v) const {
    const int offset = misalignment(row + begin_);
    if (ON_CHIP) {  // the slot has room for the vector that a last group reads too much
      const char* at = slot(reference) + (v - begin_) * int(sizeof(Logit));
      const Vector low = device::load_vector(at);
      return offset == 0 ? low : join(low, device::load_vector(at + 16), offset);
    }
    if (v + GROUP <= p_.vocab) {
      if (offset == 0) return device::load_vector(row + v);
      const Logit* at = row + v - offset / int(sizeof(Logit));
      if (at >= row && at + 2 * GROUP <= row + p_.vocab)
        return join(device::load_vector(at), device::load_vector(at + GROUP), offset);
    }
    float x[GROUP];  // an edge of the row: nothing outside it is read
#pragma unroll
    for (int i = 0; i < GROUP; ++i) x[i] = v + i < p_.vocab ? Stored<Logit>::load(row + v + i) : 0.0f;
    return Stored<Logit>::pack(x);
  }

  // body(v, z, r) for the groups of this thread. All threads of a warp make the same calls, for v >= end_ too.
  template <bool BACKWARDS, class Body>
  TNT_DEVICE void for_each_group(Body body) {
    const int64_t stride = THREADS * GROUP, steps = (end_ - begin_ + stride - 1) / stride;
    for (int64_t k = 0; k < steps; k += AHEAD) {
      if (ON_CHIP && !BACKWARDS) await_copies((k + 1) * THREADS * 16 + 16);
      Vector z[AHEAD] = {}, r[AHEAD] = {};
#pragma unroll
      for (int a = 0; a < AHEAD; ++a) {
        const int64_t v = group_at(k + a, steps, BACKWARDS);
        if (k + a >= steps || v >= end_) continue;
        z[a] = load_group(z_, false, v);
        if (pair_) r[a] = load_group(r_, true, v);
      }
#pragma unroll
      for (int a = 0; a < AHEAD; ++a)
        if (k + a < steps) body(group_at(k + a, steps, BACKWARDS), z[a], r[a]);
    }
  }
  TNT_DEVICE int64_t group_at(int64_t step, int64_t steps, bool backwards) const {
    return begin_ + ((backwards ? steps - 1 - step : step) * THREADS + thread_) * GROUP;
  }

  // The bits of a group's entries that are in the set, or no entries at all.
  TNT_DEVICE uint32_t set_bits(int64_t v) const {
    if (!set_ || v >= end_) return 0;
    const int64_t at = v - begin_;
    return mask_[at / 32] >> (at & 31) & ((1u << GROUP) - 1);
  }
  TNT_DEVICE uint32_t outside_bits(int64_t v) const {
    constexpr uint32_t all = (1u << GROUP) - 1;
    const int64_t left = end_ - v;
    return left >= GROUP ? 0 : left <= 0 ? all : all & ~((1u << left) - 1);
  }

  // ---- bulk copies: the aligned inside of a slice; its edges, less than 16 bytes each, go by hand

  struct Inside {
    const char *from, *to;  // aligned
  };
  TNT_DEVICE Inside inside(const Logit* row) const {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(row + begin_), end = reinterpret_cast<uintptr_t>(row + end_);
    const uintptr_t from = (begin + 15) / 16 * 16, to = end / 16 * 16;
    return {reinterpret_cast<const char*>(from), reinterpret_cast<const char*>(to < from ? from : to)};
  }
  TNT_DEVICE uint32_t chunk_bytes() const { return uint32_t(l_.row_bytes / CHUNKS + 15) / 16 * 16; }

  // Where in the slot, and how much, chunk k of a row's inside is.
  TNT_DEVICE uint32_t copy_chunk(const Logit* row, bool reference, int k, bool issue) {
    const Inside in = inside(row);
    const int64_t at = int64_t(k) * chunk_bytes(), left = in.to - in.from - at;
    const uint32_t bytes = left <= 0 ? 0 : left < chunk_bytes() ? uint32_t(left) : chunk_bytes();
    const int64_t head = in.from - (reinterpret_cast<const char*>(row + begin_) - misalignment(row + begin_));
    if (issue && bytes) device::bulk_copy(slot(reference) + head + at, in.from + at, bytes, s_.arrivals + k);
    return bytes;
  }
  TNT_DEVICE void copy_edges(const Logit* row, bool reference) {
    const Inside in = inside(row);
    Logit* to = reinterpret_cast<Logit*>(slot(reference) + misalignment(row + begin_));
    for (int64_t i = thread_; begin_ + i < end_ && reinterpret_cast<const char*>(row + begin_ + i) < in.from;
         i += THREADS)
      to[i] = row[begin_ + i];
    for (int64_t i = end_ - 1 - thread_; i >= begin_ && reinterpret_cast<const char*>(row + i) >= in.to &&
                                         reinterpret_cast<const char*>(row + i) >= in.from;
         i -= THREADS)
      to[i - begin_] = row[i];
  }

  // The reference is on its way at once if both kinds of rows read it; otherwise when it is known that this row does.
  TNT_DEVICE void begin_copies() {
    r_copied_ = tnt::is_kl(p_.positive_loss) && tnt::is_kl(p_.negative_loss);
    if (thread_ == 0) {
      for (int k = 0; k < CHUNKS; ++k) device::arrival_init(s_.arrivals + k, r_copied_ ? 1 : 2);
      device::arrival_fence();
      for (int k = 0; k < CHUNKS; ++k) {
        uint32_t bytes = copy_chunk(z_, false, k, false);
        if (r_copied_) bytes += copy_chunk(r_, true, k, false);
        device::arrival_expect(s_.arrivals + k, bytes);
        copy_chunk(z_, false, k, true);
        if (r_copied_) copy_chunk(r_, true, k, true);
      }
    }
    copy_edges(z_, false);
    if (r_copied_) copy_edges(r_, true);
  }
  TNT_DEVICE void copy_late_reference() {
    copy_edges(r_, true);
    if (thread_ == 0) {
      for (int k = 0; k < CHUNKS; ++k) {
        device::arrival_expect(s_.arrivals + k, copy_chunk(r_, true, k, false));
        copy_chunk(r_, true, k, true);
      }
    }
    r_copied_ = true;
    device::sync_block();
  }
  // Until the first `bytes` of both slots are there.
  static constexpr int64_t EVERYTHING = int64_t(1) << 40;
  TNT_DEVICE void await_copies(int64_t bytes) {
    if (!r_copied_ && ready_ == 0 && thread_ == 0)  // the reference stays away
      for (int k = 0; k < CHUNKS; ++k) device::arrival_expect(s_.arrivals + k, 0);
    for (; ready_ < CHUNKS && int64_t(ready_) * chunk_bytes() < bytes; ++ready_)
      device::arrival_wait(s_.arrivals + ready_);
  }

  // ---- writing. Neighbouring lanes hold neighbouring groups: where groups straddle the aligned vectors, a lane gets
  // the beginning of its vector from the lane below.

  TNT_DEVICE void store_group(int64_t v, const float (&g)[GROUP]) {
    if constexpr (!std::is_same_v<Gradient, Logit>) return store_narrow_group(v, g);
    const Vector x = Stored<Logit>::pack(g);
    const int offset = misalignment(g_ + begin_);
    if (offset == 0) {
      if (v + GROUP <= end_) return device::store_vector(g_ + v, x);
      return store_entries(v, x, 0, GROUP);
    }
    Vector below;
#pragma unroll
    for (int i = 0; i < 4; ++i) below.words[i] = device::shuffle_up(x.words[i]);
    const int lane = thread_ % device::WARP, first = GROUP - offset / int(sizeof(Gradient));
    const bool whole = lane > 0 && v + first <= end_, next_whole = lane < device::WARP - 1 && v + GROUP + first <= end_;
    if (whole) device::store_vector(g_ + v + first - GROUP, join(below, x, 16 - offset));
    if (!whole) store_entries(v, x, 0, first);
    if (!next_whole) store_entries(v, x, first, GROUP);
  }
  TNT_DEVICE void store_entries(int64_t v, const Vector& x, int from, int to) {
#pragma unroll
    for (int i = 0; i < GROUP; ++i) {
      if (i < from || i >= to || v + i >= end_) continue;
      store_entry(g_ + v, x, i);
    }
  }
  // bfloat16 of float32 logits. Rows that begin elsewhere than at a multiple of 8 bytes are not worth lanes that help
  // each other: it is the library that makes room for these gradients.
  TNT_DEVICE void store_narrow_group(int64_t v, const float (&g)[GROUP]) {
    const uint32_t low = device::floats_to_bfloats(g[0], g[1]), high = device::floats_to_bfloats(g[2], g[3]);
    if (misalignment(g_ + v) % 8 == 0 && v + GROUP <= end_) return device::store_half_vector(g_ + v, low, high);
    store_entries(v, {{low, high, 0, 0}}, 0, GROUP);
  }

  // ---- first pass

  TNT_DEVICE void statistics(Sums& sums) {
    const bool moment = row_loss_ == REVERSE_KL && !uniform(), entropy = p_.diagnostics != nullptr;
    const bool total = row_loss_ == LOG_LIKELIHOOD && uniform();
    for_each_group<false>([&](int64_t v, const Vector& zs, const Vector& rs) {
      uint32_t bits = set_bits(v);
      const uint32_t out = outside_bits(v), dead = bits | out;
      float z[GROUP], r[GROUP];
      Stored<Logit>::unpack(zs, z);
      if (pair_) Stored<Logit>::unpack(rs, r);
      if (dead) {
#pragma unroll
        for (int i = 0; i < GROUP; ++i) {
          z[i] = dead >> i & 1 ? -INFINITY : z[i];
          if (pair_) r[i] = dead >> i & 1 ? -INFINITY : r[i];
        }
      }
      float z_top = z[0], r_top = pair_ ? r[0] : LOWEST;
#pragma unroll
      for (int i = 1; i < GROUP; ++i) {
        z_top = fmaxf(z_top, z[i]);
        if (pair_) r_top = fmaxf(r_top, r[i]);
      }
      if (sums.too_low(z_top, r_top, pair_, t_)) sums.raise(z_top, r_top, pair_, t_);
      float weight[GROUP];
#pragma unroll
      for (int i = 0; i < GROUP; ++i) {
        weight[i] = exponential((z[i] - sums.z_max) * t_.exponent);
        sums.z_sum += weight[i];
      }
      if (pair_) {
#pragma unroll
        for (int i = 0; i < GROUP; ++i) sums.r_sum += exponential((r[i] - sums.r_max) * t_.exponent);
      }
      if (moment) {
        const Difference<float> difference(sums.z_max, sums.r_max);
#pragma unroll
        for (int i = 0; i < GROUP; ++i)
          sums.kl_moment += weight[i] == 0.0f ? 0.0f : weight[i] * difference(z[i], r[i]) * t_.inverse_t;
      }
      if (entropy) {
#pragma unroll
        for (int i = 0; i < GROUP; ++i)
          sums.z_moment += weight[i] == 0.0f ? 0.0f : weight[i] * ((z[i] - sums.z_max) * t_.inverse_t);
      }
      sums.kept += float(GROUP - device::count_bits(dead));
      if (total) {
#pragma unroll
        for (int i = 0; i < GROUP; ++i)
          if (!(dead >> i & 1)) sums.total += (z[i] - sums.z_max) * t_.inverse_t;
      }
      for (; bits; bits &= bits - 1) {
        const int64_t at = v + device::lowest_bit(bits);
        const float z_at = element(z_, false, at), r_at = pair_ ? element(r_, true, at) : 0.0f;
        if (is_partial(at))
          sums.add_partial(z_at, r_at, kappa(), log_kappa(), t_);
        else
          sums.add_set(z_at, r_at, pair_, t_);
      }
    });
  }

  // From the threads' sums to those of the row, on the first warp of every block.
  TNT_DEVICE void merge(Sums& sums) {
    const int warp = thread_ / device::WARP, lane = thread_ % device::WARP;
    sums.merge_warp(pair_, set_, t_);
    if (lane == 0) copy(sums, s_.warps[warp]);
    device::sync_block();
    if (warp == 0) {
      sums = Sums();
      if (lane < WARPS) copy(s_.warps[lane], sums);
      sums.merge_warp(pair_, set_, t_);
    }
    device::cluster_wait();  // for what all blocks did at their start
    if (blocks_ == 1) return;
    if (warp == 0 && lane < blocks_) {
      float values[SUMS];
      copy(sums, values);
#pragma unroll
      for (int i = 0; i < SUMS; ++i) device::store_remote(s_.peers[rank_] + i, lane, values[i]);
    }
    device::cluster_arrive();
    device::cluster_wait();
    if (warp == 0) {
      sums = Sums();
      if (lane < blocks_) copy(s_.peers[lane], sums);
      sums.merge_warp(pair_, set_, t_);
    }
  }

  // In place of a first pass: the sums of all shards, in rank order, on the first warp of every block. From 32 shards
  // on, lane 0 holds the sums so far and the others the next shards'.
  TNT_DEVICE void gather(Sums& sums) const {
    if (thread_ >= device::WARP) return;
    for (int64_t first = 0; first < p_.shards; first += device::WARP - 1) {
      const int64_t shard = first + thread_ - 1;
      if (thread_ > 0) sums = Sums();
      if (thread_ > 0 && shard < p_.shards) {
        const float* const at = static_cast<const float*>(p_.gathered) + shard * p_.gathered_stride;
        sums.unpack(at + index_ * ROW_STATISTICS);
      }
      sums.merge_warp(pair_, set_, t_);
    }
  }
  template <class From, class To>
  TNT_DEVICE static void copy(const From& from, To& to) {
    static_assert(sizeof from >= sizeof(Sums) && sizeof to >= sizeof(Sums));
    const float* values = reinterpret_cast<const float*>(&from);
#pragma unroll
    for (int i = 0; i < SUMS; ++i) reinterpret_cast<float*>(&to)[i] = values[i];
  }

  // Two numbers of every thread, summed over the row in a fixed order, on all threads of all blocks. Once a row.
  struct PartialSums {
    double loss, active;
  };
  TNT_DEVICE PartialSums sum_of_row(float loss, float active) {
    const int warp = thread_ / device::WARP, lane = thread_ % device::WARP;
    loss = sum_of_warp(loss);
    active = sum_of_warp(active);
    if (lane == 0) {
      s_.warp_sums[warp][0] = loss;
      s_.warp_sums[warp][1] = active;
    }
    device::sync_block();
    PartialSums sums{0, 0};
#pragma unroll 1
    for (int w = 0; w < WARPS; ++w) {
      sums.loss += double(s_.warp_sums[w][0]);
      sums.active += double(s_.warp_sums[w][1]);
    }
    if (blocks_ == 1) return sums;
    // Both asked anew, and the loops not unrolled: addresses are else kept in registers through the second pass.
    const int thread = device::thread_index(), rank = device::cluster_rank();
    if (thread < blocks_) {
      device::store_remote(s_.peer_sums[rank], thread, float(sums.loss));
      device::store_remote(s_.peer_sums[rank] + 1, thread, float(sums.active));
    }
    device::cluster_arrive();
    device::cluster_wait();
    sums = {0, 0};
#pragma unroll 1
    for (int b = 0; b < blocks_; ++b) {
      sums.loss += double(s_.peer_sums[b][0]);
      sums.active += double(s_.peer_sums[b][1]);
    }
    return sums;
  }

  // ---- second pass: what the loss still lacks (this thread's part), and the gradient if `write`

  TNT_DEVICE float second_pass(bool write) {
    if (!is_kl()) return second_pass<LOG_LIKELIHOOD, false>(write);
    if (uniform())
      return row_loss_ == FORWARD_KL ? second_pass<FORWARD_KL, true>(write) : second_pass<REVERSE_KL, true>(write);
    return row_loss_ == FORWARD_KL ? second_pass<FORWARD_KL, false>(write) : second_pass<REVERSE_KL, false>(write);
  }

  // LOG_LIKELIHOOD stands for all losses that do not read the reference.
  template <int LOSS, bool smooth>
  TNT_DEVICE float second_pass(bool write) {
    const LoopConstants c = s_.c;
    constexpr bool forward = LOSS == FORWARD_KL, kl = LOSS != LOG_LIKELIHOOD;
    float loss = 0.0f;
    for_each_group<true>([&](int64_t v, const Vector& zs, const Vector& rs) {
      uint32_t bits = set_bits(v);
      const uint32_t out = outside_bits(v), dead = bits | out;
      float z[GROUP], r[GROUP], g[GROUP];
      Stored<Logit>::unpack(zs, z);
      if (kl) Stored<Logit>::unpack(rs, r);
      if constexpr (!kl) {
#pragma unroll
        for (int i = 0; i < GROUP; ++i)
          g[i] = fused_multiply_add(c.weight, exponential((z[i] - c.kept_max) * c.t.exponent), c.bias);
      } else if constexpr (smooth) {
#pragma unroll
        for (int i = 0; i < GROUP; ++i) {
          const bool partial = is_partial(v + i), removed = (bits >> i & 1) && !partial;
          const Element<float> e =
              uniform_element(s_.c, forward, z[i], removed ? -INFINITY : r[i], partial ? kappa() : 1.0f);
          if (!(out >> i & 1)) loss += e.loss;
          g[i] = e.gradient * c.scale;
        }
      } else {
        if (dead) {
#pragma unroll
          for (int i = 0; i < GROUP; ++i) {
            z[i] = dead >> i & 1 ? s_.c.z_removed : z[i];
            r[i] = dead >> i & 1 ? s_.c.r_removed : r[i];
          }
        }
        loss += kl_group<forward>(c, z, r, g);
      }
      if constexpr (!smooth) {
        for (; bits; bits &= bits - 1) {
          const int i = device::lowest_bit(bits);
          const float z_i = element(z_, false, v + i);
          float g_i;
          if (kl && is_partial(v + i)) {
            const Element<float> e = kl_element(s_.c, forward, z_i, element(r_, true, v + i), kappa(), log_kappa());
            loss += e.loss;
            g_i = e.gradient * c.scale;
          } else {
            g_i = set_element(s_.c, row_loss_, z_i, loss);
          }
#pragma unroll
          for (int k = 0; k < GROUP; ++k) g[k] = k == i ? g_i : g[k];
        }
      }
      if (write) store_group(v, g);
    });
    return loss;
  }

  // While |d| < BOUNDED on the whole group, e^d needs no second exponential of its own.
  template <bool forward>
  TNT_DEVICE static float kl_group(const LoopConstants& c, const float (&z)[GROUP], const float (&r)[GROUP],
                                   float (&g)[GROUP]) {
    float loss = 0.0f, largest = 0.0f;
    const float max = forward ? c.q_max : c.kept_max, inverse = forward ? c.q_inverse : c.kept_inverse;
#pragma unroll
    for (int i = 0; i < GROUP; ++i) {
      const float share = exponential(((forward ? r[i] : z[i]) - max) * c.t.exponent) * inverse;
      const float x = c.difference(z[i], r[i]) * c.t.inverse_t, d = x + c.offset;
      largest = fmaxf(largest, fabsf(d));
      const Element<float> e = forward ? forward_kl_element(share, d) : reverse_kl_element(share, d, x - c.kl_centre);
      loss += e.loss;
      g[i] = e.gradient * c.scale;
    }
    if (largest < float(BOUNDED) && loss == loss) return loss;
    loss = 0.0f;
#pragma unroll
    for (int i = 0; i < GROUP; ++i) {
      const Element<float> e = kl_element(c, forward, z[i], r[i], 1.0f, 0.0f);
      loss += e.loss;
      g[i] = e.gradient * c.scale;
    }
    return loss;
  }

  // Σ log p_s of NL and the number of tokens above the floor, this thread's part.
  TNT_DEVICE void negative_likelihood(float& loss, float& active) {
    const LoopConstants& c = s_.c;
    for (int64_t w = thread_; w < l_.mask_bytes / 4; w += THREADS) {
      for (uint32_t bits = mask_[w]; bits; bits &= bits - 1) {
        const float z = element(z_, false, begin_ + w * 32 + device::lowest_bit(bits));
        const float log_weight = (z - c.p_max) * c.t.inverse_t;
        const bool rests = log_weight < c.least;
        loss += rests ? float(p_.nl_floor) : log_weight - c.p_log_sum;
        active += rests ? 0.0f : 1.0f;
      }
    }
  }

  // ---- what a launch does

  TNT_DEVICE double gradient_factor() const {
    double scale = double(factor_) * (l_.inverse_normalizer ? *l_.inverse_normalizer : 1.0) / p_.temperature;
    if (factor_ == 0.0f || row_loss_ == NONE) scale = invalid_ ? double(factor_) : 0;
    if (is(Kind::BACKWARD)) scale = double(coefficients()[ROW_COEFFICIENTS - 1]);
    if (!p_.upstream) return scale;
    const float upstream = static_cast<const float*>(p_.upstream)[index_ * p_.upstream_stride];
    return scale == 0 || upstream == 0.0f ? 0 : scale * double(upstream);
  }

  TNT_DEVICE RowScalars scalars() const {
    RowScalars row;
    row.loss = row_loss_;
    row.uniform = uniform();
    row.eps = p_.eps;
    row.nl_floor = p_.nl_floor;
    row.inverse_temperature = 1 / p_.temperature;
    row.vocab = p_.vocab_size;
    row.set_size = p_.vocab_size - int64_t(s_.sums.kept);  // exact below 2^24 columns
    return row;
  }

  // The steps of a row, of which every kind of launch leaves out some.
  TNT_DEVICE void compute() {
    const bool counts = !is(Kind::BACKWARD) && (row_loss_ != NONE || p_.diagnostics);
    Sums sums;
    if (counts && !gathers()) {
      statistics(sums);
      merge(sums);
    } else {
      if (ON_CHIP) await_copies(EVERYTHING);
      device::cluster_wait();
      if (counts && gathers()) gather(sums);
    }
    if (is(Kind::STATISTICS)) {
      if (leader()) write_statistics(sums);
      return;
    }
    if (thread_ == 0) {
      s_.sums = sums;
      s_.row = counts ? row_coefficients<float>(scalars(), sums.statistics()) : RowCoefficients();
      if (is(Kind::BACKWARD)) read_coefficients();
      if (is(Kind::FINISH)) add_total_sums();
      s_.c.fill(s_.row, scalars(), gradient_factor());
    }
    device::sync_block();
    const bool write = g_ && s_.c.scale != 0.0f && s_.c.scale == s_.c.scale;
    const bool lacks = !is(Kind::BACKWARD) && !is(Kind::FINISH);  // a part of the loss
    const bool kl = lacks && is_kl(), waits = kl && row_loss_ == REVERSE_KL && uniform();
    if (lacks && row_loss_ == NEGATIVE_LIKELIHOOD) {
      float loss = 0.0f, active = 0.0f;
      negative_likelihood(loss, active);
      const PartialSums row = sum_of_row(loss, active);
      if (leader()) write_partial_sums(row.loss, row.active);
      if (thread_ == 0) {
        s_.row.loss += row.loss;
        // Without a floor, which would have the gradient wait, the other shards' tokens are active too.
        set_active(is(Kind::PARTIAL_SUMS) ? double(scalars().set_size) : row.active);
        s_.c.fill(s_.row, scalars(), gradient_factor());
      }
      device::sync_block();
    } else if (!kl && leader()) {
      write_partial_sums(0, 0);
    }
    // Pass 0 sums the loss, and writes unless the gradient needs the KL first; pass 1 writes alone.
    const int end = write && (waits || !kl) ? 2 : 1;
    for (int pass = kl ? 0 : 1; pass < end; ++pass) {
      const float loss = second_pass(write && (pass == 1 || !waits));
      if (pass == 1) break;
      const double part = sum_of_row(loss, 0.0f).loss;
      if (leader()) write_partial_sums(part, 0);
      if (thread_ == 0) s_.c.loss = float(s_.row.loss += part);
      if (waits) device::sync_block();
    }
    device::sync_block();  // for the loss, and behind the row's stores
    float scale = s_.c.scale;
    if (scale != 0.0f && is_lost(row_loss_, s_.row)) scale = NAN;
    if (g_ && (scale == 0.0f || scale != scale)) fill(scale == 0.0f ? 0.0f : NAN);
    if (!leader() || is(Kind::BACKWARD)) return;
    if (p_.coefficients) write_coefficients(scale);
    if (p_.diagnostics) {
      const double pushed_part = is_in_part() ? -double(weight_) : 0;
      const RowDiagnosis d = diagnose(s_.sums.statistics(), is_negative(), is_kl(), pushed_part, 1 / p_.temperature);
      write_diagnostics(s_.row.loss, is_kl() ? s_.row.loss : NAN, d.negative_mass, d.ref_negative_mass, d.entropy);
    }
    write_loss(factor_ == 0.0f || row_loss_ == NONE ? 0 : double(factor_) * s_.row.loss);
  }

  TNT_DEVICE void add_total_sums() {
    const float* const sum = static_cast<const float*>(p_.total_sums) + index_ * ROW_PARTIAL_SUMS;
    s_.row.loss += double(sum[0]);
    if (row_loss_ == NEGATIVE_LIKELIHOOD) set_active(double(sum[1]));
  }
  TNT_DEVICE void set_active(double tokens) {
    s_.row.weight *= tokens;
    s_.row.set_value = tokens;
  }

  // ---- results

  TNT_DEVICE float* coefficients() const {
    static_assert(sizeof(RowCoefficients) == (ROW_COEFFICIENTS - 1) * sizeof(double));
    return static_cast<float*>(p_.coefficients) + index_ * ROW_COEFFICIENTS;
  }
  TNT_DEVICE void read_coefficients() {
    double* const values = reinterpret_cast<double*>(&s_.row);
    for (int i = 0; i < ROW_COEFFICIENTS - 1; ++i) values[i] = double(coefficients()[i]);
  }
  TNT_DEVICE void write_coefficients(float scale) const {
    const double* const values = reinterpret_cast<const double*>(&s_.row);
    for (int i = 0; i < ROW_COEFFICIENTS - 1; ++i) coefficients()[i] = float(values[i]);
    coefficients()[ROW_COEFFICIENTS - 1] = scale;
  }

  TNT_DEVICE void write_statistics(const Sums& sums) const {
    sums.pack(static_cast<float*>(p_.statistics) + index_ * ROW_STATISTICS);
  }
  TNT_DEVICE void write_partial_sums(double loss, double active) const {
    if (!is(Kind::PARTIAL_SUMS)) return;
    float* const to = static_cast<float*>(p_.partial_sums) + index_ * ROW_PARTIAL_SUMS;
    to[0] = float(loss);
    to[1] = float(active);
  }

  TNT_DEVICE void write_loss(double weighted) const { tnt::write_loss(p_, l_.losses, index_, weighted); }

  TNT_DEVICE void write_diagnostics(double loss, double kl, double mass, double ref_mass, double entropy) const {
    if (!p_.diagnostics) return;
    float* at = static_cast<float*>(p_.diagnostics) + index_;
    at[0] = float(loss);
    at[p_.rows] = float(kl);
    at[2 * p_.rows] = float(mass);
    at[3 * p_.rows] = float(ref_mass);
    at[4 * p_.rows] = float(entropy);
  }

  const RowCall& p_;
  const RowLaunch& l_;
  RowShared& s_;
  uint32_t* const mask_;
  const int thread_, rank_, blocks_;
  const int64_t index_;
  int64_t begin_, end_;
  const Logit *z_, *r_;
  Gradient* g_;
  Scales t_;
  int64_t label_ = 0;
  float weight_ = 1, factor_ = 1;
  int row_loss_ = NONE, ready_ = 0;
  bool invalid_ = false, pair_ = false, set_ = false, r_copied_ = false;
};

}  // namespace TNT_ISA
}  // namespace tnt
