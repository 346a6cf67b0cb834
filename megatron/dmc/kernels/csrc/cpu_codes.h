// Rows of a quantized cache: codes of 8 bits, and a scale in bf16 for each row. See Slots.of in reference_pages.py.
#pragma once
#include "cpu_attention.h"

namespace {

template <class S> constexpr float kLargest = 0;
template <> constexpr float kLargest<i8> = 127;
template <> constexpr float kLargest<f8> = 448;

// x [D] fp32, zeros up to align_up(D, VW), becomes what its codes stand for. Codes and scale go to `to` and `to_scale`, unless null.
template <class S> void round_row(float* x, int d, S* to, bf16* to_scale) {
  constexpr float largest = kLargest<S>;
  vf top{}, finite{};
  for (int c = 0; c < d; c += VW) {
    vf y = load(x + c);
    top = vmax(vmax(y, -y), top);
    finite += y * splat(0.0f);  // NaN where a channel is no number
  }
  bf16 rounded[VW];
  store(rounded, splat(vtop(top) * (float)(1.0 / largest) + vsum(finite)));
  float scale = load1(rounded), inverse = scale < 0x1p-126f ? 0.0f : 1.0f / scale;
  S codes[256 + VW];
  for (int c = 0; c < d; c += VW) {
    vf y = load(x + c) * splat(inverse);
    y = -vmax(-vmax(y, splat(-largest)), splat(-largest));
    store(codes + c, y);
    store(x + c, load(codes + c) * splat(scale * kUnit<S>));
  }
  if (!to) return;
  memcpy(to, codes, d * sizeof(S));
  *to_scale = rounded[0];
}

template <class S> void round_slot(const Slots* s, int64_t slot, int d, float* k, float* v) {
  int64_t at = s ? s->place(slot) : 0;
  round_row<S>(k, d, s ? (S*)s->key<S>(slot) : nullptr, s ? (bf16*)s->k_scales + at : nullptr);
  round_row<S>(v, d, s ? (S*)s->value<S>(slot) : nullptr, s ? (bf16*)s->v_scales + at : nullptr);
}

// Key and value, as in round_row, to a slot of `s`, unless null.
INLINE void write_codes(const Cache& c, const Slots* s, int64_t slot, float* k, float* v) {
  if (c.page_dtype == kI8) round_slot<i8>(s, slot, c.head_dim, k, v);
  else round_slot<f8>(s, slot, c.head_dim, k, v);
}

template <class S> INLINE void read_slot(const Slots& s, int64_t slot, int d, float* k, float* v) {
  int64_t at = s.place(slot);
  read_row(k, s.key<S>(slot), d, load1(s.k_scales + at) * kUnit<S>);
  read_row(v, s.value<S>(slot), d, load1(s.v_scales + at) * kUnit<S>);
}

// Key and value that the codes of a slot stand for: fp32 [align_up(D, VW)], zeros behind D.
INLINE void read_codes(const Cache& c, const Slots& s, int64_t slot, float* k, float* v) {
  if (c.page_dtype == kI8) read_slot<i8>(s, slot, c.head_dim, k, v);
  else read_slot<f8>(s, slot, c.head_dim, k, v);
}

}  // namespace
