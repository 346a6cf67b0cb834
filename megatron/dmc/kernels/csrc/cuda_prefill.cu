// Prefill attention: query t of a chunk over the final slots [0, slot_index[t]) of its head and its own partial state; of a model that
// evicts, over its kept slots and tokens t - w to t, which lie in the recent pages of before the chunk and in the chunk itself.
//
// A block takes some rows (tokens times the group) of one KV head; how many tiles of rows there are only the device knows, so the
// grid is as large as they can be, and blocks without one end at once. For elements of 16 bits it is FlashAttention-2's loop on
// tensor cores: 16 rows a warp, keys and values through shared memory, the next tile copied while one is worked on. Else a block
// takes 4 rows, as decode does.
#include "cuda.h"
#include "cuda_attention.cuh"

namespace {

using namespace dmc;

// Rows [first, first + rows) of a KV head's queries, a row being (token, query head of the group); `row` is the sequence's row of the
// cache. rows is 0 for a block without work.
struct Tile {
  int sequence, row, begin, head, first, rows;
};

// Tokens that the rows of a tile see whatever was decided about them, by their index in the sequence: each row the latest `span` up to
// its own. None unless the model evicts.
struct Window {
  const int32_t* table;  // recent pages before the chunk
  int before, shift;     // tokens that were there before the chunk; from a token of the chunk to its place among all T
  int span, begin, end;

