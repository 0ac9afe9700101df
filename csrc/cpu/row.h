// One row of a call: which loss it has, its set and its factor, what its launch does, and what it leaves behind.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "cpu/exp_row.h"
#include "cpu/kl_row.h"
#include "cpu/log_sum.h"
#include "cpu/uniform_row.h"
#include "row_rules.h"

namespace tnt {
inline namespace TNT_ISA {

template <class Real>
struct alignas(CACHE_LINE) Scratch {
  // One a thread, kept from call to call: to allocate it takes as long as a short row.
  static Scratch& of_this_thread() {
    static thread_local const auto scratch = std::make_unique<Scratch>();
    return *scratch;
  }

  KlScratch<Real> kl;
  UniformScratch<Real> uniform;
  ExpScratch<Real> exp;
  TokenSet here, everywhere;  // a row's tokens apart: by column, and where the vocabulary is sharded all of them
};

// Past the cache, so that zeroing a row reads nothing.
inline void stream_zeros(void* to, size_t bytes) {
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

// The ids that all rows share, without padding and duplicates. A bit for each token sorts thousands of them in a tenth
// of a sort's time.
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
      : p_(call), shared_ids_(shared_ids), threads_(threads), s_(scratch) {
    s_.here.begin_call(p_.vocab, shared_ids_.here);
    if (is_shard()) s_.everywhere.begin_call(p_.vocab_size, shared_ids_.all);
  }
  ~Row() {
    s_.here.end_call(shared_ids_.here);
    if (is_shard()) s_.everywhere.end_call(shared_ids_.all);
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
    const double weight = row_weight<Real>(p_, index);
    if (!is_active(p_, label_, weight)) return inactive();
    mark_set(weight);
    factor_ = loss_ == NONE ? 0 : row_factor<Real>(p_, index, loss_, negative_, weight);
    scale_ = factor_ * inverse_normalizer * (1 / p_.temperature);
    if (p_.kind != Kind::BACKWARD) take_upstream();
    const double loss = !is_kl(loss_) ? one_stream() : smooths_uniformly(p_) ? uniform_kl() : kl();
    clear_set();
    return loss;
  }

 private:
  // Also of a row without a loss of which nobody asks more.
  double inactive() {
    if (g_) fill(0);
    switch (p_.kind) {
      case Kind::BACKWARD: break;
      case Kind::STATISTICS: pack(RowSums(), false, packed(p_.statistics)); break;
      case Kind::PARTIAL_SUMS: write_partial_sums({}); break;
      case Kind::FUSED:
        if (p_.coefficients) coefficients()[ROW_COEFFICIENTS - 1] = 0;
        [[fallthrough]];
      case Kind::FINISH: write_diagnostics(0, NAN, {}); write_loss(0);
    }
    return 0;
  }

  // ---- the row's set

  bool is_shard() const { return p_.vocab_size != p_.vocab; }
  int64_t column_of(int64_t id) const {
    const int64_t column = id - p_.vocab_offset;
    return column >= 0 && column < p_.vocab ? column : -1;
  }
  // Puts a token into it. Whether it is new, wherever it lies.
  bool mark(int64_t id) {
    const int64_t column = column_of(id);
    const bool is_new_here = column >= 0 && s_.here.insert(column);
    return is_shard() ? s_.everywhere.insert(id) : is_new_here;
  }
  void unmark(int64_t id) {
    if (const int64_t column = column_of(id); column >= 0) s_.here.erase(column);
    if (is_shard()) s_.everywhere.erase(id);
  }

  // The row's own negative ids, which may be duplicates; none where all rows share a list.
  template <class Body>
  void for_each_own_id(Body body) const {
    if (!p_.negative_ids || p_.negative_ids_stride == 0) return;
    const int64_t* ids = p_.negative_ids + index_ * p_.negative_ids_stride;
    for (int64_t k = 0; k < p_.negative_ids_count; ++k)
      if (ids[k] >= 0) body(ids[k]);
  }

  // Puts the tokens that are kept apart into the scratch's set, and finds the row's loss: the negatives and a y with
  // w < 0, and LL's y. Of a KL, one with -1 < w < 0 is not removed: what is left of it is κ = 1 + w.
  void mark_set(double weight) {
    set_size_ = static_cast<int64_t>(shared_ids_.all.size());
    partial_ = -1;
    log_kappa_ = 0;
    for_each_own_id([&](int64_t id) { set_size_ += mark(id); });
    const bool is_pushed = weight < 0 && mark(label_);
    negative_ = set_size_ > 0 || is_pushed;
    loss_ = negative_ ? p_.negative_loss : p_.positive_loss;
    label_added_ = is_pushed || (loss_ == LOG_LIKELIHOOD && mark(label_));
    if (is_pushed && weight > -1 && is_kl(loss_)) {
      partial_ = column_of(label_);
      log_kappa_ = log1p(weight);
    } else {
      set_size_ += label_added_;
    }
  }
  void clear_set() {
    for_each_own_id([&](int64_t id) { unmark(id); });
    if (label_added_) unmark(label_);
  }
  const uint64_t* apart() const { return set_size_ || partial_ >= 0 ? s_.here.words() : nullptr; }

  // ---- what a launch does, by its kind

  Stream<Logit> policy() const { return {z_, p_.differences ? r_ : nullptr}; }
  typename KlRow<Logit, Gradient>::Task kl_task() const {
    return {policy(),  {r_},    g_,       loss_ == REVERSE_KL, p_.diagnostics != nullptr,
            set_size_, apart(), partial_, log_kappa_};
  }

  double one_stream() {
    if (loss_ == NONE && !p_.diagnostics) return inactive();
    const typename ExpRow<Logit, Gradient>::Task task{policy(), g_, loss_, p_.diagnostics != nullptr, apart()};
    ExpRow<Logit, Gradient> row(p_, threads_, s_.exp, task);
    ExpPlan<Real> plan;
    return launch(row, plan);
  }

  double kl() {
    const auto task = kl_task();
    KlRow<Logit, Gradient> row(p_, threads_, s_.kl, task);
    KlPlan<Real> plan;
    return launch(row, plan);
  }

  template <class AnyRow, class Plan>
  double launch(AnyRow& row, Plan& plan) {
    const auto write_gradient = [&](bool resumes) {
      if (scale_ == 0 || scale_ != scale_) return fill(scale_);
      if (resumes) row.resume(plan);
      row.second_pass(plan, scale_, [&](int64_t at, int64_t n) { prefetch_next(at, n); });
    };
    if (p_.kind == Kind::BACKWARD) {
      read_coefficients(plan);
      write_gradient(true);
      return 0;
    }
    if (is_first(p_.kind)) row.first_pass();
    if (p_.kind == Kind::STATISTICS) {
      pack(row.sums(), is_kl(loss_), packed(p_.statistics));
      return 0;
    }
    if (is_sharded(p_.kind)) row.merge(gathered_sums());
    if (p_.kind == Kind::PARTIAL_SUMS) {
      write_partial_sums(row.partial_sums());
      if (!g_) return 0;
    }
    // A gradient that does not wait for the total is of a loss whose whole set is active.
    const PartialSums totals = p_.kind == Kind::FUSED    ? row.partial_sums()
                               : p_.kind == Kind::FINISH ? total_sums()
                                                         : PartialSums{0, double(set_size_)};
    const RowResult result = row.conclude(totals, plan);
    if (scale_ != 0 && result.lost) scale_ = NAN;
    if (g_) write_gradient(is_sharded(p_.kind));
    if (p_.kind == Kind::PARTIAL_SUMS) return 0;
    write_coefficients(plan);
    return report(row.sums(), result.loss);
  }

  // Its loss comes from the second pass, which may write the gradient if that does not need the loss.
  double uniform_kl() {
    const auto task = kl_task();
    UniformRow<Logit, Gradient> row(p_, threads_, s_.uniform, task);
    UniformPlan<Real> plan;
    const auto second_pass = [&](double scale) {
      return row.second_pass(plan, scale, [&](int64_t at, int64_t n) { prefetch_next(at, n); });
    };
    const auto write_gradient = [&] {
      if (scale_ == 0 || scale_ != scale_) return fill(scale_);
      second_pass(scale_);
    };
    if (p_.kind == Kind::BACKWARD) {
      read_coefficients(plan);
      write_gradient();
      return 0;
    }
    const bool is_whole = !is_sharded(p_.kind) || p_.kind == Kind::STATISTICS;
    const RowSums sums = is_whole ? row.sums() : merge(gathered_sums(), 1 / p_.temperature);
    if (p_.kind == Kind::STATISTICS) {
      pack(sums, true, packed(p_.statistics));
      return 0;
    }
    const bool exists = row.conclude(sums, plan), reverse = loss_ == REVERSE_KL;
    const double first_scale = g_ && !reverse && exists ? scale_ : 0;
    double loss = p_.kind == Kind::FINISH ? total_sums().loss : exists ? second_pass(first_scale) : 0;
    if (p_.kind == Kind::PARTIAL_SUMS) write_partial_sums({loss, 0});
    plan.loss = Real(loss);
    if (!exists) loss = NAN;
    if (scale_ != 0 && (!exists || (reverse && !(loss < INFINITY)))) scale_ = NAN;
    const bool is_written = first_scale != 0 && p_.kind != Kind::FINISH;
    if (g_ && !is_written) write_gradient();
    if (p_.kind == Kind::PARTIAL_SUMS) return 0;
    write_coefficients(plan);
    return report(sums, loss);
  }

  static void prefetch(const Logit* from, int64_t n) {
    for (int64_t i = 0; i < n; i += CACHE_LINE / sizeof(Logit)) __builtin_prefetch(from + i, 0, 2);
  }
  void prefetch_next(int64_t at, int64_t n) const {
    if (next_ >= p_.rows || !is_active<Real>(p_, next_)) return;
    prefetch(static_cast<const Logit*>(p_.logits) + next_ * p_.logits_stride + at, n);
    if (is_kl(loss_) || p_.differences)
      prefetch(static_cast<const Logit*>(p_.ref_logits) + next_ * p_.ref_logits_stride + at, n);
  }

  // ---- what a launch reads of others, and leaves behind

  std::vector<RowSums> gathered_sums() const {
    const Real* const first = packed(p_.gathered);
    std::vector<RowSums> shards;
    for (int64_t shard = 0; shard < p_.shards; ++shard)
      shards.push_back(unpack(first + shard * p_.gathered_stride, is_kl(loss_)));
    return shards;
  }
  PartialSums total_sums() const {
    const Real* const from = static_cast<const Real*>(p_.total_sums) + index_ * ROW_PARTIAL_SUMS;
    return {double(from[0]), double(from[1])};
  }
  void write_partial_sums(const PartialSums& sums) const {
    Real* const to = static_cast<Real*>(p_.partial_sums) + index_ * ROW_PARTIAL_SUMS;
    to[0] = Real(sums.loss);
    to[1] = Real(sums.active);
  }
  Real* packed(void* to) const { return static_cast<Real*>(to) + index_ * ROW_STATISTICS; }
  const Real* packed(const void* from) const { return static_cast<const Real*>(from) + index_ * ROW_STATISTICS; }

  // A row that does not count or that nobody asks about is 0, whatever the other factor is.
  void take_upstream() {
    if (!p_.upstream) return;
    const Real upstream = static_cast<const Real*>(p_.upstream)[index_ * p_.upstream_stride];
    scale_ = scale_ == 0 || upstream == 0 ? 0 : scale_ * upstream;
  }

  Real* coefficients() const { return static_cast<Real*>(p_.coefficients) + index_ * ROW_COEFFICIENTS; }
  template <class Plan>
  void write_coefficients(const Plan& plan) const {
    static_assert(sizeof plan <= (ROW_COEFFICIENTS - 1) * sizeof(Real));
    if (!p_.coefficients) return;
    std::fill_n(coefficients(), ROW_COEFFICIENTS, Real(0));
    memcpy(coefficients(), &plan, sizeof plan);
    coefficients()[ROW_COEFFICIENTS - 1] = Real(scale_);
  }
  template <class Plan>
  void read_coefficients(Plan& plan) {
    memcpy(&plan, coefficients(), sizeof plan);
    scale_ = double(coefficients()[ROW_COEFFICIENTS - 1]);
    take_upstream();
  }

  void fill(double value) {
    if (value == 0) return stream_zeros(g_, static_cast<size_t>(p_.vocab) * sizeof(Gradient));
    for (int64_t i = 0; i < p_.vocab; ++i) store(g_ + i, Real(value));
  }

  // Writes the row's diagnostics and its loss times its factor, which is returned.
  double report(const RowSums& s, double loss) {
    if (p_.diagnostics)
      write_diagnostics(loss, is_kl(loss_) ? loss : NAN,
                        diagnose(s, negative_, is_kl(loss_), log_kappa_, 1 / p_.temperature));
    const double weighted = factor_ == 0 ? 0 : factor_ * loss;
    write_loss(weighted);
    return weighted;
  }
  void write_loss(double weighted) const {  // the sum of all rows is written at the end
    if (p_.loss && p_.reduction == Reduction::NONE) static_cast<Real*>(p_.loss)[index_] = Real(weighted);
  }
  void write_diagnostics(double loss, double kl, const RowDiagnosis& d) const {
    if (!p_.diagnostics) return;
    Real* at = static_cast<Real*>(p_.diagnostics) + index_;
    for (const double value : {loss, kl, d.negative_mass, d.ref_negative_mass, d.entropy}) {
      *at = Real(value);
      at += p_.rows;
    }
  }

  const RowCall& p_;
  const SharedIds& shared_ids_;
  const int threads_;
  Scratch<Real>& s_;
  int64_t index_ = 0, next_ = 0, label_ = 0;
  const Logit *z_ = nullptr, *r_ = nullptr;
  Gradient* g_ = nullptr;
  int loss_ = NONE;
  bool negative_ = false, label_added_ = false;
  int64_t set_size_ = 0;           // of the whole vocabulary; a KL's removed tokens
  int64_t partial_ = -1;           // the column of a KL's y with -1 < w < 0, if it lies here
  double log_kappa_ = 0;           // of that y, wherever it lies
  double factor_ = 0, scale_ = 0;  // on the row's loss; on its gradient
};

}  // namespace TNT_ISA
}  // namespace tnt
