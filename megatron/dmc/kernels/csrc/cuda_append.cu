// Decide, take pages, pool, rotate and write: the tokens of a step into the cache of one layer. Two launches, or three.
//
// `decide` finds merges, weights and slots, a warp per (sequence, head); the block that comes last takes the pages. `write` pools,
// rotates and stores, a warp per token and head. `remember` moves the rings on after chunks, whose first tokens `write` reads
// them for. The state of a slot is computed from its tokens each time, never added to and subtracted from.
#include "cuda.h"
#include "cuda_append.cuh"

namespace {

using namespace dmc;

// --------------------------------------------------------------------------------------------------- decide, take pages

__device__ void take(const CudaAppend& p) {
  const Cache& c = p.cache;
  struct Item {
    int wanted, before, after;
  };
  auto load = [&](int at) {
    int before = __ldcg(p.before + at), after = __ldcg(p.after + at);  // written by other blocks: not in this L1
    bool fits = after <= c.max_pages * c.page_size;
    // 0 slots: padding, or no token and no slot.
    return Item{after == 0 ? kIdle : fits ? pages_of(c, after) - pages_of(c, before) : kTooLong, before, after};
  };
  auto grant = [&](int at, const Item& item, auto page) {
    int64_t index = head_index(c, p.rows[at / (int)c.heads], p.layer, at % (int)c.heads);
    int32_t* table = c.page_table + index * c.max_pages + pages_of(c, item.before);
    for (int n = 0; n < item.wanted; n++) table[n] = page(n);
    c.lengths[index] = item.after;
  };
  take_pages<Item>(c, (int)(p.n * c.heads), load, grant, [&](int at) { p.before[at] = kNoPage; });
}

template <class T> __global__ void __launch_bounds__(kDecideThreads, 2) decide(const CudaAppend p) {
  const Cache& c = p.cache;
  int heads = (int)c.heads, lane = threadIdx.x % 32, end_channel = c.head_dim - 1;
  int at = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (at < p.n * heads) {
    int i = at / heads, h = at % heads, row = p.rows[i], begin = p.cu_seqlens[i], end = p.cu_seqlens[i + 1];
    int before = row >= 0 && begin < end ? c.lengths[head_index(c, row, p.layer, h)] : 0, slot = before - 1;
    bool decides = row >= 0 && p.compress;
    for (int from = begin; from < end; from += 32 * kEach) {
      float key[kEach], mean[kEach];  // neurons of several rounds at once: a chunk would else wait for each
#pragma unroll
      for (int e = 0; e < kEach; e++) {
        int t = from + 32 * e + lane;
        key[e] = mean[e] = 0;
        if (t >= end || !decides) continue;
        key[e] = load1(row_of<T>(p.k, t, h) + end_channel);
        for (int j = 0; j < p.groups; j++) mean[e] += load1(row_of<T>(p.q, t, h * p.groups + j) + end_channel);
      }
#pragma unroll
      for (int e = 0; e < kEach; e++) {
        int t = from + 32 * e + lane;
        if (from + 32 * e >= end) break;
        // The first token of a sequence has nothing to merge with.
        bool merge = t < end && decides && key[e] - p.bias > 0 && (before > 0 || t > begin);
        unsigned opens = __ballot_sync(kAll, t < end && !merge);
        if (t < end) {
          int64_t place = (int64_t)t * heads + h;
          p.omega[place] = 1.0f / (1.0f + expf(-(mean[e] / (float)p.groups + p.bias))) + p.epsilon;
          p.merge[place] = merge;
          p.slot_index[place] = row < 0 ? 0 : slot + __popc(opens & ((2u << lane) - 1));
          if (h == 0) p.owner[t] = i;
        }
        slot += __popc(opens);
      }
    }
    if (lane == 0) {
      p.before[at] = before;
      p.after[at] = row >= 0 && begin < end ? slot + 1 : 0;
    }
  }
  if (last_block(c)) take(p);
}

// ------------------------------------------------------------------------------------------------- pool, rotate, write

struct Item {  // one (sequence, head)
  int i, h, begin, end, row;
  int64_t index;
};

DMC_INLINE Item item_of(const CudaAppend& p, int i, int h) {
  int row = p.rows[i];
  return {i, h, p.cu_seqlens[i], p.cu_seqlens[i + 1], row, head_index(p.cache, row < 0 ? 0 : row, p.layer, h)};
}

template <int N> DMC_INLINE void add(Units<N>& sum, const Units<N>& x, float weight) {
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int e = 0; e < 8; e++) sum.x[n][e] += weight * x.x[n][e];
}

