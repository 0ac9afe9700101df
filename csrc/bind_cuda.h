// The CUDA entry points of tnt_kernels._C. The tests bind the kernels' host model with the same function.
#pragma once

#include <pybind11/pybind11.h>

#include "row_cuda.h"

namespace tnt {

// Addresses are integers, 0 for what is absent; sizes and strides count elements. Grouped as RowParams, then CudaCall.
inline void bind_cuda(pybind11::module_& m) {
  namespace py = pybind11;
  using Address = uintptr_t;
  m.def("run_rows_cuda",
        [](int dtype, int64_t rows, int64_t vocab, Address logits, int64_t logits_stride, Address ref_logits,
           int64_t ref_logits_stride, Address labels, Address weights, Address alpha, int64_t alpha_stride,
           double alpha_value, Address negative_ids, int64_t negative_ids_stride, int64_t negative_ids_count,
           int positive_loss, int negative_loss, bool uniform_smoothing, double eps, double nl_floor,
           double temperature, int64_t ignore_index, int reduction, bool has_normalizer, double normalizer,
           Address loss, Address row_stats, Address coefficients, Address grad, int64_t grad_stride, Address upstream,
           int64_t upstream_stride, int device, Address stream, Address normalizer_address, Address workspace) {
          const auto address = [](Address value) { return reinterpret_cast<void*>(value); };
          RowParams p{};
          p.dtype = static_cast<DType>(dtype);
          p.rows = rows;
          p.vocab = vocab;
          p.logits = address(logits);
          p.logits_stride = logits_stride;
          p.ref_logits = address(ref_logits);
          p.ref_logits_stride = ref_logits_stride;
          p.labels = static_cast<const int64_t*>(address(labels));
          p.weights = address(weights);
          p.alpha = address(alpha);
          p.alpha_stride = alpha_stride;
          p.alpha_value = alpha_value;
          p.negative_ids = static_cast<const int64_t*>(address(negative_ids));
          p.negative_ids_stride = negative_ids_stride;
          p.negative_ids_count = negative_ids_count;
          p.positive_loss = positive_loss;
          p.negative_loss = negative_loss;
          p.uniform_smoothing = uniform_smoothing;
          p.eps = eps;
          p.nl_floor = nl_floor;
          p.temperature = temperature;
          p.ignore_index = ignore_index;
          p.reduction = static_cast<Reduction>(reduction);
          p.has_normalizer = has_normalizer;
          p.normalizer = normalizer;
          p.loss = address(loss);
          p.row_stats = address(row_stats);
          p.coefficients = address(coefficients);
          p.grad = address(grad);
          p.grad_stride = grad_stride;
          p.upstream = address(upstream);
          p.upstream_stride = upstream_stride;
          const CudaCall call{device, address(stream), address(normalizer_address),
                              static_cast<double*>(address(workspace))};
          py::gil_scoped_release release;
          run_rows_cuda(p, call);
        });
  m.def("scale_rows_cuda", [](int dtype, Address x, int64_t rows, int64_t columns, int64_t stride, Address factor,
                              int device, Address stream) {
    py::gil_scoped_release release;
    scale_rows_cuda(static_cast<DType>(dtype), reinterpret_cast<void*>(x), rows, columns, stride,
                    reinterpret_cast<const void*>(factor), device, reinterpret_cast<void*>(stream));
  });
  m.def("why_not_cuda", &why_not_cuda);
}

}  // namespace tnt
