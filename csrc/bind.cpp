// The Python module tnt_kernels._C: raw addresses in, no torch headers, the GIL released while rows are processed.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "params.h"
#ifdef TNT_HAVE_CUDA
#include "bind_cuda.h"
#endif

#ifndef TNT_VERSION
#define TNT_VERSION "unknown"
#endif

namespace tnt {
namespace baseline {
void run_rows(const RowParams&);
}
#ifdef TNT_HAVE_AVX2
namespace avx2 {
void run_rows(const RowParams&);
}
#endif
#ifdef TNT_HAVE_AVX512
namespace avx512 {
void run_rows(const RowParams&);
}
#endif

namespace {

namespace py = pybind11;

struct InstructionSet {
  const char* name;
  void (*run_rows)(const RowParams&);
};

std::vector<InstructionSet> supported() {  // best last
  std::vector<InstructionSet> sets{{"baseline", baseline::run_rows}};
#ifdef TNT_HAVE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets.push_back({"avx2", avx2::run_rows});
#endif
#ifdef TNT_HAVE_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    sets.push_back({"avx512", avx512::run_rows});
#endif
  return sets;
}

InstructionSet selected = supported().back();

void select_instruction_set(const std::string& name) {
  std::string known;
  for (const InstructionSet& set : supported()) {
    if (name == set.name) {
      selected = set;
      return;
    }
    known += std::string(known.empty() ? "" : ", ") + set.name;
  }
  throw std::invalid_argument("instruction set is '" + name + "', expected one of: " + known);
}

bool ignored(const RowParams& p, int64_t row) {
  if (p.labels[row] == p.ignore_index) return true;
  if (!p.weights) return false;
  return p.dtype == DType::FLOAT64 ? static_cast<const double*>(p.weights)[row] == 0
                                   : static_cast<const float*>(p.weights)[row] == 0;
}

// Before anything is written: every index that a kernel would follow lies inside the vocabulary.
void check_indices(const RowParams& p) {
  const std::string size = " (vocabulary size " + std::to_string(p.vocab_size) + ")";
  for (int64_t i = 0; i < p.rows; ++i)
    if ((p.labels[i] < 0 || p.labels[i] >= p.vocab_size) && !ignored(p, i))
      throw std::invalid_argument("labels: row " + std::to_string(i) + " has label " + std::to_string(p.labels[i]) +
                                  ", expected 0 <= label < V" + size + " or ignore_index (" +
                                  std::to_string(p.ignore_index) + ")");
  if (!p.negative_ids) return;
  const int64_t lists = p.negative_ids_stride == 0 ? std::min<int64_t>(p.rows, 1) : p.rows;
  for (int64_t i = 0; i < lists; ++i) {
    if (p.negative_ids_stride != 0 && ignored(p, i)) continue;
    const int64_t* ids = p.negative_ids + i * p.negative_ids_stride;
    for (int64_t k = 0; k < p.negative_ids_count; ++k)
      if (ids[k] < -1 || ids[k] >= p.vocab_size)
        throw std::invalid_argument("negative_ids: row " + std::to_string(i) + " has id " + std::to_string(ids[k]) +
                                    ", expected 0 <= id < V" + size + ", or -1 as padding");
  }
}

template <class T>
T* address(uintptr_t value) {
  return reinterpret_cast<T*>(value);
}

// Addresses are integers, 0 for what is absent; sizes and strides count elements. Grouped as RowParams is.
void run_rows(int dtype, int64_t rows, int64_t vocab, int64_t vocab_offset, int64_t vocab_size, uintptr_t logits,
              int64_t logits_stride, uintptr_t ref_logits, int64_t ref_logits_stride, uintptr_t labels,
              uintptr_t weights, uintptr_t alpha, int64_t alpha_stride, double alpha_value, uintptr_t negative_ids,
              int64_t negative_ids_stride, int64_t negative_ids_count, int positive_loss, int negative_loss,
              bool uniform_smoothing, double eps, double nl_floor, double temperature, int64_t ignore_index,
              int reduction, bool has_normalizer, double normalizer, uintptr_t statistics, uintptr_t gathered,
              int64_t gathered_stride, int64_t shards, uintptr_t parts, uintptr_t totals, uintptr_t loss,
              uintptr_t row_stats, uintptr_t coefficients, uintptr_t grad, int64_t grad_stride, uintptr_t upstream,
              int64_t upstream_stride, int threads) {
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
  p.has_normalizer = has_normalizer;
  p.normalizer = normalizer;
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
  p.upstream = address<const void>(upstream);
  p.upstream_stride = upstream_stride;
  p.threads = threads;

  py::gil_scoped_release release;
  if (!p.upstream && !p.gathered) check_indices(p);  // in a call's first launch
  selected.run_rows(p);
}

}  // namespace
}  // namespace tnt

PYBIND11_MODULE(_C, m) {
  using namespace tnt;
  m.def("run_rows", &tnt::run_rows);
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const InstructionSet& set : supported()) names.emplace_back(set.name);
    return names;
  });
  m.def("selected_instruction_set", [] { return std::string(selected.name); });
  m.def("select_instruction_set", &tnt::select_instruction_set);
#ifdef TNT_HAVE_CUDA
  tnt::bind_cuda(m);
#endif
#ifdef _OPENMP
  m.def("openmp", [] { return true; });
#else
  m.def("openmp", [] { return false; });
#endif
  m.attr("INTERFACE") = 2;  // raised with every change to run_rows' arguments: backends/cpu.py checks it
  m.attr("ROW_COEFFICIENTS") = ROW_COEFFICIENTS;
  m.attr("ROW_STATISTICS") = ROW_STATISTICS;
  m.attr("ROW_PARTS") = ROW_PARTS;
  m.attr("version") = TNT_VERSION;
#if defined(__VERSION__)
  m.attr("compiler") = __VERSION__;
#else
  m.attr("compiler") = "unknown";
#endif
}
