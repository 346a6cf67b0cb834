// Decide, take pages, pool, rotate and write: the tokens of a step into the cache of one layer. Two launches, or three.
//
// `decide` finds merges, weights and slots, a warp per (sequence, head); the block that comes last takes the pages. `write` pools,
// rotates and stores, a warp per token and head. `remember` moves the rings on after chunks, whose first tokens `write` reads
// them for. The state of a slot is computed from its tokens each time, never added to and subtracted from.
#include "cuda.h"
#include "cuda_device.cuh"

namespace {

using namespace dmc;

constexpr int kDecideThreads = 512, kWriteThreads = 128;
constexpr int kEach = 4;      // what a thread has at once: heads of the scan, rounds of tokens
constexpr int kNoPage = -1;  // in `before`: this head got no page, and nothing of it may change

// --------------------------------------------------------------------------------------------------- decide, take pages

// Demand per head -> exclusive prefix sum over (sequence, head) -> slice of the ring of free pages. One block.
__device__ void take_pages(const CudaAppend& p) {
  __shared__ int shared[32];
  __shared__ unsigned most;
  const Cache& c = p.cache;
  int items = (int)(p.n * c.heads), refused = 0;
  int64_t taken = c.counters[kTaken];
  unsigned available = (unsigned)(c.num_pages - (taken - c.counters[kReturned])), pages = (unsigned)c.num_pages;
  unsigned start = (unsigned)(taken % c.num_pages), base = 0, granted = 0;
  for (int from = 0; from < items; from += kEach * blockDim.x) {
    int at = from + kEach * threadIdx.x, before[kEach], after[kEach], demand[kEach], sum = 0, all;
#pragma unroll
    for (int e = 0; e < kEach; e++) {
      before[e] = after[e] = demand[e] = 0;
      if (at + e >= items) continue;
      before[e] = __ldcg(p.before + at + e), after[e] = __ldcg(p.after + at + e);  // written by other blocks: not in this L1
      bool fits = after[e] <= c.max_pages * c.page_size;
      demand[e] = fits ? pages_of(c, after[e]) - pages_of(c, before[e]) : -1;
      sum += fits ? demand[e] : 0;
    }
    unsigned place = base + block_scan(sum, shared, &all);
#pragma unroll
    for (int e = 0; e < kEach; e++) {
      if (after[e] == 0) continue;  // padding, or no token and no slot
      int i = (at + e) / (int)c.heads, h = (at + e) % (int)c.heads, wanted = demand[e] < 0 ? 0 : demand[e];
      bool enough = demand[e] == 0 || (demand[e] > 0 && place + wanted <= available);
      if (enough) {
        int64_t index = head_index(c, p.rows[i], p.layer, h);
        int32_t* row = c.page_table + index * c.max_pages + pages_of(c, before[e]);
        for (int n = 0; n < wanted; n++) {
          unsigned entry = start + place + n;
          int32_t id = c.free_pages[entry < pages ? entry : entry - pages];
          row[n] = id;
          c.refcounts[id] = 1;
        }
        c.lengths[index] = after[e];
        if (wanted) granted = place + wanted;
      } else {
        p.before[at + e] = kNoPage;
        refused++;
      }
      place += wanted;
    }
    base += all;
  }
  if (threadIdx.x == 0) most = 0;
  refused = block_sum(refused, shared);  // has the barriers for `most`
  atomicMax(&most, granted);
  __syncthreads();
  if (threadIdx.x == 0) {
    c.counters[kTaken] = taken + most;  // heads that need pages after a refused one are refused too: no gap
    c.counters[kRefused] += refused;
  }
}

template <class T> __global__ void __launch_bounds__(kDecideThreads, 2) decide(const CudaAppend p) {
  __shared__ bool last;
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
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd((unsigned long long*)c.counters + kArrived, 1ull) == gridDim.x - 1;
  __syncthreads();
  if (!last) return;
  if (threadIdx.x == 0) c.counters[kArrived] = 0;
  __threadfence();
  take_pages(p);
}

// ------------------------------------------------------------------------------------------------- pool, rotate, write

// The fp32 angle is reduced in fp64; polynomials of Cephes' sinf and cosf.
DMC_INLINE void sine_cosine(float angle, float* sine, float* cosine) {
  const double magic = 6755399441055744.0;                // 1.5 * 2^52
  double n = angle * 0.63661977236758134308 + magic;      // the nearest multiple of pi / 2
  n -= magic;
  float r = (float)(angle - n * 1.57079632679489661923), z = r * r;
  int quadrant = (int)n;
  float s = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * r + r;
  float c = ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z - 0.5f * z + 1.0f;
  float a = quadrant & 1 ? c : s, b = quadrant & 1 ? s : c;
  *sine = quadrant & 2 ? -a : a;
  *cosine = (quadrant + 1) & 2 ? -b : b;
}

// x [D] fp32 in shared memory, in place, by the whole warp; channel i turns with i + D/2.
DMC_INLINE void rotate(float* x, float position, const float* inv_freq, int d, int compress) {
  int half = d / 2, lane = threadIdx.x % 32;
  __syncwarp();
  for (int i = lane; i < half; i += 32) {
    float sine, cosine, a = x[i], b = compress && i == half - 1 ? 0.0f : x[i + half];
    sine_cosine(position * inv_freq[i], &sine, &cosine);
    x[i] = a * cosine - b * sine;
    x[i + half] = compress && i == half - 1 ? 0.0f : b * cosine + a * sine;
  }
  __syncwarp();
}

// A lane's share of one token's key and value: the units of 8 channels `lane` and, for N = 2, `lane + 32`, keys before values.
template <int N> struct Units {
  float x[N][8];
  template <class F> static DMC_INLINE void each(int d, F f) {
    int per = d / 8, lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < N; n++) {
      int unit = lane + 32 * n;
      if (unit < 2 * per) f(n, unit >= per, (unit % per) * 8);
    }
  }
};

