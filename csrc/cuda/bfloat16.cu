#if !defined(TNT_ISA)
#define TNT_ISA cuda_math
#endif
#include "cuda/rows.cuh"

namespace tnt {
extern const CudaRows cuda_rows_bfloat16 = cuda_rows<BFloat16, BFloat16>();
}
