// What tnt_kernels._C and the tests' host model of its CUDA part share: the reading of a RowCall, and the CUDA
// functions.
#pragma once

#include <pybind11/pybind11.h>

#include <cmath>
#include <limits>
#include <stdexcept>

#include "cuda/entry_points.h"
#include "tensor.h"

namespace tnt {

using Address = uintptr_t;  // 0 for what is absent

template <class T>
T* address(Address value) {
  return reinterpret_cast<T*>(value);
}

// ---- a call, read off tnt_kernels._call.RowCall

inline void read(pybind11::handle x, int& to) { to = static_cast<int>(integer(x)); }
inline void read(pybind11::handle x, int64_t& to) { to = integer(x); }
inline void read(pybind11::handle x, Kind& to) {
  to = static_cast<Kind>(integer(x));
  if (to < Kind::FUSED || to > Kind::FINISH) throw pybind11::value_error("a kind that no kernel knows");
}
inline void read(pybind11::handle x, bool& to) { to = x.ptr() == Py_True; }

inline void read(pybind11::handle x, double& to) {  // None is NaN
  to = x.is_none() ? std::numeric_limits<double>::quiet_NaN() : PyFloat_AsDouble(x.ptr());
  if (to == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
}

inline void read(pybind11::handle x, Reduction& to) {
  const auto is = [&](const char* name) {
    return PyUnicode_Check(x.ptr()) && PyUnicode_CompareWithASCIIString(x.ptr(), name) == 0;
  };
  if (is("mean")) return void(to = Reduction::MEAN);
  if (is("sum")) return void(to = Reduction::SUM);
  if (is("none")) return void(to = Reduction::NONE);
  throw pybind11::value_error("a reduction that no kernel knows");
}

// A field as Python has it, its value in `to`.
template <class T>
pybind11::handle take(pybind11::handle x, T& to) {
  read(x, to);
  return x;
}

template <class T>
Tensor take(pybind11::handle x, T*& to) {
  const Tensor tensor(x);
  to = static_cast<T*>(tensor.data());
  return tensor;
}

// Of (N) or (1), the latter for all rows; 0 where there is none.
inline int64_t stride_of_numbers(const Tensor& x) { return x.is_none() || x.size(0) == 1 ? 0 : x.stride(0); }

inline DType dtype_of(const Tensor& logits) {
  const int dtype = logits.dtype();
  if (dtype < 0 || dtype == Tensor::INT64) throw std::invalid_argument("a dtype that no kernel knows");
  return static_cast<DType>(dtype);
}

// The fields of a named tuple, one after the other.
class Fields {
 public:
  Fields(pybind11::handle record, Py_ssize_t count) : record_(record.ptr()) {
    if (!PyTuple_Check(record_) || PyTuple_GET_SIZE(record_) != count)
      throw pybind11::type_error("expected a tnt_kernels._call.RowCall");
  }
  pybind11::handle next() { return PyTuple_GET_ITEM(record_, at_++); }

 private:
  PyObject* record_;
  Py_ssize_t at_ = 0;
};

inline RowCall read_call(pybind11::handle call) {
  RowCall p;
#define TNT_ONE(...) +1
#define TNT_FIELD(name) const pybind11::handle name = fields.next();
#define TNT_READ(type, name) [[maybe_unused]] const auto name = take(fields.next(), p.name);
  Fields fields(call, 0 TNT_ROW_CALL(TNT_ONE, TNT_ONE));
  TNT_ROW_CALL(TNT_READ, TNT_FIELD)
  fields = Fields(tensors, 0 TNT_ROW_TENSORS(TNT_ONE));
  TNT_ROW_TENSORS(TNT_READ)
  fields = Fields(scalars, 0 TNT_SCALARS(TNT_ONE));
  TNT_SCALARS(TNT_READ)
#undef TNT_ONE
#undef TNT_FIELD
#undef TNT_READ
  if (std::isnan(p.nl_floor)) p.nl_floor = -std::numeric_limits<double>::infinity();
  p.rows = logits.size(0), p.vocab = logits.size(1);
  p.dtype = dtype_of(logits);
  p.gradient_dtype = p.gradient ? dtype_of(gradient) : p.dtype;
  p.logits_stride = logits.stride(0);
  p.ref_logits_stride = p.ref_logits ? ref_logits.stride(0) : 0;
  p.gradient_stride = p.gradient ? gradient.stride(0) : 0;
  p.alpha_stride = stride_of_numbers(alpha);
  p.upstream_stride = stride_of_numbers(upstream);
  p.gathered_stride = p.gathered ? gathered.stride(0) : 0;
  p.shards = p.gathered ? gathered.size(0) : 0;
  const bool ids_a_row = p.negative_ids && negative_ids.dimensions() == 2;
  p.negative_ids_count = p.negative_ids ? negative_ids.size(ids_a_row) : 0;
  p.negative_ids_stride = ids_a_row ? p.negative_ids_count : 0;
  return p;
}

// ---- the CUDA entry points

inline void bind_cuda(pybind11::module_& m) {
  m.def("run_rows_cuda", [](pybind11::handle call, int device, Address stream, Address workspace) {
    const RowCall p = read_call(call);
    pybind11::gil_scoped_release release;
    run_rows_cuda(p, {device, address<void>(stream), address<double>(workspace)});
  });
  m.def("scale_rows_cuda", [](int dtype, Address x, int64_t rows, int64_t columns, int64_t stride, Address factor,
                              int device, Address stream) {
    pybind11::gil_scoped_release release;
    scale_rows_cuda(static_cast<DType>(dtype), address<void>(x), rows, columns, stride, address<const void>(factor),
                    device, address<void>(stream));
  });
  m.def("why_not_cuda", &why_not_cuda);
  m.def("plan_cuda", [](int dtype, int64_t vocab, bool pair, int device) {
    const CudaPlan plan = plan_cuda(static_cast<DType>(dtype), vocab, pair, device);
    return pybind11::make_tuple(plan.blocks, plan.threads, plan.shared_bytes, plan.rows);
  });
  m.def("forget_plans", &forget_plans);
}

}  // namespace tnt