struct Item {  // one (sequence, head)
  int i, h, begin, end, row;
  int64_t index;
};

DMC_INLINE Item item_of(const CudaAppend& p, int i, int h) {
  int row = p.rows[i];
  return {i, h, p.cu_seqlens[i], p.cu_seqlens[i + 1], row, head_index(p.cache, row < 0 ? 0 : row, p.layer, h)};
}

template <class T, int N> DMC_INLINE void read_raw(const CudaAppend& p, int64_t t, int h, Units<N>& to) {
  bool aligned_k = is_aligned<T>(p.k), aligned_v = is_aligned<T>(p.v);
  Units<N>::each(p.cache.head_dim, [&](int n, bool value, int channel) {
    load8(to.x[n], (const T*)row_of<T>(value ? p.v : p.k, t, h) + channel, value ? aligned_v : aligned_k);
  });
}

template <int N> DMC_INLINE void add(Units<N>& sum, const Units<N>& x, float weight) {
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int e = 0; e < 8; e++) sum.x[n][e] += weight * x.x[n][e];
}

// Rotate the state of a token's slot and put it where it belongs. stage: [D] of this warp.
template <class T, int N> DMC_INLINE void finish(const CudaAppend& p, const Item& x, int t, Units<N>& state, float* stage, bool refused) {
  const Cache& c = p.cache;
  int d = c.head_dim;
  int64_t at = (int64_t)t * c.heads + x.h;
  Units<N>::each(d, [&](int n, bool value, int channel) { if (!value) store8(stage + channel, state.x[n]); });
  rotate(stage, (float)p.positions[t], p.inv_freq, d, p.compress);
  Units<N>::each(d, [&](int n, bool value, int channel) { if (!value) load8(state.x[n], stage + channel); });
  __syncwarp();
  if (p.k_part.data) {
    bool aligned = is_aligned<T>(p.k_part) && is_aligned<T>(p.v_part);
    Units<N>::each(d, [&](int n, bool value, int channel) {
      store8(row_of<T>(value ? p.v_part : p.k_part, t, x.h) + channel, state.x[n], aligned);
    });
  }
  if (refused || (t + 1 < x.end && p.merge[at + c.heads])) return;
  // The newest token of its slot.
  int slot = p.slot_index[at];
  int64_t page = c.page_table[x.index * c.max_pages + slot / c.page_size], place = (page * c.page_size + slot % c.page_size) * d;
  Units<N>::each(d, [&](int n, bool value, int channel) { store8((T*)(value ? c.v_pages : c.k_pages) + place + channel, state.x[n]); });
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
template <class T, int N> DMC_INLINE void pool_segment(const CudaAppend& p, const Item& x, float* stage, bool refused) {
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
    finish<T>(p, x, t, state, stage, refused);
  }
  if (refused) return;
  Units<N>::each(d, [&](int n, bool value, int channel) { store8(place(value, channel), mean.x[n]); });
  if (threadIdx.x % 32 == 0) c.ring_w[x.index] = total;
}

