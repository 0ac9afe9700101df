// Loss and gradient of KL rows at the speed of memory: a cluster takes one row after another, its warps a piece of
// each, which stays in shared memory and is read once. Every warp sums its entries (kl_math.cuh) and sends its sums to
// every block of the cluster; the first warp of each merges what has come, and tells its block the gradient's
// coefficients: one exchange and one barrier a row. Meanwhile another warp looks at the row that comes next, whose
// logits each warp asks for as soon as it has written its piece of the gradient. Rows that this arithmetic does not
// serve (what is broken, infinite, pushed down in part or shifted too far) go on a list, which the kernel in two passes
// (row_kernel.cuh) works off afterwards.
#pragma once

#include <type_traits>

#include "kl_math.cuh"
#include "row_cuda.h"

namespace tnt {
inline namespace TNT_ISA {

constexpr int KL_STEPS = 32;  // of a warp at most: each has a bit
constexpr int KL_ATTEMPTS = 3;
constexpr int KL_PIECE = 32;  // pieces are multiples of so many columns: whole words of the mask, whole sectors
constexpr int KL_WARPS = 3 * device::KL_THREADS / device::WARP;  // of a block at most

struct KlLaunch {
  int piece;       // columns of a warp
  int slice;       // of a block
  int mask_bytes;  // of their bits
  int threads;     // of a block
  float inverse_temperature;
  const double* inverse_normalizer;  // null: 1
  double* losses;                    // (N) weighted, or null
  int* left;                         // how many rows are left to the other kernel, then their numbers
};

// What the first warp of a block says of the row's sums.
enum KlVerdict { KL_GOOD, KL_LEFT, KL_AGAIN, KL_BY_MAXIMA };

// A row, and those before it that are not computed, as one warp finds them for its block.
struct KlTurn {
  int row;            // -1: none of those that were looked at
  int from;           // the first that was looked at; the others follow a grid apart
  uint32_t inactive;  // which of them, before `row`, are inactive
  bool more;          // `row` is -1, but others follow
  int label;
  float weight;
  float factors[2];  // the row's, if it is positive, and if it is negative
  float z_level;
  uint32_t flags;
  KlShift shifts[2];  // of forward and of reverse KL
};
// A warp may still write the row before while another looks for the row behind the present one.
constexpr int KL_TURNS = 3;

// What one warp finds for all of a block; no register holds it through the passes.
struct KlShared {
  uint64_t arrivals[KL_WARPS];
  uint64_t exchange[2];
  KlTurn turns[KL_TURNS];
  float scale, eps;  // 1/normaliser/T
  KlVerdict verdict;
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
  static constexpr int STEP = device::WARP * GROUP;  // columns that a warp reads at once
  static constexpr int STEP_BYTES = STEP * int(sizeof(Logit));
  static constexpr bool DIRECT = sizeof(Logit) == 2;  // whether a gradient's direct form is good enough
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
        thread_(device::thread_index()),
        rank_(device::cluster_rank()),
        blocks_(device::cluster_size()) {}

  TNT_DEVICE void run() {
    if (lane() == 0) device::arrival_init(block().arrivals + warp(), 1);
    if (thread_ == 0) {
      device::arrival_init(block().exchange, 1);
      device::arrival_init(block().exchange + 1, 1);
      block().eps = float(p_.eps);
      block().scale = l_.inverse_temperature * (l_.inverse_normalizer ? float(*l_.inverse_normalizer) : 1.0f);
    }
    device::arrival_fence();
    device::cluster_arrive_relaxed();
    if (warp() == SCOUT) look(block().turns[0], device::cluster_index());
    device::sync_block();
    device::cluster_wait();  // all blocks have initialised their barriers
    for (;;) {
      const KlTurn& t = turn();
      if (t.row >= 0 && !kind_is_late()) begin_copies(is_kl(t.weight < 0.0f ? p_.negative_loss : p_.positive_loss));
      if (t.inactive) fill(t);
      if (t.row < 0 && !t.more) return;
      if (t.row < 0 || !compute()) {  // nobody has looked for the next row yet
        if (warp() == SCOUT) look_ahead();
        device::sync_block();
      }
      turn_ = next_turn();
    }
  }

 private:
  // The warps that do something for all of the block.
  static constexpr int JUDGE = 0, SCOUT = 1;

  // Asked for again rather than kept: registers are what is short.
  TNT_DEVICE const Logit* z_row(int row) const {
    return static_cast<const Logit*>(p_.logits) + int64_t(row) * p_.logits_stride;
  }
  TNT_DEVICE const Logit* r_row(int row) const {
    return static_cast<const Logit*>(p_.ref_logits) + int64_t(row) * p_.ref_logits_stride;
  }

  TNT_DEVICE KlShared& block() const { return *reinterpret_cast<KlShared*>(device::shared_memory()); }
  TNT_DEVICE KlTurn& turn() const { return block().turns[turn_]; }
  TNT_DEVICE int next_turn() const { return turn_ + 1 < KL_TURNS ? turn_ + 1 : 0; }
  TNT_DEVICE int clusters() const { return int(device::grid_size()) / blocks_; }
  TNT_DEVICE bool leader() const { return rank_ == 0 && thread_ == 0; }
  TNT_DEVICE int threads() const { return l_.threads; }
  TNT_DEVICE int warps() const { return threads() / device::WARP; }
  TNT_DEVICE int warp() const { return thread_ / device::WARP; }
  TNT_DEVICE int lane() const { return thread_ % device::WARP; }

  TNT_DEVICE int exchanges() const { return int(counts_ >> 1); }
  TNT_DEVICE char* messages() const { return device::shared_memory() + KL_HEADER; }
  TNT_DEVICE uint32_t* mask() const {  // of the block
    return reinterpret_cast<uint32_t*>(messages() + 2 * blocks_ * warps() * MESSAGE);
  }
  TNT_DEVICE uint32_t* own_mask() const { return mask() + warp() * (l_.piece / 32); }
  TNT_DEVICE char* slot(bool reference) const {  // of this warp's piece
    return reinterpret_cast<char*>(mask()) + l_.mask_bytes +
           (warp() * l_.piece + (reference ? l_.slice : 0)) * int(sizeof(Logit));
  }
  TNT_DEVICE uint32_t set_bits(int step) const {  // of this lane's group
    const uint8_t* const bytes = reinterpret_cast<const uint8_t*>(own_mask()) + step * (STEP / 8);
    return GROUP == 8 ? bytes[lane()] : bytes[lane() >> 1] >> ((lane() & 1) * 4) & 15;
  }
  // Calls body(at) for the marked columns of this warp's piece, which meets afterwards.
  template <class Body>
  TNT_DEVICE void for_each_marked(Body body) const {
#pragma unroll 1
    for (int i = lane(); i < l_.piece / 32; i += device::WARP)
      for (uint32_t b = own_mask()[i]; b; b &= b - 1) body(i * 32 + device::lowest_bit(b));
    device::sync_warp();
  }
  TNT_DEVICE void collect_ids() {
    const int64_t* const ids = p_.negative_ids + int64_t(turn().row) * p_.negative_ids_stride;
    const int before = columns_before(turn().row);
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
        mark(some[i], mask(), rank_ * l_.slice - before, l_.slice);
      }
    }
    if (flags) device::atomic_or(&turn().flags, flags);
  }
  // If it is one of n ids from `begin`; any 64-bit number may come.
  TNT_DEVICE void mark(int64_t id, uint32_t* mask, int begin, int n) {
    if (id < 0 || id >= p_.vocab) return;
    const int at = int(id) - begin;
    if (at >= 0 && at < n) device::atomic_or(mask + at / 32, 1u << (at & 31));
  }
  TNT_DEVICE void mark_label() {
    if (lane() == 0) {
      const Piece own = piece(turn().row);
      mark(turn().label, own_mask(), own.begin - own.before, own.n);
    }
    device::sync_warp();
  }

