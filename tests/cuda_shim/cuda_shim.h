// A host model of csrc/cuda/device.cuh and csrc/cuda/launch.cuh: the CUDA kernels compiled as C++ and run on a CPU, a
// fiber for every thread. A cluster runs at a time. A fiber runs until it waits: for a barrier, a shuffle or a copy;
// who runs next depends on the schedule. Shared memory starts as NaN and ends at a page that may not be touched, and is
// taken away when its block has left. Bulk copies and messages to other blocks complete when nobody can go on without
// them, the first or the last one first, or (shuffled) any of them at any time, while some warp rests as long as others
// can run; until then their destinations hold NaN. If nobody can go on at all, a barrier is met by threads of different
// minds, or a block leaves while something is on its way to it, that is an error.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __launch_bounds__(...)
#define TNT_CALLED inline __attribute__((noinline))

namespace tnt {
namespace device {

constexpr int WARP = 32;
constexpr int KL_THREADS = 96;
constexpr int STREAM_THREADS = 96;
constexpr int SUM_THREADS = 96;

struct alignas(16) Vector {
  uint32_t words[4];
};

namespace model {

// What a fiber asks for when it gives up the processor; the scheduler in cuda_shim.cpp answers.
enum class Barrier { WARP, BLOCK, CLUSTER };
int thread();
int64_t block();
int64_t blocks();
char* shared();
int cluster();
int rank();
void meet(Barrier which, bool arrive, bool wait);
uint32_t exchange(uint32_t x, int from_lane);
void write_remote(float* to, int rank, float x);
void barrier_init(uint64_t* at, int count);
void barrier_expect(uint64_t* at, uint32_t bytes);
void barrier_wait(uint64_t* at, int parity);
void await_messages(uint64_t* at, int parity);
void send(void* to, const Vector& x, uint64_t* barrier, int rank);
void copy(void* to, const void* from, uint32_t bytes, uint64_t* barrier);
void run(const std::function<void()>& kernel, int64_t blocks, int cluster, int threads, int shared_bytes);

// The device that the launcher sees.
struct Machine {
  bool clusters;
  int largest_cluster, shared_per_block;
  int architecture;  // that the kernels were compiled for: before 90 they know of no clusters, and of no bulk copies
};
extern Machine machine;

// What the tests break to see whether the model notices.
enum class Mutation {
  NONE,
  DROPPED_BARRIER,
  WRONG_SHUFFLE,
  DROPPED_CLUSTER_BARRIER,
  UNAWAITED_COPY,
  EARLY_EXIT,
  LOST_MESSAGE,    // the first one to the last block
  STUCK_EXCHANGE,  // all messages count on, and all wait for, the barrier of the first exchange
  UNAWAITED_MESSAGE,
  EARLY_LEAVE,   // the last block, instead of waiting for messages
  SHORT_EXPECT,  // of an exchange: a message too few
};
extern Mutation mutation;

}  // namespace model

inline int thread_index() { return model::thread(); }
inline int64_t block_index() { return model::block(); }
inline int64_t grid_size() { return model::blocks(); }
inline char* shared_memory() { return model::shared(); }

inline void sync_block() {
  if (model::mutation == model::Mutation::DROPPED_BARRIER) return;
  model::meet(model::Barrier::BLOCK, true, true);
}

template <class T>
T exchange(T x, int from_lane) {
  static_assert(sizeof(T) % 4 == 0);
  uint32_t words[sizeof(T) / 4];
  memcpy(words, &x, sizeof x);
  for (uint32_t& word : words) word = model::exchange(word, from_lane);
  memcpy(&x, words, sizeof x);
  return x;
}
template <class T>
T shuffle_xor(T x, int mask) {
  if (model::mutation == model::Mutation::WRONG_SHUFFLE && mask == 4) mask = 2;
  return exchange(x, thread_index() % WARP ^ mask);
}
inline uint32_t shuffle_up(uint32_t x) {
  const int lane = thread_index() % WARP;
  return exchange(x, lane > 0 ? lane - 1 : lane);
}
inline void sync_warp() { shuffle_xor(0.0f, 1); }
inline bool any_of_warp(bool x) {
  uint32_t any = x;
  for (int mask = 16; mask > 0; mask >>= 1) any |= shuffle_xor(any, mask);
  return any != 0;
}
inline bool all_of_warp(bool x) { return !any_of_warp(!x); }
inline int max_of_warp(int x) {
  for (int mask = 16; mask > 0; mask >>= 1) x = std::max(x, shuffle_xor(x, mask));
  return x;
}
inline int atomic_add(int* at, int by) {
  const int before = *at;
  *at += by;
  return before;
}
inline uint32_t atomic_or(uint32_t* at, uint32_t bits) {
  const uint32_t before = *at;
  *at |= bits;
  return before;
}
inline int lowest_bit(uint32_t bits) { return __builtin_ctz(bits); }
inline int count_bits(uint32_t bits) { return __builtin_popcount(bits); }

// The hardware's 2^x is off by up to 2 ulp, for an argument always by as many; and its results are never subnormal.
inline float power(float x) {
  const float y = exp2f(x);
  if (!(y >= 0x1p-126f)) return y != y ? y : 0.0f;
  if (!(y < INFINITY) || y == 1.0f) return y;
  uint32_t noise;
  memcpy(&noise, &x, sizeof noise);
  noise = (noise ^ noise >> 15) * 0x2c1b3c6du;
  uint32_t bits;
  memcpy(&bits, &y, sizeof bits);
  bits += (noise >> 16) % 5 - 2;
  float off;
  memcpy(&off, &bits, sizeof off);
  return off;
}
inline float half_to_float(uint32_t bits) {
  const uint16_t half = static_cast<uint16_t>(bits);
  _Float16 x;
  memcpy(&x, &half, sizeof x);
  return static_cast<float>(x);
}
inline uint32_t floats_to_halves(float low, float high) {
  const _Float16 x[2] = {static_cast<_Float16>(low), static_cast<_Float16>(high)};
  uint32_t both;
  memcpy(&both, x, sizeof both);
  return both;
}
inline uint32_t float_to_bfloat(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline uint32_t floats_to_bfloats(float low, float high) { return float_to_bfloat(low) | float_to_bfloat(high) << 16; }
inline uint32_t funnel_right(uint32_t low, uint32_t high, int bits) {
  return static_cast<uint32_t>((uint64_t(high) << 32 | low) >> bits);
}

inline void aligned(const void* at, int bytes = 16) {
  if (reinterpret_cast<uintptr_t>(at) % bytes) throw std::runtime_error("a vector at a misaligned address");
}
inline Vector load_vector(const void* from) {
  aligned(from);
  Vector x;
  memcpy(&x, from, sizeof x);
  return x;
}
inline void store_vector(void* to, const Vector& x) {
  aligned(to);
  memcpy(to, &x, sizeof x);
}
inline void store_half_vector(void* to, uint32_t low, uint32_t high) {
  aligned(to, 8);
  memcpy(to, &low, sizeof low);
  memcpy(static_cast<char*>(to) + sizeof low, &high, sizeof high);
}

inline int cluster_size() { return model::cluster(); }
inline int cluster_index() { return static_cast<int>(model::block() / model::cluster()); }
inline int cluster_rank() { return model::rank(); }
inline void cluster_arrive() { model::meet(model::Barrier::CLUSTER, true, false); }
inline void cluster_arrive_relaxed() { cluster_arrive(); }
inline void cluster_wait() { model::meet(model::Barrier::CLUSTER, false, true); }
inline void store_remote(float* to, int rank, float x) { model::write_remote(to, rank, x); }

inline void arrival_init(uint64_t* barrier, int arrivals) {
  if (model::machine.architecture < 90) throw std::runtime_error("a kernel that was compiled without bulk copies");
  model::barrier_init(barrier, arrivals);
}
inline void arrival_fence() {}
inline void arrival_expect(uint64_t* barrier, uint32_t bytes) { model::barrier_expect(barrier, bytes); }
inline void arrival_wait(uint64_t* barrier) {
  if (model::mutation == model::Mutation::UNAWAITED_COPY) return;
  model::barrier_wait(barrier, 0);
}
inline void arrival_wait_cluster(uint64_t* barrier, int parity) { model::await_messages(barrier, parity); }
inline void send(void* to, const Vector& x, uint64_t* barrier, int rank) { model::send(to, x, barrier, rank); }
inline void bulk_copy(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  model::copy(to, from, bytes, barrier);
}

// ---- launch.cuh

struct Guard {
  explicit Guard(int) {}
};
struct Properties {
  int capability, multiprocessors, shared_per_block, shared_per_multiprocessor, shared_reserved, largest_cluster;
  int64_t l2_bytes;
  bool clusters;
};
inline Properties properties(int) {
  const model::Machine& m = model::machine;
  return {m.clusters ? 90 : 80, 8,       m.shared_per_block, 2 * m.shared_per_block, 0,
          m.largest_cluster,    1 << 16, m.clusters};
}
template <class... Parameters>
void load(void (*)(Parameters...)) {}
template <class... Parameters>
int architecture(void (*)(Parameters...)) {
  return model::machine.architecture;
}
template <class... Parameters>
int active_clusters(void (*)(Parameters...), int, int, int) {
  return 1;
}
template <class... Parameters>
void prefer_shared_memory(void (*)(Parameters...)) {}
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int cluster, int threads, int shared_bytes, void*,
            Arguments... arguments) {
  if (cluster > 1 && model::machine.architecture < 90)
    throw std::runtime_error("a cluster for a kernel that was compiled without");
  model::run([&] { kernel(static_cast<Parameters>(arguments)...); }, blocks, cluster, threads, shared_bytes);
}

}  // namespace device
}  // namespace tnt
