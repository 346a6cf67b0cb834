// The checked launcher of the CPU kernels: DLPack tensors in, parameter structs of raw pointers out. Takes the pages of a step.
//
// The order of a state's tensors is that of CacheState.tensors() in state.py.
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <string>
#include <vector>

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>

#include "cpu.h"

#define DMC_TABLE(isa)                                                                          \
  extern "C" {                                                                                  \
  int dmc_decode_##isa(const dmc::DecodeParams&);                                               \
  int dmc_prefill_##isa(const dmc::PrefillParams&);                                             \
  void dmc_decide_##isa(const dmc::AppendParams&);                                              \
  void dmc_write_##isa(const dmc::AppendParams&);                                               \
  }                                                                                             \
  static const dmc::Kernels table_##isa = {#isa, dmc_decode_##isa, dmc_prefill_##isa, dmc_decide_##isa, dmc_write_##isa};

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

using namespace dmc;
using tvm::ffi::TensorView;

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
    if (avx512) usable.push_back(&table_avx512);
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
                                << "; build it here: python -m megatron.dmc.kernels.build";
  return *best;
}

std::string text(const TensorView& x) {
  std::string s = "[";
  for (int i = 0; i < x.ndim(); i++) s += (i ? ", " : "") + std::to_string(x.size(i));
  return s + "]";
}

bool is(const TensorView& x, int code, int bits) { return x.dtype().code == code && x.dtype().bits == bits && x.dtype().lanes == 1; }

void check(bool ok, const char* name, const TensorView& x, const char* want) {
  if (!ok) TVM_FFI_THROW(ValueError) << name << " is " << text(x) << " (or of the wrong dtype, strides or device); it must be " << want;
}

bool contiguous(const TensorView& x) {
  if (!x.numel()) return true;
  int64_t expect = 1;
  for (int i = x.ndim() - 1; i >= 0; i--) {
    if (x.size(i) != 1 && x.stride(i) != expect) return false;
    expect *= x.size(i);
  }
  return true;
}

template <class T> T* ints(const TensorView& x, int64_t count, const char* name, const char* want) {
  check(x.device().device_type == kDLCPU && is(x, kDLInt, 8 * sizeof(T)) && contiguous(x) && (count < 0 || x.numel() == count), name, x, want);
  return static_cast<T*>(x.data_ptr());
}

float* floats(const TensorView& x, int64_t count, const char* name, const char* want) {
  check(x.device().device_type == kDLCPU && is(x, kDLFloat, 32) && contiguous(x) && x.numel() == count, name, x, want);
  return static_cast<float*>(x.data_ptr());
}

Dtype dtype_of(const TensorView& x) {
  if (is(x, kDLFloat, 32)) return kF32;
  if (is(x, kDLBfloat, 16)) return kBF16;
  if (is(x, kDLFloat, 16)) return kF16;
  TVM_FFI_THROW(ValueError) << "the cache must be of float32, bfloat16 or float16";
  return kF32;
}

Heads heads(const TensorView& x, const Cache& c, int64_t tokens, int64_t count, const char* name, const char* want) {
  bool ok = x.device().device_type == kDLCPU && x.ndim() == 3 && x.size(2) == c.head_dim && (tokens < 0 || x.size(0) == tokens) &&
            (count < 0 || x.size(1) == count) && (x.numel() == 0 || x.stride(2) == 1);
  check(ok && dtype_of(x) == c.dtype, name, x, want);
  return {x.data_ptr(), x.stride(0), x.stride(1)};
}

struct State {
  TensorView k_pages, v_pages, page_table, lengths, ring_k, ring_v, ring_w, segment, free_pages, refcounts, counters;

