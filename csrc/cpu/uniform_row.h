// A KL row under uniform smoothing: every token's target is (q* + ε)/(1 + V ε), a removed one's too, and its logarithm
// takes one an entry. Two log-sum-exps in a first pass, then the entries' losses and gradients (csrc/objectives.h). The
// reverse KL's gradient needs its loss first.
#pragma once

#include <cmath>
#include <vector>

#include "cpu/kl_row.h"
#include "cpu/log_sum.h"
#include "cpu/stream_sum.h"
#include "objectives.h"

namespace tnt {
inline namespace TNT_ISA {

// A block's entries as Real, where they lie or in a copy.
template <class Logit, class Real>
TNT_FN const Real* as_real(const Logit* from, Real* copy) {
  for (int j = 0; j < BLOCK_ENTRIES<Real>; ++j) copy[j] = load(from[j]);
  return copy;
}
template <class Real>
TNT_FN const Real* as_real(const Real* from, Real*) {
  return from;
}

// A tile's loss, without the columns of `skipped` and what is behind its n, and to `to` its gradients, if it is not
// null. A block's entries lie in arrays, because a logarithm of vectors is the compiler's to make.
template <bool REVERSE, class Logit, class Gradient, class Real>
__attribute__((noinline)) double uniform_tile(const TileEntries<Logit>& in, int64_t n, int64_t skipped,
                                              const UniformNumbers<Real>& c, Gradient* to) {
  constexpr int BLOCK = BLOCK_ENTRIES<Real>;
  const UniformPlan<Real> row = c.row;
  Real sums[BLOCK]{}, loss[BLOCK], gradient[BLOCK], z_copy[BLOCK], r_copy[BLOCK];
  for (int64_t i = 0; i < in.n; i += BLOCK) {
    const Real *const z = as_real(in.base + i, z_copy), *r = as_real(in.other + i, r_copy);
    if (uint64_t bits = in.apart(i); __builtin_expect(bits != 0, 0)) {
      if (r != r_copy) memcpy(r_copy, r, sizeof r_copy);
      for (; bits; bits &= bits - 1) r_copy[__builtin_ctzll(bits)] = -INFINITY;
      r = r_copy;
    }
#pragma omp simd
    for (int j = 0; j < BLOCK; ++j) {
      const Real centred = z[j] - row.z_ref;
      const Real p = exponential(centred * c.scale) * row.p_inverse;
      const Real q_star = exponential((r[j] - row.r_ref) * c.scale) * row.q_inverse;
      const auto e = c.element(REVERSE, centred * c.inverse_t - row.p_log_sum, p, q_star);
      loss[j] = e.loss;
      gradient[j] = e.gradient * c.factor;
    }
    if (skipped >= i && skipped < i + BLOCK) loss[skipped - i] = 0;
    for (int64_t j = n - i; j < BLOCK; ++j) loss[j] = 0;
    for (int j = 0; j < BLOCK; ++j) sums[j] += loss[j];
    if (!to) continue;
#pragma omp simd
    for (int j = 0; j < BLOCK; ++j) store(to + i + j, gradient[j]);
  }
  double sum = 0;
  for (const Real part : sums) sum += part;
  return sum;
}

template <class Real>
struct UniformScratch {
  TileScratch<Real> entries;  // the removed entries, and a partially pushed y
  StreamSum<Real> policy, reference;
  std::vector<double> losses;  // of every tile
};

template <class Logit, class Gradient>
class UniformRow {
 public:
  using Real = RealOf<Logit>;
  using Task = typename KlRow<Logit, Gradient>::Task;

  UniformRow(const RowCall& call, int threads, UniformScratch<Real>& scratch, const Task& task)
      : p_(call),
        s_(scratch),
        inverse_t_(1 / call.temperature),
        tiles_(call.vocab, threads, scratch.entries),
        t_(task) {
    tiles_.begin(task.z, task.r, task.apart);
  }

  // The first pass over this slice of the vocabulary.
  RowSums sums() {
    s_.policy.begin(tiles_, inverse_t_, [](const auto& in) { return in.base; });
    s_.reference.begin(tiles_, inverse_t_, [](const auto& in) { return in.other; });
    tiles_.each(false, [&](int64_t k) {
      tiles_.on(k, false, [&](const auto& in, int64_t n) {
        t_.entropy ? s_.policy.template add<true>(k, in, in.base, n) : s_.policy.template add<false>(k, in, in.base, n);
        s_.reference.template add<false>(k, in, in.other, n);
      });
      tiles_.gather(k);
    });
    RowSums s;
    if (t_.partial >= 0) s.label_policy = t_.z[t_.partial], s.label_reference = t_.r[t_.partial];
    s.policy = s_.policy.sum();
    s.reference = s_.reference.sum();
    const auto sum_of_set = [&](std::vector<Real>& logits, double partial) {
      return log_sum_of_set(logits.data(), tiles_.set_size(), t_.partial >= 0, partial, inverse_t_);
    };
    s.policy_set = sum_of_set(s_.entries.x, s.label_policy);
    s.reference_set = sum_of_set(s_.entries.o, s.label_reference);
    const LogSum &base = base_of(s, t_.reverse), &other = other_of(s, t_.reverse);
    s.log_ratio = base.is_empty() ? 0 : other.log - base.log;
    s.kept = double(p_.vocab - tiles_.set_size());
    return s;
  }

  // What follows from the sums of a whole vocabulary. Whether the row has a loss.
  bool conclude(const RowSums& sums, UniformPlan<Real>& plan) const {
    return conclude_uniform(sums, t_.reverse, t_.log_kappa, inverse_t_, plan);
  }

  // The loss of this slice's entries, and their gradients times `factor`, unless it is 0; calls done(first, n) with as
  // many columns as are done, for prefetches.
  template <class Done>
  double second_pass(const UniformPlan<Real>& plan, double factor, Done done) {
    const UniformNumbers<Real> numbers = uniform_numbers(plan, p_, inverse_t_, factor);
    const double label_z = t_.partial >= 0 ? t_.z[t_.partial] : 0,
                 label_r = t_.partial >= 0 ? t_.r[t_.partial] : 0;  // before a gradient takes its place
    s_.losses.assign(size_t(tiles_.count()), 0);
    tiles_.each(true, [&](int64_t k) {
      const int64_t n = tiles_.end_of(k) - k * TILE_ENTRIES<Real>;
      const auto tile = [&](const auto& in, Gradient* to) {
        const int64_t skipped = t_.partial >= 0 ? t_.partial - in.entry : -1;
        s_.losses[size_t(k)] = t_.reverse ? uniform_tile<true>(in, n, skipped, numbers, to)
                                          : uniform_tile<false>(in, n, skipped, numbers, to);
      };
      if (factor != 0)
        tiles_.write(k, false, t_.gradient, [&](const auto& in, Gradient* to) { tile(in, to); });
      else
        tiles_.on(k, false, [&](const auto& in, int64_t) { tile(in, static_cast<Gradient*>(nullptr)); });
      done(p_.vocab - tiles_.end_of(k), n);
    });
    double loss = 0;
    for (const double part : s_.losses) loss += part;
    if (t_.partial < 0) return loss;
    return loss + (t_.reverse ? partial_element<true>(numbers, label_z, label_r)
                              : partial_element<false>(numbers, label_z, label_r));
  }

 private:
  // Of y, pushed down in part.
  template <bool REVERSE>
  double partial_element(const UniformNumbers<Real>& c, double z, double r) const {
    const double log_weight = (z - double(c.row.z_ref)) * inverse_t_;
    const double q_star = ::exp((r - double(c.row.r_ref)) * inverse_t_ + t_.log_kappa) * double(c.row.q_inverse);
    const auto e =
        c.element(REVERSE, log_weight - double(c.row.p_log_sum), ::exp(log_weight) * double(c.row.p_inverse), q_star);
    if (c.factor != 0) store(t_.gradient + t_.partial, Real(e.gradient * double(c.factor)));
    return e.loss;
  }

  const RowCall& p_;
  UniformScratch<Real>& s_;
  const double inverse_t_;
  RowTiles<Logit, Gradient> tiles_;
  const Task& t_;
};

}  // namespace TNT_ISA
}  // namespace tnt
