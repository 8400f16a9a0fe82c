#define DWCONV_BACKWARD
#include "avx2.h"
