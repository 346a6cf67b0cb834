// Decode attention over codes of int8 by sums of integers, where the CPU adds four products of bytes at once (AVX512_VNNI).
//
// Nothing is widened, so that half the bytes of bf16 take half the time where memory bounds it. Queries, and the weights of a tile
// times the scales of their values, become integers of 16 bits, which is exact to a hundredth of what the codes are, in two parts of 8
// bits, whose sums are exact. For queries in fp32 that would be too coarse: they take attend_range.
#pragma once
#include "cpu_attention.h"

namespace {

#if defined(__AVX512VNNI__)

constexpr int kBytes = 64;  // channels of a vector
constexpr int kQuad = 4;    // bytes that are multiplied and added at once: channels of a key, slots of values

// Each part gets registers of its own: GCC puts a part of them on the stack where it inlines all of a tile.
#define OUTLINE __attribute__((noinline))

INLINE vi add_products(vi sum, vi without_sign, vi with_sign) {
  return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)without_sign, (__m512i)with_sign);
}

INLINE vi load_bytes(const void* p) { return (vi)_mm512_loadu_si512(p); }

INLINE vi broadcast(const int8_t* p) {
  int32_t bits;
  memcpy(&bits, p, sizeof bits);
  return (vi)_mm512_set1_epi32(bits);
}

INLINE vf to_floats(vi x) { return (vf)_mm512_cvtepi32_ps((__m512i)x); }
INLINE vi to_nearest(vf x) { return (vi)_mm512_cvtps_epi32((__m512)x); }

// The codes of VW slots in pages, in rows of D.
struct CodeRows {
  const i8* first;
  Ahead ahead;
  INLINE CodeRows of(const Slots& s, const char* pages, int64_t slot) { return {s.at<i8>(pages, slot), Ahead::of<i8>(s, pages, slot)}; }
};

// kBytes channels of a row; with a Tail, zeros from channel `left` on.
template <bool Tail> INLINE vi load_codes(const i8* p, int64_t left) {
  return Tail ? (vi)_mm512_maskz_loadu_epi8(((__mmask64)1 << left) - 1, p) : load_bytes(p);
}

// Codes as bytes without a sign: code + 128.
template <bool Tail> INLINE vi load_keys(const i8* p, int64_t left) {
  return load_codes<Tail>(p, left) ^ (vi)_mm512_set1_epi8(-128);
}

// Calls visit(Count<0>, c) for all channels, kBytes at a time, the rest by visit(Count<1>, c).
template <class Visit> INLINE void for_channels(int64_t d, Visit visit) {
  int64_t c = 0;
  for (; c + kBytes <= d; c += kBytes) visit(Count<0>(), c);
  if (c < d) visit(Count<1>(), c);
}

// Query of D channels that is unit * (256 * high + low), zeros behind. The instruction takes one factor without a sign, so keys are
// code + 128, and `excess` is what that adds to each product.
struct IntegerQuery {
  int8_t high[256], low[256];
  int32_t excess;
  float unit;
};

template <class T> void to_integers(IntegerQuery& to, const T* q, int d) {
  float line[256 + VW] = {};
  read_row(line, q, d, 1.0f);
  vf top{}, finite{};
  for (int c = 0; c < d; c += VW) {
    vf x = load(line + c);
    top = vmax(vmax(x, -x), top);
    finite += x * splat(0.0f);  // NaN where a channel is no number
  }
  constexpr float largest = 127 * 256 + 127;
  float most = vtop(top);
  to.unit = most * (1 / largest) + vsum(finite);
  vf inverse = splat(most < 0x1p-100f ? 0.0f : largest / most);
  vi sum{};
  for (int c = 0; c < align_up(d, kBytes); c += VW) {
    vi x = to_nearest(c < d ? load(line + c) * inverse : vf{}), high = (x + 128) >> 8;
    store_bytes(to.high + c, high), store_bytes(to.low + c, x - (high << 8));
    sum += x;
  }
  to.excess = 128 * _mm512_reduce_add_epi32((__m512i)sum);
}

INLINE vi pair_sums(vi a, vi b) {
  __m512 x = (__m512)a, y = (__m512)b;
  return (vi)_mm512_shuffle_ps(x, y, 0x88) + (vi)_mm512_shuffle_ps(x, y, 0xdd);
}

// Products of a query with VW keys, as rows: sums run across lanes in the end.
OUTLINE vi score_rows(const CodeRows& k, int64_t d, const IntegerQuery& q) {
  vi blocks[4];
  const i8* rows = k.first;
  int64_t line = 0;
#pragma GCC unroll 4
  for (int r = 0; r < 4; r++, rows += 4 * d, line += 4 * d) {
    vi high[4] = {}, low[4] = {};
    for_channels(d, [&](auto tail, int64_t c) {
      vi a = load_bytes(q.high + c), b = load_bytes(q.low + c);
      const i8* row = rows + c;
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++, row += d) {
        if (!tail.value || c * 4 + j * kBytes < 4 * d) k.ahead.ask(line + c * 4 + j * kBytes);
        vi x = load_keys<tail.value>(row, d - c);
        high[j] = add_products(high[j], x, a), low[j] = add_products(low[j], x, b);
      }
    });
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) high[j] = (high[j] << 8) + low[j];
    blocks[r] = pair_sums(pair_sums(high[0], high[1]), pair_sums(high[2], high[3]));
  }
  transpose_blocks((vf*)blocks);
  return blocks[0] + blocks[1] + blocks[2] + blocks[3] - q.excess;
}

