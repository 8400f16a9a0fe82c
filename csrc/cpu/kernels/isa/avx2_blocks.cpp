#define DWCONV_BLOCKS
#include "avx2.h"
