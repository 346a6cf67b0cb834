// Products of rows of keys and values, by dtype: with a query in the same layout, and with weights.
//
// bf16 is never widened: its pairs go into the CPU's dot product where it has one (AVX512_BF16: pairs of fp32 products, sums in
// fp32 to nearest, denormals are zero), and else the even and the odd channels are cut out of the pairs, which takes half as many
// steps as widening.
#pragma once
#include "cpu_vec.h"

namespace {

// Four vectors -> the sums of their blocks: block k of x[a] goes to lane 4 k + a.
INLINE vf block_sums(const vf* x) {
#if defined(__AVX512F__)
#define DMC_PAIRS(a, b) (vf)_mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd))
#elif defined(__AVX2__)
#define DMC_PAIRS(a, b) (vf)_mm256_add_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd))
#else
#define DMC_PAIRS(a, b) vf{a[0] + a[1], a[2] + a[3], b[0] + b[1], b[2] + b[3]}
#endif
  vf ab = DMC_PAIRS(x[0], x[1]), cd = DMC_PAIRS(x[2], x[3]);
  return DMC_PAIRS(ab, cd);
#undef DMC_PAIRS
}

// fp32, and fp16, which is widened as it is loaded.
template <class T> struct Rows {
  static constexpr int kChannels = VW;     // of a vector of a row
  static constexpr int kSums = 1;          // vectors of sums for one vector of a row
  static constexpr int kTogether = 1;      // slots that are added at once
  static constexpr int kQuery = VW;        // floats that as many channels of a query take
  static constexpr int kTurn = 1 << 30;    // queries for which keys are turned: vectors over slots need no sums over lanes

  static void pack_query(float* to, const float* q, int channels) { memcpy(to, q, channels * sizeof(float)); }
  INLINE vf row(const T* p) { return load(p); }
  INLINE vf row(const T* p, int left) { return load_some(p, left); }
  INLINE vf dot(vf sum, vf x, const float* q) { return sum + x * load(q); }

  INLINE void split(const vf* row, vf* parts) { parts[0] = row[0]; }
  INLINE vf weight(const float* w, int slot) { return splat(w[slot]); }
  INLINE vf add(vf sum, vf w, vf part) { return sum + w * part; }
  static void restore(float*) {}
};

template <> struct Rows<bf16> {
  static constexpr int kChannels = 2 * VW, kSums = 2;
  // A step of turning moves two channels. For eight queries it takes fewer steps than their sums over lanes, for four more.
  static constexpr int kTurn = VW == 16 ? 8 : 1 << 30;
  INLINE vf row(const bf16* p) { return load((const float*)p); }
  INLINE vf row(const bf16* p, int left) {
    bf16 buffer[kChannels];
    memset(buffer, 0, sizeof buffer);
    memcpy(buffer, p, left * sizeof(bf16));
    return row(buffer);
  }
#if defined(DMC_PAIRED)
  static constexpr int kTogether = 2, kQuery = VW;

  static void pack_query(float* to, const float* q, int channels) {
    for (int c = 0; c < channels; c += VW) store((bf16*)to + c, load(q + c));
  }
  INLINE vf dot(vf sum, vf x, const float* q) { return add(sum, load(q), x); }
  // A pair of channels of two times 16 slots, with Q queries.
  template <int Q> INLINE void dot_turned(vf (*sums)[2], vf a, vf b, const float* q, int dp) {
#pragma GCC unroll 8
    for (int i = 0; i < Q; i++) {
      vf pair = splat_bits(q + i * dp);
      sums[i][0] = add(sums[i][0], pair, a), sums[i][1] = add(sums[i][1], pair, b);
    }
  }
  INLINE vf splat_bits(const float* p) {
    int32_t bits;
    memcpy(&bits, p, sizeof bits);
    return (vf)_mm512_set1_epi32(bits);
  }
  // Of slots s and s + 1: channels 8 b ... 8 b + 3 of both in block b, then channels 8 b + 4 ... 8 b + 7.
  INLINE void split(const vf* row, vf* parts) {
    parts[0] = (vf)_mm512_unpacklo_epi16((__m512i)row[0], (__m512i)row[1]);
    parts[1] = (vf)_mm512_unpackhi_epi16((__m512i)row[0], (__m512i)row[1]);
  }
  INLINE vf weight(const float* w, int slot) { return splat_bits(w + slot / 2); }
  INLINE vf add(vf sum, vf w, vf part) { return (vf)_mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)part); }
  static void restore(float* sums) {
    float x[kChannels];
    memcpy(x, sums, sizeof x);
    for (int c = 0; c < kChannels; c++) sums[c] = x[c / 8 * 4 + c % 4 + (c & 4 ? VW : 0)];
  }
#else
  static constexpr int kTogether = 1, kQuery = 2 * VW;

  static void pack_query(float* to, const float* q, int channels) {
    for (int c = 0; c < channels; c++) to[c / kChannels * kChannels + c % kChannels / 2 + (c & 1) * VW] = q[c];
  }
  INLINE vf even(vf x) { return (vf)((vi)x << 16); }
  INLINE vf odd(vf x) { return (vf)((vi)x & (int32_t)0xffff0000); }
  INLINE vf dot(vf sum, vf x, const float* q) { return sum + even(x) * load(q) + odd(x) * load(q + VW); }
  template <int Q> INLINE void dot_turned(vf (*sums)[2], vf a, vf b, const float* q, int dp) {
    vf ae = even(a), be = even(b), ao = odd(a), bo = odd(b);
#pragma GCC unroll 8
    for (int i = 0; i < Q; i++) {
      vf x = splat(q[i * dp]), y = splat(q[i * dp + VW]);
      sums[i][0] += ae * x, sums[i][1] += be * x;
      sums[i][0] += ao * y, sums[i][1] += bo * y;
    }
  }
  INLINE void split(const vf* row, vf* parts) { parts[0] = even(row[0]), parts[1] = odd(row[0]); }
  INLINE vf weight(const float* w, int slot) { return splat(w[slot]); }
  INLINE vf add(vf sum, vf w, vf part) { return sum + w * part; }
  static void restore(float* sums) {
    float x[kChannels];
    memcpy(x, sums, sizeof x);
    for (int c = 0; c < kChannels; c++) sums[c] = x[c / 2 + (c & 1 ? VW : 0)];
  }
#endif
};

}  // namespace
