// Pieces of attention over pages: where a head's slots lie, and the online softmax.
#pragma once
#include "cpu_rows.h"

namespace {

constexpr int kTile = 64;        // slots that are scored at a time; a multiple of every page size
constexpr float kSlack = 8.0f;   // weights reach 2^kSlack before sums are scaled to a new maximum
constexpr int kMostGroups = 64;  // query heads of a KV head, by the launcher

// One head's slots.
struct Slots {
  const int32_t* table;
  const char *k, *v;
  const bf16 *k_scales, *v_scales;  // of a quantized cache
  int page_size, shift;  // page_size = 2^shift
  int64_t page_bytes, row_bytes;
  int64_t length;
  int64_t gap, resume;  // slots [gap, resume) do not exist: between the last kept slot and the first recent token
  template <class T> const T* key(int64_t slot) const { return at<T>(k, slot); }
  template <class T> const T* value(int64_t slot) const { return at<T>(v, slot); }
  template <class T> const T* at(const char* pages, int64_t slot) const {
    return (const T*)(pages + (int64_t)table[slot >> shift] * page_bytes + (slot & (page_size - 1)) * row_bytes);
  }
  // Index of a slot among all of the pool.
  int64_t place(int64_t slot) const { return ((int64_t)table[slot >> shift] << shift) + (slot & (page_size - 1)); }
};

// Head of a token.
template <class T> INLINE T* head_of(const Heads& x, int64_t t, int64_t h) { return (T*)x.data + t * x.token + h * x.head; }

INLINE int64_t head_index(const Cache& c, int64_t row, int64_t layer, int64_t head) {
  return (row * c.layers + layer) * c.heads + head;
}

// `length` slots in the pages of `table`.
INLINE Slots slots_in(const Cache& c, const int32_t* table, int64_t length) {
  int64_t bytes = element_size(c.page_dtype) * c.head_dim;
  return {table, (const char*)c.k_pages, (const char*)c.v_pages, (const bf16*)c.k_scales, (const bf16*)c.v_scales, c.page_size, page_shift(c),
          bytes * c.page_size, bytes, length, INT64_MAX, INT64_MAX};
}

// Slots of a head; of a model that evicts, the kept ones.
INLINE Slots slots_of(const Cache& c, int64_t index) { return slots_in(c, c.page_table + index * c.max_pages, c.lengths[index]); }

INLINE Slots slots_of(const Cache& c, int64_t row, int64_t layer, int64_t head) {
  return slots_of(c, head_index(c, row, layer, head));
}

// Recent pages by `columns` [R] of the table: the slot of a token is its recent_place.
INLINE Slots recent_slots(const Cache& c, const int32_t* columns) { return slots_in(c, columns, c.recent * c.page_size); }

INLINE int64_t recent_place(const Cache& c, int64_t token) {
  uint32_t column = (uint32_t)(token >> page_shift(c)) % (uint32_t)c.recent;
  return ((int64_t)column << page_shift(c)) + (token & (c.page_size - 1));
}

// What attention sees of a head after an append, as slots of one row of pages: the kept ones, and where the model evicts, the tokens
// of the window from the next page on, the first of them anywhere in its page.
struct View {
  int64_t index, kept, first;  // head; kept slots; first recent page
  int64_t resume, end;         // slot of the window's first token; slots with the gap before it
};

INLINE View view_of(const Cache& c, int64_t index) {
  int64_t kept = c.lengths[index];
  if (!c.recent) return {index, kept, 0, kept, kept};
  int64_t tokens = c.segment[index], from = tokens > c.evict_window ? tokens - c.evict_window - 1 : 0;
  int64_t resume = (pages_of(c, kept) << page_shift(c)) + (from & (c.page_size - 1));
  return {index, kept, from >> page_shift(c), resume, resume + tokens - from};
}

// Slots [begin, end) of a view, counted from `begin`, which is a multiple of kTile, and what is prefetched behind them. `table`: where
// the model evicts, memory for the ids of as many pages, which do not lie in one row.
INLINE Slots slots_of(const Cache& c, const View& view, int64_t begin, int64_t end, int32_t* table) {
  Slots s = slots_of(c, view.index);
  int64_t page = begin >> s.shift;
  s.table += page, s.length -= begin;
  if (!c.recent) return s;
  int64_t stop = end + kTile < view.end ? end + kTile : view.end, kept = pages_of(c, view.kept), pages = pages_of(c, stop) - page;
  int64_t own = kept < page ? 0 : kept - page < pages ? kept - page : pages;
  if (own > 0) memcpy(table, s.table, own * sizeof(int32_t));
  const int32_t* columns = c.recent_table + view.index * c.recent;
  int64_t column = (view.first + page + own - kept) % c.recent;
  for (int64_t i = own; i < pages; i++) {
    table[i] = columns[column];
    column = column + 1 < c.recent ? column + 1 : 0;
  }
  s.table = table, s.length = stop - begin, s.gap = view.kept - begin, s.resume = view.resume - begin;
  return s;
}

// Scores of one tile to weights, in place, relative to 2^top; slots from n on get weight 0. Weights are powers of 2: `scale` holds
// log2(e), and so does `top`. It moves on only where a score exceeds it by more than kSlack; returns the factor for what was summed
// before, mostly 1. Pairs of slots share 32 bits where they are added together; the total is then that of the rounded weights, so
// that these sum to 1.
template <class T> INLINE float softmax_tile(float* s, int n, float scale, float* top, float* total) {
  for (int i = n; i < kTile; i++) s[i] = -INFINITY;
  vf x[kTile / VW], best = splat(-INFINITY);
#pragma GCC unroll 16
  for (int i = 0; i < kTile / VW; i++) x[i] = load(s + i * VW) * splat(scale), best = vmax(x[i], best);
  float factor = 1.0f;
  vf sum = load(total);
  if (any(best > splat(*top + kSlack))) {
    float highest = vtop(best);
    factor = exp2f(*top - highest);
    sum *= splat(factor);
    *top = highest;
  }
  vf base = splat(*top);
#pragma GCC unroll 16
  for (int i = 0; i < kTile / VW; i += Rows<T>::kTogether) {
    vf p = vexp2(x[i] - base);
#if defined(DMC_PAIRED)
    if constexpr (Rows<T>::kTogether == 2) {
      vf pairs = (vf)_mm512_cvtne2ps_pbh((__m512)vexp2(x[i + 1] - base), (__m512)p);
      sum = Rows<T>::add(sum, (vf)_mm512_set1_epi32(0x3f803f80), pairs);
      store(s + i * VW / 2, pairs);
      continue;
    }
#endif
    sum += p;
    store(s + i * VW, p);
  }
  store(total, sum);
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

// Prefetches while a slot is worked on: the slot a tile further on, and again the one half a tile further on, because the CPU
// drops such requests while its queue of misses is full. Lines are requested in their order, evenly between the arithmetic: in
// another order, or in bursts, memory takes up to twice as long.
// Intel's CPUs, which run the build of AVX-512 without bf16, do not drop any; there the first brings a line to L2.
#if defined(__AVX512F__) && !defined(DMC_PAIRED)
constexpr int kFar = 2;
#else
constexpr int kFar = 3;
#endif
struct Ahead {
  const char *far, *near;
  template <class T> INLINE Ahead of(const Slots& s, const char* pages, int64_t slot) {
    auto place = [&](int by) { return (const char*)s.at<T>(pages, slot + by < s.length ? slot + by : slot); };
    return {place(kTile), place(kTile / 2)};
  }
  void ask(int64_t at) const {
    __builtin_prefetch(far + at, 0, kFar);
    __builtin_prefetch(near + at);
  }
};

// Four rows, of which the first lies `first` rows behind the slot of `ahead`, against Q queries: sums[i] holds, for each 128 bits of
// a row, the sums of the four.
template <class T, int Q, bool Ask>
INLINE void score_rows(const T* k, const Ahead& ahead, int first, int d, const float* q, int dp, vf* sums) {
  using R = Rows<T>;
  constexpr int bytes = R::kChannels * sizeof(T);
  vf acc[Q][4] = {};
  int c = 0;
  for (; c + R::kChannels <= d; c += R::kChannels, q += R::kQuery) {
    vf x[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      if (Ask && j * bytes % 64 == 0 && (4 * bytes % 64 == 0 || c * 4 * sizeof(T) % 64 == 0)) ahead.ask((first * d + c * 4) * sizeof(T) + j * bytes);
      x[j] = R::row(k + (int64_t)j * d + c);
    }
#pragma GCC unroll 4
    for (int i = 0; i < Q; i++)
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) acc[i][j] = R::dot(acc[i][j], x[j], q + i * dp);
  }
  if (c < d)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      vf x = R::row(k + (int64_t)j * d + c, d - c);
#pragma GCC unroll 4
      for (int i = 0; i < Q; i++) acc[i][j] = R::dot(acc[i][j], x, q + i * dp);
    }
#pragma GCC unroll 4
  for (int i = 0; i < Q; i++) sums[i] = block_sums(acc[i]);
}

