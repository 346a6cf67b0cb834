// Pieces of prefill attention: 64 queries against a tile of slots. Products, by vectors or by tiles of the CPU, and the softmax.
//
// Queries lie in the lanes: scores [slot][query], weights likewise, sums [channel][query], so both products broadcast a number of the
// cache and no sum runs across lanes. Four numbers of the cache by four vectors of queries (two without AVX-512) are summed in registers:
// eight loads for sixteen products. Where the CPU multiplies pairs of bf16, what is broadcast and what lies in a lane are pairs, of
// channels for the scores, of slots for the sums.
//
// AMX takes the same memory: scores are tiles of keys, as they lie in their pages, times tiles of pairs of channels of the queries; sums
// are tiles of values, which are turned to [channel][slot], times tiles of pairs of slots of the weights.
#pragma once
#include "cpu_tiles.h"

namespace {

constexpr int kRows = 64;      // queries of a task
constexpr int kBroadcast = 4;  // elements of the cache that are broadcast at a time: accumulators are kBroadcast x V vectors
constexpr int kPiece = 16;     // slots that lie in one piece, whatever the page size

// What is multiplied, instead of the type of the numbers: bf16 by tiles of the CPU.
struct Tiled {};
template <class N> constexpr bool kTiled = false;
template <> constexpr bool kTiled<Tiled> = true;

// Content of 32 bits: a number, or where pairs of bf16 are multiplied, two channels of a key, two slots of values and weights.
template <class N> struct Panel {
  static constexpr int kTogether = 1, kWhole = 1;  // kWhole: slots of which weights have whole multiples
  INLINE vf all(const float* x) { return splat(*x); }
  INLINE vf add(vf sum, vf x, vf y) { return sum + x * y; }
};
#if defined(__AVX512BF16__)
struct Pairs {
  static constexpr int kTogether = 2;
  // fp32 weights of two slots, rounded.
  INLINE vf pairs(vf x, vf y) {
    __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x));
    return (vf)_mm512_or_si512(low, (__m512i)widen((vh)_mm512_cvtneps_pbh((__m512)y), bf16{}));
  }
};
#endif
#if defined(DMC_PAIRED)
template <> struct Panel<bf16> : Pairs {
  static constexpr int kWhole = 2;
  INLINE vf all(const float* x) {
    int32_t pair;
    memcpy(&pair, x, sizeof pair);
    return (vf)_mm512_set1_epi32(pair);
  }
  INLINE vf add(vf sum, vf x, vf y) { return (vf)_mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y); }
  INLINE vf add_weights(vf sum, vf pairs) { return add(sum, (vf)_mm512_set1_epi32(0x3f803f80), pairs); }
};
#endif
#if defined(__AMX_BF16__)
template <> struct Panel<Tiled> : Pairs {
  static constexpr int kWhole = kSide;
  INLINE vf add_weights(vf sum, vf pairs) { return sum + ((vf)((vu)pairs << 16) + (vf)((vu)pairs & 0xffff0000)); }
};
#endif

template <class T, class N> constexpr bool kInPlace = sizeof(T) == 4 || Panel<N>::kTogether == 2;  // keys are multiplied as they lie

// acc[kBroadcast][V] += sum over e < depth of a[i * row + e * column] * b[e][kRows].
template <class P, int V>
INLINE void multiply(vf (*acc)[V], const float* a, int64_t row, int64_t column, const float* b, int depth) {
#pragma GCC unroll 4
  for (int e = 0; e < depth; e++) {
    vf x[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) x[j] = load(b + e * kRows + j * VW);
#pragma GCC unroll 4
    for (int i = 0; i < kBroadcast; i++) {
      vf y = P::all(a + i * row + e * column);
#pragma GCC unroll 4
      for (int j = 0; j < V; j++) acc[i][j] = P::add(acc[i][j], x[j], y);
    }
  }
}

struct Block {  // scratch of one task; fp32, or pairs
  float *q;       // [D][kRows]
  float *sum;     // [D][kRows]
  float *scores;  // [kTile][kRows], then the weights
  float *k, *v;   // [kTile][D]: of keys and values that are not multiplied as they lie
  float top[kRows], total[kRows];
  int32_t least[kRows], limit[kRows];  // a query sees what is at [least, limit) of the tiles at hand
  static int64_t floats(int d) { return align_up(d, VW) * (2 * kRows + 2 * kTile) + kTile * kRows; }
  Block(float* memory, int d) {
    int64_t wide = align_up(d, VW);
    q = memory, sum = q + wide * kRows, scores = sum + wide * kRows, k = scores + kTile * kRows, v = k + kTile * wide;
  }
};

// A tile of slots, in pieces of kPiece.
struct Tile {
  const float *k[kTile / kPiece], *v[kTile / kPiece];
  int64_t k_row, v_row;  // 32 bits
};

// scores[slot][query], V vectors of queries at a time. Behind slot n: anything.
template <int V, class N> INLINE void score(N, const Block& b, const Tile& tile, int n, int d, int columns) {
  using P = Panel<N>;
  for (int at = 0; at < columns; at += V * VW)
    for (int r = 0; r < n; r += kBroadcast) {
      vf acc[kBroadcast][V] = {};
      multiply<P, V>(acc, tile.k[r / kPiece] + r % kPiece * tile.k_row, tile.k_row, 1, b.q + at, d / P::kTogether);
#pragma GCC unroll 4
      for (int i = 0; i < kBroadcast; i++)
#pragma GCC unroll 4
        for (int j = 0; j < V; j++) store(b.scores + (r + i) * kRows + at + j * VW, acc[i][j]);
    }
}

