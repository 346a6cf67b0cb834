// Vectors of floats as wide as the instruction set of this build, in GCC's and Clang's vector extension.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC 12's own headers
#include <immintrin.h>
#endif
#include "cpu.h"

// Products of pairs of bf16. In the two cycles that Intel's CPUs, which have tiles, take for one they do four FMA, each half as many.
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#define DMC_PAIRED
#endif

namespace {

using namespace dmc;

#if defined(__AVX512F__)
constexpr int VW = 16;
#elif defined(__AVX2__)
constexpr int VW = 8;
#else
constexpr int VW = 4;
#endif

typedef float vf __attribute__((vector_size(VW * 4), may_alias));
typedef float vfu __attribute__((vector_size(VW * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(VW * 4), may_alias));
typedef uint32_t vu __attribute__((vector_size(VW * 4), may_alias));
typedef uint16_t vh __attribute__((vector_size(VW * 2), may_alias));
typedef int8_t vb __attribute__((vector_size(VW), may_alias));
typedef int8_t vbu __attribute__((vector_size(VW), aligned(1), may_alias));
typedef uint16_t vhu __attribute__((vector_size(VW * 2), aligned(2), may_alias));

#define INLINE static inline __attribute__((always_inline))

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };
struct i8 { int8_t bits; };
struct f8 { int8_t bits; };  // float8_e4m3fn

// What codes are loaded as, times this, is what they stand for but for their scale.
template <class S> constexpr float kUnit = 1;
template <> constexpr float kUnit<f8> = 256;

INLINE vf splat(float x) { return x - vf{}; }

INLINE vf widen(vh h, bf16) {
#if defined(__AVX512F__)  // the compiler would do halves
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
#else
  return (vf)(__builtin_convertvector(h, vi) << 16);
#endif
}

INLINE vf widen(vh h, f16) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps((__m128i)h);
#else
  // Exponent and mantissa in the place of fp32's, scaled by the difference of the biases; then infinity and NaN.
  vi x = __builtin_convertvector(h, vi);
  vf scaled = (vf)((x & 0x7fff) << 13) * splat(0x1p112f);
  vi special = ((x & 0x7c00) == 0x7c00) & 0x7f800000;
  return (vf)((vi)scaled | special | ((x & 0x8000) << 16));
#endif
}

INLINE vf load(const float* p) { return (vf)*(const vfu*)p; }
INLINE vf load(const bf16* p) { return widen((vh)*(const vhu*)p, bf16{}); }
INLINE vf load(const f16* p) { return widen((vh)*(const vhu*)p, f16{}); }
INLINE vf load(const i8* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  return __builtin_convertvector(__builtin_convertvector((vb)*(const vbu*)p, vi), vf);
#endif
}
// By way of fp16, whose exponent has a bias that is greater by 8 and a bit more: denormals are exact too.
INLINE vf load(const f8* p) {
#if defined(__AVX512F__)
  __m256i x = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
  return widen((vh)_mm256_and_si256(_mm256_slli_epi16(x, 7), _mm256_set1_epi16((short)0xbfff)), f16{});
#elif defined(__AVX2__)
  __m128i x = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)p));
  return widen((vh)_mm_and_si128(_mm_slli_epi16(x, 7), _mm_set1_epi16((short)0xbfff)), f16{});
#else
  return widen((__builtin_convertvector((vb)*(const vbu*)p, vh) << 7) & 0xbfff, f16{});
#endif
}

// The first n (< VW) elements, then zeros: what lies behind a row belongs to somebody else.
template <class T> INLINE vf load_some(const T* p, int n) {
  T buffer[VW];
  memset(buffer, 0, sizeof buffer);
  memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}

INLINE void store(float* p, vf x) { *(vfu*)p = (vfu)x; }
INLINE void store(bf16* p, vf x) {
  vi bits = (vi)x;
  vi rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
#if defined(__AVX512F__)
  __mmask16 nan = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q);
  *(vhu*)p = (vhu)_mm512_cvtepi32_epi16(_mm512_mask_mov_epi32((__m512i)rounded, nan, _mm512_set1_epi32(0x7fc0)));
#else
  vi nan = x != x;
  *(vhu*)p = (vhu)__builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), vh);
