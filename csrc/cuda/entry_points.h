// The CUDA backend's entry points. Streams are cudaStream_t, devices CUDA ordinals; errors are std::runtime_error.
#pragma once

#include <cstdint>
#include <string>

#include "call.h"

namespace tnt {

struct CudaPlace {  // where a launch runs
  int device;
  void* stream;
  // (2 + N + N / 2) doubles on the device: 1 / normaliser, the rows' weighted losses, and as 1 + N ints how many rows
  // kl_kernel leaves to another kernel, and which.
  double* workspace;
};

void run_rows_cuda(const RowCall&, const CudaPlace&);

// How kl_kernel computes rows of a vocabulary: blocks a row, threads and bytes of shared memory a block, rows at a
// time.
struct CudaPlan {
  int blocks = 0;  // 0: it does not
  int threads = 0, shared_bytes = 0;
  int64_t rows = 0;
};
// `pair`: the reference is read, too. Rows begin at 16-byte boundaries, and no diagnostics are wanted.
CudaPlan plan_cuda(DType, int64_t vocab, bool pair, int device);

// The rows of one dtype of logits and gradient.
struct CudaRows {
  DType logits_dtype, gradient_dtype;
  void (*run)(const RowCall&, const CudaPlace&);
  void (*load)(int device);
  CudaPlan (*plan)(int64_t vocab, bool pair, int device);
  void (*forget)();
};
extern const CudaRows cuda_rows_float32, cuda_rows_float32_bfloat16, cuda_rows_bfloat16, cuda_rows_float16;

// What is launched around the rows: before them 1 / normaliser, which is returned (null: 1), and an empty list of
// rows that are left, unless that is null; after them the sum of the losses.
const double* prepare_rows(const RowCall&, const CudaPlace&, int* left);
void finish_rows(const RowCall&, const CudaPlace&, const double* inverse_normalizer);

// Multiplies (rows, columns) of dtype by the number at `factor` (float, on the device), and returns at once where that
// is 1.
void scale_rows_cuda(DType, void* x, int64_t rows, int64_t columns, int64_t stride, const void* factor, int device,
                     void* stream);

// Why the kernels fail on a device; empty where they do not. Loads the kernels, so that a graph capture need not.
std::string why_not_cuda(int device);

// Of the launches per vocabulary and device, in case they are to be chosen anew: by a measurement, by the tests' model.
void forget_plans();

}  // namespace tnt
