// Parameters of the kernels, as structs of raw pointers: what launchers fill and kernels read. N sequences, T tokens, Hq query heads,
// D head dimension, F width of the MLP; see CacheState in state.py for the tensors of the cache and params.py for AppendParams.
#pragma once
#include <stdint.h>

namespace dmc {

enum Dtype { kF32 = 0, kBF16 = 1, kF16 = 2, kI8 = 3, kF8 = 4 };  // kF8: float8_e4m3fn

enum Counter { kTaken = 0, kReturned = 1, kRefused = 2, kArrived = 3 };  // of Cache::counters

enum Neuron { kNeuronNone = 0, kNeuronAll = 1, kNeuronQuery = 2 };  // see params.py

// A CacheState. S rows, L layers, H KV heads, R places in a ring, C columns of recent pages.
struct Cache {
  void* k_pages;          // [num_pages, page_size, D] of `page_dtype`
  void* v_pages;
  uint16_t* k_scales;     // bf16 [num_pages, page_size], where `quantized`
  uint16_t* v_scales;
  int32_t* page_table;    // [S, L, H, max_pages]
  int32_t* lengths;       // [S, L, H]
  void* ring_k;           // [S, L, H, R, D] of `ring_dtype`
  void* ring_v;
  float* ring_w;          // [S, L, H, R]
  int32_t* segment;       // [S, L, H]
  int32_t* recent_table;  // [S, L, H, C]
  uint8_t* marks;         // [S, L, H, w + 2]
  int32_t* free_pages;    // [num_pages]
  int32_t* refcounts;     // [num_pages]
  int64_t* counters;      // [4]
  int64_t num_pages, rows, layers, heads, max_pages, ring;
  int64_t recent;         // C, 0 unless the model evicts
  int64_t evict_window;   // w, 0 unless the model evicts
  int page_size, head_dim;
  Dtype dtype, ring_dtype;  // dtype: of the model's queries, keys and values
  Dtype page_dtype;         // `dtype`, or kI8 or kF8, where pages are `quantized`
  bool quantized;
  int device;
};

// [T, h, D], the last axis contiguous; strides in elements.
struct Heads {
  void* data;
  int64_t token, head;
};

struct DecodeParams {
  Cache cache;
  int64_t layer;
  Heads q, out;         // [N, Hq, D]
  const int32_t* rows;  // [N]
  int64_t n, groups;    // groups: query heads per KV head
  float scale;
  int threads;
};

struct PrefillParams {
  Cache cache;
  int64_t layer;
  Heads q, out;                  // [T, Hq, D]
  Heads k_part, v_part;          // [T, H, D]
  const int32_t* slot_index;     // [T, H]
  const int32_t* recent_before;  // [N, H, C], null unless the model evicts
  const int32_t* cu_seqlens;     // [N + 1]
  const int32_t* rows;           // [N]
  int64_t n, tokens, groups;
  float scale;
  int threads;
};

struct AppendParams {
  Cache cache;
  int64_t layer;
  Heads q, k, v;                // before the rotation
  Heads q_rot, k_part, v_part;  // k_part.data null: not wanted
  int32_t* slot_index;          // [T, H], always written
  uint8_t* merge;               // scratch [T, H]
  float* omega;                 // scratch [T, H]
  float* cos_sin;               // scratch [T, D]: D/2 cosines, D/2 sines
  int32_t* before;              // scratch [N, H], slots before the step
  const int32_t* cu_seqlens;    // [N + 1]
  const int32_t* rows;          // [N]
  const int32_t* positions;     // [T]
  const float* inv_freq;        // [D / 2]
  int64_t n, tokens, groups;
  float bias, epsilon;
  int window;                   // 0: none
  int compress;
  int threads;
};

struct EvictParams {
  Cache cache;
  int64_t layer;
  Heads q, k, v;                // before the rotation
  Heads q_rot, k_part, v_part;  // k_part.data null: not wanted, nor slot_index and recent_before
  int32_t* slot_index;          // [T, H]
  int32_t* recent_before;       // [N, H, C]
  int32_t* before;              // scratch [N, H], kept slots before the step
  const float* logits;          // [T, H]
  const int32_t* cu_seqlens;    // [N + 1]
  const int32_t* rows;          // [N]
  const int32_t* positions;     // [T]
  const float* inv_freq;        // [D / 2]
  int64_t n, tokens, groups;
  int about_self;
  Neuron neuron;
  int threads;
};

struct ForkParams {
  Cache cache;
  const int32_t *source, *target;  // [n]
  int64_t n;
};

struct FreeParams {
  Cache cache;
  const int32_t* rows;  // [n]
  int64_t n;
};

// [T, h], contiguous.
struct NormParams {
  const void *x, *delta;  // delta null: none
  const void* weight;     // [h]
  void *sum, *out;        // sum: x + delta, where there is a delta
  int64_t rows, width;    // T, h
  float epsilon;
  Dtype dtype;
  int device, threads;
};

struct LinearParams {
  const void* x;       // [T, K]
  const void* weight;  // [N / 32, K / pair, 32, pair], N rounded up; a pair is 2 numbers of bf16, or 1. Of codes: see `bits`
  const void* bias;    // [N], or null
  void* out;           // [T, N]; of a gated layer [T, N / 2]
  int64_t rows, inputs, outputs;  // T, K, columns of out
  bool gated;
  Dtype dtype;         // of x, bias and out: fp32 or bf16
  int bits;            // 0: `weight` is of `dtype`. 4: [N / 32, K / 8, 32, 4], input i + 4 in the upper half of the byte of input i.
                       // 8: [N / 32, K / 4, 32, 4], of four inputs 0, 2, 1, 3, K rounded up to a multiple of 32
  const void* scales;  // of codes: [N / 32, 32], of 8 bits; or for each group [N / 32, K / group, 1 or 2, 32]: scales, offsets
  Dtype scale_dtype;
  int group;           // inputs that share a scale: a multiple of 32; 0: all of them
  int zero;            // code of 0: a weight is scale (code - zero), and what its group adds
  bool offsets;        // each group adds an offset,
  bool scaled;         // in multiples of its scale
  int threads;
};

struct SiluParams {
  const void* x;        // [T, 2 F]: gates, then the values that they scale
  void* out;            // [T, F]
  int64_t rows, width;  // T, F
  Dtype dtype;
  int device, threads;
};

}  // namespace dmc
