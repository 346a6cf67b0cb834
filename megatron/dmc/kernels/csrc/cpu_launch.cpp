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
  void dmc_linear_##isa(const dmc::LinearParams&);                                              \
  }                                                                                             \
  static const dmc::Kernels table_##isa = {#isa,                                                \
                                           dmc_decode_##isa,                                    \
                                           dmc_prefill_##isa,                                   \
                                           dmc_decide_##isa,                                    \
                                           dmc_write_##isa,                                     \
                                           dmc_evict_decide_##isa,                              \
                                           dmc_evict_write_##isa,                               \
                                           dmc_norm_##isa,                                      \
                                           dmc_silu_##isa,                                      \
                                           dmc_linear_##isa};

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

// A weight in panels, and what follows from it; `gated`: see cpu_linear.cpp.
LinearParams panels(const TensorView& weight, const TensorView& bias, int64_t outputs, bool gated, const char* name) {
  LinearParams p = {};
  p.dtype = dtype_of(weight), p.outputs = outputs, p.gated = gated;
  int64_t pair = p.dtype == kBF16 ? 2 : 1, each = gated ? 16 : 32;
  bool ok = here(weight) && p.dtype != kF16 && weight.ndim() == 4 && weight.size(0) == (outputs + each - 1) / each &&
            weight.size(2) == 32 && weight.size(3) == pair && contiguous(weight);
  check(ok, name, weight, "[N / 32, K / pair, 32, pair] of fp32 or bf16, contiguous; a pair is 2 numbers of bf16, 1 of fp32");
  p.inputs = weight.size(1) * pair, p.weight = weight.data_ptr();
  if (bias.numel()) {
    bool fits = here(bias) && !gated && bias.ndim() == 1 && bias.size(0) == outputs && contiguous(bias) && dtype_of(bias) == p.dtype;
    check(fits, "bias", bias, "[N], of the weight's dtype; none of a gated layer");
    p.bias = bias.data_ptr();
  }
  return p;
}

// `bias` of no elements: none.
void packed_linear(TensorView x, TensorView weight, TensorView bias, bool gated, TensorView out, int64_t threads) {
  check(out.ndim() == 2, "out", out, "[T, N]");
  LinearParams p = panels(weight, bias, out.size(1), gated, "weight");
  p.rows = out.size(0), p.threads = (int)threads;
  p.x = matrix(x, p.rows, p.inputs, p.dtype, "x", "[T, K], contiguous, of the weight's dtype");
  p.out = matrix(out, p.rows, p.outputs, p.dtype, "out", "[T, N], contiguous, of the weight's dtype");
  kernels().linear(p);
}

// Everything between the attention of a layer and that of the next, but for rows and threads.
struct Between {
  LinearParams out, gate_up, down, qkv;
  NormParams mlp_norm, next_norm;
};

NormParams norm_of(const TensorView& weight, const LinearParams& like, double epsilon, const char* name) {
  NormParams p = {};
  bool ok = here(weight) && weight.ndim() == 1 && weight.size(0) == like.outputs && contiguous(weight) && dtype_of(weight) == like.dtype;
  check(ok, name, weight, "[h], of the weights' dtype");
  p.width = like.outputs, p.dtype = like.dtype, p.epsilon = (float)epsilon, p.weight = weight.data_ptr();
  return p;
}

// Checks the weights, in the order of BetweenAttention in params.py, once.
Bytes bind_between(TensorView out, TensorView mlp_norm, TensorView gate_up, TensorView down, TensorView next_norm, TensorView qkv,
                   TensorView qkv_bias, int64_t outputs, double epsilon, TensorView none) {
  Between b;
  check(mlp_norm.ndim() == 1, "mlp_norm", mlp_norm, "[h]");
  int64_t hidden = mlp_norm.size(0);
  b.out = panels(out, none, hidden, false, "out"), b.down = panels(down, none, hidden, false, "down");
  b.gate_up = panels(gate_up, none, b.down.inputs, true, "gate_up"), b.qkv = panels(qkv, qkv_bias, outputs, false, "qkv");
  bool ok = b.gate_up.inputs == hidden && b.qkv.inputs == hidden && b.down.dtype == b.out.dtype && b.gate_up.dtype == b.out.dtype &&
            b.qkv.dtype == b.out.dtype;
  check(ok, "gate_up", gate_up, "of h inputs, like qkv, and all weights of one dtype");
  b.mlp_norm = norm_of(mlp_norm, b.out, epsilon, "mlp_norm"), b.next_norm = norm_of(next_norm, b.out, epsilon, "next_norm");
  return Bytes((const char*)&b, sizeof b);
}

void between_attention(const Bytes& bound, TensorView mixed, TensorView x, TensorView sum, TensorView qkv, int64_t threads) {
  Between b;
  if (bound.size() != sizeof b) TVM_FFI_THROW(ValueError) << "weights are of " << bound.size() << " bytes; they must be what bind_between() returned";
  memcpy(&b, bound.data(), sizeof b);
  check(x.ndim() == 2, "x", x, "[T, h]");
  Dtype dtype = b.out.dtype;
  int64_t rows = x.size(0), hidden = b.out.outputs, inner = b.down.inputs, size = element_size(dtype);
  static thread_local std::vector<char> memory;  // kept from call to call
  memory.resize(rows * (3 * hidden + inner) * size);
  char *delta = memory.data(), *total = delta + rows * hidden * size, *normed = total + rows * hidden * size;
  char* gated = normed + rows * hidden * size;
  for (LinearParams* p : {&b.out, &b.gate_up, &b.down, &b.qkv}) p->rows = rows, p->threads = (int)threads;
  for (NormParams* p : {&b.mlp_norm, &b.next_norm}) p->rows = rows, p->threads = (int)threads, p->delta = delta, p->out = normed;
  b.out.x = matrix(mixed, rows, b.out.inputs, dtype, "mixed", "[T, Hq D], contiguous, of the weights' dtype");
  b.mlp_norm.x = matrix(x, rows, hidden, dtype, "x", "[T, h], contiguous, of the weights' dtype");
  b.next_norm.sum = matrix(sum, rows, hidden, dtype, "sum", "like x");
  b.qkv.out = matrix(qkv, rows, b.qkv.outputs, dtype, "qkv", "[T, (Hq + 2 H) D], contiguous, of the weights' dtype");
  b.out.out = b.down.out = delta, b.mlp_norm.sum = total, b.next_norm.x = total;
  b.gate_up.x = b.qkv.x = normed, b.gate_up.out = gated, b.down.x = gated;
  kernels().linear(b.out);
  kernels().norm(b.mlp_norm);
  kernels().linear(b.gate_up);
  kernels().linear(b.down);
  kernels().norm(b.next_norm);
  kernels().linear(b.qkv);
}

tvm::ffi::String isa() { return kernels().name; }

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(packed_linear, packed_linear);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(bind_between, bind_between);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(between_attention, between_attention);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(isa, isa);
