// Pieces of attention over pages: where a head's slots lie, and the online softmax.
#pragma once
#include "cpu_vec.h"

namespace {

constexpr int kTile = 64;  // slots that are scored at a time; a multiple of every page size

// One head's slots.
struct Slots {
  const int32_t* table;
  const char *k, *v;
  int page_size;
  int64_t page_bytes, row_bytes;
  int64_t length;
  template <class T> const T* key(int64_t slot) const { return at<T>(k, slot); }
  template <class T> const T* value(int64_t slot) const { return at<T>(v, slot); }
  template <class T> const T* at(const char* pages, int64_t slot) const {
    return (const T*)(pages + (int64_t)table[slot / page_size] * page_bytes + slot % page_size * row_bytes);
  }
};

INLINE int element_size(Dtype d) { return d == kF32 ? 4 : 2; }

INLINE int64_t head_index(const Cache& c, int64_t row, int64_t layer, int64_t head) {
  return (row * c.layers + layer) * c.heads + head;
}

INLINE Slots slots_of(const Cache& c, int64_t row, int64_t layer, int64_t head) {
  int64_t index = head_index(c, row, layer, head), bytes = element_size(c.dtype) * c.head_dim;
  return {c.page_table + index * c.max_pages, (const char*)c.k_pages, (const char*)c.v_pages, c.page_size,
          bytes * c.page_size, bytes, c.lengths[index]};
}

// Scores of one tile to weights, in place. Slots from n on get weight 0. Returns the factor for what was summed before.
INLINE float softmax_tile(float* s, int n, float scale, float* top, float* total) {
  vf best = splat(-INFINITY);
  for (int i = n; i < kTile; i++) s[i] = -INFINITY;
  for (int i = 0; i < kTile; i += VW) best = vmax(best, load(s + i));
  float tile = vtop(best) * scale, highest = tile > *top ? tile : *top;
  float factor = *top == highest ? 1.0f : expf(*top - highest);
  vf sum = {};
  for (int i = 0; i < kTile; i += VW) {
    vf p = vexp(load(s + i) * splat(scale) - splat(highest));
    sum += p;
    store(s + i, p);
  }
  *total = *total * factor + vsum(sum);
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

// scores[Q][kTile] of slots [begin, begin + n), q [Q][dp]. Groups of VW / Q slots: VW sums are finished together.
template <class T, int Q>
INLINE void score_tile(const Slots& s, int64_t begin, int n, const float* q, int d, int dp, float* scores) {
  constexpr int R = VW / Q;
  int64_t ahead = begin + kTile;
  for (int r = 0; r < n; r += R) {
    const T* k = s.key<T>(begin + r);
    // Spread between the loads: a burst of prefetches would fill the queue of misses and hold up the arithmetic.
    const T* next = ahead + r < s.length ? s.key<T>(ahead + r) : k;
    vf acc[VW] = {};
    int c = 0;
    for (; c + VW <= d; c += VW) {
      vf query[Q];
#pragma GCC unroll 16
      for (int i = 0; i < Q; i++) query[i] = load(q + i * dp + c);
#pragma GCC unroll 16
      for (int j = 0; j < R; j++) {
        if (c * sizeof(T) % 64 == 0) __builtin_prefetch(next + j * d + c, 0, 2);
        vf key = load(k + j * d + c);
#pragma GCC unroll 16
        for (int i = 0; i < Q; i++) acc[i * R + j] += query[i] * key;
      }
    }
    if (c < d)
#pragma GCC unroll 16
      for (int j = 0; j < R; j++) {
        vf key = load_some(k + j * d + c, d - c);
#pragma GCC unroll 16
        for (int i = 0; i < Q; i++) acc[i * R + j] += load(q + i * dp + c) * key;
      }
    vf all = sums(acc);
    float out[VW];
    store(out, all);
#pragma GCC unroll 16
    for (int i = 0; i < Q; i++) memcpy(scores + i * kTile + r, out + i * R, R * sizeof(float));
  }
}

// acc[Q][dp] += weights[Q][kTile] * values of slots [begin, begin + n).
template <class T, int Q>
INLINE void add_values(const Slots& s, int64_t begin, int n, const float* weights, int d, int dp, float* acc) {
  constexpr int C = VW == 16 ? (Q == 1 ? 8 : 16 / Q) : (8 / Q);  // vectors of a row that are summed in registers
  int c = 0;
  for (; c + C * VW <= d; c += C * VW) {
    vf sum[Q][C];
#pragma GCC unroll 16
    for (int i = 0; i < Q; i++)
#pragma GCC unroll 16
      for (int e = 0; e < C; e++) sum[i][e] = load(acc + i * dp + c + e * VW);
    for (int p = 0; p < n; p += s.page_size) {
      const T* v = s.value<T>(begin + p) + c;
      int m = n - p < s.page_size ? n - p : s.page_size;
      const T* next = begin + p + kTile < s.length ? s.value<T>(begin + p + kTile) + c : v;
      for (int r = 0; r < m; r++) {
        vf weight[Q];
#pragma GCC unroll 16
        for (int i = 0; i < Q; i++) weight[i] = splat(weights[i * kTile + p + r]);
#pragma GCC unroll 16
        for (int e = 0; e < C; e++) {
          if (e * VW * sizeof(T) % 64 == 0) __builtin_prefetch(next + (int64_t)r * d + e * VW, 0, 2);
          vf value = load(v + (int64_t)r * d + e * VW);
#pragma GCC unroll 16
          for (int i = 0; i < Q; i++) sum[i][e] += weight[i] * value;
        }
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < Q; i++)
#pragma GCC unroll 16
      for (int e = 0; e < C; e++) store(acc + i * dp + c + e * VW, sum[i][e]);
  }
  for (; c < d; c += VW) {
    vf sum[Q];
#pragma GCC unroll 16
    for (int i = 0; i < Q; i++) sum[i] = load(acc + i * dp + c);
    for (int r = 0; r < n; r++) {
      const T* v = s.value<T>(begin + r) + c;
      vf value = c + VW <= d ? load(v) : load_some(v, d - c);
#pragma GCC unroll 16
      for (int i = 0; i < Q; i++) sum[i] += splat(weights[i * kTile + r]) * value;
    }
#pragma GCC unroll 16
    for (int i = 0; i < Q; i++) store(acc + i * dp + c, sum[i]);
  }
}

template <class T, int Q>
void attend_tile(const Slots& s, int64_t begin, int n, const float* q, int d, int dp, float scale, float* acc, float* top,
                 float* total) {
  alignas(64) float scores[Q * kTile];
  score_tile<T, Q>(s, begin, n, q, d, dp, scores);
#pragma GCC unroll 16
  for (int i = 0; i < Q; i++) {
    float factor = softmax_tile(scores + i * kTile, n, scale, top + i, total + i);
    if (factor != 1.0f)
      for (int c = 0; c < dp; c += VW) store(acc + i * dp + c, load(acc + i * dp + c) * splat(factor));
  }
  add_values<T, Q>(s, begin, n, scores, d, dp, acc);
}

// A range of one head's slots: un-normalised sums [g][dp], highest score and total weight of each query.
template <class T>
void attend_range(const Slots& s, int64_t begin, int64_t end, const float* q, int g, int d, int dp, float scale, float* acc,
                  float* top, float* total) {
  for (int i = 0; i < g; i++) top[i] = -INFINITY, total[i] = 0;
  memset(acc, 0, sizeof(float) * g * dp);
  for (int64_t at = begin; at < end; at += kTile) {
    int n = end - at < kTile ? (int)(end - at) : kTile, i = 0;
    for (; i + 4 <= g; i += 4) attend_tile<T, 4>(s, at, n, q + i * dp, d, dp, scale, acc + i * dp, top + i, total + i);
    for (; i + 2 <= g; i += 2) attend_tile<T, 2>(s, at, n, q + i * dp, d, dp, scale, acc + i * dp, top + i, total + i);
    for (; i < g; i++) attend_tile<T, 1>(s, at, n, q + i * dp, d, dp, scale, acc + i * dp, top + i, total + i);
  }
}

}  // namespace
