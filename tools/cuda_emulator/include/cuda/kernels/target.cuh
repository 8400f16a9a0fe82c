// In the place of csrc/cuda/kernels/target.cuh, for the host's compiler: the same functions, over emulator.h.
#pragma once

#include <math.h>
#include <string.h>

#include "emulator.h"

#define DWCONV_ENTRY(Args, ...) reinterpret_cast<const void*>(&dwconv::cuda::emulator::call<Args, &__VA_ARGS__>)
#define DWCONV_DEVICE inline
#define DWCONV_KERNEL(threads, blocks) void
#define DWCONV_HAS_AMPERE 1
#define DWCONV_HAS_HOPPER 1

namespace dwconv::cuda {

inline int thread_index() { return emulator::self().index; }
inline int block_size() { return emulator::self().block_threads; }
inline int block_index() { return static_cast<int>(emulator::self().block); }
inline int64_t grid_size() { return emulator::self().grid; }
inline void synchronize() { emulator::barrier(); }
inline void synchronize_warp() { emulator::warp_barrier(); }
inline void wait_for_previous() { emulator::wait_for_previous(); }
inline unsigned char* shared_memory() { return emulator::self().shared; }

template <int V, class T>
inline Vector<T, V> load(const T* from) {
  emulator::note_load(from, sizeof(Vector<T, V>));
  Vector<T, V> value;
  memcpy(static_cast<void*>(&value), from, sizeof value);
  return value;
}

template <int V, class T>
inline Vector<T, V> load_written(const T* from) {
  return load<V>(from);
}

template <int V, class T>
inline void store(T* to, const Vector<T, V>& value) {
  emulator::note_store(to, sizeof value);
  memcpy(static_cast<void*>(to), &value, sizeof value);
}

template <class T, int V>
struct Packed {
  Vector<T, V> bits;
};
template <int V, class T>
inline Packed<T, V> load_packed(const T* from, bool wanted) {
  Packed<T, V> packed;
  memset(static_cast<void*>(&packed), 0, sizeof packed);
  if (wanted) packed.bits = load<V>(from);
  return packed;
}
template <class T, int V>
inline Vector<T, V> unpacked(const Packed<T, V>& packed) {
  return packed.bits;
}
inline float rounded(float value, float) { return value; }
inline double rounded(double value, double) { return value; }
inline __half rounded(float value, __half) { return __float2half_rn(value); }
inline __nv_bfloat16 rounded(float value, __nv_bfloat16) { return __float2bfloat16_rn(value); }
template <class T, int V>
inline Packed<T, V> pack(const accumulate_t<T> (&value)[V]) {
  Packed<T, V> packed;
  for (int v = 0; v < V; ++v) packed.bits.value[v] = rounded(value[v], T());
  return packed;
}
template <class T, int V>
inline void store_packed(T* to, const Packed<T, V>& packed) {
  store(to, packed.bits);
}

inline void copy_async(void* shared, const void* global, bool valid) { emulator::enqueue_copy(shared, global, valid); }
inline void copy_commit() { emulator::commit_copies(); }
template <int kPending>
inline void copy_wait() {
  emulator::complete_copies(kPending);
}

// ---- collectives of a warp, as PTX defines them
// ----------------------------------------------------------------------------------

struct MatrixLoad {
  uint32_t* matrix;
  const void* row;
};
inline void load_matrices_of_warp(void* const* operands) {
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const MatrixLoad& source = *static_cast<MatrixLoad*>(operands[8 * i + lane / 4]);
      memcpy(&static_cast<MatrixLoad*>(operands[lane])->matrix[i], static_cast<const char*>(source.row) + lane % 4 * 4, 4);
    }
  }
}
inline void load_matrices(uint32_t (&matrix)[4], const void* row) {
  MatrixLoad operands = {matrix, row};
  emulator::collective(load_matrices_of_warp, &operands);
}

inline void load_transposed_matrices_of_warp(void* const* operands) {
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < 4; ++i) {
      uint16_t halves[2];
      for (int which = 0; which < 2; ++which) {
        const MatrixLoad& source = *static_cast<MatrixLoad*>(operands[8 * i + lane % 4 * 2 + which]);
        memcpy(halves + which, static_cast<const char*>(source.row) + lane / 4 * 2, 2);
      }
      memcpy(&static_cast<MatrixLoad*>(operands[lane])->matrix[i], halves, 4);
    }
  }
}
inline void load_transposed_matrices(uint32_t (&matrix)[4], const void* row) {
  MatrixLoad operands = {matrix, row};
  emulator::collective(load_transposed_matrices_of_warp, &operands);
}