// Rotate the state of a token's slot and put it where it belongs. stage: [D] of this warp.
template <class T, class S, int N>
DMC_INLINE void finish(const CudaAppend& p, const Item& x, int t, Units<N>& state, float* stage, bool refused) {
  const Cache& c = p.cache;
  int64_t at = (int64_t)t * c.heads + x.h;
  turn(p, t, state, stage, p.compress);
  Codes<S, N> codes = round_to<S>(c.head_dim, state);
  if (p.k_part.data) write_part<T>(p, t, x.h, state);
  if (refused || (t + 1 < x.end && p.merge[at + c.heads])) return;
  // The newest token of its slot.
  int slot = p.slot_index[at];
  write_slot(c, c.page_table[x.index * c.max_pages + slot / c.page_size], slot % c.page_size, state, codes);
}

// The mean over the last W tokens of t's slot, the newest first; the oldest ones are in the ring.
template <class T, int N> DMC_INLINE void pool_window(const CudaAppend& p, const Item& x, int t, Units<N>& state) {
  const Cache& c = p.cache;
  int heads = (int)c.heads, d = c.head_dim;
  if (!p.merge[(int64_t)t * heads + x.h]) return read_raw<T>(p, t, x.h, state);
  state = {};
  float total = 0;
  int left = p.window;
  for (int u = t; left > 0 && u >= x.begin; u--, left--) {
    float weight = p.omega[(int64_t)u * heads + x.h];
    Units<N> raw = {};
    read_raw<T>(p, u, x.h, raw);
    add(state, raw, weight);
    total += weight;
    if (!p.merge[(int64_t)u * heads + x.h]) left = 1;
  }
  int ring = (int)c.ring, at = left > 0 ? c.segment[x.index] - 1 : -1;
#pragma unroll 4
  for (; left > 0 && at >= 0; at--, left--) {
    int64_t place = x.index * ring + at % ring;
    float weight = c.ring_w[place];
    Units<N> raw = {};
    Units<N>::each(d, [&](int n, bool value, int channel) { load8(raw.x[n], (const T*)(value ? c.ring_v : c.ring_k) + place * d + channel); });
    add(state, raw, weight);
    total += weight;
  }
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int e = 0; e < 8; e++) state.x[n][e] /= total;
}

// Ring and segment after the step. A lane writes the channels that it alone has read.
template <class T, int N> DMC_INLINE void remember_item(const CudaAppend& p, const Item& x) {
  const Cache& c = p.cache;
  int heads = (int)c.heads, d = c.head_dim, ring = (int)c.ring, lane = threadIdx.x % 32, count = x.end - x.begin, since = 0;
  for (; since < count; since += 32) {  // tokens at the end that merge
    int t = x.end - 1 - since - lane;
    unsigned opens = __ballot_sync(kAll, t >= x.begin && !p.merge[(int64_t)t * heads + x.h]);
    if (!opens) continue;
    since += __ffs(opens) - 1;
    break;
  }
  int segment = since < count ? since + 1 : c.segment[x.index] + count;
  __syncwarp();
  if (p.window)
    for (int back = 0; back < count && back < segment && back < ring; back++) {
      int t = x.end - 1 - back;
      int64_t place = x.index * ring + (segment - 1 - back) % ring;
      Units<N> raw = {};
      read_raw<T>(p, t, x.h, raw);
      Units<N>::each(d, [&](int n, bool value, int channel) { store8((T*)(value ? c.ring_v : c.ring_k) + place * d + channel, raw.x[n]); });
      if (lane == 0) c.ring_w[place] = p.omega[(int64_t)t * heads + x.h];
    }
  if (lane == 0) c.segment[x.index] = segment;
}

// All tokens of one head in turn, without a window: the fp32 mean of the segment moves on.
template <class T, class S, int N> DMC_INLINE void pool_segment(const CudaAppend& p, const Item& x, float* stage, bool refused) {
  const Cache& c = p.cache;
  int d = c.head_dim;
  Units<N> mean = {}, raw = {};
  float total = 0;
  auto place = [&](bool value, int channel) { return (float*)(value ? c.ring_v : c.ring_k) + x.index * d + channel; };
  if (c.segment[x.index] > 0) {
    total = c.ring_w[x.index];
    Units<N>::each(d, [&](int n, bool value, int channel) { load8(mean.x[n], place(value, channel)); });
  }
  __syncwarp();
  for (int t = x.begin; t < x.end; t++) {
    int64_t at = (int64_t)t * c.heads + x.h;
    float weight = p.omega[at];
    read_raw<T>(p, t, x.h, raw);
    total = p.merge[at] ? total + weight : weight;
    float share = p.merge[at] ? weight / total : 1.0f;
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int e = 0; e < 8; e++) mean.x[n][e] = p.merge[at] ? mean.x[n][e] + share * (raw.x[n][e] - mean.x[n][e]) : raw.x[n][e];
    Units<N> state = mean;
    finish<T, S>(p, x, t, state, stage, refused);
  }
  if (refused) return;
  Units<N>::each(d, [&](int n, bool value, int channel) { store8(place(value, channel), mean.x[n]); });
  if (threadIdx.x % 32 == 0) c.ring_w[x.index] = total;
}