// VW keys, turned: kQuad channels of each to a vector of `out`.
OUTLINE void turn_keys(const CodeRows& k, int64_t d, float* out) {
  for_channels(d, [&](auto tail, int64_t c) {
    vf x[VW];
    const i8* row = k.first + c;
#pragma GCC unroll 16
    for (int j = 0; j < VW; j++, row += d) {
      if (!tail.value || c * VW + j * kBytes < VW * d) k.ahead.ask(c * VW + j * kBytes);
      x[j] = (vf)load_keys<tail.value>(row, d - c);
    }
    transpose(x);
#pragma GCC unroll 16
    for (int j = 0; j < VW; j++) store(out + (c / kQuad + j) * VW, x[j]);
  });
}

// Products of Q queries with two times VW keys that are turned: no sum runs across lanes.
template <int Q> OUTLINE void score_turned(const float* k, const float* other, int64_t d, const IntegerQuery* q, vi (*sums)[2]) {
  vi high[Q][2] = {}, low[Q][2] = {};
  for (int64_t j = 0; j < d / kQuad; j++) {
    vi x = load_bytes(k + j * VW), y = load_bytes(other + j * VW);
#pragma GCC unroll 4
    for (int i = 0; i < Q; i++) {
      vi a = broadcast(q[i].high + j * kQuad), b = broadcast(q[i].low + j * kQuad);
      high[i][0] = add_products(high[i][0], x, a), high[i][1] = add_products(high[i][1], y, a);
      low[i][0] = add_products(low[i][0], x, b), low[i][1] = add_products(low[i][1], y, b);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < Q; i++)
#pragma GCC unroll 2
    for (int g = 0; g < 2; g++) sums[i][g] = (high[i][g] << 8) + low[i][g] - q[i].excess;
}

// scores[Q][kTile] of slots [begin, begin + n).
template <int Q> INLINE void score_codes(const Slots& s, int64_t begin, int n, int d, const IntegerQuery* q, float* scores) {
  constexpr int some = Q < 4 ? Q : 4;  // queries whose sums fit into registers
  alignas(64) float turned[2][Q == 1 ? 1 : 256 / kQuad * VW];
  for (int r = 0; r < n; r += 2 * VW) {
    vi sums[Q][2];
    int groups = r + VW < n ? 2 : 1;
    for (int g = 0; g < groups; g++) {
      CodeRows k = CodeRows::of(s, s.k, begin + r + g * VW);
      if constexpr (Q == 1) sums[0][g] = score_rows(k, d, *q);
      else turn_keys(k, d, turned[g]);
    }
    if constexpr (Q > 1)
      for (int i = 0; i < Q; i += some) score_turned<some>(turned[0], turned[groups - 1], d, q + i, sums + i);
    for (int g = 0; g < groups; g++) {
      vf scale = load(s.k_scales + s.place(begin + r + g * VW));
      for (int i = 0; i < Q; i++) store(scores + i * kTile + r + g * VW, to_floats(sums[i][g]) * scale * splat(q[i].unit));
    }
  }
}

// Weights of a tile, times the scales of their values: unit * (256 * high + low). The parts have no sign.
struct IntegerWeights {
  int8_t high[kTile], low[kTile];
  float unit;
};

INLINE void to_integers(IntegerWeights& to, const float* weights, const Slots& s, int64_t begin, int n) {
  vf w[kTile / VW] = {}, top{}, finite{};
#pragma GCC unroll 4
  for (int j = 0; j < kTile / VW; j++) {
    if (j * VW >= n) break;
    vf p = load(weights + j * VW), scale = load(s.v_scales + s.place(begin + j * VW));
    // NaN may lie behind the last slot, and in the gap, where weights are 0.
    w[j] = (vf)_mm512_maskz_mul_ps(_mm512_cmp_ps_mask((__m512)p, _mm512_setzero_ps(), _CMP_NEQ_UQ), (__m512)p, (__m512)scale);
    top = vmax(w[j], top);
    finite += w[j] * splat(0.0f);
  }
  constexpr float largest = 255 * 256 + 255;
  float most = vtop(top);
  to.unit = any(finite != finite) ? NAN : most * (1 / largest);
  vf inverse = splat(most < 0x1p-100f ? 0.0f : largest / most);
#pragma GCC unroll 4
  for (int j = 0; j < kTile / VW; j++) {
    vi x = to_nearest(w[j] * inverse);
    store_bytes(to.high + j * VW, x >> 8), store_bytes(to.low + j * VW, x);
  }
}

// Values of VW slots, channels [c, c + kBytes), by fours: of slots 4 r ... 4 r + 3, channels 16 b + 4 e ... 16 b + 4 e + 3 of each in
// block b of fours[r][e].
template <bool Tail> OUTLINE void interleave(const CodeRows& v, int64_t c, int64_t d, vi (*fours)[kQuad]) {
  const i8* row = v.first + c;
  for (int r = 0; r < VW / kQuad; r++) {
    __m512i x[kQuad], y[kQuad];
#pragma GCC unroll 4
    for (int j = 0; j < kQuad; j++, row += d) {
      int64_t at = c * VW + (r * kQuad + j) * kBytes;
      if (!Tail || at < VW * d) v.ahead.ask(at);
      x[j] = (__m512i)load_codes<Tail>(row, d - c);
    }
#pragma GCC unroll 2
    for (int j = 0; j < kQuad; j += 2) y[j] = _mm512_unpacklo_epi8(x[j], x[j + 1]), y[j + 1] = _mm512_unpackhi_epi8(x[j], x[j + 1]);
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      fours[r][2 * j] = (vi)_mm512_unpacklo_epi16(y[j], y[j + 2]);
      fours[r][2 * j + 1] = (vi)_mm512_unpackhi_epi16(y[j], y[j + 2]);
    }
  }
}

