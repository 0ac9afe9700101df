// The CUDA entry points of tnt_kernels._C. The tests bind the kernels' host model with the same function.
#pragma once

#include "bind_rows.h"
#include "row_cuda.h"

namespace tnt {

inline void bind_cuda(pybind11::module_& m) {
  bind_rows(
      m, "run_rows_cuda", +[](RowParams& p, int device, Address stream, Address workspace) {
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