#endif
}
INLINE void store(f16* p, vf x) {
#if defined(__AVX512F__)
  *(vhu*)p = (vhu)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  *(vhu*)p = (vhu)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  for (int i = 0; i < VW; i++) {
    float f = x[i], a = fabsf(f);
    uint32_t bits, sign;
    memcpy(&bits, &f, 4);
    sign = (bits >> 16) & 0x8000;
    uint16_t h;
    if (!(a == a)) h = 0x7e00;
    else if (a >= 65520.0f) h = 0x7c00;
    else if (a < 0x1p-14f) h = (uint16_t)lrintf(a * 0x1p24f);  // subnormal: multiples of 2^-24
    else {
      memcpy(&bits, &a, 4);
      h = (uint16_t)((bits + 0xfff + ((bits >> 13) & 1) - (112u << 23)) >> 13);
    }
    p[i].bits = (uint16_t)(sign | h);
  }
#endif
}
// The low bytes of all lanes.
INLINE void store_bytes(void* p, vi x) {
#if defined(__AVX512F__)  // the compiler would do one after the other
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)x));
#else
  *(vbu*)p = (vbu)__builtin_convertvector(x, vb);
#endif
}
// The low 16 bits of all lanes.
INLINE void store_halves(void* p, vi x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)x));
#else
  *(vhu*)p = (vhu)__builtin_convertvector(x, vh);
#endif
}
// To nearest, ties to even; |x| up to 127 and 448.
INLINE void store(i8* p, vf x) {
  store_bytes(p, (vi)(x + splat(12582912.0f)) - 0x4b400000);  // 1.5 * 2^23: the low bits are the nearest integer
}
INLINE void store(f8* p, vf x) {
  vf a = (vf)((vi)x & 0x7fffffff);
  vi bits = (vi)a, normal = ((bits + 0x7ffff + ((bits >> 20) & 1)) >> 20) - (120 << 3);
  vi small = (vi)(a + splat(0x1p14f)) - 0x46800000;  // denormals: multiples of 2^-9, the low bits of 2^14 + a
  vi below = a < splat(0x1p-6f), code = (below & small) | (~below & normal) | (((vi)x >> 24) & 0x80);
  store_bytes(p, code);
}
template <class T> INLINE void store_some(T* p, vf x, int n) {
  T buffer[VW];
  store(buffer, x);
  memcpy(p, buffer, n * sizeof(T));
}

INLINE float load1(const float* p) { return *p; }
INLINE float load1(const bf16* p) { return load_some(p, 1)[0]; }
INLINE float load1(const f16* p) { return load_some(p, 1)[0]; }

INLINE vf select(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
// a where it is greater, else b; so b where either is NaN.
INLINE vf vmax(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return select(a > b, a, b);
#endif
}

// 2^x for x < 127: 2^n * 2^f, |f| <= 1/2, a polynomial of degree 5 (minimax; error below 2e-7, relative). What would be a denormal
// number is 0 without AVX-512.
INLINE vf vexp2(vf x) {
  vf low = vmax(splat(-150.0f), x);  // a NaN stays one
#if defined(__AVX512F__)
  vf n = (vf)_mm512_roundscale_ps((__m512)low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  vf t = low + splat(12582912.0f);  // 1.5 * 2^23: rounds to the nearest integer
  vf n = t - splat(12582912.0f);
#endif
  vf f = low - n;
  vf p = splat(1.326472731307149e-3f);
  p = p * f + splat(9.671512991189957e-3f);
  p = p * f + splat(5.550733581185341e-2f);
  p = p * f + splat(2.4022242426872253e-1f);
  p = p * f + splat(6.931470036506653e-1f);
  p = p * f + splat(1.0f);
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  vi power = ((vi)t << 23) + 0x3f800000;  // the low bits of t are n
  return (vf)((vi)(p * (vf)power) & ~(x <= splat(-126.0f)));
#endif
}

// Rounded to T.
INLINE vf rounded(vf x, float) { return x; }
template <class T> INLINE vf rounded(vf x, T) {
  T buffer[VW];
  store(buffer, x);
  return load(buffer);
}

// x / (1 + e^-x).
INLINE vf silu(vf x) {
  // 2^126 is as good as infinity here: x / 2^126 is 0 in all but fp32, where it is a denormal number.
  vf power = x * splat(-1.44269504088896340736f);
  return x / (splat(1.0f) + vexp2(select(power > splat(126.0f), splat(126.0f), power)));
}

// Element i + w to the place of i for i < w; the others are of no interest.
template <int w> INLINE vf shifted(vf x) {
#if defined(__AVX512F__)  // the compiler makes such an index at run time
  if constexpr (w == 8) return (vf)_mm512_shuffle_f32x4((__m512)x, (__m512)x, 0x4e);
  if constexpr (w == 4) return (vf)_mm512_shuffle_f32x4((__m512)x, (__m512)x, 0xb1);
  return (vf)_mm512_permute_ps((__m512)x, w == 2 ? 0x4e : 0xb1);
#elif defined(__AVX2__)
  if constexpr (w == 4) return (vf)_mm256_permute2f128_ps((__m256)x, (__m256)x, 1);
  return (vf)_mm256_permute_ps((__m256)x, w == 2 ? 0x4e : 0xb1);
#else
  vf y = x;
  for (int i = 0; i < w; i++) y[i] = x[i + w];
  return y;
#endif
}

// True where any lane of a comparison is.
INLINE bool any(vi mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)mask) != 0;
#else
  int32_t bits = 0;
  for (int i = 0; i < VW; i++) bits |= mask[i];
  return bits != 0;
#endif
}