  DMC_INLINE void set(const PrefillParams& p, const Tile& tile) {
    const Cache& c = p.cache;
    span = begin = end = 0;
    if (!c.recent || tile.row < 0) return;
    int heads = (int)c.heads, groups = (int)p.groups, count = p.cu_seqlens[tile.sequence + 1] - tile.begin;
    bool refused = p.slot_index[(int64_t)tile.begin * heads + tile.head] < 0;  // its tokens see themselves only
    table = p.recent_before + (tile.sequence * heads + tile.head) * c.recent;
    before = refused ? 0 : c.segment[head_index(c, tile.row, p.layer, tile.head)] - count;
    span = refused ? 1 : (int)c.evict_window + 1, shift = tile.begin - before;
    begin = max(before + tile.first / groups + 1 - span, 0), end = before + (tile.first + tile.rows - 1) / groups + 1;
  }
  // The page of a token; -1: it is in the chunk.
  DMC_INLINE int page(const Cache& c, int token) const { return token < before ? table[token / c.page_size % (int)c.recent] : -1; }
};

// Tiles in the order of sequences, the last one first, since later rows see more slots. All pointers are to shared memory, the
// first to 32 numbers.
template <int M> DMC_INLINE Tile find_tile(const PrefillParams& p, int* shared, Tile* found, Window* window, int64_t tiles) {
  int heads = (int)p.cache.heads, groups = (int)p.groups;
  int wanted = (int)(tiles - 1 - blockIdx.x / heads), before = 0;
  if (threadIdx.x == 0) found->rows = 0;
  for (int from = 0; from < p.n && before <= wanted; from += blockDim.x) {
    int i = from + threadIdx.x, all;
    int begin = i < p.n ? p.cu_seqlens[i] : 0, rows = i < p.n ? (p.cu_seqlens[i + 1] - begin) * groups : 0, count = (rows + M - 1) / M;
    int first = before + block_scan(count, shared, &all);
    if (wanted >= first && wanted < first + count) {
      int at = (wanted - first) * M;
      *found = {i, p.rows[i], begin, (int)(blockIdx.x % heads), at, min(M, rows - at)};
      window->set(p, *found);
    }
    before += all;
  }
  __syncthreads();
  return *found;
}

// Zero outputs of padding.
template <class T> DMC_INLINE void clear(const PrefillParams& p, const Tile& tile) {
  int units = p.cache.head_dim / 8, groups = (int)p.groups;
  bool aligned = is_aligned<T>(p.out);
  float zeros[8] = {};
  for (int unit = threadIdx.x; unit < tile.rows * units; unit += blockDim.x) {
    int row = tile.first + unit / units;
    store8(row_of<T>(p.out, tile.begin + row / groups, tile.head * groups + row % groups) + unit % units * 8, zeros, aligned);
  }
}

struct Work {
  PrefillParams prefill;
  int64_t tiles;
};

// --------------------------------------------------------------------------------------------------- any dtype, any D

constexpr int kFew = 4;

template <class T, class S> __global__ void __launch_bounds__(32 * kWarps, 3) attend_few(const Work w) {
  __shared__ __align__(16) Sums<kFew, 256> sums;
  __shared__ int shared[32];
  __shared__ Tile found;
  __shared__ Window window;
  const PrefillParams& p = w.prefill;
  Tile tile = find_tile<kFew>(p, shared, &found, &window, w.tiles);
  if (!tile.rows) return;
  if (tile.row < 0) return clear<T>(p, tile);
  const Cache& c = p.cache;
  int groups = (int)p.groups, d = c.head_dim, units = d / 8, most = 0;
  bool aligned = is_aligned<T>(p.k_part) && is_aligned<T>(p.v_part), out_aligned = is_aligned<T>(p.out);
  auto token = [&](int j) { return tile.begin + (tile.first + j) / groups; };
  auto query = [&](int j) { return tile.head * groups + (tile.first + j) % groups; };
  AnyCore<T, S, kFew> core;
  core.begin(d, p.scale * kLog2E, is_aligned<T>(p.q),
             [&](int j) { return j < tile.rows ? row_of<const T>(p.q, token(j), query(j)) : nullptr; });
#pragma unroll
  for (int j = 0; j < kFew; j++) {
    core.limit[j] = j < tile.rows ? p.slot_index[(int64_t)token(j) * c.heads + tile.head] : 0;
    most = max(most, core.limit[j]);
  }
  Slots<S> slots(c, tile.row, p.layer, tile.head);
  core.run(slots, 0, most);
  if (window.span) {
    core.span = window.span;
#pragma unroll
    for (int j = 0; j < kFew; j++) core.limit[j] = j < tile.rows ? token(j) - window.shift + 1 : 0;
    core.run([&](int at, float (&k)[8], float (&v)[8]) {
      int page = window.page(c, at);
      if (!core.on) return true;
      if (page >= 0) {
        slots.load(slots.index(page, at), core.channel, k, v);
      } else {
        load8(k, row_of<const T>(p.k_part, at + window.shift, tile.head) + core.channel);
        load8(v, row_of<const T>(p.v_part, at + window.shift, tile.head) + core.channel);
      }
      return true;
    }, window.begin, window.end);
  }
#pragma unroll
  for (int j = 0; j < kFew && !window.span; j++) {
    float k[8] = {}, v[8] = {};
    if (j < tile.rows && core.on) {
      load8(k, row_of<const T>(p.k_part, token(j), tile.head) + core.channel, aligned);
      load8(v, row_of<const T>(p.v_part, token(j), tile.head) + core.channel, aligned);
    }
    core.take_own(j, k, v, j < tile.rows && (int)threadIdx.x < core.lanes);
  }
  core.finish(sums);
  __syncthreads();
  for (int unit = threadIdx.x; unit < tile.rows * units; unit += blockDim.x) {
    int j = unit / units, channel = unit % units * 8;
    Mixed mixed;
#pragma unroll
    for (int warp = 0; warp < kWarps; warp++) {
      float x[8];
      load8(x, &sums.sum[warp][j][channel]);
      mixed.add(x, sums.top[warp][j], sums.total[warp][j]);
    }
    mixed.store(row_of<T>(p.out, token(j), query(j)) + channel, out_aligned);
  }
}

// ------------------------------------------------------------------------------------- tensor cores: 16 bits, D % 16 == 0

constexpr int kRows = 128, kThreads = 2 * kRows;  // 16 rows a warp

// Keys and values of kSlots slots, each row padded by 16 bytes so that 8 rows of a matrix lie in different banks.
template <class S, int D> struct Shape {
  static constexpr int kBlocks = D > (kCoded<S> ? 64 : 80) ? 1 : 2;  // as registers allow
  static constexpr int kSlots = D > 128 ? 16 : kBlocks == 1 ? 64 : 32, kPitch = D + 8;
  static constexpr int kWide = 16 / sizeof(S);                   // elements of a chunk of 16 bytes
  static constexpr int kChunks = kSlots * (D / kWide);           // of keys or of values
  static constexpr int kMine = (kChunks + kThreads - 1) / kThreads;
  static constexpr int kStages = 2 * 2 * kSlots * kPitch * 2;    // bytes of two stages of keys and values
  static constexpr size_t kBytes = kStages + (kCoded<S> ? 2 * 16 * kChunks : 0);  // and of codes that are on their way
};

// Codes are copied to memory of their thread's own, which turns them into elements of 16 bits of the stage as soon as they are there.
template <class T, class S, int D> __global__ void __launch_bounds__(kThreads, Shape<S, D>::kBlocks) attend_many(const Work w) {
  using X = Shape<S, D>;
  constexpr int kSteps = D / 16, kSlots = X::kSlots, kPitch = X::kPitch, kWide = X::kWide, kMine = X::kMine, kChunks = X::kChunks;
  DMC_DYNAMIC_SHARED(memory);
  __shared__ int shared[32];
  __shared__ Tile found;
  __shared__ Window window;
  const PrefillParams& p = w.prefill;
  Tile tile = find_tile<kRows>(p, shared, &found, &window, w.tiles);
  if (!tile.rows) return;
  if (tile.row < 0) return clear<T>(p, tile);
  const Cache& c = p.cache;
  int groups = (int)p.groups, heads = (int)c.heads, warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, q = lane % 4;
  T(*stage)[2][kSlots][kPitch] = (T(*)[2][kSlots][kPitch])memory;
  auto token = [&](int row) { return tile.begin + (tile.first + row) / groups; };
  auto query = [&](int row) { return tile.head * groups + (tile.first + row) % groups; };
  auto limit_of = [&](int row) { return p.slot_index[(int64_t)token(row) * heads + tile.head]; };
  // A lane has the rows r and r + 8 of its warp. Slots only grow with the token, so the last row sees the most.
  int rows[2] = {warp * 16 + r, warp * 16 + r + 8}, limit[2], most = limit_of(tile.rows - 1), least = limit_of(0);
  bool here[2];
  int warp_last = min(warp * 16 + 15, tile.rows - 1), warp_least = 0, warp_most = warp * 16 < tile.rows ? limit_of(warp_last) : 0;
  unsigned span = INT32_MAX;  // a row sees `span` slots at most before its limit
  uint32_t queries[kSteps][4];
  bool aligned = is_aligned<T>(p.q) && is_aligned<T>(p.k_part) && is_aligned<T>(p.v_part) && is_aligned<T>(p.out);
  auto word = [&](const T* at) { return aligned ? *(const uint32_t*)at : (uint32_t)at[0].bits | (uint32_t)at[1].bits << 16; };
#pragma unroll
  for (int i = 0; i < 2; i++) {
    here[i] = rows[i] < tile.rows;
    limit[i] = here[i] ? limit_of(rows[i]) : 0;
    const T* row = here[i] ? row_of<const T>(p.q, token(rows[i]), query(rows[i])) : nullptr;
#pragma unroll
    for (int k = 0; k < kSteps; k++) {
      queries[k][i] = row ? word(row + 16 * k + 2 * q) : 0u;
      queries[k][i + 2] = row ? word(row + 16 * k + 2 * q + 8) : 0u;
    }
  }
  float acc[2 * kSteps][4], top[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0}, scale = p.scale * kLog2E;
#pragma unroll
  for (int n = 0; n < 2 * kSteps; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) acc[n][e] = 0;

  Slots<S> slots(c, tile.row, p.layer, tile.head);
  // Tiles of slots, then tiles of tokens.
  int slot_tiles = (max(most, 0) + kSlots - 1) / kSlots, tiles = slot_tiles + (window.end - window.begin + kSlots - 1) / kSlots;
  int ids[kMine];
  uint4(*codes)[kChunks] = (uint4(*)[kChunks])(memory + X::kStages);
  uint32_t scales[kMine];  // of the codes on their way: the key's and above it the value's, which are not negative; kNone: it is no codes
  constexpr uint32_t kNone = 1u << 31;
  auto first_of = [&](int n) { return n < slot_tiles ? n * kSlots : window.begin + (n - slot_tiles) * kSlots; };
  auto end_of = [&](int n) { return n < slot_tiles ? most : window.end; };
  auto find_pages = [&](int n) {
#pragma unroll
    for (int i = 0; i < kMine; i++) {
      int chunk = threadIdx.x + i * kThreads, slot = first_of(n) + chunk / (D / kWide);
      ids[i] = 0;
      if (chunk < kChunks && slot < end_of(n)) ids[i] = n < slot_tiles ? slots.table[slot / slots.page_size] : window.page(c, slot);
    }
  };
  auto copy = [&](int n) {
#pragma unroll
    for (int i = 0; i < kMine; i++) {
      int chunk = threadIdx.x + i * kThreads, row = chunk / (D / kWide), slot = first_of(n) + row, channel = chunk % (D / kWide) * kWide;
      if (chunk >= kChunks) continue;
      bool in = slot < end_of(n);  // behind the last slot: zeros
      auto to_stage = [&](const T* k, const T* v) {
#pragma unroll
        for (int e = 0; e < kWide; e += 8) {
          copy16(&stage[n & 1][0][row][channel + e], k + channel + e, in);
          copy16(&stage[n & 1][1][row][channel + e], v + channel + e, in);
        }
      };
      if (ids[i] < 0) {  // of the chunk itself
        to_stage(row_of<const T>(p.k_part, slot + window.shift, tile.head), row_of<const T>(p.v_part, slot + window.shift, tile.head));
        scales[i] = kNone;
        continue;
      }
      int64_t at = slots.index(ids[i], slot);
      if constexpr (kCoded<S>) {
        copy16(&codes[0][chunk], slots.k + at * D + channel, in);
        copy16(&codes[1][chunk], slots.v + at * D + channel, in);
        scales[i] = in ? (uint32_t)slots.k_scales[at] | (slots.v_scales[at] & 0x7fffu) << 16 : 0;
      } else {
        to_stage(slots.k + at * D, slots.v + at * D);
      }
    }
    copies_commit();
  };
  auto decode = [&](int n) {  // the codes of tile n, which have arrived
    if constexpr (kCoded<S>) {
#pragma unroll
      for (int i = 0; i < kMine; i++) {
        int chunk = threadIdx.x + i * kThreads, row = chunk / (D / kWide), channel = chunk % (D / kWide) * kWide;
        if (chunk >= kChunks || scales[i] == kNone) continue;
#pragma unroll
        for (int e = 0; e < 2; e++) {
          uint4 x = codes[e][chunk];
          float scale = widen((uint16_t)(scales[i] >> (16 * e)), bf16{});
          uint2 a = scaled4<S>(x.x, scale, T{}), b = scaled4<S>(x.y, scale, T{}), c = scaled4<S>(x.z, scale, T{}), d = scaled4<S>(x.w, scale, T{});
          uint4* to = (uint4*)&stage[n & 1][e][row][channel];
          to[0] = make_uint4(a.x, a.y, b.x, b.y), to[1] = make_uint4(c.x, c.y, d.x, d.y);
        }
      }
    }
  };
  if (tiles) {
    find_pages(0);
    copy(0);
    if (tiles > 1) find_pages(1);
  }
  for (int n = 0; n < tiles; n++) {
    copies_wait<0>();
    decode(n);
    __syncthreads();  // tile n is there for everyone, and everyone is done with tile n - 1
    if (n + 1 < tiles) copy(n + 1);
    if (n + 2 < tiles) find_pages(n + 2);
    int first = first_of(n);
    if (n == slot_tiles) {  // tokens from here on
      span = window.span, least = window.begin + window.span, warp_most = max(token(warp_last) - window.shift + 1, 0);
      warp_least = token(warp * 16) - window.shift + 1 - window.span;
#pragma unroll
      for (int i = 0; i < 2; i++) limit[i] = here[i] ? token(rows[i]) - window.shift + 1 : 0;
    }
    if (first >= warp_most || first + kSlots <= warp_least) continue;
    float s[kSlots / 8][4];
#pragma unroll
    for (int i = 0; i < kSlots / 8; i++) s[i][0] = s[i][1] = s[i][2] = s[i][3] = 0;
#pragma unroll
    for (int k = 0; k < kSteps; k++)
#pragma unroll
      for (int i = 0; i < kSlots / 16; i++) {
        uint32_t b[4];  // slots 16 i and 16 i + 8, channels 16 k and 16 k + 8 each
        load_matrices(b, &stage[n & 1][0][16 * i + lane / 16 * 8 + lane % 8][16 * k + lane / 8 % 2 * 8]);
        mma(s[2 * i], queries[k][0], queries[k][1], queries[k][2], queries[k][3], b[0], b[1], T{});
        mma(s[2 * i + 1], queries[k][0], queries[k][1], queries[k][2], queries[k][3], b[2], b[3], T{});
      }
    bool masked = n >= slot_tiles || first + kSlots > least;
    float highest[2] = {top[0], top[1]};
#pragma unroll
    for (int i = 0; i < kSlots / 8; i++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        s[i][e] = masked && (unsigned)(limit[e / 2] - 1 - first - 8 * i - 2 * q - e % 2) >= span ? -INFINITY : s[i][e] * scale;
        highest[e / 2] = fmaxf(highest[e / 2], s[i][e]);
      }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      highest[i] = fmaxf(highest[i], __shfl_xor_sync(kAll, highest[i], 1));
      highest[i] = fmaxf(highest[i], __shfl_xor_sync(kAll, highest[i], 2));
      float base = highest[i] == -INFINITY ? 0.0f : highest[i], factor = exp2_fast(top[i] - base);  // a row may see nothing yet
      top[i] = highest[i], highest[i] = base;
      total[i] *= factor;
#pragma unroll
      for (int k = 0; k < 2 * kSteps; k++) acc[k][2 * i] *= factor, acc[k][2 * i + 1] *= factor;
    }
#pragma unroll
    for (int i = 0; i < kSlots / 8; i++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        s[i][e] = exp2_fast(s[i][e] - highest[e / 2]);
        total[e / 2] += s[i][e];
      }
#pragma unroll
    for (int i = 0; i < kSlots / 16; i++) {
      uint32_t a0 = pack(s[2 * i][0], s[2 * i][1], T{}), a1 = pack(s[2 * i][2], s[2 * i][3], T{});
      uint32_t a2 = pack(s[2 * i + 1][0], s[2 * i + 1][1], T{}), a3 = pack(s[2 * i + 1][2], s[2 * i + 1][3], T{});
#pragma unroll
      for (int k = 0; k < kSteps; k++) {
        uint32_t b[4];  // channels 16 k and 16 k + 8, slots 16 i and 16 i + 8 each
        load_matrices_transposed(b, &stage[n & 1][1][16 * i + lane % 16][16 * k + lane / 16 * 8]);
        mma(acc[2 * k], a0, a1, a2, a3, b[0], b[1], T{});
        mma(acc[2 * k + 1], a0, a1, a2, a3, b[2], b[3], T{});
      }
    }
  }
  // Each row's own state, unless it was among the tokens, and the end.
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const T* k = here[i] ? row_of<const T>(p.k_part, token(rows[i]), tile.head) : nullptr;
    float score = 0;
#pragma unroll
    for (int step = 0; step < kSteps; step++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        uint32_t a = queries[step][i + 2 * half], b = k ? word(k + 16 * step + 2 * q + 8 * half) : 0u;
        score += widen((uint16_t)a, T{}) * widen((uint16_t)b, T{}) + widen((uint16_t)(a >> 16), T{}) * widen((uint16_t)(b >> 16), T{});
      }
    score += __shfl_xor_sync(kAll, score, 1);
    score += __shfl_xor_sync(kAll, score, 2);
    total[i] += __shfl_xor_sync(kAll, total[i], 1);
    total[i] += __shfl_xor_sync(kAll, total[i], 2);
    if (!here[i]) continue;
    score = window.span ? -INFINITY : score * scale;
    float highest = fmaxf(top[i], score), factor = exp2_fast(top[i] - highest), weight = exp2_fast(score - highest);
    float share = 1.0f / (total[i] * factor + weight);
    factor *= share, weight *= share;
    const T* v = row_of<const T>(p.v_part, token(rows[i]), tile.head);
    T* out = row_of<T>(p.out, token(rows[i]), query(rows[i]));
#pragma unroll
    for (int n = 0; n < 2 * kSteps; n++) {
      uint32_t own = word(v + 8 * n + 2 * q);
      uint32_t x = pack(acc[n][2 * i] * factor + weight * widen((uint16_t)own, T{}),
                        acc[n][2 * i + 1] * factor + weight * widen((uint16_t)(own >> 16), T{}), T{});
      T* to = out + 8 * n + 2 * q;
      if (aligned) *(uint32_t*)to = x;
      else to[0].bits = (uint16_t)x, to[1].bits = (uint16_t)(x >> 16);
    }
  }
}

