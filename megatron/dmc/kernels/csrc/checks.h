// What the launchers of all devices share: DLPack tensors in, checked for shape, dtype, strides and device; parameter structs out.
// The values of index tensors are not looked at here: on a GPU that would mean to wait for it.
//
// DMC_DEVICE is the type of device whose tensors are taken. The order of a state's tensors is that of CacheState.tensors().
#pragma once
#include <string>

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>

#include "params.h"

namespace {

using namespace dmc;
using tvm::ffi::TensorView;

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
  check(x.device().device_type == DMC_DEVICE && is(x, kDLInt, 8 * sizeof(T)) && contiguous(x) && (count < 0 || x.numel() == count), name, x, want);
  return static_cast<T*>(x.data_ptr());
}

float* floats(const TensorView& x, int64_t count, const char* name, const char* want) {
  check(x.device().device_type == DMC_DEVICE && is(x, kDLFloat, 32) && contiguous(x) && x.numel() == count, name, x, want);
  return static_cast<float*>(x.data_ptr());
}

Dtype dtype_of(const TensorView& x) {
  if (is(x, kDLFloat, 32)) return kF32;
  if (is(x, kDLBfloat, 16)) return kBF16;
  if (is(x, kDLFloat, 16)) return kF16;
  TVM_FFI_THROW(ValueError) << "tensors must be of float32, bfloat16 or float16";
  return kF32;
}

