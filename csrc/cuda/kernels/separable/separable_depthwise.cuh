// The depthwise stage of the fused block: a slab (128 bytes) of channels of the tile's pixels, convolved, biased, activated and
// rounded to the operand that the pointwise product reads from shared memory (warp_tile.cuh).
//
//   channels_last: rows of 128 bytes a pixel, swizzled; a thread makes V channels of kRun neighbouring pixels.
//   NCHW:          a line of pixels a channel, `pitch` elements apart; a thread makes kRun neighbouring pixels of one channel.
#pragma once

#include "cuda/kernels/activate.cuh"
#include "cuda/kernels/depthwise_forward/depthwise_rows.cuh"
#include "cuda/kernels/group_tile.cuh"

namespace dwconv::cuda {

constexpr int kRun = 4;

// The depthwise stage's filter: K x K at stride S, or any (K = 0).
template <int K, int S>
struct Stage {
  static constexpr int kKernel = K, kStride = S;
  static constexpr bool kConvolves = true;
};
// No filter: the input, in channels_last, is passed on, for a pointwise convolution alone.
struct PassThrough {
  static constexpr int kKernel = 1, kStride = 1;
  static constexpr bool kConvolves = false;
};

// Where the tile's rows, of all images one below the other, and its pixels lie; in shared memory, so that nothing is divided
// later.
struct TileMap {
  struct Row {
    int64_t image;  // offset of the row's image in the input
    int32_t y;
    int32_t exists;
  };
  int64_t* pixel;   // offset of output channel 0 in the output, or -1
  int64_t* source;  // PassThrough: offset of channel 0 in the input, or -1
  int64_t* gate;    // PassThrough: offset of channel 0 in the gate
  Row* row;
  int x0;
};

template <bool kChannelsLast, bool kConvolves>
DWCONV_DEVICE void fill_map(const SeparableBlockArgs& args, int64_t row0, const TileMap& map) {
  const DepthwiseProblem& p = args.problem;
  const int64_t rows = p.batch * p.out_h;
  const ImageNumbers numbers(row0, p.out_h, args.image_rows);
  for (int i = thread_index(); i < args.pixels; i += block_size()) {
    const int tile_row = quotient(i, args.tile_columns), x = map.x0 + i - tile_row * args.tile_w;
    const int64_t row = row0 + tile_row;
    const int64_t offset = kChannelsLast ? (row * p.out_w + x) * args.out_channels
                                         : numbers.offset(tile_row, args.out_channels * p.out_h * p.out_w, p.out_w) + x;
    const bool exists = tile_row < args.tile_rows && row < rows && x < p.out_w;
    map.pixel[i] = exists ? offset : -1;
    if (!kConvolves) {
      map.source[i] = exists ? numbers.offset(tile_row, p.in_stride_n, p.in_stride_h) + x * p.in_stride_w : -1;
      map.gate[i] = numbers.offset(tile_row, p.channels, 0);
    }
  }
  for (int i = thread_index(); i < args.tile_rows; i += block_size()) {
    map.row[i] = {numbers.offset(i, p.in_stride_n, 0), numbers.inner(i), row0 + i < rows};
  }
}

// filters[tap * channels + channel] of a slab, from weight[channel][tap]; zeros past the last channel.
template <class T, class S>
DWCONV_DEVICE void stage_slab_filters(const SeparableBlockArgs& args, int slab, accumulate_t<T>* filters) {
  constexpr int kSlab = kSlabBytes / static_cast<int>(sizeof(T));
  const int64_t c = static_cast<int64_t>(slab) * kSlab, left = args.problem.channels - c;
  constexpr int kTaps = S::kKernel * S::kKernel;
  const int taps = kTaps > 0 ? kTaps : static_cast<int>(args.problem.kernel_h * args.problem.kernel_w);
  stage_filters(filters, static_cast<const T*>(args.dw_weight) + c * taps, taps, kSlab,
                static_cast<int>(left < kSlab ? left : kSlab), false);
}

template <class A, int V>
DWCONV_DEVICE void read_shared(const A* from, A (&to)[V]) {
  constexpr int kWidth = V < kChunkValues<A> ? V : kChunkValues<A>;
#pragma unroll
  for (int i = 0; i < V; i += kWidth) {
    const Vector<A, kWidth> run = *reinterpret_cast<const Vector<A, kWidth>*>(from + i);
#pragma unroll
    for (int v = 0; v < kWidth; ++v) to[i + v] = run.value[v];
  }
}

// One row of a filter over one row of the input.
template <class S, int V, class A>
DWCONV_DEVICE void add_filter_row(const A (&w)[S::kKernel][V], int q, const A (&value)[V], A (&acc)[kRun][V]) {
#pragma unroll
  for (int s = 0; s < S::kKernel; ++s) {
    const int i = (q - s) / S::kStride;
    if (q < s || i * S::kStride != q - s || i >= kRun) continue;
#pragma unroll
    for (int v = 0; v < V; ++v) acc[i][v] += w[s][v] * value[v];
  }
}

// channels_last. `image` points at the channel of the image's first pixel; filters[tap * pitch + v].
template <class T, class S, int V>
DWCONV_DEVICE void convolve_pixels(const DepthwiseProblem& p, const T* image, int y, int x, const accumulate_t<T>* filters,
                                   int pitch, accumulate_t<T> (&acc)[kRun][V]) {
  using A = accumulate_t<T>;
  const int in_h = static_cast<int>(p.in_h), in_w = static_cast<int>(p.in_w);
  if constexpr (S::kKernel > 0) {
    constexpr int K = S::kKernel, kSpan = (kRun - 1) * S::kStride + K;
    const int in_y = y * S::kStride - static_cast<int>(p.pad_h), in_x = x * S::kStride - static_cast<int>(p.pad_w);
    const unsigned inside = columns_inside<kSpan>(in_x, in_w);
    const T* const from = image + in_x * p.in_stride_w;
    // Rows on their way while one is multiplied, as many as the registers hold.
    constexpr int kRows = sizeof(T) * V * kSpan > 80 ? 1 : sizeof(T) * V * kSpan > 64 ? 2 : K;
    Packed<T, V> rows[kRows][kSpan];
    const auto fetch = [&](int r) {
      const int row = in_y + r;
      const bool wanted = row >= 0 && row < in_h;
      fetch_pixels(from + (wanted ? row * p.in_stride_h : 0), p.in_stride_w, wanted ? inside : 0, rows[r % kRows]);
    };
#pragma unroll
    for (int r = 0; r < kRows; ++r) fetch(r);
#pragma unroll(kRows == 1 ? 1 : K)
    for (int r = 0; r < K; ++r) {
      const Packed<T, V>(&in)[kSpan] = rows[r % kRows];
      A w[K][V];
#pragma unroll
      for (int s = 0; s < K; ++s) read_shared(filters + (r * K + s) * pitch, w[s]);
#pragma unroll
      for (int q = 0; q < kSpan; ++q) {
        A value[V];
        widen(in[q], value);
        add_filter_row<S, V>(w, q, value, acc);
      }
      if (r + kRows < K) fetch(r + kRows);
    }
  } else {
    const int kernel_w = static_cast<int>(p.kernel_w);
    for (int r = 0; r < static_cast<int>(p.kernel_h); ++r) {
      const int64_t row = y * p.stride_h + r * p.dilation_h - p.pad_h;
      if (row < 0 || row >= p.in_h) continue;
      for (int s = 0; s < kernel_w; ++s) {
        A w[V];
        read_shared(filters + (r * kernel_w + s) * pitch, w);
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          const int64_t column = (x + i) * p.stride_w + s * p.dilation_w - p.pad_w;
          if (column < 0 || column >= p.in_w) continue;
          const Vector<T, V> in = load<V>(image + row * p.in_stride_h + column * p.in_stride_w);
#pragma unroll
          for (int v = 0; v < V; ++v) acc[i][v] += w[v] * to_accumulate(in.value[v]);
        }
      }
    }
  }
}