template <class T> DMC_INLINE void write_query(const CudaAppend& p, int t, int head, float* stage) {
  int d = p.cache.head_dim, channel = threadIdx.x % 32 * 8;
  bool aligned = is_aligned<T>(p.q), out_aligned = is_aligned<T>(p.q_rot), padding = p.rows[p.owner[t]] < 0;
  float x[8] = {};
  if (channel < d) {
    if (!padding) load8(x, (const T*)row_of<T>(p.q, t, head) + channel, aligned);
    store8(stage + channel, x);
  }
  rotate(stage, (float)p.positions[t], p.inv_freq, d, p.compress);
  if (channel < d) {
    load8(x, stage + channel);
    store8(row_of<T>(p.q_rot, t, head) + channel, x, out_aligned);
  }
}

template <class T, int N> __global__ void __launch_bounds__(kWriteThreads, N == 1 ? 6 : 4) write(const CudaAppend p) {
  __shared__ __align__(16) float stages[kWriteThreads / 32][256];
  const Cache& c = p.cache;
  int warp = threadIdx.x / 32, heads = (int)c.heads;
  float* stage = stages[warp];
  bool in_turn = p.one_each || (p.compress && !p.window);
  int64_t at = (int64_t)blockIdx.x * (kWriteThreads / 32) + warp, items = (in_turn ? p.n : p.tokens) * heads;
  if (at >= items) {
    int64_t hq = heads * p.groups, query = at - items;
    if (query < p.tokens * hq) write_query<T>(p, (int)(query / hq), (int)(query % hq), stage);
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
      for (int t = from; t < to; t++)
        Units<N>::each(c.head_dim, [&](int n, bool value, int channel) {
          store8(row_of<T>(value ? p.v_part : p.k_part, t, x.h) + channel, state.x[n], is_aligned<T>(value ? p.v_part : p.k_part));
        });
    return;
  }
  if (p.compress && !p.window) {
    pool_segment<T, N>(p, x, stage, refused);
  } else {
    for (int t = from; t < to; t++) {
      // Only attention within the chunk asks for the states that a slot goes through.
      if (!p.k_part.data && t + 1 < x.end && p.merge[(int64_t)(t + 1) * heads + x.h]) continue;
      pool_window<T>(p, x, t, state);
      finish<T>(p, x, t, state, stage, refused);
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

template <class T, int N> const char* append(const CudaAppend& p, void* stream) {
  int64_t items = p.n * p.cache.heads, warps = kWriteThreads / 32, decisions = kDecideThreads / 32;
  bool in_turn = p.one_each || (p.compress && !p.window);
  const char* error = launch(decide<T>, (items + decisions - 1) / decisions, kDecideThreads, 0, stream, p);
  int64_t tasks = (in_turn ? items : p.tokens * p.cache.heads) + p.tokens * p.cache.heads * p.groups;
  if (!error) error = launch(write<T, N>, (tasks + warps - 1) / warps, kWriteThreads, 0, stream, p);
  if (!error && p.compress && !in_turn) error = launch(remember<T, N>, (items + warps - 1) / warps, kWriteThreads, 0, stream, p);
  return error;
}

template <class T> const char* append(const CudaAppend& p, void* stream) {
  return p.cache.head_dim <= 128 ? append<T, 1>(p, stream) : append<T, 2>(p, stream);
}

}  // namespace

extern "C" const char* dmc_cuda_append(const dmc::CudaAppend& p, void* stream) {
  dmc::OnDevice on(p.cache.device);
  switch (p.cache.dtype) {
    case dmc::kF32: return append<float>(p, stream);
    case dmc::kBF16: return append<dmc::bf16>(p, stream);
    default: return append<dmc::f16>(p, stream);
  }
}