  // ---- which row

  // Whether ids decide if the reference is read.
  TNT_DEVICE bool kind_is_late() const { return p_.negative_ids && is_kl(p_.positive_loss) != is_kl(p_.negative_loss); }

  TNT_DEVICE void look_ahead() {
    const KlTurn& t = turn();
    look(block().turns[next_turn()], t.row < 0 ? t.from + device::WARP * clusters() : t.row + clusters());
  }
  // By one warp: the first row that is computed here among as many as it has lanes, and its levels.
  TNT_DEVICE void look(KlTurn& t, int64_t from) {
    const int64_t row = from + lane() * int64_t(clusters());
    const bool exists = row < p_.rows, wide = p_.vocab >= 2 * device::WARP * GROUP;
    // Asked for at once: most often the first is the one.
    Vector z_some{}, r_some{};
    if (wide && from < p_.rows) load_some(int(from), z_some, r_some);
    const int64_t label = exists ? p_.labels[row] : 0;
    const float weight = exists ? row_weight<float>(p_, row) : 0.0f;
    const bool active = exists && is_active(p_, label, weight);
    const bool in_part = weight < 0.0f && weight > -1.0f && is_kl(p_.negative_loss);
    const bool computed = active && label >= 0 && label < p_.vocab_size && !in_part;
    const uint32_t all = device::ballot_of_warp(computed);
    const int first = all ? device::lowest_bit(all) : device::WARP;
    const uint32_t inactive = device::ballot_of_warp(exists && !active && lane() < first);
    if (active && !computed && lane() < first && rank_ == 0) leave(int(row));
    const int found = all ? int(from) + first * clusters() : -1;
    if (lane() == 0) {
      t.row = found, t.from = from < p_.rows ? int(from) : 0, t.inactive = inactive, t.flags = 0;
      t.more = !all && from + device::WARP * int64_t(clusters()) < p_.rows;
    }
    if (lane() == first) {
      t.label = int(label), t.weight = weight;
      t.factors[0] = weight;
      t.factors[1] = row_factor<float>(p_, row, p_.negative_loss, true, weight);
    }
    if (!all) return;
    if (wide && first > 0) load_some(found, z_some, r_some);
    levels(t, found, wide, z_some, r_some);
  }
  TNT_DEVICE void load_some(int row, Vector& z_some, Vector& r_some) const {
    const int before = columns_before(row), lead = before > 0 ? GROUP - before : 0;
    const int at = lead + lane() * ((int(p_.vocab) - lead) / (GROUP * device::WARP)) * GROUP;
    z_some = device::load_vector(z_row(row) + at);
    if (p_.ref_logits) r_some = device::load_vector(r_row(row) + at);
  }

