// Linear layers over weights in panels: [N / 32][K / pair][32][pair], a pair being two numbers of bf16 or one of fp32.
//
// A block of rows times a panel stays in registers from the first input to the last: each vector of weights is multiplied by a number
// (or a pair) of every row, which is broadcast. So few rows read the weight once, in order, at the speed of memory, and many rows
// multiply at that of the arithmetic units. A row's result does not depend on the rows beside it.
#include "cpu_panels.h"

namespace {

#if defined(__AVX512F__)
template <class T> constexpr int kBlock = 12;  // rows of a block: 24 vectors of sums, of 32 registers
#else
template <class T> constexpr int kBlock = 3;
template <> constexpr int kBlock<bf16> = 2;    // of 16 registers, of which a pair of bf16 takes two
#endif

template <class T> constexpr int kPair = 4 / sizeof(T);

// The weights of an input, two lines, into L2.
INLINE void prefetch_input(const void* w) {
  __builtin_prefetch(w, 0, 2);
  __builtin_prefetch((const char*)w + 64, 0, 2);
}

// The sums of R rows of x and a panel, over all inputs. `next`: the panel behind this one is fetched meanwhile.
template <int R, bool next> INLINE void multiply(const float* x, int64_t stride, const float* w, int64_t inputs, vf (*sum)[NV]) {
  for (int64_t i = 0; i < inputs; i++, w += kPanel) {
    if (next) prefetch_input(w + kPanel * inputs);
#if defined(__AVX512F__)  // all weights of an input in registers, and a number of a row at a time
    vf part[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) part[v] = load(w + v * VW);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      vf y = splat(x[r * stride + i]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) sum[r][v] += part[v] * y;
    }
#else
    vf y[R];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) y[r] = splat(x[r * stride + i]);
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) {
      vf part = load(w + v * VW);
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) sum[r][v] += part * y[r];
    }
#endif
  }
}

template <int R, bool next> INLINE void multiply(const bf16* x, int64_t stride, const bf16* w, int64_t inputs, vf (*sum)[NV]) {
  for (int64_t i = 0; i < inputs; i += 2, w += 2 * kPanel) {
    if (next) prefetch_input(w + kPanel * inputs);
#if defined(DMC_PAIRED)
    __m512bh part[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) part[v] = (__m512bh)_mm512_loadu_si512(w + 2 * v * VW);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      int32_t pair;
      memcpy(&pair, x + r * stride + i, 4);
      __m512bh y = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) sum[r][v] = (vf)_mm512_dpbf16_ps((__m512)sum[r][v], part[v], y);
    }
#else
    vf low[R], high[R];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      int32_t pair;
      memcpy(&pair, x + r * stride + i, 4);
      vi y = pair - vi{};
      low[r] = (vf)(y << 16), high[r] = (vf)(y & (int32_t)0xffff0000);
    }
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) {
      vi part;
      memcpy(&part, w + 2 * v * VW, sizeof part);
      vf first = (vf)(part << 16), second = (vf)(part & (int32_t)0xffff0000);
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) sum[r][v] += first * low[r], sum[r][v] += second * high[r];
    }
#endif
  }
}

// R rows of x with panel n.
template <class T, int R, bool next> void block(const LinearParams& p, int64_t row, int64_t n) {
  vf sum[R][NV] = {};
  const T* w = (const T*)p.weight + n * kPanel * p.inputs;
  multiply<R, next>((const T*)p.x + row * p.inputs, p.inputs, w, p.inputs, sum);
  finish<T, R>(p, row, n, sum);
}

template <class T> struct Plain {
  static constexpr int kRows = kBlock<T>;
  static constexpr bool kAsks = true;
  const LinearParams& p;

  template <int R, bool next> INLINE void run(const Plain& self, int64_t row, int64_t n) { block<T, R, next>(self.p, row, n); }
};

void linear_any(const LinearParams& p) {
  if (p.dtype == kF32) each_block(p, Plain<float>{p});
  else each_block(p, Plain<bf16>{p});
}

}  // namespace

extern "C" __attribute__((visibility("hidden"))) void DMC_ISA(linear)(const dmc::LinearParams& p) { linear_any(p); }
