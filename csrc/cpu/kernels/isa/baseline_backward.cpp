#define DWCONV_BACKWARD
#include "cpu/kernels/isa/baseline.h"
