// Prefill attention: query t of a chunk over the final slots [0, slot_index[t]) of its heads and its own partial state; where the model
// evicts, over its kept slots, itself, and the tokens of its window before it, which lie in the pages of the window as it was before the
// chunk and in the chunk.
//
// A task is 64 queries (tokens times the group) of one KV head. Slots are read by tiles of 64.
#include "cpu_codes.h"
#include "cpu_int8.h"
#include "cpu_prefill.h"

namespace {

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
template <class T, class N, class Row> INLINE void copy_values(Block& b, int n, int d, Row row) {
  constexpr int together = Panel<N>::kTogether;
  int64_t wide = align_up(d, VW);
  if constexpr (kTiled<N>) {
    const T* rows[kTile];
    for (int r = 0; r < n; r++) rows[r] = row(r);
    return turn_rows((T*)b.v, rows, n, d);
  }
  for (int r = 0; r < n; r += together)
    if constexpr (together == 2) pair_row(b.v + r / 2 * wide, row(r), r + 1 < n ? row(r + 1) : nullptr, d);
    else read_row(b.v + r * wide, row(r), d, 1.0f);
}

template <class T, class N> INLINE Tile read_tile(Block& b, const Slots& s, int64_t begin, int n, int d) {
  constexpr int together = Panel<N>::kTogether;
  Tile tile;
  int64_t wide = align_up(d, VW);
  tile.k_row = kInPlace<T, N> ? d / together : wide, tile.v_row = sizeof(T) == 4 ? d : wide;
  if (!kInPlace<T, N>)
    for (int r = 0; r < n; r++) read_row(b.k + r * wide, s.key<T>(begin + r), d, 1.0f);
  if (sizeof(T) != 4) copy_values<T, N>(b, n, d, [&](int r) { return s.value<T>(begin + r); });
  for (int r = 0; r < n; r += kPiece) {
    tile.k[r / kPiece] = kInPlace<T, N> ? (const float*)s.key<T>(begin + r) : b.k + r * wide;
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
template <class T, class N> INLINE Tile read_window(Block& b, const PrefillParams& p, const Window& w, int64_t head, int64_t from, int n) {
  constexpr int together = Panel<N>::kTogether;
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
    if (kInPlace<T, N>) memcpy(b.k + r * wide, keys[r], d * sizeof(T));
    else read_row(b.k + r * wide, keys[r], d, 1.0f);
  copy_values<T, N>(b, n, d, [&](int i) { return values[i]; });
  Tile tile;
  tile.k_row = tile.v_row = wide;
  for (r = 0; r < n; r += kPiece) tile.k[r / kPiece] = b.k + r * wide, tile.v[r / kPiece] = b.v + r / together * wide;
  return tile;
}

// Tile of n slots that `read(r, key, value)` writes as fp32, with zeros up to align_up(d, VW). For tiles of the CPU they are rounded.
template <class T, class N, class Read> INLINE Tile read_numbers(Block& b, int n, int d, Read read) {
  Tile tile;
  int64_t wide = tile.k_row = tile.v_row = align_up(d, VW);
  for (int r = 0; r < n; r += kPiece) tile.k[r / kPiece] = b.k + r * wide, tile.v[r / kPiece] = b.v + r * wide;
  if constexpr (kTiled<N>) {
    const T* values[kTile];  // behind the keys, which take half of their rows
    for (int r = 0; r < n; r++) {
      float k[256 + VW], v[256 + VW];
      read(r, k, v);
      T* to = (T*)(b.k + r * wide);
      write_row(to, k, d, 1.0f), write_row(to + d, v, d, 1.0f);
      values[r] = to + d;
    }
    turn_rows((T*)b.v, values, n, d);
  } else {
    for (int r = 0; r < n; r++) read(r, b.k + r * wide, b.v + r * wide);
  }
  return tile;
}

// read_tile and read_window of a quantized cache.
template <class T, class N> INLINE Tile read_code_tile(Block& b, const Cache& c, const Slots& s, int64_t begin, int n) {
  return read_numbers<T, N>(b, n, c.head_dim, [&](int r, float* k, float* v) { read_codes(c, s, begin + r, k, v); });
}

template <class T, class N>
INLINE Tile read_code_window(Block& b, const PrefillParams& p, const Window& w, int64_t head, int64_t from, int n) {
  int d = p.cache.head_dim;
  return read_numbers<T, N>(b, n, d, [&](int r, float* k, float* v) {
    if (from + r < w.chunk) return read_codes(p.cache, w.recent, recent_place(p.cache, from + r), k, v);
    int64_t t = w.begin + from + r - w.chunk;
    read_row(k, head_of<T>(p.k_part, t, head), d, 1.0f);
    read_row(v, head_of<T>(p.v_part, t, head), d, 1.0f);
  });
}

// Tokens [first, first + count) of a sequence, of one KV head. N: what is multiplied: T, or fp32 where pages are quantized, or Tiled.
// V: vectors of queries that are multiplied at a time. `window` null: the model does not evict.
template <class T, class N, bool Quantized, int V>
void attend_block(const PrefillParams& p, int64_t row, int64_t head, int64_t first, int count, const Window* window, Block& b) {
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
    if constexpr (Quantized) tile = read_code_tile<T, N>(b, c, s, at, n);
    else tile = read_tile<T, N>(b, s, at, n, d);
    attend_rows<N, V>(b, tile, at, n, d, columns, scale, at + n > least);
  }
  if (window) {
    int64_t token = window->chunk + first - window->begin, last = token + count - 1;
    for (int i = 0; i < rows; i++) b.limit[i] = (int32_t)(token + i / g), b.least[i] = b.limit[i] - (int32_t)c.evict_window;
    for (int64_t at = token > c.evict_window ? token - c.evict_window : 0; at < last; at += kTile) {
      int n = last - at < kTile ? (int)(last - at) : kTile;
      bool masked = at + n > token || at + c.evict_window < last;
      Tile tile;
      if constexpr (Quantized) tile = read_code_window<T, N>(b, p, *window, head, at, n);
      else tile = read_window<T, N>(b, p, *window, head, at, n);
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

template <class T, class N, bool Quantized>
INLINE void attend_task(const PrefillParams& p, int64_t row, const Task& t, const Window* window, Block& b) {
  bool wide = VW == 16 && t.count * p.groups > 2 * VW;
  if (wide) attend_block<T, N, Quantized, kRows / VW>(p, row, t.head, t.first, t.count, window, b);
  else attend_block<T, N, Quantized, 2>(p, row, t.head, t.first, t.count, window, b);
}

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
  bool tiled = kHasTiles<T> && d % kSide == 0;
#pragma omp parallel num_threads(tasks < 2 ? 1 : p.threads) reduction(| : failed)
  {
    float* memory = scratch(floats);
    if (!memory) failed = 1;
    if (tiled) configure_tiles();
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
      if constexpr (kHasTiles<T>)
        if (tiled) {
          if (c.quantized) attend_task<T, Tiled, true>(p, row, t, own, block);
          else attend_task<T, Tiled, false>(p, row, t, own, block);
          continue;
        }
      if (c.quantized) attend_task<T, float, true>(p, row, t, own, block);
      else attend_task<T, T, false>(p, row, t, own, block);
    }
    if (tiled) release_tiles();
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
