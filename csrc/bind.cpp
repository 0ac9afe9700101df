// The Python module tnt_kernels._C: raw addresses in, no torch headers, the GIL released while rows are processed.
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind_rows.h"
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

void run_rows(RowParams& p, int threads) {
  p.threads = threads;
  if (!p.upstream && !p.gathered) check_indices(p);  // in a call's first launch
  selected.run_rows(p);
}

}  // namespace
}  // namespace tnt

PYBIND11_MODULE(_C, m) {
  using namespace tnt;
  bind_rows(m, "run_rows", &tnt::run_rows);
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
  m.attr("INTERFACE") = 5;  // raised with every change to what a function takes or leaves: native.py checks it
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
