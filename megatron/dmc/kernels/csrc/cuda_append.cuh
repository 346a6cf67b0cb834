// What the appends of both methods share: pages, taken in an order that no schedule changes; the rotation; and how a warp holds a
// token.
#pragma once
#include "cuda_device.cuh"

namespace dmc {

constexpr int kDecideThreads = 512, kWriteThreads = 128;
constexpr int kEach = 4;      // what a thread has at once: heads of the scan, rounds of tokens
constexpr int kNoPage = -1;   // in `before`: this head got no page, and nothing of it may change
constexpr int kTooLong = -1;  // pages wanted by a head that has no room in its row of the table
constexpr int kIdle = -2;     // by one that has no part in the step

// ------------------------------------------------------------------------------------------------------------- pages

// True in all threads of the block that comes here last, which sees what the others have written (but not by its L1).
DMC_INLINE bool last_block(const Cache& c) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd((unsigned long long*)c.counters + kArrived, 1ull) == gridDim.x - 1;
  __syncthreads();
  if (!last) return false;
  if (threadIdx.x == 0) c.counters[kArrived] = 0;
  __threadfence();
  return true;
}

// Demand per head -> exclusive prefix sum over (sequence, head) -> slice of the ring of free pages. One block. `load(at)` tells what an
// item wants; `grant(at, item, page)` gives it the pages page(0), page(1) ...; `refuse(at)` is for one that does not get all of them.
template <class Item, class Load, class Grant, class Refuse>
DMC_INLINE void take_pages(const Cache& c, int items, Load load, Grant grant, Refuse refuse) {
  __shared__ int shared[32];
  __shared__ unsigned most;
  int refused = 0;
  int64_t taken = c.counters[kTaken];
  unsigned available = (unsigned)(c.num_pages - (taken - c.counters[kReturned])), pages = (unsigned)c.num_pages;
  unsigned start = (unsigned)(taken % c.num_pages), base = 0, granted = 0;
  for (int from = 0; from < items; from += kEach * blockDim.x) {
    int at = from + kEach * threadIdx.x, sum = 0, all;
    Item item[kEach];
#pragma unroll
    for (int e = 0; e < kEach; e++) {
      item[e] = {kIdle};
      if (at + e < items) item[e] = load(at + e);
      sum += max(item[e].wanted, 0);
    }
    unsigned place = base + block_scan(sum, shared, &all);
#pragma unroll
    for (int e = 0; e < kEach; e++) {
      int wanted = item[e].wanted;
      if (wanted == kIdle) continue;
      if (wanted == 0 || (wanted > 0 && place + wanted <= available)) {
        grant(at + e, item[e], [&](int n) {
          unsigned entry = start + place + n;
          int32_t id = c.free_pages[entry < pages ? entry : entry - pages];
          c.refcounts[id] = 1;
          return id;
        });
        if (wanted) granted = place + wanted;
      } else {
        refuse(at + e);
        refused++;
      }
      place += max(wanted, 0);
    }
    base += all;
  }
  if (threadIdx.x == 0) most = 0;
  refused = block_sum(refused, shared);  // has the barriers for `most`
  atomicMax(&most, granted);
  __syncthreads();
  if (threadIdx.x == 0) {
    c.counters[kTaken] = taken + most;  // heads that need pages after a refused one are refused too: no gap
    c.counters[kRefused] += refused;
  }
}

// ---------------------------------------------------------------------------------------------------------- rotation

// The fp32 angle is reduced in fp64; polynomials of Cephes' sinf and cosf.
DMC_INLINE void sine_cosine(float angle, float* sine, float* cosine) {
  const double magic = 6755399441055744.0;                // 1.5 * 2^52
  double n = angle * 0.63661977236758134308 + magic;      // the nearest multiple of pi / 2
  n -= magic;
  float r = (float)(angle - n * 1.57079632679489661923), z = r * r;
  int quadrant = (int)n;
  float s = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * r + r;
  float c = ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z - 0.5f * z + 1.0f;
  float a = quadrant & 1 ? c : s, b = quadrant & 1 ? s : c;
  *sine = quadrant & 2 ? -a : a;
  *cosine = (quadrant + 1) & 2 ? -b : b;
}

// x [D] fp32 in shared memory, in place, by the whole warp; channel i turns with i + D/2. neuron: the last
// channel is one, 0 before and after.
DMC_INLINE void rotate(float* x, float position, const float* inv_freq, int d, bool neuron) {
  int half = d / 2, lane = threadIdx.x % 32;
  __syncwarp();
  for (int i = lane; i < half; i += 32) {
    float sine, cosine, a = x[i], b = neuron && i == half - 1 ? 0.0f : x[i + half];
    sine_cosine(position * inv_freq[i], &sine, &cosine);
    x[i] = a * cosine - b * sine;
    x[i + half] = neuron && i == half - 1 ? 0.0f : b * cosine + a * sine;
  }
  __syncwarp();
}

// ------------------------------------------------------------------------------------------------- tokens of a warp

// A lane's share of one token's key and value: the units of 8 channels `lane` and, for N = 2, `lane + 32`, keys before values.
template <int N> struct Units {
  float x[N][8];
  template <class F> static DMC_INLINE void each(int d, F f) {
    int per = d / 8, lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < N; n++) {
      int unit = lane + 32 * n;
      if (unit < 2 * per) f(n, unit >= per, (unit % per) * 8);
    }
  }
};

