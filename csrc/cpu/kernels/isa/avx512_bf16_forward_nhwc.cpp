#define DWCONV_FORWARD_NHWC
#include "cpu/kernels/isa/avx512_bf16.h"
