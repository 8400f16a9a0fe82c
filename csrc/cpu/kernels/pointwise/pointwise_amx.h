// The pointwise product of bfloat16 on AMX's tile registers (Intel 64 and IA-32 Architectures Software Developer's Manual, vol.
// 1, chapter 18): TDPBF16PS adds to 16 x 16 float32 sums the products of 16 pixels x 32 channels by 32 channels x 16 outputs.
//
//   tiles   | 6: outputs 0-15 | 7: outputs 16-31 |      a step of 32 channels: 4 loads of 1 KB, 4 products of 16 cycles
//   4: rows | 0               | 1                |
//   5: rows | 2               | 3                |
//
// A's tiles are read where the depthwise stage wrote them, [pixel][channel]; B's from the panel, whose rows are pairs of
// channels (PointwiseFormat). Channels past the last are zero in both. kBlock channels of the panel, 32 KB, stay in
// L1 for all pixels; between the blocks the sums rest in scratch, where the epilogue finds them too.
// A tile has as many rows as divide the pixels most evenly: 49 pixels are 4 x 13, not 3 x 16 and one.
// Denormals count as zero, as AMX has it.
#pragma once

#include "cpu/kernels/pointwise/amx_tiles.h"
#include "cpu/kernels/pointwise/pointwise_product.h"

namespace dwconv::DWCONV_ISA {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

class TileProduct {
 public:
  using A = float;
  using Middle = BFloat16;
  static constexpr int kDepthMultiple = 32;  // channels of a tile
  static constexpr int kRows = 16;
  static constexpr bool kReadsInPlace = false;

  static int64_t padded_pixels(int64_t pixels) { return pixels + kMostRows; }

  // Configures the calling thread's tiles for `pixels` pixels, until the end of this object's life.
  explicit TileProduct(int64_t pixels) {
    const int64_t tiles = ceil_div(pixels, kMostRows);
    rows_ = static_cast<int>(ceil_div(pixels, tiles));
    TileConfig config;
    for (int t = 0; t < 8; ++t) {
      config.rows[t] = static_cast<uint8_t>(t < 6 ? rows_ : kDepthMultiple / 2);
      config.row_bytes[t] = 64;
    }
    // GCC takes _tile_loadconfig to read eight bytes only, and would drop the other stores.
    asm volatile("" ::"r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  ~TileProduct() { _tile_release(); }
  TileProduct(const TileProduct&) = delete;
  TileProduct& operator=(const TileProduct&) = delete;

  // As RegisterProduct::multiply; channels between `channels` and the next multiple of kDepthMultiple are zero in the middle.
  template <class O>
  void multiply(const Activation& activation, const BFloat16* middle, int64_t pitch, int64_t pixels, int64_t channels,
                const BFloat16* panel, float* sums, const float* bias, const GemmTarget<O>& to, ProductPrefetch& upcoming) const {
    const int64_t depth = round_up(channels, kDepthMultiple);
    for (int64_t k = 0; k < depth; k += kBlock) {
      const int64_t count = depth - k < kBlock ? depth - k : kBlock;
      for (int64_t i = 0; i < pixels; i += 2 * rows_) {
        const BFloat16* const a = middle + i * pitch + k;
        float* const here = sums + i * kPanel<float>;
        const int64_t left = pixels - i;
        const GemmTarget<O> target = from_row(to, i, lanes_left(left, 2 * rows_));
        if (upcoming.output && k + count == depth) prefetch_for_write(target);
        if (left > rows_) {
          add_block<true>(k == 0, count, a, pitch, panel + k * kPanel<float>, here, target.rows, upcoming);
        } else {
          add_block<false>(k == 0, count, a, pitch, panel + k * kPanel<float>, here, target.rows, upcoming);
        }
        if (k + count == depth) finish<O>(activation, here, bias, target);
      }
    }
  }

 private:
  static constexpr int kMostRows = 16;
  static constexpr int64_t kBlock = 512;
  static constexpr int64_t kSumsPitch = kPanel<float> * sizeof(float);
  static_assert(kPanel<float> == 32);

  // sums (+)= a . panel over `count` channels, for one or two tiles' rows.
  template <bool kTwo>
  void add_block(bool first, int64_t count, const BFloat16* a, int64_t pitch, const BFloat16* panel, float* sums, int rows,
                 ProductPrefetch& upcoming) const {
    const int64_t a_pitch = pitch * static_cast<int64_t>(sizeof(BFloat16));
    const BFloat16* const second = a + rows_ * pitch;
    float* const second_sums = sums + rows_ * kPanel<float>;
    asm volatile("" ::: "memory");  // the compiler does not know that tile loads read memory
    if (first) {
      _tile_zero(0);
      _tile_zero(1);
      if (kTwo) {
        _tile_zero(2);
        _tile_zero(3);
      }
    } else {
      _tile_loadd(0, sums, kSumsPitch);
      _tile_loadd(1, sums + 16, kSumsPitch);
      if (kTwo) {
        _tile_loadd(2, second_sums, kSumsPitch);
        _tile_loadd(3, second_sums + 16, kSumsPitch);
      }
    }
    for (int64_t k = 0; k < count; k += kDepthMultiple) {
      upcoming.advance(kDepthMultiple * rows);
      const BFloat16* const b = panel + k * kPanel<float>;
      _tile_loadd(4, a + k, a_pitch);
      _tile_loadd(6, b, 128);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + 32, 128);
      _tile_dpbf16ps(1, 4, 7);
      if (kTwo) {
        _tile_loadd(5, second + k, a_pitch);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, sums, kSumsPitch);
    _tile_stored(1, sums + 16, kSumsPitch);
    if (kTwo) {
      _tile_stored(2, second_sums, kSumsPitch);
      _tile_stored(3, second_sums + 16, kSumsPitch);
    }
  }

  template <class O>
  static void finish(const Activation& activation, const float* sums, const float* bias, const GemmTarget<O>& to) {
    constexpr int kRows = 4;
    for (int i = 0; i < to.rows; i += kRows) {
      Vec<float> acc[kRows][kGemmColumns] = {};
      add_sums<float>(sums + i * kPanel<float>, kPanel<float>, acc);
      finish_tile<O, float>(activation, acc, bias, from_row(to, i, lanes_left(to.rows - i, kRows)));
    }
  }

  int rows_;  // of a tile
};

}  // namespace dwconv::DWCONV_ISA
