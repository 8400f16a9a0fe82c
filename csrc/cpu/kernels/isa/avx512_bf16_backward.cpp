#define DWCONV_BACKWARD
#include "avx512_bf16.h"
