// Pages of whole rows: give them back, and copy rows. Rare, so one block does what has an order: row after row, its heads at once.
#include "cuda.h"
#include "cuda_device.cuh"

namespace {

using namespace dmc;

constexpr int kThreads = 1024, kCopyThreads = 128;

// What a head holds: kept pages, and behind them the recent ones of a model that evicts, in the order of their tokens.
struct Held {
  int32_t *table, *recent;
  int kept, begin, columns, count;
  int kept_open, recent_open;  // from these on pages may still be written: one of either kind at most
  DMC_INLINE Held(const Cache& c, int64_t index) {
    int length = c.lengths[index], tokens = c.segment[index];
    Recent pages(c, tokens);
    kept = pages_of(c, length), begin = pages.begin, columns = (int)c.recent, count = kept + pages.end - begin;
    // A model that merges may write its last slot again, any model the slot after it.
    kept_open = (c.ring && length ? length - 1 : length) / c.page_size, recent_open = kept + tokens / c.page_size - begin;
    lie_in(c, index);
  }
  DMC_INLINE void lie_in(const Cache& c, int64_t index) { table = c.page_table + index * c.max_pages, recent = c.recent_table + index * c.recent; }
  DMC_INLINE int32_t& operator[](int n) const { return n < kept ? table[n] : recent[(begin + n - kept) % columns]; }
  DMC_INLINE bool open(int n) const { return n < kept ? n >= kept_open : n >= recent_open; }
  DMC_INLINE int copies() const { return (kept_open < kept) + (recent_open < count); }
};

// The pages of a row's heads are all different, so its heads do not meet in a count.
__global__ void __launch_bounds__(kThreads, 1) free_rows(const FreeParams p) {
  __shared__ int shared[32];
  const Cache& c = p.cache;
  int all = (int)(c.layers * c.heads), given = 0, num_pages = (int)c.num_pages;
  int64_t returned = c.counters[kReturned];
  int start = (int)(returned % num_pages);
  for (int i = 0; i < p.n; i++) {
    int row = p.rows[i];
    if (row < 0) continue;
    for (int from = 0; from < all; from += blockDim.x) {
      int e = from + threadIdx.x, free = 0, total;
      int64_t index = (int64_t)row * all + min(e, all - 1);
      Held pages(c, index);
      if (e >= all) pages.count = 0;
      for (int n = 0; n < pages.count; n++) free += --c.refcounts[pages[n]] == 0;
      int place = given + block_scan(free, shared, &total);
      given += total;
      for (int n = 0; n < pages.count && free; n++)
        if (c.refcounts[pages[n]] == 0) {
          unsigned entry = (unsigned)start + place++;
          c.free_pages[entry < (unsigned)num_pages ? entry : entry - num_pages] = pages[n];
          free--;
        }
      if (e < all) c.lengths[index] = c.segment[index] = 0;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) c.counters[kReturned] = returned + given;
}

// Set in the counter of the kernels' own from a refusal until the copies have seen it.
constexpr unsigned long long kRefusedFork = 1ull << 62;

__global__ void __launch_bounds__(kThreads, 1) fork_tables(const ForkParams p) {
  __shared__ int shared[32];
  const Cache& c = p.cache;
  int all = (int)(c.layers * c.heads), wanted = 0, filled = 0;
  for (int i = 0; i < p.n; i++)
    for (int e = threadIdx.x; e < all && p.source[i] >= 0 && p.target[i] >= 0; e += blockDim.x) {
      int64_t b = (int64_t)p.target[i] * all + e;
      wanted += Held(c, (int64_t)p.source[i] * all + e).copies();
      filled += c.lengths[b] != 0 || c.segment[b] != 0;
    }
  wanted = block_sum(wanted, shared), filled = block_sum(filled, shared);
  int64_t taken = c.counters[kTaken];
  if (filled || wanted > c.num_pages - (taken - c.counters[kReturned])) {
    __syncthreads();  // everyone has read the counters
    if (threadIdx.x == 0) c.counters[kRefused] += 1, c.counters[kArrived] = kRefusedFork;
    return;
  }
  unsigned start = (unsigned)(taken % c.num_pages), num_pages = (unsigned)c.num_pages;
  int given = 0;
  for (int i = 0; i < p.n; i++) {
    if (p.source[i] < 0 || p.target[i] < 0) continue;
    for (int from = 0; from < all; from += blockDim.x) {
      int e = from + threadIdx.x, total;
      int64_t a = (int64_t)p.source[i] * all + min(e, all - 1), b = (int64_t)p.target[i] * all + e;
      Held old(c, a), mine = old;
      mine.lie_in(c, b);
      unsigned entry = start + given + block_scan(e < all ? old.copies() : 0, shared, &total);
      given += total;
      if (e >= all) continue;
      for (int n = 0; n < old.count; n++) {
        if (old.open(n)) {
          int32_t id = c.free_pages[entry < num_pages ? entry : entry - num_pages];
          c.refcounts[mine[n] = id] = 1;
          entry++;
        } else {
          c.refcounts[mine[n] = old[n]]++;
        }
      }
      c.lengths[b] = c.lengths[a], c.segment[b] = c.segment[a];
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) c.counters[kTaken] = taken + given;
}

DMC_INLINE void copy(void* base, int64_t from, int64_t to, int64_t bytes) {
  const uint4* a = (const uint4*)((char*)base + from * bytes);
  uint4* b = (uint4*)((char*)base + to * bytes);
  for (int64_t n = threadIdx.x; n < bytes / 16; n += blockDim.x) b[n] = a[n];
}

// A block per pair and head: the open pages, the ring and the marks.
__global__ void __launch_bounds__(kCopyThreads) fork_copies(const ForkParams p) {
  __shared__ bool refused;
  const Cache& c = p.cache;
  int all = (int)(c.layers * c.heads), i = blockIdx.x / all, e = blockIdx.x % all;
  if (threadIdx.x == 0) {
    unsigned long long arrived = atomicAdd((unsigned long long*)c.counters + kArrived, 1ull);
    refused = arrived >= kRefusedFork;
    if (arrived % kRefusedFork == gridDim.x - 1) c.counters[kArrived] = 0;
  }
  __syncthreads();
  if (refused || p.source[i] < 0 || p.target[i] < 0) return;
  int64_t a = (int64_t)p.source[i] * all + e, b = (int64_t)p.target[i] * all + e;
  int64_t page = c.page_size * c.head_dim * (c.quantized ? 1 : c.page_dtype == kF32 ? 4 : 2), scales = c.quantized ? 2 * c.page_size : 0;
  Held old(c, a), mine = old;
  mine.lie_in(c, b);
  auto copy_page = [&](int n) {
    copy(c.k_pages, old[n], mine[n], page);
    copy(c.v_pages, old[n], mine[n], page);
    copy(c.k_scales, old[n], mine[n], scales);
    copy(c.v_scales, old[n], mine[n], scales);
  };
  if (old.kept_open < old.kept) copy_page(old.kept_open);
  if (old.recent_open < old.count) copy_page(old.recent_open);
  int64_t ring = c.ring * c.head_dim * (c.ring_dtype == kF32 ? 4 : 2), marks = c.recent ? c.evict_window + 2 : 0;
  copy(c.ring_k, a, b, ring);
  copy(c.ring_v, a, b, ring);
  for (int n = threadIdx.x; n < c.ring; n += blockDim.x) c.ring_w[b * c.ring + n] = c.ring_w[a * c.ring + n];
  for (int n = threadIdx.x; n < marks; n += blockDim.x) c.marks[b * marks + n] = c.marks[a * marks + n];
}

}  // namespace

extern "C" const char* dmc_cuda_free(const dmc::FreeParams& p, void* stream) {
  dmc::OnDevice on(p.cache.device);
  return launch(free_rows, p.n ? 1 : 0, kThreads, 0, stream, p);
}

extern "C" const char* dmc_cuda_fork(const dmc::ForkParams& p, void* stream) {
  dmc::OnDevice on(p.cache.device);
  const char* error = launch(fork_tables, p.n ? 1 : 0, kThreads, 0, stream, p);
  return error ? error : launch(fork_copies, p.n * p.cache.layers * p.cache.heads, kCopyThreads, 0, stream, p);
}
