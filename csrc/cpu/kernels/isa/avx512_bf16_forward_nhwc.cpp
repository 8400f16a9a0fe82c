#define DWCONV_FORWARD_NHWC
#include "avx512_bf16.h"
