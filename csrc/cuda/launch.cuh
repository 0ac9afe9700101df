// What the launcher asks of the CUDA runtime, with its errors as exceptions. The runtime is linked statically and
// shares torch's contexts and streams, but has a current device of its own.
#pragma once

#if !defined(TNT_CUDA_SHIM)

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace tnt {
namespace device {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next caller would be told of it
  throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(error));
}

class Guard {  // the device of a call, then the one that was before
 public:
  explicit Guard(int device) {
    check(cudaGetDevice(&before_), "no device");
    if (device != before_) check(cudaSetDevice(device), "cannot select the device");
    changed_ = device != before_;
  }
  ~Guard() {
    if (changed_) cudaSetDevice(before_);
  }
  Guard(const Guard&) = delete;
  Guard& operator=(const Guard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

struct Properties {
  int capability, multiprocessors, shared_per_block, shared_per_multiprocessor, shared_reserved, largest_cluster;
  int64_t l2_bytes;
  bool clusters;
};

inline Properties properties(int device) {
  const auto ask = [&](cudaDeviceAttr attribute) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, device), "cannot read the device's attributes");
    return value;
  };
  Properties p{};
  p.capability = 10 * ask(cudaDevAttrComputeCapabilityMajor) + ask(cudaDevAttrComputeCapabilityMinor);
  p.multiprocessors = ask(cudaDevAttrMultiProcessorCount);
  p.shared_per_block = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  p.shared_per_multiprocessor = ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  p.shared_reserved = ask(cudaDevAttrReservedSharedMemoryPerBlock);
  p.l2_bytes = ask(cudaDevAttrL2CacheSize);
  p.clusters = p.capability >= 90 && ask(cudaDevAttrClusterLaunch) != 0;
  p.largest_cluster = 16;
  return p;
}

template <class... Parameters>
cudaFuncAttributes load(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), "cannot load a kernel");
  return attributes;
}

// __CUDA_ARCH__ / 10 of what the device runs, which may be less than its capability: a driver that compiles the PTX of
// an older architecture leaves all of its #if as they were. (binaryVersion is what the driver compiled it for.)
template <class... Parameters>
int architecture(void (*kernel)(Parameters...)) {
  return load(kernel).ptxVersion;
}

struct Shape {  // of a launch
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute{};
  Shape(int64_t blocks, int cluster, int threads, int shared_bytes, void* stream) {
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    if (cluster > 1) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
      config.attrs = &attribute;
      config.numAttrs = 1;
    }
  }
  Shape(const Shape&) = delete;
  Shape& operator=(const Shape&) = delete;
};

// How many clusters (or blocks) of this shape the device holds; 0: it cannot run one. Lets the kernel use the memory.
template <class... Parameters>
int active_clusters(void (*kernel)(Parameters...), int cluster, int threads, int shared_bytes) {
  if (shared_bytes > load(kernel).maxDynamicSharedSizeBytes)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
          "cannot raise a kernel's shared memory");
  int count = 0;
  if (cluster == 1) {
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, threads, static_cast<size_t>(shared_bytes)),
          "cannot ask for the occupancy");
    return count;
  }
  if (cluster > 8 && cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  const Shape shape(cluster, cluster, threads, shared_bytes, nullptr);
  if (cudaOccupancyMaxActiveClusters(&count, kernel, &shape.config) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

// As much of a multiprocessor's memory as can be shared, so that as many blocks find room as were counted.
template <class... Parameters>
void prefer_shared_memory(void (*kernel)(Parameters...)) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        "cannot prefer shared memory");
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int cluster, int threads, int shared_bytes, void* stream,
            Arguments... arguments) {
  if (blocks > 0x7fffffff) throw std::runtime_error("logits: too many rows for one launch");
  const Shape shape(blocks, cluster, threads, shared_bytes, stream);
  check(cudaLaunchKernelEx(&shape.config, kernel, static_cast<Parameters>(arguments)...), "launch failed");
}

}  // namespace device
}  // namespace tnt

#endif
