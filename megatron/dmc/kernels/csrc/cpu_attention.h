// Pieces of attention over pages: where a head's slots lie, and the online softmax.
#pragma once
#include "cpu_rows.h"

namespace {

constexpr int kTile = 64;        // slots that are scored at a time; a multiple of every page size
constexpr int kMostGroups = 64;  // query heads of a KV head, by the launcher

// One head's slots.
struct Slots {
  const int32_t* table;
  const char *k, *v;
  int page_size, shift;  // page_size = 2^shift
  int64_t page_bytes, row_bytes;
  int64_t length;
  template <class T> const T* key(int64_t slot) const { return at<T>(k, slot); }
  template <class T> const T* value(int64_t slot) const { return at<T>(v, slot); }
  template <class T> const T* at(const char* pages, int64_t slot) const {
    return (const T*)(pages + (int64_t)table[slot >> shift] * page_bytes + (slot & (page_size - 1)) * row_bytes);
  }
};

INLINE int element_size(Dtype d) { return d == kF32 ? 4 : 2; }

INLINE int64_t head_index(const Cache& c, int64_t row, int64_t layer, int64_t head) {
  return (row * c.layers + layer) * c.heads + head;
}

INLINE Slots slots_of(const Cache& c, int64_t row, int64_t layer, int64_t head) {
  int64_t index = head_index(c, row, layer, head), bytes = element_size(c.dtype) * c.head_dim;
  return {c.page_table + index * c.max_pages, (const char*)c.k_pages, (const char*)c.v_pages, c.page_size,
          __builtin_ctz(c.page_size), bytes * c.page_size, bytes, c.lengths[index]};
}

// Scores of one tile to weights, in place. Slots from n on get weight 0. Weights are powers of 2: `scale` holds log2(e), and so does
// `top`. Returns the factor for what was summed before. Pairs of slots share 32 bits where they are added together; the total is
// then that of the rounded weights, so that these sum to 1.
template <class T> INLINE float softmax_tile(float* s, int n, float scale, float* top, float* total) {
  vf best = splat(-INFINITY);
  for (int i = n; i < kTile; i++) s[i] = -INFINITY;
#pragma GCC unroll 16
  for (int i = 0; i < kTile; i += VW) best = vmax(best, load(s + i));
  float tile = vtop(best) * scale, highest = tile > *top ? tile : *top;
  float factor = *top == highest ? 1.0f : exp2f(*top - highest);
  vf sum = load(total) * splat(factor);
#pragma GCC unroll 16
  for (int i = 0; i < kTile; i += VW * Rows<T>::kTogether) {
    vf p = vexp2(load(s + i) * splat(scale) - splat(highest));
#if defined(__AVX512BF16__)
    if constexpr (Rows<T>::kTogether == 2) {
      vf behind = vexp2(load(s + i + VW) * splat(scale) - splat(highest));
      vf pairs = (vf)_mm512_cvtne2ps_pbh((__m512)behind, (__m512)p);
      sum = Rows<T>::add(sum, (vf)_mm512_set1_epi32(0x3f803f80), pairs);
      store(s + i / 2, pairs);
      continue;
    }
#endif
    sum += p;
    store(s + i, p);
  }
  store(total, sum);
  *top = highest;
  return factor;
}

// out[D] = acc * factor, D a multiple of 8.
template <class T> INLINE void write_row(T* out, const float* acc, int d, float factor) {
  int c = 0;
  for (; c + VW <= d; c += VW) store(out + c, load(acc + c) * splat(factor));
  if (c < d) store_some(out + c, load(acc + c) * splat(factor), d - c);
}

// out[align_up(D, VW)] = x[D] * factor, zeros behind.
template <class T> INLINE void read_row(float* out, const T* x, int d, float factor) {
  int c = 0;
  for (; c + VW <= d; c += VW) store(out + c, load(x + c) * splat(factor));
  if (c < d) store(out + c, load_some(x + c, d - c) * splat(factor));
}

// Blocks [c, c + kChannels) of eight slots (VW 16; four, two) of a group against Q queries: sums[a][i] of the slots a, a + 4, ...
template <class T, int Q, bool Tail>
INLINE void score_channels(const T* k, const T* next, int c, int d, const float* q, int dp, vf (*sums)[Q]) {
  using R = Rows<T>;
  vf x[2][kLanes];
#pragma GCC unroll 16
  for (int a = 0; a < 2; a++) {
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; j++) {
      int64_t at = (int64_t)(4 * j + a) * d + c;
      // Spread between the loads: a burst of prefetches would fill the queue of misses and hold up the arithmetic.
      if (c * sizeof(T) % 64 == 0) __builtin_prefetch(next + at, 0, 2);
      x[a][j] = Tail ? R::row(k + at, d - c) : R::row(k + at);
    }
    transpose_blocks(x[a]);
  }
#pragma GCC unroll 16
  for (int j = 0; j < kLanes; j++) {
    const float* block = q + (c / R::kBlock + j) * R::kQuery;
#pragma GCC unroll 16
    for (int i = 0; i < Q; i++)
#pragma GCC unroll 16
      for (int a = 0; a < 2; a++) sums[a][i] = R::dot(sums[a][i], x[a][j], block + i * dp);
  }
}

