#define DWCONV_BACKWARD
#include "cpu/kernels/isa/avx512.h"
