// CUDA C++ for a CPU, as far as the kernels of megatron/dmc/kernels/csrc need it: they are compiled as they stand, and run.
//
// Blocks run one after the other; the threads of a block are fibers, which give way to each other at barriers and wherever lanes of
// a warp exchange values. The order in which they go on is drawn anew each time (DMC_EMULATOR_SEED), so that results which depend
// on it differ from run to run. Every collective checks that the whole warp takes part in the same one: anything else is undefined
// on a GPU, and ends the process here. Matrix instructions follow the fragment layouts of the PTX manual.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define __global__
#define __device__
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time
#define DMC_DYNAMIC_SHARED(name) unsigned char* name = emulator::dynamic_shared

struct dim3 { unsigned x = 1, y = 1, z = 1; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(8) int2 { int32_t x, y; };
struct alignas(16) int4 { int32_t x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

extern unsigned char* dynamic_shared;
constexpr int kProcessors = 2;  // few, so that small tests see blocks take several pieces of work

struct Exchange {  // what a lane shows the others
  uint32_t word[6];
  const void* address;
};

// Waits for all lanes of this warp; what each of them showed, by lane. `kind` names the collective.
const Exchange* exchange(const char* kind, const Exchange& mine);
void barrier();
void run(void (*body)(void*), void* argument, int64_t blocks, int threads, size_t shared);
[[noreturn]] void fail(const char* what);

inline void whole_warp(unsigned mask) {
  if (mask != 0xffffffffu) fail("a collective of a part of a warp");
}

template <class X> uint32_t word_of(X x) {
  static_assert(sizeof(X) == 4, "");
  uint32_t w;
  memcpy(&w, &x, 4);
  return w;
}
template <class X> X from_word(uint32_t w) {
  X x;
  memcpy(&x, &w, 4);
  return x;
}

template <class X> X shuffle(const char* kind, X x, int lane) {
  Exchange mine = {};
  memcpy(mine.word, &x, sizeof x);
  const Exchange* all = exchange(kind, mine);
  memcpy(&x, all[lane & 31].word, sizeof x);
  return x;
}

inline float bf16_value(uint32_t bits) { return from_word<float>((bits & 0xffff) << 16); }
inline float f16_value(uint32_t bits) {
  uint16_t b = (uint16_t)bits;
  _Float16 h;
  memcpy(&h, &b, 2);
  return (float)h;
}
inline uint32_t bf16_bits(float x) {
  uint32_t w = word_of(x);
  return x != x ? 0x7fff : (w + 0x7fff + ((w >> 16) & 1)) >> 16;
}
inline uint32_t f16_bits(float x) {
  _Float16 h = (_Float16)x;
  uint16_t b;
  memcpy(&b, &h, 2);
  return b;
}

void mma(float (&c)[4], const uint32_t (&ab)[6], float (*value)(uint32_t));
void matrices(uint32_t (&x)[4], const void* row, bool transposed);
uint32_t transpose8x8(uint32_t x);

}  // namespace emulator

// ------------------------------------------------------------------------------------------------------------ CUDA C++

inline void __syncthreads() { emulator::barrier(); }
inline void __syncwarp() { emulator::exchange("__syncwarp", {}); }
inline void __threadfence() {}
template <class X> X __shfl_sync(unsigned mask, X x, int lane) {
  emulator::whole_warp(mask);
  return emulator::shuffle("__shfl_sync", x, lane);
}
template <class X> X __shfl_xor_sync(unsigned mask, X x, int with) {
  emulator::whole_warp(mask);
  return emulator::shuffle("__shfl_xor_sync", x, (int)(threadIdx.x & 31) ^ with);
}
template <class X> X __shfl_up_sync(unsigned mask, X x, int by) {
  emulator::whole_warp(mask);
  int lane = threadIdx.x & 31;
  return emulator::shuffle("__shfl_up_sync", x, lane >= by ? lane - by : lane);
}
inline unsigned __ballot_sync(unsigned mask, bool x) {
  emulator::whole_warp(mask);
  emulator::Exchange mine = {};
  mine.word[0] = x;
  const emulator::Exchange* all = emulator::exchange("__ballot_sync", mine);
  unsigned result = 0;
  for (int lane = 0; lane < 32; lane++) result |= all[lane].word[0] << lane;
  return result;
}
inline bool __any_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) != 0; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs((int)x); }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t s) {
  uint64_t all = (uint64_t)b << 32 | a;
  uint32_t x = 0;
  for (int i = 0; i < 4; i++) x |= (uint32_t)(all >> (8 * (s >> (4 * i) & 7)) & 0xff) << (8 * i);
  return x;
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned x) {
  emulator::whole_warp(mask);
  emulator::Exchange mine = {};
  mine.word[0] = x;
  const emulator::Exchange* all = emulator::exchange("__reduce_max_sync", mine);
  for (int lane = 0; lane < 32; lane++) x = x > all[lane].word[0] ? x : all[lane].word[0];
  return x;
}
inline uint32_t __float_as_uint(float x) { return emulator::word_of(x); }
inline int __float2int_rn(float x) { return (int)lrintf(x); }
inline float __uint_as_float(uint32_t x) { return emulator::from_word<float>(x); }
template <class X> X __ldcg(const X* p) { return *p; }
template <class X> X __ldg(const X* p) { return *p; }
template <class X> X atomicAdd(X* p, X by) {
  X before = *p;
  *p += by;
  return before;
}
template <class X> X atomicMax(X* p, X with) {
  X before = *p;
  if (with > before) *p = with;
  return before;
}
template <class X> X atomicMin(X* p, X with) {
  X before = *p;
  if (with < before) *p = with;
  return before;
}
template <class X> X min(X a, X b) { return a < b ? a : b; }
template <class X> X max(X a, X b) { return a > b ? a : b; }

