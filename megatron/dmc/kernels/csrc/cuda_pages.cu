// Pages of whole rows: give them back, and copy rows. Rare, so one block does what has an order: row after row, its heads at once.
#include "cuda.h"
#include "cuda_device.cuh"

namespace {

using namespace dmc;

constexpr int kThreads = 1024, kCopyThreads = 128;

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
      int e = from + threadIdx.x, pages = 0, free = 0, total;
      int64_t index = (int64_t)row * all + e;
      const int32_t* table = c.page_table + index * c.max_pages;
      if (e < all) pages = pages_of(c, c.lengths[index]);
      for (int n = 0; n < pages; n++) free += --c.refcounts[table[n]] == 0;
      int place = given + block_scan(free, shared, &total);
      given += total;
      for (int n = 0; n < pages && free; n++)
        if (c.refcounts[table[n]] == 0) {
          unsigned entry = (unsigned)start + place++;
          c.free_pages[entry < (unsigned)num_pages ? entry : entry - num_pages] = table[n];
          free--;
        }
      if (e < all) c.lengths[index] = c.segment[index] = 0;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) c.counters[kReturned] = returned + given;
}

// A compressing model may write its last slot again, any model the slot after it: pages before that are shared.
DMC_INLINE int shared_pages(const Cache& c, int length) { return (c.ring && length ? length - 1 : length) / c.page_size; }

__global__ void __launch_bounds__(kThreads, 1) fork_tables(const ForkParams p) {
  __shared__ int shared[32];
  const Cache& c = p.cache;
  int all = (int)(c.layers * c.heads), wanted = 0, filled = 0;
  for (int i = 0; i < p.n; i++)
    for (int e = threadIdx.x; e < all && p.source[i] >= 0 && p.target[i] >= 0; e += blockDim.x) {
      int length = c.lengths[(int64_t)p.source[i] * all + e];
      wanted += pages_of(c, length) - shared_pages(c, length);
      filled += c.lengths[(int64_t)p.target[i] * all + e] != 0;
    }
  wanted = block_sum(wanted, shared), filled = block_sum(filled, shared);
  int64_t taken = c.counters[kTaken];
  if (filled || wanted > c.num_pages - (taken - c.counters[kReturned])) {
    __syncthreads();  // everyone has read the counters
    if (threadIdx.x == 0) c.counters[kRefused] += 1;
    return;
  }
  unsigned start = (unsigned)(taken % c.num_pages), num_pages = (unsigned)c.num_pages;
  int given = 0;
  for (int i = 0; i < p.n; i++) {
    if (p.source[i] < 0 || p.target[i] < 0) continue;
    for (int from = 0; from < all; from += blockDim.x) {
      int e = from + threadIdx.x, length = 0, total;
      int64_t a = (int64_t)p.source[i] * all + e, b = (int64_t)p.target[i] * all + e;
      if (e < all) length = c.lengths[a];
      int same = shared_pages(c, length), copies = pages_of(c, length) - same, place = given + block_scan(copies, shared, &total);
      given += total;
      const int32_t* old = c.page_table + a * c.max_pages;
      int32_t* table = c.page_table + b * c.max_pages;
      for (int n = 0; n < same; n++) c.refcounts[table[n] = old[n]]++;
      if (copies) {  // the one page that may still be written
        unsigned entry = start + place;
        int32_t id = c.free_pages[entry < num_pages ? entry : entry - num_pages];
        table[same] = id;
        c.refcounts[id] = 1;
      }
      if (e < all) c.lengths[b] = length, c.segment[b] = c.segment[a];
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

// A block per pair and head: the open page, and the ring.
__global__ void __launch_bounds__(kCopyThreads) fork_copies(const ForkParams p) {
  const Cache& c = p.cache;
  int all = (int)(c.layers * c.heads), i = blockIdx.x / all, e = blockIdx.x % all;
  if (p.source[i] < 0 || p.target[i] < 0) return;
  int64_t a = (int64_t)p.source[i] * all + e, b = (int64_t)p.target[i] * all + e;
  int length = c.lengths[b], same = shared_pages(c, length);
  if (length != c.lengths[a] || !length) return;  // refused, or empty
  if (same < pages_of(c, length)) {
    int64_t width = c.dtype == kF32 ? 4 : 2, bytes = c.page_size * c.head_dim * width;
    int32_t old = c.page_table[a * c.max_pages + same], id = c.page_table[b * c.max_pages + same];
    copy(c.k_pages, old, id, bytes);
    copy(c.v_pages, old, id, bytes);
  }
  int64_t bytes = c.ring * c.head_dim * (c.ring_dtype == kF32 ? 4 : 2);
  copy(c.ring_k, a, b, bytes);
  copy(c.ring_v, a, b, bytes);
  for (int n = threadIdx.x; n < c.ring; n += blockDim.x) c.ring_w[b * c.ring + n] = c.ring_w[a * c.ring + n];
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
