// Steps between the linear layers, in one kernel each: residual sum and norm, and the gates of the MLP.
//
// Rounded where PyTorch rounds: the sum, the normalised row, its product with the weight; the gate and its product. Rows are
// multiples of 8 elements, so that they are read 16 bytes at a time.
#include "cuda.h"
#include "cuda_device.cuh"

namespace {

using namespace dmc;

constexpr int kThreads = 256;

// Rounded to T.
DMC_INLINE float rounded(float x, float) { return x; }
template <class T> DMC_INLINE float rounded(float x, T) { return widen((uint16_t)pack(x, 0.0f, T{}), T{}); }

// A block per row. Each thread keeps to its own columns, so what it has written of the sum it can read back.
template <class T> __global__ void __launch_bounds__(kThreads) norm_rows(const NormParams p) {
  __shared__ float shared[32];
  int64_t row = blockIdx.x;
  const T* x = (const T*)p.x + row * p.width;
  const T* weight = (const T*)p.weight;
  T* out = (T*)p.out + row * p.width;
  float squares = 0.0f;
  for (int64_t e = 8 * threadIdx.x; e < p.width; e += 8 * kThreads) {
    float a[8];
    load8(a, x + e);
    if (p.delta) {
      float b[8];
      load8(b, (const T*)p.delta + row * p.width + e);
#pragma unroll
      for (int i = 0; i < 8; i++) a[i] = rounded(a[i] + b[i], T{});
      store8((T*)p.sum + row * p.width + e, a);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) squares += a[i] * a[i];
  }
  float scale = 1.0f / sqrtf(block_sum(squares, shared) / (float)p.width + p.epsilon);
  if (p.delta) x = (const T*)p.sum + row * p.width;
  for (int64_t e = 8 * threadIdx.x; e < p.width; e += 8 * kThreads) {
    float a[8], w[8];
    load8(a, x + e);
    load8(w, weight + e);
#pragma unroll
    for (int i = 0; i < 8; i++) a[i] = rounded(a[i] * scale, T{}) * w[i];
    store8(out + e, a);
  }
}

// 8 elements a thread.
template <class T> __global__ void __launch_bounds__(kThreads) silu_rows(const SiluParams p) {
  int64_t at = (int64_t)blockIdx.x * kThreads + threadIdx.x, each = p.width / 8, row = at / each, e = at % each * 8;
  if (row >= p.rows) return;
  const T* gate = (const T*)p.x + row * 2 * p.width + e;
  float a[8], b[8];
  load8(a, gate);
  load8(b, gate + p.width);
#pragma unroll
  for (int i = 0; i < 8; i++) a[i] = rounded(a[i] / (1.0f + exp2f(-kLog2E * a[i])), T{}) * b[i];
  store8((T*)p.out + row * p.width + e, a);
}

}  // namespace

extern "C" const char* dmc_cuda_norm(const dmc::NormParams& p, void* stream) {
  dmc::OnDevice on(p.device);
  void (*kernel)(const NormParams) = p.dtype == kF32 ? norm_rows<float> : p.dtype == kBF16 ? norm_rows<bf16> : norm_rows<f16>;
  return launch(kernel, p.rows, kThreads, 0, stream, p);
}

extern "C" const char* dmc_cuda_silu(const dmc::SiluParams& p, void* stream) {
  dmc::OnDevice on(p.device);
  void (*kernel)(const SiluParams) = p.dtype == kF32 ? silu_rows<float> : p.dtype == kBF16 ? silu_rows<bf16> : silu_rows<f16>;
  return launch(kernel, (p.rows * (p.width / 8) + kThreads - 1) / kThreads, kThreads, 0, stream, p);
}
