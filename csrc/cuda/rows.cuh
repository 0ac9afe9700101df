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
#include "cuda/stream_kernel.cuh"

namespace tnt {
inline namespace TNT_ISA {
namespace {

// A cluster a row, or a cluster one row after another of those that kl_kernel has left.
template <class Logit, class Gradient>
__global__ void __launch_bounds__(device::STREAM_THREADS, 2)
    stream_kernel(const __grid_constant__ RowCall p, const __grid_constant__ StreamLaunch launch) {
  const int64_t first = device::block_index() / device::cluster_size();
  if (!launch.left) return StreamBlock<Logit, Gradient>(p, launch, first).run();
  const int64_t step = device::grid_size() / device::cluster_size();
#pragma unroll 1
  for (int64_t i = first; i < launch.left[0]; i += step) {
    StreamBlock<Logit, Gradient>(p, launch, launch.left[1 + i]).run();
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

int64_t slice_of_blocks(int64_t vocab, int blocks) { return ((vocab + blocks - 1) / blocks + 31) / 32 * 32; }

struct StreamPlan {
  int cluster;
  StreamLaunch launch;
  int shared_bytes;
  int64_t clusters;  // that the device holds, about
};

template <class Logit, class Gradient>
StreamPlan choose_stream(int64_t vocab, int device) {
  const device::Properties properties = device::properties(device);
  const auto kernel = stream_kernel<Logit, Gradient>;
  // The rows in flight should fit half of the L2 cache, or the second pass finds nothing there: with clusters, fewer
  // rows are in flight. A kernel knows of clusters if it was compiled for them.
  const bool several = properties.clusters && device::architecture(kernel) >= 90;
  int cluster = 1;
  if (several)
    while (cluster < MAX_CLUSTER &&
           int64_t(properties.multiprocessors) / cluster * 2 * vocab * int64_t(sizeof(Logit)) * 2 >
               properties.l2_bytes / 2)
      cluster *= 2;
  for (; cluster <= MAX_CLUSTER; cluster *= 2) {
    StreamPlan plan{cluster, {}, 0, std::max(1, 2 * properties.multiprocessors / cluster)};
    plan.launch.slice = slice_of_blocks(vocab, cluster);
    plan.launch.mask_bytes = int((plan.launch.slice / 8 + 15) / 16 * 16);
    plan.shared_bytes = STREAM_HEADER + plan.launch.mask_bytes;
    if (plan.shared_bytes <= properties.shared_per_block &&
        device::active_clusters(kernel, cluster, device::STREAM_THREADS, plan.shared_bytes) > 0)
      return plan;
    if (!several) break;
  }
  throw std::runtime_error("logits: a vocabulary of " + std::to_string(vocab) + " is too large for this device");
}

// How kl_kernel is launched.
struct ClusterPlan {
  int cluster = 0;  // 0: it does not serve this vocabulary on this device
  KlLaunch launch;
  int shared_bytes;
  int64_t rows;  // that the device computes at a time
};

template <class Logit, class Gradient, bool DIAGNOSTICS>
ClusterPlan choose_kl(int64_t vocab, bool pair, bool aligned, int device) {
  const device::Properties properties = device::properties(device);
  const auto kernel = kl_kernel<Logit, Gradient, DIAGNOSTICS>;
  ClusterPlan plan;
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
  // What counts is how many rows are in flight, whose exchanges and loads hide behind each other, and how many warps.
  // (A cluster lies within one of the device's groups of multiprocessors: what is left over there stays empty.)
  int64_t most = 0;
  for (int cluster = 1; cluster <= properties.largest_cluster; ++cluster) {
    if (only > 0 && cluster != only) continue;
    ClusterPlan found;
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
    found.rows = cluster == 1 ? int64_t(active) * properties.multiprocessors : active;
    const int64_t blocks = found.rows * cluster;
    if (found.rows * blocks <= most) continue;
    most = found.rows * blocks;
    plan = found;
  }
  return plan;
}

using StreamKey = std::tuple<int64_t, int, DType, DType>;
using ClusterKey = std::tuple<int64_t, int, DType, DType, bool, bool, bool>;
std::map<StreamKey, StreamPlan> known_stream_plans;
std::map<ClusterKey, ClusterPlan> known_cluster_plans;
std::mutex known_plans_mutex;

// Asking the runtime costs more than a launch.
template <class Key, class Chosen, class Choose>
Chosen known(std::map<Key, Chosen>& plans, const Key& key, Choose choose) {
  const std::lock_guard<std::mutex> lock(known_plans_mutex);
  auto at = plans.find(key);
  if (at == plans.end()) at = plans.emplace(key, choose()).first;
  return at->second;
}

template <class Logit, class Gradient>
StreamPlan stream_plan_for(const RowCall& p, int device) {
  const StreamKey key(p.vocab, device, p.dtype, p.gradient_dtype);
  return known(known_stream_plans, key, [&] { return choose_stream<Logit, Gradient>(p.vocab, device); });
}

template <class Logit, class Gradient, bool DIAGNOSTICS>
ClusterPlan cluster_plan_for(const RowCall& p, int device) {
  const bool pair = is_kl(p.positive_loss) || is_kl(p.negative_loss) || p.differences;
  const bool aligned = reinterpret_cast<uintptr_t>(p.logits) % 16 == 0 && p.logits_stride % Stored<Logit>::GROUP == 0;
  const ClusterKey key(p.vocab, device, p.dtype, p.gradient_dtype, DIAGNOSTICS, pair, aligned);
  return known(known_cluster_plans, key,
               [&] { return choose_kl<Logit, Gradient, DIAGNOSTICS>(p.vocab, pair, aligned, device); });
}

// What kl_kernel computes: loss of whole rows, and their gradient or the plan of one that waits, by KLs, LL and UL.
// Both logits begin equally far behind a 16-byte boundary in every row.
template <class Logit>
bool is_kl_call(const RowCall& p) {
  if (!is_kl(p.positive_loss) && p.positive_loss != LOG_LIKELIHOOD) return false;
  if (!is_kl(p.negative_loss) && p.negative_loss != UNLIKELIHOOD) return false;
  if (smooths_uniformly(p) || p.kind != Kind::FUSED || (p.differences && !KL_TAKES_DIFFERENCES<Logit>)) return false;
  constexpr int GROUP = Stored<Logit>::GROUP;
  const auto begin = [](const void* at, int64_t stride) {
    return std::make_pair(reinterpret_cast<uintptr_t>(at) % 16, (stride % GROUP + GROUP) % GROUP);
  };
  return !p.ref_logits || begin(p.ref_logits, p.ref_logits_stride) == begin(p.logits, p.logits_stride);
}

template <class Logit, class Gradient>
void load_rows(int device) {
  if (device::properties(device).clusters) {
    device::load(kl_kernel<Logit, Gradient, false>);
    device::load(kl_kernel<Logit, Gradient, true>);
  }
  device::load(stream_kernel<Logit, Gradient>);
}

template <class Logit, class Gradient>
void run(const RowCall& p, const CudaPlace& place) {
  ClusterPlan kl;
  if (p.rows > 0 && is_kl_call<Logit>(p))
    kl = p.diagnostics ? cluster_plan_for<Logit, Gradient, true>(p, place.device)
                       : cluster_plan_for<Logit, Gradient, false>(p, place.device);
  int* const left = kl.cluster > 0 ? reinterpret_cast<int*>(place.workspace + 1 + p.rows) : nullptr;
  double* const losses = place.workspace ? place.workspace + 1 : nullptr;
  const double* const inverse = prepare_rows(p, place, left);
  const float inverse_t = float(1 / p.temperature);
  const Scales scales{exponent_scale<float>(double(inverse_t)), inverse_t};
  if (kl.cluster > 0) {
    kl.launch.scales = scales;
    kl.launch.inverse_normalizer = inverse;
    kl.launch.losses = losses;
    kl.launch.left = left;
    device::launch(p.diagnostics ? kl_kernel<Logit, Gradient, true> : kl_kernel<Logit, Gradient, false>,
                   p.rows * kl.cluster, kl.cluster, kl.launch.threads, kl.shared_bytes, place.stream, p, kl.launch);
  }
  if (p.rows > 0) {
    StreamPlan plan = stream_plan_for<Logit, Gradient>(p, place.device);
    plan.launch.scales = scales;
    plan.launch.inverse_normalizer = inverse;
    plan.launch.losses = losses;
    plan.launch.left = left;
    const int64_t clusters = left ? std::min(plan.clusters, p.rows) : p.rows;
    device::launch(stream_kernel<Logit, Gradient>, clusters * plan.cluster, plan.cluster, device::STREAM_THREADS,
                   plan.shared_bytes, place.stream, p, plan.launch);
  }
  finish_rows(p, place, inverse);
}

template <class Logit, class Gradient>
constexpr CudaRows cuda_rows() {
  return {Stored<Logit>::DTYPE,
          Stored<Gradient>::DTYPE,
          run<Logit, Gradient>,
          load_rows<Logit, Gradient>,
          [](int64_t vocab, bool pair, int device) -> CudaPlan {
            const ClusterPlan plan = choose_kl<Logit, Gradient, false>(vocab, pair, true, device);
            if (plan.cluster == 0) return {};
            return {plan.cluster, plan.launch.threads, plan.shared_bytes, plan.rows};
          },
          [] {
            const std::lock_guard<std::mutex> lock(known_plans_mutex);
            known_stream_plans.clear();
            known_cluster_plans.clear();
          }};
}

}  // namespace
}  // namespace TNT_ISA
}  // namespace tnt
