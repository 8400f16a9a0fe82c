#define DWCONV_FORWARD_NHWC
#include "cpu/kernels/isa/neon_bf16.h"
