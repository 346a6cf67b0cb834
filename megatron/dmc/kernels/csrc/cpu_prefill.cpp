// Prefill attention: query t of a chunk over the final slots [0, slot_index[t]) of its heads and its own partial state; where the model
// evicts, over its kept slots, itself, and the tokens of its window before it, which lie in the pages of the window as it was before the
// chunk and in the chunk.
//
// A task is 64 queries (tokens times the group) of one KV head. Queries lie in the lanes: scores [slot][query], weights likewise,
// sums [channel][query], so both products broadcast a number of the cache and no sum runs across lanes. Four numbers of the cache
// by four vectors of queries (two without AVX-512) are summed in registers: eight loads for sixteen products. Where the CPU
// multiplies pairs of bf16, what is broadcast and what lies in a lane are pairs, of channels for the scores, of slots for the sums.
#include "cpu_codes.h"
#include "cpu_int8.h"

namespace {

constexpr int kRows = 64;      // queries of a task
constexpr int kBroadcast = 4;  // elements of the cache that are broadcast at a time: accumulators are kBroadcast x V vectors
constexpr int kPiece = 16;     // slots that lie in one piece, whatever the page size

// Content of 32 bits: a number, or where the CPU multiplies pairs of bf16, two channels of a key, two slots of values and weights.
template <class T> struct Panel {
  static constexpr int kTogether = 1;
  INLINE vf all(const float* x) { return splat(*x); }
  INLINE vf add(vf sum, vf x, vf y) { return sum + x * y; }
};
#if defined(__AVX512BF16__)
template <> struct Panel<bf16> {
  static constexpr int kTogether = 2;
  INLINE vf all(const float* x) {
    int32_t pair;
    memcpy(&pair, x, sizeof pair);
    return (vf)_mm512_set1_epi32(pair);
  }
  INLINE vf add(vf sum, vf x, vf y) { return (vf)_mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y); }
  INLINE vf ones() { return (vf)_mm512_set1_epi32(0x3f803f80); }
  // fp32 weights of two slots, rounded.
  INLINE vf pairs(vf x, vf y) {
    vf low = widen((vh)_mm512_cvtneps_pbh((__m512)x), bf16{}), high = widen((vh)_mm512_cvtneps_pbh((__m512)y), bf16{});
    return (vf)((vu)high | ((vu)low >> 16));
  }
};
#endif

// What is multiplied of a cache with queries of T: codes as the fp32 numbers that they stand for.
template <class T, bool Quantized> struct Numbers { typedef T type; };
template <class T> struct Numbers<T, true> { typedef float type; };

template <class T> constexpr bool kInPlace = sizeof(T) == 4 || Panel<T>::kTogether == 2;  // keys are multiplied as they lie

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

// out[e][kRows] = rows[i][e]; rows of `d` numbers. Writes up to align_up(d, VW) rows.
template <class T> INLINE void to_columns(float* out, const T* const* rows, int columns, int d) {
  for (int c = 0; c < d; c += VW)
    for (int i = 0; i < columns; i += VW) {
      vf x[VW];
#pragma GCC unroll 16
      for (int j = 0; j < VW; j++) x[j] = d - c < VW ? load_some(rows[i + j] + c, d - c) : load(rows[i + j] + c);
      transpose(x);
#pragma GCC unroll 16
      for (int j = 0; j < VW; j++) store(out + (c + j) * kRows + i, x[j]);
    }
}

template <class T> INLINE void prefetch_row(const T* x, int d) {
  for (int c = 0; c < d; c += 64 / (int)sizeof(T)) __builtin_prefetch(x + c);
}

template <class T> INLINE float dot(const T* x, const T* y, int d) {
  vf sum{};
  int c = 0;
  for (; c + VW <= d; c += VW) sum += load(x + c) * load(y + c);
  if (c < d) sum += load_some(x + c, d - c) * load_some(y + c, d - c);
  return vsum(sum);
}

