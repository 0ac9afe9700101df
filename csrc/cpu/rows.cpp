// The CPU kernel: rows over OpenMP threads. This file is compiled once per instruction set (TNT_ISA names its
// namespace); bind.cpp picks one at run time. row.h has what a row does: a first pass over its logits, in tiles that
// stay in the L1 cache, yields its loss (of KLs under uniform smoothing, the second), a second one its gradient.
#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/row.h"

namespace tnt {
inline namespace TNT_ISA {
namespace {

template <class Logit, class Gradient = Logit>
void run(const RowCall& p, int most_threads) {
  using Real = RealOf<Logit>;
  double inverse = 1;  // of the normaliser
  if (p.reduction == Reduction::MEAN) {
    int64_t active = 0;
    if (counts_active_rows(p))
      for (int64_t i = 0; i < p.rows; ++i) active += is_active<Real>(p, i);
    inverse = inverse_normalizer<Real>(p, double(active));
  }
  const SharedIds shared_ids(p);

  std::vector<double> losses(static_cast<size_t>(p.rows));
  // Rows are handed out in blocks as threads become free, because ignored rows cost next to nothing. A thread takes its
  // next block before it works on the present one, to know what to prefetch.
  const int64_t block = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, p.vocab));
  // A row is split over threads where there are fewer rows than threads.
  const bool splits = p.rows < most_threads;
  const int threads = splits ? 1 : int(std::min<int64_t>(most_threads, (p.rows + block - 1) / block));
  std::atomic<int64_t> taken{0};
  const auto work = [&] {
    Row<Logit, Gradient> row(p, shared_ids, splits ? most_threads : 1, Scratch<Real>::of_this_thread());
    for (int64_t begin = taken.fetch_add(block), next; begin < p.rows; begin = next) {
      next = taken.fetch_add(block);
      const int64_t end = std::min(begin + block, p.rows);
      for (int64_t i = begin; i < end; ++i) losses[size_t(i)] = row.run(i, i + 1 < end ? i + 1 : next, inverse);
    }
  };
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    work();
  } else {
    work();  // a team of one takes as long to gather as a short row
  }
  if (p.reduction == Reduction::NONE || !p.loss) return;
  double total = 0;
  for (const double loss : losses) total += loss;
  *static_cast<Real*>(p.loss) = Real(inverse == 0 ? 0 : total * inverse);
}

}  // namespace

// By its name profilers find the kernel, as a module without symbols has those that are visible.
__attribute__((visibility("default"))) void run_rows(const RowCall& p, int threads) {
  switch (p.dtype) {
    case DType::FLOAT32:
      return p.gradient_dtype == DType::BFLOAT16 ? run<float, BFloat16>(p, threads) : run<float>(p, threads);
    case DType::BFLOAT16: return run<BFloat16>(p, threads);
    case DType::FLOAT16: return run<Float16>(p, threads);
    case DType::FLOAT64: return run<double>(p, threads);
  }
}

}  // namespace TNT_ISA
}  // namespace tnt
