// Depthwise forward in NCHW for square filters of 3 and 5 without shared memory: for planes whose rows are whole runs of kBytes
// bytes, aligned to that, and a horizontal padding of half the filter (the formula: taps.cuh).
//
// A thread owns a strip of kBytes of output columns of one plane and walks down the rows of its tile (row_walk.cuh). It reads the
// columns above its strip as whole runs and the K - S at its sides one by one, which its neighbours bring to L1 as well.
//
//     lanes ->  strips of the tile's row, then planes
//
// Widths of 14 or 7 have short runs, but then neighbouring lanes still read neighbouring bytes, and planes follow one another.
//
// The plan guarantees: tile_w a multiple of the strip's columns, slab * tile_w / columns <= block_size(). Traffic: input (1 +
// halo rows), output once; a filter is read once a thread, from L1.
#pragma once

#include "cuda/kernels/activate.cuh"
#include "cuda/kernels/depthwise_forward/depthwise_nchw.cuh"
#include "cuda/kernels/row_walk.cuh"

namespace dwconv::cuda {

// The samples of one input row under a strip of kColumns outputs.
template <class T, class Taps, int kColumns>
struct PlaneRow {
  static constexpr int kLeft = Taps::kKernel / 2, kRun = Taps::kStride * kColumns;
  static constexpr int kRight = Taps::span(kColumns) - kLeft - kRun;
  static constexpr int kAhead = Taps::kKernel == 3 ? (Taps::kKernel - 1) / Taps::kStride + 1 : 1;  // steps, as in walk_rows
  Packed<T, 1> left[kLeft];
  Packed<T, kColumns> run[Taps::kStride];
  Packed<T, 1> right[kRight > 0 ? kRight : 1];

  // From the row's column above the strip's first output; bit q of the mask: sample q is inside, all of a run or none.
  DWCONV_DEVICE void fetch(const T* from, unsigned mask) {
#pragma unroll
    for (int s = 0; s < Taps::kStride; ++s) {
      run[s] = load_packed<kColumns>(from + s * kColumns, mask >> (kLeft + s * kColumns) & 1);
    }
#pragma unroll
    for (int i = 0; i < kLeft; ++i) left[i] = load_packed<1>(from + i - kLeft, mask >> i & 1);
#pragma unroll
    for (int i = 0; i < kRight; ++i) right[i] = load_packed<1>(from + kRun + i, mask >> (kLeft + kRun + i) & 1);
  }
  DWCONV_DEVICE accumulate_t<T> sample(int q) const {
    const int at = q - kLeft;
    if (at < 0) return to_accumulate(unpacked(left[q]).value[0]);
    if (at < kRun) return to_accumulate(unpacked(run[at / kColumns]).value[at % kColumns]);
    return to_accumulate(unpacked(right[at - kRun]).value[0]);
  }
};

// Where a thread is: the tile of its block, its plane's number there, which may be beyond the slab, and its strip. Tiles of the
// same planes are neighbours: the rows that both read are still in L2.
struct PlaneThread {
  int tile_y, tile_x, q, strip;
  int64_t plane;

  DWCONV_DEVICE PlaneThread(const Tiling& t, int block, int columns) {
    tile_y = block % t.tiles_h;
    block /= t.tiles_h;
    const int strips = t.tile_w / columns;
    tile_x = block % t.tiles_w;
    q = thread_index() / strips, strip = thread_index() - q * strips;
    plane = static_cast<int64_t>(block / t.tiles_w) * t.slab + q;
  }
};

// activate(row): in place; taken(packed): a row of the thread's strip has been stored.
template <class T, class Taps, int kColumns, class Activate, class Taken>
DWCONV_DEVICE void convolve_plane_rows(const DepthwiseTileArgs& args, const PlaneThread& thread, const Activate& activate,
                                       const Taken& taken) {
  using A = accumulate_t<T>;
  constexpr int K = Taps::kKernel, S = Taps::kStride;
  using Row = PlaneRow<T, Taps, kColumns>;
  const DepthwiseProblem& p = args.problem;
  const Tiling& t = args.tiling;
  const auto [tile_y, tile_x, q, strip, plane] = thread;
  const int in_h = static_cast<int>(p.in_h), in_w = static_cast<int>(p.in_w);
  const int y0 = tile_y * t.tile_h, x0 = tile_x * t.tile_w + strip * kColumns;
  if (q >= t.slab || plane >= p.batch * p.channels || x0 >= static_cast<int>(p.out_w)) return;

  const int64_t n = divided(plane, p.channels), c = plane - n * p.channels;
  const int rows = least(t.tile_h, static_cast<int>(p.out_h) - y0), in_rows = (rows - 1) * S + K;
  const int in_y0 = y0 * S - static_cast<int>(p.pad_h);
  const unsigned inside = columns_inside<Taps::span(kColumns)>(x0 * S - Row::kLeft, in_w);
  const T* const in = static_cast<const T*>(args.input) + n * p.in_stride_n + c * p.in_stride_c + x0 * S;
  InputRows<T> lines(in, p.in_stride_h, in_y0, in_rows, in_h);
  const auto fetch = [&](Row& row) {
    const bool wanted = lines.inside();
    row.fetch(lines.next(), wanted ? inside : 0);
  };
  const auto prepare = [&](A(&filter)[K][K][1], A(&bias)[1]) {
    load_filter(static_cast<const T*>(args.weight) + c * (K * K), args.flipped, filter);
    bias[0] = args.bias != nullptr ? load_bias<T>(args.bias, c, args.wide_bias) : A(0);
  };
  const auto widen = [](const Row& row, int i, A(&value)[1]) { value[0] = row.sample(i); };
  T* out = static_cast<T*>(args.output) + n * p.out_stride_n + c * p.out_stride_c + y0 * p.out_stride_h + x0;
  const auto finish = [&](A(&row)[kColumns][1]) {
    activate(row);
    A flat[kColumns];
#pragma unroll
    for (int x = 0; x < kColumns; ++x) flat[x] = row[x][0];
    const Packed<T, kColumns> packed = pack<T, kColumns>(flat);
    store_packed(out, packed);
    out += p.out_stride_h;
    taken(packed);
  };
  walk_rows<Taps, kColumns, 1, Row::kAhead, Row, A>(rows, fetch, prepare, widen, finish);
}

template <class T, class Taps, int kBytes>
DWCONV_KERNEL(kPlaneRowThreads, plane_row_blocks(Taps::kKernel))
depthwise_rows_nchw(DepthwiseTileArgs args) {
  constexpr int kColumns = kBytes / static_cast<int>(sizeof(T));
  convolve_plane_rows<T, Taps, kColumns>(
      args, PlaneThread(args.tiling, block_index(), kColumns), [&](auto& row) { activate_short(args.problem.activation, row); },
      [](const Packed<T, kColumns>&) {});
}

}  // namespace dwconv::cuda