// NCHW: kSpan values of a row, zeros where the mask has no bit. From value kHead on they are read 4 at a time where they lie so.
template <int kSpan, int kHead, class T>
DWCONV_DEVICE void fetch_run(const T* row, unsigned mask, accumulate_t<T> (&to)[kSpan]) {
  const bool vectors = reinterpret_cast<uintptr_t>(row + kHead) % (4 * sizeof(T)) == 0;
#pragma unroll
  for (int q = 0; q < kSpan; ++q) {
    const int start = q < kHead ? q : q - (q - kHead) % 4;  // of the 4 that q belongs to
    if (q < kHead || start + 4 > kSpan) {
      to[q] = mask >> q & 1 ? load_one(row + q) : accumulate_t<T>(0);
    } else if (q == start) {
      if (vectors && sizeof(T) <= 4 && (mask >> q & 15) == 15) {
        constexpr int kWidth = sizeof(T) <= 4 ? 4 : 1;
        const Vector<T, kWidth> run = load<kWidth>(row + q);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) to[q + k] = to_accumulate(run.value[k]);
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) to[q + k] = mask >> (q + k) & 1 ? load_one(row + q + k) : accumulate_t<T>(0);
      }
    }
  }
}

// NCHW. `image` points at the channel's plane; filters[tap * pitch].
template <class T, class S>
DWCONV_DEVICE void convolve_plane(const DepthwiseProblem& p, const T* image, int y, int x, const accumulate_t<T>* filters,
                                  int pitch, accumulate_t<T> (&acc)[kRun][1]) {
  using A = accumulate_t<T>;
  const int in_h = static_cast<int>(p.in_h), in_w = static_cast<int>(p.in_w);
  if constexpr (S::kKernel > 0) {
    constexpr int K = S::kKernel, kSpan = (kRun - 1) * S::kStride + K;
    const int in_y = y * S::kStride - static_cast<int>(p.pad_h), in_x = x * S::kStride - static_cast<int>(p.pad_w);
    const unsigned inside = columns_inside<kSpan>(in_x, in_w);
#pragma unroll
    for (int r = 0; r < K; ++r) {
      if (in_y + r < 0 || in_y + r >= in_h) continue;
      A in[kSpan], w[K][1];
      fetch_run<kSpan, K / 2>(image + (in_y + r) * p.in_stride_h + in_x, inside, in);
#pragma unroll
      for (int s = 0; s < K; ++s) w[s][0] = filters[(r * K + s) * pitch];
#pragma unroll
      for (int q = 0; q < kSpan; ++q) {
        const A value[1] = {in[q]};
        add_filter_row<S, 1>(w, q, value, acc);
      }
    }
  } else {
    convolve_pixels<T, S, 1>(p, image, y, x, filters, pitch, acc);
  }
}

