// Building blocks of the CUDA kernels: elements of 16 bits, the few PTX instructions that CUDA C++ has no name for, and sums over
// a warp and a block. tests/cuda_emulator compiles the same kernels for a CPU; it replaces the instructions below.
#pragma once
#include <type_traits>

#include "params.h"

namespace dmc {
struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };
struct i8 { uint8_t bits; };  // codes of a quantized cache: they stand for themselves times the scale of their slot
struct f8 { uint8_t bits; };  // float8_e4m3fn
}  // namespace dmc

#ifdef DMC_EMULATED
#include "emulator.h"
#else
#include <cuda_runtime.h>
#define DMC_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace dmc {

constexpr unsigned kAll = 0xffffffffu;
constexpr float kLog2E = 1.44269504088896340736f;
#define DMC_INLINE __device__ __forceinline__

// ---------------------------------------------------------------------------------------------------- instructions
#ifndef DMC_EMULATED

// Two floats to two elements, rounded to nearest even; `low` comes first in memory.
DMC_INLINE uint32_t pack(float low, float high, bf16) {
  uint32_t x;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}
DMC_INLINE uint32_t pack(float low, float high, f16) {
  uint32_t x;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}
DMC_INLINE float widen(uint16_t bits, f16) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

// a * b + c of two elements each, rounded once. Denormal numbers are kept.
DMC_INLINE uint32_t fma2(uint32_t a, uint32_t b, uint32_t c, bf16) {
  uint32_t x;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(x) : "r"(a), "r"(b), "r"(c));
  return x;
}
DMC_INLINE uint32_t fma2(uint32_t a, uint32_t b, uint32_t c, f16) {
  uint32_t x;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(x) : "r"(a), "r"(b), "r"(c));
  return x;
}

DMC_INLINE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 16 or fewer bytes that are read once: kept out of L1, fetched from memory in lines of 128.
DMC_INLINE void stream(uint4& x, const void* p) {
  asm("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p));
}
DMC_INLINE void stream(uint2& x, const void* p) {
  asm("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(p));
}
DMC_INLINE void stream(uint32_t& x, const void* p) { asm("ld.global.nc.L1::no_allocate.L2::128B.u32 %0, [%1];" : "=r"(x) : "l"(p)); }
DMC_INLINE void stream(uint16_t& x, const void* p) { asm("ld.global.nc.L1::no_allocate.L2::128B.u16 %0, [%1];" : "=h"(x) : "l"(p)); }

// c [16, 8] += a [16, 16] b [16, 8]; fragments as in the PTX manual, mma.m16n8k16.
DMC_INLINE void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, bf16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DMC_INLINE void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, f16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Transposes an 8 x 8 matrix of 16-bit elements that lies in a warp.
DMC_INLINE uint32_t transpose8x8(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// Four 8 x 8 matrices from shared memory; lane l names row l % 8 of matrix l / 8.
DMC_INLINE void load_matrices(uint32_t (&x)[4], const void* shared) {
  uint32_t at = (uint32_t)__cvta_generic_to_shared(shared);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(at) : "memory");
}
DMC_INLINE void load_matrices_transposed(uint32_t (&x)[4], const void* shared) {
  uint32_t at = (uint32_t)__cvta_generic_to_shared(shared);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(at) : "memory");
}

// 16 bytes from global to shared memory in the background; zeros when not `valid`.
DMC_INLINE void copy16(void* shared, const void* global, bool valid) {
  uint32_t at = (uint32_t)__cvta_generic_to_shared(shared);
  int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(at), "l"(global), "r"(bytes) : "memory");
}
DMC_INLINE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Left> DMC_INLINE void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory"); }

inline int device_count(int device, cudaDeviceAttr what) {
  int value = 0;
  cudaDeviceGetAttribute(&value, what, device);
  return value;
}
inline int multiprocessors(int device) { return device_count(device, cudaDevAttrMultiProcessorCount); }

// Returns an error message, or null. Does not wait for the kernel.
template <class P> const char* launch(void (*kernel)(P), int64_t blocks, int threads, size_t shared, void* stream, const P& p) {
  if (!blocks) return nullptr;
  if (blocks > INT32_MAX) return "too many tokens for one launch";
  if (shared > 48 * 1024) {
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    if (error) return cudaGetErrorString(error);
  }
  kernel<<<(unsigned)blocks, threads, shared, (cudaStream_t)stream>>>(p);
  cudaError_t error = cudaGetLastError();
  return error ? cudaGetErrorString(error) : nullptr;
}

// The device of the tensors is current while this lives.
struct OnDevice {
  int before = 0;
  explicit OnDevice(int device) {
    cudaGetDevice(&before);
    if (before != device) cudaSetDevice(device);
    device_ = device;
  }
  ~OnDevice() {
    if (before != device_) cudaSetDevice(before);
  }
  int device_;
};

#endif  // DMC_EMULATED

// -------------------------------------------------------------------------------------------------------- elements

