// One call of a backend as plain data. A kernel needs nothing else: no torch type crosses this line.
#pragma once

#include <cstdint>

namespace tnt {

enum class DType : int { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, FLOAT64 = 3 };
enum class Reduction : int { NONE = 0, SUM = 1, MEAN = 2 };

// "Real" is float, and double for FLOAT64 logits. Strides count elements. N rows, V vocabulary, K negatives a row.
//
// Where the vocabulary is sharded over S devices, V counts this shard's columns, labels and ids are those of the whole
// vocabulary, and a loss takes three launches, with a collective after each of the first two:
//   statistics   `statistics` alone is written (and `row_stats` says whether it will be asked for in the end)
//   parts        `gathered` in; `parts` and, where it needs no totals, `grad` are written
//   finish       `gathered` and `totals` in; `loss` and `row_stats`, or a `grad` that had to wait, are written
struct RowParams {
  DType dtype;
  int64_t rows, vocab;
  int64_t vocab_offset, vocab_size;  // the shard's first id; of the whole vocabulary (0 and V where it is not sharded)
  const void* logits;                // (N, V)
  int64_t logits_stride;
  const void* ref_logits;  // (N, V), null where no row's loss needs it
  int64_t ref_logits_stride;
  const int64_t* labels;  // (N)
  const void* weights;    // (N) Real, null: 1
  const void* alpha;      // (N) Real with stride alpha_stride (0: one for all), null: alpha_value
  int64_t alpha_stride;
  double alpha_value;
  const int64_t* negative_ids;  // (N, K), -1 is padding; row stride 0: one list for all; null: none
  int64_t negative_ids_stride, negative_ids_count;

  int positive_loss, negative_loss;  // enum RowLoss
  bool uniform_smoothing;
  double eps, nl_floor, temperature;  // nl_floor -inf: none
  int64_t ignore_index;
  Reduction reduction;
  const void* normalizer;  // () Real, null: normalizer_value
  bool has_normalizer;     // without either, MEAN divides by the number of rows with a non-zero weight
  double normalizer_value;

  void* statistics;                 // (N, ROW_STATISTICS) Real: the first pass over this shard, as row_math.h packs it
  const void* gathered;             // (S, N, ROW_STATISTICS) Real: of all shards, in place of the first pass
  int64_t gathered_stride, shards;  // from shard to shard; S
  void* parts;  // (N, ROW_PARTS) Real: the second pass over this shard: [0] the sum of its loss terms (of the KLs
                // in Bregman form; Σ log p_s of NL), [1] NL's active tokens
  const void* totals;  // (N, ROW_PARTS) Real: `parts` summed over the shards

  void* loss;          // Real: () for sum and mean, (N) for none; null in a gradient-only call
  void* row_stats;     // (5, N) Real: loss, kl, negative_mass, ref_negative_mass, entropy; may be null
  void* coefficients;  // (N, ROW_COEFFICIENTS) Real: written by a call without `grad`, read where `upstream` is set;
                       // may be null
  void* grad;          // (N, V), may be the logits themselves; null: no gradient
  int64_t grad_stride;
  DType grad_dtype;  // that of the logits, or BFLOAT16 where these are FLOAT32
  // Gradient-only call: d(final loss)/d(loss), Real, with stride 0 (one number) or 1 (one a row). It comes with
  // `coefficients`, or with `gathered` and `totals`.
  const void* upstream;
  int64_t upstream_stride;

  int threads;
};

constexpr int ROW_COEFFICIENTS = 16;
constexpr int ROW_STATISTICS = 15;
constexpr int ROW_PARTS = 2;

}  // namespace tnt