constexpr int kLanes = VW / 4;  // blocks, of 128 bits, of a vector

// [slot][block] -> [block][slot]
INLINE void transpose_blocks(vf* x) {
#if defined(__AVX512F__)
  __m512 a = _mm512_shuffle_f32x4(x[0], x[1], 0x44), b = _mm512_shuffle_f32x4(x[2], x[3], 0x44);
  __m512 c = _mm512_shuffle_f32x4(x[0], x[1], 0xee), d = _mm512_shuffle_f32x4(x[2], x[3], 0xee);
  x[0] = (vf)_mm512_shuffle_f32x4(a, b, 0x88), x[1] = (vf)_mm512_shuffle_f32x4(a, b, 0xdd);
  x[2] = (vf)_mm512_shuffle_f32x4(c, d, 0x88), x[3] = (vf)_mm512_shuffle_f32x4(c, d, 0xdd);
#elif defined(__AVX2__)
  __m256 a = _mm256_permute2f128_ps(x[0], x[1], 0x20), b = _mm256_permute2f128_ps(x[0], x[1], 0x31);
  x[0] = (vf)a, x[1] = (vf)b;
#else
  (void)x;
#endif
}

// VW vectors, rows to columns.
INLINE void transpose(vf* x) {
#if defined(__AVX512F__)
  vf y[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    y[i] = (vf)_mm512_unpacklo_ps((__m512)x[i], (__m512)x[i + 1]);
    y[i + 1] = (vf)_mm512_unpackhi_ps((__m512)x[i], (__m512)x[i + 1]);
  }
  // Column 4 b + e of rows 4 k ... 4 k + 3 goes to block b of x[4 e + k].
#pragma GCC unroll 4
  for (int k = 0; k < 4; k++)
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
      __m512d a = (__m512d)y[4 * k + h], b = (__m512d)y[4 * k + 2 + h];
      x[8 * h + k] = (vf)_mm512_unpacklo_pd(a, b), x[8 * h + 4 + k] = (vf)_mm512_unpackhi_pd(a, b);
    }
#pragma GCC unroll 4
  for (int e = 0; e < 4; e++) transpose_blocks(x + 4 * e);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) y[i] = x[i % 4 * 4 + i / 4];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) x[i] = y[i];
#else
  // In step w lanes and vectors that differ in bit w change places.
#pragma GCC unroll 4
  for (int w = 1; w < VW; w *= 2) {
    vi low, high;
    for (int i = 0; i < VW; i++) low[i] = i & w ? VW + i - w : i, high[i] = i & w ? VW + i : i + w;
#pragma GCC unroll 16
    for (int i = 0; i < VW; i++) {
      if (i & w) continue;
      vf a = x[i], b = x[i + w];
#if defined(__clang__)
      for (int j = 0; j < VW; j++) {
        x[i][j] = low[j] < VW ? a[low[j]] : b[low[j] - VW];
        x[i + w][j] = high[j] < VW ? a[high[j]] : b[high[j] - VW];
      }
#else
      x[i] = __builtin_shuffle(a, b, low), x[i + w] = __builtin_shuffle(a, b, high);
#endif
    }
  }
#endif
}

template <int w = VW / 2> INLINE float vsum(vf x) {
  x += shifted<w>(x);
  if constexpr (w > 1) return vsum<w / 2>(x);
  return x[0];
}
template <int w = VW / 2> INLINE float vtop(vf x) {
  x = vmax(x, shifted<w>(x));
  if constexpr (w > 1) return vtop<w / 2>(x);
  return x[0];
}

constexpr int64_t kElements = 1 << 14;  // of rows; below, another thread costs more than it saves

constexpr int64_t align_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Floats that a thread can use until its next call; null when there is no memory. Grows, and is kept: the kernel is called often.
INLINE float* scratch(int64_t floats) {
  static thread_local float* memory = nullptr;
  static thread_local int64_t size = 0;
  if (floats > size) {
    free(memory);
    size = align_up(floats + floats / 4, 64);
    memory = (float*)aligned_alloc(64, size * sizeof(float));
    if (!memory) size = 0;
  }
  return memory;
}

}  // namespace
