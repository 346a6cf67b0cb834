// Launcher of the CPU kernels. It checks the values of the index tensors too, and takes the pages of a step.
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <vector>

#define DMC_DEVICE kDLCPU
#include "launch.h"
#include "cpu_pages.h"

#define DMC_TABLE(isa)                                                                          \
  extern "C" {                                                                                  \
  int dmc_decode_##isa(const dmc::DecodeParams&);                                               \
  int dmc_prefill_##isa(const dmc::PrefillParams&);                                             \
  void dmc_decide_##isa(const dmc::AppendParams&);                                              \
  void dmc_write_##isa(const dmc::AppendParams&);                                               \
  void dmc_evict_decide_##isa(const dmc::EvictParams&);                                         \
  void dmc_evict_write_##isa(const dmc::EvictParams&);                                          \
  void dmc_norm_##isa(const dmc::NormParams&);                                                  \
  void dmc_silu_##isa(const dmc::SiluParams&);                                                  \
  }                                                                                             \
  static const dmc::Kernels table_##isa = {#isa,                                                \
                                           dmc_decode_##isa,                                    \
                                           dmc_prefill_##isa,                                   \
                                           dmc_decide_##isa,                                    \
                                           dmc_write_##isa,                                     \
                                           dmc_evict_decide_##isa,                              \
                                           dmc_evict_write_##isa,                               \
                                           dmc_norm_##isa,                                      \
                                           dmc_silu_##isa};

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

void check_cache(const Cache&) {}

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

void run(EvictParams& p, const Optional<TensorView>&) {
  const Cache& c = p.cache;
  check_rows(c, p.rows, p.n);
  check_offsets(p.cu_seqlens, p.n, p.tokens);
  static thread_local std::vector<int32_t> before, index, recent;  // as above
  before.resize(p.n * c.heads);
  p.before = before.data();
  if (!p.slot_index) {
    index.resize(p.tokens * c.heads);
    p.slot_index = index.data();
  }
  bool chunks = false;
  for (int64_t i = 0; i < p.n; i++) chunks = chunks || p.cu_seqlens[i + 1] - p.cu_seqlens[i] > 1;
  if (!p.recent_before && chunks) {
    recent.resize(p.n * c.heads * c.recent);
    p.recent_before = recent.data();
  }
  kernels().evict_decide(p);
  take_pages(p);
  kernels().evict_write(p);
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
  check_rows(p.cache, p.source, p.n, "source");
  check_rows(p.cache, p.target, p.n, "target");
  check_copies(p);
  copy_rows(p);
}

void run(const FreeParams& p) {
  check_rows(p.cache, p.rows, p.n);
  empty_rows(p);
}

void run(const NormParams& p) { kernels().norm(p); }

void run(const SiluParams& p) { kernels().silu(p); }

tvm::ffi::String isa() { return kernels().name; }

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(isa, isa);
