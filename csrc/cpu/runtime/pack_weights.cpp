#include "cpu/runtime/pack_weights.h"

#include <string.h>

#include <algorithm>
#include <type_traits>

#include "cpu/runtime/with_type.h"

namespace dwconv {

void pack_depthwise(DType dtype, const void* weight, const DepthwisePacking& k, int64_t first, int64_t depth, void* packed) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = typename AccumulateType<T>::type;
    const T* const from = static_cast<const T*>(weight);
    A* to = static_cast<A*>(packed);
    const int64_t filter = k.kernel_h * k.kernel_w;
    const auto tap = [&](int64_t r, int64_t s) {
      return (k.rows.begin + r * k.rows.step) * k.kernel_w + k.columns.begin + s * k.columns.step;
    };
    if (k.order == Layout::kNHWC) {
      constexpr int64_t kGroup = 4;  // channels transposed together: one store, twice as fast as one by one
      const int64_t taps = k.rows.count * k.columns.count, channel = k.multiplier * filter;
      for (int64_t m = first; m < first + depth; ++m, to += taps * k.pitch) {
        const auto transpose = [&](int64_t c, auto count) {
          const T* const source = from + c * channel + m * filter;
          A* group = to + c;
          for (int64_t r = 0; r < k.rows.count; ++r) {
            for (int64_t s = 0; s < k.columns.count; ++s, group += k.pitch) {
              A values[count];
              for (int i = 0; i < count; ++i) values[i] = to_accumulate(source[i * channel + tap(r, s)]);
              for (int i = 0; i < count; ++i) group[i] = values[i];
            }
          }
        };
        int64_t c = 0;
        for (; c + kGroup <= k.channels; c += kGroup) transpose(c, std::integral_constant<int, kGroup>{});
        for (; c < k.channels; ++c) transpose(c, std::integral_constant<int, 1>{});
        for (int64_t t = 0; t < taps; ++t) {
          A* const row = to + t * k.pitch;
          for (c = k.channels; c < k.pitch; ++c) row[c] = row[c - k.channels];
        }
      }
      return;
    }
    for (int64_t c = 0; c < k.channels; ++c) {
      for (int64_t m = first; m < first + depth; ++m) {
        for (int64_t r = 0; r < k.rows.count; ++r) {
          for (int64_t s = 0; s < k.columns.count; ++s) *to++ = to_accumulate(from[(c * k.multiplier + m) * filter + tap(r, s)]);
        }
      }
    }
  });
}

void pack_bias(DType dtype, const void* vector, int64_t channels, int64_t multiplier, int64_t m, int64_t count, void* packed) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = typename AccumulateType<T>::type;
    A* const to = static_cast<A*>(packed);
    for (int64_t c = 0; c < count; ++c) {
      to[c] = c < channels ? to_accumulate(static_cast<const T*>(vector)[c * multiplier + m]) : to[c - channels];
    }
  });
}

void widen(DType dtype, const void* values, int64_t count, void* wide) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = typename AccumulateType<T>::type;
    for (int64_t i = 0; i < count; ++i) static_cast<A*>(wide)[i] = to_accumulate(static_cast<const T*>(values)[i]);
  });
}

