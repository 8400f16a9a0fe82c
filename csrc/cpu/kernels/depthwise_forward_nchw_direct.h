// Depthwise correlation, NCHW, square filters at stride 1: forward pass and input gradient, where multiply-adds can be masked.
//
// Lanes are output columns, as in depthwise_forward_nchw_rows.h, but the input is read where it lies. What a vector reaches
// beyond its row is kept out of the sums by a mask, which costs nothing, and rows above and below the image are skipped. So
// nothing is copied, and a row of 14 columns takes one vector without a transposition.
//
//   out[y, x] = act(bias + sum_{r, s} w[r, s] * in[y + r - pad_h, x + s - pad_w])
//
// The register tile is kDirectRows rows by one or two vectors. A loaded vector serves every output row it reaches: at 3x3 27
// loads a vector column for 63 FMAs; since most of them cross a cache line and count twice, not fewer rows. Where rows or
// columns are left over, the last tile lies over the one before, as in the other kernel.
//
// Loads and stores are of whole vectors wherever these stay within the tensor, or the tile: on AMD's Zen 5 masked ones take two
// to four times as long where they miss the caches (docs/decisions.md).
//
// Tiles: `rows_per_tile` output rows of one (n, c) plane. Traffic: input and output once, plus kernel_h - 1 halo rows per tile.
#pragma once

#include "depthwise_row_pair.h"
#include "simd.h"

