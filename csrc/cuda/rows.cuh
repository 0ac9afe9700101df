// The kernels for rows of one dtype, and how they are launched: which path, how many blocks a row gets. Each dtype is
// compiled by itself (float32.cu, bfloat16.cu, ...), so that compilers can work side by side.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/entry_points.h"
#include "cuda/kl_kernel.cuh"
#include "cuda/launch.cuh"
#include "cuda/row_kernel.cuh"

namespace tnt {
inline namespace TNT_ISA {
namespace {

template <class Logit, class Gradient, bool ON_CHIP>
__global__ void __launch_bounds__(ON_CHIP ? device::ROW_THREADS : device::STREAM_THREADS, ON_CHIP ? 2 : 1)
    row_kernel(const __grid_constant__ RowCall p, const __grid_constant__ RowLaunch launch) {
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
    left_rows_kernel(const __grid_constant__ RowCall p, const __grid_constant__ RowLaunch launch, const int* left) {
  const int64_t step = device::grid_size() / device::cluster_size();
#pragma unroll 1
  for (int64_t i = device::block_index() / device::cluster_size(); i < left[0]; i += step) {
    RowBlock<Logit, Gradient, false>(p, launch, left[1 + i]).run();
    device::sync_block();  // shared memory is written to again
    device::cluster_arrive();
    device::cluster_wait();
  }
}

template <class Logit, class Gradient, bool DIAGNOSTICS>
__global__ void __launch_bounds__(device::KL_THREADS, 3)
    kl_kernel(const __grid_constant__ RowCall p, const __grid_constant__ KlLaunch launch) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  KlBlock<Logit, Gradient, DIAGNOSTICS>(p, launch).run();
#endif
}

// ------------------------------------------------------------------------------------------------- which path, how

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
  KlLaunch launch;
  int shared_bytes;
  Plan left;
  int64_t left_blocks;
};

template <class Logit, class Gradient, bool DIAGNOSTICS>
KlPlan choose_kl(int64_t vocab, bool pair, bool aligned, int device) {
  const device::Properties properties = device::properties(device);
  const auto kernel = kl_kernel<Logit, Gradient, DIAGNOSTICS>;
  KlPlan plan;
  if (!properties.clusters || device::architecture(kernel) < 90) return plan;
  device::prefer_shared_memory(kernel);
  // For measurements: no other size of cluster than this, and so many threads of a block.
  const char* const forced = std::getenv("TNT_KERNELS_CUDA_CLUSTER");
  const char* const width = std::getenv("TNT_KERNELS_CUDA_THREADS");
  const int only = forced ? std::atoi(forced) : 0, only_threads = width ? std::atoi(width) : 0;
  if (width && (only_threads < 2 * device::WARP || only_threads > device::KL_THREADS || only_threads % device::WARP))
    throw std::runtime_error("TNT_KERNELS_CUDA_THREADS is " + std::string(width) +
                             ", expected a multiple of 32 from 64 to " + std::to_string(device::KL_THREADS));
  using Block = KlBlock<Logit, Gradient, DIAGNOSTICS>;
  // What counts is how many rows are in flight; of as many, more warps. (A cluster lies within one of the device's
  // groups of multiprocessors: what is left over there stays empty.)
  int64_t most_rows = 0, most_warps = 0;
  for (int cluster = 1; cluster <= properties.largest_cluster; ++cluster) {
    if (only > 0 && cluster != only) continue;
    KlPlan found;
    KlLaunch& launch = found.launch;
    launch.threads = only_threads ? only_threads : device::KL_THREADS;
    launch.steps = uint32_t((int64_t(1) << 32) / (launch.threads * Block::GROUP) + 1);
    const int64_t columns = vocab + (aligned ? 0 : Block::GROUP - 1);  // any row may begin behind a boundary
    launch.slice = int(((columns + cluster - 1) / cluster + KL_SLICE - 1) / KL_SLICE * KL_SLICE);
    launch.mask_bytes = Block::mask_bytes(launch.slice);
    found.cluster = cluster;
    found.shared_bytes = Block::shared_bytes(launch.slice, cluster, launch.threads, pair);
    if (launch.slice > KL_STEPS * launch.threads * Block::GROUP || found.shared_bytes > properties.shared_per_block)
      continue;
    const int active = device::active_clusters(kernel, cluster, launch.threads, found.shared_bytes);
    const int64_t rows = cluster == 1 ? int64_t(active) * properties.multiprocessors : active, warps = rows * cluster;
    if (rows < most_rows || (rows == most_rows && warps <= most_warps)) continue;
    most_rows = rows, most_warps = warps;
    plan = found;
  }
  if (plan.cluster == 0) return plan;
  plan.left = choose<Logit, Gradient>(vocab, device, false);
  device::active_clusters(left_rows_kernel<Logit, Gradient>, plan.left.cluster, device::STREAM_THREADS,
                          plan.left.shared_bytes);  // lets it use the memory
  plan.left_blocks = std::max(1, 2 * properties.multiprocessors / plan.left.cluster) * plan.left.cluster;
  return plan;
}

using PlanKey = std::tuple<int64_t, int, DType, DType, bool>;
using KlPlanKey = std::tuple<int64_t, int, DType, DType, bool, bool, bool>;
std::map<PlanKey, Plan> known_plans;
std::map<KlPlanKey, KlPlan> known_kl_plans;
std::mutex known_plans_mutex;

// Asking the runtime costs more than a launch.
template <class Key, class Chosen, class Choose>
Chosen known(std::map<Key, Chosen>& plans, const Key& key, Choose choose) {
  const std::lock_guard<std::mutex> lock(known_plans_mutex);
  auto at = plans.find(key);
  if (at == plans.end()) at = plans.emplace(key, choose()).first;
  return at->second;
}

// A shard's passes are launches of their own: nothing stays on chip.
template <class Logit, class Gradient>
Plan plan_for(const RowCall& p, int device) {
  const bool on_chip = !is_sharded(p.kind);
  const PlanKey key(p.vocab, device, p.dtype, p.gradient_dtype, on_chip);
  return known(known_plans, key, [&] { return choose<Logit, Gradient>(p.vocab, device, on_chip); });
}

template <class Logit, class Gradient, bool DIAGNOSTICS>
KlPlan kl_plan_for(const RowCall& p, int device) {
  const bool pair = is_kl(p.positive_loss) || is_kl(p.negative_loss);
  const bool aligned = reinterpret_cast<uintptr_t>(p.logits) % 16 == 0 && p.logits_stride % Stored<Logit>::GROUP == 0;
  const KlPlanKey key(p.vocab, device, p.dtype, p.gradient_dtype, DIAGNOSTICS, pair, aligned);
  return known(known_kl_plans, key,
               [&] { return choose_kl<Logit, Gradient, DIAGNOSTICS>(p.vocab, pair, aligned, device); });
}

// What kl_kernel computes: loss and gradient of whole rows, at once, by KLs, LL and UL. Both logits begin equally far
// behind a 16-byte boundary in every row.
template <class Logit>
bool is_kl_call(const RowCall& p) {
  if (!is_kl(p.positive_loss) && p.positive_loss != LOG_LIKELIHOOD) return false;
  if (!is_kl(p.negative_loss) && p.negative_loss != UNLIKELIHOOD) return false;
  if (smooths_uniformly(p) || p.kind != Kind::FUSED || p.coefficients) return false;
  constexpr int GROUP = Stored<Logit>::GROUP;
  const auto begin = [](const void* at, int64_t stride) {
    return std::make_pair(reinterpret_cast<uintptr_t>(at) % 16, (stride % GROUP + GROUP) % GROUP);
  };
  return !p.ref_logits || begin(p.ref_logits, p.ref_logits_stride) == begin(p.logits, p.logits_stride);
}

template <class Logit, class Gradient>
void load_rows(int device) {
  if (device::properties(device).clusters) {
    device::load(row_kernel<Logit, Gradient, true>);
    device::load(kl_kernel<Logit, Gradient, false>);
    device::load(kl_kernel<Logit, Gradient, true>);
    device::load(left_rows_kernel<Logit, Gradient>);
  }
  device::load(row_kernel<Logit, Gradient, false>);
}

template <class Logit, class Gradient>
void run(const RowCall& p, const CudaPlace& place) {
  KlPlan kl;
  if (p.rows > 0 && is_kl_call<Logit>(p))
    kl = p.diagnostics ? kl_plan_for<Logit, Gradient, true>(p, place.device)
                       : kl_plan_for<Logit, Gradient, false>(p, place.device);
  int* const left = kl.cluster > 0 ? reinterpret_cast<int*>(place.workspace + 1 + p.rows) : nullptr;
  double* const losses = place.workspace ? place.workspace + 1 : nullptr;
  const double* const inverse = prepare_rows(p, place, left);
  if (kl.cluster > 0) {
    kl.launch.inverse_temperature = float(1 / p.temperature);
    kl.launch.inverse_normalizer = inverse;
    kl.launch.losses = losses;
    kl.launch.left = left;
    device::launch(p.diagnostics ? kl_kernel<Logit, Gradient, true> : kl_kernel<Logit, Gradient, false>,
                   p.rows * kl.cluster, kl.cluster, kl.launch.threads, kl.shared_bytes, place.stream, p, kl.launch);
    RowLaunch rest = kl.left.launch;
    rest.inverse_normalizer = inverse;
    rest.losses = losses;
    const int64_t blocks = std::min<int64_t>(kl.left_blocks, p.rows * kl.left.cluster);
    device::launch(left_rows_kernel<Logit, Gradient>, blocks, kl.left.cluster, device::STREAM_THREADS,
                   kl.left.shared_bytes, place.stream, p, rest, static_cast<const int*>(left));
  } else if (p.rows > 0) {
    Plan plan = plan_for<Logit, Gradient>(p, place.device);
    plan.launch.inverse_normalizer = inverse;
    plan.launch.losses = losses;
    device::launch(plan.on_chip ? row_kernel<Logit, Gradient, true> : row_kernel<Logit, Gradient, false>,
                   p.rows * plan.cluster, plan.cluster, plan.on_chip ? device::ROW_THREADS : device::STREAM_THREADS,
                   plan.shared_bytes, place.stream, p, plan.launch);
  }
  finish_rows(p, place, inverse);
}

template <class Logit, class Gradient>
constexpr CudaRows cuda_rows() {
  return {Stored<Logit>::DTYPE, Stored<Gradient>::DTYPE, run<Logit, Gradient>, load_rows<Logit, Gradient>, [] {
            const std::lock_guard<std::mutex> lock(known_plans_mutex);
            known_plans.clear();
            known_kl_plans.clear();
          }};
}

}  // namespace
}  // namespace TNT_ISA
}  // namespace tnt