DMC_INLINE float widen(uint16_t bits, bf16) { return __uint_as_float((uint32_t)bits << 16); }
DMC_INLINE float load1(const float* p) { return *p; }
DMC_INLINE float load1(const bf16* p) { return widen(p->bits, bf16{}); }
DMC_INLINE float load1(const f16* p) { return widen(p->bits, f16{}); }

// 8 neighbouring elements as floats; `aligned`: to 16 bytes.
DMC_INLINE void load8(float (&x)[8], const float* p, bool aligned = true) {
  if (aligned) {
    float4 a = *(const float4*)p, b = *(const float4*)(p + 4);
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
  } else {
#pragma unroll
    for (int e = 0; e < 8; e++) x[e] = p[e];
  }
}
template <class T> DMC_INLINE void load8(float (&x)[8], const T* p, bool aligned = true) {
  if (aligned) {
    uint4 a = *(const uint4*)p;
    uint32_t w[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
    for (int e = 0; e < 8; e++) x[e] = widen((uint16_t)(w[e / 2] >> (16 * (e % 2))), T{});
  } else {
#pragma unroll
    for (int e = 0; e < 8; e++) x[e] = load1(p + e);
  }
}
DMC_INLINE void store8(float* p, const float (&x)[8], bool aligned = true) {
  if (aligned) {
    *(float4*)p = make_float4(x[0], x[1], x[2], x[3]);
    *(float4*)(p + 4) = make_float4(x[4], x[5], x[6], x[7]);
  } else {
#pragma unroll
    for (int e = 0; e < 8; e++) p[e] = x[e];
  }
}
template <class T> DMC_INLINE void store8(T* p, const float (&x)[8], bool aligned = true) {
  uint4 a = make_uint4(pack(x[0], x[1], T{}), pack(x[2], x[3], T{}), pack(x[4], x[5], T{}), pack(x[6], x[7], T{}));
  if (aligned) {
    *(uint4*)p = a;
  } else {
    uint32_t w[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
    for (int e = 0; e < 8; e++) p[e].bits = (uint16_t)(w[e / 2] >> (16 * (e % 2)));
  }
}

// ------------------------------------------------------------------------------------------------- codes of 8 bits

template <class S> constexpr bool kCoded = false;
template <> constexpr bool kCoded<i8> = true;
template <> constexpr bool kCoded<f8> = true;
template <class S> constexpr float kLargest = 0;
template <> constexpr float kLargest<i8> = 127;
template <> constexpr float kLargest<f8> = 448;

// Codes First and Second, of `a` if below 4 and else of `b`, as two elements of 16 bits, which hold all of them exactly.
template <int First, int Second> DMC_INLINE uint32_t code_bytes(uint32_t a, uint32_t b) {
  return __byte_perm(a, b, First * 0x11 + Second * 0x1100);  // each in both bytes of its half
}
template <int First, int Second> DMC_INLINE uint32_t widen2(uint32_t a, uint32_t b, i8, bf16) {
  // 128 plus the lower seven bits, less 128 or, where the sign is set, 256.
  uint32_t x = code_bytes<First, Second>(a, b);
  return fma2((x & 0x00800080u) | 0x43004300u, 0xbf80bf80u, (x & 0x007f007fu) | 0x43004300u, bf16{});
}
template <int First, int Second> DMC_INLINE uint32_t widen2(uint32_t a, uint32_t b, i8, f16) {
  return fma2((code_bytes<First, Second>(a, b) & 0x00ff00ffu) ^ 0x64806480u, 0x3c003c00u, 0xe480e480u, f16{});  // 1152 + x - 1152
}
// The fields of e4m3 where those of the other type are, times what the exponents' biases differ by. NaN is none of these codes.
template <int First, int Second> DMC_INLINE uint32_t widen2(uint32_t a, uint32_t b, f8, bf16) {
  uint32_t x = code_bytes<First, Second>(a, b);
  return fma2((x & 0x80008000u) | ((x & 0x7f007f00u) >> 4), 0x7b807b80u, 0x80008000u, bf16{});  // 2^120, -0
}
template <int First, int Second> DMC_INLINE uint32_t widen2(uint32_t a, uint32_t b, f8, f16) {
  uint32_t x = code_bytes<First, Second>(a, b);
  return fma2((x & 0x80008000u) | ((x & 0x7f007f00u) >> 1), 0x5c005c00u, 0x80008000u, f16{});  // 2^8, -0
}
// Four codes times their scale, rounded once.
template <class S> DMC_INLINE uint2 scaled4(uint32_t codes, float scale, bf16) {
  uint32_t by = pack(scale, scale, bf16{});  // exact
  return make_uint2(fma2(widen2<0, 1>(codes, 0, S{}, bf16{}), by, 0x80008000u, bf16{}),
                    fma2(widen2<2, 3>(codes, 0, S{}, bf16{}), by, 0x80008000u, bf16{}));
}
template <class S> DMC_INLINE uint2 scaled4(uint32_t codes, float scale, f16) {  // a scale may be too small for this type
  uint32_t a = widen2<0, 1>(codes, 0, S{}, f16{}), b = widen2<2, 3>(codes, 0, S{}, f16{});
  auto scaled = [&](uint32_t x) { return pack(widen((uint16_t)x, f16{}) * scale, widen((uint16_t)(x >> 16), f16{}) * scale, f16{}); };
  return make_uint2(scaled(a), scaled(b));
}

DMC_INLINE float widen(uint8_t code, i8) { return (float)(int8_t)code; }
DMC_INLINE float widen(uint8_t code, f8) { return __uint_as_float((code & 0x80u) << 24 | (code & 0x7fu) << 20) * 0x1p120f; }
// To the nearest code; |x| <= kLargest.
DMC_INLINE uint8_t encode(float x, i8) { return (uint8_t)__float2int_rn(x); }
DMC_INLINE uint8_t encode(float x, f8) {
  uint32_t bits = __float_as_uint(x), sign = bits >> 24 & 0x80, rest = bits & 0x7fffffffu;
  if (rest < 0x3c800000u) return (uint8_t)(sign | __float2int_rn(fabsf(x) * 512.0f));  // below 2^-6 codes are 2^-9 apart
  return (uint8_t)(sign | (((rest + 0x7ffff + (rest >> 20 & 1)) >> 20) - (120 << 3)));
}

// 8 codes, without their scale.
template <class S> DMC_INLINE void load_codes(float (&x)[8], const S* p) {
  uint2 codes = *(const uint2*)p;
#pragma unroll
  for (int e = 0; e < 8; e++) x[e] = widen((uint8_t)((e < 4 ? codes.x : codes.y) >> (8 * (e % 4))), S{});
}
DMC_INLINE void load8(float (&x)[8], const i8* p) { load_codes(x, p); }
DMC_INLINE void load8(float (&x)[8], const f8* p) { load_codes(x, p); }

// f(T{}, S{}): with the types of a model's tensors and of its cache's pages.
template <class F> auto with_types(const Cache& c, F f) {
  auto paged = [&](auto t) {
    return c.page_dtype == kI8 ? f(t, i8{}) : c.page_dtype == kF8 ? f(t, f8{}) : f(t, t);
  };
  return c.dtype == kF32 ? paged(float{}) : c.dtype == kBF16 ? paged(bf16{}) : paged(f16{});
}

// Where [T, h, D] of a caller has its rows: the last axis is contiguous, and no more is known.
template <class T> DMC_INLINE T* row_of(const Heads& x, int64_t t, int64_t h) { return (T*)x.data + t * x.token + h * x.head; }
template <class T> DMC_INLINE bool is_aligned(const Heads& x) {
  return ((uintptr_t)x.data | (uintptr_t)(x.token * sizeof(T)) | (uintptr_t)(x.head * sizeof(T))) % 16 == 0;
}

// ------------------------------------------------------------------------------------------------ a warp, a block

template <class X> DMC_INLINE X warp_sum(X x) {
#pragma unroll
  for (int w = 16; w; w /= 2) x += __shfl_xor_sync(kAll, x, w);
  return x;
}

DMC_INLINE unsigned warp_max(unsigned x) { return __reduce_max_sync(kAll, x); }

// Sum over the block, in every thread. shared: 32 numbers that nobody else uses until the next barrier.
template <class X> DMC_INLINE X block_sum(X x, X* shared) {
  int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) shared[warp] = x;
  __syncthreads();
  X all = 0;
  for (int w = 0; w < warps; w++) all += shared[w];
  __syncthreads();
  return all;
}

// Sum over the threads before this one; `all` is that over the block.
DMC_INLINE int block_scan(int x, int* shared, int* all) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, sum = x;
#pragma unroll
  for (int w = 1; w < 32; w *= 2) {
    int y = __shfl_up_sync(kAll, sum, w);
    if (lane >= w) sum += y;
  }
  if (lane == 31) shared[warp] = sum;
  __syncthreads();
  int before = 0, total = 0;
  for (int w = 0; w < warps; w++) {
    if (w < warp) before += shared[w];
    total += shared[w];
  }
  __syncthreads();
  *all = total;
  return before + sum - x;
}

DMC_INLINE int pages_of(const Cache& c, int slots) { return (slots + c.page_size - 1) / c.page_size; }

// Recent pages of a sequence of `tokens`, by its own count: the first, and the one after the last. Page p is in column p % c.recent.
// None unless the model evicts.
struct Recent {
  int begin = 0, end = 0;
  DMC_INLINE Recent(const Cache& c, int tokens) {
    if (c.recent) begin = max(tokens - 1 - (int)c.evict_window, 0) / c.page_size, end = pages_of(c, tokens);
  }
};

DMC_INLINE int64_t head_index(const Cache& c, int row, int64_t layer, int head) { return (row * c.layers + layer) * c.heads + head; }

}  // namespace dmc
