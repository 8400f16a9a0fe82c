// A GPU, as the kernels see it: indices, barriers, global accesses, asynchronous copies, matrix instructions. Included by
// device.cuh alone, after the types that it needs.
#pragma once

// What starts a kernel, for its row of the table (plan/kernel_table.h).
#define DWCONV_ENTRY(Args, ...) reinterpret_cast<const void*>(&__VA_ARGS__)

#define DWCONV_DEVICE __device__ __forceinline__
// `blocks` of them must fit the registers of an SM together.
#define DWCONV_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define DWCONV_HAS_AMPERE 1  // cp.async, mma.sync m16n8k16
#else
#define DWCONV_HAS_AMPERE 0
#endif
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define DWCONV_HAS_HOPPER 1  // wgmma, of sm_90a alone
#else
#define DWCONV_HAS_HOPPER 0
#endif

namespace dwconv::cuda {

DWCONV_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
DWCONV_DEVICE int block_size() { return static_cast<int>(blockDim.x); }
DWCONV_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }  // a launch has fewer than 2^31 blocks
DWCONV_DEVICE int64_t grid_size() { return gridDim.x; }
DWCONV_DEVICE void synchronize() { __syncthreads(); }
DWCONV_DEVICE void synchronize_warp() { __syncwarp(); }

// Until all of the launch before this one on its stream is complete and seen: what a launch that may begin earlier
// (Device::launch_behind) does before it touches memory. Of Hopper's kernels alone: the others are made of sm_80's code, and
// their launches begin when the one before has ended.
DWCONV_DEVICE void wait_for_previous() {
#if DWCONV_HAS_HOPPER
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

DWCONV_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char dwconv_shared[];
  return dwconv_shared;
}

template <int kBytes>
struct Raw;
template <>
struct Raw<2> {
  using type = unsigned short;
};
template <>
struct Raw<4> {
  using type = unsigned int;
};
template <>
struct Raw<8> {
  using type = uint2;
};
template <>
struct Raw<16> {
  using type = uint4;
};

// Reads of memory that no thread of the launch writes.
template <int V, class T>
DWCONV_DEVICE Vector<T, V> load(const T* from) {
  using R = typename Raw<V * sizeof(T)>::type;
  union {
    R raw;
    Vector<T, V> vector;
  } bits = {__ldg(reinterpret_cast<const R*>(from))};
  return bits.vector;
}

// Of memory that the launch before this one wrote, after wait_for_previous: by the coherent path, which the other is not.
template <int V, class T>
DWCONV_DEVICE Vector<T, V> load_written(const T* from) {
  using R = typename Raw<V * sizeof(T)>::type;
  union {
    R raw;
    Vector<T, V> vector;
  } bits = {*reinterpret_cast<const R*>(from)};
  return bits.vector;
}

// V values as the registers hold them. Values of 16 bits that a branch may or may not have loaded are told apart one by one, and
// put together again, unless they stay packed from the load to their use.
template <class T, int V>
struct Packed {
  typename Raw<V * sizeof(T)>::type bits;
};

// As load; zeros where not wanted.
template <int V, class T>
DWCONV_DEVICE Packed<T, V> load_packed(const T* from, bool wanted) {
  using R = typename Raw<V * sizeof(T)>::type;
  Packed<T, V> packed = {R{}};
  if (wanted) packed.bits = __ldg(reinterpret_cast<const R*>(from));
  return packed;
}

template <class T, int V>
DWCONV_DEVICE Vector<T, V> unpacked(const Packed<T, V>& packed) {
  union {
    typename Raw<V * sizeof(T)>::type raw;
    Vector<T, V> vector;
  } bits = {packed.bits};
  return bits.vector;
}

template <class T>
DWCONV_DEVICE T from_accumulate(accumulate_t<T> v);  // below

