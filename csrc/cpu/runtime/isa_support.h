// The widest of x86-64's sets of kernels that CPU and system allow: a header of its own, so that a build for tests can put
// another in its place.
#pragma once

#include "cpu/runtime/x86_features.h"

#if defined(__x86_64__)

namespace dwconv {

inline Isa widest_isa() { return widest_x86_isa(x86_answers(), system_permits_tiles); }

}  // namespace dwconv

#endif
