// The walk down the rows of a strip of outputs, straight from global memory to registers (the formula: taps.cuh).
//
// A thread reads each row of its input once and adds it to all the output rows that it reaches; those in progress rotate:
//
//     row j --+--> out row i      tap j - i * S
//             +--> out row i - 1  tap j - (i - 1) * S, complete when its last row is in
//
// While a row is multiplied, the next ones are on their way. There is no barrier and no shared memory, so that registers alone
// decide how many blocks run together, which is what hides the latency of memory.
#pragma once

#include "cuda/kernels/taps.cuh"

namespace dwconv::cuda {

// Bit q: column x0 + q lies in 0 .. width.
template <int kCount>
DWCONV_DEVICE unsigned columns_inside(int x0, int width) {
  int mask = 0;
#pragma unroll
  for (int q = 0; q < kCount; ++q) mask |= static_cast<unsigned>(x0 + q) < static_cast<unsigned>(width) ? 1 << q : 0;
  in_order(mask);  // else its comparisons are made anew in each row
  return static_cast<unsigned>(mask);
}

// The input rows of a strip one after the other, from first_y; those inside the image of in_h rows may be read.
template <class T>
struct InputRows {
  const char* line;
  int64_t step;  // bytes
  int y, end;
  DWCONV_DEVICE InputRows(const T* image, int64_t stride_h, int first_y, int rows, int in_h)
      : line(reinterpret_cast<const char*>(image + first_y * stride_h)),
        step(stride_h * static_cast<int64_t>(sizeof(T))),
        y(first_y),
        end(most(least(first_y + rows, in_h), 0)) {}
  DWCONV_DEVICE bool inside() const { return static_cast<unsigned>(y) < static_cast<unsigned>(end); }
  DWCONV_DEVICE const T* next() {
    const char* const row = line;
    line += step, ++y;
    return reinterpret_cast<const T*>(row);
  }
};

// `rows` rows of kColumns outputs of V channels. Row holds the kSpan samples of one input row; kAhead steps of S rows are on
// their way beside the one that is multiplied, as many as the registers hold: 0, 1 or as many as there are output rows in
// progress.
//   fetch(row)                 begins to read the next input row; the strip reads each once, from the first to the last
//   prepare(filter, bias)      once, behind the first reads
//   widen(row, q, value)       sample q of a row in the type of the sums
//   finish(acc)                the next complete output row
template <class Taps, int kColumns, int V, int kAhead, class Row, class A, class Fetch, class Prepare, class Widen, class Finish>
DWCONV_DEVICE void walk_rows(int rows, const Fetch& fetch, const Prepare& prepare, const Widen& widen, const Finish& finish) {
  constexpr int K = Taps::kKernel, S = Taps::kStride, kSpan = Taps::span(kColumns);
  constexpr int kDelay = (K - 1) / S, kOpen = kDelay + 1;  // a row is complete kDelay rows after it was begun
  constexpr int kRing = kAhead > 0 ? kAhead : 1;
  static_assert(kAhead <= 1 || kAhead == kOpen);
  Row next[kRing][S];
  // Step i reads the input rows i * S .. i * S + S - 1.
  const auto fetch_step = [&](Row(&to)[S]) {
#pragma unroll
    for (int s = 0; s < S; ++s) fetch(to[s]);
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) fetch_step(next[i]);
  A filter[K][K][V], bias[V], acc[kOpen][kColumns][V] = {};  // of rows before the first, which are never stored
  prepare(filter, bias);
  int left = rows + kDelay;  // steps
  while (left > 0) {
#pragma unroll
    for (int u = 0; u < kOpen; ++u) {
      if (left <= 0) break;
      if (kAhead == 0) fetch_step(next[0]);
      Row copy[S];
      if (kAhead == 1) {
#pragma unroll
        for (int s = 0; s < S; ++s) copy[s] = next[0][s];
        if (left > 1) fetch_step(next[0]);
      }
      // A copy of a row of several would be made from one loop to the next, where it would wait for all that are on their way.
      const Row(&now)[S] = kAhead == 1 ? copy : next[u % kRing];
#pragma unroll
      for (int s = 0; s < S; ++s) {
#pragma unroll
        for (int q = 0; q < kSpan; ++q) {  // one sample at a time: a row of them would not fit the registers beside the sums
          A value[V];
          widen(now[s], q, value);
#pragma unroll
          for (int d = 0; d <= kDelay; ++d) {  // output row i - d; those that do not exist are never stored
            const int r = S * d + s, open = (u - d + kOpen) % kOpen;
            if (r >= K) continue;
#pragma unroll
            for (int x = 0; x < kColumns; ++x) {
              const int k = q - x * S;
              if (k < 0 || k >= K) continue;
#pragma unroll
              for (int v = 0; v < V; ++v) {  // an output begins with its first tap
                acc[open][x][v] = filter[r][k][v] * value[v] + (r == 0 && k == 0 ? bias[v] : acc[open][x][v]);
              }
            }
          }
        }
      }
      if (kAhead > 1 && left > kAhead) fetch_step(next[u % kRing]);
      if (left <= rows) finish(acc[(u + 1) % kOpen]);
      --left;
    }
  }
}

}  // namespace dwconv::cuda
