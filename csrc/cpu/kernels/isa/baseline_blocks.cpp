#define DWCONV_BLOCKS
#include "cpu/kernels/isa/baseline.h"
