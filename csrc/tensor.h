// What a kernel needs to know of one of PyTorch's tensors, read off the Python object without PyTorch's headers.
#pragma once

#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

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
constexpr uint8_t INT = 0, FLOAT = 2, BFLOAT = 4;

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
  struct {
    dlpack::DataType type;
    PyObject* object;  // PyTorch's dtypes are objects, one of each
  } dtypes[5];         // those of DType, then int64

  static const PyTorch& get() {
    static pybind11::gil_safe_call_once_and_store<PyTorch> storage;
    return storage.call_once_and_store_result(load).get_stored();
  }

 private:
  static PyTorch load() {
    using namespace dlpack;
    const pybind11::module_ torch = pybind11::module_::import("torch");
    const auto kept = [&](const char* name) { return pybind11::object(torch.attr(name)).release().ptr(); };
    PyObject* const tensor = kept("Tensor");
    const ExchangeApi* api = nullptr;
    if (pybind11::hasattr(tensor, "__dlpack_c_exchange_api__")) {
      const pybind11::object capsule = pybind11::handle(tensor).attr("__dlpack_c_exchange_api__");
      api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
      if (!api) throw pybind11::error_already_set();
      if (api->major != MAJOR_VERSION || !api->read) api = nullptr;
    }
    return {tensor,
            api,
            {{{FLOAT, 32, 1}, kept("float32")},
             {{BFLOAT, 16, 1}, kept("bfloat16")},
             {{FLOAT, 16, 1}, kept("float16")},
             {{FLOAT, 64, 1}, kept("float64")},
             {{INT, 64, 1}, kept("int64")}}};
  }
};

// A tensor, or None, while the caller holds it. DLPack tells everything at once, in less time than one attribute takes.
// Older versions of PyTorch, and subclasses, which may have changed what DLPack would tell, are asked for attributes.
class Tensor {
 public:
  static constexpr int INT64 = 4;  // beside the values of DType

  explicit Tensor(pybind11::handle tensor) : tensor_(tensor) {
    const PyTorch& torch = PyTorch::get();
    told_ = torch.api && is_plain();
    if (told_ && torch.api->read(tensor.ptr(), &told_of_) != 0) throw pybind11::error_already_set();
  }

  bool is_none() const { return tensor_.is_none(); }
  bool is_plain() const { return reinterpret_cast<PyObject*>(Py_TYPE(tensor_.ptr())) == PyTorch::get().tensor_type; }

  void* data() const {
    if (is_none()) return nullptr;
    if (told_) return static_cast<char*>(told_of_.data) + told_of_.byte_offset;
    const pybind11::object value = owned(PyObject_CallMethodNoArgs(tensor_.ptr(), TNT_NAME("data_ptr")));
    void* const data = PyLong_AsVoidPtr(value.ptr());
    if (!data && PyErr_Occurred()) throw pybind11::error_already_set();
    return data;
  }

  int dimensions() const {
    return told_ ? told_of_.ndim : static_cast<int>(PyTuple_GET_SIZE(attribute(TNT_NAME("shape")).ptr()));
  }
  int64_t size(int dimension) const {
    return told_ ? told_of_.shape[dimension] : entry(attribute(TNT_NAME("shape")), dimension);
  }
  int64_t stride(int dimension) const {
    if (told_) return told_of_.strides[dimension];
    return entry(owned(PyObject_CallMethodNoArgs(tensor_.ptr(), TNT_NAME("stride"))), dimension);
  }

  // A value of DType, INT64, or -1 for any other.
  int dtype() const {
    const PyTorch& torch = PyTorch::get();
    const pybind11::object object = told_ ? pybind11::object() : attribute(TNT_NAME("dtype"));
    for (int i = 0; i <= INT64; ++i)
      if (told_ ? torch.dtypes[i].type == told_of_.dtype : torch.dtypes[i].object == object.ptr()) return i;
    return -1;
  }

  bool is_on_cpu() const { return told_ ? told_of_.device_type == dlpack::CPU : is_true(TNT_NAME("is_cpu")); }
  bool requires_grad() const { return is_true(TNT_NAME("requires_grad")); }

 private:
  pybind11::object attribute(PyObject* name) const { return owned(PyObject_GetAttr(tensor_.ptr(), name)); }
  bool is_true(PyObject* name) const { return attribute(name).ptr() == Py_True; }
  static int64_t entry(const pybind11::object& tuple, int at) { return integer(PyTuple_GET_ITEM(tuple.ptr(), at)); }

  pybind11::handle tensor_;
  bool told_;
  dlpack::Tensor told_of_;
};

}  // namespace tnt
