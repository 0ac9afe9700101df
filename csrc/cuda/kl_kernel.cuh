// Loss and gradient of KL rows at the speed of memory: one row a cluster, its slices in shared memory, read once. Every
// warp sums its entries (kl_math.cuh) and sends its sums to every block of the cluster; the first warp of each merges
// what has come, and tells its block the gradient's coefficients: one exchange a row, no barrier after it. Where the
// gradient waits for its factor, its plan is written in its place. Rows that this arithmetic does not serve (what is
// broken, infinite, or shifted too far for 16 bits) go on a list, which the kernel in two passes (stream_kernel.cuh)
// works off afterwards.
#pragma once

#include <type_traits>

#include "cuda/entry_points.h"
#include "cuda/kl_math.cuh"

namespace tnt {
inline namespace TNT_ISA {

constexpr int KL_STEPS = 16;  // of a block at most: each has a barrier for its copies, and a bit
constexpr int KL_SLICE = 32;  // slices are multiples of so many columns: whole words of the mask, whole sectors
constexpr int KL_ATTEMPTS = 3;
// The policy's logits take the place of differences, which 16 bits have no room for.
template <class Logit>
constexpr bool KL_TAKES_DIFFERENCES = sizeof(Logit) == 4;

struct KlLaunch {
  int slice;       // columns of a block
  int mask_bytes;  // of their bits
  int threads;     // of a block
  uint32_t steps;  // 2^32 over the columns that they read at once, rounded up
  Scales scales;
  const double* inverse_normalizer;  // null: 1
  double* losses;                    // (N) weighted, or null
  int* left;                         // how many rows are left to the other kernel, then their numbers
};

// What one warp finds for all of a block; no register holds it through the passes.
struct KlShared {
  uint64_t arrivals[KL_STEPS];
  uint64_t exchange[2];
  RowShift shifts[2];  // of forward and of reverse KL
  float z_level;
  uint32_t flags;
  float factors[2];  // the row's, if it is positive, and if it is negative
  float scale, eps;  // 1/normaliser/T
  KlVerdict verdict;
  PartialLabel label;  // log_kappa 0: none
  int label_at;        // its place among this block's columns, or -1
  float of_label;      // its gradient
  float loss;
  KlForm form;
  ForwardGradient forward;
  ReverseGradient reverse;
  SetGradient set;
  LikelihoodGradient likelihood;
  template <bool REVERSE>
  TNT_DEVICE auto& gradient() {
    if constexpr (REVERSE)
      return reverse;
    else
      return forward;
  }
};
constexpr int KL_HEADER = (sizeof(KlShared) + 127) / 128 * 128;

template <class Logit, class Gradient, bool DIAGNOSTICS>
class KlBlock {
 public:
  static constexpr int GROUP = Stored<Logit>::GROUP;
  static constexpr bool DIRECT = sizeof(Logit) == 2;  // whether a gradient's direct form is good enough
  // Whether rows may be read relative to their levels. Of 16 bits, which hold few digits, those would have to lie far
  // apart.
  static constexpr bool RELATIVE = sizeof(Logit) == 4;
  // Of a warp: its sums, those of its removed entries, and what the statistics need besides.
  template <bool SET>
  static constexpr int VECTORS = 1 + SET + DIAGNOSTICS;
  static constexpr int MESSAGE = VECTORS<true> * int(sizeof(Vector));  // at most
  static constexpr int mask_bytes(int slice) { return (slice / 8 + 127) / 128 * 128; }
  static constexpr int shared_bytes(int slice, int blocks, int threads, bool pair) {
    return KL_HEADER + 2 * blocks * (threads / device::WARP) * MESSAGE + mask_bytes(slice) +
           (pair ? 2 : 1) * slice * int(sizeof(Logit));
  }

  TNT_DEVICE KlBlock(const RowCall& call, const KlLaunch& launch)
      : p_(call),
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
    const float weight = row_weight<float>(p_, row());
    // Asked for at once: what the levels are taken from comes with the label.
    const bool wide = p_.vocab >= 2 * device::WARP * GROUP;
    Vector z_some{}, r_some{};
    if (warp() == LEVELS && wide) {
      const int lead = before_ > 0 ? GROUP - before_ : 0;
      const int at = lead + lane() * ((int(p_.vocab) - lead) / (GROUP * device::WARP)) * GROUP;
      z_some = device::load_vector(z_row() + at);
      if (p_.ref_logits) r_some = device::load_vector(r_row() + at);
    }
    if (thread_ == 0) init_barriers();  // while label and weight are on their way
    device::sync_block();
    if (!is_active(p_, label, weight)) return inactive();
    if (label < 0 || label >= p_.vocab_size) return leave();
    // Whether the reference is read is known at once, unless ids decide which loss the row has.
    const bool late = !differences() && p_.negative_ids && is_kl(p_.positive_loss) != is_kl(p_.negative_loss);
    const bool marks = p_.negative_ids || weight < 0.0f || p_.positive_loss == LOG_LIKELIHOOD;
    if (!late && warp() == COPIER)
      begin_copies(differences() || is_kl(weight < 0.0f ? p_.negative_loss : p_.positive_loss));
    device::cluster_arrive_relaxed();
    if (marks) {
      const int at = weight < 0.0f ? place_of(label) : -1;
      for (int i = thread_; i < mask_words(); i += threads()) mask()[i] = i == at >> 5 ? 1u << (at & 31) : 0u;
    }
    if (thread_ == threads() - device::WARP) {  // of the last
      const bool in_part = weight < 0.0f && weight > -1.0f && is_kl(p_.negative_loss);
      s_.flags = 0;
      s_.label_at = in_part ? place_of(label) : -1;
      s_.label = {0.0f, 0.0f, 0.0f};
      if (in_part)  // before a gradient may take their place
        s_.label = {z_at(label), Stored<Logit>::load(r_row() + label), log1pf(weight)};
      s_.factors[0] = weight;
      s_.factors[1] = row_factor<float>(p_, row(), p_.negative_loss, true, weight);
      s_.eps = float(p_.eps);
      s_.scale = l_.scales.inverse_t * (l_.inverse_normalizer ? float(*l_.inverse_normalizer) : 1.0f);
      if (p_.upstream) s_.scale *= static_cast<const float*>(p_.upstream)[row() * p_.upstream_stride];
    }
    if (warp() == LEVELS) levels(wide, z_some, r_some);
    device::sync_block();
    if (p_.negative_ids) {
      collect_ids(label);
      device::sync_block();
      if (late) {
        const bool negative = weight < 0.0f || (s_.flags & HAS_IDS);
        if (warp() == COPIER) begin_copies(is_kl(negative ? p_.negative_loss : p_.positive_loss));
        device::sync_block();
      }
    }
    const uint32_t flags = s_.flags;
    const bool negative = weight < 0.0f || (flags & HAS_IDS);
    const int row_loss = negative ? p_.negative_loss : p_.positive_loss;
    const float factor = fabsf(s_.factors[negative] * s_.scale);
    if (!(factor > 1e-30f && factor < 1e30f) || (flags & ID_OUTSIDE)) {
      for (int s = 0; s < steps(); ++s) device::arrival_wait(s_.arrivals + s);
      device::cluster_wait();
      return leave();
    }
    if (differences()) add_reference();
    if (row_loss == UNLIKELIHOOD || row_loss == LOG_LIKELIHOOD)
      compute_likelihood(row_loss == UNLIKELIHOOD, negative);
    else if (negative)
      row_loss == REVERSE_KL ? compute<true, true>() : compute<false, true>();
    else
      row_loss == REVERSE_KL ? compute<true, false>() : compute<false, false>();
  }

 private:
  // The warps that do something for all of the block.
  static constexpr int COPIER = 0, JUDGE = 0, LEVELS = 1;

  // Asked for again rather than kept: registers are what is short.
  TNT_DEVICE int64_t row() const { return device::cluster_index(); }
  TNT_DEVICE const Logit* z_row() const { return static_cast<const Logit*>(p_.logits) + row() * p_.logits_stride; }
  TNT_DEVICE const Logit* r_row() const {
    return static_cast<const Logit*>(p_.ref_logits) + row() * p_.ref_logits_stride;
  }

  TNT_DEVICE bool differences() const { return KL_TAKES_DIFFERENCES<Logit> && p_.differences; }
  TNT_DEVICE float z_at(int64_t column) const {
    return Stored<Logit>::load(z_row() + column) + (differences() ? Stored<Logit>::load(r_row() + column) : 0.0f);
  }

  TNT_DEVICE bool leader() const { return rank_ == 0 && thread_ == 0; }
  TNT_DEVICE int step() const { return l_.threads * GROUP; }
  TNT_DEVICE int step_bytes() const { return step() * int(sizeof(Logit)); }
  TNT_DEVICE int full_steps() const { return int(uint64_t(n_) * l_.steps >> 32); }
  TNT_DEVICE int steps() const { return full_steps() + (full_steps() * step() < n_); }
  TNT_DEVICE int threads() const { return l_.threads; }
  TNT_DEVICE int warps() const { return threads() / device::WARP; }
  TNT_DEVICE int warp() const { return thread_ / device::WARP; }
  TNT_DEVICE int lane() const { return thread_ % device::WARP; }

  TNT_DEVICE char* messages() const { return device::shared_memory() + KL_HEADER; }
  TNT_DEVICE uint32_t* mask() const {
    return reinterpret_cast<uint32_t*>(messages() + 2 * blocks_ * warps() * MESSAGE);
  }
  TNT_DEVICE char* slot(bool reference) const {
    return reinterpret_cast<char*>(mask()) + l_.mask_bytes + (reference ? l_.slice * int(sizeof(Logit)) : 0);
  }
  TNT_DEVICE int mask_words() const { return l_.slice / 32; }
  TNT_DEVICE uint32_t set_bits(int step) const {  // of this thread's group
    const uint8_t* const bytes = reinterpret_cast<const uint8_t*>(mask()) + step * (l_.threads * GROUP / 8);
    return GROUP == 8 ? bytes[thread_] : bytes[thread_ >> 1] >> ((thread_ & 1) * 4) & 15;
  }
  // Calls body(at) for the marked columns of this thread's words. A warp meets afterwards.
  template <class Body>
  TNT_DEVICE void for_each_marked(Body body) const {
    for (int i = thread_; i < mask_words(); i += threads())
      for (uint32_t b = mask()[i]; b; b &= b - 1) body(i * 32 + device::lowest_bit(b));
    device::sync_warp();
  }
  TNT_DEVICE void collect_ids(int64_t label) {
    const int64_t* const ids = p_.negative_ids + row() * p_.negative_ids_stride;
    uint32_t flags = 0;
    constexpr int AHEAD = 8;  // asked for before the first is looked at
#pragma unroll 1
    for (int64_t first = thread_; first < p_.negative_ids_count; first += AHEAD * threads()) {
      int64_t some[AHEAD];
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        const int64_t k = first + i * threads();
        some[i] = k < p_.negative_ids_count ? ids[k] : -1;
      }
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        if (some[i] == -1) continue;
        flags |= HAS_IDS | (some[i] < 0 || some[i] >= p_.vocab_size ? ID_OUTSIDE : 0);
        if (some[i] == label) flags |= LABEL_AMONG_IDS;
        mark(some[i]);
      }
    }
    if (flags) device::atomic_or(&s_.flags, flags);
  }
  // Whether y is pushed down in part. Among the ids it is removed.
  TNT_DEVICE bool has_partial() const { return s_.label.log_kappa != 0.0f && !(s_.flags & LABEL_AMONG_IDS); }
  TNT_DEVICE int partial_at() const { return has_partial() ? s_.label_at : -1; }
  TNT_DEVICE void mark(int64_t id) {
    const int at = place_of(id);
    if (at >= 0) device::atomic_or(mask() + at / 32, 1u << (at & 31));
  }
  // Among this block's columns, or -1; any 64-bit number may come.
  TNT_DEVICE int place_of(int64_t id) const {
    if (id < 0 || id >= p_.vocab) return -1;
    const int at = int(id) + before_ - begin_;
    return at >= 0 && at < n_ ? at : -1;
  }

  // ---- rows that are not computed here

  TNT_DEVICE void inactive() {
    if (p_.gradient) write([](int) { return Output{}; });
    if (!leader()) return;
    if (p_.coefficients) coefficients()[ROW_COEFFICIENTS - 1] = 0.0f;
    write_loss(0.0);
    if (DIAGNOSTICS) write_diagnostics(p_, row(), 0.0f, NAN, KlDiagnosis{NAN, NAN, NAN});
  }
  TNT_DEVICE void leave() {
    if (leader()) l_.left[1 + device::atomic_add(l_.left, 1)] = int(row());
  }

  // ---- reading: whole vectors by bulk copies, a step at a time; the row's two edges by hand, with -inf around them

  TNT_DEVICE void init_barriers() {
#pragma unroll
    for (int s = 0; s < KL_STEPS; ++s) device::arrival_init(s_.arrivals + s, 1);
    device::arrival_init(s_.exchange, 1);
    device::arrival_init(s_.exchange + 1, 1);
    device::arrival_fence();
  }
  // By one warp, a lane a copy, so that the addresses are worked out side by side. What it writes by hand is for others
  // when the block has met.
  TNT_DEVICE void begin_copies(bool pair) {
    const Logit *const z = z_row() - before_ + begin_, *const r = pair ? r_row() - before_ + begin_ : z;  // aligned
    const int whole = n_ / GROUP * GROUP, from = first_ > 0 ? GROUP : 0;
    const int s = lane() >> 1;
    const bool of_reference = lane() & 1;
    if (s < steps() && (pair || !of_reference)) {
      const int first = s * step_bytes(), at = s == 0 ? from * int(sizeof(Logit)) : first;
      const int end = whole * int(sizeof(Logit)), limit = first + step_bytes() < end ? first + step_bytes() : end;
      const int bytes = limit > at ? limit - at : 0;
      if (!of_reference) device::arrival_expect(s_.arrivals + s, pair ? 2 * bytes : bytes);
      const char* const row = reinterpret_cast<const char*>(of_reference ? r : z);
      if (bytes > 0) device::bulk_copy(slot(of_reference) + at, row + at, bytes, s_.arrivals + s);
    }
    if (lane() < GROUP)
      edge(lane(), from > 0 && lane() < from, pair, z, r);
    else if (lane() < 2 * GROUP)
      edge(whole + lane() - GROUP, whole < n_ && !(from > 0 && whole == 0), pair, z, r);
  }
  TNT_DEVICE void edge(int at, bool copies, bool pair, const Logit* z, const Logit* r) {
    if (!copies) return;
    const bool inside = at >= first_ && at < n_;
    const Logit nothing = Stored<Logit>::nothing(), none = differences() ? Logit{} : nothing;
    reinterpret_cast<Logit*>(slot(false))[at] = inside ? z[at] : none;
    if (pair) reinterpret_cast<Logit*>(slot(true))[at] = inside ? r[at] : nothing;
  }
  // The policy's logits in place of their differences to the reference's.
  TNT_DEVICE void add_reference() {
    char* const z = slot(false) + thread_ * 16;
    const int full = full_steps();
    const bool in_tail = full * step() + thread_ * GROUP < n_;
#pragma unroll 1
    for (int s = 0; s < steps(); ++s) {
      device::arrival_wait(s_.arrivals + s);
      if (s == full && !in_tail) break;
      Group g = load<true>(z + s * step_bytes(), true);
#pragma unroll
      for (int i = 0; i < GROUP; ++i) g.x[i] += g.o[i];
      *reinterpret_cast<Vector*>(z + s * step_bytes()) = Stored<Logit>::pack(g.x);
    }
    device::sync_block();
  }

  using Group = KlGroup<GROUP>;
  // x and o of the group at this place of the policy's slot; away where this thread has none.
  template <bool REVERSE>
  TNT_DEVICE Group load(const char* z, bool present) const {
    Group g;
    if (present) {
      const char* const r = z + l_.slice * int(sizeof(Logit));
      Stored<Logit>::unpack(device::load_vector(REVERSE ? z : r), g.x);
      Stored<Logit>::unpack(device::load_vector(REVERSE ? r : z), g.o);
    } else {
#pragma unroll
      for (int i = 0; i < GROUP; ++i) g.x[i] = g.o[i] = AWAY;
    }
    return g;
  }
  TNT_DEVICE static float relative(float x, float zero) { return RELATIVE ? x - zero : x; }
  TNT_DEVICE static void relate(const RowShift& k, Group& g) {
#pragma unroll
    for (int i = 0; i < GROUP; ++i) g.x[i] = relative(g.x[i], k.x_zero), g.o[i] = relative(g.o[i], k.o_zero);
  }
  // Every warp's numbers to every block, whose judge waits for them. Two places in turn suffice: who sends in exchange
  // i + 2 has heard the verdict on i + 1, for which every warp sent, knowing that on i. A block that is launched alone
  // sends nothing: the number that it has in a cluster is undefined.
  TNT_DEVICE char* place(int i) const { return messages() + (i & 1) * blocks_ * warps() * MESSAGE; }
  template <int N>
  TNT_DEVICE void send(int i, const Vector (&message)[N]) {
    constexpr int bytes = N * sizeof(Vector);
    char* const to = place(i) + (rank_ * warps() + warp()) * bytes;
    if (blocks_ == 1) {
      if (lane() == 0) {
#pragma unroll
        for (int v = 0; v < N; ++v) reinterpret_cast<Vector*>(to)[v] = message[v];
      }
      return device::sync_block();
    }
    uint64_t* const barrier = s_.exchange + (i & 1);
    if (thread_ == 0) device::arrival_expect(barrier, uint32_t(blocks_ * warps() * bytes));
    if (lane() < blocks_) {
#pragma unroll
      for (int v = 0; v < N; ++v) device::send(to + v * sizeof(Vector), message[v], barrier, lane());
    }
  }
  TNT_DEVICE const Vector* receive(int i) {
    if (blocks_ > 1) device::arrival_wait_cluster(s_.exchange + (i & 1), i >> 1 & 1);
    return reinterpret_cast<const Vector*>(place(i));
  }
  static TNT_DEVICE Vector pack(float a, float b, float c, float d) {
    return {{bits_as<uint32_t>(a), bits_as<uint32_t>(b), bits_as<uint32_t>(c), bits_as<uint32_t>(d)}};
  }
  static TNT_DEVICE float at(const Vector& x, int i) { return bits_as<float>(x.words[i]); }
  static TNT_DEVICE KlSetSums of(const Vector& x) { return {at(x, 0), at(x, 1), at(x, 2), at(x, 3)}; }
  static TNT_DEVICE KlSetSums of_mass(const Vector& x) { return {at(x, 0), at(x, 1), 0.0f, 0.0f}; }

  static TNT_DEVICE References references(float x_top, float o_top) {
    const bool numbers = fabsf(x_top) < 1e29f && fabsf(o_top) < 1e29f;  // AWAY is none
    if (RELATIVE && numbers) return references_of(x_top, o_top, MOST_APART<Logit>);
    return {x_top, o_top};
  }

  // ---- a row

  // Numbers as integers of the same order: a warp's largest integer is one instruction.
  static TNT_DEVICE int ordered(float x) { return mirrored(bits_as<int>(x)); }
  static TNT_DEVICE float from_ordered(int x) { return bits_as<float>(mirrored(x)); }
  static TNT_DEVICE int mirrored(int x) { return x ^ (x >> 31 & 0x7fffffff); }

  // The rows' levels, their maxima over a few entries all along them, and how far z lies above r there on average; from
  // these the shift. The same in every block of the cluster.
  TNT_DEVICE void levels(bool wide, const Vector& z_some, const Vector& r_some) {
    float z[GROUP], r[GROUP];
    if (wide) {
      Stored<Logit>::unpack(z_some, z);
      Stored<Logit>::unpack(r_some, r);
    } else {
      const int at = lane() < p_.vocab ? lane() : int(p_.vocab) - 1;
      const float z_at = Stored<Logit>::load(z_row() + at);
      const float r_at = p_.ref_logits ? Stored<Logit>::load(r_row() + at) : 0.0f;
#pragma unroll
      for (int i = 0; i < GROUP; ++i) z[i] = z_at, r[i] = r_at;
    }
    if (differences()) {
#pragma unroll
      for (int i = 0; i < GROUP; ++i) z[i] += r[i];
    }
    float z_top = z[0], r_top = r[0], above = z[0] - r[0];
#pragma unroll
    for (int i = 1; i < GROUP; ++i) z_top = fmaxf(z_top, z[i]), r_top = fmaxf(r_top, r[i]), above += z[i] - r[i];
    z_top = from_ordered(device::max_of_warp(ordered(z_top)));
    r_top = from_ordered(device::max_of_warp(ordered(r_top)));
    // The average difference is nearer to L than that of the maxima; infinities have none.
    float more = (sum_of_warp(above) * (1.0f / (device::WARP * GROUP)) - (z_top - r_top)) * l_.scales.inverse_t;
    more = fabsf(more) < 16.0f ? more : 0.0f;
    if (lane() > 1) return;
    const bool reverse = lane() == 1;
    s_.z_level = z_top;
    const References at = references(reverse ? z_top : r_top, reverse ? r_top : z_top);
    s_.shifts[reverse] = row_shift(at, l_.scales, reverse ? -more : more);
  }

  // The first pass until its sums are fit, then the second.
  template <bool REVERSE, bool SET>
  TNT_DEVICE void compute() {
    constexpr int VECTORS = KlBlock::VECTORS<SET>;
    const char* const z = slot(false) + thread_ * 16;
    const int full = full_steps(), steps = this->steps();
    const bool in_tail = full * step() + thread_ * GROUP < n_;
    uint32_t far;
    int count = 0;  // exchanges so far
    KlVerdict verdict = KL_AGAIN;
#pragma unroll 1
    for (int attempt = 0; attempt < KL_ATTEMPTS; ++attempt) {
      const RowShift k = s_.shifts[REVERSE];
      KlSums t;
      uint32_t bit = 1;
      const char* group = z;
      far = 0;
#pragma unroll 1
      for (int s = 0; s < full; ++s, group += step_bytes(), bit += bit) {
        device::arrival_wait(s_.arrivals + s);
        Group g = load<REVERSE>(group, true);
        relate(k, g);
        if (SET) {
          const uint32_t bits = set_bits(s);
          if (bits) remove(bits, g);
        }
        if (add_group<REVERSE, DIAGNOSTICS>(t, k, g, false)) far |= bit;
      }
      if (full < steps) {
        device::arrival_wait(s_.arrivals + full);
        Group g = load<REVERSE>(group, in_tail);
        relate(k, g);
        if (SET && in_tail) remove(set_bits(full), g);
        if (add_group<REVERSE, DIAGNOSTICS>(t, k, g, false)) far |= bit;
      }
      Vector mine[VECTORS];
      mine[0] = pack(sum_of_warp(t.s), sum_of_warp(t.a_or_m(REVERSE)), sum_of_warp(t.phi()),
                     DIAGNOSTICS ? sum_of_warp(t.h) : 0.0f);
      if constexpr (DIAGNOSTICS) mine[VECTORS - 1] = pack(AWAY, 0.0f, sum_of_warp(t.a), 0.0f);
      if constexpr (SET) {
        KlSetSums removed, of_reference;
        const Logit *const z = reinterpret_cast<const Logit*>(slot(false)), *const r = reinterpret_cast<const Logit*>(
                                                                                slot(true));
        const int left_out = partial_at();
        for_each_marked([&](int at) {
          if (at == left_out) return;
          const float r_at = Stored<Logit>::load(r + at);
          removed.add(Stored<Logit>::load(z + at), k.scale);
          if (DIAGNOSTICS) of_reference.add(r_at, k.scale);
          if (!(r_at < INFINITY)) removed.sum = NAN;  // a broken reference
        });
        removed.merge_warp(k.scale);
        mine[1] = pack(removed.max, removed.sum, removed.moment, removed.n);
        if constexpr (DIAGNOSTICS) {
          of_reference.merge_warp(k.scale);
          mine[2].words[0] = bits_as<uint32_t>(of_reference.max);
          mine[2].words[1] = bits_as<uint32_t>(of_reference.sum);
        }
      }
      if (attempt == 0) device::cluster_wait();  // all blocks have initialised their barriers
      send(count, mine);
      if (warp() == JUDGE) judge<REVERSE, SET>(receive(count), attempt);
      ++count;
      device::sync_block();
      verdict = s_.verdict;
      if (verdict == KL_GOOD || verdict == KL_LEFT) break;
      if (verdict == KL_AGAIN) continue;
      // The row's maxima in place of those of a few entries.
      float x_top = AWAY, o_top = AWAY;
      if (SET && has_partial()) x_top = REVERSE ? s_.label.z : s_.label.r, o_top = REVERSE ? s_.label.r : s_.label.z;
#pragma unroll 1
      for (int s = 0; s < steps; ++s) {
        if (s == full && !in_tail) break;
        Group g = load<REVERSE>(z + s * step_bytes(), true);
        if (SET) remove(set_bits(s), g);
#pragma unroll
        for (int i = 0; i < GROUP; ++i) x_top = fmaxf(x_top, g.x[i]), o_top = fmaxf(o_top, g.o[i]);
      }
      device::sync_warp();
      const Vector mine_of_tops[1] = {pack(max_of_warp(x_top), max_of_warp(o_top), 0.0f, 0.0f)};
      send(count, mine_of_tops);
      if (warp() == JUDGE) {
        const Vector* const tops = receive(count);
        x_top = o_top = AWAY;
#pragma unroll 1
        for (int i = lane(); i < blocks_ * warps(); i += device::WARP)
          x_top = fmaxf(x_top, at(tops[i], 0)), o_top = fmaxf(o_top, at(tops[i], 1));
        device::sync_warp();
        x_top = max_of_warp(x_top), o_top = max_of_warp(o_top);
        if (lane() == 0) s_.shifts[REVERSE] = row_shift(references(x_top, o_top), l_.scales, 0.0f);
      }
      ++count;
      device::sync_block();
    }
    if (verdict != KL_GOOD) return leave();
    if (p_.gradient) {
      const RowShift k = s_.shifts[REVERSE];
      const auto g = s_.template gradient<REVERSE>();
      const KlForm form = s_.form;
      if (SET) {
        const int at_label = partial_at();
        put_set_gradients([&](int at, float z) { return at == at_label ? s_.of_label : set_gradient(s_.set, k, z); });
      }
      // A forward KL's direct form serves any logits, a reverse KL's none that are infinite.
      if (DIRECT && form == KL_DIRECT && (!REVERSE || far == 0)) {
        write([&](int s) {
          return gradient<REVERSE, SET>(s, z, k, [&](float x, float o) { return direct_gradient(g, k, x, o); });
        });
      } else {
        if (form == KL_FAR) far = ~0u;
        write([&](int s) {
          const bool near = !(far >> s & 1);
          return near ? gradient<REVERSE, SET>(s, z, k,
                                               [&](float x, float o) { return near_gradient<!DIRECT>(g, k, x, o); })
                      : gradient<REVERSE, SET>(s, z, k,
                                               [&](float x, float o) { return far_gradient<!DIRECT>(g, k, x, o); });
        });
      }
    }
    if (leader()) write_loss(double(s_.factors[SET]) * double(s_.loss));
  }

  // By one warp: the row's sums, and from them the coefficients of its gradient, or what to do instead. All blocks of
  // the cluster have the same numbers in the same order, hence the same answer.
  template <bool REVERSE, bool SET>
  TNT_DEVICE void judge(const Vector* from, int attempt) {
    constexpr int VECTORS = KlBlock::VECTORS<SET>;
    const RowShift k = s_.shifts[REVERSE];
    KlRow sums;
#pragma unroll 1
    for (int i = lane(); i < blocks_ * warps(); i += device::WARP) {
      const Vector m = from[VECTORS * i];
      sums.s += at(m, 0), sums.a_or_m += at(m, 1), sums.phi += at(m, 2);
      if (DIAGNOSTICS) sums.h += at(m, 3), sums.a += at(from[VECTORS * i + VECTORS - 1], 2);
      if (SET) sums.set.merge(of(from[VECTORS * i + 1]), k.scale);
      if (SET && DIAGNOSTICS) sums.reference_set.merge(of_mass(from[VECTORS * i + VECTORS - 1]), k.scale);
    }
    device::sync_warp();
    sums.s = sum_of_warp(sums.s), sums.a_or_m = sum_of_warp(sums.a_or_m), sums.phi = sum_of_warp(sums.phi);
    if (DIAGNOSTICS) sums.h = sum_of_warp(sums.h), sums.a = sum_of_warp(sums.a);
    if (SET) sums.set.merge_warp(k.scale);
    if (SET && DIAGNOSTICS) sums.reference_set.merge_warp(k.scale);
    if (lane() > 0) return;
    const bool has_label = SET && has_partial();
    PartialEntry label{};
    KlRow without_label = sums;
    if (has_label) {
      label = entry_of<REVERSE>(s_.label, k);
      add<REVERSE>(sums, label);
      if (DIAGNOSTICS) without_label.set.add(s_.label.z, k.scale), without_label.reference_set.add(s_.label.r, k.scale);
    }
    // What a few entries say of levels may come from removed ones.
    const bool readable = RELATIVE ? attempt > 0 || (k.x_zero == 0.0f && k.o_zero == 0.0f)
                                   : fabsf(k.o_ref - k.x_ref) <= MOST_APART<Logit>;
    const KlVerdict verdict = judge_sums<REVERSE>(sums, DIAGNOSTICS, attempt == 0, readable,
                                                  DIAGNOSTICS && entropy_cancels<REVERSE>(without_label));
    const bool served = sums.set.sum < INFINITY && !(REVERSE && SET && !(s_.eps > 1e-30f));
    if (verdict == KL_GOOD && served) {
      s_.verdict = KL_GOOD;
      const float factor = s_.factors[SET] * s_.scale;
      auto& g = s_.template gradient<REVERSE>();
      s_.form = kl_coefficients<SET, DIRECT>(k, sums, label, has_label, p_.coefficients ? 1.0f : factor, s_.eps, g,
                                             s_.set, s_.of_label, s_.loss);
      if (rank_ != 0) return;
      if (p_.coefficients)
        write_plan(plan_of(REVERSE, k, sums, g, s_.set, has_label ? s_.of_label : 0.0f), factor, coefficients());
      if (DIAGNOSTICS) write_diagnostics(p_, row(), s_.loss, s_.loss, kl_diagnosis<REVERSE, SET>(k, without_label));
    } else if (!served || verdict == KL_INFINITE || attempt == KL_ATTEMPTS - 1 || (attempt > 0 && !readable)) {
      s_.verdict = KL_LEFT;
    } else {
      s_.verdict = verdict;
      if (verdict == KL_AGAIN) s_.shifts[REVERSE] = with(k, k.more + sums.l, 0.0f);
    }
  }

  // ---- LL and UL: the policy's row alone, with a set always

  TNT_DEVICE void compute_likelihood(bool unlikelihood, bool negative) {
    const char* const base = slot(false) + thread_ * 16;
    const int full = full_steps(), steps = this->steps();
    const bool in_tail = full * step() + thread_ * GROUP < n_;
    if (!unlikelihood && thread_ == 0) mark(p_.labels[row()]);
    device::sync_block();
    RowShift k;
#pragma unroll 1
    for (int attempt = 0; attempt < 2; ++attempt) {
      const float x_ref = s_.z_level;
      k = row_shift({x_ref, x_ref}, l_.scales, 0.0f);
      float sum = 0.0f, h = 0.0f, top = AWAY;
#pragma unroll 1
      for (int s = 0; s < steps; ++s) {
        device::arrival_wait(s_.arrivals + s);
        if (s == full && !in_tail) break;
        float x[GROUP];
        Stored<Logit>::unpack(device::load_vector(base + s * step_bytes()), x);
        const uint32_t bits = set_bits(s);
#pragma unroll
        for (int i = 0; i < GROUP; ++i) {
          if (bits >> i & 1) x[i] = AWAY;
          const float at = fmaf(x[i], k.scale, -k.c), e = power(at);
          sum += e;
          if (DIAGNOSTICS) h = fmaf(e, fmaxf(at, -256.0f), h);
          top = fmaxf(top, x[i]);
        }
      }
      KlSetSums removed;
      const Logit* const z = reinterpret_cast<const Logit*>(slot(false));
      for_each_marked([&](int at) { removed.add(Stored<Logit>::load(z + at), k.scale); });
      removed.merge_warp(k.scale);
      const Vector mine[2] = {pack(sum_of_warp(sum), max_of_warp(top), DIAGNOSTICS ? sum_of_warp(h) : 0.0f, 0.0f),
                              pack(removed.max, removed.sum, removed.moment, removed.n)};
      if (attempt == 0) device::cluster_wait();
      send(attempt, mine);
      if (warp() == JUDGE) judge_likelihood(receive(attempt), k, attempt, unlikelihood, negative);
      device::sync_block();
      if (s_.verdict != KL_AGAIN) break;
    }
    if (s_.verdict != KL_GOOD) return leave();
    if (p_.gradient) {
      const LikelihoodGradient g = s_.likelihood;
      put_set_gradients([&](int, float z) { return unlikelihood ? set_gradient(g.set, k, z) : g.label; });
      write([&](int s) {
        float x[GROUP];
        Output out;
        Stored<Logit>::unpack(device::load_vector(base + s * step_bytes()), x);
        const uint32_t bits = set_bits(s);
#pragma unroll
        for (int i = 0; i < GROUP; ++i) out.x[i] = bits >> i & 1 ? x[i] : g.kept * power(fmaf(x[i], k.scale, -k.c));
        return out;
      });
    }
    if (leader()) write_loss(double(s_.factors[negative]) * double(s_.loss));
  }

  TNT_DEVICE void judge_likelihood(const Vector* from, const RowShift& k, int attempt, bool unlikelihood,
                                   bool negative) {
    KlRow sums;
    float top = AWAY;
#pragma unroll 1
    for (int i = lane(); i < blocks_ * warps(); i += device::WARP) {
      sums.s += at(from[2 * i], 0), sums.h += at(from[2 * i], 2);
      top = fmaxf(top, at(from[2 * i], 1));
      sums.set.merge(of(from[2 * i + 1]), k.scale);
    }
    device::sync_warp();
    sums.s = sum_of_warp(sums.s), top = max_of_warp(top);
    if (DIAGNOSTICS) sums.h = sum_of_warp(sums.h);
    sums.set.merge_warp(k.scale);
    if (lane() > 0) return;
    const bool good = sums.s > 0x1p-40f && sums.s < 0x1p40f && sums.set.sum < INFINITY;
    if (attempt == 0 && !(good && !(DIAGNOSTICS && entropy_cancels<true>(sums)))) {
      // The row's maximum in place of that of a few entries.
      s_.verdict = KL_AGAIN;
      s_.z_level = top;
      return;
    }
    s_.verdict = good && (unlikelihood || sums.set.sum > 0.0f) ? KL_GOOD : KL_LEFT;
    const float factor = s_.factors[negative] * s_.scale;
    s_.likelihood = likelihood_coefficients(k, sums, unlikelihood, p_.coefficients ? 1.0f : factor, s_.loss);
    if (rank_ != 0 || s_.verdict != KL_GOOD) return;
    if (p_.coefficients) write_plan(plan_of(k, s_.likelihood), factor, coefficients());
    if (!DIAGNOSTICS) return;
    const KlDiagnosis d = kl_diagnosis<true, true>(k, sums);
    write_diagnostics(p_, row(), s_.loss, NAN, KlDiagnosis{negative ? d.negative_mass : 0.0f, NAN, d.entropy});
  }

  // ---- second pass

  struct Output {  // a group of the gradient
    float x[GROUP] = {};
    TNT_DEVICE Vector pack() const {
      if constexpr (std::is_same_v<Gradient, Logit>)
        return Stored<Logit>::pack(x);
      else
        return {{device::floats_to_bfloats(x[0], x[1]), device::floats_to_bfloats(x[2], x[3]), 0, 0}};
    }
  };

  // Of this thread's group in a step; `element` is the gradient of a kept entry.
  template <bool REVERSE, bool SET, class Element>
  TNT_DEVICE Output gradient(int s, const char* z, const RowShift& k, Element element) const {
    const Group pairs = load<REVERSE>(z + s * step_bytes(), true);
    Output out;
#pragma unroll
    for (int i = 0; i < GROUP; ++i) out.x[i] = element(relative(pairs.x[i], k.x_zero), relative(pairs.o[i], k.o_zero));
    if (SET) {
      const uint32_t bits = set_bits(s);
      if (bits) {
#pragma unroll
        for (int i = 0; i < GROUP; ++i) out.x[i] = bits >> i & 1 ? (REVERSE ? pairs.x[i] : pairs.o[i]) : out.x[i];
      }
    }
    return out;
  }

  // The gradients of removed entries take the place of their logits: entry by entry no lane waits for another's.
  template <class Compute>
  TNT_DEVICE void put_set_gradients(Compute compute) {
    Logit* const z = reinterpret_cast<Logit*>(slot(false));
    for_each_marked(
        [&](int at) { store_entry(z + at, Stored<Logit>::pack({compute(at, Stored<Logit>::load(z + at))}), 0); });
    device::sync_block();
  }

  // Writes this thread's groups, step by step: whole ones by vectors, then those at the row's edges by entries. (A
  // gradient that begins elsewhere than its logits is not worth lanes that help each other.)
  template <class Compute>
  TNT_DEVICE void write(Compute compute) {
    constexpr int bytes = GROUP * int(sizeof(Gradient));
    const int first = thread_ * GROUP, full = full_steps(), last = full * step() + first;
    const int steps = full + (last < n_);  // of this thread
    Gradient* const row = static_cast<Gradient*>(p_.gradient) + this->row() * p_.gradient_stride + (begin_ - before_);
    const bool aligned = reinterpret_cast<uintptr_t>(row) % bytes == 0;
    const int begin = first < first_;
    int end = aligned ? full + (last + GROUP <= n_) : 0;
    end = end > begin ? end : begin;
    Gradient* to = row + first + begin * step();
#pragma unroll 1
    for (int s = begin; s < end; ++s, to += step()) {
      const Vector packed = compute(s).pack();
      if constexpr (bytes == 16)
        device::store_vector(to, packed);
      else
        device::store_half_vector(to, packed.words[0], packed.words[1]);
    }
#pragma unroll 1
    for (int s = begin > 0 ? 0 : end; s < steps; s = s < begin ? end : s + 1) {
      const Vector packed = compute(s).pack();
      const int column = s * step() + first;
#pragma unroll
      for (int i = 0; i < GROUP; ++i)
        if (column + i >= first_ && column + i < n_) store_entry(row + column, packed, i);
    }
  }

  TNT_DEVICE float* coefficients() const { return static_cast<float*>(p_.coefficients) + row() * ROW_COEFFICIENTS; }
  TNT_DEVICE void write_loss(double weighted) const { tnt::write_loss(p_, l_.losses, row(), weighted); }

  const RowCall& p_;
  const KlLaunch& l_;
  KlShared& s_;
  const int thread_, rank_, blocks_;
  int before_, begin_, n_, first_;  // columns before the row; of this block: its first, how many, the first that is one
};

}  // namespace TNT_ISA
}  // namespace tnt
