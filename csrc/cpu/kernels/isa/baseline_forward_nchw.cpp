#define DWCONV_FORWARD_NCHW
#include "baseline.h"