  // Columns count from the 16-byte boundary before the row, which both logits have at the same place.
  TNT_DEVICE int columns_before(int row) const {
    return int(reinterpret_cast<uintptr_t>(z_row(row)) & 15) / int(sizeof(Logit));
  }
  struct Piece {  // of a row, this warp's: columns before the row, the first, how many, the first of them that is one
    int before, begin, n, first;
  };
  TNT_DEVICE Piece piece(int row) const {
    const int before = columns_before(row), end = int(p_.vocab) + before;
    const int begin = rank_ * l_.slice + warp() * l_.piece, rest = end > begin ? end - begin : 0;
    return {before, begin < end ? begin : end, l_.piece < rest ? l_.piece : rest, begin == 0 ? before : 0};
  }

  // Returns whether somebody has looked for the next row.
  TNT_DEVICE bool compute() {
    const float weight = turn().weight;
    const bool marks = p_.negative_ids || weight < 0.0f || p_.positive_loss == LOG_LIKELIHOOD;
    if (marks) {
      device::sync_warp();  // nobody looks at those of the row before any more
#pragma unroll 1
      for (int i = lane(); i < l_.piece / 32; i += device::WARP) own_mask()[i] = 0;
      if (p_.negative_ids) {
        device::sync_block();
        collect_ids();
        device::sync_block();
      } else {
        device::sync_warp();
      }
    }
    const uint32_t flags = turn().flags;
    const bool negative = weight < 0.0f || (flags & HAS_IDS);
    const int row_loss = negative ? p_.negative_loss : p_.positive_loss;
    if (kind_is_late()) begin_copies(is_kl(row_loss));
    if (weight < 0.0f) mark_label();
    const float factor = fabsf(turn().factors[negative] * block().scale);
    device::arrival_wait(block().arrivals + warp(), counts_ & 1);
    counts_ ^= 1;
    if (!(factor > 1e-30f && factor < 1e30f) || (flags & ID_OUTSIDE)) {
      if (leader()) leave(turn().row);
      return false;
    }
    if (row_loss == UNLIKELIHOOD || row_loss == LOG_LIKELIHOOD)
      compute_likelihood(row_loss == UNLIKELIHOOD, negative);
    else if (negative)
      row_loss == REVERSE_KL ? compute_kl<true, true>() : compute_kl<false, true>();
    else
      row_loss == REVERSE_KL ? compute_kl<true, false>() : compute_kl<false, false>();
    return true;
  }

