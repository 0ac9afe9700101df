// The CUDA backend's entry points, and the small kernels before and after those for the rows (rows.cuh).
#define TNT_ISA cuda_math
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cuda/entry_points.h"
#include "cuda/launch.cuh"
#include "cuda/math.cuh"

#if defined(TNT_CUDA_SHIM)  // the tests' model is one program
#include "cuda/bfloat16.cu"
#include "cuda/float16.cu"
#include "cuda/float32.cu"
#include "cuda/float32_bfloat16.cu"
#endif

namespace tnt {
inline namespace TNT_ISA {
namespace {

using device::SUM_THREADS;

// Over a block, the same bits every time; on thread 0.
TNT_DEVICE double sum_of_block(double x) {
  double* const warps = reinterpret_cast<double*>(device::shared_memory());
  const int thread = device::thread_index(), warp = thread / device::WARP, lane = thread % device::WARP;
  x = sum_of_warp(x);
  if (lane == 0) warps[warp] = x;
  device::sync_block();
  return sum_of_warp(lane < SUM_THREADS / device::WARP ? warps[lane] : 0.0);
}

constexpr int SUM_BYTES = SUM_THREADS / device::WARP * sizeof(double);

// 1 / normaliser: nobody waits for the device to learn how many rows are active. No row is left over yet.
__global__ void __launch_bounds__(SUM_THREADS)
    normalizer_kernel(const __grid_constant__ RowCall p, double* inverse, int* left) {
  if (left && device::thread_index() == 0) *left = 0;
  if (!inverse) return;
  double active = 0;
  if (counts_active_rows(p))
    for (int64_t i = device::thread_index(); i < p.rows; i += SUM_THREADS) active += is_active<float>(p, i);
  active = sum_of_block(active);
  if (device::thread_index() == 0) *inverse = inverse_normalizer<float>(p, active);
}

__global__ void __launch_bounds__(SUM_THREADS)
    loss_kernel(const double* losses, int64_t rows, const double* inverse, float* loss) {
  double total = 0;
  for (int64_t i = device::thread_index(); i < rows; i += SUM_THREADS) total += losses[i];
  total = sum_of_block(total);
  if (device::thread_index() == 0) *loss = float(inverse ? (*inverse == 0 ? 0 : total * *inverse) : total);
}

template <class Logit>
__global__ void __launch_bounds__(SUM_THREADS)
    scale_kernel(Logit* x, int64_t rows, int64_t columns, int64_t stride, const float* factor) {
  const float by = *factor;
  if (by == 1.0f) return;
  constexpr int GROUP = Stored<Logit>::GROUP;
  const int64_t groups = (columns + GROUP - 1) / GROUP, all = rows * groups;
  const int64_t step = device::grid_size() * SUM_THREADS;
  for (int64_t i = device::block_index() * SUM_THREADS + device::thread_index(); i < all; i += step) {
    Logit* const at = x + i / groups * stride + i % groups * GROUP;
    const int64_t left = columns - i % groups * GROUP;
    float values[GROUP];
    if (left >= GROUP && reinterpret_cast<uintptr_t>(at) % 16 == 0) {
      Stored<Logit>::unpack(device::load_vector(at), values);
#pragma unroll
      for (int k = 0; k < GROUP; ++k) values[k] *= by;
      device::store_vector(at, Stored<Logit>::pack(values));
      continue;
    }
    for (int k = 0; k < GROUP && k < left; ++k) {
      values[0] = Stored<Logit>::load(at + k) * by;
      const Vector packed = Stored<Logit>::pack({values[0]});
      memcpy(at + k, packed.words, sizeof(Logit));
    }
  }
}

template <class Logit>
void scale(void* x, int64_t rows, int64_t columns, int64_t stride, const void* factor, int device, void* stream) {
  const int64_t groups = rows * ((columns + Stored<Logit>::GROUP - 1) / Stored<Logit>::GROUP);
  const int64_t blocks = std::min<int64_t>((groups + SUM_THREADS - 1) / SUM_THREADS,
                                           int64_t(device::properties(device).multiprocessors) * 4);
  if (blocks > 0)
    device::launch(scale_kernel<Logit>, blocks, 1, SUM_THREADS, 0, stream, static_cast<Logit*>(x), rows, columns,
                   stride, static_cast<const float*>(factor));
}

// One of each dtype that is served.
const CudaRows* const ALL_ROWS[] = {&cuda_rows_float32, &cuda_rows_float32_bfloat16, &cuda_rows_bfloat16,
                                    &cuda_rows_float16};

struct Scaling {
  DType dtype;
  void (*run)(void* x, int64_t rows, int64_t columns, int64_t stride, const void* factor, int device, void* stream);
  void (*load)();
};
template <class Number>
constexpr Scaling scaling() {
  return {Stored<Number>::DTYPE, scale<Number>, [] { device::load(scale_kernel<Number>); }};
}
const Scaling SCALINGS[] = {scaling<float>(), scaling<BFloat16>(), scaling<Float16>()};

// The first of these that serves a dtype.
template <class Some, class Serves>
const auto& one_of(const Some& some, Serves serves) {
  for (const auto& one : some)
    if (serves(one)) return one;
  throw std::runtime_error("logits: float64 is not served on CUDA");
}
const CudaRows& rows_of(DType logits, DType gradient) {
  return *one_of(
      ALL_ROWS, [&](const CudaRows* rows) { return rows->logits_dtype == logits && rows->gradient_dtype == gradient; });
}

}  // namespace
}  // namespace TNT_ISA

void run_rows_cuda(const RowCall& p, const CudaPlace& place) {
  const device::Guard guard(place.device);
  rows_of(p.dtype, p.gradient_dtype).run(p, place);
}

CudaPlan plan_cuda(DType dtype, int64_t vocab, bool pair, int device) {
  const device::Guard guard(device);
  return rows_of(dtype, dtype).plan(vocab, pair, device);
}

const double* prepare_rows(const RowCall& p, const CudaPlace& place, int* left) {
  // Statistics need no normaliser, and coefficients have it in them.
  const bool mean = p.reduction == Reduction::MEAN && p.kind != Kind::STATISTICS && p.kind != Kind::BACKWARD;
  double* const inverse = mean ? place.workspace : nullptr;
  if (mean || left) device::launch(normalizer_kernel, 1, 1, SUM_THREADS, SUM_BYTES, place.stream, p, inverse, left);
  return inverse;
}

void finish_rows(const RowCall& p, const CudaPlace& place, const double* inverse) {
  if (p.loss && p.reduction != Reduction::NONE)
    device::launch(loss_kernel, 1, 1, SUM_THREADS, SUM_BYTES, place.stream,
                   static_cast<const double*>(place.workspace + 1), p.rows, inverse, static_cast<float*>(p.loss));
}

void scale_rows_cuda(DType dtype, void* x, int64_t rows, int64_t columns, int64_t stride, const void* factor,
                     int device, void* stream) {
  const device::Guard guard(device);
  one_of(SCALINGS, [&](const Scaling& one) {
    return one.dtype == dtype;
  }).run(x, rows, columns, stride, factor, device, stream);
}

std::string why_not_cuda(int device) {
  try {
    const device::Guard guard(device);
    for (const CudaRows* rows : ALL_ROWS) rows->load(device);
    device::load(normalizer_kernel);
    device::load(loss_kernel);
    for (const Scaling& scaling : SCALINGS) scaling.load();
    return "";
  } catch (const std::runtime_error& error) {
    return error.what();
  }
}

void forget_plans() {
  for (const CudaRows* rows : ALL_ROWS) rows->forget();
}

}  // namespace tnt
