#define DWCONV_BACKWARD
#include "cpu/kernels/isa/avx2.h"