  // ---- rows that are not computed here

  TNT_DEVICE void fill(const KlTurn& t) {
#pragma unroll 1
    for (uint32_t rows = t.inactive; rows; rows &= rows - 1) {
      const int row = t.from + device::lowest_bit(rows) * clusters();
      if (p_.gradient) write(row, [](int) { return Output{}; });
      if (!leader()) continue;
      write_loss(row, 0.0);
      if (DIAGNOSTICS) write_diagnostics(row, 0.0f, NAN, {NAN, NAN, NAN});
    }
  }
  TNT_DEVICE void leave(int row) { l_.left[1 + device::atomic_add(l_.left, 1)] = row; }

  // ---- reading: whole vectors by bulk copies; the row's two edges by hand, with -inf around them

  // Of this warp's piece, by itself, when it has no more use for what lies there.
  TNT_DEVICE void begin_copies(bool pair) {
    const int row = turn().row;
    const Piece own = piece(row);
    const Logit *const z = z_row(row) + (own.begin - own.before), *const r =
                                                                      pair ? r_row(row) + (own.begin - own.before) : z;
    const int whole = own.n / GROUP * GROUP, from = own.first > 0 ? GROUP : 0;
    device::slot_fence();
    device::sync_warp();
    if (lane() == 0) {
      uint64_t* const arrival = block().arrivals + warp();
      const uint32_t at = uint32_t(from) * sizeof(Logit), bytes = whole > from ? (whole - from) * sizeof(Logit) : 0;
      device::arrival_expect(arrival, pair ? 2 * bytes : bytes);
      if (bytes) device::bulk_copy(slot(false) + at, reinterpret_cast<const char*>(z) + at, bytes, arrival);
      if (bytes && pair) device::bulk_copy(slot(true) + at, reinterpret_cast<const char*>(r) + at, bytes, arrival);
    }
    if (from > 0 || whole < own.n) {
      if (lane() < GROUP && from > 0)
        edge(own, lane(), pair, z, r);
      else if (lane() >= GROUP && lane() < 2 * GROUP && whole < own.n && !(from > 0 && whole == 0))
        edge(own, whole + lane() - GROUP, pair, z, r);
      device::sync_warp();
    }
  }
  TNT_DEVICE void edge(const Piece& own, int at, bool pair, const Logit* z, const Logit* r) {
    const bool inside = at >= own.first && at < own.n;
    reinterpret_cast<Logit*>(slot(false))[at] = inside ? z[at] : Stored<Logit>::nothing();
    if (pair) reinterpret_cast<Logit*>(slot(true))[at] = inside ? r[at] : Stored<Logit>::nothing();
  }