// Two values rounded to 16 bits, in one register.
#if DWCONV_HAS_AMPERE
DWCONV_DEVICE uint32_t two_halves(float low, float high, __half) {
  uint32_t bits;
  asm("{ cvt.rn.f16x2.f32 %0, %1, %2; }\n" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
DWCONV_DEVICE uint32_t two_halves(float low, float high, __nv_bfloat16) {
  uint32_t bits;
  asm("{ cvt.rn.bf16x2.f32 %0, %1, %2; }\n" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
#else
template <class T>
DWCONV_DEVICE uint32_t two_halves(float low, float high, T) {
  const T values[2] = {from_accumulate<T>(low), from_accumulate<T>(high)};
  uint32_t bits;
  memcpy(&bits, values, sizeof bits);
  return bits;
}
#endif

// Rounded to T.
template <class T, int V>
DWCONV_DEVICE Packed<T, V> pack(const accumulate_t<T> (&value)[V]) {
  using R = typename Raw<V * sizeof(T)>::type;
  if constexpr (sizeof(T) == 2 && V % 2 == 0) {
    union {
      uint32_t word[V / 2];
      R raw;
    } bits;
#pragma unroll
    for (int i = 0; i < V / 2; ++i) bits.word[i] = two_halves(value[2 * i], value[2 * i + 1], T());
    return {bits.raw};
  } else {
    union Bits {
      Vector<T, V> vector;
      R raw;
      __device__ Bits() {}
    } bits;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      bits.vector.value[v] = from_accumulate<T>(value[v]);
    }
    return {bits.raw};
  }
}

template <class T, int V>
DWCONV_DEVICE void store_packed(T* to, const Packed<T, V>& packed) {
  using R = typename Raw<V * sizeof(T)>::type;
  if constexpr (sizeof(R) == kChunkBytes) {  // assigned as a uint4, the compiler may store it in four pieces
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"l"(__cvta_generic_to_global(to)), "r"(packed.bits.x),
                 "r"(packed.bits.y), "r"(packed.bits.z), "r"(packed.bits.w)
                 : "memory");
  } else {
    *reinterpret_cast<R*>(to) = packed.bits;
  }
}
template <int V, class T>
DWCONV_DEVICE void store(T* to, const Vector<T, V>& value) {
  union {
    Vector<T, V> vector;
    typename Raw<V * sizeof(T)>::type raw;
  } bits = {value};
  store_packed(to, Packed<T, V>{bits.raw});
}

// 16 bytes from global to shared memory, both aligned to 16; zeros where not valid (nothing is read then, wherever `global`
// points). Complete for this thread after copy_wait, for the block after a barrier behind it.
DWCONV_DEVICE void copy_async(void* shared, const void* global, bool valid) {
#if DWCONV_HAS_AMPERE
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? kChunkBytes : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(global), "r"(bytes) : "memory");
#else
  *static_cast<uint4*>(shared) = valid ? __ldg(static_cast<const uint4*>(global)) : make_uint4(0, 0, 0, 0);
#endif
}

DWCONV_DEVICE void copy_commit() {
#if DWCONV_HAS_AMPERE
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

// Waits until at most kPending of this thread's committed groups are under way.
template <int kPending>
DWCONV_DEVICE void copy_wait() {
#if DWCONV_HAS_AMPERE
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
#endif
}

// ldmatrix.x4: lane 8 * i + r gives the address of row r (16 bytes) of matrix i; lane l receives the 32 bits number l % 4 of row
// l / 4 of each.
DWCONV_DEVICE void load_matrices(uint32_t (&matrix)[4], const void* row) {
#if DWCONV_HAS_AMPERE
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
               : "r"(from)
               : "memory");
#endif
}

// ldmatrix.x4.trans: the same addresses; lane l receives column l / 4 of rows 2 * (l % 4) and 2 * (l % 4) + 1 of each matrix.
DWCONV_DEVICE void load_transposed_matrices(uint32_t (&matrix)[4], const void* row) {
#if DWCONV_HAS_AMPERE
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
               : "r"(from)
               : "memory");
#endif
}

// The matrix products c += a * b of a warp, PTX's mma.sync.aligned.row.col: m16n8k16 for float16 and bfloat16, m16n8k8 for
// tf32, whose operands are float32 rounded by round_tf32.
template <class T>
DWCONV_DEVICE void multiply_matrices(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#if DWCONV_HAS_AMPERE
#define DWCONV_MMA(shape, type)                                                         \
  asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type                  \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                         \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
#else
#define DWCONV_MMA(shape, type) (void)c, (void)a, (void)b
#endif
template <>
DWCONV_DEVICE void multiply_matrices<__half>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  DWCONV_MMA("m16n8k16", "f16");
}
template <>
DWCONV_DEVICE void multiply_matrices<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  DWCONV_MMA("m16n8k16", "bf16");
}
template <>
DWCONV_DEVICE void multiply_matrices<float>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  DWCONV_MMA("m16n8k8", "tf32");
}
#undef DWCONV_MMA

