#define DWCONV_FORWARD_NHWC
#include "avx512.h"
