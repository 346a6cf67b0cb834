// Panels of 32 outputs, in which the weights of linear layers lie, and what becomes of a panel's sums.
//
// A gated layer's panels hold 16 gates and the 16 values that these scale; both are rounded as without this fusion.
#pragma once
#include "cpu_vec.h"

namespace {

constexpr int kPanel = 32;          // outputs of a panel
constexpr int NV = kPanel / VW;     // vectors of a panel
constexpr int64_t kRowsOfTask = 96; // rows that a panel is multiplied with while it is in L2
constexpr int64_t kWorth = 1 << 16; // products from which on another thread saves more than it costs

INLINE int64_t panels_of(const LinearParams& p) {
  int64_t each = p.gated ? kPanel / 2 : kPanel;
  return (p.outputs + each - 1) / each;
}

// Up to VW outputs of R rows from column `first` on.
template <class T, int R> INLINE void write(const LinearParams& p, int64_t row, int64_t first, const vf* value, int64_t step) {
  int64_t here = p.outputs - first;
  if (here <= 0) return;
  T* out = (T*)p.out + row * p.outputs + first;
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
    if (here >= VW) store(out + r * p.outputs, value[r * step]);
    else store_some(out + r * p.outputs, value[r * step], (int)here);
  }
}

// The outputs of R rows and panel n, of their sums.
template <class T, int R> INLINE void finish(const LinearParams& p, int64_t row, int64_t n, vf (*sum)[NV]) {
  if (p.gated) {
#pragma GCC unroll 4
    for (int v = 0; v < NV / 2; v++) {
#pragma GCC unroll 12
      for (int r = 0; r < R; r++)
        sum[r][v] = rounded(silu(rounded(sum[r][v], T{})), T{}) * rounded(sum[r][NV / 2 + v], T{});
      write<T, R>(p, row, n * kPanel / 2 + v * VW, &sum[0][v], NV);
    }
    return;
  }
#pragma GCC unroll 8
  for (int v = 0; v < NV; v++) {
    int64_t first = n * kPanel + v * VW, here = p.outputs - first;
    if (p.bias && here > 0) {
      const T* bias = (const T*)p.bias + first;
      vf add = here >= VW ? load(bias) : load_some(bias, (int)here);
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) sum[r][v] += add;
    }
    write<T, R>(p, row, first, &sum[0][v], NV);
  }
}

// `rows` <= R rows, by K::run<rows, next>.
template <class K, bool next, int R = K::kRows> INLINE void block_of(const K& kernel, int64_t row, int64_t rows, int64_t n) {
  if (rows == R) return K::template run<R, next>(kernel, row, n);
  if constexpr (R > 1) block_of<K, next, R - 1>(kernel, row, rows, n);
}

// All rows times all panels, in blocks of up to K::kRows rows of about as many each; `next`: ask for the panel behind this one, where K can.
template <class K> void each_block(const LinearParams& p, const K& kernel) {
  int64_t panels = panels_of(p), groups = (p.rows + kRowsOfTask - 1) / kRowsOfTask, tasks = groups * panels;
  int threads = p.rows * p.inputs * p.outputs < kWorth ? 1 : p.threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t task = 0; task < tasks; task++) {
    int64_t group = task / panels, row = group * p.rows / groups, rows = (group + 1) * p.rows / groups - row;
    int64_t blocks = (rows + K::kRows - 1) / K::kRows;
    for (int64_t b = 0; b < blocks; b++) {
      int64_t begin = b * rows / blocks, end = (b + 1) * rows / blocks;
      // Of several blocks only the first waits for memory: the last asks for the next panel while it computes.
      if constexpr (K::kAsks)
        if (b && b + 1 == blocks) {
          block_of<K, true>(kernel, row + begin, end - begin, task % panels);
          continue;
        }
      block_of<K, false>(kernel, row + begin, end - begin, task % panels);
    }
  }
}

}  // namespace