  Cache cache() const {
    Cache c;
    check(k_pages.ndim() == 3 && contiguous(k_pages), "k_pages", k_pages, "[num_pages, page_size, D], contiguous");
    check(v_pages.ndim() == 3 && contiguous(v_pages) && v_pages.numel() == k_pages.numel(), "v_pages", v_pages, "like k_pages");
    check(page_table.ndim() == 4, "page_table", page_table, "int32 [rows, L, H, max_pages]");
    check(ring_w.ndim() == 4, "ring_w", ring_w, "fp32 [rows, L, H, R]");
    c.num_pages = k_pages.size(0), c.page_size = (int)k_pages.size(1), c.head_dim = (int)k_pages.size(2);
    c.rows = page_table.size(0), c.layers = page_table.size(1), c.heads = page_table.size(2), c.max_pages = page_table.size(3);
    c.ring = ring_w.size(3), c.dtype = dtype_of(k_pages);
    check(c.head_dim % 8 == 0 && c.head_dim <= 256, "k_pages", k_pages, "of a head dimension that is a multiple of 8 up to 256");
    check(c.page_size == 16 || c.page_size == 32 || c.page_size == 64, "k_pages", k_pages, "of 16, 32 or 64 slots per page");
    int64_t all = c.rows * c.layers * c.heads;
    c.k_pages = k_pages.data_ptr(), c.v_pages = v_pages.data_ptr();
    c.page_table = ints<int32_t>(page_table, -1, "page_table", "int32 [rows, L, H, max_pages]");
    c.lengths = ints<int32_t>(lengths, all, "lengths", "int32 [rows, L, H]");
    c.segment = ints<int32_t>(segment, all, "segment", "int32 [rows, L, H]");
    c.ring_w = floats(ring_w, all * c.ring, "ring_w", "fp32 [rows, L, H, R]");
    check(contiguous(ring_k) && ring_k.numel() == all * c.ring * c.head_dim, "ring_k", ring_k, "[rows, L, H, R, D]");
    check(contiguous(ring_v) && ring_v.numel() == ring_k.numel(), "ring_v", ring_v, "[rows, L, H, R, D]");
    c.ring_k = ring_k.data_ptr(), c.ring_v = ring_v.data_ptr();
    c.free_pages = ints<int32_t>(free_pages, c.num_pages, "free_pages", "int32 [num_pages]");
    c.refcounts = ints<int32_t>(refcounts, c.num_pages, "refcounts", "int32 [num_pages]");
    c.counters = ints<int64_t>(counters, 2, "counters", "int64 [2]");
    return c;
  }
};

#define STATE_ARGS                                                                                                       \
  TensorView k_pages, TensorView v_pages, TensorView page_table, TensorView lengths, TensorView ring_k, TensorView ring_v, \
      TensorView ring_w, TensorView segment, TensorView free_pages, TensorView refcounts, TensorView counters
#define STATE State{k_pages, v_pages, page_table, lengths, ring_k, ring_v, ring_w, segment, free_pages, refcounts, counters}

void check_layer(const Cache& c, int64_t layer) {
  if (layer < 0 || layer >= c.layers) TVM_FFI_THROW(ValueError) << "layer " << layer << " is none of " << c.layers;
}

const int32_t* check_rows(const Cache& c, const TensorView& slots, const char* name = "slots") {
  const int32_t* rows = ints<int32_t>(slots, -1, name, "int32 [N], contiguous");
  for (int64_t i = 0; i < slots.numel(); i++)
    if (rows[i] >= c.rows) TVM_FFI_THROW(ValueError) << name << "[" << i << "] is " << rows[i] << ", and the cache has " << c.rows << " rows";
  return rows;
}

const int32_t* check_offsets(const TensorView& cu_seqlens, int64_t n, int64_t tokens) {
  const int32_t* cu = ints<int32_t>(cu_seqlens, n + 1, "cu_seqlens", "int32 [N + 1], contiguous");
  bool ok = cu[0] == 0 && cu[n] == tokens;
  for (int64_t i = 0; i < n; i++) ok = ok && cu[i] <= cu[i + 1];
  check(ok, "cu_seqlens", cu_seqlens, "0, not falling, and end with the number of tokens");
  return cu;
}

int64_t check_groups(const Cache& c, const TensorView& q) {
  check(q.ndim() == 3 && q.size(1) % c.heads == 0 && q.size(1) / c.heads <= 64, "q", q, "[T, Hq, D] with Hq a multiple of the KV heads, at most 64 times");
  return q.size(1) / c.heads;
}

void done(int failed) {
  if (failed) TVM_FFI_THROW(MemoryError) << "no memory for the scratch of attention";
}

int64_t pages_of(const Cache& c, int64_t slots) { return (slots + c.page_size - 1) / c.page_size; }

int64_t available(const Cache& c) { return c.num_pages - (c.counters[0] - c.counters[1]); }

int32_t take_page(const Cache& c) {
  int32_t page = c.free_pages[c.counters[0]++ % c.num_pages];
  c.refcounts[page] = 1;
  return page;
}