// Rounded to the type of the product's operand.
template <class T, bool kRoundTf32, int V>
DWCONV_DEVICE Packed<T, V> pack_operand(const accumulate_t<T> (&value)[V]) {
  if constexpr (kRoundTf32) {
    float rounded[V];
#pragma unroll
    for (int v = 0; v < V; ++v) rounded[v] = round_tf32(value[v]);
    return pack<T, V>(rounded);
  } else {
    return pack<T, V>(value);
  }
}

// V channels of one pixel to the slot.
template <class T, int V, bool kRoundTf32>
DWCONV_DEVICE void write_pixel(unsigned char* slot, int pixel, int lane, const accumulate_t<T> (&value)[V]) {
  constexpr int kBytes = V * static_cast<int>(sizeof(T));
  const int byte = lane * kBytes;
  *reinterpret_cast<Packed<T, V>*>(slot + swizzled(pixel, byte / kChunkBytes) + byte % kChunkBytes) =
      pack_operand<T, kRoundTf32>(value);
}

// channels_last; V > 1: runs of V channels lie on multiples of their size.
template <class T, class S, int V, bool kRoundTf32>
DWCONV_DEVICE void produce_pixels(const SeparableBlockArgs& args, const TileMap& map, int slab, const accumulate_t<T>* filters,
                                  unsigned char* slot) {
  using A = accumulate_t<T>;
  constexpr int kSlab = kSlabBytes / static_cast<int>(sizeof(T)), kLanes = kSlab / V;
  const DepthwiseProblem& p = args.problem;
  const int lane = thread_index() % kLanes, runs_w = args.run_columns.divisor;  // block_size() is a multiple of kLanes
  const int64_t c = static_cast<int64_t>(slab) * kSlab + lane * V;
  const T* const channel = static_cast<const T*>(args.input) + (c < p.channels ? c : 0) * p.in_stride_c;
  for (int run = thread_index() / kLanes; run < args.tile_rows * runs_w; run += block_size() / kLanes) {
    const int tile_row = quotient(run, args.run_columns), column = (run - tile_row * runs_w) * kRun;
    const TileMap::Row row = map.row[tile_row];
    A acc[kRun][V] = {};
    if (row.exists && c < p.channels && map.x0 + column < p.out_w) {
      if (args.dw_bias != nullptr) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const A bias = c + v < p.channels ? load_bias<T>(args.dw_bias, c + v, args.wide_bias) : A(0);
#pragma unroll
          for (int k = 0; k < kRun; ++k) acc[k][v] = bias;
        }
      }
      convolve_pixels<T, S, V>(p, channel + row.image, row.y, map.x0 + column, filters + lane * V, kSlab, acc);
      activate_all(p.activation, acc);
    }
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      if (column + k < args.tile_w) write_pixel<T, V, kRoundTf32>(slot, tile_row * args.tile_w + column + k, lane, acc[k]);
    }
  }
}

// A run of a pixel's channels, times those of the gate; zeros where not wanted.
template <class T>
DWCONV_DEVICE void gate_chunk(const T* from, const T* gate, bool wanted, unsigned char* to) {
  constexpr int V = kChunkValues<T>;
  accumulate_t<T> value[V], by[V];
  widen(load_packed<V>(from, wanted), value);
  widen(load_packed<V>(gate, wanted), by);
#pragma unroll
  for (int v = 0; v < V; ++v) value[v] *= by[v];
  *reinterpret_cast<Packed<T, V>*>(to) = pack<T, V>(value);
}

