// What stream_kernel.cuh works out between a row's passes, whatever its logits are stored in: from sums to statistics
// of a shard, from those of all shards to sums, from sums to the loss and to what a second pass takes. It is the CPU's
// mathematics, in double: once a row, by one thread of every block, or by a warp where there are shards.
#pragma once

#include "cuda/entry_points.h"
#include "cuda/kl_math.cuh"
#include "kl_conclusion.h"
#include "objectives.h"

namespace tnt {
inline namespace TNT_ISA {

constexpr int MAX_CLUSTER = 8, MAX_WARPS = device::STREAM_THREADS / device::WARP;

// What a first pass sums; of a KL without a label that is pushed down in part.
struct StreamSums {
  // KL: S, A or M, Phi, A, and of the policy's weights times their log2. One stream: S, none, (z - ref)/T, none, and
  // the same. Under uniform smoothing the reference's S comes second.
  float s = 0, a_or_m = 0, phi = 0, a = 0, h = 0;
  float x_top = -INFINITY, o_top = -INFINITY;
  KlSetSums set, reference_set;
  float z_broken = 0, r_broken = 0;  // not 0: a set has a logit that is no number
};
constexpr int STREAM_SUMS = sizeof(StreamSums) / sizeof(float);

// What a pass that sums is after: a KL's sums with one shift; the rows' maxima; sums of one stream, or of each of two.
enum StreamPass { OF_KL, OF_MAXIMA, OF_STREAMS, OF_NOTHING };
constexpr int STREAM_ATTEMPTS = 6;

struct StreamLaunch {
  int slice;       // columns of a block, a multiple of 32
  int mask_bytes;  // of the slice's bits
  Scales scales;
  const double* inverse_normalizer;  // null: 1
  double* losses;                    // (N) weighted, or null
  const int* left;                   // how many rows, then their numbers; null: all rows
};

// A row, in the shared memory of each of its blocks.
struct StreamRow {
  uint32_t flags;
  int loss;
  int64_t index, label;
  float weight, factor;
  bool invalid, negative, has_set;
  bool has_partial;        // whether y is pushed down in part: neither removed nor an ordinary entry
  bool has_label;          // whether that y lies here
  float label_z, label_r;  // its logits, or 0
  // Of the first pass.
  StreamPass pass;  // what comes next
  int attempt;
  RowShift shift;
  float level_z, level_r;  // of the streams
  bool at_maxima;          // whether these, or the references, are the rows' maxima
  bool broken;             // a KL's sums are no numbers
  float entropy;           // in bits, of a KL whose weights were made smaller
  StreamSums found;
  // What follows from it.
  RowSums sums;
  KlSlice kept;
  float log_sum, least;  // of NL: log p_s = (z_s - the set's ref)/T - log_sum; the least of the first that is pushed
  PartialSums totals;    // of all slices
  KlPlan<float> kl;
  ExpPlan<float> exp;
  UniformNumbers<float> uniform;
  RowResult result;
  double scale;  // on the gradient
  // For exchanges.
  float warps[MAX_WARPS][STREAM_SUMS], peers[MAX_CLUSTER][STREAM_SUMS];
  float warp_sums[MAX_WARPS][2], peer_sums[MAX_CLUSTER][2];
};

TNT_DEVICE double log_kappa(const StreamRow& row) { return row.has_partial ? log1p(double(row.weight)) : 0; }
TNT_DEVICE double inverse_t(const StreamLaunch& l) { return double(l.scales.inverse_t); }  // as the loops have it

// On the row's gradient; one that is not asked for is 0, whatever the other factors are.
TNT_DEVICE double gradient_factor(const RowCall& p, const StreamLaunch& l, const StreamRow& row) {
  double scale = double(row.factor) * (l.inverse_normalizer ? *l.inverse_normalizer : 1.0) / p.temperature;
  if (row.factor == 0.0f || row.loss == NONE) scale = row.invalid ? double(row.factor) : 0;
  if (p.kind == Kind::BACKWARD)
    scale = double(static_cast<const float*>(p.coefficients)[(row.index + 1) * ROW_COEFFICIENTS - 1]);
  if (!p.upstream) return scale;
  const float upstream = static_cast<const float*>(p.upstream)[row.index * p.upstream_stride];
  return scale == 0 || upstream == 0.0f ? 0 : scale * double(upstream);
}

// ---- from a first pass to the sums of this slice

TNT_DEVICE LogSum log_sum(float ref, float sum, float moment, float broken) {
  if (broken != 0.0f) return {0, NAN, 0};
  if (sum == 0.0f) return {};
  const double log = ::log(double(sum));
  return {double(ref), log, log - LN_2 * double(moment) / double(sum)};
}

// `streams`: how many were summed, 0 where it was a KL.
TNT_CALLED void describe_streams(const RowCall& p, int streams, StreamRow& row) {
  const StreamSums& t = row.found;
  row.sums = RowSums();
  if (streams > 0) row.sums.policy = log_sum(row.level_z, t.s, t.h, 0.0f), row.sums.total = double(t.phi);
  if (streams > 1) row.sums.reference = log_sum(row.level_r, t.a_or_m, 0.0f, 0.0f);
  if (streams > 1 && smooths_uniformly(p)) {
    const bool reverse = row.loss == REVERSE_KL;
    const LogSum &base = base_of(row.sums, reverse), &other = other_of(row.sums, reverse);
    row.sums.log_ratio = base.is_empty() ? 0 : other.log - base.log;
  }
  row.sums.policy_set = log_sum(t.set.max, t.set.sum, t.set.moment, t.z_broken);
  row.sums.reference_set = log_sum(t.reference_set.max, t.reference_set.sum, t.reference_set.moment, t.r_broken);
  row.sums.label_policy = row.label_z, row.sums.label_reference = row.label_r;
  row.sums.kept = double(p.vocab) - double(t.set.n) - (row.has_label ? 1 : 0);
}

TNT_DEVICE KlScalars scalars_of(const RowCall& p, const StreamLaunch& l, const StreamRow& row) {
  const double removed = double(p.vocab_size) - row.sums.kept - (row.has_partial ? 1 : 0);
  return {row.loss == REVERSE_KL, inverse_t(l), 1 / p.temperature, p.eps, removed, log_kappa(row), row.has_label};
}

// Whether a KL's sums are fit; if not, what comes next, and with which shift.
template <bool REVERSE>
TNT_DEVICE void judge(const StreamSums& sums, bool diagnostics, StreamRow& row) {
  const RowShift k = row.shift;
  KlRow t;
  t.s = sums.s, t.a_or_m = sums.a_or_m, t.phi = sums.phi, t.h = sums.h, t.a = sums.a;
  const bool first = !row.at_maxima, cancels = diagnostics && entropy_cancels<REVERSE>(t);
  const KlVerdict verdict = judge_sums<REVERSE>(t, true, first, true, cancels);
  const bool infinite = verdict == KL_INFINITE;
  const bool has_sum = t.s > 0.0f && t.s < INFINITY && fabsf(t.l) < 1e30f;
  row.broken = !(t.s < INFINITY && fabsf(t.a) < INFINITY);
  row.pass = row.broken ? OF_STREAMS : OF_NOTHING;
  if (++row.attempt == STREAM_ATTEMPTS) return;
  if (verdict == KL_BY_MAXIMA || (infinite && first)) {
    row.pass = OF_MAXIMA;
  } else if (infinite && k.less == 0.0f) {  // terms that are too large for a float may not be with smaller weights
    row.pass = OF_KL;
    row.shift = with(k, k.more, 32.0f);
    row.entropy = kept_entropy<REVERSE>(t);  // which hide it
  } else if (verdict == KL_AGAIN && has_sum) {
    row.pass = OF_KL;
    row.shift = with(k, k.more + t.l, k.less);
  }
}

TNT_DEVICE float finite(float x) { return fabsf(x) < INFINITY ? x : 0.0f; }

// Whether the sums of streams are. Small differences of large numbers have an entropy unless the level is the maximum.
TNT_DEVICE void judge_streams(const StreamSums& sums, bool pair, bool diagnostics, StreamRow& row) {
  const auto is_good = [](float sum) { return sum > 0x1p-20f && sum < 0x1p40f; };
  const bool good = is_good(sums.s) && (!pair || is_good(sums.a_or_m)) && !(diagnostics && sums.s > 0x1p10f);
  row.pass = OF_NOTHING;
  if (good || row.at_maxima) return;
  row.pass = OF_STREAMS;
  row.at_maxima = true;
  row.level_z = finite(sums.x_top), row.level_r = finite(sums.o_top);
}

// What slice_of takes of a first pass.
struct SumsOfSlice {
  double s, phi, a, other, entropy, broken;
};

// Of a KL. Where its sums are no numbers, row.sums are those of two streams: whichever row exists has sums all the
// same.
TNT_CALLED void describe_kl(const RowCall& p, const StreamLaunch& l, StreamRow& row) {
  const bool reverse = row.loss == REVERSE_KL;
  if (row.broken) {
    row.sums.kl = row.sums.log_ratio = NAN;
    row.kept = slice_of(row.sums, reverse);
    row.shift.x_zero = row.shift.o_zero = 0.0f;
    return;
  }
  const StreamSums& t = row.found;
  const double s = double(t.s), a = double(t.a);
  row.kept = slice_of(SumsOfSlice{s, double(t.phi), a, s + a, double(t.h), 0}, row.shift, reverse, true);
  if (row.shift.less != 0.0f) row.kept.policy_entropy = LN_2 * double(row.entropy);
  KlScalars scalars = scalars_of(p, l, row);
  scalars.x_zero = double(row.shift.x_zero), scalars.o_zero = double(row.shift.o_zero);
  describe<float>(row.kept, scalars, row.sums);
}

// ---- in place of a first pass: what all shards found, by a warp

// A slice a lane.
struct LaneSlices {
  KlSlice mine;
  bool has_mine;
  template <class F>
  TNT_DEVICE double sum(F f) const {
    const double x = has_mine ? double(f(mine)) : 0;
    device::sync_warp();
    return sum_of_warp(x);
  }
  template <class F>
  TNT_DEVICE double max(F f) const {
    double top = has_mine ? fmax(double(-INFINITY), double(f(mine))) : double(-INFINITY);
    device::sync_warp();
#pragma unroll 1
    for (int mask = 16; mask > 0; mask >>= 1) top = fmax(top, device::shuffle_xor(top, mask));
    return top;
  }
  // Its references alone are asked for: any will do.
  TNT_DEVICE KlSlice first() const {
    KlSlice slice;
    slice.x_ref = max([](const KlSlice& some) { return some.x_ref; });
    slice.o_ref = max([](const KlSlice& some) { return some.o_ref; });
    return slice;
  }
};

TNT_DEVICE LogSum of_lane(const LogSum& s, int mask) {
  return {device::shuffle_xor(s.ref, mask), device::shuffle_xor(s.log, mask), device::shuffle_xor(s.entropy, mask)};
}
// A shard a lane. Where there are more, lane 0 holds what those so far add up to.
TNT_CALLED void gather(const RowCall& p, const StreamLaunch& l, StreamRow& row) {
  const float* const of_row = static_cast<const float*>(p.gathered) + row.index * ROW_STATISTICS;
  const bool sums_kl = is_kl(row.loss) && !smooths_uniformly(p), reverse = row.loss == REVERSE_KL;
  const int lane = device::thread_index() % device::WARP;
  RowSums all;
  LaneSlices slices{{}, false};
#pragma unroll 1
  for (int64_t first = 0; first < p.shards; first += device::WARP - 1) {
    const int64_t shard = first + lane - 1;
    if (lane > 0) {
      all = shard < p.shards ? unpack(of_row + shard * p.gathered_stride, is_kl(row.loss)) : RowSums();
      slices.has_mine = sums_kl && !(all.policy.is_empty() && all.reference.is_empty());
      slices.mine = slice_of(all, reverse);
    }
    device::sync_warp();
    if (device::any_of_warp(slices.has_mine)) {
      const KlSlice kept = merged(slices, reverse, inverse_t(l));
      if (lane == 0) slices = {kept, true};
    }
#pragma unroll 1
    for (int mask = 1; mask < device::WARP && mask <= p.shards; mask *= 2) {
      RowSums other;
      other.policy = of_lane(all.policy, mask), other.reference = of_lane(all.reference, mask);
      other.policy_set = of_lane(all.policy_set, mask), other.reference_set = of_lane(all.reference_set, mask);
      other.label_policy = device::shuffle_xor(all.label_policy, mask);
      other.label_reference = device::shuffle_xor(all.label_reference, mask);
      other.total = device::shuffle_xor(all.total, mask), other.kept = device::shuffle_xor(all.kept, mask);
      all = merge(all, other, inverse_t(l));
      device::sync_warp();
    }
  }
  if (lane == 0) row.sums = all, row.kept = slices.mine;
}

// ---- from the sums of a whole vocabulary to the loss and to what the second pass takes

TNT_CALLED void conclude_kl(const RowCall& p, const StreamLaunch& l, float most_apart, StreamRow& row) {
  KlScalars scalars = scalars_of(p, l, row);
  const bool whole = is_first(p.kind);
  if (whole) scalars.x_zero = double(row.shift.x_zero), scalars.o_zero = double(row.shift.o_zero);
  const KlEntry label = complete<float>(scalars, row.sums, row.kept);
  if (!whole) {  // shards read their logits relative to the levels of the whole vocabulary
    const References at = references_of(float(row.kept.x_ref), float(row.kept.o_ref), most_apart);
    if (at.x_zero != 0.0f || at.o_zero != 0.0f)
      read_relative_to(double(at.x_zero), double(at.o_zero), scalars, row.kept);
  }
  row.result = conclude<float>(scalars, row.sums, row.kept, label, nullptr, {}, row.kl);
}

TNT_CALLED void normalize_set(const RowCall& p, const StreamLaunch& l, StreamRow& row) {
  const double normalizer = set_normalizer(row.sums, inverse_t(l));
  row.log_sum = float(normalizer), row.least = float(least_log_weight<float>(p.nl_floor, normalizer));
}

TNT_CALLED void conclude_stream(const RowCall& p, const StreamLaunch& l, StreamRow& row) {
  const RowSums& s = row.sums;
  const ExpLoss loss = exp_loss<float>(row.loss, s, row.totals, p, inverse_t(l));
  ExpPlan<float>& plan = row.exp;
  plan = {};
  plan.zero = float(s.policy.ref), plan.bias = float(loss.bias);
  if (!s.policy.is_empty()) {  // weights add up to 4: the largest ones' exponents are rounded least
    plan.c = float(s.policy.log * LOG2_E - 2);
    plan.weight = float(loss.kept * ::exp(double(plan.c) * LN_2 - s.policy.log));
  }
  plan.set_ref = float(s.policy_set.ref), plan.push = float(loss.push), plan.least = float(loss.least);
  if (!s.policy_set.is_empty()) plan.set = float(loss.set * ::exp(-s.policy_set.log));
  row.result = result_of(row.loss, s, loss);
}

// Puts what is the call's to the row's numbers.
TNT_CALLED void complete_uniform(const RowCall& p, const StreamLaunch& l, StreamRow& row) {
  const UniformPlan<float> plan = row.uniform.row;
  row.uniform = uniform_numbers(plan, p, inverse_t(l), 1);
}

// Where its loss is summed by a second pass of this launch, it follows behind that.
TNT_CALLED void conclude_uniform(const RowCall& p, const StreamLaunch& l, StreamRow& row) {
  const bool reverse = row.loss == REVERSE_KL;
  const double loss = row.totals.loss;
  const bool exists = conclude_uniform(row.sums, reverse, log_kappa(row), inverse_t(l), row.uniform.row);
  complete_uniform(p, l, row);
  row.uniform.row.loss = float(loss);
  row.result = {exists ? loss : NAN, !exists || (reverse && p.kind == Kind::FINISH && !(loss < INFINITY))};
}

// ---- what a launch leaves behind

TNT_CALLED void diagnose(const RowCall& p, const StreamRow& row) {
  const float loss = float(row.result.loss);
  const bool kl = is_kl(row.loss);
  write_diagnostics(p, row.index, loss, kl ? loss : NAN,
                    diagnose(row.sums, row.negative, kl, log_kappa(row), 1 / p.temperature));
}

}  // namespace TNT_ISA
}  // namespace tnt