// acc[Q][dp] += weights * values, of which the channels [c, c + kBytes) of n slots are in `fours`.
template <int Q> OUTLINE void add_fours(const vi (*fours)[kQuad], int n, const IntegerWeights* weights, int c, int dp, float* acc) {
  vi high[Q][kQuad] = {}, low[Q][kQuad] = {};
  for (int r = 0; r < n; r += kQuad, fours++)
#pragma GCC unroll 2
    for (int i = 0; i < Q; i++) {
      vi a = broadcast(weights[i].high + r), b = broadcast(weights[i].low + r);
#pragma GCC unroll 4
      for (int e = 0; e < kQuad; e++) {
        high[i][e] = add_products(high[i][e], a, fours[0][e]);
        low[i][e] = add_products(low[i][e], b, fours[0][e]);
      }
    }
#pragma GCC unroll 2
  for (int i = 0; i < Q; i++) {
    vf sums[kQuad];
#pragma GCC unroll 4
    for (int e = 0; e < kQuad; e++) sums[e] = to_floats((high[i][e] << 8) + low[i][e]);
    transpose_blocks(sums);
    float* to = acc + i * dp + c;
#pragma GCC unroll 4
    for (int e = 0; e < kQuad; e++)
      if (c + e * VW < dp) store(to + e * VW, load(to + e * VW) + sums[e] * splat(weights[i].unit));
  }
}

template <int Q>
void attend_codes(const Slots& s, int64_t begin, int n, const IntegerQuery* q, int d, int dp, float scale, float* acc, float* top,
                  float* total) {
  constexpr int some = Q < 2 ? Q : 2;  // queries whose sums of values fit into registers
  alignas(64) float scores[Q * kTile];
  IntegerWeights weights[Q];
  vi fours[kTile / kQuad][kQuad];
  for (int r = 0; r < n; r += VW) {
    int64_t next = begin + r + kTile;
    if (next < s.length) __builtin_prefetch(s.k_scales + s.place(next)), __builtin_prefetch(s.v_scales + s.place(next));
  }
  score_codes<Q>(s, begin, n, d, q, scores);
  mask_gap<Q>(s, begin, n, scores);
  weigh_tile<float, Q>(scores, n, dp, scale, acc, top, total);
  for (int i = 0; i < Q; i++) to_integers(weights[i], scores + i * kTile, s, begin, n);
  for_channels(d, [&](auto tail, int64_t c) {
    for (int r = 0; r < n; r += VW) interleave<tail.value>(CodeRows::of(s, s.v, begin + r), c, d, fours + r / kQuad);
    for (int i = 0; i < Q; i += some) add_fours<some>(fours, n, weights + i, (int)c, dp, acc + i * dp);
  });
}

template <class T>
void attend_integers(const Slots& s, int64_t slots, const T* q, int64_t stride, int g, int d, float scale, float* acc, float* top, float* total) {
  int dp = padded<i8>(d);
  IntegerQuery queries[kMostGroups];
  for (int i = 0; i < g; i++) to_integers(queries[i], q + i * stride, d);
  for_tiles(slots, g, dp, acc, top, total, [&](auto count, int i, int64_t begin, int n, float* totals) {
    attend_codes<count.value>(s, begin, n, queries + i, d, dp, scale * kLog2E, acc + i * dp, top + i, totals);
  });
}

#undef OUTLINE
#endif

template <class S, class T> constexpr bool kIntegers = false;
#if defined(__AVX512VNNI__)
template <> constexpr bool kIntegers<i8, bf16> = true;
template <> constexpr bool kIntegers<i8, f16> = true;
#endif

// See attend_range.
template <class S, class T>
INLINE void attend(const Slots& s, int64_t slots, const T* q, int64_t stride, int g, int d, float scale, float* packed, float* acc,
                   float* top, float* total) {
  if constexpr (kIntegers<S, T>) attend_integers(s, slots, q, stride, g, d, scale, acc, top, total);
  else attend_range<S>(s, slots, q, stride, g, d, scale, packed, acc, top, total);
}

}  // namespace
