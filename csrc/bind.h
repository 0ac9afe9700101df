// What tnt_kernels._C and the tests' host model of its CUDA part share: the reading of a RowCall, and the CUDA
// functions.
#pragma once

#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

#include "row_cuda.h"

namespace tnt {

using Address = uintptr_t;  // 0 for what is absent

template <class T>
T* address(Address value) {
  return reinterpret_cast<T*>(value);
}

// ---- a call, read off tnt_kernels._call.RowCall

// A reference of our own, or an exception of Python's.
inline pybind11::object owned(PyObject* x) {
  if (!x) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(x);
}

// A string of Python's that is made once.
#define TNT_NAME(name)                                               \
  ([]() -> PyObject* {                                               \
    static PyObject* const known = PyUnicode_InternFromString(name); \
    return known;                                                    \
  }())

inline int64_t integer(pybind11::handle x) {
  const int64_t value = PyLong_AsLongLong(x.ptr());
  if (value == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
  return value;
}

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

template <class T>
void read(pybind11::handle tensor, T*& to) {
  to = nullptr;
  if (tensor.is_none()) return;
  const pybind11::object value = owned(PyObject_CallMethodNoArgs(tensor.ptr(), TNT_NAME("data_ptr")));
  to = static_cast<T*>(PyLong_AsVoidPtr(value.ptr()));
  if (!to && PyErr_Occurred()) throw pybind11::error_already_set();
}

// PyTorch's dtypes are objects, one of each.
inline DType dtype_of(pybind11::handle tensor) {
  using Known = std::vector<PyObject*>;
  static pybind11::gil_safe_call_once_and_store<Known> storage;
  const Known& known = storage
                           .call_once_and_store_result([] {
                             const pybind11::module_ torch = pybind11::module_::import("torch");
#define TNT_DTYPE(name, torch_name) pybind11::object(torch.attr(#torch_name)).release().ptr(),
                             return Known{TNT_DTYPES(TNT_DTYPE)};
#undef TNT_DTYPE
                           })
                           .get_stored();
  const pybind11::object dtype = owned(PyObject_GetAttr(tensor.ptr(), TNT_NAME("dtype")));
  const auto at = std::find(known.begin(), known.end(), dtype.ptr());
  if (at == known.end()) throw std::invalid_argument("a dtype that no kernel knows");
  return static_cast<DType>(at - known.begin());
}

// shape[dimension] or stride()[dimension]
inline int64_t entry(const pybind11::object& tuple, int dimension) {
  const Py_ssize_t length = PyTuple_GET_SIZE(tuple.ptr());
  return integer(PyTuple_GET_ITEM(tuple.ptr(), dimension < 0 ? length + dimension : dimension));
}

inline pybind11::object shape(pybind11::handle tensor) {
  return owned(PyObject_GetAttr(tensor.ptr(), TNT_NAME("shape")));
}

inline int64_t first_stride(pybind11::handle tensor) {
  return entry(owned(PyObject_CallMethodNoArgs(tensor.ptr(), TNT_NAME("stride"))), 0);
}

// Of (N) or (1), the latter for all rows; 0 where there is none.
inline int64_t stride_of_numbers(pybind11::handle tensor) {
  return tensor.is_none() || entry(shape(tensor), 0) == 1 ? 0 : first_stride(tensor);
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
#define TNT_FIELD(name) [[maybe_unused]] const pybind11::handle name = fields.next();
#define TNT_READ(type, name) TNT_FIELD(name) read(name, p.name);
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
  const pybind11::object size = shape(logits);
  p.rows = entry(size, 0), p.vocab = entry(size, 1);
  p.dtype = dtype_of(logits);
  p.gradient_dtype = p.gradient ? dtype_of(gradient) : p.dtype;
  p.logits_stride = first_stride(logits);
  p.ref_logits_stride = p.ref_logits ? first_stride(ref_logits) : 0;
  p.gradient_stride = p.gradient ? first_stride(gradient) : 0;
  p.alpha_stride = stride_of_numbers(alpha);
  p.upstream_stride = stride_of_numbers(upstream);
  p.gathered_stride = p.gathered ? first_stride(gathered) : 0;
  p.shards = p.gathered ? entry(shape(gathered), 0) : 0;
  p.negative_ids_count = p.negative_ids ? entry(shape(negative_ids), -1) : 0;
  p.negative_ids_stride = p.negative_ids && PyTuple_GET_SIZE(shape(negative_ids).ptr()) == 2 ? p.negative_ids_count : 0;
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
  m.def("forget_plans", &forget_plans);
}

}  // namespace tnt