// Demand per head -> exclusive prefix sum over (sequence, head) -> slice of the ring of free pages.
void take_pages(const AppendParams& p) {
  const Cache& c = p.cache;
  auto after = [&](int64_t i, int64_t h) { return (int64_t)p.slot_index[(p.cu_seqlens[i + 1] - 1) * c.heads + h] + 1; };
  int64_t total = 0, longest = 0;
  for (int64_t i = 0; i < p.n; i++)
    for (int64_t h = 0; h < c.heads && p.slots[i] >= 0 && p.cu_seqlens[i] < p.cu_seqlens[i + 1]; h++) {
      longest = std::max(longest, after(i, h));
      total += pages_of(c, after(i, h)) - pages_of(c, p.before[i * c.heads + h]);
    }
  if (longest > c.max_pages * c.page_size)
    TVM_FFI_THROW(RuntimeError) << "a head would hold " << longest << " slots, and its row of the page table " << c.max_pages * c.page_size;
  if (total > available(c))
    TVM_FFI_THROW(RuntimeError) << "the step needs " << total << " pages and " << available(c) << " are free; nothing was written";
  for (int64_t i = 0; i < p.n; i++)
    for (int64_t h = 0; h < c.heads && p.slots[i] >= 0 && p.cu_seqlens[i] < p.cu_seqlens[i + 1]; h++) {
      int64_t index = (p.slots[i] * c.layers + p.layer) * c.heads + h;
      for (int64_t page = pages_of(c, p.before[i * c.heads + h]); page < pages_of(c, after(i, h)); page++)
        c.page_table[index * c.max_pages + page] = take_page(c);
      c.lengths[index] = (int32_t)after(i, h);
    }
}

void append(STATE_ARGS, int64_t layer, TensorView q, TensorView k, TensorView v, TensorView cu_seqlens, TensorView slots,
            TensorView positions, TensorView inv_freq, double bias, double epsilon, int64_t window, bool compress, TensorView q_rot,
            TensorView k_part, TensorView v_part, TensorView slot_index, int64_t threads) {
  AppendParams p;
  const Cache& c = p.cache = STATE.cache();
  check_layer(c, layer);
  p.layer = layer, p.n = slots.numel(), p.tokens = q.size(0), p.groups = check_groups(c, q);
  p.q = heads(q, c, -1, -1, "q", "[T, Hq, D] of the cache's dtype, the last axis contiguous");
  p.k = heads(k, c, p.tokens, c.heads, "k", "[T, H, D] of the cache's dtype, the last axis contiguous");
  p.v = heads(v, c, p.tokens, c.heads, "v", "[T, H, D] of the cache's dtype, the last axis contiguous");
  p.slots = check_rows(c, slots);
  p.cu_seqlens = check_offsets(cu_seqlens, p.n, p.tokens);
  p.positions = ints<int32_t>(positions, p.tokens, "positions", "int32 [T], contiguous");
  p.inv_freq = floats(inv_freq, c.head_dim / 2, "inv_freq", "fp32 [D / 2], contiguous");
  p.q_rot = heads(q_rot, c, p.tokens, q.size(1), "q_rot", "like q");
  p.k_part = p.v_part = {nullptr, 0, 0};
  if (k_part.numel()) {
    p.k_part = heads(k_part, c, p.tokens, c.heads, "k_part", "like k");
    p.v_part = heads(v_part, c, p.tokens, c.heads, "v_part", "like v");
  }
  p.bias = (float)bias, p.epsilon = (float)epsilon, p.window = (int)window, p.compress = compress, p.threads = (int)threads;
  if (compress && c.ring != (window ? window : 1))
    TVM_FFI_THROW(ValueError) << "the cache's ring holds " << c.ring << " tokens and the window is " << window << "; make the cache for this window";
  if (compress && dtype_of(ring_k) != (window ? c.dtype : kF32)) TVM_FFI_THROW(ValueError) << "ring_k is of the wrong dtype for this window";
  if (!p.tokens) return;
  // Kept from call to call; every call writes what it reads.
  static thread_local std::vector<uint8_t> merge;
  static thread_local std::vector<float> omega, cos_sin;
  static thread_local std::vector<int32_t> before, index;
  int64_t all = p.tokens * c.heads;
  merge.resize(all), omega.resize(all), cos_sin.resize(p.tokens * c.head_dim), before.resize(p.n * c.heads);
  p.merge = merge.data(), p.omega = omega.data(), p.cos_sin = cos_sin.data(), p.before = before.data();
  if (slot_index.numel()) {
    p.slot_index = ints<int32_t>(slot_index, all, "slot_index", "int32 [T, H]");
  } else {
    index.resize(all);
    p.slot_index = index.data();
  }
  kernels().decide(p);
  take_pages(p);
  kernels().write(p);
}

