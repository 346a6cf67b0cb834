// Launcher of the CPU kernels. It checks the values of the index tensors too, and takes the pages of a step.
#include <stdlib.h>
#include <string.h>
#if defined(DMC_WITH_amx)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
  int dmc_quantized_##isa(const dmc::LinearParams&);                                            \
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
                                           dmc_linear_##isa,                                    \
                                           dmc_quantized_##isa};

#ifdef DMC_WITH_amx
DMC_TABLE(amx)
#endif
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

#ifdef DMC_WITH_amx
// True where this process may use AMX for bf16: the CPU has it (CPUID leaf 7, EDX bits 22 and 24), and Linux lets the process have the 8
// KiB of state for each thread, for which it has to be asked once (arch/x86/xstate.rst; arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA).
bool may_use_tiles() {
#if defined(DMC_EMULATED)  // see tests/amx_emulator
  return true;
#elif defined(__linux__)
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1) && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}
#endif

// The best of the builds in this library that this CPU runs; MEGATRON_DMC_ISA names another, for tests.
const Kernels& kernels() {
  static const Kernels* best = [] {
    const char* wish = getenv("MEGATRON_DMC_ISA");
    std::vector<const Kernels*> usable;
#if defined(DMC_WITH_avx512) || defined(DMC_WITH_avx512bf16) || defined(DMC_WITH_amx)
    bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
#if defined(DMC_WITH_avx512bf16) || defined(DMC_WITH_amx)
    bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
#endif
#ifdef DMC_WITH_avx512bf16
    if (bf16) usable.push_back(&table_avx512bf16);
#endif
#ifdef DMC_WITH_avx512
    // In the two cycles that Intel's CPUs take for a product of pairs of bf16 they do four FMA, each half as many products.
    if (avx512) usable.insert(__builtin_cpu_is("intel") ? usable.begin() : usable.end(), &table_avx512);
#endif
#ifdef DMC_WITH_amx
    if (bf16 && may_use_tiles()) usable.insert(usable.begin(), &table_amx);
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
  if (failed) TVM_FFI_THROW(MemoryError) << "no memory for what a kernel keeps beside its operands";
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

// A weight in panels, and what follows from it; see LinearParams. `scales` of no elements: numbers of the dtype of x; else codes.
LinearParams panels(const TensorView& weight, const TensorView& scales, const TensorView& bias, int64_t inputs, int64_t outputs, bool gated,
                    int64_t zero, bool scaled, Dtype dtype) {
  LinearParams p = {};
  p.dtype = dtype, p.inputs = inputs, p.outputs = outputs, p.gated = gated, p.weight = weight.data_ptr();
  int64_t each = gated ? 16 : 32, panels = (outputs + each - 1) / each;
  bool ok = here(weight) && weight.ndim() == 4 && weight.size(0) == panels && weight.size(2) == 32 && contiguous(weight);
  if (scales.numel()) {
    int64_t filled = (inputs + 31) / 32 * 32;
    ok = ok && is(weight, kDLUInt, 8) && weight.size(3) == 4;
    p.bits = ok && weight.size(1) * 8 == filled ? 4 : 8, p.scales = scales.data_ptr();
    check(ok && weight.size(1) * (32 / p.bits) == filled && (p.bits == 8 || filled == inputs), "weight", weight,
          "uint8 [N / 32, K / (32 / bits), 32, 4], contiguous, K a multiple of 32 or, of 8 bits, filled up to one");
    bool fits = here(scales) && contiguous(scales) && scales.size(0) == panels && scales.size(scales.ndim() - 1) == 32;
    if (fits && scales.ndim() == 4) {
      fits = scales.size(2) <= 2 && inputs % (32 * scales.size(1)) == 0;
      if (fits) p.group = (int)(inputs / scales.size(1)), p.offsets = scales.size(2) == 2;
      fits = fits && (p.bits == 4 || p.group <= 128);  // the products of more may not fit into 32 bits
    } else {
      fits = fits && scales.ndim() == 2 && p.bits == 8;
    }
    check(fits, "scales", scales,
          "contiguous, [N / 32, K / group, 1 or 2, 32], groups of 8 bits of at most 128, or of 8 bits [N / 32, 32]");
    p.scale_dtype = dtype_of(scales), p.zero = (int)zero, p.scaled = scaled;
    if (zero < 0 || zero > 128) TVM_FFI_THROW(ValueError) << "zero is " << zero << "; it must be a code, at most 128";
  } else {
    int64_t pair = dtype == kBF16 ? 2 : 1;
    check(ok && dtype_of(weight) == dtype && weight.size(3) == pair && weight.size(1) * pair == inputs, "weight", weight,
          "[N / 32, K / pair, 32, pair] of the dtype of x, contiguous; a pair is 2 numbers of bf16, 1 of fp32");
  }
  if (bias.numel()) {
    bool fits = here(bias) && !gated && bias.ndim() == 1 && bias.size(0) == outputs && contiguous(bias) && dtype_of(bias) == dtype;
    check(fits, "bias", bias, "[N], of the dtype of x; none of a gated layer");
    p.bias = bias.data_ptr();
  }
  return p;
}

void multiply(const LinearParams& p) {
  if (p.bits) done(kernels().quantized(p));
  else kernels().linear(p);
}

// `scales` and `bias` of no elements: none.
void packed_linear(TensorView x, TensorView weight, TensorView scales, TensorView bias, int64_t inputs, int64_t outputs, bool gated,
                   int64_t zero, bool scaled, TensorView out, int64_t threads) {
  Dtype dtype = dtype_of(x);
  check(x.ndim() == 2 && dtype != kF16, "x", x, "[T, K] of fp32 or bf16");
  LinearParams p = panels(weight, scales, bias, inputs, outputs, gated, zero, scaled, dtype);
  p.rows = x.size(0), p.threads = (int)threads;
  p.x = matrix(x, p.rows, p.inputs, p.dtype, "x", "[T, K], contiguous");
  p.out = matrix(out, p.rows, p.outputs, p.dtype, "out", "[T, N], contiguous, of the dtype of x");
  multiply(p);
}

// A linear layer of BetweenAttention in params.py.
Bytes bind_linear(TensorView weight, TensorView scales, TensorView bias, int64_t inputs, int64_t outputs, bool gated, int64_t zero,
                  bool scaled, bool bf16) {
  LinearParams p = panels(weight, scales, bias, inputs, outputs, gated, zero, scaled, bf16 ? kBF16 : kF32);
  return Bytes((const char*)&p, sizeof p);
}

// Everything between the attention of a layer and that of the next, but for rows and threads.
struct Between {
  LinearParams out, gate_up, down, qkv;
  NormParams mlp_norm, next_norm;
};

template <class P> P bound_as(const Bytes& bound) {
  P p;
  if (bound.size() != sizeof p) TVM_FFI_THROW(ValueError) << "weights are of " << bound.size() << " bytes; they must be what was bound";
  memcpy(&p, bound.data(), sizeof p);
  return p;
}

NormParams norm_of(const TensorView& weight, const LinearParams& like, double epsilon, const char* name) {
  NormParams p = {};
  bool ok = here(weight) && weight.ndim() == 1 && weight.size(0) == like.outputs && contiguous(weight) && dtype_of(weight) == like.dtype;
  check(ok, name, weight, "[h], of the dtype of x");
  p.width = like.outputs, p.dtype = like.dtype, p.epsilon = (float)epsilon, p.weight = weight.data_ptr();
  return p;
}

void check_width(const char* name, int64_t have, int64_t want) {
  if (have != want) TVM_FFI_THROW(ValueError) << name << " is of width " << have << "; it must be " << want << ", as the layers beside it";
}

// Checks how the weights fit together, in the order of BetweenAttention in params.py, once.
Bytes bind_between(const Bytes& out, TensorView mlp_norm, const Bytes& gate_up, const Bytes& down, TensorView next_norm, const Bytes& qkv,
                   double epsilon) {
  Between b;
  b.out = bound_as<LinearParams>(out), b.gate_up = bound_as<LinearParams>(gate_up);
  b.down = bound_as<LinearParams>(down), b.qkv = bound_as<LinearParams>(qkv);
  int64_t hidden = b.out.outputs;
  check_width("gate_up", b.gate_up.inputs, hidden), check_width("qkv", b.qkv.inputs, hidden);
  check_width("down", b.down.outputs, hidden), check_width("down", b.down.inputs, b.gate_up.outputs);
  for (const LinearParams* p : {&b.gate_up, &b.down, &b.qkv})
    if (p->dtype != b.out.dtype) TVM_FFI_THROW(ValueError) << "weights are of several dtypes; they must be of one";
  b.mlp_norm = norm_of(mlp_norm, b.out, epsilon, "mlp_norm"), b.next_norm = norm_of(next_norm, b.out, epsilon, "next_norm");
  return Bytes((const char*)&b, sizeof b);
}

void between_attention(const Bytes& bound, TensorView mixed, TensorView x, TensorView sum, TensorView qkv, int64_t threads) {
  Between b = bound_as<Between>(bound);
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
  multiply(b.out);
  kernels().norm(b.mlp_norm);
  multiply(b.gate_up);
  multiply(b.down);
  kernels().norm(b.next_norm);
  multiply(b.qkv);
}

tvm::ffi::String isa() { return kernels().name; }

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(packed_linear, packed_linear);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(bind_linear, bind_linear);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(bind_between, bind_between);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(between_attention, between_attention);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(isa, isa);