// scores[slot][query], V vectors of queries at a time. Behind slot n: anything.
template <class P, int V> INLINE void score(const Block& b, const Tile& tile, int n, int depth, int columns) {
  for (int at = 0; at < columns; at += V * VW)
    for (int r = 0; r < n; r += kBroadcast) {
      vf acc[kBroadcast][V] = {};
      multiply<P, V>(acc, tile.k[r / kPiece] + r % kPiece * tile.k_row, tile.k_row, 1, b.q + at, depth);
#pragma GCC unroll 4
      for (int i = 0; i < kBroadcast; i++)
#pragma GCC unroll 4
        for (int j = 0; j < V; j++) store(b.scores + (r + i) * kRows + at + j * VW, acc[i][j]);
    }
}

// sum[channel][query] += values * weights; `n` counts what lies in 32 bits.
template <class P, int V> INLINE void add_values(const Block& b, const Tile& tile, int n, int d, int columns) {
  constexpr int piece = kPiece / P::kTogether;
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

// Scores of rows [begin, begin + n) to weights, relative to 2^top; where that lags too far behind the maximum it moves on, and
// what was summed is scaled. V vectors of queries at a time: a maximum has to wait for the one before it.
template <class T, int V> INLINE void weigh(Block& b, int64_t begin, int n, int d, int columns, float scale, bool masked) {
  constexpr int together = Panel<T>::kTogether;
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
    for (int r = n; r % together; r++)
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
    for (int r = 0; r < n; r += together)
#pragma GCC unroll 4
      for (int j = 0; j < V; j++) {
        const float* from = scores + r * kRows + j * VW;
        vf p = vexp2(load(from) - base[j]);
        if constexpr (together == 2) {
          p = Panel<T>::pairs(p, vexp2(load(from + kRows) - base[j]));
          sum[j] = Panel<T>::add(sum[j], Panel<T>::ones(), p);  // of the rounded weights
        } else {
          sum[j] += p;
        }
        store(scores + r / together * kRows + j * VW, p);
      }
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) store(b.total + at + j * VW, sum[j]);
  }
}

// Two rows of values, in pairs; `odd` null: zeros.
INLINE void pair_row(float* out, const bf16* even, const bf16* odd, int d) {
  for (int c = 0; c < d; c += VW) {
    bool whole = d - c >= VW;
    vf low = whole ? load(even + c) : load_some(even + c, d - c), high{};
    if (odd) high = whole ? load(odd + c) : load_some(odd + c, d - c);
    store(out + c, (vf)((vu)high | ((vu)low >> 16)));
  }
}

// n values to b.v, of which row(r) is the r-th.
template <class T, class Row> INLINE void copy_values(Block& b, int n, int d, Row row) {
  constexpr int together = Panel<T>::kTogether;
  int64_t wide = align_up(d, VW);
  for (int r = 0; r < n; r += together)
    if constexpr (together == 2) pair_row(b.v + r / 2 * wide, row(r), r + 1 < n ? row(r + 1) : nullptr, d);
    else read_row(b.v + r * wide, row(r), d, 1.0f);
}

template <class T> INLINE Tile read_tile(Block& b, const Slots& s, int64_t begin, int n, int d) {
  constexpr int together = Panel<T>::kTogether;
  Tile tile;
  int64_t wide = align_up(d, VW);
  tile.k_row = kInPlace<T> ? d / together : wide, tile.v_row = sizeof(T) == 4 ? d : wide;
  if (!kInPlace<T>)
    for (int r = 0; r < n; r++) read_row(b.k + r * wide, s.key<T>(begin + r), d, 1.0f);
  if (sizeof(T) != 4) copy_values<T>(b, n, d, [&](int r) { return s.value<T>(begin + r); });
  for (int r = 0; r < n; r += kPiece) {
    tile.k[r / kPiece] = kInPlace<T> ? (const float*)s.key<T>(begin + r) : b.k + r * wide;
    tile.v[r / kPiece] = sizeof(T) == 4 ? (const float*)s.value<T>(begin + r) : b.v + r / together * wide;
  }
  return tile;
}

// The window of a chunk's tokens: those before token `chunk` in the recent pages as they were, the others in the chunk, which begins
// at token `begin` of the step.
struct Window {
  Slots recent;
  int64_t begin, chunk;
};

