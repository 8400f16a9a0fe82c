// Depthwise forward for filters of one row and 2 to 4 taps at stride 1, the short filters of state-space models, both layouts;
// with the filter flipped, their input gradient. The lines of an image, each by itself:
//
//   out[n, c, y, x] = act(bias[c] + sum_{k < K} w[c, k] * in[n, c, y, x + k - P])
//
// Without staging: each sample comes to a thread in a wide access, from memory for the first that wants it and from L1 for its
// neighbour. Any activation is applied here: a pass over the output would move twice as much. A long one follows a rounding, as
// that pass would, so that all kernels give a stream's samples the same bits.
//
// NCHW: a thread owns runs of 16 bytes of a line, as far apart as the block's strips are wide; of the samples at a run's sides
// only those that the padding makes it need are loaded. channels_last: a thread owns 8 bytes of channels and walks along a piece
// of the line with the last K - 1 samples in registers and the next ones on their way.
//
// The plan guarantees: NCHW: lines and tensors are whole runs of 16 bytes, aligned; slab * strips == block_size().
// channels_last: those runs of channels are aligned; their number in the slab * pieces == block_size(), tile_w a multiple of
// pieces. Traffic: input and output once, in channels_last (1 + (K - 1) / piece) times the input.
#pragma once

#include "cuda/kernels/activate.cuh"

namespace dwconv::cuda {

// function(std::integral_constant<int, P>) of the line's padding, 0 <= P <= kMost, which the plan has seen.
template <int kMost, class Function>
DWCONV_DEVICE void with_padding(int pad, const Function& function) {
  if constexpr (kMost > 0) {
    if (pad != kMost) return with_padding<kMost - 1>(pad, function);
  }
  function(std::integral_constant<int, kMost>{});
}

// The samples that a run of outputs reads, and up to 4 at its sides, which are whole runs in or out of the line.
template <class T>
struct LineSamples {
  static constexpr int kRun = kChunkValues<T>, kSide = 4;
  Packed<T, kSide> before, after;
  Packed<T, kRun> run;

  // Around sample x of a line of `length`, for outputs whose taps reach from `left` samples before to `right` samples after.
  DWCONV_DEVICE LineSamples(const T* line, int x, int length, int left, int right)
      : before(load_packed<kSide>(line + x - kSide, left > 0 && x >= kSide && x - kSide < length)),
        after(load_packed<kSide>(line + x + kRun, right > 0 && x + kRun < length)),
        run(load_packed<kRun>(line + x, x < length)) {}
  DWCONV_DEVICE accumulate_t<T> operator[](int i) const {
    if (i < 0) return to_accumulate(unpacked(before).value[kSide + i]);
    if (i < kRun) return to_accumulate(unpacked(run).value[i]);
    return to_accumulate(unpacked(after).value[i - kRun]);
  }
};

// Where a thread of a NCHW block is: its line among the block's, whose number may be beyond the last, and its first run.
struct LineThread {
  int strips, q, x;
  int64_t line;
  DWCONV_DEVICE LineThread(const Tiling& t, int64_t slab, int tile, int run) {
    strips = block_size() / t.slab;
    q = thread_index() / strips;
    x = tile * t.tile_w + (thread_index() - q * strips) * run;
    line = slab * t.slab + q;
  }
};

template <class T, int K>
DWCONV_DEVICE void load_line_filter(const T* weight, bool flipped, accumulate_t<T> (&filter)[K]) {
#pragma unroll
  for (int k = 0; k < K; ++k) filter[k] = load_one(weight + (flipped ? K - 1 - k : k));
}

template <class T, class A, int N>
DWCONV_DEVICE void activate_as_a_pass(const Activation& activation, A (&x)[N]) {
  if (!is_inlined(activation.kind)) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = to_accumulate(from_accumulate<T>(x[i]));
  }
  activate_all(activation, x);
}

template <class T, int K>
DWCONV_KERNEL(kLineThreads, kLineBlocks)
depthwise_lines_nchw(DepthwiseTileArgs args) {
  using A = accumulate_t<T>;
  constexpr int kRun = LineSamples<T>::kRun;
  const DepthwiseProblem& p = args.problem;
  const Tiling& t = args.tiling;
  const int tile = block_index() % t.tiles_w;  // those of a line are neighbours
  const LineThread at(t, block_index() / t.tiles_w, tile, kRun);
  const int64_t plane = divided(at.line, p.out_h), n = divided(plane, p.channels);
  if (n >= p.batch) return;
  const int64_t y = at.line - plane * p.out_h, c = plane - n * p.channels;
  const int pad = static_cast<int>(p.pad_w), in_w = static_cast<int>(p.in_w);
  const int end = least((tile + 1) * t.tile_w, static_cast<int>(p.out_w));
  A filter[K];
  load_line_filter<T, K>(static_cast<const T*>(args.weight) + c * K, args.flipped != 0, filter);
  const A bias = args.bias != nullptr ? load_bias<T>(args.bias, c, args.wide_bias) : A(0);
  const T* const in = static_cast<const T*>(args.input) + n * p.in_stride_n + c * p.in_stride_c + y * p.in_stride_h;
  T* const out = static_cast<T*>(args.output) + n * p.out_stride_n + c * p.out_stride_c + y * p.out_stride_h;
#pragma unroll 1
  for (int x = at.x; x < end; x += at.strips * kRun) {
    const LineSamples<T> samples(in, x, in_w, pad, K - 1 - pad);
    A sums[kRun];
    with_padding<K - 1>(pad, [&](auto padding) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        sums[i] = bias;
#pragma unroll
        for (int k = 0; k < K; ++k) sums[i] += filter[k] * samples[i + k - decltype(padding)::value];
      }
    });
    activate_as_a_pass<T>(p.activation, sums);
    store_packed(out + x, pack<T, kRun>(sums));
  }
}