// ---- wgmma: products of a warpgroup, 4 warps, whose operands stay in shared memory and whose sums arrive later
// ----------------------------------------------------------------------------------------------------------------
//
// The order: write_operands after the writes of a thread and before the barrier behind them; begin_products; multiply_group;
// commit_products; complete_products before sums are read and operands overwritten.

DWCONV_DEVICE void write_operands() {
#if DWCONV_HAS_HOPPER
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
#endif
}
DWCONV_DEVICE void begin_products() {
#if DWCONV_HAS_HOPPER
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
#endif
}
DWCONV_DEVICE void commit_products() {
#if DWCONV_HAS_HOPPER
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
#endif
}
// Of this warpgroup's committed groups.
DWCONV_DEVICE void complete_products() {
#if DWCONV_HAS_HOPPER
  asm volatile("wgmma.wait_group.sync.aligned 0;\n" ::: "memory");
#endif
}

// PTX's matrix descriptor of an operand whose lines of 128 bytes are swizzled by chunk ^ (line % 8); `group` and `next` are bytes
// between groups of 8 lines and, by depth, of 64 columns.
DWCONV_DEVICE uint64_t matrix_descriptor(const void* shared, int group, int next) {
#if DWCONV_HAS_HOPPER
  const uint64_t start = __cvta_generic_to_shared(shared);
  return (start & 0x3ffff) >> 4 | static_cast<uint64_t>(next >> 4) << 16 | static_cast<uint64_t>(group >> 4) << 32 |
         uint64_t{1} << 62;
#else
  return 0;
#endif
}

// sum[64 rows][128 columns] += rows[64][16] * columns[16][128] over 16 of the operands' depth. `rows`, and the columns unless by
// depth, point at 32 of the 128 bytes of their first line; columns by depth at 16 lines of 64 columns, the other 64 `next` bytes
// behind. Thread t of the warpgroup holds row t / 32 * 16 + t % 32 / 4 + e / 2 * 8, column j * 8 + t % 4 * 2 + e % 2 in sum[4 * j
// + e].
template <class T, bool kByDepth>
DWCONV_DEVICE void multiply_group(float (&s)[64], const void* rows, const void* columns, int next) {
#if DWCONV_HAS_HOPPER
  const uint64_t a = matrix_descriptor(rows, 1024, 16), b = matrix_descriptor(columns, 1024, kByDepth ? next : 16);
#define DWCONV_SUMS(i) \
  "+f"(s[i]), "+f"(s[i + 1]), "+f"(s[i + 2]), "+f"(s[i + 3]), "+f"(s[i + 4]), "+f"(s[i + 5]), "+f"(s[i + 6]), "+f"(s[i + 7])
#define DWCONV_WGMMA(type)                                                                                                   \
  asm volatile(                                                                                                              \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                                           \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "     \
      "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "       \
      "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "                          \
      "%64, %65, 1, 1, 1, 0, %66;\n"                                                                                         \
      : DWCONV_SUMS(0), DWCONV_SUMS(8), DWCONV_SUMS(16), DWCONV_SUMS(24), DWCONV_SUMS(32), DWCONV_SUMS(40), DWCONV_SUMS(48), \
        DWCONV_SUMS(56)                                                                                                      \
      : "l"(a), "l"(b), "n"(kByDepth ? 1 : 0))
  if constexpr (std::is_same_v<T, __half>) {
    DWCONV_WGMMA("f16");
  } else {
    DWCONV_WGMMA("bf16");
  }
#undef DWCONV_WGMMA
#undef DWCONV_SUMS
#endif
}

// The value is complete here, and what uses it begins here.
DWCONV_DEVICE void in_order(float& value) { asm volatile("" : "+f"(value)); }
DWCONV_DEVICE void in_order(double& value) { asm volatile("" : "+d"(value)); }
DWCONV_DEVICE void in_order(int& value) { asm volatile("" : "+r"(value)); }

DWCONV_DEVICE uint32_t bits_of(float value) { return __float_as_uint(value); }
DWCONV_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

DWCONV_DEVICE float round_tf32(float value) {
#if DWCONV_HAS_AMPERE
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(rounded) : "f"(value));
  return __uint_as_float(rounded);
#else
  return value;
#endif
}

}  // namespace dwconv::cuda
