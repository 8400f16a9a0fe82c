#define DWCONV_FORWARD_NHWC
#include "cpu/kernels/isa/baseline.h"
