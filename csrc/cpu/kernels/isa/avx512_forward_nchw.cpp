#define DWCONV_FORWARD_NCHW
#include "cpu/kernels/isa/avx512.h"
