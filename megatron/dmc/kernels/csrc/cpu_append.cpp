// Decide, pool, rotate and write: the tokens of a step into the cache of one layer.
//
// `decide` only fills scratch, so that a step which does not fit can be refused before anything was written; the launcher takes
// the pages in between. The state of a slot is computed from its tokens each time, never added to and subtracted from.
#include "cpu_tokens.h"

namespace {

constexpr int64_t kBlock = 16;  // tokens of a task; each looks back over the window by itself

struct Item {  // one (sequence, head)
  int64_t i, h, begin, count, row, index;
};

INLINE Item item_of(const AppendParams& p, int64_t at) {
  Item x;
  x.i = at / p.cache.heads, x.h = at % p.cache.heads;
  x.begin = p.cu_seqlens[x.i], x.count = count_of(p, x.i), x.row = p.rows[x.i];
  x.index = x.count ? head_index(p.cache, x.row, p.layer, x.h) : 0;
  return x;
}

// Decision and weight of each token.
template <class T> INLINE void decide_token(const AppendParams& p, int64_t t) {
  int64_t heads = p.cache.heads, last = p.cache.head_dim - 1;
  const T* k = (const T*)p.k.data + t * p.k.token + last;
  const T* q = (const T*)p.q.data + t * p.q.token + last;
  for (int64_t h = 0; h < heads; h++) {
    float mean = 0;
    for (int64_t j = 0; j < p.groups; j++) mean += load1(q + (h * p.groups + j) * p.q.head);
    p.merge[t * heads + h] = load1(k + h * p.k.head) - p.bias > 0;
    p.omega[t * heads + h] = 1.0f / (1.0f + expf(-(mean / (float)p.groups + p.bias))) + p.epsilon;
  }
}

template <class T> void decide(const AppendParams& p) {
  const Cache& c = p.cache;
  int64_t heads = c.heads;
#pragma omp parallel num_threads(p.tokens * heads < 4096 ? 1 : p.threads)
  {
    // By tokens, not by heads: threads do not write the same lines.
#pragma omp for schedule(static)
    for (int64_t t = 0; t < p.tokens; t++) {
      if (p.compress) decide_token<T>(p, t);
      else memset(p.merge + t * heads, 0, heads);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p.n; i++) {
      int64_t count = count_of(p, i), begin = p.cu_seqlens[i];
      for (int64_t h = 0; h < heads; h++) p.before[i * heads + h] = count ? c.lengths[head_index(c, p.rows[i], p.layer, h)] : 0;
      const int32_t* slot = p.before + i * heads;
      for (int64_t at = begin * heads; at < (begin + count) * heads; slot = p.slot_index + at, at += heads)
        for (int64_t h = 0; h < heads; h++) {
          int32_t newest = slot[h] - (at == begin * heads);
          // The first token of a sequence has nothing to merge with.
          bool merge = p.merge[at + h] && newest >= 0;
          p.merge[at + h] = merge;
          p.slot_index[at + h] = newest + !merge;
        }
    }
  }
}

template <class T> INLINE void add_row(float* sum, const T* x, int d, float weight) {
  int c = 0;
  for (; c + VW <= d; c += VW) store(sum + c, load(sum + c) + load(x + c) * splat(weight));
  if (c < d) store(sum + c, load(sum + c) + load_some(x + c, d - c) * splat(weight));
}

// Token t, whose slot is k and v after it, before the rotation: fp32 [D], zeros up to align_up(D, VW).
template <class T> void finish(const AppendParams& p, const Item& x, int64_t t, float* k, float* v) {
  const Cache& c = p.cache;
  int d = c.head_dim;
  int64_t at = t * c.heads + x.h;
  rotate(k, p.cos_sin + t * d, d, p.compress);
  bool newest = t + 1 == x.begin + x.count || !p.merge[at + c.heads];
  Slots s = slots_of(c, x.row, p.layer, x.h);
  if (c.quantized) write_codes(c, newest ? &s : nullptr, p.slot_index[at], k, v);
  if (p.k_part.data) {
    write_row(head_of<T>(p.k_part, t, x.h), k, d, 1.0f);
    write_row(head_of<T>(p.v_part, t, x.h), v, d, 1.0f);
  }
  if (!newest || c.quantized) return;
  write_row((T*)s.key<T>(p.slot_index[at]), k, d, 1.0f);
  write_row((T*)s.value<T>(p.slot_index[at]), v, d, 1.0f);
}

// Tokens [from, to) of one head, with a window, or of a plain model, without pooling.
template <class T> void pool_window(const AppendParams& p, const Item& x, int64_t from, int64_t to) {
  const Cache& c = p.cache;
  int d = c.head_dim;
  float k[256 + VW], v[256 + VW];
  for (int64_t t = from; t < to; t++) {
    int64_t at = t * c.heads + x.h;
    if (!p.merge[at]) {
      read_row(k, head_of<T>(p.k, t, x.h), d, 1.0f);
      read_row(v, head_of<T>(p.v, t, x.h), d, 1.0f);
    } else {
      memset(k, 0, sizeof k);
      memset(v, 0, sizeof v);
      float total = 0;
      int left = p.window;
      int64_t u = t;
      for (; left > 0 && u >= x.begin; u--, left--) {
        float w = p.omega[u * c.heads + x.h];
        add_row(k, head_of<T>(p.k, u, x.h), d, w);
        add_row(v, head_of<T>(p.v, u, x.h), d, w);
        total += w;
        if (!p.merge[u * c.heads + x.h]) { left = 0; break; }
      }
      // The segment began in an earlier step: the rest of the window is in the ring.
      for (int64_t i = c.segment[x.index] - 1; left > 0 && i >= 0; i--, left--) {
        int64_t place = x.index * c.ring + i % c.ring;
        add_row(k, (const T*)c.ring_k + place * d, d, c.ring_w[place]);
        add_row(v, (const T*)c.ring_v + place * d, d, c.ring_w[place]);
        total += c.ring_w[place];
      }
      for (int e = 0; e < d; e++) k[e] /= total, v[e] /= total;
    }
    finish<T>(p, x, t, k, v);
  }
}

constexpr int kListed = 64;

// True where a window can be pooled in registers.
INLINE bool pooled_in_halves(const AppendParams& p) {
  return !p.cache.quantized && in_halves(p.cache.head_dim) && (!p.compress || (p.window && p.window <= kListed));
}

// pool_window for one token, in registers instead of a buffer.
template <class T> INLINE void pool_token(const AppendParams& p, const Item& x, int64_t t) {
  const Cache& c = p.cache;
  int d = c.head_dim, half = d / 2;
  Slots slots = slots_of(c, x.row, p.layer, x.h);
  const T *k[kListed], *v[kListed];
  float weights[kListed];
  int64_t at = t * c.heads + x.h;
  int n = 0;
  float total = 0;
  auto list = [&](const T* key, const T* value, float weight) {
    k[n] = key, v[n] = value, weights[n++] = weight;
    total += weight;
  };
  if (!p.merge[at]) {
    list(head_of<T>(p.k, t, x.h), head_of<T>(p.v, t, x.h), 1.0f);
  } else {
    int64_t u = t;
    bool begun = false;
    for (; n < p.window && u >= x.begin && !begun; u--) {
      list(head_of<T>(p.k, u, x.h), head_of<T>(p.v, u, x.h), p.omega[u * c.heads + x.h]);
      begun = !p.merge[u * c.heads + x.h];
    }
    // The segment began in an earlier step: the rest of the window is in the ring.
    for (int64_t i = c.segment[x.index] - 1; !begun && n < p.window && i >= 0; i--) {
      int64_t place = x.index * c.ring + i % c.ring;
      list((const T*)c.ring_k + place * d, (const T*)c.ring_v + place * d, c.ring_w[place]);
    }
  }
  vf scale = splat(1.0f / total);
  bool newest = t + 1 == x.begin + x.count || !p.merge[at + c.heads];
  T* key = newest ? (T*)slots.key<T>(p.slot_index[at]) : nullptr;
  T* value = newest ? (T*)slots.value<T>(p.slot_index[at]) : nullptr;
  T* k_part = p.k_part.data ? head_of<T>(p.k_part, t, x.h) : nullptr;
  T* v_part = p.k_part.data ? head_of<T>(p.v_part, t, x.h) : nullptr;
  for (int e = 0; e < half; e += VW) {
    vf k_low{}, k_high{}, v_low{}, v_high{};
    for (int i = 0; i < n; i++) {
      vf w = splat(weights[i]);
      k_low += load(k[i] + e) * w, k_high += load(k[i] + half + e) * w;
      v_low += load(v[i] + e) * w, v_high += load(v[i] + half + e) * w;
    }
    k_low *= scale, k_high *= scale, v_low *= scale, v_high *= scale;
    turn(k_low, k_high, p.cos_sin + t * d, e, half, p.compress);
    if (k_part) store_halves(k_part, e, half, k_low, k_high), store_halves(v_part, e, half, v_low, v_high);
    if (newest) store_halves(key, e, half, k_low, k_high), store_halves(value, e, half, v_low, v_high);
  }
}

// Tokens [from, to) of a sequence, all heads: token after token, as they lie.
template <class T> void pool_block(const AppendParams& p, int64_t i, int64_t from, int64_t to, bool halves) {
  for (int64_t t = from; halves && t < to; t++)
    for (int64_t h = 0; h < p.cache.heads; h++) pool_token<T>(p, item_of(p, i * p.cache.heads + h), t);
  for (int64_t h = 0; !halves && h < p.cache.heads; h++) pool_window<T>(p, item_of(p, i * p.cache.heads + h), from, to);
}

// All tokens of one head without a window: the fp32 mean of the segment moves on.
template <class T> void pool_segment(const AppendParams& p, const Item& x) {
  const Cache& c = p.cache;
  int d = c.head_dim;
  int64_t place = x.index * c.ring;
  float *mean_k = (float*)c.ring_k + place * d, *mean_v = (float*)c.ring_v + place * d, *total = c.ring_w + place;
  float k[256 + VW], v[256 + VW];
  for (int64_t t = x.begin; t < x.begin + x.count; t++) {
    int64_t at = t * c.heads + x.h;
    read_row(k, head_of<T>(p.k, t, x.h), d, 1.0f);
    read_row(v, head_of<T>(p.v, t, x.h), d, 1.0f);
    if (p.merge[at]) {
      *total += p.omega[at];
      float share = p.omega[at] / *total;
      for (int e = 0; e < d; e++) k[e] = mean_k[e] + share * (k[e] - mean_k[e]), v[e] = mean_v[e] + share * (v[e] - mean_v[e]);
    } else {
      *total = p.omega[at];
    }
    memcpy(mean_k, k, d * sizeof(float));
    memcpy(mean_v, v, d * sizeof(float));
    finish<T>(p, x, t, k, v);
  }
}

// Ring and segment after the step.
template <class T> void remember(const AppendParams& p, const Item& x) {
  const Cache& c = p.cache;
  int d = c.head_dim;
  int64_t end = x.begin + x.count, since = 0;  // tokens at the end that merge
  while (since < x.count && p.merge[(end - 1 - since) * c.heads + x.h]) since++;
  int64_t segment = since < x.count ? since + 1 : c.segment[x.index] + x.count;
  if (p.window)
    for (int64_t back = 0; back < x.count && back < segment && back < c.ring; back++) {
      int64_t t = end - 1 - back, place = x.index * c.ring + (segment - 1 - back) % c.ring;
      memcpy((T*)c.ring_k + place * d, head_of<T>(p.k, t, x.h), d * sizeof(T));
      memcpy((T*)c.ring_v + place * d, head_of<T>(p.v, t, x.h), d * sizeof(T));
      c.ring_w[place] = p.omega[t * c.heads + x.h];
    }
  c.segment[x.index] = (int32_t)segment;
}

template <class T> void write(const AppendParams& p) {
  const Cache& c = p.cache;
  int d = c.head_dim;
  int64_t heads = c.heads, items = p.n * heads;
  bool alone = p.tokens * heads * (p.groups + 2) * d < 32768, halves = pooled_in_halves(p);
#pragma omp parallel num_threads(alone ? 1 : p.threads)
  {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < p.tokens; t++) fill_table(p.cos_sin + t * d, p.positions[t], p.inv_freq, d);
#pragma omp for schedule(static) nowait
    for (int64_t t = 0; t < p.tokens; t++) rotate_queries<T>(p, t, p.cos_sin + t * d, p.compress ? kNeuronAll : kNeuronNone);
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < p.n; i++)
      for (int64_t t = p.cu_seqlens[i]; p.rows[i] < 0 && t < p.cu_seqlens[i + 1]; t++) clear<T>(p, t);
    if (p.compress && !p.window) {
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t at = 0; at < items; at++) pool_segment<T>(p, item_of(p, at));
    } else {
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t i = 0; i < p.n; i++)
        if (count_of(p, i) <= kBlock) pool_block<T>(p, i, p.cu_seqlens[i], p.cu_seqlens[i] + count_of(p, i), halves);
      for (int64_t i = 0; i < p.n; i++) {
        int64_t begin = p.cu_seqlens[i], count = count_of(p, i);
        if (count <= kBlock) continue;
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t from = 0; from < count; from += kBlock)
          pool_block<T>(p, i, begin + from, begin + (from + kBlock < count ? from + kBlock : count), halves);
      }
    }
#pragma omp barrier  // the ring was read above
#pragma omp for schedule(static)
    for (int64_t at = 0; at < items; at++) {
      Item x = item_of(p, at);
      if (p.compress && x.count) remember<T>(p, x);
    }
  }
}

void decide_any(const AppendParams& p) {
  switch (p.cache.dtype) {
    case kF32: return decide<float>(p);
    case kBF16: return decide<bf16>(p);
    default: return decide<f16>(p);
  }
}

void write_any(const AppendParams& p) {
  switch (p.cache.dtype) {
    case kF32: return write<float>(p);
    case kBF16: return write<bf16>(p);
    default: return write<f16>(p);
  }
}

}  // namespace

extern "C" __attribute__((visibility("hidden"))) void DMC_ISA(decide)(const dmc::AppendParams& p) { decide_any(p); }
extern "C" __attribute__((visibility("hidden"))) void DMC_ISA(write)(const dmc::AppendParams& p) { write_any(p); }
