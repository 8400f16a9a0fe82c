#define DWCONV_BACKWARD
#include "cpu/kernels/isa/neon_bf16.h"