  struct Group {
    float x[GROUP], o[GROUP];
  };
  // x and o of the group at this place of the policy's slot; away where this lane has none.
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
    if (!device::any_of_warp(!(fabsf(bits_as<float>(any)) < 2.0f))) {  // bit 30
#pragma unroll
      for (int i = 0; i < GROUP; ++i) add_near<REVERSE, DIAGNOSTICS>(t, k, g.x[i], y2[i]);
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
      for (int i = 0; i < GROUP; ++i) add_middle<REVERSE, DIAGNOSTICS>(t, k, g.x[i], y2[i]);
    } else {
#pragma unroll
      for (int i = 0; i < GROUP; ++i) add_far<REVERSE, DIAGNOSTICS>(t, k, g.x[i], g.o[i]);
    }
    return true;
  }

  // Every warp's numbers to every block, whose judge waits for them. Two places in turn suffice, over all rows: who
  // sends in exchange i + 2 has heard the verdict on i + 1, for which every warp sent, knowing that on i. A block that
  // is launched alone sends nothing: the number that it has in a cluster is undefined.
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
    uint64_t* const barrier = block().exchange + (i & 1);
    if (thread_ == 0) device::arrival_expect(barrier, uint32_t(blocks_ * warps() * bytes));
    if (lane() < blocks_) {
#pragma unroll
      for (int v = 0; v < N; ++v) device::send(to + v * sizeof(Vector), message[v], barrier, lane());
    }
  }
  TNT_DEVICE const Vector* receive(int i) {
    if (blocks_ > 1) device::arrival_wait_cluster(block().exchange + (i & 1), i >> 1 & 1);
    return reinterpret_cast<const Vector*>(place(i));
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

  // The rows' levels, their maxima over a few entries all along them, and how far z lies above r there on average; from
  // these the shift. The same in every block of the cluster.
  TNT_DEVICE void levels(KlTurn& t, int row, bool wide, const Vector& z_some, const Vector& r_some) const {
    float z[GROUP], r[GROUP];
    if (wide) {
      Stored<Logit>::unpack(z_some, z);
      Stored<Logit>::unpack(r_some, r);
    } else {
      const int at = lane() < p_.vocab ? lane() : int(p_.vocab) - 1;
      const float z_at = Stored<Logit>::load(z_row(row) + at);
      const float r_at = p_.ref_logits ? Stored<Logit>::load(r_row(row) + at) : 0.0f;
#pragma unroll
      for (int i = 0; i < GROUP; ++i) z[i] = z_at, r[i] = r_at;
    }
    float z_top = z[0], r_top = r[0], above = z[0] - r[0];
#pragma unroll
    for (int i = 1; i < GROUP; ++i) z_top = fmaxf(z_top, z[i]), r_top = fmaxf(r_top, r[i]), above += z[i] - r[i];
    z_top = max_of_warp(z_top), r_top = max_of_warp(r_top);
    // The average difference is nearer to L than that of the maxima; infinities have none.
    float more = (sum_of_warp(above) * (1.0f / (device::WARP * GROUP)) - (z_top - r_top)) * l_.inverse_temperature;
    more = fabsf(more) < 16.0f ? more : 0.0f;
    if (lane() > 1) return;
    const bool reverse = lane() == 1;
    t.z_level = z_top;
    t.shifts[reverse] =
        kl_shift(reverse ? z_top : r_top, reverse ? r_top : z_top, l_.inverse_temperature, reverse ? -more : more);
  }

  // Sends `mine`, and calls judge(all) in one warp with what everybody has sent. The block hears of it.
  template <int N, class Judge>
  TNT_DEVICE void exchange(const Vector (&mine)[N], bool first, Judge judge) {
    send(exchanges(), mine);
    if (warp() == JUDGE) judge(receive(exchanges()));
    if (warp() == SCOUT && first) look_ahead();
    counts_ += 2;
    device::sync_block();
  }

  // The first pass until its sums are fit, then the second.
  template <bool REVERSE, bool SET>
  TNT_DEVICE void compute_kl() {
    constexpr int VECTORS = KlBlock::VECTORS<SET>;
    const char* const z = slot(false) + lane() * 16;
    const int n = piece(turn().row).n, full = n / STEP;
    const bool tail = n % STEP != 0, in_tail = full * STEP + lane() * GROUP < n;
    uint32_t far;
    KlVerdict verdict = KL_AGAIN;
#pragma unroll 1
    for (int attempt = 0; attempt < KL_ATTEMPTS; ++attempt) {
      const KlShift k = turn().shifts[REVERSE];
      KlSums t;
      uint32_t bit = 1;
      const char* group = z;
      far = 0;
#pragma unroll 1
      for (int s = 0; s < full; ++s, group += STEP_BYTES, bit += bit) {
        Group g = load<REVERSE>(group, true);
        if (SET) {
          const uint32_t bits = set_bits(s);
          if (bits) remove(bits, g);
        }
        if (add<REVERSE>(t, k, g)) far |= bit;
      }
      if (tail) {
        Group g = load<REVERSE>(group, in_tail);
        if (SET && in_tail) remove(set_bits(full), g);
        if (add<REVERSE>(t, k, g)) far |= bit;
      }
      Vector mine[VECTORS];
      mine[0] = pack(sum_of_warp(t.s), sum_of_warp(t.a_or_m(REVERSE)), sum_of_warp(t.phi()),
                     DIAGNOSTICS ? sum_of_warp(t.h) : 0.0f);
      if constexpr (DIAGNOSTICS) mine[VECTORS - 1] = pack(AWAY, 0.0f, sum_of_warp(t.a), 0.0f);
      if constexpr (SET) {
        KlSetSums removed, of_reference;
        const Logit *const z = reinterpret_cast<const Logit*>(slot(false)), *const r = reinterpret_cast<const Logit*>(
                                                                                slot(true));
        for_each_marked([&](unsigned at) {
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
      exchange(mine, attempt == 0, [&](const Vector* all) { judge<REVERSE, SET>(all, attempt); });
      verdict = block().verdict;
      if (verdict == KL_GOOD || verdict == KL_LEFT) break;
      if (verdict == KL_AGAIN) continue;
      // The row's maxima in place of those of a few entries.
      float x_top = AWAY, o_top = AWAY;
#pragma unroll 1
      for (int s = 0; s < full + in_tail; ++s) {
        Group g = load<REVERSE>(z + s * STEP_BYTES, true);
        if (SET) remove(set_bits(s), g);
#pragma unroll
        for (int i = 0; i < GROUP; ++i) x_top = fmaxf(x_top, g.x[i]), o_top = fmaxf(o_top, g.o[i]);
      }
      device::sync_warp();
      const Vector mine_of_tops[1] = {pack(max_of_warp(x_top), max_of_warp(o_top), 0.0f, 0.0f)};
      exchange(mine_of_tops, false, [&](const Vector* tops) {
        x_top = o_top = AWAY;
#pragma unroll 1
        for (int i = lane(); i < blocks_ * warps(); i += device::WARP)
          x_top = fmaxf(x_top, at(tops[i], 0)), o_top = fmaxf(o_top, at(tops[i], 1));
        device::sync_warp();
        x_top = max_of_warp(x_top), o_top = max_of_warp(o_top);
        if (lane() == 0) turn().shifts[REVERSE] = kl_shift(x_top, o_top, l_.inverse_temperature, 0.0f);
      });
    }
    if (verdict != KL_GOOD) {
      if (leader()) leave(turn().row);
      return;
    }
    if (p_.gradient) {
      const KlShift k = turn().shifts[REVERSE];
      const auto g = block().template gradient<REVERSE>();
      const KlForm form = block().form;
      if (SET) put_set_gradients([&](float z) { return set_gradient(block().set, k, z); });
      const auto near_or_far = [&](int s, bool near) {
        return near ? gradient<REVERSE, SET>(s, z, [&](float x, float o) { return near_gradient(g, k, x, o); })
                    : gradient<REVERSE, SET>(s, z, [&](float x, float o) { return far_gradient(g, k, x, o); });
      };
      // A forward KL's direct form serves any logits, a reverse KL's none that are infinite.
      if (DIRECT && form == KL_DIRECT && (!REVERSE || far == 0)) {
        write(turn().row, [&](int s) {
          return gradient<REVERSE, SET>(s, z, [&](float x, float o) { return direct_gradient(g, k, x, o); });
        });
      } else {
        if (form == KL_FAR) far = ~0u;
        write(turn().row, [&](int s) { return near_or_far(s, !(far >> s & 1)); });
      }
    }
    if (leader()) write_loss(turn().row, double(turn().factors[SET]) * double(block().loss));
  }

  // By one warp: the row's sums, and from them the coefficients of its gradient, or what to do instead. All blocks of
  // the cluster have the same numbers in the same order, hence the same answer.
  template <bool REVERSE, bool SET>
  TNT_DEVICE void judge(const Vector* from, int attempt) {
    constexpr int VECTORS = KlBlock::VECTORS<SET>;
    const KlShift k = turn().shifts[REVERSE];
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
    const float a = REVERSE ? sums.a_or_m + sums.phi : sums.a_or_m;
    sums.inverse = 1.0f / sums.s;
    sums.l = log1pf(a * sums.inverse);
    const float excess = phi(sums.l);
    sums.kl = sums.phi * sums.inverse - excess;
    const bool usable = sums.s > 0x1p-40f && sums.s < 0x1p100f;
    // Below -3, S + A has lost its digits.
    const bool in_range = usable && sums.s + a < 0x1p100f && sums.l > -3.0f;
    // Phi/S and phi(L) are good to 2e-6 of their size: where KL is much less than they, L has to be nearer to 0.
    const bool near = comparable(k.x_ref, k.o_ref);
    const bool good =
        in_range && sums.phi < INFINITY && sums.set.sum < INFINITY && !(excess > 0.5f * fabsf(sums.kl)) && near;
    const bool again = DIAGNOSTICS && attempt == 0 && good && entropy_cancels<REVERSE>(sums);
    if (good && !again) {
      block().verdict = REVERSE && SET && !(block().eps > 1e-30f) ? KL_LEFT : KL_GOOD;
      sums.kl = sums.kl > 0.0f ? sums.kl : 0.0f;  // what rounding leaves of 0
      block().form = kl_coefficients<SET, DIRECT>(k, sums, turn().factors[SET] * block().scale, block().eps,
                                                  block().template gradient<REVERSE>(), block().set, block().loss);
      if (DIAGNOSTICS && rank_ == 0 && block().verdict == KL_GOOD)
        write_diagnostics(turn().row, block().loss, block().loss, kl_diagnosis<REVERSE, SET>(k, sums));
    } else if ((usable && sums.phi == INFINITY) || attempt == KL_ATTEMPTS - 1 || (attempt > 0 && !near)) {
      block().verdict = KL_LEFT;
    } else if ((in_range && near && !again) || attempt > 0) {
      block().verdict = KL_AGAIN;
      turn().shifts[REVERSE] = kl_shift(k.x_ref, k.o_ref, l_.inverse_temperature, k.more + sums.l);
    } else {
      block().verdict = KL_BY_MAXIMA;
    }
  }

  // ---- LL and UL: the policy's row alone, with a set always

  TNT_DEVICE void compute_likelihood(bool unlikelihood, bool negative) {
    const char* const base = slot(false) + lane() * 16;
    const int n = piece(turn().row).n, full = n / STEP;
    const bool tail = n % STEP != 0, in_tail = full * STEP + lane() * GROUP < n;
    if (!unlikelihood) mark_label();
    KlShift k;
#pragma unroll 1
    for (int attempt = 0; attempt < 2; ++attempt) {
      const float x_ref = turn().z_level;
      k = kl_shift(x_ref, x_ref, l_.inverse_temperature, 0.0f);
      float sum = 0.0f, h = 0.0f, top = AWAY;
#pragma unroll 1
      for (int s = 0; s < full + in_tail; ++s) {
        float x[GROUP];
        Stored<Logit>::unpack(device::load_vector(base + s * STEP_BYTES), x);
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
      for_each_marked([&](unsigned at) { removed.add(Stored<Logit>::load(z + at), k.scale); });
      removed.merge_warp(k.scale);
      const Vector mine[2] = {pack(sum_of_warp(sum), max_of_warp(top), DIAGNOSTICS ? sum_of_warp(h) : 0.0f, 0.0f),
                              pack(removed.max, removed.sum, removed.moment, removed.n)};
      exchange(mine, attempt == 0,
               [&](const Vector* all) { judge_likelihood(all, k, attempt, unlikelihood, negative); });
      if (block().verdict != KL_AGAIN) break;
    }
    if (block().verdict != KL_GOOD) {
      if (leader()) leave(turn().row);
      return;
    }
    if (p_.gradient) {
      const LikelihoodGradient g = block().likelihood;
      put_set_gradients([&](float z) { return unlikelihood ? set_gradient(g.set, k, z) : g.label; });
      write(turn().row, [&](int s) {
        float x[GROUP];
        Output out;
        Stored<Logit>::unpack(device::load_vector(base + s * STEP_BYTES), x);
        const uint32_t bits = set_bits(s);
#pragma unroll
        for (int i = 0; i < GROUP; ++i) out.x[i] = bits >> i & 1 ? x[i] : g.kept * power(fmaf(x[i], k.scale, -k.c));
        return out;
      });
    }
    if (leader()) write_loss(turn().row, double(turn().factors[negative]) * double(block().loss));
  }

  TNT_DEVICE void judge_likelihood(const Vector* from, const KlShift& k, int attempt, bool unlikelihood,
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
    const bool good = sums.s > 0x1p-40f && sums.s < 0x1p100f && sums.set.sum < INFINITY;
    if (attempt == 0 && !(good && !(DIAGNOSTICS && entropy_cancels<true>(sums)))) {
      // The row's maximum in place of that of a few entries.
      block().verdict = KL_AGAIN;
      turn().z_level = top;
      return;
    }
    block().verdict = good && (unlikelihood || sums.set.sum > 0.0f) ? KL_GOOD : KL_LEFT;
    block().likelihood =
        likelihood_coefficients(k, sums, unlikelihood, turn().factors[negative] * block().scale, block().loss);
    if (!DIAGNOSTICS || rank_ != 0 || block().verdict != KL_GOOD) return;
    const KlDiagnosis d = kl_diagnosis<true, true>(k, sums);
    write_diagnostics(turn().row, block().loss, NAN, {negative ? d.negative_mass : 0.0f, NAN, d.entropy});
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
  TNT_DEVICE Output gradient(int s, const char* z, Element element) const {
    const Group pairs = load<REVERSE>(z + s * STEP_BYTES, true);
    Output out;
#pragma unroll
    for (int i = 0; i < GROUP; ++i) out.x[i] = element(pairs.x[i], pairs.o[i]);
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
        [&](unsigned at) { store_entry(z + at, Stored<Logit>::pack({compute(Stored<Logit>::load(z + at))}), 0); });
  }

  // Writes this thread's groups, step by step: whole ones by vectors, then those at the row's edges by entries. (A
  // gradient that begins elsewhere than its logits is not worth lanes that help each other.)
  template <class Compute>
  TNT_DEVICE void write(int number, Compute compute) {
    constexpr int bytes = GROUP * int(sizeof(Gradient));
    const Piece own = piece(number);
    const int first = lane() * GROUP, steps = first < own.n ? (own.n - first + STEP - 1) / STEP : 0;  // of this lane
    Gradient* const row =
        static_cast<Gradient*>(p_.gradient) + int64_t(number) * p_.gradient_stride + (own.begin - own.before);
    const bool aligned = reinterpret_cast<uintptr_t>(row) % bytes == 0;
    const int begin = first < own.first;
    int end = aligned && first + GROUP <= own.n ? (own.n - first - GROUP) / STEP + 1 : 0;
    end = end > begin ? end : begin;
    Gradient* to = row + first + begin * STEP;
#pragma unroll 1
    for (int s = begin; s < end; ++s, to += STEP) {
      const Vector packed = compute(s).pack();
      if constexpr (bytes == 16)
        device::store_vector(to, packed);
      else
        device::store_half_vector(to, packed.words[0], packed.words[1]);
    }
#pragma unroll 1
    for (int s = begin > 0 ? 0 : end; s < steps; s = s < begin ? end : s + 1) {
      const Vector packed = compute(s).pack();
      const int column = s * STEP + first;
#pragma unroll
      for (int i = 0; i < GROUP; ++i)
        if (column + i >= own.first && column + i < own.n) store_entry(row + column, packed, i);
    }
  }

  TNT_DEVICE void write_loss(int row, double weighted) const { tnt::write_loss(p_, l_.losses, row, weighted); }

  TNT_DEVICE void write_diagnostics(int row, float loss, float kl, const KlDiagnosis& d) const {
    const float values[ROW_DIAGNOSTICS] = {loss, kl, d.negative_mass, d.ref_negative_mass, d.entropy};
#pragma unroll
    for (int i = 0; i < ROW_DIAGNOSTICS; ++i) static_cast<float*>(p_.diagnostics)[i * p_.rows + row] = values[i];
  }

  const RowCall& p_;
  const KlLaunch& l_;
  const int thread_, rank_, blocks_;
  int turn_ = 0;
  uint32_t counts_ = 0;  // parity of the copies that are next waited for, and how many exchanges were
};

}  // namespace TNT_ISA
}  // namespace tnt
