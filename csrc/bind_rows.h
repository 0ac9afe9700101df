// What the entry points of tnt_kernels._C have in common: RowParams from Python's arguments.
#pragma once

#include <pybind11/pybind11.h>

#include "params.h"

namespace tnt {

using Address = uintptr_t;  // 0 for what is absent

template <class T>
T* address(Address value) {
  return reinterpret_cast<T*>(value);
}

// Binds run(RowParams&, extra...), called without the GIL. Its arguments are RowParams, in this order
// (tnt_kernels/backends/native.py lists the same), then `extra`; sizes and strides count elements.
template <class... Extra>
void bind_rows(pybind11::module_& m, const char* name, void (*run)(RowParams&, Extra...)) {
  m.def(name, [run](int dtype, int64_t rows, int64_t vocab, int64_t vocab_offset, int64_t vocab_size, Address logits,
                    int64_t logits_stride, Address ref_logits, int64_t ref_logits_stride, Address labels,
                    Address weights, Address alpha, int64_t alpha_stride, double alpha_value, Address negative_ids,
                    int64_t negative_ids_stride, int64_t negative_ids_count, int positive_loss, int negative_loss,
                    bool uniform_smoothing, double eps, double nl_floor, double temperature, int64_t ignore_index,
                    int reduction, Address normalizer, bool has_normalizer, double normalizer_value, Address statistics,
                    Address gathered, int64_t gathered_stride, int64_t shards, Address parts, Address totals,
                    Address loss, Address row_stats, Address coefficients, Address grad, int64_t grad_stride,
                    int grad_dtype, Address upstream, int64_t upstream_stride, Extra... extra) {
    RowParams p{};
    p.dtype = static_cast<DType>(dtype);
    p.rows = rows;
    p.vocab = vocab;
    p.vocab_offset = vocab_offset;
    p.vocab_size = vocab_size;
    p.logits = address<const void>(logits);
    p.logits_stride = logits_stride;
    p.ref_logits = address<const void>(ref_logits);
    p.ref_logits_stride = ref_logits_stride;
    p.labels = address<const int64_t>(labels);
    p.weights = address<const void>(weights);
    p.alpha = address<const void>(alpha);
    p.alpha_stride = alpha_stride;
    p.alpha_value = alpha_value;
    p.negative_ids = address<const int64_t>(negative_ids);
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
    p.normalizer = address<const void>(normalizer);
    p.has_normalizer = has_normalizer;
    p.normalizer_value = normalizer_value;
    p.statistics = address<void>(statistics);
    p.gathered = address<const void>(gathered);
    p.gathered_stride = gathered_stride;
    p.shards = shards;
    p.parts = address<void>(parts);
    p.totals = address<const void>(totals);
    p.loss = address<void>(loss);
    p.row_stats = address<void>(row_stats);
    p.coefficients = address<void>(coefficients);
    p.grad = address<void>(grad);
    p.grad_stride = grad_stride;
    p.grad_dtype = static_cast<DType>(grad_dtype);
    p.upstream = address<const void>(upstream);
    p.upstream_stride = upstream_stride;
    pybind11::gil_scoped_release release;
    run(p, extra...);
  });
}

}  // namespace tnt
