// A convolution in one dimension is an image of one row. Tiles are made of rows: one of kilobytes a pixel leaves the caches
// before the next tap reads it, and of one image a single thread runs. Hence what meets no padding is cut into segments, the rows
// of an image whose rows overlap; the ends are images of their own:
//
//   padding | first |  segment  |  segment  | ... |  segment  | last | padding
#pragma once

#include <algorithm>
#include <bit>
#include <vector>

#include "common/axis.h"
#include "cpu/kernels/args.h"

namespace dwconv {

struct Piece {
  CpuProblem problem;
  int64_t first_in = 0, first_out = 0;  // where its columns begin in the row
};

// Of a forward problem, and of its weight gradient; the problem itself where it is no long row. A function of the problem alone:
// no result depends on the number of threads.
inline std::vector<Piece> pieces_of(const CpuProblem& p) {
  constexpr int64_t kBytes = 128 << 10, kLeast = 32, kMost = 512, kVectorBytes = 64;
  const bool staged = p.layout == Layout::kNCHW && p.stride_w > 1;  // whose kernels copy rows of a vector of planes
  if (p.in_h != 1 || p.out_h != 1 || p.kernel_h != 1 || p.depth != 1 || !(staged || p.layout == Layout::kNHWC)) return {{p}};
  const int64_t pixel = staged ? kVectorBytes : p.channels * element_size(p.dtype);
  const int64_t wanted = std::clamp(kBytes / std::max<int64_t>(pixel * p.stride_w, 1), kLeast, kMost);
  const int64_t size = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(wanted)));
  const int64_t reach = (p.kernel_w - 1) * p.dilation_w + 1;
  // The outputs whose samples all exist.
  const int64_t first = std::max<int64_t>(-floor_div(-p.pad_w, p.stride_w), 0);
  const int64_t end = std::min(floor_div(p.in_w - reach + p.pad_w, p.stride_w) + 1, p.out_w);
  const int64_t segments = (end - first) / size;
  if (segments < 2) return {{p}};
  std::vector<Piece> pieces;
  const auto add = [&](int64_t out, int64_t outputs, int64_t rows) {
    const int64_t sample = out * p.stride_w - p.pad_w;  // the first that it reads
    Piece piece = {p, std::clamp<int64_t>(sample, 0, p.in_w - 1), out};
    CpuProblem& q = piece.problem;
    // Outputs that lie behind the image see padding alone, as if they lay before it.
    q.pad_w = sample < p.in_w ? piece.first_in - sample : (outputs - 1) * p.stride_w + reach;
    q.out_w = outputs;
    q.in_w = std::clamp<int64_t>((outputs - 1) * p.stride_w + reach - q.pad_w, 1, p.in_w - piece.first_in);
    if (rows > 1) {
      q.in_h = q.out_h = rows;
      q.in_stride_h = outputs * p.stride_w * p.in_stride_w, q.out_stride_h = outputs * p.out_stride_w;
    }
    pieces.push_back(piece);
  };
  if (first > 0) add(0, first, 1);
  add(first, size, segments);
  if (const int64_t last = first + segments * size; last < p.out_w) add(last, p.out_w - last, 1);
  return pieces;
}

}  // namespace dwconv
