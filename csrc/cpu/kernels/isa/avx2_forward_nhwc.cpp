#define DWCONV_FORWARD_NHWC
#include "avx2.h"
