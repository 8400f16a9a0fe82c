// The intrinsics of AMX's tiles (_tile_loadd, _tile_dpbf16ps, ...): a header of its own, so that a build for tests can put
// software in its place.
#pragma once

#include <immintrin.h>
