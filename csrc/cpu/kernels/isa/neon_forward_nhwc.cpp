#define DWCONV_FORWARD_NHWC
#include "cpu/kernels/isa/neon.h"
