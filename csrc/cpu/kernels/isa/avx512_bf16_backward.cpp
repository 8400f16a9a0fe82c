#define DWCONV_BACKWARD
#include "cpu/kernels/isa/avx512_bf16.h"
