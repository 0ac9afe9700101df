// The CUDA kernels' launcher: which path and how many blocks a row gets, and the small kernels before and after.
#define TNT_ISA cuda_math
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "kl_kernel.cuh"
#include "row_cuda.h"
#include "row_kernel.cuh"
#include "row_launch.cuh"

namespace tnt {
inline namespace TNT_ISA {
namespace {

template <class Logit, class Gradient, bool ON_CHIP>
__global__ void __launch_bounds__(ON_CHIP ? device::ROW_THREADS : device::STREAM_THREADS, ON_CHIP ? 2 : 1)
    row_kernel(const __grid_constant__ RowParams p, const __grid_constant__ RowLaunch launch) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  RowBlock<Logit, Gradient, ON_CHIP>(p, launch, device::block_index() / device::cluster_size()).run();
#else
  if constexpr (!ON_CHIP)
    RowBlock<Logit, Gradient, ON_CHIP>(p, launch, device::block_index() / device::cluster_size()).run();
#endif
}

// The rows that kl_kernel has left, a cluster one after another.
template <class Logit, class Gradient>
__global__ void __launch_bounds__(device::STREAM_THREADS, 1)
    left_rows_kernel(const __grid_constant__ RowParams p, const __grid_constant__ RowLaunch launch, const int* left) {
  const int64_t step = device::grid_size() / device::cluster_size();
#pragma unroll 1
  for (int64_t i = device::block_index() / device::cluster_size(); i < left[0]; i += step) {
    RowBlock<Logit, Gradient, false>(p, launch, left[1 + i]).run();
    device::sync_block();  // shared memory is written to again
    device::cluster_arrive();
    device::cluster_wait();
  }
}

template <class Logit, class Gradient, bool STATS>
__global__ void __launch_bounds__(device::KL_THREADS, 3)
    kl_kernel(const __grid_constant__ RowParams p, const __grid_constant__ KlLaunch launch) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  KlBlock<Logit, Gradient, STATS>(p, launch).run();
#endif
}

constexpr int SUM_THREADS = device::STREAM_THREADS;

// Over a block, the same bits every time; on thread 0.
TNT_DEVICE double sum_of_block(double x) {
  double* const warps = reinterpret_cast<double*>(device::shared_memory());
  const int thread = device::thread_index(), warp = thread / device::WARP, lane = thread % device::WARP;
  x = sum_of_warp(x);
  if (lane == 0) warps[warp] = x;
  device::sync_block();
  return sum_of_warp(lane < SUM_THREADS / device::WARP ? warps[lane] : 0.0);
}

// 1 / normaliser: nobody waits for the device to learn how many rows are active. No row is left over yet.
__global__ void __launch_bounds__(SUM_THREADS)
    normalizer_kernel(const __grid_constant__ RowParams p, double* inverse, int* left) {
  if (left && device::thread_index() == 0) *left = 0;
  if (!inverse) return;
  double active = 0;
  if (!p.normalizer && !p.has_normalizer)
    for (int64_t i = device::thread_index(); i < p.rows; i += SUM_THREADS)
      active += (!p.weights || static_cast<const float*>(p.weights)[i] != 0.0f) && p.labels[i] != p.ignore_index;
  active = sum_of_block(active);
  if (device::thread_index() != 0) return;
  const double value = p.normalizer       ? double(*static_cast<const float*>(p.normalizer))
                       : p.has_normalizer ? p.normalizer_value
                                          : active;
  *inverse = value == 0 ? 0 : 1 / value;
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

// ------------------------------------------------------------------------------------------------- which path, how

constexpr int SUM_BYTES = SUM_THREADS / device::WARP * sizeof(double);

struct Plan {
  bool on_chip;
  int cluster;
  RowLaunch launch;
  int shared_bytes;
};

int64_t slice_of(int64_t vocab, int blocks) { return ((vocab + blocks - 1) / blocks + 31) / 32 * 32; }

Plan plan_of(bool on_chip, int cluster, int64_t vocab, int element_bytes) {
  Plan plan{on_chip, cluster, {}, 0};
  plan.launch.slice = slice_of(vocab, cluster);
  plan.launch.mask_bytes = int((plan.launch.slice / 8 + 15) / 16 * 16);
  // Up to 15 bytes of misalignment before the slice; a group is read as two vectors, the second behind it.
  plan.launch.row_bytes = on_chip ? int((plan.launch.slice * element_bytes + 32 + 127) / 128 * 128) : 0;
  plan.shared_bytes = SHARED_HEADER + plan.launch.mask_bytes + 2 * plan.launch.row_bytes;
  return plan;
}

template <class Logit, class Gradient>
Plan choose(int64_t vocab, int device, bool on_chip) {
  const device::Properties properties = device::properties(device);
  // A kernel knows of clusters, and of what stays on chip, if it was compiled for them too.
  const auto clusters = [&](auto kernel) { return properties.clusters && device::architecture(kernel) >= 90; };
  const auto fits = [&](const Plan& plan, int limit) {
    return plan.shared_bytes <= limit &&
           device::active_clusters(
               plan.on_chip ? row_kernel<Logit, Gradient, true> : row_kernel<Logit, Gradient, false>, plan.cluster,
               plan.on_chip ? device::ROW_THREADS : device::STREAM_THREADS, plan.shared_bytes) > 0;
  };
  if (on_chip && clusters(row_kernel<Logit, Gradient, true>)) {
    // Two blocks on a multiprocessor hide each other's loads, merges and coefficients (three would need 80 registers,
    // and spill). 16 blocks are non-portable, and fewer, larger ones come before them.
    const int two = properties.shared_per_multiprocessor / 2 - properties.shared_reserved;
    const std::pair<int, int> order[] = {
        {1, two}, {2, two}, {4, two}, {8, two}, {8, properties.shared_per_block}, {16, properties.shared_per_block}};
    for (const auto& [cluster, limit] : order) {
      if (cluster > properties.largest_cluster) continue;
      const Plan plan = plan_of(true, cluster, vocab, sizeof(Logit));
      if (fits(plan, limit)) return plan;
    }
  }
  // The rows in flight should fit half of the L2 cache, or the second pass finds nothing there: with clusters, fewer
  // rows are in flight. One block of STREAM_THREADS has a register budget that lets two share a multiprocessor.
  const bool several = clusters(row_kernel<Logit, Gradient, false>);
  int cluster = 1;
  if (several)
    while (cluster < 8 && int64_t(properties.multiprocessors) / cluster * 2 * vocab * int64_t(sizeof(Logit)) * 2 >
                              properties.l2_bytes / 2)
      cluster *= 2;
  for (; cluster <= 8; cluster *= 2) {
    const Plan plan = plan_of(false, cluster, vocab, sizeof(Logit));
    if (fits(plan, properties.shared_per_block)) return plan;
    if (!several) break;
  }
  throw std::runtime_error("logits: a vocabulary of " + std::to_string(vocab) + " is too large for this device");
}

// How kl_kernel is launched, and the kernel for the rows that it leaves.
struct KlPlan {
  int cluster = 0;  // 0: it does not serve this vocabulary on this device
  int slice, shared_bytes;
  Plan left;
  int64_t left_blocks;
};

template <class Logit, class Gradient, bool STATS>
KlPlan choose_kl(int64_t vocab, int device) {
  const device::Properties properties = device::properties(device);
  const auto kernel = kl_kernel<Logit, Gradient, STATS>;
  KlPlan plan;
  if (!properties.clusters || device::architecture(kernel) < 90) return plan;
  device::prefer_shared_memory(kernel);
  // For measurements: no other size of cluster than this.
  const char* const forced = std::getenv("TNT_KERNELS_CUDA_CLUSTER");
  const int only = forced ? std::atoi(forced) : 0;
  const int whole = properties.shared_per_multiprocessor, reserved = properties.shared_reserved;
  const int three = whole / 3 - reserved, two = whole / 2 - reserved, one = properties.shared_per_block;
  // Measured on an H100: three blocks on a multiprocessor hide each other's waiting, and fewer clusters of 16 than of 8
  // find room. One row on 8 blocks with a multiprocessor each comes last.
  const std::pair<int, int> order[] = {{1, three}, {2, three}, {4, three},  {8, three}, {1, two}, {2, two},
                                       {4, two},   {8, two},   {16, three}, {16, two},  {8, one}, {16, one}};
  for (const auto& [cluster, limit] : order) {
    if (cluster > properties.largest_cluster || (only > 0 && cluster != only)) continue;
    // Any row may begin up to 15 bytes behind a boundary. Slices of whole lines: 128 bytes of 16-bit numbers.
    const int64_t slice = (vocab + Stored<Logit>::GROUP - 1 + cluster - 1) / cluster;
    plan.slice = int((slice + 63) / 64 * 64);
    plan.shared_bytes = kl_shared_bytes(plan.slice, cluster, sizeof(Logit));
    if (plan.slice > KL_STEPS * KlBlock<Logit, Gradient, STATS>::STEP || plan.shared_bytes > limit) continue;
    if (device::active_clusters(kernel, cluster, device::KL_THREADS, plan.shared_bytes) < 1) continue;
    plan.cluster = cluster;
    break;
  }
  if (plan.cluster == 0) return plan;
  plan.left = choose<Logit, Gradient>(vocab, device, false);
  device::active_clusters(left_rows_kernel<Logit, Gradient>, plan.left.cluster, device::STREAM_THREADS,
                          plan.left.shared_bytes);  // lets it use the memory
  plan.left_blocks = std::max(1, 2 * properties.multiprocessors / plan.left.cluster) * plan.left.cluster;
  return plan;
}

using PlanKey = std::tuple<int64_t, int, DType, DType, bool>;
std::map<PlanKey, Plan> known_plans;
std::map<PlanKey, KlPlan> known_kl_plans;
std::mutex known_plans_mutex;

// Asking the runtime costs more than a launch. A shard's passes are launches of their own: nothing stays on chip.
template <class Logit, class Gradient>
Plan plan_for(const RowParams& p, int device) {
  const bool on_chip = !p.statistics && !p.gathered;
  const std::lock_guard<std::mutex> lock(known_plans_mutex);
  const PlanKey key(p.vocab, device, p.dtype, p.grad_dtype, on_chip);
  auto at = known_plans.find(key);
  if (at == known_plans.end()) at = known_plans.emplace(key, choose<Logit, Gradient>(p.vocab, device, on_chip)).first;
  return at->second;
}

template <class Logit, class Gradient, bool STATS>
KlPlan kl_plan_for(const RowParams& p, int device) {
  const std::lock_guard<std::mutex> lock(known_plans_mutex);
  const PlanKey key(p.vocab, device, p.dtype, p.grad_dtype, STATS);
  auto at = known_kl_plans.find(key);
  if (at == known_kl_plans.end())
    at = known_kl_plans.emplace(key, choose_kl<Logit, Gradient, STATS>(p.vocab, device)).first;
  return at->second;
}

// What kl_kernel computes: loss and gradient of whole rows, at once, by KLs, LL and UL. All tensors of a row begin
// equally far behind a 16-byte boundary of logits.
template <class Logit>
bool is_kl_call(const RowParams& p) {
  const auto kl = [](int loss) { return loss == FORWARD_KL || loss == REVERSE_KL; };
  if (!kl(p.positive_loss) && p.positive_loss != LOG_LIKELIHOOD) return false;
  if (!kl(p.negative_loss) && p.negative_loss != UNLIKELIHOOD) return false;
  if (p.uniform_smoothing && p.eps > 0) return false;
  if (p.statistics || p.gathered || p.coefficients || p.upstream) return false;
  constexpr int GROUP = Stored<Logit>::GROUP;
  const auto begin = [](const void* at, int64_t stride) {
    return std::make_pair(reinterpret_cast<uintptr_t>(at) % 16, (stride % GROUP + GROUP) % GROUP);
  };
  return !p.ref_logits || begin(p.ref_logits, p.ref_logits_stride) == begin(p.logits, p.logits_stride);
}

template <class Logit, class Gradient = Logit>
void load_rows(int device) {
  if (device::properties(device).clusters) {
    device::load(row_kernel<Logit, Gradient, true>);
    device::load(kl_kernel<Logit, Gradient, false>);
    device::load(kl_kernel<Logit, Gradient, true>);
    device::load(left_rows_kernel<Logit, Gradient>);
  }
  device::load(row_kernel<Logit, Gradient, false>);
}

template <class Logit, class Gradient = Logit>
void run(const RowParams& p, const CudaCall& call) {
  // Statistics need no normaliser, and coefficients have it in them.
  const bool mean = p.reduction == Reduction::MEAN && !p.statistics && !(p.upstream && p.coefficients);
  KlPlan kl;
  if (p.rows > 0 && is_kl_call<Logit>(p))
    kl = p.row_stats ? kl_plan_for<Logit, Gradient, true>(p, call.device)
                     : kl_plan_for<Logit, Gradient, false>(p, call.device);
  int* const left = kl.cluster > 0 ? reinterpret_cast<int*>(call.workspace + 1 + p.rows) : nullptr;
  double* const inverse = mean ? call.workspace : nullptr;
  double* const losses = call.workspace ? call.workspace + 1 : nullptr;
  if (mean || left) device::launch(normalizer_kernel, 1, 1, SUM_THREADS, SUM_BYTES, call.stream, p, inverse, left);
  if (kl.cluster > 0) {
    const KlLaunch launch{kl.slice, inverse, losses, left};
    device::launch(p.row_stats ? kl_kernel<Logit, Gradient, true> : kl_kernel<Logit, Gradient, false>,
                   p.rows * kl.cluster, kl.cluster, device::KL_THREADS, kl.shared_bytes, call.stream, p, launch);
    RowLaunch rest = kl.left.launch;
    rest.inverse_normalizer = inverse;
    rest.losses = losses;
    const int64_t blocks = std::min<int64_t>(kl.left_blocks, p.rows * kl.left.cluster);
    device::launch(left_rows_kernel<Logit, Gradient>, blocks, kl.left.cluster, device::STREAM_THREADS,
                   kl.left.shared_bytes, call.stream, p, rest, static_cast<const int*>(left));
  } else if (p.rows > 0) {
    Plan plan = plan_for<Logit, Gradient>(p, call.device);
    plan.launch.inverse_normalizer = inverse;
    plan.launch.losses = losses;
    device::launch(plan.on_chip ? row_kernel<Logit, Gradient, true> : row_kernel<Logit, Gradient, false>,
                   p.rows * plan.cluster, plan.cluster, plan.on_chip ? device::ROW_THREADS : device::STREAM_THREADS,
                   plan.shared_bytes, call.stream, p, plan.launch);
  }
  if (p.loss && p.reduction != Reduction::NONE)
    device::launch(loss_kernel, 1, 1, SUM_THREADS, SUM_BYTES, call.stream, static_cast<const double*>(losses), p.rows,
                   static_cast<const double*>(inverse), static_cast<float*>(p.loss));
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

[[noreturn]] void unsupported() { throw std::runtime_error("logits: float64 is not served on CUDA"); }

}  // namespace
}  // namespace TNT_ISA

void run_rows_cuda(const RowParams& p, const CudaCall& call) {
  const device::Guard guard(call.device);
  switch (p.dtype) {
    case DType::FLOAT32: return p.grad_dtype == DType::BFLOAT16 ? run<float, BFloat16>(p, call) : run<float>(p, call);
    case DType::BFLOAT16: return run<BFloat16>(p, call);
    case DType::FLOAT16: return run<Float16>(p, call);
    case DType::FLOAT64: unsupported();
  }
}

void scale_rows_cuda(DType dtype, void* x, int64_t rows, int64_t columns, int64_t stride, const void* factor,
                     int device, void* stream) {
  const device::Guard guard(device);
  switch (dtype) {
    case DType::FLOAT32: return scale<float>(x, rows, columns, stride, factor, device, stream);
    case DType::BFLOAT16: return scale<BFloat16>(x, rows, columns, stride, factor, device, stream);
    case DType::FLOAT16: return scale<Float16>(x, rows, columns, stride, factor, device, stream);
    case DType::FLOAT64: unsupported();
  }
}

std::string why_not_cuda(int device) {
  try {
    const device::Guard guard(device);
    load_rows<float>(device);
    load_rows<float, BFloat16>(device);
    load_rows<BFloat16>(device);
    load_rows<Float16>(device);
    device::load(normalizer_kernel);
    device::load(loss_kernel);
    device::load(scale_kernel<float>);
    device::load(scale_kernel<BFloat16>);
    device::load(scale_kernel<Float16>);
    return "";
  } catch (const std::runtime_error& error) {
    return error.what();
  }
}

void forget_plans() {
  const std::lock_guard<std::mutex> lock(known_plans_mutex);
  known_plans.clear();
  known_kl_plans.clear();
}

}  // namespace tnt
