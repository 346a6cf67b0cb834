// Linear layers over weights of 4 or 8 bits in panels, of rows that are rounded first, to 8 bits for weights of 4 and to 16 for those
// of 8: the weights' own error is greater.
//
// A row has a scale for each group of inputs (that of the weight, or of 32 where the weight has none), so the products of a group are
// sums of integers, by instructions for four pairs of 8 bits and for two of 16 (AVX512_VNNI has both with the sum). Codes of weights are
// without sign, as the former want one factor; what this adds, their zero times the sum of a row's codes, is known before.
//
// A weight is s (q - zero), with s for each output or each group, plus what its group adds: nothing, an offset z, or s z.
#include "cpu_panels.h"

namespace {

constexpr int kInputs = 32;  // inputs that are multiplied at a time

template <int BITS> constexpr float kTopCode = BITS == 4 ? 127 : 32767;         // code of a row
template <int BITS> constexpr int kCodeBytes = BITS == 4 ? 1 : 2;              // of a code of a row
template <int BITS> constexpr int kWordInputs = 32 / BITS;                     // inputs of 32 bits of a weight, 64 of a row
template <int BITS> constexpr int kMask = BITS == 4 ? 0x0f0f0f0f : 0x00ff00ff;  // of one half of them

#if defined(__AVX512F__)
constexpr int kRowsOfBlock = 6;  // 24 vectors of sums, of 32 registers
#else
constexpr int kRowsOfBlock = 2;
#endif

// Codes of rows [T][K], K a multiple of 32, and for each group of a row
struct RoundedRows {
  char* codes;
  float* scales;   // what the codes are multiples of,
  float* sums;     // the sum of what they stand for,
  int32_t* start;  // and what the sum of products begins with
  int64_t width, groups;
  int zero;        // code of a weight
};

// The greater of a and |b| by their bits, of which those of infinity and NaN are the greatest; a is not below 0.
INLINE vf vmax_bits(vf a, vf b) {
  vi x = (vi)a, y = (vi)b & 0x7fffffff;
#if defined(__AVX512F__)
  return (vf)_mm512_max_epi32((__m512i)x, (__m512i)y);
#elif defined(__AVX2__)
  return (vf)_mm256_max_epi32((__m256i)x, (__m256i)y);
#else
  vi greater = x > y;
  return (vf)((greater & x) | (~greater & y));
#endif
}

template <int w = VW / 2> INLINE float vtop_bits(vf x) {
  x = vmax_bits(x, shifted<w>(x));
  if constexpr (w > 1) return vtop_bits<w / 2>(x);
  return x[0];
}

// Up to VW of the `left` inputs from x on, then zeros.
template <class T> INLINE vf load_inputs(const T* x, int64_t left) {
  return left >= VW ? load(x) : left > 0 ? load_some(x, (int)left) : vf{};
}

// Codes of a group, to nearest; NaN as the scale where an input is no number. `all`: the row has as many inputs as the group.
template <int BITS, bool all, class T> INLINE void round_group(const T* x, int64_t left, int group, const RoundedRows& to, int64_t at, char* codes) {
  vf top{};
  for (int i = 0; i < group; i += VW) top = vmax_bits(top, all ? load(x + i) : load_inputs(x + i, left - i));
  float scale = vtop_bits(top) * (1 / kTopCode<BITS>), inverse = scale < 0x1p-126f ? 0.0f : 1.0f / scale;
  vf sum{};
  for (int i = 0; i < group; i += VW) {
    // To the nearest integer: the low bits of 1.5 * 2^23 + y.
    vf y = (all ? load(x + i) : load_inputs(x + i, left - i)) * splat(inverse) + splat(12582912.0f);
    sum += y - splat(12582912.0f);
    if (BITS == 4) store_bytes(codes + i, (vi)y);
    else store_halves(codes + 2 * i, (vi)y);
  }
  bool finite = scale <= 0x1p127f;
  int32_t total = finite ? (int32_t)vsum(sum) : 0;
  if (!finite) scale = NAN;
  to.scales[at] = scale, to.sums[at] = scale * (float)total, to.start[at] = -to.zero * total;
}

template <class T, int BITS> void round_rows(const LinearParams& p, int group, const RoundedRows& to) {
  int threads = p.rows * p.inputs < kElements ? 1 : p.threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < p.rows; row++)
    for (int64_t g = 0; g < to.groups; g++) {
      const T* x = (const T*)p.x + row * p.inputs + g * group;
      int64_t left = p.inputs - g * group, at = row * to.groups + g;
      char* codes = to.codes + (row * to.width + g * group) * kCodeBytes<BITS>;
      if (left >= group) round_group<BITS, true>(x, left, group, to, at, codes);
      else round_group<BITS, false>(x, left, group, to, at, codes);
    }
}

INLINE vi splat_bits(const char* x) {  // 32 bits to all lanes
  int32_t y;
  memcpy(&y, x, 4);
  return y - vi{};
}

INLINE vi load_words(const uint8_t* w) {
  vi x;
  memcpy(&x, w, sizeof x);
  return x;
}

