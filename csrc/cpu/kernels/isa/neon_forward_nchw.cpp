#define DWCONV_FORWARD_NCHW
#include "cpu/kernels/isa/neon.h"
