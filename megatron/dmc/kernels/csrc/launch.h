// Exported functions of the compiled libraries, alike for all devices: DLPack tensors in, checked for shape, dtype, strides and
// device; parameter structs out, to the `run` of the launcher that includes this file. Values of index tensors are not looked at
// here: on a GPU that would mean to wait for it.
//
// DMC_DEVICE is the type of device whose tensors are taken.
#pragma once
#include <string.h>

#include <string>

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/string.h>

#include "params.h"

namespace {

using namespace dmc;
using tvm::ffi::Bytes;
using tvm::ffi::Optional;
using tvm::ffi::TensorView;

// The launcher's part. `scratch` is that of CUDA kernels: memory of the caching allocator.
void check_cache(const Cache& c);
void run(AppendParams& p, const Optional<TensorView>& scratch);
void run(EvictParams& p, const Optional<TensorView>& scratch);
void run(DecodeParams& p, const Optional<TensorView>& scratch);
void run(PrefillParams& p);
void run(const ForkParams& p);
void run(const FreeParams& p);
void run(const NormParams& p);
void run(const SiluParams& p);

// -------------------------------------------------------------------------------------------------------------- checks

std::string text(const TensorView& x) {
  std::string s = "[";
  for (int i = 0; i < x.ndim(); i++) s += (i ? ", " : "") + std::to_string(x.size(i));
  return s + "]";
}

bool is(const TensorView& x, int code, int bits) { return x.dtype().code == code && x.dtype().bits == bits && x.dtype().lanes == 1; }

bool here(const TensorView& x) { return x.device().device_type == DMC_DEVICE; }

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

// count: elements, below 0 for any number.
template <class T> T* ints(const TensorView& x, int64_t count, const char* name, const char* want) {
  check(here(x) && is(x, kDLInt, 8 * sizeof(T)) && contiguous(x) && (count < 0 || x.numel() == count), name, x, want);
  return static_cast<T*>(x.data_ptr());
}

float* floats(const TensorView& x, int64_t count, const char* name, const char* want) {
  check(here(x) && is(x, kDLFloat, 32) && contiguous(x) && x.numel() == count, name, x, want);
  return static_cast<float*>(x.data_ptr());
}

const int32_t* row_ids(const TensorView& rows, const char* name = "rows") { return ints<int32_t>(rows, -1, name, "int32 [N], contiguous"); }

Dtype dtype_of(const TensorView& x) {
  if (is(x, kDLFloat, 32)) return kF32;
  if (is(x, kDLBfloat, 16)) return kBF16;
  if (is(x, kDLFloat, 16)) return kF16;
  TVM_FFI_THROW(ValueError) << "tensors must be of float32, bfloat16 or float16";
  return kF32;
}

// [tokens, count, D] of the cache's dtype, the last axis contiguous; tokens and count below 0: any number.
Heads heads(const TensorView& x, const Cache& c, int64_t tokens, int64_t count, const char* name, const char* want) {
  bool ok = here(x) && x.ndim() == 3 && x.size(2) == c.head_dim && (tokens < 0 || x.size(0) == tokens) &&
            (count < 0 || x.size(1) == count) && (x.numel() == 0 || x.stride(2) == 1);
  check(ok && dtype_of(x) == c.dtype, name, x, want);
  return {x.data_ptr(), x.stride(0), x.stride(1)};
}

void* matrix(const TensorView& x, int64_t rows, int64_t width, Dtype dtype, const char* name, const char* want) {
  bool ok = here(x) && x.ndim() == 2 && x.size(0) == rows && x.size(1) == width && contiguous(x);
  check(ok && dtype_of(x) == dtype, name, x, want);
  return x.data_ptr();
}

int64_t query_groups(const Cache& c, const TensorView& q) {
  check(q.ndim() == 3 && q.size(1) % c.heads == 0 && q.size(1) / c.heads <= 64, "q", q, "[T, Hq, D] with Hq a multiple of the KV heads, at most 64 times");
  return q.size(1) / c.heads;
}

// --------------------------------------------------------------------------------------------------------------- cache

Dtype page_dtype_of(const TensorView& x) {
  if (is(x, kDLInt, 8)) return kI8;
  if (is(x, kDLFloat8_e4m3fn, 8)) return kF8;
  return dtype_of(x);
}

uint16_t* scales_of(const Cache& c, const TensorView& x, const char* name) {
  bool ok = here(x) && is(x, kDLBfloat, 16) && x.ndim() == 3 && contiguous(x);
  check(ok && x.numel() == (c.quantized ? c.num_pages * c.page_size : 0), name, x, "bf16 [num_pages, page_size, 1], or 0 unless quantized");
  return static_cast<uint16_t*>(x.data_ptr());
}

// Checks the tensors of a state, in the order of CacheState.tensors(), and returns the Cache that the functions below take: once per
// state, so that a call converts and checks only what is new in it.
Bytes bind(TensorView k_pages, TensorView v_pages, TensorView k_scales, TensorView v_scales, TensorView page_table, TensorView lengths,
           TensorView ring_k, TensorView ring_v, TensorView ring_w, TensorView segment, TensorView recent_table, TensorView marks, TensorView free_pages, TensorView refcounts,
           TensorView counters) {
  Cache c;
  check(k_pages.ndim() == 3 && contiguous(k_pages), "k_pages", k_pages, "[num_pages, page_size, D], contiguous");
  check(v_pages.ndim() == 3 && contiguous(v_pages) && v_pages.numel() == k_pages.numel(), "v_pages", v_pages, "like k_pages");
  check(page_table.ndim() == 4, "page_table", page_table, "int32 [rows, L, H, max_pages]");
  check(ring_w.ndim() == 4, "ring_w", ring_w, "fp32 [rows, L, H, R]");
  check(recent_table.ndim() == 4, "recent_table", recent_table, "int32 [rows, L, H, C]");
  check(here(marks) && is(marks, kDLUInt, 8) && marks.ndim() == 4 && contiguous(marks), "marks", marks, "uint8 [rows, L, H, w + 2]");
  check(here(k_pages), "k_pages", k_pages, "on the device of these kernels");
  c.num_pages = k_pages.size(0), c.page_size = (int)k_pages.size(1), c.head_dim = (int)k_pages.size(2);
  c.rows = page_table.size(0), c.layers = page_table.size(1), c.heads = page_table.size(2), c.max_pages = page_table.size(3);
  c.ring = ring_w.size(3), c.page_dtype = page_dtype_of(k_pages), c.ring_dtype = dtype_of(ring_k), c.device = k_pages.device().device_id;
  check(c.head_dim % 8 == 0 && c.head_dim <= 256, "k_pages", k_pages, "of a head dimension that is a multiple of 8 up to 256");
  check(c.page_size == 16 || c.page_size == 32 || c.page_size == 64, "k_pages", k_pages, "of 16, 32 or 64 slots per page");
  c.quantized = c.page_dtype == kI8 || c.page_dtype == kF8, c.dtype = c.page_dtype;
  check(page_dtype_of(v_pages) == c.page_dtype, "v_pages", v_pages, "like k_pages");
  c.k_scales = scales_of(c, k_scales, "k_scales"), c.v_scales = scales_of(c, v_scales, "v_scales");
  int64_t all = c.rows * c.layers * c.heads;
  c.k_pages = k_pages.data_ptr(), c.v_pages = v_pages.data_ptr();
  c.page_table = ints<int32_t>(page_table, -1, "page_table", "int32 [rows, L, H, max_pages]");
  c.lengths = ints<int32_t>(lengths, all, "lengths", "int32 [rows, L, H]");
  c.segment = ints<int32_t>(segment, all, "segment", "int32 [rows, L, H]");
  c.ring_w = floats(ring_w, all * c.ring, "ring_w", "fp32 [rows, L, H, R]");
  check(contiguous(ring_k) && ring_k.numel() == all * c.ring * c.head_dim, "ring_k", ring_k, "[rows, L, H, R, D]");
  check(contiguous(ring_v) && ring_v.numel() == ring_k.numel(), "ring_v", ring_v, "[rows, L, H, R, D]");
  c.ring_k = ring_k.data_ptr(), c.ring_v = ring_v.data_ptr();
  c.recent = recent_table.size(3), c.evict_window = marks.size(3) ? marks.size(3) - 2 : 0;
  c.recent_table = ints<int32_t>(recent_table, all * c.recent, "recent_table", "int32 [rows, L, H, C]");
  int64_t columns = c.evict_window ? (c.evict_window + c.page_size - 1) / c.page_size + 2 : 0;
  check(c.recent == columns, "recent_table", recent_table, "of as many columns as the window that marks is for needs");
  check(marks.numel() == (c.evict_window ? all * (c.evict_window + 2) : 0), "marks", marks, "uint8 [rows, L, H, w + 2]");
  c.marks = static_cast<uint8_t*>(marks.data_ptr());
  c.free_pages = ints<int32_t>(free_pages, c.num_pages, "free_pages", "int32 [num_pages]");
  c.refcounts = ints<int32_t>(refcounts, c.num_pages, "refcounts", "int32 [num_pages]");
  c.counters = ints<int64_t>(counters, 4, "counters", "int64 [4]");
  check_cache(c);
  return Bytes((const char*)&c, sizeof c);
}

Cache cache_of(const Bytes& bound) {
  Cache c;
  if (bound.size() != sizeof c) TVM_FFI_THROW(ValueError) << "cache is of " << bound.size() << " bytes; it must be what bind() returned";
  memcpy(&c, bound.data(), sizeof c);
  return c;
}

// For a step with the queries q: of a quantized cache, only they tell the model's dtype.
Cache cache_for(const Bytes& bound, const TensorView& q) {
  Cache c = cache_of(bound);
  if (c.quantized) c.dtype = dtype_of(q);
  return c;
}

int64_t layer_of(const Cache& c, int64_t layer) {
  if (layer < 0 || layer >= c.layers) TVM_FFI_THROW(ValueError) << "layer " << layer << " is none of " << c.layers;
  return layer;
}

// ------------------------------------------------------------------------------------------------------------------ ops
// Arguments as in params.py and __init__.py, then the outputs, then what the device adds.

// Fills what an append of any kind takes of a step's tokens and returns. Without `partial`, what the other outputs hold is empty.
template <class P>
void step(P& p, const Bytes& cache, int64_t layer, TensorView q, TensorView k, TensorView v, TensorView cu_seqlens, TensorView rows,
          TensorView positions, TensorView inv_freq, bool partial, TensorView q_rot, TensorView k_part, TensorView v_part,
          TensorView slot_index, int64_t threads) {
  const Cache& c = p.cache = cache_for(cache, q);
  p.layer = layer_of(c, layer), p.n = rows.numel(), p.tokens = q.size(0), p.groups = query_groups(c, q), p.threads = (int)threads;
  p.q = heads(q, c, -1, -1, "q", "[T, Hq, D] of the cache's dtype, the last axis contiguous");
  p.k = heads(k, c, p.tokens, c.heads, "k", "[T, H, D] of the cache's dtype, the last axis contiguous");
  p.v = heads(v, c, p.tokens, c.heads, "v", "[T, H, D] of the cache's dtype, the last axis contiguous");
  p.rows = row_ids(rows);
  p.cu_seqlens = ints<int32_t>(cu_seqlens, p.n + 1, "cu_seqlens", "int32 [N + 1], contiguous");
  p.positions = ints<int32_t>(positions, p.tokens, "positions", "int32 [T], contiguous");
  p.inv_freq = floats(inv_freq, c.head_dim / 2, "inv_freq", "fp32 [D / 2], contiguous");
  p.q_rot = heads(q_rot, c, p.tokens, q.size(1), "q_rot", "like q");
  if (!partial) return;
  p.k_part = heads(k_part, c, p.tokens, c.heads, "k_part", "like k");
  p.v_part = heads(v_part, c, p.tokens, c.heads, "v_part", "like v");
  p.slot_index = ints<int32_t>(slot_index, p.tokens * c.heads, "slot_index", "int32 [T, H]");
}

// recent_before: empty.
void append(const Bytes& cache, int64_t layer, TensorView q, TensorView k, TensorView v, TensorView cu_seqlens, TensorView rows,
            TensorView positions, TensorView inv_freq, double bias, double epsilon, Optional<int64_t> window, bool compress, bool partial,
            TensorView q_rot, TensorView k_part, TensorView v_part, TensorView slot_index, TensorView recent_before,
            Optional<TensorView> scratch, int64_t threads) {
  AppendParams p = {};
  step(p, cache, layer, q, k, v, cu_seqlens, rows, positions, inv_freq, partial, q_rot, k_part, v_part, slot_index, threads);
  const Cache& c = p.cache;
  if (c.evict_window) TVM_FFI_THROW(ValueError) << "the cache is of a model that evicts; use append_evicting";
  p.bias = (float)bias, p.epsilon = (float)epsilon, p.window = (int)window.value_or(0), p.compress = compress;
  if (compress && c.ring != (p.window ? p.window : 1))
    TVM_FFI_THROW(ValueError) << "the cache's ring holds " << c.ring << " tokens and the window is " << p.window << "; make the cache for this window";
  if (compress && c.ring_dtype != (p.window ? c.dtype : kF32))
    TVM_FFI_THROW(ValueError) << "ring_k is of the wrong dtype for this window";
  run(p, scratch);
}

void append_evicting(const Bytes& cache, int64_t layer, TensorView q, TensorView k, TensorView v, TensorView logits, TensorView cu_seqlens,
                     TensorView rows, TensorView positions, TensorView inv_freq, bool about_self, int64_t neuron, bool partial,
                     TensorView q_rot, TensorView k_part, TensorView v_part, TensorView slot_index, TensorView recent_before,
                     Optional<TensorView> scratch, int64_t threads) {
  EvictParams p = {};
  step(p, cache, layer, q, k, v, cu_seqlens, rows, positions, inv_freq, partial, q_rot, k_part, v_part, slot_index, threads);
  const Cache& c = p.cache;
  if (!c.evict_window) TVM_FFI_THROW(ValueError) << "the cache is of a model that does not evict; use append";
  p.logits = floats(logits, p.tokens * c.heads, "logits", "fp32 [T, H], contiguous");
  if (neuron < kNeuronNone || neuron > kNeuronQuery) TVM_FFI_THROW(ValueError) << "neuron is " << neuron << "; it must be 0 (none), 1 (all) or 2 (query)";
  p.about_self = about_self, p.neuron = (Neuron)neuron;
  if (partial) p.recent_before = ints<int32_t>(recent_before, p.n * c.heads * c.recent, "recent_before", "int32 [N, H, C]");
  run(p, scratch);
}

void decode_attention(const Bytes& cache, int64_t layer, TensorView q_rot, TensorView rows, double scale, TensorView out,
                      Optional<TensorView> scratch, int64_t threads) {
  DecodeParams p = {};
  const Cache& c = p.cache = cache_for(cache, q_rot);
  p.layer = layer_of(c, layer), p.n = rows.numel(), p.groups = query_groups(c, q_rot), p.scale = (float)scale, p.threads = (int)threads;
  p.q = heads(q_rot, c, p.n, -1, "q_rot", "[N, Hq, D] of the cache's dtype, the last axis contiguous");
  p.out = heads(out, c, p.n, q_rot.size(1), "out", "like q_rot");
  p.rows = row_ids(rows);
  run(p, scratch);
}

void prefill_attention(const Bytes& cache, int64_t layer, TensorView q_rot, TensorView k_part, TensorView v_part, TensorView slot_index,
                       TensorView recent_before, TensorView cu_seqlens, TensorView rows, double scale, TensorView out, int64_t threads) {
  PrefillParams p = {};
  const Cache& c = p.cache = cache_for(cache, q_rot);
  p.layer = layer_of(c, layer), p.n = rows.numel(), p.tokens = q_rot.size(0), p.groups = query_groups(c, q_rot);
  p.scale = (float)scale, p.threads = (int)threads;
  p.q = heads(q_rot, c, -1, -1, "q_rot", "[T, Hq, D] of the cache's dtype, the last axis contiguous");
  p.k_part = heads(k_part, c, p.tokens, c.heads, "k_part", "[T, H, D]");
  p.v_part = heads(v_part, c, p.tokens, c.heads, "v_part", "[T, H, D]");
  p.out = heads(out, c, p.tokens, q_rot.size(1), "out", "like q_rot");
  p.slot_index = ints<int32_t>(slot_index, p.tokens * c.heads, "slot_index", "int32 [T, H]");
  if (c.evict_window) p.recent_before = ints<int32_t>(recent_before, p.n * c.heads * c.recent, "recent_before", "int32 [N, H, C]");
  p.rows = row_ids(rows);
  p.cu_seqlens = ints<int32_t>(cu_seqlens, p.n + 1, "cu_seqlens", "int32 [N + 1], contiguous");
  run(p);
}

void fork_rows(const Bytes& cache, TensorView source, TensorView target) {
  ForkParams p = {cache_of(cache), row_ids(source, "source"), row_ids(target, "target"), source.numel()};
  check(target.numel() == p.n, "target", target, "as long as source");
  run(p);
}

void free_rows(const Bytes& cache, TensorView rows) {
  run(FreeParams{cache_of(cache), row_ids(rows), rows.numel()});
}

// `delta` and `sum` of no elements: none.
void add_rms_norm(TensorView x, TensorView delta, TensorView weight, double epsilon, TensorView sum, TensorView out, int64_t threads) {
  NormParams p = {};
  check(x.ndim() == 2, "x", x, "[T, h]");
  p.rows = x.size(0), p.width = x.size(1), p.dtype = dtype_of(x), p.epsilon = (float)epsilon;
  p.device = x.device().device_id, p.threads = (int)threads;
  p.x = matrix(x, p.rows, p.width, p.dtype, "x", "[T, h], contiguous");
  if (delta.numel()) {
    p.delta = matrix(delta, p.rows, p.width, p.dtype, "delta", "like x");
    p.sum = matrix(sum, p.rows, p.width, p.dtype, "sum", "like x");
  }
  bool ok = here(weight) && weight.ndim() == 1 && weight.size(0) == p.width && contiguous(weight);
  check(ok && dtype_of(weight) == p.dtype, "weight", weight, "[h], of x's dtype");
  p.weight = weight.data_ptr();
  p.out = matrix(out, p.rows, p.width, p.dtype, "out", "like x");
  run(p);
}

void silu_and_mul(TensorView x, TensorView out, int64_t threads) {
  SiluParams p = {};
  check(x.ndim() == 2 && x.size(1) % 2 == 0, "x", x, "[T, 2 F]");
  p.rows = x.size(0), p.width = x.size(1) / 2, p.dtype = dtype_of(x), p.device = x.device().device_id, p.threads = (int)threads;
  p.x = matrix(x, p.rows, 2 * p.width, p.dtype, "x", "[T, 2 F], contiguous");
  p.out = matrix(out, p.rows, p.width, p.dtype, "out", "[T, F]");
  run(p);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(bind, bind);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(append, append);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(append_evicting, append_evicting);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(decode_attention, decode_attention);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(prefill_attention, prefill_attention);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(fork_rows, fork_rows);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(free_rows, free_rows);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(add_rms_norm, add_rms_norm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(silu_and_mul, silu_and_mul);
