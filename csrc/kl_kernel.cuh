// Loss and gradient of KL rows at the speed of memory: one row a cluster, its slices in shared memory, read once. Every
// warp sums its entries (kl_math.cuh), sends its sums to every block of the cluster, and goes on when all have come:
// one exchange a row, no barrier after it. Rows that this arithmetic does not serve (what is broken, infinite, pushed
// down in part or shifted too far) go on a list, which the kernel in two passes (row_kernel.cuh) works off afterwards.
#pragma once

#include <type_traits>

#include "kl_math.cuh"
#include "row_cuda.h"

namespace tnt {
inline namespace TNT_ISA {

constexpr int KL_STEPS = 16;  // of a block at most: each has a barrier for its copies, and a bit
constexpr int KL_ATTEMPTS = 3;

struct KlLaunch {
  int slice;                         // columns of a block, a multiple of 64
  const double* inverse_normalizer;  // null: 1
  double* losses;                    // (N) weighted, or null
  int* left;                         // how many rows are left to the other kernel, then their numbers
};

struct KlShared {
  uint64_t arrivals[KL_STEPS];
  uint64_t exchange[2];
  uint32_t flags;
  float weight, alpha, scale, eps;  // of the row; 1/normaliser/T. No register holds them through the passes.
};
constexpr int KL_HEADER = (sizeof(KlShared) + 127) / 128 * 128;
constexpr int KL_WARPS = device::KL_THREADS / device::WARP;

template <class Logit, class Gradient, bool STATS>
class KlBlock {
 public:
  static constexpr int THREADS = device::KL_THREADS, GROUP = Stored<Logit>::GROUP, STEP = THREADS * GROUP;
  static constexpr int STEP_BYTES = STEP * int(sizeof(Logit));
  // Of a warp at most: its sums, those of its removed entries, and what the statistics need besides.
  static constexpr int MESSAGE = (STATS ? 3 : 2) * int(sizeof(Vector));
  static constexpr int shared_bytes(int slice, int blocks) {
    return KL_HEADER + 2 * blocks * KL_WARPS * MESSAGE + 2 * slice * int(sizeof(Logit)) + slice / 8;
  }

  TNT_DEVICE KlBlock(const RowParams& params, const KlLaunch& launch)
      : p_(params),
        l_(launch),
        s_(*reinterpret_cast<KlShared*>(device::shared_memory())),
        thread_(device::thread_index()),
        rank_(device::cluster_rank()),
        blocks_(device::cluster_size()) {
    // Columns count from the 16-byte boundary before the row, which both logits have at the same place.
    before_ = int(reinterpret_cast<uintptr_t>(z_row()) & 15) / int(sizeof(Logit));
    const int end = int(p_.vocab) + before_, begin = rank_ * l_.slice < end ? rank_ * l_.slice : end;
    begin_ = begin;
    n_ = l_.slice < end - begin ? l_.slice : end - begin;
    first_ = rank_ == 0 ? before_ : 0;
  }

  TNT_DEVICE void run() {
    const int64_t label = p_.labels[row()];
    const float weight = p_.weights ? static_cast<const float*>(p_.weights)[row()] : 1.0f;
    if (weight == 0.0f || label == p_.ignore_index) return inactive();
    const bool in_part = weight < 0.0f && weight > -1.0f && is_kl(p_.negative_loss);
    if (label < 0 || label >= p_.vocab_size || in_part) return leave();
    // Whether the reference is read is known at once, unless ids decide which loss the row has.
    const bool late = p_.negative_ids && is_kl(p_.positive_loss) != is_kl(p_.negative_loss);
    if (!late) begin_copies(is_kl(weight < 0.0f ? p_.negative_loss : p_.positive_loss));
    for (unsigned i = thread_; i < mask_words(); i += THREADS) mask()[i] = 0;
    if (thread_ == 0) {
      s_.flags = 0;
      s_.weight = weight;
      s_.alpha = p_.alpha ? static_cast<const float*>(p_.alpha)[row() * p_.alpha_stride] : float(p_.alpha_value);
      if (p_.negative_loss == UNLIKELIHOOD && weight < 0.0f) s_.alpha *= -weight;
      s_.eps = float(p_.eps);
      s_.scale = float((l_.inverse_normalizer ? *l_.inverse_normalizer : 1.0) / p_.temperature);
    }
    levels();
    device::sync_block();
    if (p_.negative_ids) {
      const int64_t* const ids = p_.negative_ids + row() * p_.negative_ids_stride;
      uint32_t flags = 0;
#pragma unroll 4
      for (int64_t k = thread_; k < p_.negative_ids_count; k += THREADS) {
        const int64_t id = ids[k];
        if (id == -1) continue;
        flags |= HAS_IDS | (id < 0 || id >= p_.vocab_size ? ID_OUTSIDE : 0);
        mark(id);
      }
      if (flags) device::atomic_or(&s_.flags, flags);
    }
    if (late) device::sync_block();
    const bool known = late && (weight < 0.0f || (s_.flags & HAS_IDS));
    if (late) begin_copies(is_kl(known ? p_.negative_loss : p_.positive_loss));
    if (weight < 0.0f && thread_ == 0) mark(label);
    device::sync_block();
    device::cluster_wait();  // all blocks have initialised their barriers
    const bool negative = s_.weight < 0.0f || (s_.flags & HAS_IDS);
    const int kind = negative ? p_.negative_loss : p_.positive_loss;
    const float factor = fabsf((negative ? s_.alpha : s_.weight) * s_.scale);
    if (!(factor > 1e-30f && factor < 1e30f) || (s_.flags & ID_OUTSIDE)) {
      for (int s = 0; s < steps(); ++s) device::arrival_wait(s_.arrivals + s);
      return leave();
    }
    if (kind == UNLIKELIHOOD || kind == LOG_LIKELIHOOD)
      compute_likelihood(kind == UNLIKELIHOOD, negative);
    else if (negative)
      kind == REVERSE_KL ? compute<true, true>() : compute<false, true>();
    else
      kind == REVERSE_KL ? compute<true, false>() : compute<false, false>();
  }

 private:
  // Asked for again rather than kept: registers are what is short.
  TNT_DEVICE int64_t row() const { return device::cluster_index(); }
  TNT_DEVICE const Logit* z_row() const { return static_cast<const Logit*>(p_.logits) + row() * p_.logits_stride; }
  TNT_DEVICE const Logit* r_row() const {
    return static_cast<const Logit*>(p_.ref_logits) + row() * p_.ref_logits_stride;
  }

  TNT_DEVICE bool leader() const { return rank_ == 0 && thread_ == 0; }
  TNT_DEVICE int steps() const { return (n_ + STEP - 1) / STEP; }
  TNT_DEVICE int warp() const { return thread_ / device::WARP; }
  TNT_DEVICE int lane() const { return thread_ % device::WARP; }

  TNT_DEVICE char* messages() const { return device::shared_memory() + KL_HEADER; }
  TNT_DEVICE char* slot(bool reference) const {
    return messages() + 2 * blocks_ * KL_WARPS * MESSAGE + (reference ? l_.slice * int(sizeof(Logit)) : 0);
  }
  TNT_DEVICE uint32_t* mask() const { return reinterpret_cast<uint32_t*>(slot(true) + l_.slice * int(sizeof(Logit))); }
  TNT_DEVICE unsigned mask_words() const { return unsigned(l_.slice) / 32; }
  TNT_DEVICE uint32_t set_bits(int step) const {  // of this thread's group
    const uint8_t* const bytes = reinterpret_cast<const uint8_t*>(mask()) + step * (STEP / 8);
    return GROUP == 8 ? bytes[thread_] : bytes[thread_ >> 1] >> ((thread_ & 1) * 4) & 15;
  }
  TNT_DEVICE void mark(int64_t id) {  // any 64-bit number may come
    if (id < 0 || id >= p_.vocab) return;
    const int at = int(id) + before_ - begin_;
    if (at >= 0 && at < n_) device::atomic_or(mask() + at / 32, 1u << (at & 31));
  }

  // ---- rows that are not computed here

  TNT_DEVICE void inactive() {
    constexpr float zeros[GROUP] = {};
    if (p_.grad)
      for (int at = thread_ * GROUP; at < n_; at += STEP) store(at, zeros);
    if (!leader()) return;
    write_loss(0.0);
    if (STATS) write_stats(0.0f, NAN, {NAN, NAN, NAN});
  }
  TNT_DEVICE void leave() {
    if (leader()) l_.left[1 + device::atomic_add(l_.left, 1)] = int(row());
  }

  // ---- reading: whole vectors by bulk copies, a step at a time; the row's two edges by hand, with -inf around them

  TNT_DEVICE void begin_copies(bool pair) {
    const Logit *const z = z_row() - before_ + begin_, *const r = pair ? r_row() - before_ + begin_ : z;  // aligned
    const int whole = n_ / GROUP * GROUP, from = first_ > 0 ? GROUP : 0;
    if (thread_ == 0) {
      for (int s = 0; s < steps(); ++s) device::arrival_init(s_.arrivals + s, 1);
      device::arrival_init(s_.exchange, 1);
      device::arrival_init(s_.exchange + 1, 1);
      device::arrival_fence();
    }
    device::cluster_arrive_relaxed();
    if (thread_ == 0) {
      for (int s = 0; s < steps(); ++s) {
        const int at = s == 0 ? from : s * STEP, end = whole < (s + 1) * STEP ? whole : (s + 1) * STEP;
        const int bytes = end > at ? (end - at) * int(sizeof(Logit)) : 0;
        device::arrival_expect(s_.arrivals + s, uint32_t(pair ? 2 * bytes : bytes));
        if (bytes == 0) continue;
        device::bulk_copy(slot(false) + at * int(sizeof(Logit)), z + at, uint32_t(bytes), s_.arrivals + s);
        if (pair) device::bulk_copy(slot(true) + at * int(sizeof(Logit)), r + at, uint32_t(bytes), s_.arrivals + s);
      }
    }
    if (from > 0 || whole < n_) {
      if (thread_ < GROUP)
        edge(thread_, from > 0 && thread_ < from, z, r);
      else if (thread_ < 2 * GROUP)
        edge(whole + thread_ - GROUP, whole < n_ && !(from > 0 && whole == 0), z, r);
    }
  }
  TNT_DEVICE void edge(int at, bool copies, const Logit* z, const Logit* r) {
    if (!copies) return;
    const bool inside = at >= first_ && at < n_;
    reinterpret_cast<Logit*>(slot(false))[at] = inside ? z[at] : Stored<Logit>::nothing();
    reinterpret_cast<Logit*>(slot(true))[at] = inside ? r[at] : Stored<Logit>::nothing();
  }

  struct Group {
    float x[GROUP], o[GROUP];
  };
  // x and o of a group; away where this thread has none.
  TNT_DEVICE Group load(const char* base, const char* other, bool present) const {
    Group g;
    if (present) {
      Stored<Logit>::unpack(device::load_vector(base), g.x);
      Stored<Logit>::unpack(device::load_vector(other), g.o);
    } else {
#pragma unroll
      for (int i = 0; i < GROUP; ++i) g.x[i] = g.o[i] = AWAY;
    }
    return g;
  }
  TNT_DEVICE static void remove(uint32_t bits, Group& g) {
#pragma unroll
    for (int i = 0; i < GROUP; ++i) {
      g.x[i] = bits >> i & 1 ? AWAY : g.x[i];
      g.o[i] = bits >> i & 1 ? AWAY : g.o[i];
    }
  }

  // ---- first pass: one group. Returns whether the warp had a pair that is not near.
  template <bool REVERSE>
  TNT_DEVICE static bool add(KlSums& t, const KlShift& k, const Group& g) {
    float y2[GROUP];
    uint32_t any = 0;
#pragma unroll
    for (int i = 0; i < GROUP; ++i) {
      y2[i] = fmaf(g.o[i] - g.x[i], k.y_scale, -k.y_shift);
      any |= bits_as<uint32_t>(y2[i]);
    }
    if (!device::any_of_warp((any & 0x40000000u) != 0)) {
#pragma unroll
      for (int i = 0; i < GROUP; ++i) add_near<REVERSE, STATS>(t, k, g.x[i], y2[i]);
      return false;
    }
    uint32_t top = 0;  // the bits of |Y| order as numbers, infinity and NaN above all
#pragma unroll
    for (int i = 0; i < GROUP; ++i) {
      const uint32_t bits = bits_as<uint32_t>(fabsf(y2[i]));
      top = bits > top ? bits : top;
    }
    if (device::all_of_warp(top < 0x43000000u)) {  // 128
#pragma unroll
      for (int i = 0; i < GROUP; ++i) add_middle<REVERSE, STATS>(t, k, g.x[i], y2[i]);
    } else {
#pragma unroll
      for (int i = 0; i < GROUP; ++i) add_far<REVERSE, STATS>(t, k, g.x[i], g.o[i]);
    }
    return true;
  }

  // Every warp's numbers to every block. Two places in turn suffice: who sends exchange i + 2 has all messages of
  // i + 1, and a warp sends those after it has read i.
  template <int VECTORS>
  TNT_DEVICE const Vector* exchange(int i, const Vector (&message)[VECTORS]) {
    char* const here = messages() + (i & 1) * blocks_ * KL_WARPS * MESSAGE;
    uint64_t* const barrier = s_.exchange + (i & 1);
    constexpr int bytes = VECTORS * sizeof(Vector);
    if (thread_ == 0) device::arrival_expect(barrier, uint32_t(blocks_ * KL_WARPS * bytes));
    if (lane() < blocks_) {
      char* const to = here + (rank_ * KL_WARPS + warp()) * bytes;
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) device::send(to + v * sizeof(Vector), message[v], barrier, lane());
    }
    device::arrival_wait_cluster(barrier, i >> 1 & 1);
    return reinterpret_cast<const Vector*>(here);
  }
  static TNT_DEVICE Vector pack(float a, float b, float c, float d) {
    return {{bits_as<uint32_t>(a), bits_as<uint32_t>(b), bits_as<uint32_t>(c), bits_as<uint32_t>(d)}};
  }
  static TNT_DEVICE float at(const Vector& x, int i) { return bits_as<float>(x.words[i]); }
  static TNT_DEVICE KlSetSums of(const Vector& x) { return {at(x, 0), at(x, 1), at(x, 2), at(x, 3)}; }
  static TNT_DEVICE KlSetSums of_mass(const Vector& x) { return {at(x, 0), at(x, 1), 0.0f, 0.0f}; }

  // Whether the two rows' levels are near enough for o - x to keep its digits.
  static TNT_DEVICE bool comparable(float x_ref, float o_ref) {
    return fabsf(o_ref - x_ref) <= (sizeof(Logit) == 4 ? 1.0f : 64.0f);
  }

  // ---- a row

  // The rows' levels, their maxima over a few entries all along them, and how far z lies above r there on average.
  // Every warp of the cluster looks.
  TNT_DEVICE void levels() {
    const int vocab = int(p_.vocab), lead = before_ > 0 ? GROUP - before_ : 0;
    const bool wide = vocab >= 2 * device::WARP * GROUP;
    const int at = wide             ? lead + lane() * ((vocab - lead) / GROUP / device::WARP) * GROUP
                   : lane() < vocab ? lane()
                                    : vocab - 1;
    float z[GROUP], r[GROUP];
    sample(z_row() + at, wide, z);
    sample(p_.ref_logits ? r_row() + at : z_row() + at, wide, r);
    float z_top = z[0], r_top = r[0], above = z[0] - r[0];
#pragma unroll
    for (int i = 1; i < GROUP; ++i) z_top = fmaxf(z_top, z[i]), r_top = fmaxf(r_top, r[i]), above += z[i] - r[i];
    z_level_ = max_of_warp(z_top), r_level_ = max_of_warp(r_top);
    // The average difference is nearer to L than that of the maxima; infinities have none.
    const float more = sum_of_warp(above) * (1.0f / (device::WARP * GROUP)) - (z_level_ - r_level_);
    more_ = fabsf(more) < 16.0f ? more : 0.0f;
  }
  TNT_DEVICE static void sample(const Logit* at, bool wide, float (&x)[GROUP]) {
    if (wide) return Stored<Logit>::unpack(device::load_vector(at), x);
#pragma unroll
    for (int i = 0; i < GROUP; ++i) x[i] = Stored<Logit>::load(at);
  }

  template <bool REVERSE, bool SET>
  TNT_DEVICE void compute() {
    const float inverse_t = float(1 / p_.temperature);
    const int offset = thread_ * 16;
    const char *const base = slot(!REVERSE) + offset, *const other = slot(REVERSE) + offset;
    const int full = n_ / STEP, steps = this->steps();
    const bool in_tail = full * STEP + thread_ * GROUP < n_;
    float x_ref = REVERSE ? z_level_ : r_level_, o_ref = REVERSE ? r_level_ : z_level_;
    float more = (REVERSE ? -more_ : more_) * inverse_t;
    KlShift k;
    KlRow sums;
    uint32_t far;
    int count = 0;  // exchanges so far
    bool good = false;
#pragma unroll 1
    for (int attempt = 0; attempt < KL_ATTEMPTS; ++attempt) {
      k = kl_shift(x_ref, o_ref, inverse_t, more);
      KlSums t;
      uint32_t bit = 1;
      far = 0;
#pragma unroll 1
      for (int s = 0; s < full; ++s, bit += bit) {
        device::arrival_wait(s_.arrivals + s);
        Group g = load(base + s * STEP_BYTES, other + s * STEP_BYTES, true);
        if (SET) {
          const uint32_t bits = set_bits(s);
          if (bits) remove(bits, g);
        }
        if (add<REVERSE>(t, k, g)) far |= bit;
      }
      if (full < steps) {
        device::arrival_wait(s_.arrivals + full);
        Group g = load(base + full * STEP_BYTES, other + full * STEP_BYTES, in_tail);
        if (SET && in_tail) remove(set_bits(full), g);
        if (add<REVERSE>(t, k, g)) far |= bit;
      }
      constexpr int VECTORS = SET ? STATS ? 3 : 2 : 1 + STATS;
      Vector mine[VECTORS];
      mine[0] =
          pack(sum_of_warp(t.s), sum_of_warp(t.a_or_m(REVERSE)), sum_of_warp(t.phi()), STATS ? sum_of_warp(t.h) : 0.0f);
      if constexpr (STATS) mine[VECTORS - 1] = pack(AWAY, 0.0f, sum_of_warp(t.a), 0.0f);
      if constexpr (SET) {
        KlSetSums removed, of_reference;
        const Logit *const z = reinterpret_cast<const Logit*>(slot(false)), *const r = reinterpret_cast<const Logit*>(
                                                                                slot(true));
        for (unsigned i = thread_; i < mask_words(); i += THREADS) {
          for (uint32_t b = mask()[i]; b; b &= b - 1) {
            const unsigned at = i * 32 + device::lowest_bit(b);
            const float r_at = Stored<Logit>::load(r + at);
            removed.add(Stored<Logit>::load(z + at), k.scale);
            if (STATS) of_reference.add(r_at, k.scale);
            if (!(r_at < INFINITY)) removed.sum = NAN;  // a broken reference
          }
        }
        removed.merge_warp(k.scale);
        mine[1] = pack(removed.max, removed.sum, removed.moment, removed.n);
        if constexpr (STATS) {
          of_reference.merge_warp(k.scale);
          mine[2].words[0] = bits_as<uint32_t>(of_reference.max);
          mine[2].words[1] = bits_as<uint32_t>(of_reference.sum);
        }
      }
      const Vector* const from = exchange(count++, mine);
      sums = KlRow();
#pragma unroll 1
      for (int i = lane(); i < blocks_ * KL_WARPS; i += device::WARP) {
        const Vector m = from[VECTORS * i];
        sums.s += at(m, 0), sums.a_or_m += at(m, 1), sums.phi += at(m, 2);
        if (STATS) sums.h += at(m, 3), sums.a += at(from[VECTORS * i + VECTORS - 1], 2);
        if (SET) sums.set.merge(of(from[VECTORS * i + 1]), k.scale);
        if (SET && STATS) sums.reference_set.merge(of_mass(from[VECTORS * i + VECTORS - 1]), k.scale);
      }
      sums.s = sum_of_warp(sums.s), sums.a_or_m = sum_of_warp(sums.a_or_m), sums.phi = sum_of_warp(sums.phi);
      if (STATS) sums.h = sum_of_warp(sums.h), sums.a = sum_of_warp(sums.a);
      if (SET) sums.set.merge_warp(k.scale);
      if (SET && STATS) sums.reference_set.merge_warp(k.scale);
      // Is it fit? All warps of the cluster have the same numbers in the same order, hence the same answer.
      const float a = REVERSE ? sums.a_or_m + sums.phi : sums.a_or_m;
      sums.l = log1pf(a / sums.s);
      const float excess = phi(sums.l);
      sums.kl = sums.phi / sums.s - excess;
      const bool usable = device::all_of_warp(sums.s > 0x1p-40f && sums.s < 0x1p100f);
      // Below -3, S + A has lost its digits.
      const bool in_range = device::all_of_warp(usable && sums.s + a < 0x1p100f && sums.l > -3.0f);
      // Phi/S and phi(L) are good to 2e-6 of their size: where KL is much less than they, L has to be nearer to 0.
      const bool near = comparable(k.x_ref, k.o_ref);
      good = device::all_of_warp(in_range && sums.phi < INFINITY && sums.set.sum < INFINITY &&
                                 !(excess > 0.5f * fabsf(sums.kl)) && near);
      const bool again = STATS && attempt == 0 && good && device::all_of_warp(entropy_cancels<REVERSE>(sums));
      if ((good && !again) || (usable && device::all_of_warp(sums.phi == INFINITY))) break;
      if (attempt == KL_ATTEMPTS - 1 || (attempt > 0 && !near)) break;
      if ((in_range && near && !again) || attempt > 0) {
        more += sums.l;
        continue;
      }
      // The row's maxima in place of those of a few entries.
      float x_top = AWAY, o_top = AWAY;
#pragma unroll 1
      for (int s = 0; s < steps; ++s) {
        if (s == full && !in_tail) break;
        Group g = load(base + s * STEP_BYTES, other + s * STEP_BYTES, true);
        if (SET) remove(set_bits(s), g);
#pragma unroll
        for (int i = 0; i < GROUP; ++i) x_top = fmaxf(x_top, g.x[i]), o_top = fmaxf(o_top, g.o[i]);
      }
      const Vector mine_of_tops[1] = {pack(max_of_warp(x_top), max_of_warp(o_top), 0.0f, 0.0f)};
      const Vector* const tops = exchange(count++, mine_of_tops);
      x_ref = o_ref = AWAY;
#pragma unroll 1
      for (int i = lane(); i < blocks_ * KL_WARPS; i += device::WARP) {
        x_ref = fmaxf(x_ref, at(tops[i], 0));
        o_ref = fmaxf(o_ref, at(tops[i], 1));
      }
      x_ref = max_of_warp(x_ref), o_ref = max_of_warp(o_ref);
      more = 0.0f;
    }
    if (!good || (REVERSE && SET && !(s_.eps > 1e-30f))) return leave();
    sums.kl = sums.kl > 0.0f ? sums.kl : 0.0f;  // what rounding leaves of 0
    float loss;
    typename KlGradient<REVERSE>::Type gradient;
    SetGradient set_gradient_of;
    const float row_weight = SET ? s_.alpha : s_.weight;
    if (kl_coefficients<SET>(k, sums, row_weight * s_.scale, s_.eps, gradient, set_gradient_of, loss)) far = ~0u;
    if (p_.grad) {
#pragma unroll 1
      for (int s = 0; s < full; ++s, far >>= 1)
        write<REVERSE, SET>(gradient, set_gradient_of, k, s, base, other, far & 1);
      if (in_tail) write<REVERSE, SET>(gradient, set_gradient_of, k, full, base, other, far & 1);
    }
    if (!leader()) return;
    write_loss(double(row_weight) * double(loss));
    if (STATS) write_stats(loss, loss, kl_diagnosis<REVERSE, SET>(k, sums));
  }

  // ---- LL and UL: the policy's row alone, with a set always

  TNT_DEVICE void compute_likelihood(bool unlikelihood, bool negative) {
    const float inverse_t = float(1 / p_.temperature);
    const char* const base = slot(false) + thread_ * 16;
    const int full = n_ / STEP, steps = this->steps();
    const bool in_tail = full * STEP + thread_ * GROUP < n_;
    if (!unlikelihood && thread_ == 0) mark(p_.labels[row()]);
    device::sync_block();
    float x_ref = z_level_;
    KlShift k;
    KlRow sums;
    int count = 0;
    bool good = false;
#pragma unroll 1
    for (int attempt = 0; attempt < 2; ++attempt) {
      k = kl_shift(x_ref, x_ref, inverse_t, 0.0f);
      float sum = 0.0f, h = 0.0f, top = AWAY;
#pragma unroll 1
      for (int s = 0; s < steps; ++s) {
        device::arrival_wait(s_.arrivals + s);
        if (s == full && !in_tail) break;
        float x[GROUP];
        Stored<Logit>::unpack(device::load_vector(base + s * STEP_BYTES), x);
        const uint32_t bits = set_bits(s);
#pragma unroll
        for (int i = 0; i < GROUP; ++i) {
          if (bits >> i & 1) x[i] = AWAY;
          const float at = fmaf(x[i], k.scale, -k.c), e = power(at);
          sum += e;
          if (STATS) h = fmaf(e, fmaxf(at, -256.0f), h);
          top = fmaxf(top, x[i]);
        }
      }
      KlSetSums removed;
      const Logit* const z = reinterpret_cast<const Logit*>(slot(false));
      for (unsigned i = thread_; i < mask_words(); i += THREADS)
        for (uint32_t b = mask()[i]; b; b &= b - 1)
          removed.add(Stored<Logit>::load(z + i * 32 + device::lowest_bit(b)), k.scale);
      removed.merge_warp(k.scale);
      const Vector mine[2] = {pack(sum_of_warp(sum), max_of_warp(top), STATS ? sum_of_warp(h) : 0.0f, 0.0f),
                              pack(removed.max, removed.sum, removed.moment, removed.n)};
      const Vector* const from = exchange(count++, mine);
      sums = KlRow();
      x_ref = AWAY;
#pragma unroll 1
      for (int i = lane(); i < blocks_ * KL_WARPS; i += device::WARP) {
        sums.s += at(from[2 * i], 0), sums.h += at(from[2 * i], 2);
        x_ref = fmaxf(x_ref, at(from[2 * i], 1));
        sums.set.merge(of(from[2 * i + 1]), k.scale);
      }
      sums.s = sum_of_warp(sums.s), x_ref = max_of_warp(x_ref);
      if (STATS) sums.h = sum_of_warp(sums.h);
      sums.set.merge_warp(k.scale);
      // The row's maximum in place of that of a few entries where the sum is out of range.
      good = device::all_of_warp(sums.s > 0x1p-40f && sums.s < 0x1p100f && sums.set.sum < INFINITY);
      if (good && !(STATS && device::all_of_warp(entropy_cancels<true>(sums)))) break;
    }
    if (!good || (!unlikelihood && !(sums.set.sum > 0.0f))) return leave();
    float loss;
    const float row_weight = negative ? s_.alpha : s_.weight;
    const LikelihoodGradient g = likelihood_coefficients(k, sums, unlikelihood, row_weight * s_.scale, loss);
    if (p_.grad) {
#pragma unroll 1
      for (int s = 0; s < steps; ++s) {
        if (s == full && !in_tail) break;
        float x[GROUP], out[GROUP];
        Stored<Logit>::unpack(device::load_vector(base + s * STEP_BYTES), x);
        const int column = s * STEP + thread_ * GROUP;
        const uint32_t bits = set_bits(s);
#pragma unroll
        for (int i = 0; i < GROUP; ++i) out[i] = g.kept * power(fmaf(x[i], k.scale, -k.c));
        if (bits) {
#pragma unroll
          for (int i = 0; i < GROUP; ++i)
            if (bits >> i & 1) out[i] = unlikelihood ? set_gradient(g.set, k, x[i]) : g.label;
        }
        store(column, out);
      }
    }
    if (!leader()) return;
    write_loss(double(row_weight) * double(loss));
    if (!STATS) return;
    KlDiagnosis d = kl_diagnosis<true, true>(k, sums);
    write_stats(loss, NAN, {negative ? d.negative_mass : 0.0f, NAN, d.entropy});
  }

  // ---- second pass: one group

  template <bool REVERSE, bool SET, class KlGradients>
  TNT_DEVICE void write(const KlGradients& g, const SetGradient& sg, const KlShift& k, int s, const char* base,
                        const char* other, bool far) {
    const int column = s * STEP + thread_ * GROUP;
    Group pairs = load(base + s * STEP_BYTES, other + s * STEP_BYTES, true);
    const uint32_t bits = SET ? set_bits(s) : 0;
    float z[GROUP], out[GROUP];
    if (SET && bits) {
#pragma unroll
      for (int i = 0; i < GROUP; ++i) z[i] = REVERSE ? pairs.x[i] : pairs.o[i];
      remove(bits, pairs);
    }
    if (!far) {
#pragma unroll
      for (int i = 0; i < GROUP; ++i) out[i] = near_gradient(g, k, pairs.x[i], pairs.o[i] - pairs.x[i]);
    } else {
#pragma unroll
      for (int i = 0; i < GROUP; ++i) out[i] = far_gradient(g, k, pairs.x[i], pairs.o[i]);
    }
    if (SET && bits) {
#pragma unroll
      for (int i = 0; i < GROUP; ++i)
        if (bits >> i & 1) out[i] = set_gradient(sg, k, z[i]);
    }
    store(column, out);
  }

  TNT_DEVICE void store(int column, const float (&x)[GROUP]) {
    Gradient* const to = static_cast<Gradient*>(p_.grad) + row() * p_.grad_stride + (begin_ - before_ + column);
    // A gradient that begins elsewhere than its logits is not worth lanes that help each other.
    constexpr int bytes = GROUP * int(sizeof(Gradient));
    const bool whole = column >= first_ && column + GROUP <= n_ && reinterpret_cast<uintptr_t>(to) % bytes == 0;
    if constexpr (std::is_same_v<Gradient, Logit>) {
      const Vector packed = Stored<Logit>::pack(x);
      if (whole) return device::store_vector(to, packed);
      store_entries(to, column, packed);
    } else {
      const uint32_t low = device::floats_to_bfloats(x[0], x[1]), high = device::floats_to_bfloats(x[2], x[3]);
      if (whole) return device::store_half_vector(to, low, high);
      store_entries(to, column, {{low, high, 0, 0}});
    }
  }
  TNT_DEVICE void store_entries(Gradient* to, int column, const Vector& packed) {
#pragma unroll
    for (int i = 0; i < GROUP; ++i) {
      if (column + i < first_ || column + i >= n_) continue;
      store_entry(to, packed, i);
    }
  }

  TNT_DEVICE void write_loss(double weighted) const { tnt::write_loss(p_, l_.losses, row(), weighted); }

  TNT_DEVICE void write_stats(float loss, float kl, const KlDiagnosis& d) const {
    const float values[5] = {loss, kl, d.negative_mass, d.ref_negative_mass, d.entropy};
#pragma unroll
    for (int i = 0; i < 5; ++i) static_cast<float*>(p_.row_stats)[i * p_.rows + row()] = values[i];
  }

  const RowParams& p_;
  const KlLaunch& l_;
  KlShared& s_;
  const int thread_, rank_, blocks_;
  float z_level_ = 0, r_level_ = 0, more_ = 0;
  int before_, begin_, n_, first_;  // columns before the row; of this block: its first, how many, the first that is one
};

}  // namespace TNT_ISA
}  // namespace tnt
