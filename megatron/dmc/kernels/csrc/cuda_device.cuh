// Building blocks of the CUDA kernels: elements of 16 bits, the few PTX instructions that CUDA C++ has no name for, and sums over
// a warp and a block. tests/cuda_emulator compiles the same kernels for a CPU; it replaces the instructions below.
#pragma once
#include "params.h"

namespace dmc {
struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };
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

DMC_INLINE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 16 or fewer bytes that are read once: kept out of L1, fetched from memory in lines of 128.
DMC_INLINE uint4 stream16(const void* p) {
  uint4 x;
  asm("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p));
  return x;
}
DMC_INLINE uint2 stream8(const void* p) {
  uint2 x;
  asm("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(p));
  return x;
}
DMC_INLINE uint32_t stream4(const void* p) {
  uint32_t x;
  asm("ld.global.nc.L1::no_allocate.L2::128B.u32 %0, [%1];" : "=r"(x) : "l"(p));
  return x;
}

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