Heads heads(const TensorView& x, const Cache& c, int64_t tokens, int64_t count, const char* name, const char* want) {
  bool ok = x.device().device_type == DMC_DEVICE && x.ndim() == 3 && x.size(2) == c.head_dim && (tokens < 0 || x.size(0) == tokens) &&
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
    check(k_pages.device().device_type == DMC_DEVICE, "k_pages", k_pages, "on the device of these kernels");
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
    c.counters = ints<int64_t>(counters, 4, "counters", "int64 [4]");
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

int64_t check_groups(const Cache& c, const TensorView& q) {
  check(q.ndim() == 3 && q.size(1) % c.heads == 0 && q.size(1) / c.heads <= 64, "q", q, "[T, Hq, D] with Hq a multiple of the KV heads, at most 64 times");
  return q.size(1) / c.heads;
}

const int32_t* rows_of(const TensorView& slots, const char* name = "slots") {
  return ints<int32_t>(slots, -1, name, "int32 [N], contiguous");
}

// Everything but the scratch. `slot_index` may be empty: it is scratch then.
void fill_append(AppendParams& p, const State& state, int64_t layer, const TensorView& q, const TensorView& k, const TensorView& v,
                 const TensorView& cu_seqlens, const TensorView& slots, const TensorView& positions, const TensorView& inv_freq,
                 double bias, double epsilon, int64_t window, bool compress, const TensorView& q_rot, const TensorView& k_part,
                 const TensorView& v_part, const TensorView& slot_index) {
  const Cache& c = p.cache = state.cache();
  check_layer(c, layer);
  p.layer = layer, p.n = slots.numel(), p.tokens = q.size(0), p.groups = check_groups(c, q);
  p.q = heads(q, c, -1, -1, "q", "[T, Hq, D] of the cache's dtype, the last axis contiguous");
  p.k = heads(k, c, p.tokens, c.heads, "k", "[T, H, D] of the cache's dtype, the last axis contiguous");
  p.v = heads(v, c, p.tokens, c.heads, "v", "[T, H, D] of the cache's dtype, the last axis contiguous");
  p.slots = rows_of(slots);
  p.cu_seqlens = ints<int32_t>(cu_seqlens, p.n + 1, "cu_seqlens", "int32 [N + 1], contiguous");
  p.positions = ints<int32_t>(positions, p.tokens, "positions", "int32 [T], contiguous");
  p.inv_freq = floats(inv_freq, c.head_dim / 2, "inv_freq", "fp32 [D / 2], contiguous");
  p.q_rot = heads(q_rot, c, p.tokens, q.size(1), "q_rot", "like q");
  p.k_part = p.v_part = {nullptr, 0, 0};
  if (k_part.numel()) {
    p.k_part = heads(k_part, c, p.tokens, c.heads, "k_part", "like k");
    p.v_part = heads(v_part, c, p.tokens, c.heads, "v_part", "like v");
  }
  p.bias = (float)bias, p.epsilon = (float)epsilon, p.window = (int)window, p.compress = compress, p.threads = 1;
  if (compress && c.ring != (window ? window : 1))
    TVM_FFI_THROW(ValueError) << "the cache's ring holds " << c.ring << " tokens and the window is " << window << "; make the cache for this window";
  if (compress && dtype_of(state.ring_k) != (window ? c.dtype : kF32))
    TVM_FFI_THROW(ValueError) << "ring_k is of the wrong dtype for this window";
  p.slot_index = slot_index.numel() ? ints<int32_t>(slot_index, p.tokens * c.heads, "slot_index", "int32 [T, H]") : nullptr;
}

void fill_decode(DecodeParams& p, const State& state, int64_t layer, const TensorView& q, const TensorView& slots, double scale,
                 const TensorView& out) {
  const Cache& c = p.cache = state.cache();
  check_layer(c, layer);
  p.layer = layer, p.n = slots.numel(), p.groups = check_groups(c, q), p.scale = (float)scale, p.threads = 1;
  p.q = heads(q, c, p.n, -1, "q_rot", "[N, Hq, D] of the cache's dtype, the last axis contiguous");
  p.out = heads(out, c, p.n, q.size(1), "out", "like q_rot");
  p.slots = rows_of(slots);
}

void fill_prefill(PrefillParams& p, const State& state, int64_t layer, const TensorView& q, const TensorView& k_part,
                  const TensorView& v_part, const TensorView& slot_index, const TensorView& cu_seqlens, const TensorView& slots,
                  double scale, const TensorView& out) {
  const Cache& c = p.cache = state.cache();
  check_layer(c, layer);
  p.layer = layer, p.n = slots.numel(), p.tokens = q.size(0), p.groups = check_groups(c, q), p.scale = (float)scale, p.threads = 1;
  p.q = heads(q, c, -1, -1, "q_rot", "[T, Hq, D] of the cache's dtype, the last axis contiguous");
  p.k_part = heads(k_part, c, p.tokens, c.heads, "k_part", "[T, H, D]");
  p.v_part = heads(v_part, c, p.tokens, c.heads, "v_part", "[T, H, D]");
  p.out = heads(out, c, p.tokens, q.size(1), "out", "like q_rot");
  p.slot_index = ints<int32_t>(slot_index, p.tokens * c.heads, "slot_index", "int32 [T, H]");
  p.slots = rows_of(slots);
  p.cu_seqlens = ints<int32_t>(cu_seqlens, p.n + 1, "cu_seqlens", "int32 [N + 1], contiguous");
}

void* matrix(const TensorView& x, int64_t rows, int64_t width, Dtype dtype, const char* name, const char* want) {
  bool ok = x.device().device_type == DMC_DEVICE && x.ndim() == 2 && x.size(0) == rows && x.size(1) == width && contiguous(x);
  check(ok && dtype_of(x) == dtype, name, x, want);
  return x.data_ptr();
}

// `delta` and `sum` of no elements: none.
void fill_norm(NormParams& p, const TensorView& x, const TensorView& delta, const TensorView& weight, double epsilon,
               const TensorView& sum, const TensorView& out) {
  check(x.ndim() == 2, "x", x, "[T, h]");
  p.rows = x.size(0), p.width = x.size(1), p.dtype = dtype_of(x), p.epsilon = (float)epsilon, p.threads = 1;
  p.x = matrix(x, p.rows, p.width, p.dtype, "x", "[T, h], contiguous");
  p.delta = p.sum = nullptr;
  if (delta.numel()) {
    p.delta = matrix(delta, p.rows, p.width, p.dtype, "delta", "like x");
    p.sum = matrix(sum, p.rows, p.width, p.dtype, "sum", "like x");
  }
  bool ok = weight.device().device_type == DMC_DEVICE && weight.ndim() == 1 && weight.size(0) == p.width && contiguous(weight);
  check(ok && dtype_of(weight) == p.dtype, "weight", weight, "[h], of x's dtype");
  p.weight = weight.data_ptr();
  p.out = matrix(out, p.rows, p.width, p.dtype, "out", "like x");
}

void fill_silu(SiluParams& p, const TensorView& x, const TensorView& out) {
  check(x.ndim() == 2 && x.size(1) % 2 == 0, "x", x, "[T, 2 F]");
  p.rows = x.size(0), p.width = x.size(1) / 2, p.dtype = dtype_of(x), p.threads = 1;
  p.x = matrix(x, p.rows, 2 * p.width, p.dtype, "x", "[T, 2 F], contiguous");
  p.out = matrix(out, p.rows, p.width, p.dtype, "out", "[T, F]");
}

}  // namespace