// sum[channel][query] += values * weights.
template <int V, class N> INLINE void add_values(N, const Block& b, const Tile& tile, int n, int d, int columns) {
  using P = Panel<N>;
  constexpr int piece = kPiece / P::kTogether;
  n = (n + P::kTogether - 1) / P::kTogether;  // what lies in 32 bits
  for (int at = 0; at < columns; at += V * VW)
    for (int c = 0; c < d; c += kBroadcast) {
      vf acc[kBroadcast][V];
#pragma GCC unroll 4
      for (int i = 0; i < kBroadcast; i++)
#pragma GCC unroll 4
        for (int j = 0; j < V; j++) acc[i][j] = load(b.sum + (c + i) * kRows + at + j * VW);
      const float* weights = b.scores + at;
      int r = 0;  // whole pieces have a constant length
      for (; r + piece <= n; r += piece) multiply<P, V>(acc, tile.v[r / piece] + c, 1, tile.v_row, weights + r * kRows, piece);
      if (r < n) multiply<P, V>(acc, tile.v[r / piece] + c, 1, tile.v_row, weights + r * kRows, n - r);
#pragma GCC unroll 4
      for (int i = 0; i < kBroadcast; i++)
#pragma GCC unroll 4
        for (int j = 0; j < V; j++) store(b.sum + (c + i) * kRows + at + j * VW, acc[i][j]);
    }
}

#if defined(__AMX_BF16__)
template <int V> INLINE void score(Tiled, const Block& b, const Tile& tile, int n, int d, int columns) {
  for (int at = 0; at < columns; at += kSide)
    for (int r = 0; r < n; r += kSide) {
      const float* const* k = tile.k + r / kPiece;
      const float* second = r + kPiece < n ? k[1] : k[0];  // if there are no others, the same again
      multiply_tiles<false>(b.scores + r * kRows + at, kRows, k[0], second, tile.k_row * sizeof(float), b.q + at, kRows, d / 32);
    }
}

template <int V> INLINE void add_values(Tiled, const Block& b, const Tile&, int n, int d, int columns) {
  const bf16* v = (const bf16*)b.v;
  int steps = (n + 31) / 32;
  for (int at = 0; at < columns; at += kSide)
    for (int c = 0; c < d; c += kSide)
      multiply_tiles<true>(b.sum + c * kRows + at, kRows, v + c * kTile, v + (c + 16) * kTile, kTile * sizeof(bf16), b.scores + at, kRows, steps);
}
#endif

// Scores of rows [begin, begin + n) to weights, relative to 2^top; where that lags too far behind the maximum it moves on, and
// what was summed is scaled. V vectors of queries at a time: a maximum has to wait for the one before it.
template <class N, int V> INLINE void weigh(Block& b, int64_t begin, int n, int d, int columns, float scale, bool masked) {
  using P = Panel<N>;
  constexpr int together = P::kTogether;
  for (int at = 0; at < columns; at += V * VW) {
    vf base[V], best[V], sum[V];
    vi least[V], limit[V];
    memcpy(least, b.least + at, sizeof least);
    memcpy(limit, b.limit + at, sizeof limit);
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) base[j] = best[j] = load(b.top + at + j * VW), sum[j] = load(b.total + at + j * VW);
    float* scores = b.scores + at;
    for (int r = 0; r < n; r++)
#pragma GCC unroll 4
      for (int j = 0; j < V; j++) {
        float* to = scores + r * kRows + j * VW;
        vf s = load(to) * splat(scale);
        if (masked) s = select((least[j] <= (int32_t)(begin + r)) & (limit[j] > (int32_t)(begin + r)), s, splat(-INFINITY));
        store(to, s);
        best[j] = vmax(s, best[j]);
      }
    int whole = (int)align_up(n, P::kWhole);
    for (int r = n; r < whole; r++)
      for (int j = 0; j < V; j++) store(scores + r * kRows + j * VW, splat(-INFINITY));
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) {
      vi behind = best[j] > base[j] + splat(kSlack);
      if (!any(behind)) continue;
      vf top = select(behind, best[j], base[j]), factor = vexp2(base[j] - top);
      float* sums = b.sum + at + j * VW;
      for (int c = 0; c < d; c++) store(sums + c * kRows, load(sums + c * kRows) * factor);
      sum[j] *= factor, base[j] = top;
      store(b.top + at + j * VW, top);
    }
    for (int r = 0; r < whole; r += together)
#pragma GCC unroll 4
      for (int j = 0; j < V; j++) {
        const float* from = scores + r * kRows + j * VW;
        vf p = vexp2(load(from) - base[j]);
        if constexpr (together == 2) {
          p = P::pairs(p, vexp2(load(from + kRows) - base[j]));
          sum[j] = P::add_weights(sum[j], p);  // as they are rounded
        } else {
          sum[j] += p;
        }
        store(scores + r / together * kRows + j * VW, p);
      }
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) store(b.total + at + j * VW, sum[j]);
  }
}

// A tile whose rows are [at, at + n) of what the queries' limits count.
template <class N, int V>
INLINE void attend_rows(Block& b, const Tile& tile, int64_t at, int n, int d, int columns, float scale, bool masked) {
  score<V>(N{}, b, tile, n, d, columns);
  weigh<N, V>(b, at, n, d, columns, scale, masked);
  add_values<V>(N{}, b, tile, n, d, columns);
}

}  // namespace
