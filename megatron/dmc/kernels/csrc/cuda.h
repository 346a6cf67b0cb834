// Functions of the CUDA kernels for their launcher. Each starts its kernels on a stream, waits for nothing, and returns an error
// message, or null.
#pragma once
#include "params.h"

namespace dmc {

struct CudaAppend : AppendParams {
  int32_t* after;  // scratch [N, H], slots after the step
  int32_t* owner;  // scratch [T], the sequence of a token
  int one_each;    // every sequence has about one token: a warp takes all tokens of a head in turn
};

struct CudaEvict : EvictParams {
  int32_t *before, *after;  // scratch [N, H], kept slots before and after the step
  int32_t* seen;            // scratch [N, H], tokens before the step; -1: the head has no part in it
  int32_t* owner;           // scratch [T], the sequence of a token
  uint8_t* moves;           // scratch [T, H], whether the token that leaves the window for this one is kept
};                          // slot_index and recent_before: always written

struct CudaDecode : DecodeParams {
  void* workspace;  // of dmc_cuda_decode_bytes() bytes
};

}  // namespace dmc

extern "C" {
int64_t dmc_cuda_decode_bytes(int64_t n, int64_t heads, int64_t groups, int64_t head_dim, int device);
const char* dmc_cuda_append(const dmc::CudaAppend&, void* stream);
const char* dmc_cuda_append_evicting(const dmc::CudaEvict&, void* stream);
const char* dmc_cuda_decode(const dmc::CudaDecode&, void* stream);
const char* dmc_cuda_prefill(const dmc::PrefillParams&, void* stream);
const char* dmc_cuda_fork(const dmc::ForkParams&, void* stream);
const char* dmc_cuda_free(const dmc::FreeParams&, void* stream);
const char* dmc_cuda_norm(const dmc::NormParams&, void* stream);
const char* dmc_cuda_silu(const dmc::SiluParams&, void* stream);
}
