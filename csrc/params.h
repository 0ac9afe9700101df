// One call of a backend as plain data. A kernel needs nothing else: no torch type crosses this line.
#pragma once

#include <cstdint>

namespace tnt {

enum class DType : int { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, FLOAT64 = 3 };
enum class Reduction : int { NONE = 0, SUM = 1, MEAN = 2 };

// "Real" is float, and double for FLOAT64 logits. Strides count elements. N rows, V vocabulary, K negatives a row.
struct RowParams {
  DType dtype;
  int64_t rows, vocab;
  const void* logits;  // (N, V)
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
  bool has_normalizer;  // else MEAN divides by the number of rows with a non-zero weight
  double normalizer;

  void* loss;          // Real: () for sum and mean, (N) for none; null in a gradient-only call
  void* row_stats;     // (5, N) Real: loss, kl, negative_mass, ref_negative_mass, entropy; may be null
  void* coefficients;  // (N, ROW_COEFFICIENTS) Real: written by a call without `grad`, read where `upstream` is set;
                       // may be null
  void* grad;          // (N, V) dtype of the logits, may be the logits themselves; null: no gradient
  int64_t grad_stride;
  // Gradient-only call: d(final loss)/d(loss), Real, with stride 0 (one number) or 1 (one a row).
  const void* upstream;
  int64_t upstream_stride;

  int threads;
};

constexpr int ROW_COEFFICIENTS = 16;

}  // namespace tnt
