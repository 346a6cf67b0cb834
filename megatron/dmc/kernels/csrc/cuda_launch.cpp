// The launcher of the CUDA kernels, on torch's current stream. It waits for nothing: values of tensors are not looked at.
//
// With DMC_EMULATED it is the launcher of the same kernels compiled for a CPU, see tests/cuda_emulator.
#ifdef DMC_EMULATED
#define DMC_DEVICE kDLCPU
#else
#define DMC_DEVICE kDLCUDA
#endif
#include "checks.h"
#include "cuda.h"

#include <tvm/ffi/extra/c_env_api.h>

namespace {

struct Place {
  int device;
  void* stream;
  explicit Place(const TensorView& x) : device(x.device().device_id), stream(nullptr) {
    if (DMC_DEVICE != kDLCPU) stream = TVMFFIEnvGetStream(x.device().device_type, device);
  }
};

void done(const char* error) {
  if (error) TVM_FFI_THROW(RuntimeError) << "a CUDA kernel could not be launched: " << error;
}

// Rows of the cache are read 16 bytes at a time.
void check_alignment(const State& s) {
  auto aligned = [](const TensorView& x) { return (uintptr_t)x.data_ptr() % 16 == 0; };
  check(aligned(s.k_pages) && aligned(s.v_pages), "k_pages", s.k_pages, "aligned to 16 bytes, as v_pages");
  check(aligned(s.ring_k) && aligned(s.ring_v), "ring_k", s.ring_k, "aligned to 16 bytes, as ring_v");
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

char* check_scratch(const TensorView& scratch, int64_t bytes) {
  check(scratch.device().device_type == DMC_DEVICE && is(scratch, kDLUInt, 8) && contiguous(scratch) && scratch.numel() >= bytes &&
            (uintptr_t)scratch.data_ptr() % 16 == 0,
        "scratch", scratch, "uint8, as long as the library says");
  return (char*)scratch.data_ptr();
}

void append(STATE_ARGS, int64_t layer, TensorView q, TensorView k, TensorView v, TensorView cu_seqlens, TensorView slots,
            TensorView positions, TensorView inv_freq, double bias, double epsilon, int64_t window, bool compress, TensorView q_rot,
            TensorView k_part, TensorView v_part, TensorView slot_index, TensorView scratch) {
  CudaAppend p;
  State state = STATE;
  fill_append(p, state, layer, q, k, v, cu_seqlens, slots, positions, inv_freq, bias, epsilon, window, compress, q_rot, k_part,
              v_part, slot_index);
  check_alignment(state);
  const Cache& c = p.cache;
  if (!p.tokens) return;
  char* at = check_scratch(scratch, append_bytes(p.n, p.tokens, c.heads));
  p.omega = take<float>(at, p.tokens * c.heads);
  int32_t* index = take<int32_t>(at, p.tokens * c.heads);
  if (!p.slot_index) p.slot_index = index;
  p.before = take<int32_t>(at, p.n * c.heads);
  p.after = take<int32_t>(at, p.n * c.heads);
  p.owner = take<int32_t>(at, p.tokens);
  p.merge = take<uint8_t>(at, p.tokens * c.heads);
  p.cos_sin = nullptr;
  p.one_each = p.tokens <= p.n && !p.k_part.data;
  Place place(q);
  done(dmc_cuda_append(p, place.device, place.stream));
}

void decode_attention(STATE_ARGS, int64_t layer, TensorView q, TensorView slots, double scale, TensorView out, TensorView scratch) {
  CudaDecode p;
  State state = STATE;
  fill_decode(p, state, layer, q, slots, scale, out);
  check_alignment(state);
  Place place(q);
  p.workspace = check_scratch(scratch, dmc_cuda_decode_bytes(p.n, p.cache.heads, p.groups, p.cache.head_dim, place.device));
  p.device = place.device;
  done(dmc_cuda_decode(p, place.stream));
}

void prefill_attention(STATE_ARGS, int64_t layer, TensorView q, TensorView k_part, TensorView v_part, TensorView slot_index,
                       TensorView cu_seqlens, TensorView slots, double scale, TensorView out) {
  PrefillParams p;
  State state = STATE;
  fill_prefill(p, state, layer, q, k_part, v_part, slot_index, cu_seqlens, slots, scale, out);
  check_alignment(state);
  Place place(q);
  done(dmc_cuda_prefill(p, place.device, place.stream));
}

void fork_rows(STATE_ARGS, TensorView source, TensorView target) {
  CudaFork p;
  State state = STATE;
  p.cache = state.cache();
  check_alignment(state);
  p.source = rows_of(source, "source"), p.target = rows_of(target, "target"), p.n = source.numel();
  check(target.numel() == p.n, "target", target, "as long as source");
  p.ring_width = ring_k.dtype().bits / 8;
  Place place(k_pages);
  done(dmc_cuda_fork(p, place.device, place.stream));
}

void free_rows(STATE_ARGS, TensorView slots) {
  CudaFree p;
  p.cache = STATE.cache();
  p.slots = rows_of(slots), p.n = slots.numel();
  Place place(k_pages);
  done(dmc_cuda_free(p, place.device, place.stream));
}

void check_rows(const TensorView& x, int64_t width) {
  check(width % 8 == 0 && (uintptr_t)x.data_ptr() % 16 == 0, "x", x, "of rows of a multiple of 8 elements, aligned to 16 bytes");
}

void add_rms_norm(TensorView x, TensorView delta, TensorView weight, double epsilon, TensorView sum, TensorView out) {
  NormParams p;
  fill_norm(p, x, delta, weight, epsilon, sum, out);
  for (const TensorView* t : {&x, &delta, &weight}) check_rows(*t, p.width);
  Place place(x);
  done(dmc_cuda_norm(p, place.device, place.stream));
}

void silu_and_mul(TensorView x, TensorView out) {
  SiluParams p;
  fill_silu(p, x, out);
  check_rows(x, p.width);
  Place place(x);
  done(dmc_cuda_silu(p, place.device, place.stream));
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(append, append);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(append_bytes, append_bytes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(decode_attention, decode_attention);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(decode_bytes, dmc_cuda_decode_bytes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(prefill_attention, prefill_attention);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(fork_rows, fork_rows);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(free_rows, free_rows);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(add_rms_norm, add_rms_norm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(silu_and_mul, silu_and_mul);
