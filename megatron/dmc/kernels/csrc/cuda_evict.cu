// Mark, take pages, rotate, write and give pages back: the tokens of a step into the cache of one layer of a model that evicts. Two
// launches.
//
// `decide_evicting` finds what leaves the windows and which of it is kept, a warp per (sequence, head); the block that comes last takes
// the pages, and gives back those that no window needs any more: what they hold stays until the next append takes them, so it is
// still read by `write_evicting`, a warp per token and head, which writes the token and moves the one that leaves for it.
#include "cuda.h"
#include "cuda_append.cuh"

namespace {

using namespace dmc;

// --------------------------------------------------------------------------------------------- decide, take, give back

// Every page that a head lets go of, in order. Those of heads that were refused stay.
template <class F> DMC_INLINE void each_left(const CudaEvict& p, int at, F f) {
  const Cache& c = p.cache;
  int seen = __ldcg(p.seen + at), i = at / (int)c.heads;
  if (seen <= 0 || p.before[at] == kNoPage) return;
  Recent was(c, seen), is(c, seen + p.cu_seqlens[i + 1] - p.cu_seqlens[i]);
  for (int page = was.begin; page < min(was.end, is.begin); page++) f(__ldcg(p.recent_before + at * c.recent + page % (int)c.recent));
}

// A page that several rows hold is returned by the last of them, in the order (sequence, head). One block.
DMC_INLINE void give_back(const CudaEvict& p, int items) {
  __shared__ int shared[32];
  const Cache& c = p.cache;
  auto each = [&](auto f) {
    for (int from = kEach * threadIdx.x; from < items; from += kEach * blockDim.x)
      for (int at = from; at < min(from + kEach, items); at++) each_left(p, at, [&](int id) { f(at, id); });
  };
  each([&](int, int id) { atomicAdd(c.refcounts + id, -1); });
  __syncthreads();
  // No row holds it any more: its count is free to say who gives it back.
  each([&](int at, int id) {
    if (__ldcg(c.refcounts + id) <= 0) atomicMin(c.refcounts + id, -1 - at);
  });
  __syncthreads();
  int64_t returned = c.counters[kReturned];
  unsigned start = (unsigned)(returned % c.num_pages), pages = (unsigned)c.num_pages, given = 0;
  for (int from = 0; from < items; from += kEach * blockDim.x) {
    int first = from + kEach * threadIdx.x, mine = 0, all;
    auto each_mine = [&](auto f) {
      for (int at = first; at < min(first + kEach, items); at++)
        each_left(p, at, [&](int id) {
          if (__ldcg(c.refcounts + id) == -1 - at) f(id);
        });
    };
    each_mine([&](int) { mine++; });
    unsigned place = given + block_scan(mine, shared, &all);
    each_mine([&](int id) {
      unsigned entry = start + place++;
      c.free_pages[entry < pages ? entry : entry - pages] = id;
      c.refcounts[id] = 0;
    });
    given += all;
  }
  if (threadIdx.x == 0) c.counters[kReturned] = returned + given;
}

DMC_INLINE void take_and_give_back(const CudaEvict& p) {
  __shared__ int shared[32];
  const Cache& c = p.cache;
  struct Item {
    int wanted, before, after, seen, tokens;
  };
  int items = (int)(p.n * c.heads), left = 0;
  auto load = [&](int at) {
    // Written by other blocks: not in this L1.
    Item x = {kIdle, __ldcg(p.before + at), __ldcg(p.after + at), __ldcg(p.seen + at), 0};
    if (x.seen < 0) return x;
    int i = at / (int)c.heads;
    x.tokens = x.seen + p.cu_seqlens[i + 1] - p.cu_seqlens[i];
    Recent was(c, x.seen), is(c, x.tokens);
    x.wanted = pages_of(c, x.after) - pages_of(c, x.before) + is.end - max(was.end, is.begin);
    if (x.after > c.max_pages * c.page_size) x.wanted = kTooLong;
    return x;
  };
  auto grant = [&](int at, const Item& x, auto page) {
    int64_t index = head_index(c, p.rows[at / (int)c.heads], p.layer, at % (int)c.heads);
    int had = pages_of(c, x.before), kept = pages_of(c, x.after) - had;
    Recent was(c, x.seen), is(c, x.tokens);
    for (int n = 0; n < x.wanted; n++) {
      if (n < kept) c.page_table[index * c.max_pages + had + n] = page(n);
      else c.recent_table[index * c.recent + (max(was.end, is.begin) + n - kept) % (int)c.recent] = page(n);
    }
    c.lengths[index] = x.after;
    c.segment[index] = x.tokens;
    left += was.begin < min(was.end, is.begin);
  };
  take_pages<Item>(c, items, load, grant, [&](int at) { p.before[at] = kNoPage; });
  if (block_sum(left, shared)) give_back(p, items);
}

__global__ void __launch_bounds__(kDecideThreads, 2) decide_evicting(const CudaEvict p) {
  const Cache& c = p.cache;
  int heads = (int)c.heads, lane = threadIdx.x % 32, window = (int)c.evict_window;
  int at = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (at < p.n * heads) {
    int i = at / heads, h = at % heads, row = p.rows[i], begin = p.cu_seqlens[i], end = p.cu_seqlens[i + 1];
    bool on = row >= 0 && begin < end;
    int64_t index = head_index(c, max(row, 0), p.layer, h);
    int before = on ? c.lengths[index] : 0, seen = on ? c.segment[index] : 0, kept = before;
    const uint8_t* marks = c.marks + index * (window + 2);
    for (int from = begin; from < end; from += 32 * kEach) {
      bool keep[kEach];  // of several rounds at once: a chunk would else wait for each
#pragma unroll
      for (int e = 0; e < kEach; e++) {
        int t = from + 32 * e + lane, leaves = seen + t - begin - window - 1, decides = leaves + !p.about_self;
        keep[e] = false;
        if (t >= end || !on || leaves < 0) continue;
        keep[e] = !(decides < seen ? marks[leaves % (window + 2)] != 0 : p.logits[(int64_t)(begin + decides - seen) * heads + h] > 0);
      }
#pragma unroll
      for (int e = 0; e < kEach; e++) {
        int t = from + 32 * e + lane;
        if (from + 32 * e >= end) break;
        unsigned keeps = __ballot_sync(kAll, keep[e]);
        if (t < end) {
          int64_t place = (int64_t)t * heads + h;
          p.moves[place] = keep[e];
          p.slot_index[place] = kept + __popc(keeps & ((2u << lane) - 1));
          if (h == 0) p.owner[t] = i;
        }
        kept += __popc(keeps);
      }
    }
    if (row >= 0)
      for (int n = lane; n < c.recent; n += 32) p.recent_before[at * c.recent + n] = c.recent_table[index * c.recent + n];
    if (lane == 0) {
      p.before[at] = before;
      p.after[at] = kept;
      p.seen[at] = on ? seen : -1;
    }
  }
  if (last_block(c)) take_and_give_back(p);
}

// --------------------------------------------------------------------------------------------------------------- write

// What leaves the window for token t: from its recent page to the head's next slot.
template <class S> DMC_INLINE void move(const Cache& c, int64_t from, int64_t to) {
  using Unit = std::conditional_t<kCoded<S>, uint2, uint4>;
  int units = c.head_dim * (int)sizeof(S) / (int)sizeof(Unit), lane = threadIdx.x % 32;
  for (int n = lane; n < 2 * units; n += 32) {
    Unit* pages = (Unit*)(n < units ? c.k_pages : c.v_pages) + (n < units ? n : n - units);
    pages[to * units] = pages[from * units];
  }
  if (kCoded<S> && lane < 2) {
    uint16_t* scales = lane ? c.v_scales : c.k_scales;
    scales[to] = scales[from];
  }
}

template <class T, class S, int N> __global__ void __launch_bounds__(kWriteThreads, 8) write_evicting(const CudaEvict p) {
  __shared__ __align__(16) float stages[kWriteThreads / 32][256];
  const Cache& c = p.cache;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, heads = (int)c.heads, size = c.page_size;
  float* stage = stages[warp];
  int64_t at = (int64_t)blockIdx.x * (kWriteThreads / 32) + warp, items = p.tokens * heads;
  if (at >= items) {
    int hq = (int)(heads * p.groups), head = (int)((at - items) % hq);
    int64_t t = (at - items) / hq;
    bool neuron = p.neuron == kNeuronAll || (p.neuron == kNeuronQuery && head % p.groups == 0);
    if (t < p.tokens) write_query<T>(p, (int)t, head, stage, neuron);
    return;
  }
  int t = (int)(at / heads), h = (int)(at % heads), i = p.owner[t], row = p.rows[i], begin = p.cu_seqlens[i], end = p.cu_seqlens[i + 1];
  int item = i * heads + h, window = (int)c.evict_window, marks = window + 2;
  Units<N> x = {};
  Codes<S, N> codes = {};
  if (row >= 0) {
    read_raw<T>(p, t, h, x);
    turn(p, t, x, stage, p.neuron == kNeuronAll);
    codes = round_to<S>(c.head_dim, x);
  }
  if (p.k_part.data) write_part<T>(p, t, h, x);
  bool refused = row >= 0 && p.before[item] == kNoPage;
  if (row < 0 || refused) {
    if (lane == 0) p.slot_index[at] = refused ? -1 : 0;
    return;
  }
  int64_t index = head_index(c, row, p.layer, h);
  const int32_t* table = c.page_table + index * c.max_pages;
  auto kept_place = [&](int slot) { return (int64_t)table[slot / size] * size + slot % size; };
  int seen = p.seen[item], token = seen + t - begin, tokens = seen + end - begin;
  if (token >= tokens - 1 - window) {
    write_slot(c, c.recent_table[index * c.recent + token / size % (int)c.recent], token % size, x, codes);
  } else if (int64_t leaves = at + (int64_t)(window + 1) * heads; p.moves[leaves]) {  // within the step: never a recent one
    int slot = p.slot_index[leaves] - 1;
    write_slot(c, table[slot / size], slot % size, x, codes);
  }
  int old = token - window - 1;  // it leaves for this one; one of this step is written above
  if (old >= 0 && old < seen && p.moves[at]) {
    int64_t page = p.recent_before[item * c.recent + old / size % (int)c.recent];
    move<S>(c, page * size + old % size, kept_place(p.slot_index[at] - 1));
  }
  int decided = p.about_self ? token : token - 1;
  if (lane == 0) {
    uint8_t* of_head = c.marks + index * marks;
    if (decided >= 0 && decided >= tokens - marks) of_head[decided % marks] = p.logits[at] > 0;
    if (!p.about_self && token == tokens - 1) of_head[token % marks] = 0;  // the next token decides about it
  }
}

template <class T, class S, int N> const char* append(const CudaEvict& p, void* stream) {
  int64_t items = p.n * p.cache.heads, warps = kWriteThreads / 32, decisions = kDecideThreads / 32;
  const char* error = launch(decide_evicting, (items + decisions - 1) / decisions, kDecideThreads, 0, stream, p);
  int64_t tasks = p.tokens * p.cache.heads * (1 + p.groups);
  return error ? error : launch(write_evicting<T, S, N>, (tasks + warps - 1) / warps, kWriteThreads, 0, stream, p);
}

}  // namespace

extern "C" const char* dmc_cuda_append_evicting(const dmc::CudaEvict& p, void* stream) {
  dmc::OnDevice on(p.cache.device);
  return dmc::with_types(p.cache, [&](auto t, auto s) {
    using T = decltype(t);
    using S = decltype(s);
    return p.cache.head_dim <= 128 ? append<T, S, 1>(p, stream) : append<T, S, 2>(p, stream);
  });
}
