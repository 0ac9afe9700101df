// Sums of row_sums.h over logits that lie in a row, and over shards that lie in a list.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "elementary.h"
#include "row_sums.h"

namespace tnt {
inline namespace TNT_ISA {

// Of n logits. NaN if one of them is no number.
template <class Real>
LogSum log_sum_of(const Real* x, int64_t n, double inverse_temperature) {
  // Most sets are empty, or a row's own y.
  if (n <= 1) return n == 0 ? LogSum() : log_sum_of(double(x[0]), 0);
  constexpr int64_t SOME = 1024;  // that are added up as Real
  const Real scale = exponent_scale<Real>(inverse_temperature), inverse_t = Real(inverse_temperature);
  Real top = std::numeric_limits<Real>::lowest();
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < n; ++i) top = x[i] > top ? x[i] : top;
  double sum = 0, moment = 0;
  for (int64_t at = 0; at < n; at += SOME) {
    const int64_t end = std::min(n, at + SOME);
    Real some = 0, some_moment = 0;
#pragma omp simd reduction(+ : some, some_moment)
    for (int64_t i = at; i < end; ++i) {
      const Real centred = x[i] - top, weight = exponential(centred * scale);
      some += weight;
      some_moment += weight == Real(0) ? Real(0) : weight * (centred * inverse_t);
    }
    sum += some;
    moment += some_moment;
  }
  if (sum == 0) return {};
  return {double(top), ::log(sum), ::log(sum) - moment / sum};
}

// Of the set's logits. Where a y is pushed down in part, it lies among them: an entry that equals it is left out for
// it.
template <class Real>
LogSum log_sum_of_set(Real* x, int64_t n, bool has_partial, double partial, double inverse_temperature) {
  Real* const out = has_partial ? std::find(x, x + n, Real(partial)) : x + n;
  if (out != x + n) *out = -INFINITY;
  const LogSum sum = log_sum_of(x, n, inverse_temperature);
  if (out != x + n) *out = Real(partial);
  return sum;
}

inline RowSums merge(const std::vector<RowSums>& slices, double inverse_t) {
  RowSums all;
  for (const RowSums& slice : slices) all = merge(all, slice, inverse_t);
  return all;
}

}  // namespace TNT_ISA
}  // namespace tnt
