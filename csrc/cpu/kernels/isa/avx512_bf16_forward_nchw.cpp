#define DWCONV_FORWARD_NCHW
#include "avx512_bf16.h"
