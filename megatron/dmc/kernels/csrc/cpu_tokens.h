// Tokens of a step, for the kernels that write to the cache: rotation (RoPE, half-split: channel i turns with i + D/2), and the
// outputs of padding. P: the parameters of such a kernel.
#pragma once
#include "cpu_codes.h"

namespace {

// Branch-free, so that the compiler vectorizes it. The fp32 angle is reduced in fp64; polynomials of Cephes' sinf and cosf.
INLINE void sine_cosine(float angle, float* sine, float* cosine) {
  const double magic = 0x1.8p52;
  double n = angle * 0.63661977236758134308 + magic;  // the nearest multiple of pi / 2
  n -= magic;
  float r = (float)(angle - n * 1.57079632679489661923), z = r * r;
  int quadrant = (int)n;
  float s = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * r + r;
  float c = ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z - 0.5f * z + 1.0f;
  float a = quadrant & 1 ? c : s, b = quadrant & 1 ? s : c;
  *sine = quadrant & 2 ? -a : a;
  *cosine = (quadrant + 1) & 2 ? -b : b;
}

// Rotation of a token: table [D], cosines of its D/2 angles, then their sines.
INLINE void fill_table(float* table, int32_t position, const float* inv_freq, int d) {
  for (int e = 0; e < d / 2; e++) sine_cosine((float)position * inv_freq[e], table + d / 2 + e, table + e);
}

// x [D] fp32 in place. `neuron`: the last channel is the decision neuron, which is zero before and after.
INLINE void rotate(float* x, const float* table, int d, bool neuron) {
  int half = d / 2;
  const float *cosine = table, *sine = table + half;
  if (neuron) x[d - 1] = 0;
  for (int i = 0; i < half; i++) {
    float a = x[i], b = x[i + half];
    x[i] = a * cosine[i] - b * sine[i];
    x[i + half] = b * cosine[i] + a * sine[i];
  }
  if (neuron) x[d - 1] = 0;
}

// True where a head can be rotated in registers, half a row at a time.
INLINE bool in_halves(int d) { return d / 2 % VW == 0; }

// The last channel of the second half of a row is the neuron.
INLINE vf without_last(vf x) {
  vi keep;
  for (int i = 0; i < VW; i++) keep[i] = i + 1 < VW ? -1 : 0;
  return (vf)((vi)x & keep);
}

// Channels c and c + half of a row, as in `rotate`.
INLINE void turn(vf& low, vf& high, const float* table, int c, int half, bool with_neuron) {
  bool neuron = with_neuron && c + VW == half;
  if (neuron) high = without_last(high);
  vf cosine = load(table + c), sine = load(table + half + c), x = low * cosine - high * sine, y = high * cosine + low * sine;
  low = x, high = neuron ? without_last(y) : y;
}

template <class T> INLINE void store_halves(T* to, int c, int half, vf low, vf high) {
  store(to + c, low);
  store(to + half + c, high);
}

// One head, from [D] to [D], and to `copy` [D] too where it is not null. `halves`: in_halves(d).
template <class T> INLINE void rotate_head(T* to, T* copy, const T* from, const float* table, int d, bool halves, bool neuron) {
  int half = d / 2;
  if (!halves) {
    float x[256 + VW];
    read_row(x, from, d, 1.0f);
    rotate(x, table, d, neuron);
    write_row(to, x, d, 1.0f);
    if (copy) memcpy(copy, to, d * sizeof(T));
    return;
  }
  for (int e = 0; e < half; e += VW) {
    vf low = load(from + e), high = load(from + half + e);
    turn(low, high, table, e, half, neuron);
    store_halves(to, e, half, low, high);
    if (copy) store_halves(copy, e, half, low, high);
  }
}

// Tokens of sequence i; 0 for padding.
template <class P> INLINE int64_t count_of(const P& p, int64_t i) { return p.rows[i] < 0 ? 0 : p.cu_seqlens[i + 1] - p.cu_seqlens[i]; }

// Queries of a token, rotated by its table.
template <class T, class P> INLINE void rotate_queries(const P& p, int64_t t, const float* table, Neuron neuron) {
  int d = p.cache.head_dim;
  for (int64_t h = 0; h < p.cache.heads * p.groups; h++) {
    bool own = neuron == kNeuronAll || (neuron == kNeuronQuery && h % p.groups == 0);
    rotate_head<T>(head_of<T>(p.q_rot, t, h), nullptr, head_of<T>(p.q, t, h), table, d, in_halves(d), own);
  }
}

// Zero outputs of a token of padding.
template <class T, class P> INLINE void clear(const P& p, int64_t t) {
  int d = p.cache.head_dim;
  for (int64_t h = 0; h < p.cache.heads * p.groups; h++) memset(head_of<T>(p.q_rot, t, h), 0, d * sizeof(T));
  for (int64_t h = 0; h < p.cache.heads; h++) {
    p.slot_index[t * p.cache.heads + h] = 0;
    if (!p.k_part.data) continue;
    memset(head_of<T>(p.k_part, t, h), 0, d * sizeof(T));
    memset(head_of<T>(p.v_part, t, h), 0, d * sizeof(T));
  }
}

}  // namespace
