// What the CUDA kernels and their launcher share. A launch returns what is wrong, null if nothing, and waits for nothing.
#pragma once
#include "params.h"

namespace dmc {

struct CudaAppend : AppendParams {
  int32_t* after;  // scratch [N, H], slots after the step
  int32_t* owner;  // scratch [T], the sequence of a token
  int one_each;    // every sequence has about one token: a warp takes all tokens of a head in turn
};

struct CudaDecode : DecodeParams {
  void* workspace;  // dmc_cuda_decode_bytes() of them
  int device;
};

struct CudaFork {
  Cache cache;
  const int32_t *source, *target;  // [n]
  int64_t n;
  int ring_width;  // bytes of an element of the ring
};

struct CudaFree {
  Cache cache;
  const int32_t* slots;  // [n]
  int64_t n;
};

}  // namespace dmc

extern "C" {
const char* dmc_cuda_append(const dmc::CudaAppend&, int device, void* stream);
int64_t dmc_cuda_decode_bytes(int64_t n, int64_t heads, int64_t groups, int64_t head_dim, int device);
const char* dmc_cuda_decode(const dmc::CudaDecode&, void* stream);
const char* dmc_cuda_prefill(const dmc::PrefillParams&, int device, void* stream);
const char* dmc_cuda_fork(const dmc::CudaFork&, int device, void* stream);
const char* dmc_cuda_free(const dmc::CudaFree&, int device, void* stream);
const char* dmc_cuda_norm(const dmc::NormParams&, int device, void* stream);
const char* dmc_cuda_silu(const dmc::SiluParams&, int device, void* stream);
}