// PassThrough: complete with the weights' copies.
template <class T>
DWCONV_DEVICE void pass_pixels(const SeparableBlockArgs& args, const TileMap& map, int slab, unsigned char* slot) {
  constexpr int kSlab = kSlabBytes / static_cast<int>(sizeof(T)), kValues = kChunkValues<T>;
  const DepthwiseProblem& p = args.problem;
  int thread = thread_index();
  in_order(thread);  // not kept in registers beside the sums from before the product
  const int chunk = thread % kChunks, step = block_size() / kChunks;  // a multiple of the 8 pixels of a swizzle
  const int64_t c = static_cast<int64_t>(slab) * kSlab + chunk * kValues, left = p.channels - c;
  const T* const input = static_cast<const T*>(args.input) + c * p.in_stride_c;
  unsigned char* to = slot + swizzled(thread / kChunks, chunk);
  for (int pixel = thread / kChunks; pixel < args.pixels; pixel += step, to += step * kSlabBytes) {
    const int64_t source = map.source[pixel];
    const bool valid = source >= 0 && left > 0;
    const T* const gate = static_cast<const T*>(args.gate) + map.gate[pixel] + c;
    if (args.aligned_in && args.gate == nullptr) {
      copy_async(to, input + source, valid);
    } else if (args.aligned_in) {
      gate_chunk(input + source, gate, valid, to);
    } else {
#pragma unroll
      for (int v = 0; v < kValues; ++v) {
        const bool wanted = valid && v < left;
        T value = wanted ? load<1>(input + source + v * p.in_stride_c).value[0] : zero<T>();
        if (wanted && args.gate != nullptr) value = from_accumulate<T>(to_accumulate(value) * load_one(gate + v));
        reinterpret_cast<T*>(to)[v] = value;
      }
    }
  }
}

// Where NCHW's slot holds a pixel of a channel.
template <class T, bool kLines>
DWCONV_DEVICE T* slot_value(T* slot, int pitch, int channel, int pixel) {
  if constexpr (kLines) return slot + line_byte(channel, pixel) / static_cast<int>(sizeof(T));
  return slot + channel * pitch + pixel;
}

// NCHW.
template <class T, class S, bool kRoundTf32, bool kLines>
DWCONV_DEVICE void produce_planes(const SeparableBlockArgs& args, const TileMap& map, int slab, const accumulate_t<T>* filters,
                                  T* slot, int pitch) {
  using A = accumulate_t<T>;
  constexpr int kSlab = kSlabBytes / static_cast<int>(sizeof(T));
  const DepthwiseProblem& p = args.problem;
  const int runs_w = args.run_columns.divisor, runs = args.tile_rows * runs_w, out_w = static_cast<int>(p.out_w);
  for (int i = thread_index(); i < runs * kSlab; i += block_size()) {
    const int channel = quotient(i, args.runs), run = i - channel * runs;
    const int64_t c = static_cast<int64_t>(slab) * kSlab + channel;
    const int tile_row = quotient(run, args.run_columns), column = (run - tile_row * runs_w) * kRun, x = map.x0 + column;
    const TileMap::Row row = map.row[tile_row];
    A acc[kRun][1] = {};
    if (row.exists && c < p.channels && x < out_w) {
      const T* const image = static_cast<const T*>(args.input) + row.image + c * p.in_stride_c;
      const A bias = args.dw_bias != nullptr ? load_bias<T>(args.dw_bias, c, args.wide_bias) : A(0);
#pragma unroll
      for (int k = 0; k < kRun; ++k) acc[k][0] = bias;
      convolve_plane<T, S>(p, image, row.y, x, filters + channel, kSlab, acc);
      activate_all(p.activation, acc);
    }
    const int pixel = tile_row * args.tile_w + column;
    T* const to = slot_value<T, kLines>(slot, pitch, channel, pixel);
    constexpr int kWidth = sizeof(T) <= 4 ? kRun : 1;
    const bool together = kLines ? pixel % kWidth == 0 : reinterpret_cast<uintptr_t>(to) % (kWidth * sizeof(T)) == 0;
    if (kWidth == kRun && column + kRun <= args.tile_w && together) {
      A run[kWidth];
#pragma unroll
      for (int k = 0; k < kWidth; ++k) run[k] = acc[k][0];
      *reinterpret_cast<Packed<T, kWidth>*>(to) = pack_operand<T, kRoundTf32>(run);
    } else {
#pragma unroll
      for (int k = 0; k < kRun; ++k) {
        if (column + k >= args.tile_w) break;
        T* const one = kLines ? slot_value<T, kLines>(slot, pitch, channel, pixel + k) : to + k;
        *reinterpret_cast<Packed<T, 1>*>(one) = pack_operand<T, kRoundTf32>(acc[k]);
      }
    }
  }
}

}  // namespace dwconv::cuda