INLINE Window window_of(const PrefillParams& p, int64_t sequence, int64_t head) {
  const Cache& c = p.cache;
  int64_t begin = p.cu_seqlens[sequence], count = p.cu_seqlens[sequence + 1] - begin;
  int64_t tokens = c.segment[head_index(c, p.rows[sequence], p.layer, head)];
  return {recent_slots(c, p.recent_before + (sequence * c.heads + head) * c.recent), begin, tokens - count};
}

// Tile of n tokens of a window, from token `from` of the sequence on. They are copied: in the step, rows of a head lie so far apart
// that they would displace each other in the CPU's first cache.
template <class T> INLINE Tile read_window(Block& b, const PrefillParams& p, const Window& w, int64_t head, int64_t from, int n) {
  constexpr int together = Panel<T>::kTogether;
  int d = p.cache.head_dim, r = 0;
  int64_t wide = align_up(d, VW);
  const T *keys[kTile], *values[kTile];
  while (r < n && from + r < w.chunk) {
    int64_t place = recent_place(p.cache, from + r);
    const T *key = w.recent.key<T>(place), *value = w.recent.value<T>(place);
    int left = w.recent.page_size - (int)(place & (w.recent.page_size - 1));
    for (; left && r < n && from + r < w.chunk; left--, r++, key += d, value += d) keys[r] = key, values[r] = value;
  }
  for (; r < n; r++) {
    int64_t t = w.begin + from + r - w.chunk;
    keys[r] = head_of<T>(p.k_part, t, head), values[r] = head_of<T>(p.v_part, t, head);
  }
  for (r = 0; r < n; r++)
    if (kInPlace<T>) memcpy(b.k + r * wide, keys[r], d * sizeof(T));
    else read_row(b.k + r * wide, keys[r], d, 1.0f);
  copy_values<T>(b, n, d, [&](int i) { return values[i]; });
  Tile tile;
  tile.k_row = tile.v_row = wide;
  for (r = 0; r < n; r += kPiece) tile.k[r / kPiece] = b.k + r * wide, tile.v[r / kPiece] = b.v + r / together * wide;
  return tile;
}

// Tile of n slots that `read(r, key, value)` writes, as fp32.
template <class Read> INLINE Tile read_numbers(Block& b, int n, int d, Read read) {
  Tile tile;
  int64_t wide = tile.k_row = tile.v_row = align_up(d, VW);
  for (int r = 0; r < n; r++) read(r, b.k + r * wide, b.v + r * wide);
  for (int r = 0; r < n; r += kPiece) tile.k[r / kPiece] = b.k + r * wide, tile.v[r / kPiece] = b.v + r * wide;
  return tile;
}

// read_tile and read_window of a quantized cache.
INLINE Tile read_code_tile(Block& b, const Cache& c, const Slots& s, int64_t begin, int n) {
  return read_numbers(b, n, c.head_dim, [&](int r, float* k, float* v) { read_codes(c, s, begin + r, k, v); });
}

template <class T>
INLINE Tile read_code_window(Block& b, const PrefillParams& p, const Window& w, int64_t head, int64_t from, int n) {
  int d = p.cache.head_dim;
  return read_numbers(b, n, d, [&](int r, float* k, float* v) {
    if (from + r < w.chunk) return read_codes(p.cache, w.recent, recent_place(p.cache, from + r), k, v);
    int64_t t = w.begin + from + r - w.chunk;
    read_row(k, head_of<T>(p.k_part, t, head), d, 1.0f);
    read_row(v, head_of<T>(p.v_part, t, head), d, 1.0f);
  });
}

// A tile whose rows are [at, at + n) of what the queries' limits count.
template <class T, int V>
INLINE void attend_rows(Block& b, const Tile& tile, int64_t at, int n, int d, int columns, float scale, bool masked) {
  using P = Panel<T>;
  score<P, V>(b, tile, n, d / P::kTogether, columns);
  weigh<T, V>(b, at, n, d, columns, scale, masked);
  add_values<P, V>(b, tile, (n + P::kTogether - 1) / P::kTogether, d, columns);
}

