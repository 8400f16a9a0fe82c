#define DWCONV_FORWARD_NCHW
#include "avx2.h"
