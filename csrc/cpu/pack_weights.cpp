#include "pack_weights.h"

#include "scalar_types.h"

namespace dwconv {

namespace {

template <class Body>
void with_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kFloat64:
      return body(double{});
    case DType::kBFloat16:
      return body(BFloat16{});
    case DType::kFloat16:
      return body(Float16{});
  }
}

}  // namespace

void pack_depthwise(DType dtype, const void* weight, const DepthwisePacking& k, void* packed) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = typename AccumulateType<T>::type;
    const T* const from = static_cast<const T*>(weight);
    A* const to = static_cast<A*>(packed);
    for (int64_t c = 0; c < k.channels; ++c) {
      for (int64_t m = 0; m < k.multiplier; ++m) {
        const T* const filter = from + (c * k.multiplier + m) * k.kernel_h * k.kernel_w;
        for (int64_t r = 0; r < k.rows.count; ++r) {
          for (int64_t s = 0; s < k.columns.count; ++s) {
            const int64_t tap = (k.rows.begin + r * k.rows.step) * k.kernel_w + k.columns.begin + s * k.columns.step;
            to[c * k.stride_c + m * k.stride_m + r * k.stride_r + s * k.stride_s] = to_accumulate(filter[tap]);
          }
        }
      }
    }
  });
}

void pack_pointwise_panels(DType dtype, const void* weight, int64_t out_channels, int64_t channels, int64_t panel, void* packed) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = typename AccumulateType<T>::type;
    const T* const from = static_cast<const T*>(weight);
    A* to = static_cast<A*>(packed);
    for (int64_t j = 0; j < out_channels; j += panel) {
      for (int64_t k = 0; k < channels; ++k) {
        for (int64_t i = 0; i < panel; ++i) {
          *to++ = j + i < out_channels ? to_accumulate(from[(j + i) * channels + k]) : A(0);
        }
      }
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

void reduce_parts(DType dtype, const void* partial, int64_t parts, int64_t part_size, int64_t channels, int64_t taps,
                  int64_t stride_c, int64_t stride_t, void* to, int64_t to_stride_c) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = typename AccumulateType<T>::type;
    const A* const from = static_cast<const A*>(partial);
    T* const out = static_cast<T*>(to);
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        A sum = A(0);
        for (int64_t part = 0; part < parts; ++part) sum += from[part * part_size + c * stride_c + tap * stride_t];
        from_accumulate(sum, out + c * to_stride_c + tap);
      }
    }
  });
}

}  // namespace dwconv
