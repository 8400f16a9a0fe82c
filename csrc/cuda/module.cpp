// The Python module _C_cuda: build facts, kernel table and plans of the CUDA half. Importing it registers the CUDA ops.
#include "cuda/plan/describe.h"

#ifndef DWCONV_CUDA_VERSION
#define DWCONV_CUDA_VERSION "unknown"
#endif
#ifndef DWCONV_CUDA_ARCHITECTURES
#define DWCONV_CUDA_ARCHITECTURES "unknown"
#endif

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "dwconv_ext's CUDA half.";
  m.attr("cuda_version") = DWCONV_CUDA_VERSION;
  m.attr("architectures") = DWCONV_CUDA_ARCHITECTURES;
  dwconv::cuda::define_plans(m);
}
