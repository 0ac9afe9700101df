// What a kernel needs to know of one of PyTorch's tensors, read off the Python object without PyTorch's headers.
#pragma once

#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>

#include <cstdint>

#include "call.h"

namespace tnt {

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

// DLPack's exchange API, as dlpack.h of DLPack 1.2 lays it out. PyTorch has it from version 2.10 on.
namespace dlpack {

constexpr uint32_t MAJOR_VERSION = 1;
constexpr int32_t CPU = 1;

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
  bool operator==(const DataType& other) const {
    return code == other.code && bits == other.bits && lanes == other.lanes;
  }
};

// Of PyTorch's dtypes from 16 bits on: float32, bfloat16, int64. Narrower ones have codes that no name tells.
constexpr DataType dtype(const char* name) {
  const uint8_t code = *name == 'b' ? 4 : *name == 'f' ? 2 : 0;  // kDLBfloat, kDLFloat, kDLInt
  uint8_t bits = 0;
  for (; *name; ++name)
    if ('0' <= *name && *name <= '9') bits = static_cast<uint8_t>(10 * bits + (*name - '0'));
  return {code, bits, 1};
}

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  DataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  void* previous;
  void *allocate, *to_managed, *from_managed;
  int (*read)(void* py_object, Tensor* out);  // lent while the object lives; not 0: a Python exception is set
  void* stream;
};

}  // namespace dlpack

// What is asked of PyTorch once.
struct PyTorch {
  PyObject* tensor_type;
  const dlpack::ExchangeApi* api;  // null where there is none
#define TNT_ONE(...) +1
  static constexpr int INT64 = 0 TNT_DTYPES(TNT_ONE);  // beside the values of DType
#undef TNT_ONE
  PyObject* dtypes[INT64 + 1];  // PyTorch's are objects, one of each
#define TNT_DTYPE(name, torch_name) dlpack::dtype(#torch_name),
  static constexpr dlpack::DataType dlpack_dtypes[] = {TNT_DTYPES(TNT_DTYPE) dlpack::dtype("int64")};
#undef TNT_DTYPE

  static const PyTorch& get() {
    static pybind11::gil_safe_call_once_and_store<PyTorch> storage;
    return storage.call_once_and_store_result(load).get_stored();
  }

 private:
  static PyTorch load() {
    const pybind11::module_ torch = pybind11::module_::import("torch");
    const auto kept = [&](const char* name) { return pybind11::object(torch.attr(name)).release().ptr(); };
#define TNT_DTYPE(name, torch_name) kept(#torch_name),
    PyTorch found{kept("Tensor"), nullptr, {TNT_DTYPES(TNT_DTYPE) kept("int64")}};
#undef TNT_DTYPE
    const pybind11::handle tensor = found.tensor_type;
    if (!pybind11::hasattr(tensor, "__dlpack_c_exchange_api__")) return found;
    const pybind11::object capsule = tensor.attr("__dlpack_c_exchange_api__");
    const void* const pointer = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
    if (!pointer) throw pybind11::error_already_set();
    const auto* const api = static_cast<const dlpack::ExchangeApi*>(pointer);
    if (api->major == dlpack::MAJOR_VERSION && api->read) found.api = api;
    return found;
  }
};

// A tensor, or None, while the caller holds it. DLPack tells everything at once, in less time than one attribute takes.
// Older versions of PyTorch, and subclasses, which may have changed what DLPack would tell, are asked for attributes.
class Tensor {
 public:
  static constexpr int INT64 = PyTorch::INT64;

  explicit Tensor(pybind11::handle tensor) : tensor_(tensor) {
    const PyTorch& torch = PyTorch::get();
    has_dlpack_ = torch.api && is_plain();
    if (has_dlpack_ && torch.api->read(tensor.ptr(), &dlpack_) != 0) throw pybind11::error_already_set();
  }

  bool is_none() const { return tensor_.is_none(); }
  bool is_plain() const { return reinterpret_cast<PyObject*>(Py_TYPE(tensor_.ptr())) == PyTorch::get().tensor_type; }

  void* data() const {
    if (is_none()) return nullptr;
    if (has_dlpack_) return static_cast<char*>(dlpack_.data) + dlpack_.byte_offset;
    const pybind11::object value = owned(PyObject_CallMethodNoArgs(tensor_.ptr(), TNT_NAME("data_ptr")));
    void* const data = PyLong_AsVoidPtr(value.ptr());
    if (!data && PyErr_Occurred()) throw pybind11::error_already_set();
    return data;
  }

  int dimensions() const {
    return has_dlpack_ ? dlpack_.ndim : static_cast<int>(PyTuple_GET_SIZE(attribute(TNT_NAME("shape")).ptr()));
  }
  int64_t size(int dimension) const {
    return has_dlpack_ ? dlpack_.shape[dimension] : entry(attribute(TNT_NAME("shape")), dimension);
  }
  int64_t stride(int dimension) const {
    if (has_dlpack_) return dlpack_.strides[dimension];
    return entry(owned(PyObject_CallMethodNoArgs(tensor_.ptr(), TNT_NAME("stride"))), dimension);
  }

  // A value of DType, INT64, or -1 for any other.
  int dtype() const {
    const PyTorch& torch = PyTorch::get();
    const pybind11::object object = has_dlpack_ ? pybind11::object() : attribute(TNT_NAME("dtype"));
    for (int i = 0; i <= INT64; ++i)
      if (has_dlpack_ ? torch.dlpack_dtypes[i] == dlpack_.dtype : torch.dtypes[i] == object.ptr()) return i;
    return -1;
  }

  bool is_on_cpu() const { return has_dlpack_ ? dlpack_.device_type == dlpack::CPU : is_true(TNT_NAME("is_cpu")); }
  bool requires_grad() const { return is_true(TNT_NAME("requires_grad")); }

 private:
  pybind11::object attribute(PyObject* name) const { return owned(PyObject_GetAttr(tensor_.ptr(), name)); }
  bool is_true(PyObject* name) const { return attribute(name).ptr() == Py_True; }
  static int64_t entry(const pybind11::object& tuple, int at) { return integer(PyTuple_GET_ITEM(tuple.ptr(), at)); }

  pybind11::handle tensor_;
  bool has_dlpack_;
  dlpack::Tensor dlpack_;
};

}  // namespace tnt
