// Any row and any launch, in passes over memory: what kl_kernel does not serve or leaves, gradients that have waited
// for their factor, shards of a vocabulary, devices without clusters. A first pass sums a slice a block, as the CPU
// does with its tiles; threads of a warp, warps of a block and blocks of a cluster are merged, always in the same
// order. What follows from the sums is worked out in stream_row.cuh. A second pass writes the gradient, backwards, as
// the L2 cache holds what came last.
#pragma once

#include <type_traits>

#include "cuda/stream_row.cuh"

namespace tnt {
inline namespace TNT_ISA {

constexpr int STREAM_HEADER = (sizeof(StreamRow) + 127) / 128 * 128;

template <class Logit, class Gradient>
class StreamBlock {
 public:
  static constexpr int THREADS = device::STREAM_THREADS, WARPS = THREADS / device::WARP;
  static constexpr int GROUP = Stored<Logit>::GROUP;

  TNT_DEVICE StreamBlock(const RowCall& call, const StreamLaunch& launch, int64_t row)
      : p_(call),
        l_(launch),
        s_(*reinterpret_cast<StreamRow*>(device::shared_memory())),
        mask_(reinterpret_cast<uint32_t*>(device::shared_memory() + STREAM_HEADER)),
        thread_(device::thread_index()),
        rank_(device::cluster_rank()),
        blocks_(device::cluster_size()),
        index_(row) {
    begin_ = rank_ * l_.slice < vocab() ? rank_ * l_.slice : vocab();
    end_ = begin_ + l_.slice < vocab() ? begin_ + l_.slice : vocab();
    z_ = static_cast<const Logit*>(p_.logits) + index_ * p_.logits_stride;
    r_ = p_.ref_logits ? static_cast<const Logit*>(p_.ref_logits) + index_ * p_.ref_logits_stride : nullptr;
    g_ = p_.gradient ? static_cast<Gradient*>(p_.gradient) + index_ * p_.gradient_stride : nullptr;
  }

  TNT_DEVICE void run() {
    const int64_t label = p_.labels[index_];
    const float weight = row_weight<float>(p_, index_);
    if (!is_active(p_, label, weight)) return uncounted();
    device::cluster_arrive();  // a block must have started before its shared memory is written to
    collect_set(label, weight);
    device::cluster_wait();
    if (s_.invalid) return lost();
    if (s_.loss == NONE && !p_.diagnostics) return uncounted();
    if (!conclude()) return;
    if (g_ || sums_loss()) second_passes();
    if (leader() && !is(Kind::BACKWARD) && !is(Kind::PARTIAL_SUMS)) report();
  }

 private:
  TNT_DEVICE int vocab() const { return int(p_.vocab); }  // columns here: no more than 2^19
  TNT_DEVICE bool leader() const { return rank_ == 0 && thread_ == 0; }
  TNT_DEVICE int warp() const { return thread_ / device::WARP; }
  TNT_DEVICE int lane() const { return thread_ % device::WARP; }
  TNT_DEVICE bool is(Kind kind) const { return p_.kind == kind; }
  TNT_DEVICE float scale() const { return l_.scales.exponent; }
  TNT_DEVICE bool here(int64_t id) const { return id >= p_.vocab_offset && id < p_.vocab_offset + p_.vocab; }

  // ---- rows that are not computed

  // Its loss is 0, also where it has none and nobody asks for more.
  TNT_DEVICE void uncounted() {
    if (g_) fill(0.0f);
    if (leader()) report_uncomputed(0, 0);
  }

  // A label or an id is out of range.
  TNT_DEVICE void lost() {
    if (g_) fill(gradient_factor(p_, l_, s_) == 0 ? 0.0f : NAN);
    if (leader()) report_uncomputed(NAN, s_.factor == 0.0f ? 0.0f : NAN);
  }

  // `value` stands for what the row yields, `counted` for that times the row's factor.
  TNT_DEVICE void report_uncomputed(float value, float counted) {
    if (is(Kind::BACKWARD)) return;
    if (is(Kind::FUSED) && p_.coefficients) coefficients()[ROW_COEFFICIENTS - 1] = counted;
    if (is(Kind::STATISTICS)) return pack(RowSums(), false, statistics());
    if (is(Kind::PARTIAL_SUMS)) return write_partial_sums({value, value});
    if (p_.diagnostics) write_diagnostics(p_, index_, value, NAN, RowDiagnosis());
    write_loss(counted);
  }

  TNT_DEVICE void fill(float value) {
    float x[GROUP];
#pragma unroll
    for (int i = 0; i < GROUP; ++i) x[i] = value;
    for (int base = begin_; base < end_; base += THREADS * GROUP) store_group(base + thread_ * GROUP, x);
  }

  // ---- the row's set: bits of this block's columns

  TNT_DEVICE void collect_set(int64_t label, float weight) {
    const bool in_part = weight < 0.0f && weight > -1.0f && is_kl(p_.negative_loss);
    for (int i = thread_; i < l_.mask_bytes / 4; i += THREADS) mask_[i] = 0;
    if (thread_ == 0) s_.flags = 0;
    device::sync_block();
    if (p_.negative_ids) {
      const int64_t* ids = p_.negative_ids + index_ * p_.negative_ids_stride;
      uint32_t flags = 0;
      for (int64_t k = thread_; k < p_.negative_ids_count; k += THREADS) {
        const int64_t id = ids[k];
        if (id == -1) continue;
        flags |= HAS_IDS | (id < 0 || id >= p_.vocab_size ? ID_OUTSIDE : 0) | (id == label ? LABEL_AMONG_IDS : 0);
        mark(id);
      }
      if (flags) device::atomic_or(&s_.flags, flags);
      device::sync_block();
    }
    if (thread_ == 0) {
      const uint32_t flags = s_.flags;
      s_.index = index_, s_.label = label, s_.weight = weight;
      s_.invalid = label < 0 || label >= p_.vocab_size || (flags & ID_OUTSIDE);
      s_.negative = weight < 0.0f || (flags & HAS_IDS);
      s_.loss = s_.negative ? p_.negative_loss : p_.positive_loss;
      s_.factor = row_factor<float>(p_, index_, s_.loss, s_.negative, weight);
      s_.has_set = s_.negative || s_.loss == LOG_LIKELIHOOD;
      s_.has_partial = in_part && !(flags & LABEL_AMONG_IDS);
      s_.has_label = s_.has_partial && here(label);
      // Before a gradient may take their place.
      s_.label_z = s_.has_label ? z_at(int(label - p_.vocab_offset)) : 0.0f;
      s_.label_r = s_.has_label ? r_at(int(label - p_.vocab_offset)) : 0.0f;
      if (weight < 0.0f || s_.loss == LOG_LIKELIHOOD) mark(label);
    }
    device::sync_block();
  }

  // Ids that another block or device holds, or that lie outside, are not marked. Any 64-bit number may come.
  TNT_DEVICE void mark(int64_t id) {
    const int at = here(id) ? int(id - p_.vocab_offset) - begin_ : -1;
    if (at >= 0 && at < end_ - begin_) device::atomic_or(mask_ + at / 32, 1u << (at & 31));
  }

  TNT_DEVICE int partial_column() const { return s_.has_label ? int(s_.label - p_.vocab_offset) : -1; }

  // Calls body(column) for the removed entries among this thread's words. A warp meets afterwards.
  template <class Body>
  TNT_DEVICE void for_each_removed(Body body) const {
    const int partial = partial_column(), end = s_.has_set ? l_.mask_bytes / 4 : 0;
    for (int w = thread_; w < end; w += THREADS) {
      for (uint32_t bits = mask_[w]; bits; bits &= bits - 1) {
        const int column = begin_ + w * 32 + device::lowest_bit(bits);
        if (column != partial) body(column);
      }
    }
    device::sync_warp();
  }

  // ---- reading. Element v belongs to a thread by v alone, wherever the row begins in memory: equal rows give equal
  // sums. A misaligned group is joined from the two aligned vectors that hold it.

  TNT_DEVICE static int misalignment(const void* at) { return int(reinterpret_cast<uintptr_t>(at) & 15); }
  TNT_DEVICE float z_at(int v) const { return Stored<Logit>::load(z_ + v) + (p_.differences ? r_at(v) : 0.0f); }
  TNT_DEVICE float r_at(int v) const { return Stored<Logit>::load(r_ + v); }

  TNT_DEVICE Vector load_group(const Logit* row, int v) const {
    const int offset = misalignment(row + begin_);
    if (v + GROUP <= vocab()) {
      if (offset == 0) return device::load_vector(row + v);
      const Logit* at = row + v - offset / int(sizeof(Logit));
      if (at >= row && at + 2 * GROUP <= row + vocab())
        return join(device::load_vector(at), device::load_vector(at + GROUP), offset);
    }
    float x[GROUP];  // an edge of the row: nothing outside it is read
#pragma unroll
    for (int i = 0; i < GROUP; ++i) x[i] = v + i < vocab() ? Stored<Logit>::load(row + v + i) : 0.0f;
    return Stored<Logit>::pack(x);
  }

  // body(v, group) for the groups of this thread, each loaded before the one in front of it is used; the reference's
  // logits say nothing unless a pair is read, as it is of differences. All threads of a warp make the same calls, for v
  // >= end_ too.
  template <bool BACKWARDS, class Body>
  TNT_DEVICE void for_each_group(bool pair, Body body) {
    constexpr int STRIDE = THREADS * GROUP;
    const int steps = (end_ - begin_ + STRIDE - 1) / STRIDE;
    Vector z{}, r{}, next_z{}, next_r{};
    const auto group_at = [&](int k) { return begin_ + (BACKWARDS ? steps - 1 - k : k) * STRIDE + thread_ * GROUP; };
#pragma unroll 1
    for (int k = -1; k < steps; ++k) {
      z = next_z, r = next_r;
      const int v = group_at(k + 1);
      if (k + 1 < steps && v < end_) {
        next_z = load_group(z_, v);
        if (pair || p_.differences) next_r = load_group(r_, v);
      }
      if (k >= 0) body(group_at(k), pair_of(z, r));
    }
  }

  // The bits of a group's entries that are in the set, or no entries at all.
  TNT_DEVICE uint32_t set_bits(int v) const {
    if (!s_.has_set || v >= end_) return 0;
    const int at = v - begin_;
    return mask_[at / 32] >> (at & 31) & ((1u << GROUP) - 1);
  }
  TNT_DEVICE uint32_t outside_bits(int v) const {
    constexpr uint32_t all = (1u << GROUP) - 1;
    const int left = end_ - v;
    return left >= GROUP ? 0 : left <= 0 ? all : all & ~((1u << left) - 1);
  }

  using Group = KlGroup<GROUP>;
  struct LogitPair {  // a group of both rows
    float z[GROUP], r[GROUP];
  };
  TNT_DEVICE LogitPair pair_of(const Vector& z, const Vector& r) const {
    LogitPair pair;
    Stored<Logit>::unpack(z, pair.z);
    Stored<Logit>::unpack(r, pair.r);
    if (p_.differences) {
#pragma unroll
      for (int i = 0; i < GROUP; ++i) pair.z[i] += pair.r[i];
    }
    return pair;
  }
  template <bool REVERSE>
  TNT_DEVICE static Group group_of(const LogitPair& pair, float x_zero, float o_zero) {
    Group g;
#pragma unroll
    for (int i = 0; i < GROUP; ++i) {
      g.x[i] = (REVERSE ? pair.z[i] : pair.r[i]) - x_zero;
      g.o[i] = (REVERSE ? pair.r[i] : pair.z[i]) - o_zero;
    }
    return g;
  }

  // ---- writing. Neighbouring lanes hold neighbouring groups: where groups straddle the aligned vectors, a lane gets
  // the beginning of its vector from the lane below.

  TNT_DEVICE void store_group(int v, const float (&g)[GROUP]) {
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
    const int lane = this->lane(), first = GROUP - offset / int(sizeof(Gradient));
    const bool whole = lane > 0 && v + first <= end_, next_whole = lane < device::WARP - 1 && v + GROUP + first <= end_;
    if (whole) device::store_vector(g_ + v + first - GROUP, join(below, x, 16 - offset));
    if (!whole) store_entries(v, x, 0, first);
    if (!next_whole) store_entries(v, x, first, GROUP);
  }
  TNT_DEVICE void store_entries(int v, const Vector& x, int from, int to) {
#pragma unroll
    for (int i = 0; i < GROUP; ++i) {
      if (i < from || i >= to || v + i >= end_) continue;
      store_entry(g_ + v, x, i);
    }
  }
  // bfloat16 of float32 logits. Rows that begin elsewhere than at a multiple of 8 bytes are not worth lanes that help
  // each other: it is the library that makes room for these gradients.
  TNT_DEVICE void store_narrow_group(int v, const float (&g)[GROUP]) {
    const uint32_t low = device::floats_to_bfloats(g[0], g[1]), high = device::floats_to_bfloats(g[2], g[3]);
    if (misalignment(g_ + v) % 8 == 0 && v + GROUP <= end_) return device::store_half_vector(g_ + v, low, high);
    store_entries(v, {{low, high, 0, 0}}, 0, GROUP);
  }

  // ---- from the threads' sums to those of the row, on the first warp of every block

  // A loop, as the code of a merge is long.
  TNT_DEVICE void merge(StreamSums& sums) {
    enum Level { OF_LANES, OF_WARPS, OF_BLOCKS };
#pragma unroll 1
    for (int level = OF_LANES; level <= OF_BLOCKS; ++level) {
      if (level == OF_WARPS) {
        if (lane() == 0) copy(sums, s_.warps[warp()]);
        device::sync_block();
        if (warp() > 0) break;
        sums = StreamSums();
        if (lane() < WARPS) copy(s_.warps[lane()], sums);
      } else if (level == OF_BLOCKS) {
        if (blocks_ == 1) break;
        if (lane() < blocks_) {
          float values[STREAM_SUMS];
          copy(sums, values);
#pragma unroll
          for (int i = 0; i < STREAM_SUMS; ++i) device::store_remote(s_.peers[rank_] + i, lane(), values[i]);
        }
        device::cluster_arrive();
        device::cluster_wait();
        sums = StreamSums();
        if (lane() < blocks_) copy(s_.peers[lane()], sums);
      }
      merge_warp(sums);
    }
    if (blocks_ == 1) return;
    if (warp() > 0) {  // the blocks' exchange is the first warps'
      device::cluster_arrive();
      device::cluster_wait();
    }
    // Nobody sends anew until all have read.
    device::cluster_arrive();
    device::cluster_wait();
  }
  TNT_DEVICE void merge_warp(StreamSums& t) const {
    t.s = sum_of_warp(t.s), t.a_or_m = sum_of_warp(t.a_or_m), t.phi = sum_of_warp(t.phi);
    t.a = sum_of_warp(t.a), t.h = sum_of_warp(t.h);
    t.x_top = max_of_warp(t.x_top), t.o_top = max_of_warp(t.o_top);
    if (!s_.has_set) return;
    t.set.merge_warp(scale());
    t.reference_set.merge_warp(scale());
    t.z_broken = sum_of_warp(t.z_broken), t.r_broken = sum_of_warp(t.r_broken);
  }
  template <class From, class To>
  TNT_DEVICE static void copy(const From& from, To& to) {
    static_assert(sizeof from == sizeof(StreamSums) && sizeof to == sizeof(StreamSums));
    const float* values = reinterpret_cast<const float*>(&from);
#pragma unroll
    for (int i = 0; i < STREAM_SUMS; ++i) reinterpret_cast<float*>(&to)[i] = values[i];
  }

  // Two numbers of every thread, summed over the row in a fixed order, on all threads of all blocks. Once a row.
  TNT_DEVICE PartialSums sum_of_row(float loss, float active) {
    loss = sum_of_warp(loss);
    active = sum_of_warp(active);
    if (lane() == 0) {
      s_.warp_sums[warp()][0] = loss;
      s_.warp_sums[warp()][1] = active;
    }
    device::sync_block();
    PartialSums sums;
#pragma unroll 1
    for (int w = 0; w < WARPS; ++w) {
      sums.loss += double(s_.warp_sums[w][0]);
      sums.active += double(s_.warp_sums[w][1]);
    }
    if (blocks_ == 1) return sums;
    if (thread_ < blocks_) {
      device::store_remote(s_.peer_sums[rank_], thread_, float(sums.loss));
      device::store_remote(s_.peer_sums[rank_] + 1, thread_, float(sums.active));
    }
    device::cluster_arrive();
    device::cluster_wait();
    sums = {};
#pragma unroll 1
    for (int b = 0; b < blocks_; ++b) {
      sums.loss += double(s_.peer_sums[b][0]);
      sums.active += double(s_.peer_sums[b][1]);
    }
    return sums;
  }

  // ---- first pass

  // Of some entries all along the row, by one warp: the greatest of either, and how far z lies above r on average, less
  // the distance of these.
  struct Levels {
    float z_top, r_top, above;
  };
  TNT_DEVICE Levels levels(bool pair) const {
    constexpr int SOME = 8;
    float z_top = -INFINITY, r_top = -INFINITY, above = 0.0f;
    if (p_.vocab > 0) {
#pragma unroll
      for (int i = 0; i < SOME; ++i) {
        const int v = int(uint32_t(lane() * SOME + i) * uint32_t(vocab()) / uint32_t(device::WARP * SOME));
        const float z = z_at(v), r = pair ? r_at(v) : 0.0f;
        z_top = fmaxf(z_top, z), r_top = fmaxf(r_top, r), above += z - r;
      }
    }
    z_top = max_of_warp(z_top), r_top = max_of_warp(r_top);
    return {z_top, r_top, sum_of_warp(above) * (1.0f / (device::WARP * SOME)) - (z_top - r_top)};
  }

  // The sums of this slice of the vocabulary, in as many passes as it takes.
  TNT_DEVICE void first_pass() {
    const bool pair = is_kl(s_.loss), reverse = s_.loss == REVERSE_KL, sums_kl = pair && !smooths_uniformly(p_);
    if (warp() == 0) {
      const Levels l = levels(pair);
      if (thread_ == 0) {
        s_.pass = sums_kl ? OF_KL : OF_STREAMS;
        s_.attempt = 0;
        s_.broken = s_.at_maxima = false;
        s_.level_z = finite(l.z_top), s_.level_r = finite(l.r_top);
        const float above = l.above * l_.scales.inverse_t, more = fabsf(above) < 16.0f ? above : 0.0f;
        refer_to(l.z_top, l.r_top, reverse ? -more : more);
        // What a few entries say of levels may come from removed ones.
        if (sums_kl && (s_.shift.x_zero != 0.0f || s_.shift.o_zero != 0.0f)) s_.pass = OF_MAXIMA;
      }
    }
    device::sync_block();
#pragma unroll 1
    for (StreamPass pass = s_.pass; pass != OF_NOTHING; pass = s_.pass) {
      StreamSums sums;
      sum(pass, pair, sums);
      if (pass != OF_MAXIMA && s_.has_set) add_set(pair, sums);
      merge(sums);
      if (thread_ == 0) {
        if (pass == OF_MAXIMA) {
          // A label that is pushed down in part may be all that stays.
          const bool empty = s_.has_label && sums.x_top == -INFINITY && sums.o_top == -INFINITY;
          refer_to(empty ? s_.label_z : sums.x_top, empty ? s_.label_r : sums.o_top, 0.0f);
          s_.level_z = finite(sums.x_top), s_.level_r = finite(sums.o_top);
          s_.at_maxima = true;
          s_.pass = OF_KL;
        } else {
          s_.found = sums;
          if (pass == OF_STREAMS)
            judge_streams(sums, pair, p_.diagnostics, s_);
          else
            reverse ? judge<true>(sums, p_.diagnostics, s_) : judge<false>(sums, p_.diagnostics, s_);
        }
      }
      device::sync_block();
    }
    if (thread_ == 0) {
      describe_streams(p_, !pair ? 1 : sums_kl && !s_.broken ? 0 : 2, s_);
      if (sums_kl) describe_kl(p_, l_, s_);
    }
  }
  TNT_DEVICE void refer_to(float z_top, float r_top, float more) {
    const bool reverse = s_.loss == REVERSE_KL;
    const References at = references_of(reverse ? z_top : r_top, reverse ? r_top : z_top, MOST_APART<Logit>);
    s_.shift = row_shift(at, l_.scales, more);
  }

  // One loop for all kinds of passes, as the code around it is long.
  TNT_DEVICE void sum(StreamPass pass, bool pair, StreamSums& sums) {
    const bool reverse = s_.loss == REVERSE_KL;
    KlSums t;  // of streams: s, h as for a KL, m the other's sum, f the total of differences
    float x_top = -INFINITY, o_top = -INFINITY;
    for_each_group<false>(pair, [&](int v, const LogitPair& group) {
      const uint32_t dead = set_bits(v) | outside_bits(v);
      if (pass == OF_KL)
        reverse ? add_kl<true>(dead, group, t) : add_kl<false>(dead, group, t);
      else
        add_streams(pass, pair, dead, group, t, x_top, o_top);
    });
    sums.s = t.s, sums.h = t.h, sums.x_top = x_top, sums.o_top = o_top;
    sums.a_or_m = pass == OF_KL ? t.a_or_m(reverse) : t.m;
    sums.phi = pass == OF_KL ? t.phi() : t.f;
    sums.a = reverse ? t.a : sums.a_or_m;
  }

  template <bool REVERSE>
  TNT_DEVICE void add_kl(uint32_t dead, const LogitPair& group, KlSums& t) const {
    const RowShift& k = s_.shift;
    Group g = group_of<REVERSE>(group, k.x_zero, k.o_zero);
    remove(dead, g);
    add_group<REVERSE, true>(t, k, g, k.less != 0.0f);
    if (k.less == 0.0f) return;
    // With smaller weights some underflow: against an infinite y the others count.
#pragma unroll
    for (int i = 0; i < GROUP; ++i)
      if (!(g.o[i] - g.x[i] > -INFINITY) && power(fmaf(g.x[i], k.scale, k.less - k.c)) > 0.0f) t.far_f = INFINITY;
  }

  // Of one stream, the policy's, or of each of two; of both, their maxima alone.
  TNT_DEVICE void add_streams(StreamPass pass, bool pair, uint32_t dead, const LogitPair& group, KlSums& t,
                              float& x_top, float& o_top) const {
    const bool total = s_.loss == LOG_LIKELIHOOD && smooths_uniformly(p_);
    const Group g = group_of<true>(group, 0.0f, 0.0f);
#pragma unroll
    for (int i = 0; i < GROUP; ++i) {
      if (dead >> i & 1) continue;
      x_top = fmaxf(x_top, g.x[i]);
      if (pair) o_top = fmaxf(o_top, g.o[i]);
      if (pass == OF_MAXIMA) continue;
      const float centred = g.x[i] - s_.level_z, at = centred * scale(), e = power(at);
      t.s += e;
      t.h += e == 0.0f ? 0.0f : e * at;
      if (total) t.f = fmaf(centred, l_.scales.inverse_t, t.f);
      if (pair) t.m += power((g.o[i] - s_.level_r) * scale());
    }
  }

  // Of the removed entries, and whether one is no number.
  TNT_DEVICE void add_set(bool pair, StreamSums& sums) const {
    for_each_removed([&](int v) {
      const float z = z_at(v);
      sums.set.add(z, scale());
      sums.z_broken += z < INFINITY ? 0.0f : 1.0f;
      if (!pair) return;
      const float r = r_at(v);
      sums.reference_set.add(r, scale());
      sums.r_broken += r < INFINITY ? 0.0f : 1.0f;
    });
  }

  // ---- what a launch does, by its kind: as cpu/row.h

  TNT_DEVICE bool is_uniform() const { return is_kl(s_.loss) && smooths_uniformly(p_); }
  // Whether the second pass of this launch yields the loss.
  TNT_DEVICE bool sums_loss() const {
    return is_uniform() && !is(Kind::BACKWARD) && !is(Kind::FINISH) && !s_.result.lost;
  }

  // From the first pass, or from other launches, to what the second one takes. Whether there is more to do.
  TNT_DEVICE bool conclude() {
    if (is(Kind::BACKWARD)) {
      if (thread_ == 0) read_plan();
      device::sync_block();
      return true;
    }
    if (is_first(p_.kind))
      first_pass();
    else if (warp() == 0)
      gather(p_, l_, s_);
    device::sync_block();
    if (is(Kind::STATISTICS)) {
      if (leader()) pack(s_.sums, is_kl(s_.loss), statistics());
      return false;
    }
    PartialSums totals;
    if (is(Kind::FINISH)) {
      totals = total_sums();
    } else if (s_.loss == NEGATIVE_LIKELIHOOD) {
      if (thread_ == 0) normalize_set(p_, l_, s_);
      device::sync_block();
      totals = partial_sums_of_set();
    }
    if (is(Kind::PARTIAL_SUMS) && !is_uniform()) {
      if (leader()) write_partial_sums(totals);
      if (!g_) return false;
      // A gradient that does not wait for the total is of a loss whose whole set is active.
      totals = {0, double(p_.vocab_size) - s_.sums.kept};
    }
    if (thread_ == 0) {
      s_.totals = totals;
      if (is_uniform())
        conclude_uniform(p_, l_, s_);
      else
        is_kl(s_.loss) ? conclude_kl(p_, l_, MOST_APART<Logit>, s_) : conclude_stream(p_, l_, s_);
      s_.scale = gradient_factor(p_, l_, s_);
      if (s_.scale != 0 && s_.result.lost) s_.scale = NAN;
    }
    device::sync_block();
    if (is(Kind::PARTIAL_SUMS) && leader() && is_uniform() && s_.result.lost) write_partial_sums({});
    return true;
  }

  // One, or two where the gradient needs a loss that is summed first.
  TNT_DEVICE void second_passes() {
    const bool reverse = s_.loss == REVERSE_KL;
    bool sums = sums_loss();
#pragma unroll 1
    for (bool goes_on = true; goes_on;) {
      const float factor = float(s_.scale);
      const bool is_number = factor != 0.0f && factor == factor, writes = g_ && is_number && !(sums && reverse);
      goes_on = sums && g_ && !writes;
      if (!sums && !is_number) return fill(factor == 0.0f ? 0.0f : NAN);
      const float loss = second_pass(factor, writes);
      if (!sums) return;
      sums = false;
      const double total = sum_of_row(loss, 0.0f).loss;
      if (is(Kind::PARTIAL_SUMS) && leader()) write_partial_sums({total, 0});
      if (thread_ == 0) {
        s_.uniform.row.loss = float(total);
        s_.result.loss = total;
        if (s_.scale != 0 && reverse && !(total < INFINITY)) s_.scale = NAN;
      }
      device::sync_block();
    }
  }

  // ---- second pass

  // Writes the gradient times `factor` if `writes`. Returns this thread's part of a loss that needs this pass. One loop
  // for all losses, as the code around it is long.
  TNT_DEVICE float second_pass(float factor, bool writes) {
    const bool kl = is_kl(s_.loss), uniform = is_uniform(), reverse = s_.loss == REVERSE_KL;
    float loss = 0.0f;
    for_each_group<true>(kl, [&](int v, const LogitPair& group) {
      float out[GROUP];
      if (!kl)
        exp_gradients(v, group, factor, out);
      else if (uniform)
        loss += uniform_gradients(v, group, factor, out);
      else
        reverse ? kl_gradients<true>(v, group, factor, out) : kl_gradients<false>(v, group, factor, out);
      if (writes) store_group(v, out);
    });
    return loss;
  }

  template <bool REVERSE>
  TNT_DEVICE void kl_gradients(int v, const LogitPair& group, float factor, float (&out)[GROUP]) const {
    const KlPlan<float>& plan = s_.kl;
    const float u0 = plan.u0 * factor, u1 = plan.u1 * factor;
    const Group g = group_of<REVERSE>(group, plan.x_zero, plan.o_zero);
#pragma unroll
    for (int i = 0; i < GROUP; ++i) {
      const float x = g.x[i], o = g.o[i], at = fmaf(x, scale(), -plan.c);
      const float y = fmaf(o - x, l_.scales.inverse_t, -plan.shift) - plan.rest;
      if (REVERSE) {
        const float e = power(at);
        // Against an infinite y the first pass's weight was nothing, or the row would be lost.
        out[i] = e == 0.0f || u1 == 0.0f || y == -INFINITY ? 0.0f : e * fmaf(y, u1, u0);
      } else {
        const bool near = fabsf(y) <= 1.25f;
        const float e = power(near ? fmaf(y, 0.5f * LOG2_E_F, at) : at);
        const float sinh = two_sinh(y);
        out[i] = near ? u0 * e * sinh : factor * power(fmaf(o - plan.o_ref, scale(), plan.u1)) - u0 * e;
      }
    }
    const uint32_t bits = set_bits(v);
    if (!bits) return;
    const int partial = partial_column();
#pragma unroll
    for (int i = 0; i < GROUP; ++i) {
      if (!(bits >> i & 1)) continue;
      const float centred = group.z[i] - plan.set_max, weight = plan.set_scale * factor * power(centred * scale());
      out[i] = !REVERSE || weight == 0.0f ? weight : weight * fmaf(centred, l_.scales.inverse_t, plan.set_shift);
      if (v + i == partial) out[i] = plan.partial * factor;
    }
  }

  TNT_DEVICE void exp_gradients(int v, const LogitPair& group, float factor, float (&out)[GROUP]) const {
    const ExpPlan<float>& plan = s_.exp;
    const uint32_t bits = set_bits(v);
#pragma unroll
    for (int i = 0; i < GROUP; ++i) {
      out[i] = fmaf(plan.weight * factor, power(fmaf(group.z[i] - plan.zero, scale(), -plan.c)), plan.bias * factor);
      if (!(bits >> i & 1)) continue;
      const float centred = group.z[i] - plan.set_ref;
      out[i] = plan.set * factor * power(centred * scale()) +
               (centred * l_.scales.inverse_t < plan.least ? 0.0f : plan.push * factor);
    }
  }

  TNT_DEVICE float uniform_gradients(int v, const LogitPair& group, float factor, float (&out)[GROUP]) const {
    const UniformNumbers<float>& numbers = s_.uniform;
    const bool reverse = s_.loss == REVERSE_KL;
    const int partial = partial_column();
    const uint32_t bits = set_bits(v), out_bits = outside_bits(v);
    float loss = 0.0f;
#pragma unroll
    for (int i = 0; i < GROUP; ++i) {
      const bool is_partial = v + i == partial, removed = (bits >> i & 1) && !is_partial;
      const float centred = group.z[i] - numbers.row.z_ref, p = power(centred * scale()) * numbers.row.p_inverse;
      const float q = power((group.r[i] - numbers.row.r_ref) * scale()) * numbers.row.q_inverse;
      const float log_p = centred * l_.scales.inverse_t - numbers.row.p_log_sum;
      const float q_star = removed ? 0.0f : is_partial ? q * (1.0f + s_.weight) : q;
      const Element<float> e = numbers.element(reverse, log_p, p, q_star);
      if (!(out_bits >> i & 1)) loss += e.loss;
      out[i] = e.gradient * factor;
    }
    return loss;
  }

  // Of NL: what this slice adds to the sums of all.
  TNT_DEVICE PartialSums partial_sums_of_set() {
    const float ref = float(s_.sums.policy_set.ref), log_sum = s_.log_sum, least = s_.least;
    float loss = 0.0f, active = 0.0f;
    for_each_removed([&](int v) {
      const float log_weight = (z_at(v) - ref) * l_.scales.inverse_t;
      const bool at_rest = log_weight < least;
      const float log_p = log_weight == -INFINITY ? log_weight : log_weight - log_sum;  // either may be none
      loss += at_rest ? float(p_.nl_floor) : log_p;
      active += at_rest ? 0.0f : 1.0f;
    });
    return sum_of_row(loss, active);
  }

  // ---- what a launch reads of others, and leaves behind

  TNT_DEVICE void read_plan() {
    if (!is_kl(s_.loss)) {
      memcpy(&s_.exp, coefficients(), sizeof s_.exp);
    } else if (is_uniform()) {
      memcpy(&s_.uniform.row, coefficients(), sizeof s_.uniform.row);
      complete_uniform(p_, l_, s_);
    } else {
      memcpy(&s_.kl, coefficients(), sizeof s_.kl);
    }
    s_.scale = gradient_factor(p_, l_, s_);
    s_.result.lost = false;
  }
  TNT_DEVICE float* coefficients() const { return static_cast<float*>(p_.coefficients) + index_ * ROW_COEFFICIENTS; }
  TNT_DEVICE float* statistics() const { return static_cast<float*>(p_.statistics) + index_ * ROW_STATISTICS; }
  TNT_DEVICE PartialSums total_sums() const {
    const float* const from = static_cast<const float*>(p_.total_sums) + index_ * ROW_PARTIAL_SUMS;
    return {double(from[0]), double(from[1])};
  }
  TNT_DEVICE void write_partial_sums(const PartialSums& sums) const {
    float* const to = static_cast<float*>(p_.partial_sums) + index_ * ROW_PARTIAL_SUMS;
    to[0] = float(sums.loss), to[1] = float(sums.active);
  }
  TNT_DEVICE void report() const {
    if (p_.coefficients) {
      if (!is_kl(s_.loss))
        write_plan(s_.exp, float(s_.scale), coefficients());
      else
        is_uniform() ? write_plan(s_.uniform.row, float(s_.scale), coefficients())
                     : write_plan(s_.kl, float(s_.scale), coefficients());
    }
    if (p_.diagnostics) diagnose(p_, s_);
    write_loss(s_.factor == 0.0f || s_.loss == NONE ? 0 : double(s_.factor) * s_.result.loss);
  }
  TNT_DEVICE void write_loss(double weighted) const { tnt::write_loss(p_, l_.losses, index_, weighted); }

  const RowCall& p_;
  const StreamLaunch& l_;
  StreamRow& s_;
  uint32_t* const mask_;
  const int thread_, rank_, blocks_;
  const int64_t index_;
  int begin_, end_;
  const Logit *z_, *r_;
  Gradient* g_;
};

}  // namespace TNT_ISA
}  // namespace tnt
