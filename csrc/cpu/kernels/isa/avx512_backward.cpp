#define DWCONV_BACKWARD
#include "avx512.h"