void decode_attention(STATE_ARGS, int64_t layer, TensorView q, TensorView slots, double scale, TensorView out, int64_t threads) {
  DecodeParams p;
  const Cache& c = p.cache = STATE.cache();
  check_layer(c, layer);
  p.layer = layer, p.n = slots.numel(), p.groups = check_groups(c, q), p.scale = (float)scale, p.threads = (int)threads;
  p.q = heads(q, c, p.n, -1, "q_rot", "[N, Hq, D] of the cache's dtype, the last axis contiguous");
  p.out = heads(out, c, p.n, q.size(1), "out", "like q_rot");
  p.slots = check_rows(c, slots);
  done(kernels().decode(p));
}

void prefill_attention(STATE_ARGS, int64_t layer, TensorView q, TensorView k_part, TensorView v_part, TensorView slot_index,
                       TensorView cu_seqlens, TensorView slots, double scale, TensorView out, int64_t threads) {
  PrefillParams p;
  const Cache& c = p.cache = STATE.cache();
  check_layer(c, layer);
  p.layer = layer, p.n = slots.numel(), p.groups = check_groups(c, q), p.scale = (float)scale, p.threads = (int)threads;
  p.q = heads(q, c, -1, -1, "q_rot", "[T, Hq, D] of the cache's dtype, the last axis contiguous");
  int64_t tokens = q.size(0);
  p.k_part = heads(k_part, c, tokens, c.heads, "k_part", "[T, H, D]");
  p.v_part = heads(v_part, c, tokens, c.heads, "v_part", "[T, H, D]");
  p.out = heads(out, c, tokens, q.size(1), "out", "like q_rot");
  p.slot_index = ints<int32_t>(slot_index, tokens * c.heads, "slot_index", "int32 [T, H]");
  p.slots = check_rows(c, slots);
  p.cu_seqlens = check_offsets(cu_seqlens, p.n, tokens);
  done(kernels().prefill(p));
}

void fork_rows(STATE_ARGS, TensorView source, TensorView target) {
  Cache c = STATE.cache();
  const int32_t *from = check_rows(c, source, "source"), *to = check_rows(c, target, "target");
  check(target.numel() == source.numel(), "target", target, "as long as source");
  int64_t all = c.layers * c.heads, total = 0;
  // A compressing model may write its last slot again, any model the slot after it: pages before that are shared.
  auto shared = [&](int64_t length) { return (c.ring && length ? length - 1 : length) / c.page_size; };
  std::vector<bool> taken(c.rows);
  for (int64_t i = 0; i < source.numel(); i++)
    if (from[i] >= 0 && to[i] >= 0) taken[from[i]] = true;
  for (int64_t i = 0; i < source.numel(); i++) {
    if (from[i] < 0 || to[i] < 0) continue;
    bool empty = !taken[to[i]];
    taken[to[i]] = true;
    for (int64_t e = 0; e < all; e++) {
      int64_t length = c.lengths[from[i] * all + e];
      empty = empty && !c.lengths[to[i] * all + e];
      total += pages_of(c, length) - shared(length);
    }
    check(empty, "target", target, "distinct empty rows that are no sources");
  }
  if (total > available(c))
    TVM_FFI_THROW(RuntimeError) << "the copies need " << total << " pages and " << available(c) << " are free; nothing was written";
  auto copy = [](void* base, int64_t a, int64_t b, int64_t bytes) {
    memcpy((char*)base + b * bytes, (char*)base + a * bytes, bytes);
  };
  int64_t width = c.dtype == kF32 ? 4 : 2, page_bytes = c.page_size * c.head_dim * width;
  int64_t ring_bytes = c.ring * c.head_dim * (ring_k.dtype().bits / 8);
  for (int64_t i = 0; i < source.numel(); i++)
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

void free_rows(STATE_ARGS, TensorView slots) {
  Cache c = STATE.cache();
  const int32_t* rows = check_rows(c, slots);
  int64_t next = c.counters[1];
  for (int64_t i = 0; i < slots.numel(); i++)
    for (int64_t e = 0; rows[i] >= 0 && e < c.layers * c.heads; e++) {
      int64_t index = rows[i] * c.layers * c.heads + e, pages = pages_of(c, c.lengths[index]);
      for (int64_t page = 0; page < pages; page++) {
        int32_t id = c.page_table[index * c.max_pages + page];
        if (--c.refcounts[id] == 0) c.free_pages[next++ % c.num_pages] = id;
      }
      c.lengths[index] = c.segment[index] = 0;
    }
  c.counters[1] = next;
}

tvm::ffi::String isa() { return kernels().name; }

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(append, append);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(decode_attention, decode_attention);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(prefill_attention, prefill_attention);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(fork_rows, fork_rows);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(free_rows, free_rows);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(isa, isa);
