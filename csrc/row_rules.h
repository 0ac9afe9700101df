// The rules of a row, for host and device: which loss it has, whether it counts, and what its loss is multiplied by.
#pragma once

#include <cstdint>

#include "call.h"
#include "elementary.h"

namespace tnt {
inline namespace TNT_ISA {

enum RowLoss : int {  // as tnt_kernels.objectives.RowLoss
  NONE = 0,
  FORWARD_KL = 1,
  REVERSE_KL = 2,
  LOG_LIKELIHOOD = 3,
  UNLIKELIHOOD = 4,
  NEGATIVE_LIKELIHOOD = 5,
};
TNT_FN bool is_kl(int loss) { return loss == FORWARD_KL || loss == REVERSE_KL; }

// ------------------------------------------------------------------------------------- what a call says of its rows
// Real: what the call's weights, alpha and normaliser are stored in.

TNT_FN bool is_sharded(Kind kind) { return kind != Kind::FUSED && kind != Kind::BACKWARD; }
TNT_FN bool is_first(Kind kind) { return kind == Kind::FUSED || kind == Kind::STATISTICS; }  // launch of its rows

template <class Real>
TNT_FN Real row_weight(const RowCall& p, int64_t row) {
  return p.weights ? static_cast<const Real*>(p.weights)[row] : Real(1);
}

// A row counts if it has a label and a weight other than 0. The others are not read, and their gradient is 0.
template <class Number>
TNT_FN bool is_active(const RowCall& p, int64_t label, Number weight) {
  return label != p.ignore_index && weight != 0;
}
template <class Real>
TNT_FN bool is_active(const RowCall& p, int64_t row) {
  return is_active(p, p.labels[row], row_weight<Real>(p, row));
}

// What a row's loss is multiplied by: w on positive rows, alpha on negative ones, alpha |w| by UL and NL where w < 0.
template <class Real, class Number>
TNT_FN Number row_factor(const RowCall& p, int64_t row, int loss, bool negative, Number weight) {
  if (!negative) return weight;
  Number factor = p.alpha ? Number(static_cast<const Real*>(p.alpha)[row * p.alpha_stride]) : Number(p.alpha_value);
  if ((loss == UNLIKELIHOOD || loss == NEGATIVE_LIKELIHOOD) && weight < 0) factor *= -weight;
  return factor;
}

// Without eps the two smoothings are one.
TNT_FN bool smooths_uniformly(const RowCall& p) { return p.uniform_smoothing && p.eps > 0; }

// MEAN divides by the number of active rows, unless the call says by what.
TNT_FN bool counts_active_rows(const RowCall& p) { return !p.normalizer && p.normalizer_value != p.normalizer_value; }
template <class Real>
TNT_FN double inverse_normalizer(const RowCall& p, double active_rows) {
  const double value = counts_active_rows(p) ? active_rows
                       : p.normalizer        ? double(*static_cast<const Real*>(p.normalizer))
                                             : p.normalizer_value;
  return value == 0 ? 0 : 1 / value;
}

}  // namespace TNT_ISA
}  // namespace tnt
