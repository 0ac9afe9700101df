// One launch of a backend as plain data. A kernel needs nothing else: no torch type crosses this line.
//
// Every field that Python knows stands in one of the lists below, in Python's order, and nowhere else in C++. The lists
// make the struct, the reading of Python's records (bind.h), and the names that Python compares with its own when it
// loads the module (backends/native.py).
#pragma once

#include <cstdint>

namespace tnt {

// The dtypes of logits: tnt_kernels._call.LOGITS_DTYPES, and PyTorch's names of them.
#define TNT_DTYPES(DTYPE) \
  DTYPE(FLOAT32, float32) DTYPE(BFLOAT16, bfloat16) DTYPE(FLOAT16, float16) DTYPE(FLOAT64, float64)

#define TNT_ENUMERATOR(name, torch_name) name,
enum class DType : int { TNT_DTYPES(TNT_ENUMERATOR) };
#undef TNT_ENUMERATOR

enum class Reduction : int { NONE = 0, SUM = 1, MEAN = 2 };

// What a launch does. A whole vocabulary takes FUSED, and BACKWARD where the gradient has to wait for its upstream
// factor. Where the vocabulary is sharded, every device launches STATISTICS, PARTIAL_SUMS and FINISH, with a collective
// after each of the first two. tnt_kernels._call.RowCall lists what each kind reads and writes.
enum class Kind : int { FUSED = 0, BACKWARD = 1, STATISTICS = 2, PARTIAL_SUMS = 3, FINISH = 4 };

// Numbers of a row: that are kept for a later gradient, that a shard tells the others, that are summed over the shards,
// that a caller may ask for.
constexpr int ROW_COEFFICIENTS = 16;
constexpr int ROW_STATISTICS = 15;
constexpr int ROW_PARTIAL_SUMS = 2;
constexpr int ROW_DIAGNOSTICS = 5;

// tnt_kernels._scalars.Scalars.
#define TNT_SCALARS(FIELD)                     \
  FIELD(int, positive_loss) /* enum RowLoss */ \
  FIELD(int, negative_loss)                    \
  FIELD(double, alpha_value)                   \
  FIELD(double, eps)                           \
  FIELD(bool, uniform_smoothing)               \
  FIELD(double, nl_floor) /* -inf: none */     \
  FIELD(double, temperature)                   \
  FIELD(int64_t, ignore_index)                 \
  FIELD(Reduction, reduction)                  \
  FIELD(double, normalizer_value) /* NaN: none */

// The tensors, null for what is absent or not wanted. "Real" is float, and double for FLOAT64 logits. N rows, V
// vocabulary, K negatives a row. Where the vocabulary is sharded over S devices, V counts this shard's columns; labels
// and ids are those of the whole vocabulary.

// tnt_kernels._call.RowTensors.
#define TNT_ROW_TENSORS(FIELD)                                                        \
  FIELD(const void*, ref_logits)      /* (N, V), null where no row's loss reads it */ \
  FIELD(const int64_t*, labels)       /* (N) */                                       \
  FIELD(const void*, weights)         /* (N) Real, null: 1 */                         \
  FIELD(const void*, alpha)           /* (N) or (1) Real, null: alpha_value */        \
  FIELD(const int64_t*, negative_ids) /* (N, K) or (K), -1 is padding; null: none */  \
  FIELD(const void*, normalizer)      /* () Real, null: normalizer_value */

// tnt_kernels._call.RowCall, which holds the two RECORDs.
#define TNT_ROW_CALL(FIELD, RECORD)                                                                             \
  FIELD(Kind, kind)                                                                                             \
  FIELD(const void*, logits) /* (N, V) */                                                                       \
  RECORD(tensors)                                                                                               \
  RECORD(scalars)                                                                                               \
  FIELD(int64_t, vocab_offset)   /* the id of column 0: other than 0 where the vocabulary is sharded */         \
  FIELD(int64_t, vocab_size)     /* of the whole vocabulary */                                                  \
  FIELD(void*, loss)             /* Real: () for SUM and MEAN, (N) for NONE */                                  \
  FIELD(void*, diagnostics)      /* (ROW_DIAGNOSTICS, N) Real: loss, kl, negative_mass, ref_negative_mass, */   \
                                 /* entropy. STATISTICS is only told whether they will be wanted. */            \
  FIELD(void*, coefficients)     /* (N, ROW_COEFFICIENTS) Real: RowCoefficients, then the gradient's factor; */ \
                                 /* FUSED writes them, BACKWARD reads them */                                   \
  FIELD(void*, gradient)         /* (N, V), may be the logits themselves */                                     \
  FIELD(const void*, upstream)   /* (N) or (1) Real: a factor of the gradient */                                \
  FIELD(void*, statistics)       /* (N, ROW_STATISTICS) Real: this shard's, in the backend's layout */          \
  FIELD(const void*, gathered)   /* (S, N, ROW_STATISTICS) Real: those of all shards */                         \
  FIELD(void*, partial_sums)     /* (N, ROW_PARTIAL_SUMS) Real, of this shard's second pass: its loss terms */  \
                                 /* (of the KLs in Bregman form; log p_s of NL), NL's active tokens */          \
  FIELD(const void*, total_sums) /* (N, ROW_PARTIAL_SUMS) Real: partial sums of all shards */                   \
  FIELD(bool, differences)       /* whether the logits are the policy's minus the reference's */

struct RowCall {
#define TNT_MEMBER(type, name) type name;
#define TNT_NO_MEMBER(name)
  TNT_ROW_CALL(TNT_MEMBER, TNT_NO_MEMBER)
  TNT_ROW_TENSORS(TNT_MEMBER)
  TNT_SCALARS(TNT_MEMBER)
#undef TNT_MEMBER
#undef TNT_NO_MEMBER

  // What the tensors are like.
  DType dtype, gradient_dtype;         // of the logits; the same, or BFLOAT16 where that is FLOAT32
  int64_t rows, vocab;                 // N, V
  int64_t negative_ids_count, shards;  // K, S
  // In elements: from row to row, 0 where all rows have the same; of `gathered` from shard to shard.
  int64_t logits_stride, ref_logits_stride, gradient_stride, alpha_stride, negative_ids_stride, upstream_stride;
  int64_t gathered_stride;
};

}  // namespace tnt
