#define DWCONV_FORWARD_NCHW
#include "cpu/kernels/isa/baseline.h"