template <class T>
struct MatrixProduct {
  float* c;
  const uint32_t *a, *b;
};
inline float half_of(uint32_t word, int which, __half) {
  const uint16_t bits = static_cast<uint16_t>(word >> (16 * which));
  __half value;
  memcpy(static_cast<void*>(&value), &bits, 2);
  return __half2float(value);
}
inline float half_of(uint32_t word, int which, __nv_bfloat16) {
  const uint32_t bits = which ? word & 0xffff0000u : word << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline float tf32_of(uint32_t word) {  // the hardware reads 19 of the 32 bits
  word &= 0xffffe000u;
  float value;
  memcpy(&value, &word, 4);
  return value;
}

// a: 16 x K, row g or g + 8, register i; b: K x 8; c: 16 x 8. K = 16 for 16-bit types, 8 for tf32.
template <class T>
inline void multiply_matrices_of_warp(void* const* operands) {
  constexpr bool kTf32 = std::is_same_v<T, float>;
  constexpr int K = kTf32 ? 8 : 16;
  float a[16][K], b[K][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& own = *static_cast<MatrixProduct<T>*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = g + i % 2 * 8;
      if constexpr (kTf32) {
        a[row][t + i / 2 * 4] = tf32_of(own.a[i]);
        if (i < 2) b[t + i * 4][g] = tf32_of(own.b[i]);
      } else {
        for (int which = 0; which < 2; ++which) {
          a[row][t * 2 + which + i / 2 * 8] = half_of(own.a[i], which, T());
          if (i < 2) b[t * 2 + which + i * 8][g] = half_of(own.b[i], which, T());
        }
      }
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& own = *static_cast<MatrixProduct<T>*>(operands[lane]);
    for (int e = 0; e < 4; ++e) {
      const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
      float sum = own.c[e];
      for (int k = 0; k < K; ++k) sum += a[row][k] * b[k][column];
      own.c[e] = sum;
    }
  }
}
template <class T>
inline void multiply_matrices(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MatrixProduct<T> operands = {c, a, b};
  emulator::collective(multiply_matrices_of_warp<T>, &operands);
}

// ---- products of a warpgroup: nothing happens before complete_products
// ----------------------------------------------------------------------------------------------------------------------------

inline void write_operands() {}
inline void begin_products() {}
inline void commit_products() {}
inline void complete_products() { emulator::complete_products(); }

// As the descriptors say: lines of 128 bytes, whose chunks of 16 are swizzled by the line's address.
template <class T>
inline float operand_of(const void* line, int byte) {
  const uintptr_t start = reinterpret_cast<uintptr_t>(line), address = start + byte;
  uint16_t bits;
  memcpy(&bits, reinterpret_cast<const void*>(address ^ (address / 128 % 8 * 16)), sizeof bits);
  return half_of(bits, 0, T());
}
template <class T, bool kByDepth>
inline void multiply_group(float (&sum)[64], const void* rows, const void* columns, int next) {
  emulator::enqueue_product([&sum, rows, columns, next, thread = thread_index() % 128] {
    float a[2][16];
    const int first = thread / 32 * 16 + thread % 32 / 4;
    for (int k = 0; k < 16; ++k) {
      for (int e = 0; e < 2; ++e) a[e][k] = operand_of<T>(rows, (first + 8 * e) * 128 + 2 * k);
    }
    for (int i = 0; i < 32; ++i) {
      const int column = i / 2 * 8 + thread % 4 * 2 + i % 2;
      for (int k = 0; k < 16; ++k) {
        const float b = operand_of<T>(columns, kByDepth ? column / 64 * next + k * 128 + column % 64 * 2 : column * 128 + 2 * k);
        for (int e = 0; e < 2; ++e) sum[i / 2 * 4 + i % 2 + 2 * e] += a[e][k] * b;
      }
    }
  });
}

template <class A>
inline void in_order(A&) {}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
// Round to nearest, ties away from zero, to 10 bits of mantissa.
inline float round_tf32(float value) {
  if (!(fabsf(value) <= 3.4028234e38f)) return value;
  return float_of((bits_of(value) + 0x1000u) & 0xffffe000u);
}

}  // namespace dwconv::cuda