template <int M> int64_t tiles_of(const PrefillParams& p) { return p.tokens * p.groups / M + p.n; }

template <class T, class S> const char* any(const PrefillParams& p, void* stream) {
  Work w = {p, tiles_of<kFew>(p)};
  return launch(attend_few<T, S>, w.tiles * p.cache.heads, 32 * kWarps, 0, stream, w);
}

template <class T, class S, int D> const char* many(const PrefillParams& p, void* stream) {
  Work w = {p, tiles_of<kRows>(p)};
  return launch(attend_many<T, S, D>, w.tiles * p.cache.heads, kThreads, Shape<S, D>::kBytes, stream, w);
}

template <class T, class S> const char* prefill(const PrefillParams& p, void* stream) {
  if constexpr (sizeof(T) == 2) switch (p.cache.head_dim) {
    case 64: return many<T, S, 64>(p, stream);
    case 80: return many<T, S, 80>(p, stream);
    case 96: return many<T, S, 96>(p, stream);
    case 128: return many<T, S, 128>(p, stream);
    case 256: return many<T, S, 256>(p, stream);
  }
  return any<T, S>(p, stream);
}

}  // namespace

extern "C" const char* dmc_cuda_prefill(const dmc::PrefillParams& p, void* stream) {
  dmc::OnDevice on(p.cache.device);
  return dmc::with_types(p.cache, [&](auto t, auto s) { return prefill<decltype(t), decltype(s)>(p, stream); });
}
