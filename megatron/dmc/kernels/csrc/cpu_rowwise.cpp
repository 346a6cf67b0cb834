// Steps between the linear layers, in one pass over the rows each: residual sum and norm, and the gates of the MLP.
//
// Rounded where PyTorch rounds: the sum, the normalised row, its product with the weight; the gate and its product.
#include "cpu_vec.h"

namespace {

template <class T> INLINE vf load_upto(const T* p, int64_t left) { return left >= VW ? load(p) : load_some(p, (int)left); }
template <class T> INLINE void store_upto(T* p, vf x, int64_t left) {
  if (left >= VW) store(p, x);
  else store_some(p, x, (int)left);
}

template <class T> void norm_row(const NormParams& p, int64_t row) {
  const T* x = (const T*)p.x + row * p.width;
  const T* weight = (const T*)p.weight;
  T* out = (T*)p.out + row * p.width;
  if (p.delta) {
    const T* delta = (const T*)p.delta + row * p.width;
    T* sum = (T*)p.sum + row * p.width;
    for (int64_t e = 0; e < p.width; e += VW) store_upto(sum + e, load_upto(x + e, p.width - e) + load_upto(delta + e, p.width - e), p.width - e);
    x = sum;
  }
  vf squares[4] = {};
  int64_t e = 0;
  for (; e + 4 * VW <= p.width; e += 4 * VW)
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      vf y = load(x + e + i * VW);
      squares[i] += y * y;
    }
  for (; e < p.width; e += VW) {
    vf y = load_upto(x + e, p.width - e);
    squares[0] += y * y;
  }
  vf scale = splat(1.0f / sqrtf(vsum((squares[0] + squares[1]) + (squares[2] + squares[3])) / (float)p.width + p.epsilon));
  for (e = 0; e < p.width; e += VW)
    store_upto(out + e, rounded(load_upto(x + e, p.width - e) * scale, T{}) * load_upto(weight + e, p.width - e), p.width - e);
}

template <class T> void silu_row(const SiluParams& p, int64_t row) {
  const T* gate = (const T*)p.x + row * 2 * p.width;
  T* out = (T*)p.out + row * p.width;
  for (int64_t e = 0; e < p.width; e += VW) {
    vf x = load_upto(gate + e, p.width - e), y = load_upto(gate + p.width + e, p.width - e);
    store_upto(out + e, rounded(silu(x), T{}) * y, p.width - e);
  }
}

template <class P, class F> INLINE void each_row(const P& p, F function) {
  int threads = p.rows * p.width < kElements ? 1 : p.threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < p.rows; row++) function(p, row);
}

void norm_any(const NormParams& p) {
  switch (p.dtype) {
    case kF32: return each_row(p, norm_row<float>);
    case kBF16: return each_row(p, norm_row<bf16>);
    default: return each_row(p, norm_row<f16>);
  }
}

void silu_any(const SiluParams& p) {
  switch (p.dtype) {
    case kF32: return each_row(p, silu_row<float>);
    case kBF16: return each_row(p, silu_row<bf16>);
    default: return each_row(p, silu_row<f16>);
  }
}

}  // namespace

extern "C" __attribute__((visibility("hidden"))) void DMC_ISA(norm)(const dmc::NormParams& p) { norm_any(p); }
extern "C" __attribute__((visibility("hidden"))) void DMC_ISA(silu)(const dmc::SiluParams& p) { silu_any(p); }