#if defined(__AVX512F__)
// Scores of two times 16 slots for Q queries, q [Q][dp] packed: keys are turned, 32 channels at a time.
template <class T, int Q>
INLINE void score_turned(const T* const* k, const Ahead* ahead, int d, const float* q, int dp, float* scores) {
  using R = Rows<T>;
  vf sums[Q][2] = {};
  for (int c = 0; c < d; c += R::kChannels, q += R::kQuery) {
    alignas(64) float turned[2][VW * VW];
#pragma GCC unroll 2
    for (int g = 0; g < 2; g++) {
      vf x[VW];
#pragma GCC unroll 16
      for (int j = 0; j < VW; j++) x[j] = c + R::kChannels <= d ? R::row(k[g] + j * d + c) : R::row(k[g] + j * d + c, d - c);
      transpose(x);
#pragma GCC unroll 16
      for (int j = 0; j < VW; j++) store(turned[g] + j * VW, x[j]);
    }
    for (int j = 0; j < VW; j++) {
      ahead[j / 8].ask((int64_t)c * VW * sizeof(T) + j % 8 * 128);
      ahead[j / 8].ask((int64_t)c * VW * sizeof(T) + j % 8 * 128 + 64);
      vf a = load(turned[0] + j * VW), b = load(turned[1] + j * VW);
      R::template dot_turned<Q>(sums, a, b, q + j, dp);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Q; i++) store(scores + i * kTile, sums[i][0]), store(scores + i * kTile + VW, sums[i][1]);
}
#endif

// scores[Q][kTile] of slots [begin, begin + n), q [Q][dp] packed. VW slots are finished together; a page holds a multiple of that.
template <class T, int Q>
INLINE void score_tile(const Slots& s, int64_t begin, int n, const float* q, int d, int dp, float* scores) {
#if defined(__AVX512F__)
  if constexpr (Q >= Rows<T>::kTurn) {
    for (int r = 0; r < n; r += 2 * VW) {
      int64_t first = begin + r, second = r + VW < n ? first + VW : first;  // if there are no others, the same again
      const T* k[2] = {s.key<T>(first), s.key<T>(second)};
      Ahead ahead[2] = {Ahead::of<T>(s, s.k, first), Ahead::of<T>(s, s.k, second)};
      score_turned<T, Q>(k, ahead, d, q, dp, scores + r);
    }
    return;
  }
#endif
  constexpr int most = VW == 16 ? 4 : 2, some = Q < most ? Q : most;  // queries whose sums fit into registers
  for (int r = 0; r < n; r += VW) {
    if (begin + r >= s.gap && begin + r + VW <= s.resume) continue;
    const T* k = s.key<T>(begin + r);
    Ahead ahead = Ahead::of<T>(s, s.k, begin + r);
    vf sums[Q][kLanes];
    for (int j = 0; j < kLanes; j++)
#pragma GCC unroll 8
      for (int i = 0; i < Q; i += some) {
        vf four[some];
        if (i) score_rows<T, some, false>(k + j * 4 * d, ahead, j * 4, d, q + i * dp, dp, four);
        else score_rows<T, some, true>(k + j * 4 * d, ahead, j * 4, d, q, dp, four);
#pragma GCC unroll 4
        for (int e = 0; e < some; e++) sums[i + e][j] = four[e];
      }
#pragma GCC unroll 8
    for (int i = 0; i < Q; i++) {
      transpose_blocks(sums[i]);
      vf total = sums[i][0];
#pragma GCC unroll 4
      for (int j = 1; j < kLanes; j++) total += sums[i][j];
      store(scores + i * kTile + r, total);
    }
  }
}

// V vectors of a row of slots, from channel c on: acc[Q][dp] += weights[Q][kTile] * values.
template <class T, int Q, int V, bool Tail>
INLINE void add_channels(const Slots& s, int64_t begin, int n, const float* weights, int c, int d, int dp, float* acc) {
  using R = Rows<T>;
  constexpr int P = R::kSums, bytes = R::kChannels * sizeof(T);
  vf sum[Q][V * P];
#pragma GCC unroll 16
  for (int i = 0; i < Q; i++)
#pragma GCC unroll 16
    for (int e = 0; e < V * P; e++) sum[i][e] = load(acc + i * dp + c + e * VW);
  for (int p = 0; p < n; p += s.page_size) {
    const T* v = s.value<T>(begin + p) + c;
    int m = n - p < s.page_size ? n - p : s.page_size, least = 0;
    if (begin + p < s.resume && begin + p + m > s.gap) {  // a page beside the gap
      if (begin + p < s.gap) m = (int)(s.gap - begin - p);
      else least = (int)(s.resume - begin - p);
    }
    Ahead ahead = Ahead::of<T>(s, s.v, begin + p);
    int64_t share = (int64_t)c * s.page_size * sizeof(T);  // of the page, that this pass over the channels asks for
    for (int r = least - least % R::kTogether; r < m; r += R::kTogether) {
      vf weight[Q];
#pragma GCC unroll 16
      for (int i = 0; i < Q; i++) weight[i] = R::weight(weights + i * kTile, p + r);
#pragma GCC unroll 16
      for (int e = 0; e < V; e++) {
        vf row[R::kTogether] = {}, parts[P];
#pragma GCC unroll 2
        for (int j = 0; j < R::kTogether; j++) {
          int64_t at = (int64_t)(r + j) * d + e * R::kChannels;
          if (e * bytes % 64 == 0 && (V * bytes % 64 == 0 || (share + (r + j) * V * bytes) % 64 == 0)) ahead.ask(share + ((r + j) * V + e) * bytes);
          // NaN may lie behind the last slot, and in the gap.
          if (R::kTogether == 1 || (r + j >= least && r + j < m)) row[j] = Tail ? R::row(v + at, d - c) : R::row(v + at);
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

template <class T> constexpr bool kCodes = false;
template <> constexpr bool kCodes<i8> = true;
template <> constexpr bool kCodes<f8> = true;

// x[Q][kTile] of slots [begin, begin + n), times the scales of their codes.
template <class T, int Q> INLINE void scale_tile(const Slots& s, const bf16* scales, int64_t begin, int n, float* x) {
  for (int r = 0; r < n; r += VW) {
    int64_t next = begin + r + kTile;
    __builtin_prefetch(scales + s.place(next < s.length ? next : begin + r));
    vf factor = load(scales + s.place(begin + r)) * splat(kUnit<T>);
#pragma GCC unroll 8
    for (int i = 0; i < Q; i++) store(x + i * kTile + r, load(x + i * kTile + r) * factor);
  }
}

// Slots of a tile that do not exist get no weight.
template <int Q> INLINE void mask_gap(const Slots& s, int64_t begin, int n, float* scores) {
  if (begin >= s.resume || begin + n <= s.gap) return;
  for (int64_t r = s.gap > begin ? s.gap - begin : 0; r < n && begin + r < s.resume; r++)
    for (int i = 0; i < Q; i++) scores[i * kTile + r] = -INFINITY;
}

// softmax_tile for Q queries, whose sums before are scaled where their maximum moves on.
template <class T, int Q> INLINE void weigh_tile(float* scores, int n, int dp, float scale, float* acc, float* top, float* total) {
#pragma GCC unroll 16
  for (int i = 0; i < Q; i++) {
    float factor = softmax_tile<T>(scores + i * kTile, n, scale, top + i, total + i * VW);
    if (factor != 1.0f)
      for (int c = 0; c < dp; c += VW) store(acc + i * dp + c, load(acc + i * dp + c) * splat(factor));
  }
}

template <class T, int Q>
void attend_tile(const Slots& s, int64_t begin, int n, const float* q, int d, int dp, float scale, float* acc, float* top,
                 float* total) {
  alignas(64) float scores[Q * kTile];
  score_tile<T, Q>(s, begin, n, q, d, dp, scores);
  if constexpr (kCodes<T>) scale_tile<T, Q>(s, s.k_scales, begin, n, scores);
  mask_gap<Q>(s, begin, n, scores);
  weigh_tile<T, Q>(scores, n, dp, scale, acc, top, total);
  if constexpr (kCodes<T>) scale_tile<T, Q>(s, s.v_scales, begin, n, scores);
  add_values<T, Q>(s, begin, n, scores, d, dp, acc);
}

// Floats of one query, or of its sums.
template <class T> INLINE int padded(int d) { return (int)align_up(d, Rows<T>::kChannels); }

template <int N> struct Count { static constexpr int value = N; };

// Calls tile(Count<Q>, i, begin, n, total + i * VW) for all tiles of `slots` slots, and in each for queries [i, i + Q), eight at a time
// where registers suffice. `acc`, `top` and `total` are as of attend_range.
template <class Tile> INLINE void for_tiles(int64_t slots, int g, int dp, float* acc, float* top, float* total, Tile tile) {
  float totals[kMostGroups * VW];
  for (int i = 0; i < g; i++) top[i] = -INFINITY;
  memset(totals, 0, sizeof(float) * g * VW);
  memset(acc, 0, sizeof(float) * g * dp);
  for (int64_t at = 0; at < slots; at += kTile) {
    int n = slots - at < kTile ? (int)(slots - at) : kTile, i = 0;
#if defined(__AVX512F__)
    for (; i + 8 <= g; i += 8) tile(Count<8>(), i, at, n, totals + i * VW);
#endif
    for (; i + 4 <= g; i += 4) tile(Count<4>(), i, at, n, totals + i * VW);
    for (; i + 2 <= g; i += 2) tile(Count<2>(), i, at, n, totals + i * VW);
    for (; i < g; i++) tile(Count<1>(), i, at, n, totals + i * VW);
  }
  for (int i = 0; i < g; i++) total[i] = vsum(load(totals + i * VW));
}

constexpr float kLog2E = 1.44269504f;  // weights are powers of 2

// The first `slots` of a head: for each query un-normalised sums [g][dp], the power of 2 that they are relative to, and the total
// weight. q [g, D] with rows `stride` apart; `packed`: memory for [g][dp]. S: of pages, T: of queries.
template <class S, class T>
void attend_range(const Slots& s, int64_t slots, const T* q, int64_t stride, int g, int d, float scale, float* packed,
                  float* acc, float* top, float* total) {
  int dp = padded<S>(d);
  for (int i = 0; i < g; i++) {
    float line[256 + 2 * VW] = {};
    read_row(line, q + i * stride, d, 1.0f);
    Rows<S>::pack_query(packed + i * dp, line, dp);
  }
  for_tiles(slots, g, dp, acc, top, total, [&](auto count, int i, int64_t begin, int n, float* totals) {
    attend_tile<S, count.value>(s, begin, n, packed + i * dp, d, dp, scale * kLog2E, acc + i * dp, top + i, totals);
  });
  for (int i = 0; i < g; i++)
    for (int c = 0; c < dp; c += Rows<S>::kChannels) Rows<S>::restore(acc + i * dp + c);
}

}  // namespace
