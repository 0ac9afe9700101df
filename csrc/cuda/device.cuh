// What the CUDA kernels ask of the hardware: barriers, shuffles, the blocks of a cluster and their shared memory, bulk
// copies, 16-byte accesses. Nothing here knows what a row is. The tests put a host model of these functions in their
// place (tests/cuda_shim), so the kernels call nothing of CUDA but what stands here.
#pragma once

#if defined(TNT_CUDA_SHIM)
#include "cuda_shim.h"
#else

#include <cuda_runtime.h>

#include <cstdint>

// A function that is called, as its code is too long to stand in every place.
#define TNT_CALLED inline __device__ __noinline__

namespace tnt {
namespace device {

constexpr int WARP = 32;
constexpr int KL_THREADS = 256;      // of a block of kl_kernel.cuh: three of them share a multiprocessor
constexpr int STREAM_THREADS = 256;  // of one of stream_kernel.cuh: two
constexpr int SUM_THREADS = 512;     // of one that sums over all rows

struct alignas(16) Vector {
  uint32_t words[4];
};

__device__ __forceinline__ int thread_index() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int64_t block_index() { return blockIdx.x; }
__device__ __forceinline__ int64_t grid_size() { return gridDim.x; }
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

__device__ __forceinline__ void sync_block() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
__device__ __forceinline__ float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
__device__ __forceinline__ int shuffle_xor(int x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
__device__ __forceinline__ double shuffle_xor(double x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
__device__ __forceinline__ uint32_t shuffle_up(uint32_t x) { return __shfl_up_sync(0xffffffffu, x, 1); }
__device__ __forceinline__ bool any_of_warp(bool x) { return __any_sync(0xffffffffu, x); }
__device__ __forceinline__ bool all_of_warp(bool x) { return __all_sync(0xffffffffu, x); }
__device__ __forceinline__ int max_of_warp(int x) { return __reduce_max_sync(0xffffffffu, x); }
__device__ __forceinline__ int atomic_add(int* at, int by) { return atomicAdd(at, by); }
__device__ __forceinline__ uint32_t atomic_or(uint32_t* at, uint32_t bits) { return atomicOr(at, bits); }
__device__ __forceinline__ int lowest_bit(uint32_t bits) { return __ffs(static_cast<int>(bits)) - 1; }
__device__ __forceinline__ int count_bits(uint32_t bits) { return __popc(bits); }

// ---- elementary operations

// 2^x by one instruction: to 2 ulp, 0 below 2^-126, infinity from 2^128.
__device__ __forceinline__ float power(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float half_to_float(uint32_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(static_cast<uint16_t>(bits)));
  return x;
}
__device__ __forceinline__ uint32_t floats_to_halves(float low, float high) {
  uint16_t a, b;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(a) : "f"(low));
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(b) : "f"(high));
  return a | static_cast<uint32_t>(b) << 16;
}
__device__ __forceinline__ uint32_t floats_to_bfloats(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
__device__ __forceinline__ uint32_t funnel_right(uint32_t low, uint32_t high, int bits) {
  return __funnelshift_r(low, high, bits);
}

// ---- memory

__device__ __forceinline__ Vector load_vector(const void* from) {
  const uint4 x = *static_cast<const uint4*>(from);
  return {{x.x, x.y, x.z, x.w}};
}
// A gradient is not read again soon: it should not push logits out of the L2 cache.
__device__ __forceinline__ void store_vector(void* to, const Vector& x) {
  __stcs(static_cast<uint4*>(to), make_uint4(x.words[0], x.words[1], x.words[2], x.words[3]));
}
__device__ __forceinline__ void store_half_vector(void* to, uint32_t low, uint32_t high) {
  __stcs(static_cast<uint2*>(to), make_uint2(low, high));
}

// ---- clusters. Without them (before sm_90) a block is a cluster of its own.

__device__ __forceinline__ int cluster_size() {
#if __CUDA_ARCH__ >= 900
  uint32_t n;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(n));
  return static_cast<int>(n);
#else
  return 1;
#endif
}
__device__ __forceinline__ int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctaid.x;" : "=r"(rank));
  return static_cast<int>(rank);
#else
  return 0;
#endif
}
__device__ __forceinline__ int cluster_index() {  // in the grid
#if __CUDA_ARCH__ >= 900
  uint32_t index;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(index));
  return static_cast<int>(index);
#else
  return static_cast<int>(blockIdx.x);
#endif
}
// Of all threads of the cluster, shared memory of all its blocks included.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
// The same, but what was written before is not promised to the others; a barrier that was initialised is, by
// arrival_fence.
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// Writes into the shared memory of block `rank`, at the place that `to` has in this block's.
__device__ __forceinline__ void store_remote(float* to, int rank, float x) {
#if __CUDA_ARCH__ >= 900
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
#else
  *to = x;
#endif
}

// ---- bulk copies from global to shared memory, and the barrier on which their bytes arrive. One phase each.

__device__ __forceinline__ void arrival_init(uint64_t* barrier, int arrivals) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(barrier))),
      "r"(arrivals)
      : "memory");
#endif
}
// After the last arrival_init, before copies may complete on them.
__device__ __forceinline__ void arrival_fence() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
__device__ __forceinline__ void arrival_expect(uint64_t* barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(barrier))),
               "r"(bytes)
               : "memory");
#endif
}
__device__ __forceinline__ void arrival_wait(uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "TRY_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n"
      "@!done bra TRY_%=;\n"
      "}\n" ::"r"(address)
      : "memory");
#endif
}
// Of the phase with this parity, whose bytes other blocks of the cluster have sent.
__device__ __forceinline__ void arrival_wait_cluster(uint64_t* barrier, int parity) {
#if __CUDA_ARCH__ >= 900
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
  uint32_t done = 0;
  while (!done)
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(done)
        : "r"(address), "r"(parity)
        : "memory");
#endif
}
// 16 bytes into the shared memory of block `rank`, at the place that `to` has in this block's; they count as bytes of
// that block's `barrier`.
__device__ __forceinline__ void send(void* to, const Vector& x, uint64_t* barrier, int rank) {
#if __CUDA_ARCH__ >= 900
  uint32_t address, counter;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(counter)
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(barrier))), "r"(rank));
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(address),
      "r"(x.words[0]), "r"(x.words[1]), "r"(x.words[2]), "r"(x.words[3]), "r"(counter)
      : "memory");
#endif
}
// Both addresses and the size are multiples of 16. The lines are not wanted in L2 afterwards.
__device__ __forceinline__ void bulk_copy(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(static_cast<uint32_t>(__cvta_generic_to_shared(barrier))),
      "l"(policy)
      : "memory");
#endif
}

}  // namespace device
}  // namespace tnt

#endif
