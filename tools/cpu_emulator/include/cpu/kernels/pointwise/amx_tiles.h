// AMX's tiles in software: the instructions that pointwise_amx.h uses, under their intrinsics' names, with what the manual says
// they check.
#pragma once

#include <string.h>

#include "cpu/kernels/simd.h"
#include "cpu/kernels/simd_lanes.h"

namespace dwconv::DWCONV_ISA {

struct EmulatedTiles {
  bool configured = false;
  uint16_t row_bytes[8];
  uint8_t rows[8];
  alignas(64) char data[8][16][64];
};
inline thread_local EmulatedTiles emulated_tiles;

inline EmulatedTiles& tiles_in_use() {
  if (!emulated_tiles.configured) __builtin_trap();  // #UD on the processor
  return emulated_tiles;
}

inline void _tile_loadconfig(const void* config) {
  const unsigned char* const bytes = static_cast<const unsigned char*>(config);
  if (bytes[0] != 1) __builtin_trap();
  for (int i = 1; i < 16; ++i) {
    if (bytes[i] != 0) __builtin_trap();
  }
  for (int t = 0; t < 8; ++t) {
    memcpy(&emulated_tiles.row_bytes[t], bytes + 16 + 2 * t, 2);
    emulated_tiles.rows[t] = bytes[48 + t];
    if (emulated_tiles.rows[t] == 0 || emulated_tiles.rows[t] > 16 || emulated_tiles.row_bytes[t] > 64) __builtin_trap();
  }
  memset(emulated_tiles.data, 0, sizeof emulated_tiles.data);
  emulated_tiles.configured = true;
}

inline void _tile_release() { emulated_tiles.configured = false; }

inline void _tile_zero(int t) { memset(tiles_in_use().data[t], 0, sizeof emulated_tiles.data[t]); }

inline void _tile_loadd(int t, const void* from, int64_t stride) {
  EmulatedTiles& tiles = tiles_in_use();
  memset(tiles.data[t], 0, sizeof tiles.data[t]);
  for (int i = 0; i < tiles.rows[t]; ++i)
    memcpy(tiles.data[t][i], static_cast<const char*>(from) + i * stride, tiles.row_bytes[t]);
}

inline void _tile_stored(int t, void* to, int64_t stride) {
  const EmulatedTiles& tiles = tiles_in_use();
  for (int i = 0; i < tiles.rows[t]; ++i) memcpy(static_cast<char*>(to) + i * stride, tiles.data[t][i], tiles.row_bytes[t]);
}

inline float flush(float value) { return __builtin_fabsf(value) < 0x1p-126f ? value * 0.0f : value; }

inline float flushed(BFloat16 value) { return flush(to_accumulate(value)); }

inline void _tile_dpbf16ps(int c, int a, int b) {
  EmulatedTiles& tiles = tiles_in_use();
  if (tiles.rows[c] != tiles.rows[a] || tiles.row_bytes[c] != tiles.row_bytes[b] || tiles.row_bytes[a] != 4 * tiles.rows[b])
    __builtin_trap();
  for (int m = 0; m < tiles.rows[c]; ++m) {
    for (int k = 0; k < tiles.row_bytes[a] / 4; ++k) {
      BFloat16 x[2];
      memcpy(x, tiles.data[a][m] + 4 * k, sizeof x);
      for (int n = 0; n < tiles.row_bytes[c] / 4; ++n) {
        BFloat16 y[2];
        float sum;
        memcpy(y, tiles.data[b][k] + 4 * n, sizeof y);
        memcpy(&sum, tiles.data[c][m] + 4 * n, sizeof sum);
        sum = flush(sum + flushed(x[0]) * flushed(y[0]));
        sum = flush(sum + flushed(x[1]) * flushed(y[1]));
        memcpy(tiles.data[c][m] + 4 * n, &sum, sizeof sum);
      }
    }
  }
}

}  // namespace dwconv::DWCONV_ISA