// ------------------------------------------------------------------------------------ in place of cuda_device.cuh's PTX

namespace dmc {

inline float widen(uint16_t bits, f16) { return emulator::f16_value(bits); }
inline uint32_t pack(float low, float high, bf16) { return emulator::bf16_bits(low) | emulator::bf16_bits(high) << 16; }
inline uint32_t pack(float low, float high, f16) { return emulator::f16_bits(low) | emulator::f16_bits(high) << 16; }
inline float exp2_fast(float x) { return exp2f(x); }
template <class X> void stream(X& x, const void* p) { x = *(const X*)p; }
// The kernels only ask for what fp32 holds exactly before it is rounded to 16 bits.
inline uint32_t fma2(uint32_t a, uint32_t b, uint32_t c, bf16) {
  auto one = [&](int at) {
    auto value = [&](uint32_t x) { return (double)emulator::bf16_value(x >> at); };
    return emulator::bf16_bits((float)(value(a) * value(b) + value(c)));
  };
  return one(0) | one(16) << 16;
}
inline uint32_t fma2(uint32_t a, uint32_t b, uint32_t c, f16) {
  auto one = [&](int at) {
    auto value = [&](uint32_t x) { return (double)emulator::f16_value(x >> at); };
    return emulator::f16_bits((float)(value(a) * value(b) + value(c)));
  };
  return one(0) | one(16) << 16;
}
inline void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, bf16) {
  emulator::mma(c, {a0, a1, a2, a3, b0, b1}, emulator::bf16_value);
}
inline void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, f16) {
  emulator::mma(c, {a0, a1, a2, a3, b0, b1}, emulator::f16_value);
}
inline uint32_t transpose8x8(uint32_t x) { return emulator::transpose8x8(x); }
inline void load_matrices(uint32_t (&x)[4], const void* shared) { emulator::matrices(x, shared, false); }
inline void load_matrices_transposed(uint32_t (&x)[4], const void* shared) { emulator::matrices(x, shared, true); }

// Copies arrive when they are waited for, as late as can be: what reads them too early reads what was there before.
void copy16(void* shared, const void* global, bool valid);
void copies_commit();
void copies_wait_for(int left);
template <int Left> void copies_wait() { copies_wait_for(Left); }

inline int multiprocessors(int) { return emulator::kProcessors; }
struct OnDevice {
  explicit OnDevice(int) {}
};

template <class P> const char* launch(void (*kernel)(P), int64_t blocks, int threads, size_t shared, void*, const P& p) {
  struct Call {
    void (*kernel)(P);
    const P* p;
  } call = {kernel, &p};
  emulator::run([](void* c) { ((Call*)c)->kernel(*((Call*)c)->p); }, &call, blocks, threads, shared);
  return nullptr;
}

}  // namespace dmc
