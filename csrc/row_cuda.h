// The CUDA backend's entry points. Streams are cudaStream_t, devices CUDA ordinals; errors are std::runtime_error.
#pragma once

#include <cstdint>
#include <string>

#include "params.h"

namespace tnt {

struct CudaCall {
  int device;
  void* stream;
  double* workspace;  // (1 + N) doubles on the device: 1 / normaliser, then the rows' weighted losses
};

void run_rows_cuda(const RowParams&, const CudaCall&);

// Multiplies (rows, columns) of dtype by the number at `factor` (float, on the device), and returns at once where that
// is 1.
void scale_rows_cuda(DType, void* x, int64_t rows, int64_t columns, int64_t stride, const void* factor, int device,
                     void* stream);

// Why the kernels fail on a device; empty where they do not. Loads the kernels, so that a graph capture need not.
std::string why_not_cuda(int device);

// Of the launches per vocabulary and device, in case the device is not what it was: for the tests' model of one.
void forget_plans();

}  // namespace tnt