// Half of a word of weights times that of a row, added to `sum`. Of 4 bits, where one instruction does not also add, sums are of 16 bits,
// two to a lane: those of 32 inputs, at most 8 x 2 x 15 x 127, fit.
template <int BITS> INLINE vi dot(vi sum, vi w, vi x) {
#if defined(__AVX512VNNI__)
  return BITS == 4 ? (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x)
                   : (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
#elif defined(__AVX512F__)
  return BITS == 4 ? (vi)_mm512_add_epi16((__m512i)sum, _mm512_maddubs_epi16((__m512i)w, (__m512i)x))
                   : sum + (vi)_mm512_madd_epi16((__m512i)w, (__m512i)x);
#elif defined(__AVX2__)
  return BITS == 4 ? (vi)_mm256_add_epi16((__m256i)sum, _mm256_maddubs_epi16((__m256i)w, (__m256i)x))
                   : sum + (vi)_mm256_madd_epi16((__m256i)w, (__m256i)x);
#else
  for (int bit = 0; bit < 32; bit += 2 * BITS) sum += ((w >> bit) & ((1 << BITS) - 1)) * ((x << (32 - 2 * BITS - bit)) >> (32 - 2 * BITS));
  return sum;
#endif
}

// Sums of the products of 32 inputs, in 32 bits, added to `sum`.
template <int BITS> INLINE vi widened(vi sum, vi part) {
#if defined(__AVX512F__) && !defined(__AVX512VNNI__)
  if (BITS == 4) return sum + (vi)_mm512_madd_epi16((__m512i)part, _mm512_set1_epi16(1));
#elif defined(__AVX2__) && !defined(__AVX512F__)
  if (BITS == 4) return sum + (vi)_mm256_madd_epi16((__m256i)part, _mm256_set1_epi16(1));
#endif
  return sum + part;
}

// 32 inputs of R rows and a panel. stride: bytes from row to row.
template <int BITS, int R> INLINE void multiply(const char* x, int64_t stride, const uint8_t* w, vi (*sum)[NV]) {
#if defined(__AVX512VNNI__)
  vi (*part)[NV] = sum;
#else
  vi part[R][NV] = {};
#endif
#pragma GCC unroll 8
  for (int word = 0; word < kInputs / kWordInputs<BITS>; word++) {
    vi words[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) words[v] = load_words(w + (word * kPanel + v * VW) * 4);
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      vi these[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) these[v] = (vi)((vu)words[v] >> BITS * half) & kMask<BITS>;
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        vi y = splat_bits(x + r * stride + word * 8 + half * 4);
#pragma GCC unroll 8
        for (int v = 0; v < NV; v++) part[r][v] = dot<BITS>(part[r][v], these[v], y);
      }
    }
  }
#if !defined(__AVX512VNNI__)
#pragma GCC unroll 12
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) sum[r][v] = widened<BITS>(sum[r][v], part[r][v]);
#endif
}

// S: type of the weight's scales.
template <class T, int BITS, class S> struct Quantized {
  static constexpr int kRows = kRowsOfBlock;
  static constexpr bool kAsks = false;
  const LinearParams& p;
  const RoundedRows& x;
  int group;

  // R rows of x with panel n.
  template <int R, bool next> static void run(const Quantized& self, int64_t row, int64_t n) {
    const LinearParams& p = self.p;
    const RoundedRows& x = self.x;
    const uint8_t* w = (const uint8_t*)p.weight + n * kPanel * x.width * BITS / 8;
    const bool grouped = BITS == 4 || p.group, offsets = grouped && p.offsets;
    const S* scales = (const S*)p.scales + n * kPanel * (grouped ? (1 + offsets) * x.groups : 1);
    vf sum[R][NV] = {};
    for (int64_t g = 0; g < x.groups; g++) {
      int64_t at = row * x.groups + g;
      vi products[R][NV];
#pragma GCC unroll 12
      for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < NV; v++) products[r][v] = x.start[at + r * x.groups] - vi{};
      int64_t stride = x.width * kCodeBytes<BITS>;
      const char* codes = x.codes + row * stride + g * self.group * kCodeBytes<BITS>;
      for (int i = 0; i < self.group; i += kInputs, w += kInputs * kPanel * BITS / 8)
        multiply<BITS, R>(codes + i * kCodeBytes<BITS>, stride, w, products);
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) {
        vf scale = grouped ? load(scales + v * VW) : vf{};
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
          vf y = __builtin_convertvector(products[r][v], vf);
          sum[r][v] += (grouped ? y * scale : y) * splat(x.scales[at + r * x.groups]);
        }
        if (!offsets) continue;
        vf offset = load(scales + kPanel + v * VW);
        if (p.scaled) offset *= scale;
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) sum[r][v] += offset * splat(x.sums[at + r * x.groups]);
      }
      if (grouped) scales += (1 + offsets) * kPanel;
    }
    if (!grouped) {
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) {
        vf scale = load(scales + v * VW);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) sum[r][v] *= scale;
      }
    }
    finish<T, R>(p, row, n, sum);
  }
};

template <class T, int BITS> int quantized(const LinearParams& p) {
  int group = p.group ? p.group : kInputs;
  RoundedRows x;
  x.zero = p.zero;
  x.groups = (p.inputs + group - 1) / group, x.width = x.groups * group;
  int64_t all = p.rows * x.groups;
  float* memory = scratch(3 * all + p.rows * x.width * kCodeBytes<BITS> / 4 + VW);
  if (!memory) return 1;
  x.scales = memory, x.sums = memory + all, x.start = (int32_t*)(memory + 2 * all), x.codes = (char*)(memory + 3 * all);
  round_rows<T, BITS>(p, group, x);
  if (p.scale_dtype == kBF16) each_block(p, Quantized<T, BITS, bf16>{p, x, group});
  else if (p.scale_dtype == kF16) each_block(p, Quantized<T, BITS, f16>{p, x, group});
  else each_block(p, Quantized<T, BITS, float>{p, x, group});
  return 0;
}

int quantized_any(const LinearParams& p) {
  if (p.dtype == kF32) return p.bits == 4 ? quantized<float, 4>(p) : quantized<float, 8>(p);
  return p.bits == 4 ? quantized<bf16, 4>(p) : quantized<bf16, 8>(p);
}

}  // namespace

extern "C" __attribute__((visibility("hidden"))) int DMC_ISA(quantized)(const dmc::LinearParams& p) { return quantized_any(p); }