namespace {

// Channels of a panel, the padding included.
int64_t padded_depth(const PointwiseFormat& format, int64_t channels) { return round_up(channels, format.depth_multiple); }

// (out_channels, channels) into the panels of the format (problem.h).
void pack_pointwise_panels(DType dtype, const void* weight, int64_t out_channels, int64_t channels, const PointwiseFormat& format,
                           void* packed) {
  const int64_t depth = padded_depth(format, channels);
  const auto pack = [&](auto group, auto convert, auto zero) {  // `group` channels of an output channel side by side
    using T = decltype(zero);
    using P = decltype(convert(zero));
    const T* const from = static_cast<const T*>(weight);
    P* to = static_cast<P*>(packed);
    for (int64_t j = 0; j < out_channels; j += format.panel) {
      for (int64_t k = 0; k < depth; k += group) {
        for (int64_t i = 0; i < format.panel; ++i) {
          for (int64_t g = k; g < k + group; ++g)
            *to++ = j + i < out_channels && g < channels ? convert(from[(j + i) * channels + g]) : P{};
        }
      }
    }
  };
  if (format.dtype == DType::kBFloat16) {
    if (dtype == DType::kBFloat16) return pack(2, [](BFloat16 value) { return value; }, BFloat16{});
    const auto narrowed = [](float value) {
      BFloat16 narrow;
      from_accumulate(value, &narrow);
      return narrow;
    };
    return pack(2, narrowed, float{});
  }
  with_type(dtype, [&](auto zero) { pack(1, [](auto value) { return to_accumulate(value); }, zero); });
}

// Where each kind begins, in bytes.
struct BlockPlaces {
  int64_t dw_weight, dw_weight_planes, dw_bias, pw_weight, pw_bias, end;
};

constexpr int64_t kLine = 64;

BlockPlaces block_places(const BlockFormat& f) {
  const int64_t unit = f.dtype == DType::kFloat64 ? 8 : 4, narrow = f.pointwise.dtype == DType::kBFloat16 ? 2 : unit;
  const int64_t outputs = round_up(f.out_channels, f.pointwise.panel);
  int64_t end = 0;
  const auto place = [&](int64_t bytes) {
    const int64_t begin = end;
    end = round_up(end + bytes, kLine);
    return begin;
  };
  place(sizeof(BlockFormat));
  BlockPlaces places;
  places.dw_weight = place(f.kernel_h * f.kernel_w * f.pitch * unit);
  places.dw_weight_planes = place(f.kernel_h * f.kernel_w * f.channels * unit);
  places.dw_bias = place(f.kernel_h > 0 ? f.pitch * unit : 0);
  places.pw_weight = place(outputs * padded_depth(f.pointwise, f.channels) * narrow);
  places.pw_bias = place(outputs * unit);
  places.end = end;
  return places;
}

}  // namespace

int64_t block_bytes(const BlockFormat& format) { return block_places(format).end; }

void pack_block(const BlockFormat& f, DType dtype, const BlockWeights& weights, void* packed) {
  char* const to = static_cast<char*>(packed);
  const BlockPlaces at = block_places(f);
  // What lies between the kinds, less than a line each, too: packed twice is the same bytes.
  memset(packed, 0, at.pw_weight);
  memset(to + at.pw_bias - kLine, 0, at.end - at.pw_bias + kLine);
  memcpy(packed, &f, sizeof f);
  if (weights.dw_weight != nullptr) {
    DepthwisePacking packing = {f.channels,    1,      f.kernel_h, f.kernel_w, {0, 1, f.kernel_h}, {0, 1, f.kernel_w},
                                Layout::kNHWC, f.pitch};
    pack_depthwise(dtype, weights.dw_weight, packing, 0, 1, to + at.dw_weight);
    packing.order = Layout::kNCHW;
    pack_depthwise(dtype, weights.dw_weight, packing, 0, 1, to + at.dw_weight_planes);
  }
  if (weights.dw_bias != nullptr) pack_bias(dtype, weights.dw_bias, f.channels, 1, 0, f.pitch, to + at.dw_bias);
  pack_pointwise_panels(dtype, weights.pw_weight, f.out_channels, f.channels, f.pointwise, to + at.pw_weight);
  if (weights.pw_bias != nullptr) widen(dtype, weights.pw_bias, f.out_channels, to + at.pw_bias);
}

bool is_packed_for(const BlockFormat& format, const void* packed) {
  static_assert(std::has_unique_object_representations_v<BlockFormat>);
  return memcmp(&format, packed, sizeof format) == 0;
}

BlockWeights packed_weights(const BlockFormat& format, const void* packed) {
  const char* const from = static_cast<const char*>(packed);
  const BlockPlaces at = block_places(format);
  return {from + at.dw_weight, from + at.dw_bias, from + at.pw_weight, from + at.pw_bias, from + at.dw_weight_planes};
}

void reduce_parts(DType dtype, const void* partial, int64_t parts, int64_t channels, int64_t taps, void* to,
                  int64_t to_stride_c) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = typename AccumulateType<T>::type;
    const A* const from = static_cast<const A*>(partial);
    T* const out = static_cast<T*>(to);
    constexpr int64_t kChunk = 64;  // channels at a time, for whole cache lines and vectors
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t c = 0; c < channels; c += kChunk) {
        const int64_t count = std::min(kChunk, channels - c);
        A sum[kChunk] = {};
        for (int64_t part = 0; part < parts; ++part) {
          const A* const row = from + (part * taps + tap) * channels + c;
          for (int64_t i = 0; i < count; ++i) sum[i] += row[i];
        }
        for (int64_t i = 0; i < count; ++i) from_accumulate(sum[i], out + (c + i) * to_stride_c + tap);
      }
    }
  });
}

}  // namespace dwconv
