// Launcher of the CPU kernels. It checks the values of the index tensors too, and takes the pages of a step.
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <vector>

#define DMC_DEVICE kDLCPU
#include "launch.h"
#include "cpu.h"

#define DMC_TABLE(isa)                                                                          \
  extern "C" {                                                                                  \
  int dmc_decode_##isa(const dmc::DecodeParams&);                                               \
  int dmc_prefill_##isa(const dmc::PrefillParams&);                                             \
  void dmc_decide_##isa(const dmc::AppendParams&);                                              \
  void dmc_write_##isa(const dmc::AppendParams&);                                               \
  void dmc_norm_##isa(const dmc::NormParams&);                                                  \
  void dmc_silu_##isa(const dmc::SiluParams&);                                                  \
  }                                                                                             \
  static const dmc::Kernels table_##isa = {#isa,           dmc_decode_##isa, dmc_prefill_##isa, dmc_decide_##isa, \
                                           dmc_write_##isa, dmc_norm_##isa,   dmc_silu_##isa};

#ifdef DMC_WITH_avx512bf16
DMC_TABLE(avx512bf16)
#endif
#ifdef DMC_WITH_avx512
DMC_TABLE(avx512)
#endif
#ifdef DMC_WITH_avx2
DMC_TABLE(avx2)
#endif
#ifdef DMC_WITH_base
DMC_TABLE(base)
#endif