template <class T>
constexpr int kLineChannels = kLineBytes / static_cast<int>(sizeof(T));  // channels_last, a thread
constexpr int kLineGroup = 4;                                            // outputs a step, and samples on their way

// Where a thread of a channels_last block is: its first channel, its line, and the outputs that it walks along.
template <class T>
struct PieceThread {
  int lane, piece, pieces, x, end;
  int64_t channel;
  DWCONV_DEVICE PieceThread(const DepthwiseProblem& p, const Tiling& t, int64_t slab, int tile) {
    const int lanes = t.slab / kLineChannels<T>;
    pieces = block_size() / lanes, piece = thread_index() / lanes, lane = thread_index() - piece * lanes;
    channel = slab * t.slab + lane * kLineChannels<T>;
    const int length = t.tile_w / pieces;
    x = tile * t.tile_w + piece * length;
    end = least(x + length, static_cast<int>(p.out_w));
  }
};

// Sample x of a line of `length`; zeros where it is outside, or not before `end`.
template <int V, class T>
DWCONV_DEVICE Packed<T, V> fetch_sample(const T* line, int64_t stride, int x, int end, int length) {
  return load_packed<V>(line + x * stride, x < end && static_cast<unsigned>(x) < static_cast<unsigned>(length));
}

// The K - 1 samples before sample x.
template <int K, class T, int V>
DWCONV_DEVICE void begin_window(const T* line, int64_t stride, int x, int length, accumulate_t<T> (&window)[K - 1][V]) {
#pragma unroll
  for (int k = 0; k < K - 1; ++k) widen(fetch_sample<V>(line, stride, x - (K - 1) + k, x, length), window[k]);
}

// window: the K - 1 samples before the next; `sample` joins them.
template <int K, int V, class A>
DWCONV_DEVICE void move_window(A (&window)[K - 1][V], const A (&sample)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) {
#pragma unroll
    for (int k = 0; k + 1 < K - 1; ++k) window[k][v] = window[k + 1][v];
    window[K - 2][v] = sample[v];
  }
}

template <class T, int K>
DWCONV_KERNEL(kLineThreads, kPieceBlocks)
depthwise_lines_nhwc(DepthwiseTileArgs args) {
  using A = accumulate_t<T>;
  constexpr int V = kLineChannels<T>;
  const DepthwiseProblem& p = args.problem;
  const auto [slab, tile, y, n] = tile_of_block(args, block_index());
  const PieceThread<T> at(p, args.tiling, slab, tile);
  if (at.channel >= p.channels || at.x >= at.end) return;
  const int in_w = static_cast<int>(p.in_w), shift = K - 1 - static_cast<int>(p.pad_w);  // to an output's last tap
  const T* const in = static_cast<const T*>(args.input) + n * p.in_stride_n + y * p.in_stride_h + at.channel;
  T* out = static_cast<T*>(args.output) + n * p.out_stride_n + y * p.out_stride_h + at.x * p.out_stride_w + at.channel;
  Packed<T, V> next[kLineGroup];
#pragma unroll
  for (int i = 0; i < kLineGroup; ++i) next[i] = fetch_sample<V>(in, p.in_stride_w, at.x + shift + i, at.end + shift, in_w);
  A window[K - 1][V], filter[V][K], bias[V];
  begin_window<K>(in, p.in_stride_w, at.x + shift, in_w, window);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    load_line_filter<T, K>(static_cast<const T*>(args.weight) + (at.channel + v) * K, args.flipped != 0, filter[v]);
    bias[v] = args.bias != nullptr ? load_bias<T>(args.bias, at.channel + v, args.wide_bias) : A(0);
  }
#pragma unroll 1
  for (int x = at.x; x < at.end; x += kLineGroup) {
    A sums[kLineGroup][V];
#pragma unroll
    for (int i = 0; i < kLineGroup; ++i) {
      A sample[V];
      widen(next[i], sample);
      next[i] = fetch_sample<V>(in, p.in_stride_w, x + kLineGroup + shift + i, at.end + shift, in_w);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        sums[i][v] = bias[v];
#pragma unroll
        for (int k = 0; k < K - 1; ++k) sums[i][v] += filter[v][k] * window[k][v];
        sums[i][v] += filter[v][K - 1] * sample[v];
      }
      move_window<K>(window, sample);
    }
    flattened(sums, [&](A(&flat)[kLineGroup* V]) { activate_as_a_pass<T>(p.activation, flat); });
#pragma unroll
    for (int i = 0; i < kLineGroup; ++i) {
      if (x + i >= at.end) break;
      store_packed(out, pack<T, V>(sums[i]));
      out += p.out_stride_w;
    }
  }
}

}  // namespace dwconv::cuda