// Tokens [first, first + count) of a sequence, of one KV head. V: vectors of queries that are multiplied at a time. `window` null: the
// model does not evict.
template <class T, bool Quantized, int V>
void attend_block(const PrefillParams& p, int64_t row, int64_t head, int64_t first, int count, const Window* window, Block& b) {
  using N = typename Numbers<T, Quantized>::type;
  using P = Panel<N>;
  static const T nothing[256] = {};
  const Cache& c = p.cache;
  int d = c.head_dim, g = (int)p.groups, rows = count * g, columns = (int)align_up(rows, V * VW);
  Slots s = slots_of(c, row, p.layer, head);
  int32_t least = INT32_MAX, most = 0;
  float scale = p.scale * 1.44269504f;  // weights are powers of 2
  const T *q[kRows], *own[kRows];
  for (int i = 0; i < columns; i++) {
    int64_t t = first + i / g;
    q[i] = own[i] = nothing;
    b.least[i] = b.limit[i] = 0, b.top[i] = 0, b.total[i] = 1;
    if (i >= rows) continue;
    b.limit[i] = p.slot_index[t * c.heads + head];
    least = b.limit[i] < least ? b.limit[i] : least;
    most = b.limit[i] > most ? b.limit[i] : most;
    q[i] = (const T*)p.q.data + t * p.q.token + (head * g + i % g) * p.q.head;
    own[i] = (const T*)p.v_part.data + t * p.v_part.token + head * p.v_part.head;
    prefetch_row(q[i], d);  // rows of a task lie far apart
  }
  // A query begins with its own state, whose weight is 2^0.
  for (int i = 0; i < rows; i++)
    b.top[i] = scale * dot(q[i], (const T*)p.k_part.data + (first + i / g) * p.k_part.token + head * p.k_part.head, d);
  to_columns(b.sum, own, columns, d);
  if constexpr (P::kTogether == 2) to_columns(b.q, (const float* const*)q, columns, d / 2);
  else to_columns(b.q, q, columns, d);
  for (int64_t at = 0; at < most; at += kTile) {
    int n = most - at < kTile ? (int)(most - at) : kTile;
    Tile tile;
    if constexpr (Quantized) tile = read_code_tile(b, c, s, at, n);
    else tile = read_tile<T>(b, s, at, n, d);
    attend_rows<N, V>(b, tile, at, n, d, columns, scale, at + n > least);
  }
  if (window) {
    int64_t token = window->chunk + first - window->begin, last = token + count - 1;
    for (int i = 0; i < rows; i++) b.limit[i] = (int32_t)(token + i / g), b.least[i] = b.limit[i] - (int32_t)c.evict_window;
    for (int64_t at = token > c.evict_window ? token - c.evict_window : 0; at < last; at += kTile) {
      int n = last - at < kTile ? (int)(last - at) : kTile;
      bool masked = at + n > token || at + c.evict_window < last;
      Tile tile;
      if constexpr (Quantized) tile = read_code_window<T>(b, p, *window, head, at, n);
      else tile = read_window<T>(b, p, *window, head, at, n);
      attend_rows<N, V>(b, tile, at, n, d, columns, scale, masked);
    }
  }
  for (int i = 0; i < columns; i += VW) {
    vf factor = splat(1.0f) / load(b.total + i);
    for (int e = 0; e < d; e += VW) {
      vf x[VW];
#pragma GCC unroll 16
      for (int j = 0; j < VW; j++) x[j] = load(b.sum + (e + j) * kRows + i) * factor;
      transpose(x);
      for (int j = 0; j < VW && i + j < rows; j++) {
        T* out = (T*)p.out.data + (first + (i + j) / g) * p.out.token + (head * g + (i + j) % g) * p.out.head + e;
        if (d - e < VW) store_some(out, x[j], d - e);
        else store(out, x[j]);
      }
    }
  }
}