namespace dwconv::DWCONV_ISA {

inline constexpr int kDirectRows = 7;  // 14 sums, 9 taps and 2 inputs of 32 registers

// How a register tile reads: every input row; the rows that the image has; those, and masked, where whole vectors could reach
// beyond the tensor.
enum class Reads { kAll, kRows, kMasked };

template <Reads kReads, class T>
DWCONV_INLINE auto load_as(const T* p, LaneMask lanes) {
  auto v = kReads == Reads::kMasked ? load_masked(p, lanes) : load(p);
  keep_in_register(v);
  return v;
}

// One past the last element of the planes that a problem goes over.
template <class T>
DWCONV_INLINE const T* end_of_input(const DepthwiseProblem& p, const T* begin) {
  return begin + (p.batch - 1) * p.in_stride_n + (p.channels - 1) * p.in_stride_c + (p.depth - 1) * p.in_stride_m +
         (p.in_h - 1) * p.in_stride_h + p.in_w;
}

// What whole vectors may reach past a plane's last element: those that lie in the padding altogether are read too.
template <class A>
DWCONV_INLINE int64_t direct_reach(const DepthwiseProblem& p) {
  return kLanes<A> + p.kernel_w + (p.pad_w < 0 ? -p.pad_w : p.pad_w);
}

struct DirectFrame {
  int64_t in_h, in_row, in_plane, depth;
  int64_t pad_h, out_w, out_row;
  Activation activation;
};

// A tile: some rows of one output plane; `in` is where output (0, 0) of the tile has its first tap, in the plane or not.
template <class T, class O, class A>
struct DirectTile {
  const T* in;
  const A* weight;
  A bias;
  O* out;
  int64_t y, rows;      // y: of the plane
  const O* last_whole;  // the last place where a whole vector stays within the tile
  bool inside;          // whole vectors stay within the input
};

// kDirectRows rows from row y on, kColumns vectors of columns from column x on, each `next` columns after the one before.
// masks: [kColumns][kKernel] of the input, then [kColumns] of the output.
template <class T, class O, class A, int kKernel, int kColumns, Reads kReads>
DWCONV_INLINE void direct_tile(const DirectFrame& f, const DirectTile<T, O, A>& tile, int64_t y, int64_t x, int64_t next,
                               uint32_t valid_rows, const LaneMask* masks) {
  constexpr int kTogether = kKernel == 3 ? 3 : 1;  // filter columns whose taps fit the registers
  Vec<A> acc[kDirectRows][kColumns];
  DWCONV_UNROLL
  for (int j = 0; j < kDirectRows; ++j) {
    DWCONV_UNROLL
    for (int t = 0; t < kColumns; ++t) acc[j][t] = broadcast(tile.bias);
  }
  const T* base = tile.in + y * f.in_row + x;
  const A* weight = tile.weight;
  for (int64_t m = 0; m < f.depth; ++m, base += f.in_plane, weight += kKernel * kKernel) {
    DWCONV_UNROLL
    for (int first = 0; first < kKernel; first += kTogether) {
      Vec<A> taps[kTogether][kKernel];
      LaneMask lanes[kTogether][kColumns];
      DWCONV_UNROLL
      for (int s = 0; s < kTogether; ++s) {
        DWCONV_UNROLL
        for (int t = 0; t < kColumns; ++t) {
          lanes[s][t] = masks[t * kKernel + first + s];
          if (kTogether == 1) keep_in_register(lanes[s][t]);  // six would be all the mask registers but one
        }
        DWCONV_UNROLL
        for (int r = 0; r < kKernel; ++r) taps[s][r] = broadcast(weight[r * kKernel + first + s]);
      }
      const T* in = base + first;
      DWCONV_UNROLL
      for (int i = 0; i < kDirectRows + kKernel - 1; ++i, in += f.in_row) {
        if (kReads != Reads::kAll && !((valid_rows >> i) & 1)) continue;
        DWCONV_UNROLL
        for (int s = 0; s < kTogether; ++s) {
          Vec<A> v[kColumns];
          DWCONV_UNROLL
          for (int t = 0; t < kColumns; ++t) v[t] = load_as<kReads>(in + s + t * next, lanes[s][t]);
          DWCONV_UNROLL
          for (int j = 0; j < kDirectRows; ++j) {
            const int r = i - j;
            if (r < 0 || r >= kKernel) continue;
            DWCONV_UNROLL
            for (int t = 0; t < kColumns; ++t) acc[j][t] = add_masked(acc[j][t], v[t], taps[s][r], lanes[s][t]);
          }
        }
      }
    }
  }
  activate_all<A>(acc, f.activation);
  O* out = tile.out + y * f.out_row + x;
  DWCONV_UNROLL
  for (int j = 0; j < kDirectRows; ++j, out += f.out_row) {
    if (y + j >= tile.rows) break;
    DWCONV_UNROLL
    for (int t = 0; t < kColumns; ++t) {
      if (out + t * next <= tile.last_whole) {  // what lies past a narrow row is the next one, which is stored after it
        store(out + t * next, acc[j][t]);
      } else {
        store_masked(out + t * next, acc[j][t], masks[kColumns * kKernel + t]);
      }
    }
  }
}

// Calls body<number of vectors>(x, next) along a row.
template <int kVec, class Body>
DWCONV_INLINE void direct_columns(int64_t out_w, Body body) {
  int64_t x = 0;
  for (; out_w - x >= 2 * kVec; x += 2 * kVec) body.template operator()<2>(x, int64_t{kVec});
  const int64_t left = out_w - x;
  if (left > kVec) {
    body.template operator()<2>(x == 0 ? 0 : out_w - 2 * kVec, x == 0 ? left - kVec : kVec);
  } else if (left > 0) {
    body.template operator()<1>(x == 0 ? 0 : out_w - kVec, int64_t{0});
  }
}

// A row's masks, as direct_tile reads them.
template <int kVec>
void fill_direct_masks(const DepthwiseProblem& p, LaneMask* mask) {
  direct_columns<kVec>(p.out_w, [&]<int kColumns>(int64_t x, int64_t next) {
    for (int t = 0; t < kColumns; ++t) {
      for (int64_t s = 0; s < p.kernel_w; ++s)
        *mask++ = static_cast<LaneMask>(valid_columns(x + t * next + s - p.pad_w, 1, p.in_w, kVec));
    }
    for (int t = 0; t < kColumns; ++t) *mask++ = static_cast<LaneMask>(valid_columns(x + t * next, 1, p.out_w, kVec));
  });
}

template <class T, class O, class A, int kKernel>
void direct_plane(const DirectFrame& f, const DirectTile<T, O, A>& tile, const LaneMask* masks) {
  constexpr int kCount = kDirectRows + kKernel - 1;
  constexpr uint32_t kAll = (1u << kCount) - 1u;
  for (int64_t y = 0; y < tile.rows; y += kDirectRows) {
    if (y > 0 && tile.rows - y < kDirectRows) y = tile.rows - kDirectRows;
    const uint32_t valid = valid_columns(tile.y + y - f.pad_h, 1, f.in_h, kCount);  // rows, that is
    const LaneMask* mask = masks;
    direct_columns<kLanes<A>>(f.out_w, [&]<int kColumns>(int64_t x, int64_t next) {
      if (!tile.inside) {
        direct_tile<T, O, A, kKernel, kColumns, Reads::kMasked>(f, tile, y, x, next, valid, mask);
      } else if (valid == kAll) {
        direct_tile<T, O, A, kKernel, kColumns, Reads::kAll>(f, tile, y, x, next, valid, mask);
      } else {
        direct_tile<T, O, A, kKernel, kColumns, Reads::kRows>(f, tile, y, x, next, valid, mask);
      }
      mask += kColumns * (kKernel + 1);
    });
  }
}

template <class T, class O, int kKernel, int kStride>
void depthwise_forward_nchw_direct(const DepthwiseArgs& args, void* scratch, Tiles tiles) {
  using A = typename AccumulateType<T>::type;
  static_assert(kKernel > 0 && kStride == 1);
  const DepthwiseProblem& p = args.problem;
  const int64_t row_tiles = (p.out_h + args.rows_per_tile - 1) / args.rows_per_tile;
  LaneMask* const masks = static_cast<LaneMask*>(scratch);
  fill_direct_masks<kLanes<A>>(p, masks);
  const T* const input_begin = static_cast<const T*>(args.input);
  const T* const input_end = end_of_input(p, input_begin);
  const int64_t needed = (p.depth - 1) * p.in_stride_m + (p.in_h - 1) * p.in_stride_h + p.in_w + direct_reach<A>(p);
  const DirectFrame frame = {p.in_h, p.in_stride_h, p.in_stride_m, p.depth, p.pad_h, p.out_w, p.out_stride_h, p.activation};
  for (int64_t tile; next_tile(tiles, &tile);) {
    const int64_t plane = tile / row_tiles;
    const int64_t n = plane / p.channels;
    const int64_t c = plane % p.channels;
    const int64_t y = (tile % row_tiles) * args.rows_per_tile;
    const int64_t rows = y + args.rows_per_tile < p.out_h ? args.rows_per_tile : p.out_h - y;
    const T* const input = input_begin + n * p.in_stride_n + c * p.in_stride_c;
    O* const out = static_cast<O*>(args.output) + n * p.out_stride_n + c * p.out_stride_c + y * p.out_stride_h;
    const DirectTile<T, O, A> here = {
        input + (y - p.pad_h) * p.in_stride_h - p.pad_w,
        static_cast<const A*>(args.weight) + c * p.depth * kKernel * kKernel,
        args.bias ? static_cast<const A*>(args.bias)[c] : A(0),
        out,
        y,
        rows,
        out + (rows - 1) * p.out_stride_h + p.out_w - kLanes<A>,
        input - input_begin >= p.pad_w && input_end - input >= needed,
    };
    direct_plane<T, O, A, kKernel>(frame, here, masks);
  }
}

inline constexpr Layout depthwise_forward_nchw_direct_weight_order = Layout::kNCHW;

// Bytes of scratch a worker needs.
template <class T>
int64_t depthwise_forward_nchw_direct_scratch(const DepthwiseProblem& p, int64_t) {
  constexpr int64_t kVec = kLanes<typename AccumulateType<T>::type>;
  return (p.out_w + kVec - 1) / kVec * (p.kernel_w + 1) * static_cast<int64_t>(sizeof(LaneMask));
}

}  // namespace dwconv::DWCONV_ISA
