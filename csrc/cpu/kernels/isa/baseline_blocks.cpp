#define DWCONV_BLOCKS
#include "baseline.h"
