#define DWCONV_BLOCKS
#include "amx.h"
