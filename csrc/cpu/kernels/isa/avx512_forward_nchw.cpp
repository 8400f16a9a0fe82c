#define DWCONV_FORWARD_NCHW
#include "avx512.h"