namespace {

// The best of the builds in this library that this CPU runs; MEGATRON_DMC_ISA names another, for tests.
const Kernels& kernels() {
  static const Kernels* best = [] {
    const char* wish = getenv("MEGATRON_DMC_ISA");
    std::vector<const Kernels*> usable;
#if defined(DMC_WITH_avx512) || defined(DMC_WITH_avx512bf16)
    bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
#ifdef DMC_WITH_avx512bf16
    if (avx512 && __builtin_cpu_supports("avx512bf16")) usable.push_back(&table_avx512bf16);
#endif
#ifdef DMC_WITH_avx512
    // In the two cycles that Intel's CPUs take for a product of pairs of bf16 they do four FMA, each half as many products.
    if (avx512) usable.insert(__builtin_cpu_is("intel") ? usable.begin() : usable.end(), &table_avx512);
#endif
#ifdef DMC_WITH_avx2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
      usable.push_back(&table_avx2);
#endif
#ifdef DMC_WITH_base
    usable.push_back(&table_base);
#endif
    for (const Kernels* k : usable)
      if (!wish || !*wish || std::string(wish) == k->name) return k;
    return (const Kernels*)nullptr;
  }();
  if (!best)
    TVM_FFI_THROW(RuntimeError) << "this build of the CPU kernels has none for this CPU"
                                << (getenv("MEGATRON_DMC_ISA") ? " and MEGATRON_DMC_ISA" : "")
                                << "; build it here: dmc build";
  return *best;
}

void check_cache(const Cache& c) {
  if (c.evict_window) TVM_FFI_THROW(RuntimeError) << "a cache of a model that evicts is not implemented in these CPU kernels";
}

void check_rows(const Cache& c, const int32_t* rows, int64_t n, const char* name = "rows") {
  for (int64_t i = 0; i < n; i++)
    if (rows[i] >= c.rows) TVM_FFI_THROW(ValueError) << name << "[" << i << "] is " << rows[i] << ", and the cache has " << c.rows << " rows";
}

void check_offsets(const int32_t* cu_seqlens, int64_t n, int64_t tokens) {
  bool ok = cu_seqlens[0] == 0 && cu_seqlens[n] == tokens;
  for (int64_t i = 0; i < n; i++) ok = ok && cu_seqlens[i] <= cu_seqlens[i + 1];
  if (!ok)
    TVM_FFI_THROW(ValueError) << "cu_seqlens goes from " << cu_seqlens[0] << " to " << cu_seqlens[n] << " for " << tokens
                              << " tokens; it must begin with 0, never fall, and end with their number";
}

void done(int failed) {
  if (failed) TVM_FFI_THROW(MemoryError) << "no memory for the scratch of attention";
}

int64_t pages_of(const Cache& c, int64_t slots) { return (slots + c.page_size - 1) / c.page_size; }

int64_t available(const Cache& c) { return c.num_pages - (c.counters[kTaken] - c.counters[kReturned]); }

int32_t take_page(const Cache& c) {
  int32_t page = c.free_pages[c.counters[kTaken]++ % c.num_pages];
  c.refcounts[page] = 1;
  return page;
}

// Demand per head -> exclusive prefix sum over (sequence, head) -> slice of the ring of free pages.
void take_pages(const AppendParams& p) {
  const Cache& c = p.cache;
  auto after = [&](int64_t i, int64_t h) { return (int64_t)p.slot_index[(p.cu_seqlens[i + 1] - 1) * c.heads + h] + 1; };
  int64_t total = 0, longest = 0;
  for (int64_t i = 0; i < p.n; i++)
    for (int64_t h = 0; h < c.heads && p.rows[i] >= 0 && p.cu_seqlens[i] < p.cu_seqlens[i + 1]; h++) {
      longest = std::max(longest, after(i, h));
      total += pages_of(c, after(i, h)) - pages_of(c, p.before[i * c.heads + h]);
    }
  if (longest > c.max_pages * c.page_size)
    TVM_FFI_THROW(RuntimeError) << "a head would hold " << longest << " slots, and its row of the page table " << c.max_pages * c.page_size;
  if (total > available(c))
    TVM_FFI_THROW(RuntimeError) << "the step needs " << total << " pages and " << available(c) << " are free; nothing was written";
  for (int64_t i = 0; i < p.n; i++)
    for (int64_t h = 0; h < c.heads && p.rows[i] >= 0 && p.cu_seqlens[i] < p.cu_seqlens[i + 1]; h++) {
      int64_t index = (p.rows[i] * c.layers + p.layer) * c.heads + h;
      for (int64_t page = pages_of(c, p.before[i * c.heads + h]); page < pages_of(c, after(i, h)); page++)
        c.page_table[index * c.max_pages + page] = take_page(c);
      c.lengths[index] = (int32_t)after(i, h);
    }
}

void run(AppendParams& p, const Optional<TensorView>&) {
  const Cache& c = p.cache;
  check_rows(c, p.rows, p.n);
  check_offsets(p.cu_seqlens, p.n, p.tokens);
  if (!p.tokens) return;
  // Kept from call to call; every call writes what it reads.
  static thread_local std::vector<uint8_t> merge;
  static thread_local std::vector<float> omega, cos_sin;
  static thread_local std::vector<int32_t> before, index;
  int64_t all = p.tokens * c.heads;
  merge.resize(all), omega.resize(all), cos_sin.resize(p.tokens * c.head_dim), before.resize(p.n * c.heads);
  p.merge = merge.data(), p.omega = omega.data(), p.cos_sin = cos_sin.data(), p.before = before.data();
  if (!p.slot_index) {
    index.resize(all);
    p.slot_index = index.data();
  }
  kernels().decide(p);
  take_pages(p);
  kernels().write(p);
}

void run(EvictParams&, const Optional<TensorView>&) {
  TVM_FFI_THROW(RuntimeError) << "append_evicting is not implemented in these CPU kernels";
}

void run(DecodeParams& p, const Optional<TensorView>&) {
  check_rows(p.cache, p.rows, p.n);
  done(kernels().decode(p));
}

void run(PrefillParams& p) {
  check_rows(p.cache, p.rows, p.n);
  check_offsets(p.cu_seqlens, p.n, p.tokens);
  done(kernels().prefill(p));
}

void run(const ForkParams& p) {
  const Cache& c = p.cache;
  const int32_t *from = p.source, *to = p.target;
  check_rows(c, from, p.n, "source");
  check_rows(c, to, p.n, "target");
  int64_t all = c.layers * c.heads, total = 0;
  // A compressing model may write its last slot again, any model the slot after it: pages before that are shared.
  auto shared = [&](int64_t length) { return (c.ring && length ? length - 1 : length) / c.page_size; };
  std::vector<bool> taken(c.rows);
  for (int64_t i = 0; i < p.n; i++)
    if (from[i] >= 0 && to[i] >= 0) taken[from[i]] = true;
  for (int64_t i = 0; i < p.n; i++) {
    if (from[i] < 0 || to[i] < 0) continue;
    bool empty = !taken[to[i]];
    taken[to[i]] = true;
    for (int64_t e = 0; e < all; e++) {
      int64_t length = c.lengths[from[i] * all + e];
      empty = empty && !c.lengths[to[i] * all + e];
      total += pages_of(c, length) - shared(length);
    }
    if (!empty) TVM_FFI_THROW(ValueError) << "target[" << i << "] is row " << to[i] << "; targets must be distinct empty rows that are no sources";
  }
  if (total > available(c))
    TVM_FFI_THROW(RuntimeError) << "the copies need " << total << " pages and " << available(c) << " are free; nothing was written";
  auto copy = [](void* base, int64_t a, int64_t b, int64_t bytes) {
    memcpy((char*)base + b * bytes, (char*)base + a * bytes, bytes);
  };
  int64_t width = c.dtype == kF32 ? 4 : 2, page_bytes = c.page_size * c.head_dim * width;
  int64_t ring_bytes = c.ring * c.head_dim * (c.ring_dtype == kF32 ? 4 : 2);
  for (int64_t i = 0; i < p.n; i++)
    for (int64_t e = 0; from[i] >= 0 && to[i] >= 0 && e < all; e++) {
      int64_t a = from[i] * all + e, b = to[i] * all + e, column = 0;
      const int32_t* old = c.page_table + a * c.max_pages;
      int32_t* table = c.page_table + b * c.max_pages;
      for (; column < shared(c.lengths[a]); column++) c.refcounts[table[column] = old[column]]++;
      if (column < pages_of(c, c.lengths[a])) {
        table[column] = take_page(c);
        copy(c.k_pages, old[column], table[column], page_bytes);
        copy(c.v_pages, old[column], table[column], page_bytes);
      }
      c.lengths[b] = c.lengths[a], c.segment[b] = c.segment[a];
      copy(c.ring_k, a, b, ring_bytes);
      copy(c.ring_v, a, b, ring_bytes);
      copy(c.ring_w, a, b, c.ring * sizeof(float));
    }
}

void run(const FreeParams& p) {
  const Cache& c = p.cache;
  check_rows(c, p.rows, p.n);
  int64_t next = c.counters[kReturned];
  for (int64_t i = 0; i < p.n; i++)
    for (int64_t e = 0; p.rows[i] >= 0 && e < c.layers * c.heads; e++) {
      int64_t index = p.rows[i] * c.layers * c.heads + e, pages = pages_of(c, c.lengths[index]);
      for (int64_t page = 0; page < pages; page++) {
        int32_t id = c.page_table[index * c.max_pages + page];
        if (--c.refcounts[id] == 0) c.free_pages[next++ % c.num_pages] = id;
      }
      c.lengths[index] = c.segment[index] = 0;
    }
  c.counters[kReturned] = next;
}

void run(const NormParams& p) { kernels().norm(p); }

void run(const SiluParams& p) { kernels().silu(p); }

tvm::ffi::String isa() { return kernels().name; }

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(isa, isa);
