#define DWCONV_FORWARD_NCHW
#include "cpu/kernels/isa/avx2.h"
