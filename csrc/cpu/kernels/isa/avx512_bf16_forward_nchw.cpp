#define DWCONV_FORWARD_NCHW
#include "cpu/kernels/isa/avx512_bf16.h"