// The last token of a sequence: its own slot is final and holds its partial state, and the window ends with it, so this is decoding.
template <class S, class T> void attend_token(const PrefillParams& p, int64_t row, int64_t head, int64_t t, float* memory) {
  int d = p.cache.head_dim, g = (int)p.groups, dp = padded<S>(d);
  float *packed = memory, *acc = packed + g * dp, *top = acc + g * dp, *total = top + g;
  View view = view_of(p.cache, head_index(p.cache, row, p.layer, head));
  Slots s = slots_of(p.cache, view, 0, view.end, (int32_t*)(total + g));
  attend<S>(s, view.end, head_of<T>(p.q, t, head * g), p.q.head, g, d, p.scale, packed, acc, top, total);
  T* to = head_of<T>(p.out, t, head * g);
  for (int j = 0; j < g; j++) write_row(to + j * p.out.head, acc + j * dp, d, 1.0f / total[j]);
}

struct Task {
  int32_t sequence, head, count;
  int64_t first;
  bool lone;  // the last token of its sequence and nothing else
};

template <class T> int prefill(const PrefillParams& p) {
  const Cache& c = p.cache;
  int d = c.head_dim, g = (int)p.groups;
  int each = kRows / g;  // tokens of a task
  int64_t bound = 0;
  for (int64_t i = 0; i < p.n; i++) bound += ((p.cu_seqlens[i + 1] - p.cu_seqlens[i]) / each + 1) * c.heads;
  Task* list = (Task*)malloc(bound * sizeof(Task) + 1);
  if (!list) return 1;
  int64_t tasks = 0;
  for (int64_t i = 0; i < p.n; i++) {
    int64_t begin = p.cu_seqlens[i], count = p.cu_seqlens[i + 1] - begin;
    if (p.rows[i] < 0) {
      for (int64_t t = begin; t < begin + count; t++)
        for (int64_t h = 0; h < c.heads * g; h++) memset((T*)p.out.data + t * p.out.token + h * p.out.head, 0, d * sizeof(T));
      continue;
    }
    // The last blocks see the most slots: they start first.
    for (int64_t at = (count - 1) / each * each; count > 0 && at >= 0; at -= each)
      for (int64_t h = 0; h < c.heads; h++)
        list[tasks++] = {(int32_t)i, (int32_t)h, (int32_t)(count - at < each ? count - at : each), begin + at, at + 1 == count};
  }
  int64_t single = (int64_t)g * (2 * padded<T>(d) + 2) + c.max_pages + c.recent, floats = Block::floats(d);
  if (single > floats) floats = single;
  int failed = 0;
#pragma omp parallel num_threads(tasks < 2 ? 1 : p.threads) reduction(| : failed)
  {
    float* memory = scratch(floats);
    if (!memory) failed = 1;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < tasks; i++) {
      const Task& t = list[i];
      if (failed) continue;
      int64_t row = p.rows[t.sequence];
      if (t.lone) {
        if (c.page_dtype == kI8) attend_token<i8, T>(p, row, t.head, t.first, memory);
        else if (c.page_dtype == kF8) attend_token<f8, T>(p, row, t.head, t.first, memory);
        else attend_token<T, T>(p, row, t.head, t.first, memory);
        continue;
      }
      Window window;
      if (c.recent) window = window_of(p, t.sequence, t.head);
      const Window* own = c.recent ? &window : nullptr;
      Block block(memory, d);
      bool wide = VW == 16 && t.count * g > 2 * VW;
      if (c.quantized && wide) attend_block<T, true, kRows / VW>(p, row, t.head, t.first, t.count, own, block);
      else if (c.quantized) attend_block<T, true, 2>(p, row, t.head, t.first, t.count, own, block);
      else if (wide) attend_block<T, false, kRows / VW>(p, row, t.head, t.first, t.count, own, block);
      else attend_block<T, false, 2>(p, row, t.head, t.first, t.count, own, block);
    }
  }
  free(list);
  return failed;
}

int prefill_any(const PrefillParams& p) {
  switch (p.cache.dtype) {
    case kF32: return prefill<float>(p);
    case kBF16: return prefill<bf16>(p);
    default: return prefill<f16>(p);
  }
}

}  // namespace

extern "C" __attribute__((visibility("hidden"))) int DMC_ISA(prefill)(const dmc::PrefillParams& p) { return prefill_any(p); }
