#define DWCONV_BACKWARD
#include "cpu/kernels/isa/neon.h"
