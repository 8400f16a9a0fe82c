#define DWCONV_BLOCKS
#include "avx512.h"
