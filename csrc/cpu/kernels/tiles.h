// How the workers of an op share its tiles: each begins with a contiguous share of its own, and takes from the others' what is
// left when that is done. A core that is slower than the rest, or busy with something else, holds nobody up; no tile depends on
// who computes it.
#pragma once

#include <stdint.h>

namespace dwconv {

struct alignas(64) TileShare {  // tiles [next, end) are nobody's yet
  int64_t next, end;
};

struct Tiles {
  TileShare* shares = nullptr;
  int64_t count = 0;         // shares
  int64_t own = 0;           // the one to begin with
  int64_t grain = 1;         // tiles to take at once
  int64_t asked = 0;         // shares that were found empty
  int64_t at = 0, stop = 0;  // taken and not done
  int64_t taken = 0;         // so far
};

// Tile 0 alone, for a kernel that runs within another.
static inline Tiles one_tile() {
  Tiles tiles;
  tiles.stop = 1;
  return tiles;
}

static inline bool next_tile(Tiles& tiles, int64_t* tile) {
  while (tiles.at == tiles.stop) {
    if (tiles.asked == tiles.count) return false;
    TileShare& share = tiles.shares[(tiles.own + tiles.asked) % tiles.count];
    const int64_t first = __atomic_fetch_add(&share.next, tiles.grain, __ATOMIC_RELAXED);
    if (first >= share.end) {
      ++tiles.asked;
      continue;
    }
    tiles.at = first;
    tiles.stop = first + tiles.grain < share.end ? first + tiles.grain : share.end;
    tiles.taken += tiles.stop - tiles.at;
  }
  *tile = tiles.at++;
  return true;
}

}  // namespace dwconv
