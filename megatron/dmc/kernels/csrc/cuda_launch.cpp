// Launcher of the CUDA kernels, on torch's current stream. It waits for nothing: values of tensors are not looked at.
//
// With DMC_EMULATED it launches the same kernels compiled for a CPU, see tests/cuda_emulator.
#ifdef DMC_EMULATED
#define DMC_DEVICE kDLCPU
#else
#define DMC_DEVICE kDLCUDA
#endif
#include "launch.h"

#include <tvm/ffi/extra/c_env_api.h>

#include "cuda.h"

namespace {

void* stream_of(int device) { return DMC_DEVICE == kDLCPU ? nullptr : TVMFFIEnvGetStream(DMC_DEVICE, device); }

void done(const char* error) {
  if (error) TVM_FFI_THROW(RuntimeError) << "a CUDA kernel could not be launched: " << error;
}

// Cache and rows are read 16 bytes at a time.
bool aligned(const void* x) { return (uintptr_t)x % 16 == 0; }

bool aligned(const Heads& x, Dtype dtype) {
  int64_t width = dtype == kF32 ? 4 : 2;
  return aligned(x.data) && x.token * width % 16 == 0 && x.head * width % 16 == 0;
}

void check_cache(const Cache& c) {
  for (const void* x : {c.k_pages, c.v_pages, (void*)c.k_scales, (void*)c.v_scales, c.ring_k, c.ring_v})
    if (!aligned(x)) TVM_FFI_THROW(ValueError) << "k_pages, v_pages, their scales, ring_k and ring_v must be aligned to 16 bytes";
}

// An array of a scratch tensor: bytes, aligned to 16.
template <class T> T* take(char*& at, int64_t count) {
  T* x = (T*)at;
  at += (count * sizeof(T) + 15) / 16 * 16;
  return x;
}

int64_t append_bytes(int64_t n, int64_t tokens, int64_t heads) {
  auto bytes = [](int64_t x) { return (x + 15) / 16 * 16; };
  return bytes(tokens * heads) + 2 * bytes(4 * tokens * heads) + 2 * bytes(4 * n * heads) + bytes(4 * tokens);
}

int64_t evict_bytes(int64_t n, int64_t tokens, int64_t heads, int64_t recent) {
  auto bytes = [](int64_t x) { return (x + 15) / 16 * 16; };
  return 3 * bytes(4 * n * heads) + bytes(4 * tokens) + bytes(4 * tokens * heads) + bytes(4 * n * heads * recent) + bytes(tokens * heads);
}

char* check_scratch(const Optional<TensorView>& scratch, int64_t bytes) {
  if (!scratch.has_value()) TVM_FFI_THROW(ValueError) << "scratch is None; it must be a tensor of " << bytes << " bytes";
  const TensorView& x = scratch.value();
  check(here(x) && is(x, kDLUInt, 8) && contiguous(x) && x.numel() >= bytes && aligned(x.data_ptr()), "scratch", x,
        "uint8, as long as the library says");
  return (char*)x.data_ptr();
}

void run(AppendParams& p, const Optional<TensorView>& scratch) {
  if (!p.tokens) return;
  int64_t heads = p.cache.heads, all = p.tokens * heads;
  char* at = check_scratch(scratch, append_bytes(p.n, p.tokens, heads));
  p.omega = take<float>(at, all);
  int32_t* index = take<int32_t>(at, all);
  if (!p.slot_index) p.slot_index = index;
  p.before = take<int32_t>(at, p.n * heads);
  CudaAppend x = {p, nullptr, nullptr, p.tokens <= p.n && !p.k_part.data};
  x.after = take<int32_t>(at, p.n * heads);
  x.owner = take<int32_t>(at, p.tokens);
  x.merge = take<uint8_t>(at, all);
  done(dmc_cuda_append(x, stream_of(p.cache.device)));
}

void run(EvictParams& p, const Optional<TensorView>& scratch) {
  if (!p.tokens) return;
  int64_t heads = p.cache.heads, recent = p.cache.recent, all = p.tokens * heads, items = p.n * heads;
  char* at = check_scratch(scratch, evict_bytes(p.n, p.tokens, heads, recent));
  CudaEvict x = {p};
  x.before = take<int32_t>(at, items), x.after = take<int32_t>(at, items), x.seen = take<int32_t>(at, items);
  x.owner = take<int32_t>(at, p.tokens);
  int32_t *index = take<int32_t>(at, all), *table = take<int32_t>(at, items * recent);
  if (!x.slot_index) x.slot_index = index;
  if (!x.recent_before) x.recent_before = table;
  x.moves = take<uint8_t>(at, all);
  done(dmc_cuda_append_evicting(x, stream_of(p.cache.device)));
}

void run(DecodeParams& p, const Optional<TensorView>& scratch) {
  const Cache& c = p.cache;
  CudaDecode x = {p, check_scratch(scratch, dmc_cuda_decode_bytes(p.n, c.heads, p.groups, c.head_dim, c.device))};
  done(dmc_cuda_decode(x, stream_of(c.device)));
}

void run(PrefillParams& p) {
  const Cache& c = p.cache;
  if (c.evict_window && !(aligned(p.k_part, c.dtype) && aligned(p.v_part, c.dtype)))
    TVM_FFI_THROW(ValueError) << "k_part and v_part must have heads aligned to 16 bytes, as append_evicting returns them";
  done(dmc_cuda_prefill(p, stream_of(c.device)));
}

void run(const ForkParams& p) { done(dmc_cuda_fork(p, stream_of(p.cache.device))); }

void run(const FreeParams& p) { done(dmc_cuda_free(p, stream_of(p.cache.device))); }

void check_row(const void* x, int64_t width) {
  if (width % 8 || !aligned(x)) TVM_FFI_THROW(ValueError) << "rows must be multiples of 8 elements, aligned to 16 bytes; the width is " << width;
}

void run(const NormParams& p) {
  for (const void* x : {p.x, p.delta, p.weight}) check_row(x, p.width);
  done(dmc_cuda_norm(p, stream_of(p.device)));
}

void run(const SiluParams& p) {
  check_row(p.x, p.width);
  done(dmc_cuda_silu(p, stream_of(p.device)));
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(append_bytes, append_bytes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(evict_bytes, evict_bytes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(decode_bytes, dmc_cuda_decode_bytes);