// scores[Q][kTile] of slots [begin, begin + n), q [Q][dp] packed. VW slots are finished together; a page holds a multiple of that.
template <class T, int Q>
INLINE void score_tile(const Slots& s, int64_t begin, int n, const float* q, int d, int dp, float* scores) {
  constexpr int C = Rows<T>::kChannels;
  for (int r = 0; r < n; r += VW) {
    const T* k = s.key<T>(begin + r);
    const T* next = begin + kTile + r < s.length ? s.key<T>(begin + kTile + r) : k;
    vf parts[Q][4];
#pragma GCC unroll 2
    for (int half = 0; half < 4; half += 2) {
      vf sums[2][Q] = {};
      const T *from = k + half * d, *then = next + half * d;
      int c = 0;
      for (; c + C <= d; c += C) score_channels<T, Q, false>(from, then, c, d, q, dp, sums);
      if (c < d) score_channels<T, Q, true>(from, then, c, d, q, dp, sums);
#pragma GCC unroll 16
      for (int i = 0; i < Q; i++) parts[i][half] = sums[0][i], parts[i][half + 1] = sums[1][i];
    }
#pragma GCC unroll 16
    for (int i = 0; i < Q; i++) store(scores + i * kTile + r, block_sums(parts[i]));
  }
}

// V vectors of a row of slots, from channel c on: acc[Q][dp] += weights[Q][kTile] * values.
template <class T, int Q, int V, bool Tail>
INLINE void add_channels(const Slots& s, int64_t begin, int n, const float* weights, int c, int d, int dp, float* acc) {
  using R = Rows<T>;
  constexpr int P = R::kSums;
  vf sum[Q][V * P];
#pragma GCC unroll 16
  for (int i = 0; i < Q; i++)
#pragma GCC unroll 16
    for (int e = 0; e < V * P; e++) sum[i][e] = load(acc + i * dp + c + e * VW);
  for (int p = 0; p < n; p += s.page_size) {
    const T* v = s.value<T>(begin + p) + c;
    int m = n - p < s.page_size ? n - p : s.page_size;
    const T* next = begin + p + kTile < s.length ? s.value<T>(begin + p + kTile) + c : v;
    for (int r = 0; r < m; r += R::kTogether) {
      vf weight[Q];
#pragma GCC unroll 16
      for (int i = 0; i < Q; i++) weight[i] = R::weight(weights + i * kTile, p + r);
#pragma GCC unroll 16
      for (int e = 0; e < V; e++) {
        vf row[R::kTogether] = {}, parts[P];
#pragma GCC unroll 2
        for (int j = 0; j < R::kTogether; j++) {
          int64_t at = (int64_t)(r + j) * d + e * R::kChannels;
          if (e * VW * sizeof(float) % 64 == 0) __builtin_prefetch(next + at, 0, 2);
          // Behind the last slot lies what may be no number.
          if (j == 0 || r + j < m) row[j] = Tail ? R::row(v + at, d - c) : R::row(v + at);
        }
        R::split(row, parts);
#pragma GCC unroll 16
        for (int i = 0; i < Q; i++)
#pragma GCC unroll 2
          for (int j = 0; j < P; j++) sum[i][e * P + j] = R::add(sum[i][e * P + j], weight[i], parts[j]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Q; i++)
#pragma GCC unroll 16
    for (int e = 0; e < V * P; e++) store(acc + i * dp + c + e * VW, sum[i][e]);
}

template <class T, int Q>
INLINE void add_values(const Slots& s, int64_t begin, int n, const float* weights, int d, int dp, float* acc) {
  using R = Rows<T>;
  constexpr int most = (VW == 16 ? 16 : 8) / (Q * R::kSums);  // vectors of a row that are summed in registers
  constexpr int V = most > 8 / R::kSums ? 8 / R::kSums : most < 1 ? 1 : most;
  int c = 0;
  for (; c + V * R::kChannels <= d; c += V * R::kChannels) add_channels<T, Q, V, false>(s, begin, n, weights, c, d, dp, acc);
  for (; c + R::kChannels <= d; c += R::kChannels) add_channels<T, Q, 1, false>(s, begin, n, weights, c, d, dp, acc);
  if (c < d) add_channels<T, Q, 1, true>(s, begin, n, weights, c, d, dp, acc);
}

template <class T, int Q>
void attend_tile(const Slots& s, int64_t begin, int n, const float* q, int d, int dp, float scale, float* acc, float* top,
                 float* total) {
  alignas(64) float scores[Q * kTile];
  score_tile<T, Q>(s, begin, n, q, d, dp, scores);
#pragma GCC unroll 16
  for (int i = 0; i < Q; i++) {
    float factor = softmax_tile<T>(scores + i * kTile, n, scale, top + i, total + i * VW);
    if (factor != 1.0f)
      for (int c = 0; c < dp; c += VW) store(acc + i * dp + c, load(acc + i * dp + c) * splat(factor));
  }
  add_values<T, Q>(s, begin, n, scores, d, dp, acc);
}

// Floats of one query, or of its sums.
template <class T> INLINE int padded(int d) { return (int)align_up(d, Rows<T>::kChannels); }

// A range of one head's slots: un-normalised sums [g][dp], highest score (times log2(e)) and total weight of each query. q [g, D] with
// rows `stride` apart; `packed`: memory for [g][dp].
template <class T>
void attend_range(const Slots& s, int64_t begin, int64_t end, const T* q, int64_t stride, int g, int d, float scale, float* packed,
                  float* acc, float* top, float* total) {
  int dp = padded<T>(d);
  float totals[kMostGroups * VW];
  for (int i = 0; i < g; i++) {
    float line[256 + 2 * VW] = {};
    read_row(line, q + i * stride, d, 1.0f);
    Rows<T>::pack_query(packed + i * dp, line, dp);
    top[i] = -INFINITY;
  }
  memset(totals, 0, sizeof(float) * g * VW);
  memset(acc, 0, sizeof(float) * g * dp);
  scale *= 1.44269504f;
  for (int64_t at = begin; at < end; at += kTile) {
    int n = end - at < kTile ? (int)(end - at) : kTile, i = 0;
#define DMC_QUERIES(Q) \
  for (; i + Q <= g; i += Q) attend_tile<T, Q>(s, at, n, packed + i * dp, d, dp, scale, acc + i * dp, top + i, totals + i * VW);
#if defined(__AVX512F__)  // registers for eight
    DMC_QUERIES(8)
#endif
    DMC_QUERIES(4)
    DMC_QUERIES(2)
    DMC_QUERIES(1)
#undef DMC_QUERIES
  }
  for (int i = 0; i < g; i++) {
    total[i] = vsum(load(totals + i * VW));
    for (int c = 0; c < dp; c += Rows<T>::kChannels) Rows<T>::restore(acc + i * dp + c);
  }
}

}  // namespace
