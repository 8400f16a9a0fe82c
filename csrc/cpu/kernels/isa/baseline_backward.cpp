#define DWCONV_BACKWARD
#include "baseline.h"