template <class T, class S, int N> __global__ void __launch_bounds__(kWriteThreads, N == 1 ? 6 : 4) write(const CudaAppend p) {
  __shared__ __align__(16) float stages[kWriteThreads / 32][256];
  const Cache& c = p.cache;
  int warp = threadIdx.x / 32, heads = (int)c.heads;
  float* stage = stages[warp];
  bool in_turn = p.one_each || (p.compress && !p.window);
  int64_t at = (int64_t)blockIdx.x * (kWriteThreads / 32) + warp, items = (in_turn ? p.n : p.tokens) * heads;
  if (at >= items) {
    int64_t hq = heads * p.groups, query = at - items;
    if (query < p.tokens * hq) write_query<T>(p, (int)(query / hq), (int)(query % hq), stage, p.compress);
    return;
  }
  int i = (int)(in_turn ? at / heads : p.owner[at / heads]), lane = threadIdx.x % 32;
  Item x = item_of(p, i, (int)(at % heads));
  int from = in_turn ? x.begin : (int)(at / heads), to = in_turn ? x.end : from + 1;
  if (from >= to) return;
  bool refused = p.before[(int64_t)i * heads + x.h] == kNoPage;
  Units<N> state = {};
  if (x.row < 0) {
    if (p.k_part.data)
      for (int t = from; t < to; t++) write_part<T>(p, t, x.h, state);
    return;
  }
  if (p.compress && !p.window) {
    pool_segment<T, S, N>(p, x, stage, refused);
  } else {
    for (int t = from; t < to; t++) {
      // Only attention within the chunk asks for the states that a slot goes through.
      if (!p.k_part.data && t + 1 < x.end && p.merge[(int64_t)(t + 1) * heads + x.h]) continue;
      pool_window<T>(p, x, t, state);
      finish<T, S>(p, x, t, state, stage, refused);
    }
  }
  if (in_turn && p.compress && !refused) {
    __syncwarp();
    remember_item<T, N>(p, x);
  }
  __syncwarp();
  if (refused)  // its tokens see themselves only
    for (int t = from + lane; t < to; t += 32) p.slot_index[(int64_t)t * heads + x.h] = 0;
}

template <class T, int N> __global__ void __launch_bounds__(kWriteThreads, 4) remember(const CudaAppend p) {
  int64_t at = (int64_t)blockIdx.x * (kWriteThreads / 32) + threadIdx.x / 32;
  if (at >= p.n * p.cache.heads || p.before[at] == kNoPage) return;
  Item x = item_of(p, (int)(at / p.cache.heads), (int)(at % p.cache.heads));
  if (x.row >= 0 && x.begin < x.end) remember_item<T, N>(p, x);
}

template <class T, class S, int N> const char* append(const CudaAppend& p, void* stream) {
  int64_t items = p.n * p.cache.heads, warps = kWriteThreads / 32, decisions = kDecideThreads / 32;
  bool in_turn = p.one_each || (p.compress && !p.window);
  const char* error = launch(decide<T>, (items + decisions - 1) / decisions, kDecideThreads, 0, stream, p);
  int64_t tasks = (in_turn ? items : p.tokens * p.cache.heads) + p.tokens * p.cache.heads * p.groups;
  if (!error) error = launch(write<T, S, N>, (tasks + warps - 1) / warps, kWriteThreads, 0, stream, p);
  if (!error && p.compress && !in_turn) error = launch(remember<T, N>, (items + warps - 1) / warps, kWriteThreads, 0, stream, p);
  return error;
}

}  // namespace

extern "C" const char* dmc_cuda_append(const dmc::CudaAppend& p, void* stream) {
  dmc::OnDevice on(p.cache.device);
  return dmc::with_types(p.cache, [&](auto t, auto s) {
    using T = decltype(t);
    using S = decltype(s);
    return p.cache.head_dim <= 128 ? append<T, S, 1>(p, stream) : append<T, S, 2>(p, stream);
  });
}
