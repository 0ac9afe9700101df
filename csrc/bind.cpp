// The Python module tnt_kernels._C: no torch headers, and the GIL released while rows are processed, unless they are
// few.
#include "bind.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "row_rules.h"

#ifndef TNT_VERSION
#define TNT_VERSION "unknown"
#endif

namespace tnt {
namespace baseline {
void run_rows(const RowCall&, int threads);
}
#ifdef TNT_HAVE_AVX2
namespace avx2 {
void run_rows(const RowCall&, int threads);
}
#endif
#ifdef TNT_HAVE_AVX512
namespace avx512 {
void run_rows(const RowCall&, int threads);
}
#endif

namespace {

namespace py = pybind11;

struct InstructionSet {
  const char* name;
  void (*run_rows)(const RowCall&, int threads);
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

bool is_active_row(const RowCall& p, int64_t row) {
  return p.dtype == DType::FLOAT64 ? is_active<double>(p, row) : is_active<float>(p, row);
}

std::string expected(const RowCall& p) { return " (vocabulary size " + std::to_string(p.vocab_size) + ")"; }

// Before anything is written: every index that a kernel would follow lies inside the vocabulary.
void check_indices(const RowCall& p) {
  for (int64_t i = 0; i < p.rows; ++i)
    if ((p.labels[i] < 0 || p.labels[i] >= p.vocab_size) && is_active_row(p, i))
      throw std::invalid_argument("labels: row " + std::to_string(i) + " has label " + std::to_string(p.labels[i]) +
                                  ", expected 0 <= label < V" + expected(p) + " or ignore_index (" +
                                  std::to_string(p.ignore_index) + ")");
  if (!p.negative_ids) return;
  const int64_t lists = p.negative_ids_stride == 0 ? std::min<int64_t>(p.rows, 1) : p.rows;
  for (int64_t i = 0; i < lists; ++i) {
    if (p.negative_ids_stride != 0 && !is_active_row(p, i)) continue;
    const int64_t* ids = p.negative_ids + i * p.negative_ids_stride;
    for (int64_t k = 0; k < p.negative_ids_count; ++k)
      if (ids[k] < -1 || ids[k] >= p.vocab_size)
        throw std::invalid_argument("negative_ids: row " + std::to_string(i) + " has id " + std::to_string(ids[k]) +
                                    ", expected 0 <= id < V" + expected(p) + ", or -1 as padding");
  }
}

// To release the GIL takes as long as a thousand entries.
constexpr int64_t SMALL_CALL = 1024;
bool is_small(const RowCall& p) { return (p.rows + 1) * (p.vocab + p.negative_ids_count + 1) <= SMALL_CALL; }

void run_rows(py::handle call, int threads) {
  const RowCall p = read_call(call);
  std::optional<py::gil_scoped_release> released;
  if (!is_small(p)) released.emplace();
  if (is_first(p.kind)) check_indices(p);
  selected.run_rows(p, threads);
}

// tnt_kernels._rows.checks.are_usual
bool are_usual(py::handle logits_, py::handle ref_logits_, py::handle labels_, py::handle weights_, py::handle alpha,
               py::handle negative_ids, py::handle normalizer) {
  if (!PyFloat_CheckExact(alpha.ptr()) || !negative_ids.is_none() || !normalizer.is_none()) return false;
  try {
    const Tensor logits(logits_), ref_logits(ref_logits_), labels(labels_), weights(weights_);
    const auto is_dense = [](const Tensor& x, int dimensions) {
      const int last = dimensions - 1;
      return x.is_plain() && x.is_on_cpu() && x.dimensions() == dimensions &&
             (x.size(last) <= 1 || x.stride(last) == 1);
    };
    const auto fits = [&](const Tensor& x, int dimensions, int dtype) {
      return is_dense(x, dimensions) && x.dtype() == dtype && x.size(0) == logits.size(0) && !x.requires_grad();
    };
    const int dtype = logits.dtype();
    return is_dense(logits, 2) && logits.size(1) > 0 && dtype >= 0 && dtype <= static_cast<int>(DType::FLOAT16) &&
           (ref_logits.is_none() || (fits(ref_logits, 2, dtype) && ref_logits.size(1) == logits.size(1))) &&
           fits(labels, 1, Tensor::INT64) && (weights.is_none() || fits(weights, 1, static_cast<int>(DType::FLOAT32)));
  } catch (const py::error_already_set&) {  // not a tensor, or one without memory, as on the device "meta"
    return false;
  }
}

#define TNT_FIELD(type, name) #name,
#define TNT_RECORD(name) #name,
const std::vector<std::string> ROW_CALL_FIELDS{TNT_ROW_CALL(TNT_FIELD, TNT_RECORD)};
const std::vector<std::string> ROW_TENSORS_FIELDS{TNT_ROW_TENSORS(TNT_FIELD)};
const std::vector<std::string> SCALARS_FIELDS{TNT_SCALARS(TNT_FIELD)};
#undef TNT_FIELD
#undef TNT_RECORD

}  // namespace
}  // namespace tnt

PYBIND11_MODULE(_C, m) {
  using namespace tnt;
  m.def("run_rows", &tnt::run_rows);
  m.def("are_usual", &tnt::are_usual);
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
  // native.py checks these: the fields of a call, and a number that is raised when what a function takes or leaves
  // changes otherwise.
  m.attr("ROW_CALL_FIELDS") = py::cast(ROW_CALL_FIELDS);
  m.attr("ROW_TENSORS_FIELDS") = py::cast(ROW_TENSORS_FIELDS);
  m.attr("SCALARS_FIELDS") = py::cast(SCALARS_FIELDS);
  m.attr("INTERFACE") = 8;
  m.attr("ROW_COEFFICIENTS") = ROW_COEFFICIENTS;
  m.attr("ROW_STATISTICS") = ROW_STATISTICS;
  m.attr("ROW_PARTIAL_SUMS") = ROW_PARTIAL_SUMS;
  m.attr("ROW_DIAGNOSTICS") = ROW_DIAGNOSTICS;
  m.attr("version") = TNT_VERSION;
#if defined(__VERSION__)
  m.attr("compiler") = __VERSION__;
#else
  m.attr("compiler") = "unknown";
#endif
}
