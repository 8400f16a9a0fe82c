#define DWCONV_BLOCKS
#include "avx512_bf16.h"
