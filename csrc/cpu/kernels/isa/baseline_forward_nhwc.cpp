#define DWCONV_FORWARD_NHWC
#include "baseline.h"
