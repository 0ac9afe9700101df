// A row whose loss reads the policy alone: log-likelihood, unlikelihood, negative likelihood, or none. The set is kept
// apart: y of LL, S of the others. p(set) and p(K), K what stays, come from the log-odds of two sums, and within either
// a softmax has a sum of its own: where one of them is next to nothing, it keeps its digits.
#pragma once

#include <cmath>
#include <vector>

#include "cpu/log_sum.h"
#include "cpu/stream_sum.h"
#include "objectives.h"

namespace tnt {
inline namespace TNT_ISA {

template <class Real>
struct ExpScratch {
  TileScratch<Real> entries;
  StreamSum<Real> policy;
  std::vector<double> totals;  // of every tile
};

template <class Logit, class Gradient>
class ExpRow {
 public:
  using Real = RealOf<Logit>;

  struct Task {
    Stream<Logit> z;
    Gradient* gradient;
    int loss;
    bool entropy;
    const uint64_t* apart;  // the bits of the set's tokens here; null: there are none
  };

  ExpRow(const RowCall& call, int threads, ExpScratch<Real>& scratch, const Task& task)
      : p_(call),
        s_(scratch),
        inverse_t_(1 / call.temperature),
        tiles_(call.vocab, threads, scratch.entries),
        t_(task) {
    tiles_.begin(task.z, {}, task.apart);
    tiles_.save(task.gradient ? 1 : 0);
  }

  // Of this slice of the vocabulary behind first_pass, of all shards behind merge.
  const RowSums& sums() const { return sums_; }

  void first_pass() {
    s_.policy.begin(tiles_, inverse_t_, [](const auto& in) { return in.base; });
    if (is_smoothed()) s_.totals.assign(size_t(tiles_.count()), 0);
    tiles_.each(false, [&](int64_t k) {
      tiles_.on(k, false, [&](const auto& in, int64_t n) {
        Real* const saved = tiles_.saved(k);
        t_.entropy ? s_.policy.template add<true>(k, in, in.base, n, saved)
                   : s_.policy.template add<false>(k, in, in.base, n, saved);
        if (is_smoothed()) s_.totals[size_t(k)] = sum_of_differences(in, n, s_.policy.ref());
      });
      tiles_.gather(k);
    });
    gathered_ = true;
    saved_ = tiles_.saved(0) != nullptr;
    sums_.policy = s_.policy.sum();
    sums_.policy_set = log_sum_of(s_.entries.x.data(), tiles_.set_size(), inverse_t_);
    sums_.kept = double(p_.vocab - tiles_.set_size());
    if (!is_smoothed() || sums_.kept == 0) return;
    sums_.total = sums_.kept * (double(s_.policy.ref()) - sums_.policy.ref) * inverse_t_;
    for (const double total : s_.totals) sums_.total += total * inverse_t_;
  }

  // In place of a first pass.
  void merge(const std::vector<RowSums>& shards) { sums_ = tnt::merge(shards, inverse_t_); }

  // What this slice adds to the sums of all shards.
  PartialSums partial_sums() {
    PartialSums sums;
    if (t_.loss != NEGATIVE_LIKELIHOOD) return sums;
    gather();
    const double normalizer = set_normalizer(sums_, inverse_t_);
    const Real ref = Real(sums_.policy_set.ref), inverse_t = Real(inverse_t_),
               least = Real(least_log_weight<Real>(p_.nl_floor, normalizer));
    for (int64_t i = 0; i < tiles_.set_size(); ++i) {
      const Real log_weight = (s_.entries.x[size_t(i)] - ref) * inverse_t;
      const bool at_rest = log_weight < least;
      sums.loss += at_rest ? p_.nl_floor : double(log_weight) - normalizer;
      sums.active += !at_rest;
    }
    return sums;
  }

  // What follows from the sums of a whole vocabulary, and their partial sums.
  RowResult conclude(const PartialSums& totals, ExpPlan<Real>& plan) const {
    const RowSums& s = sums_;
    const ExpLoss row = exp_loss<Real>(t_.loss, s, totals, p_, inverse_t_);
    plan = {};
    if (!s.policy.is_empty()) {  // weights add up to 4: the largest ones' exponents are rounded least
      const double shift = 2 - s.policy.log * UNIT<Real>;
      ExpLevel<Real> level(inverse_t_, Real(s.policy.ref), shift);
      if (!level.is_fine()) {
        plan.zero = level.ref;
        level = ExpLevel<Real>(inverse_t_, 0, shift);
      }
      plan.ref = level.ref, plan.c = level.c;
      plan.weight = Real(row.kept * ::exp(-s.policy.log - level.lead() / UNIT<Real>));
    }
    plan.bias = Real(row.bias), plan.push = Real(row.push), plan.least = Real(row.least);
    plan.set_ref = Real(s.policy_set.ref);
    if (!s.policy_set.is_empty()) plan.set = Real(row.set * ::exp(-s.policy_set.log));
    return result_of(t_.loss, s, row);
  }

  // A second pass whose first was in another launch.
  void resume(const ExpPlan<Real>&) {}

  // Writes the gradient times `factor`; calls done(first, n) with as many columns as are written, for prefetches.
  template <class Done>
  void second_pass(const ExpPlan<Real>& plan, double factor, Done done) {
    tiles_.read_relative_to(plan.zero, 0);
    gather();
    set_gradients(plan, factor);
    ExpLevel<Real> level(inverse_t_, plan.ref, 0);
    level.c = plan.c;
    const Real weight = Real(plan.weight * factor), bias = Real(plan.bias * factor);
    const ExpLevel<Real>& first = s_.policy.level();
    const bool takes_saved = saved_ && plan.zero == 0 && plan.ref == first.ref;
    const Real of_saved =
        takes_saved ? Real(plan.weight * factor * ::exp((level.lead() - first.lead()) / UNIT<Real>)) : 0;
    tiles_.each(true, [&](int64_t k) {
      if (takes_saved && s_.policy.has_level(k)) {
        tiles_.write_saved(k, t_.gradient, [&](const Real* weights, int64_t n, auto stored, Gradient* to) {
          write_saved_weights<decltype(stored)>(weights, n, of_saved, bias, to);
        });
      } else {
        tiles_.write(k, false, t_.gradient,
                     [&](const auto& in, Gradient* to) { write_weights(in, level, weight, bias, to); });
      }
      tiles_.scatter(k, t_.gradient);
      done(p_.vocab - tiles_.end_of(k), tiles_.end_of(k) - k * TILE_ENTRIES<Real>);
    });
  }

 private:
  bool is_smoothed() const { return t_.loss == LOG_LIKELIHOOD && smooths_uniformly(p_); }

  void gather() {
    if (!gathered_) tiles_.each(false, [&](int64_t k) { tiles_.gather(k); });
    gathered_ = true;
  }

  void set_gradients(const ExpPlan<Real>& plan, double factor) {
    const Real scale = exponent_scale<Real>(inverse_t_), inverse_t = Real(inverse_t_), ref = plan.set_ref,
               least = plan.least, weight = Real(plan.set * factor), push = Real(plan.push * factor);
    const Real* const z = s_.entries.x.data();
    Gradient* const to = tiles_.set_gradient();
    const int64_t size = tiles_.set_size();
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      const Real centred = z[i] - ref, share = weight * exponential(centred * scale);
      store(to + i, share + (centred * inverse_t < least ? Real(0) : push));
    }
  }

  const RowCall& p_;
  ExpScratch<Real>& s_;
  const double inverse_t_;
  RowTiles<Logit, Gradient> tiles_;
  const Task& t_;
  RowSums sums_;
  bool gathered_ = false;  // the set's logits
  bool saved_ = false;     // the weights
};

}  // namespace TNT_ISA
}  // namespace tnt