// Functions of the parameters of either append.

template <class T, class P, int N> DMC_INLINE void read_raw(const P& p, int64_t t, int h, Units<N>& to) {
  bool aligned_k = is_aligned<T>(p.k), aligned_v = is_aligned<T>(p.v);
  Units<N>::each(p.cache.head_dim, [&](int n, bool value, int channel) {
    load8(to.x[n], (const T*)row_of<T>(value ? p.v : p.k, t, h) + channel, value ? aligned_v : aligned_k);
  });
}

// Rotate the key. stage: [D] of this warp.
template <class P, int N> DMC_INLINE void turn(const P& p, int t, Units<N>& x, float* stage, bool neuron) {
  int d = p.cache.head_dim;
  Units<N>::each(d, [&](int n, bool value, int channel) { if (!value) store8(stage + channel, x.x[n]); });
  rotate(stage, (float)p.positions[t], p.inv_freq, d, neuron);
  Units<N>::each(d, [&](int n, bool value, int channel) { if (!value) load8(x.x[n], stage + channel); });
  __syncwarp();
}

template <class T, class P, int N> DMC_INLINE void write_part(const P& p, int64_t t, int h, const Units<N>& x) {
  bool aligned = is_aligned<T>(p.k_part) && is_aligned<T>(p.v_part);
  Units<N>::each(p.cache.head_dim, [&](int n, bool value, int channel) {
    store8(row_of<T>(value ? p.v_part : p.k_part, t, h) + channel, x.x[n], aligned);
  });
}

// A token's codes, where pages of type S hold codes.
template <class S, int N> struct Codes {
  uint2 x[N];
  float k_scale, v_scale;
};

// Largest magnitude of a row, as bits -> the scale with which it is the largest code, in bf16. NaN where the row has infinity or NaN,
// whose bits are above those of all numbers.
template <class S> DMC_INLINE float scale_of(unsigned top) {
  float x = __uint_as_float(top);
  return widen((uint16_t)pack(x * (float)(1.0 / kLargest<S>) + x * 0.0f, 0.0f, bf16{}), bf16{});
}

// Rounds a token to what pages hold of it, and returns the codes that stand for that. See Slots.of in reference_pages.py.
template <class S, int N> DMC_INLINE Codes<S, N> round_to(int d, Units<N>& x) {
  Codes<S, N> to = {};
  if constexpr (kCoded<S>) {
    unsigned k_top = 0, v_top = 0;
    Units<N>::each(d, [&](int n, bool value, int) {
      unsigned top = 0;
#pragma unroll
      for (int e = 0; e < 8; e++) top = max(top, __float_as_uint(x.x[n][e]) & 0x7fffffffu);
      if (value) v_top = max(v_top, top);
      else k_top = max(k_top, top);
    });
    to.k_scale = scale_of<S>(warp_max(k_top)), to.v_scale = scale_of<S>(warp_max(v_top));
    Units<N>::each(d, [&](int n, bool value, int) {
      float scale = value ? to.v_scale : to.k_scale, inverse = scale < 0x1p-126f ? 0.0f : 1.0f / scale;
      uint32_t words[2] = {};
#pragma unroll
      for (int e = 0; e < 8; e++) {
        uint8_t code = encode(fminf(fmaxf(x.x[n][e] * inverse, -kLargest<S>), kLargest<S>), S{});
        words[e / 4] |= (uint32_t)code << (8 * (e % 4));
        x.x[n][e] = widen(code, S{}) * scale;
      }
      to.x[n].x = words[0], to.x[n].y = words[1];
    });
  }
  return to;
}

// x: a token; where S holds codes, `codes` are what is written.
template <class S, int N> DMC_INLINE void write_slot(const Cache& c, int64_t page, int place, const Units<N>& x, const Codes<S, N>& codes) {
  int64_t slot = page * c.page_size + place, at = slot * c.head_dim;
  Units<N>::each(c.head_dim, [&](int n, bool value, int channel) {
    S* to = (S*)(value ? c.v_pages : c.k_pages) + at + channel;
    if constexpr (kCoded<S>) *(uint2*)to = codes.x[n];
    else store8(to, x.x[n]);
  });
  if constexpr (kCoded<S>)
    if (int lane = threadIdx.x % 32; lane < 2)
      (lane ? c.v_scales : c.k_scales)[slot] = (uint16_t)pack(lane ? codes.v_scale : codes.k_scale, 0.0f, bf16{});
}

// Rotate a query; 0 for padding.
template <class T, class P> DMC_INLINE void write_query(const P& p, int t, int head, float* stage, bool neuron) {
  int d = p.cache.head_dim, channel = threadIdx.x % 32 * 8;
  bool aligned = is_aligned<T>(p.q), out_aligned = is_aligned<T>(p.q_rot), padding = p.rows[p.owner[t]] < 0;
  float x[8] = {};
  if (channel < d) {
    if (!padding) load8(x, (const T*)row_of<T>(p.q, t, head) + channel, aligned);
    store8(stage + channel, x);
  }
  rotate(stage, (float)p.positions[t], p.inv_freq, d, neuron);
  if (channel < d) {
    load8(x, stage + channel);
    store8(row_of<T>(p.q_rot, t, head) + channel, x, out_aligned);
  }
}

}  // namespace dmc
