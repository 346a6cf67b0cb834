// Attention of a few queries over a range of one head's slots, by the warps of a block: the part that decode and prefill share.
//
// A core keeps, for each of its queries, the highest score so far, the total of the weights and the weighted sum of the values.
// Scores are in units of log2: weights are powers of 2.
#pragma once
#include "cuda_device.cuh"

namespace dmc {

constexpr int kWarps = 4;
constexpr int kTile = 16;  // slots that a warp takes at a time: within one page, as page sizes are multiples of it

// What a query of one head sees in the cache, in places: its kept slots, and from the next multiple of kTile on the recent tokens of a
// model that evicts. A tile of these ends where that of its page does, so the first one may lack some places at its beginning.
// S: type of the pages.
template <class S> struct Slots {
  const int32_t *table, *recent;
  const S *k, *v;
  const uint16_t *k_scales, *v_scales;  // where S holds codes
  int page_size, d, columns;
  int kept;   // slots
  int first;  // the oldest recent token
  int token;  // the one that the first place of its tile would hold: `first`, or up to kTile - 1 before

  DMC_INLINE Slots(const Cache& c, int row, int64_t layer, int head, int slots = INT32_MAX, int tokens = 0)
      : k((const S*)c.k_pages), v((const S*)c.v_pages), k_scales(c.k_scales), v_scales(c.v_scales), page_size(c.page_size), d(c.head_dim), columns((int)c.recent), kept(slots) {
    int64_t index = head_index(c, row, layer, head);
    table = c.page_table + index * c.max_pages, recent = c.recent_table + index * c.recent;
    first = first_token(c, tokens), token = first / kTile * kTile;
  }
  static DMC_INLINE int first_token(const Cache& c, int tokens) { return max(tokens - 1 - (int)c.evict_window, 0); }
  // Number of places of a head that holds `slots` and has seen `tokens`.
  static DMC_INLINE int places(const Cache& c, int slots, int tokens) {
    return c.recent && tokens ? align(slots) + tokens - first_token(c, tokens) / kTile * kTile : slots;
  }
  static DMC_INLINE int align(int slots) { return (slots + kTile - 1) / kTile * kTile; }

  // Slots of the pool before the slot, which lies in the page `id`.
  DMC_INLINE int64_t index(int id, int slot) const { return (int64_t)id * page_size + (slot & (page_size - 1)); }
  // 8 channels of a slot, by its index.
  DMC_INLINE void load(int64_t at, int channel, float (&key)[8], float (&value)[8]) const {
    load8(key, k + at * d + channel), load8(value, v + at * d + channel);
    if constexpr (kCoded<S>) {
      float of_key = widen(k_scales[at], bf16{}), of_value = widen(v_scales[at], bf16{});
#pragma unroll
      for (int e = 0; e < 8; e++) key[e] *= of_key, value[e] *= of_value;
    }
  }
  // The index of a place's slot; below 0 if it holds nothing.
  DMC_INLINE int64_t find(int place) const {
    int at = place;
    if (place >= kept && (at = place - align(kept) + token) < first) return -1;
    return index(place < kept ? table[at / page_size] : recent[at / page_size % columns], at);
  }
  // The tile that begins at a multiple of kTile before `end`: its page, and 64 times its first slot there with its number of slots.
  DMC_INLINE int2 tile(int place, int end) const {
    if (place < kept) return make_int2(table[place / page_size], place % page_size * 64 + min(min(end, kept) - place, kTile));
    int shift = token - align(kept), at = max(place + shift, first), stop = min(end, place + kTile) + shift;
    return make_int2(recent[at / page_size % columns], at % page_size * 64 + stop - at);
  }
};

// Results of a block's warps, in shared memory: weighted sums, highest scores and total weights.
template <int Q, int D> struct Sums {
  float sum[kWarps][Q][D], top[kWarps][Q], total[kWarps][Q];
};

DMC_INLINE float rescale(float from, float to) { return from == to ? 1.0f : exp2_fast(from - to); }

// 8 channels of a query's result, added up from results over parts of its slots.
struct Mixed {
  float x[8] = {}, top = -INFINITY, total = 0;
  DMC_INLINE void add(const float (&y)[8], float other_top, float other_total) {
    if (other_total == 0) return;  // not "below some bound": NaN goes on to the output
    float highest = fmaxf(top, other_top), mine = total == 0 ? 0.0f : rescale(top, highest), theirs = rescale(other_top, highest);
#pragma unroll
    for (int e = 0; e < 8; e++) x[e] = x[e] * mine + y[e] * theirs;
    total = total * mine + other_total * theirs;
    top = highest;
  }
  template <class T> DMC_INLINE void store(T* out, bool aligned) {
    float factor = total == 0 ? 0.0f : 1.0f / total;
#pragma unroll
    for (int e = 0; e < 8; e++) x[e] *= factor;
    store8(out, x, aligned);
  }
};

// --------------------------------------------------------------------------------------------------- any dtype, any D

// Up to 32 lanes share a slot, 8 channels each; the warp takes as many slots at a time as fit. Queries are of type T, pages of type S.
template <class T, class S, int Q> struct AnyCore {
  using Element = T;
  using Page = S;
  static constexpr int kQueries = Q, kMaxD = 256, kBlocks = 3;
  float q[Q][8], acc[Q][8], top[Q], total[Q];
  int limit[Q];  // slots that the query sees: `span` at most, before this one
  unsigned span;
  int lanes, channel;
  bool on;

  // query(j): the row of query j, null if there is none. `scale` includes log2(e).
  template <class F> DMC_INLINE void begin(int d, float scale, bool aligned, F query) {
    for (lanes = 1; lanes * 8 < d;) lanes *= 2;
    channel = threadIdx.x % lanes * 8, on = channel < d, span = INT32_MAX;
#pragma unroll
    for (int j = 0; j < Q; j++) {
      const T* row = query(j);
#pragma unroll
      for (int e = 0; e < 8; e++) q[j][e] = acc[j][e] = 0;
      if (row && on) load8(q[j], row + channel, aligned);
#pragma unroll
      for (int e = 0; e < 8; e++) q[j][e] *= scale;
      top[j] = -INFINITY, total[j] = 0, limit[j] = row ? INT32_MAX : 0;
    }
  }

  DMC_INLINE void add(int j, float score, const float (&v)[8]) {
    float highest = fmaxf(top[j], score), factor = rescale(top[j], highest), weight = exp2_fast(score - highest);
#pragma unroll
    for (int e = 0; e < 8; e++) acc[j][e] = acc[j][e] * factor + weight * v[e];
    total[j] = total[j] * factor + weight;
    top[j] = highest;
  }

  // One slot: k and v are this lane's 8 channels of it, and `in` says whether it is one at all.
  DMC_INLINE void take(const float (&k)[8], const float (&v)[8], int slot, bool in) {
#pragma unroll
    for (int j = 0; j < Q; j++) {
      float score = 0;
#pragma unroll
      for (int e = 0; e < 8; e++) score += q[j][e] * k[e];
      for (int w = lanes / 2; w; w /= 2) score += __shfl_xor_sync(kAll, score, w);
      if (in && (unsigned)(limit[j] - 1 - slot) < span) add(j, score, v);
    }
  }

  // A slot that only query j sees.
  DMC_INLINE void take_own(int j, const float (&k)[8], const float (&v)[8], bool in) {
    float score = 0;
#pragma unroll
    for (int e = 0; e < 8; e++) score += q[j][e] * k[e];
    for (int w = lanes / 2; w; w /= 2) score += __shfl_xor_sync(kAll, score, w);
    if (in) add(j, score, v);
  }

  // load(slot, k, v): this lane's channels of a slot, where it is `on`; false if it is none.
  template <class F> DMC_INLINE void run(F load, int begin, int end) {
    int warp = threadIdx.x / 32, per = 32 / lanes, mine = threadIdx.x % 32 / lanes;
#pragma unroll 2
    for (int from = begin + warp * per; from < end; from += kWarps * per) {
      int slot = from + mine;
      float k[8] = {}, v[8] = {};
      bool in = slot < end && load(slot, k, v);
      take(k, v, slot, in);
    }
  }
  DMC_INLINE void run(const Slots<S>& s, int begin, int end) {
    run([&](int slot, float (&k)[8], float (&v)[8]) {
      int64_t at = s.find(slot);
      if (at >= 0 && on) s.load(at, channel, k, v);
      return at >= 0;
    }, begin, end);
  }

  template <int D> DMC_INLINE void finish(Sums<Q, D>& to) {
    int warp = threadIdx.x / 32;
#pragma unroll
    for (int j = 0; j < Q; j++) {
      for (int w = lanes; w < 32; w *= 2) {
        float other_top = __shfl_xor_sync(kAll, top[j], w), other_total = __shfl_xor_sync(kAll, total[j], w);
        float highest = fmaxf(top[j], other_top);
        float mine = total[j] == 0 ? 0.0f : rescale(top[j], highest), theirs = other_total == 0 ? 0.0f : rescale(other_top, highest);
#pragma unroll
        for (int e = 0; e < 8; e++) acc[j][e] = acc[j][e] * mine + __shfl_xor_sync(kAll, acc[j][e], w) * theirs;
        total[j] = total[j] * mine + other_total * theirs;
        top[j] = highest;
      }
      if ((int)threadIdx.x % 32 < lanes && on) store8(&to.sum[warp][j][channel], acc[j]);
      if (threadIdx.x % 32 == 0) to.top[warp][j] = top[j], to.total[warp][j] = total[j];
    }
  }
};

// ------------------------------------------------------------------------------------- tensor cores: 16 bits, D % 16 == 0

// Scores [16 slots, 8 queries] = K Q^T, sums [16 channels, 8 queries] += V^T P^T. With r = lane / 4 and c = lane % 4, fragments are:
//   K    rows r and r + 8 are slots; "columns" 2c, 2c+1, 2c+8, 2c+9 of two products are the 8 channels from 32 j + 8 c on
//   V^T  "columns" 2c, 2c+1, 2c+8, 2c+9 are slots; rows r and r + 8 of the next products are the 8 channels from 64 j + 8 r on
// A lane's queries are 2c and 2c + 1, of the scores and of the sums.
//
// Codes become elements of 16 bits in registers, which hold them exactly. Their scales stay out of both products: that of a key goes
// to its scores, that of a value to its weights. These may then be of any size, so they are bf16 whatever T is.

// 8, 4 and 2 elements of a row as they lie in memory.
template <class S> struct InMemory { using Eight = uint4; using Four = uint2; using Two = uint32_t; };
struct CodesInMemory { using Eight = uint2; using Four = uint32_t; using Two = uint16_t; };
template <> struct InMemory<i8> : CodesInMemory {};
template <> struct InMemory<f8> : CodesInMemory {};

template <int I> DMC_INLINE uint32_t word_of(const uint4& x) { return I == 0 ? x.x : I == 1 ? x.y : I == 2 ? x.z : x.w; }
template <int I> DMC_INLINE uint32_t word_of(const uint2& x) { return I == 0 ? x.x : x.y; }
template <int I> DMC_INLINE uint32_t word_of(uint32_t x) { return x; }

// Elements 2 I and 2 I + 1 of a row.
template <class T, class S, int I, class X> DMC_INLINE uint32_t two_of(const X& x) {
  if constexpr (kCoded<S>) return widen2<I % 2 * 2, I % 2 * 2 + 1>(word_of<I / 2>(x), 0, S{}, T{});
  else return word_of<I>(x);
}
// Elements 2 I of the rows a and b, and elements 2 I + 1.
template <class T, class S, int I, class X> DMC_INLINE uint2 pairs_of(const X& a, const X& b) {
  uint2 x;
  if constexpr (kCoded<S>) {
    constexpr int from = I % 2 * 2;
    x.x = widen2<from, from + 4>(word_of<I / 2>(a), word_of<I / 2>(b), S{}, T{});
    x.y = widen2<from + 1, from + 5>(word_of<I / 2>(a), word_of<I / 2>(b), S{}, T{});
  } else {
    x.x = __byte_perm(word_of<I>(a), word_of<I>(b), 0x5410), x.y = __byte_perm(word_of<I>(a), word_of<I>(b), 0x7632);
  }
  return x;
}

template <class T, class S, int D> struct TensorCore {
  using Element = T;
  using Page = S;
  using Weight = std::conditional_t<kCoded<S>, bf16, T>;
  using Eight = typename InMemory<S>::Eight;
  using Four = typename InMemory<S>::Four;
  using Two = typename InMemory<S>::Two;
  static constexpr int kQueries = 8, kMaxD = D, kBlocks = D > 128 ? 2 : D > 96 ? 3 : 4;
  // Many channels leave no registers for a tile of keys and one of values at once: values are loaded when wanted, in parts.
  static constexpr bool kAhead = D <= 128 || kCoded<S>;
  static constexpr int kParts = kAhead ? 1 : 2;
  static constexpr int K32 = D / 32, K16 = D % 32 / 16, V64 = D / 64, V32 = D % 64 / 32, V16 = D % 32 / 16;
  template <class X, int N> struct Some { X x[N ? N : 1]; };

  struct Keys {
    Some<Eight, K32> a, b;  // of slots r and r + 8
    Some<Four, K16> a2, b2;
    Some<uint16_t, kCoded<S> ? 2 : 0> scale;
  };
  struct Values {  // a part of slots 2c, 2c + 1, 2c + 8, 2c + 9
    Some<Eight, V64 / kParts> x[4];
    Some<Four, V32> x2[4];
    Some<Two, V16> x1[4];
    Some<uint16_t, kCoded<S> ? 2 : 0> scale;  // of slots r and r + 8, whose weights the lane computes
  };
  Some<uint4, K32> q;
  Some<uint2, K16> q2;
  float acc[D / 16][4], top[2], total[2], scale;

  static DMC_INLINE uint32_t word(const T* p, bool aligned) {
    return aligned ? *(const uint32_t*)p : (uint32_t)p[0].bits | (uint32_t)p[1].bits << 16;
  }

  template <class F> DMC_INLINE void begin(int, float with, bool aligned, F query) {
    int r = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
    const T* row = query(r);
    scale = with;
    auto at = [&](int channel) { return row ? word(row + channel, aligned) : 0u; };
#pragma unroll
    for (int j = 0; j < K32; j++) {
      int channel = 32 * j + 8 * c;
      q.x[j] = make_uint4(at(channel), at(channel + 2), at(channel + 4), at(channel + 6));
    }
    if (K16) q2.x[0].x = at(32 * K32 + 4 * c), q2.x[0].y = at(32 * K32 + 4 * c + 2);
#pragma unroll
    for (int m = 0; m < D / 16; m++)
#pragma unroll
      for (int e = 0; e < 4; e++) acc[m][e] = 0;
    top[0] = top[1] = -INFINITY, total[0] = total[1] = 0;
  }

  // The n slots (1 to 16) from `tile` on. Rows behind them are the last one again: what lies there may be anything.
  static DMC_INLINE void load(Keys& to, const S* tile, int n) {
    int r = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
    const S *a = tile + min(r, n - 1) * D + 8 * c, *b = tile + min(r + 8, n - 1) * D + 8 * c;
#pragma unroll
    for (int j = 0; j < K32; j++) stream(to.a.x[j], a + 32 * j), stream(to.b.x[j], b + 32 * j);
    if (K16) stream(to.a2.x[0], a + 32 * K32 - 4 * c), stream(to.b2.x[0], b + 32 * K32 - 4 * c);
  }
  static DMC_INLINE void load(Values& to, const S* tile, int n, int part = 0) {
    int r = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const S* row = tile + min(2 * c + i % 2 + i / 2 * 8, n - 1) * D + part * (V64 / kParts * 64);
#pragma unroll
      for (int j = 0; j < V64 / kParts; j++) stream(to.x[i].x[j], row + 64 * j + 8 * r);
      if (V32) stream(to.x2[i].x[0], row + 64 * V64 + 4 * r);
      if (V16) stream(to.x1[i].x[0], row + 64 * V64 + 32 * V32 + 2 * r);
    }
  }
  static DMC_INLINE void load_scales(uint16_t (&to)[2], const uint16_t* tile, int n) {
    int r = threadIdx.x % 32 / 4;
    stream(to[0], tile + min(r, n - 1)), stream(to[1], tile + min(r + 8, n - 1));
  }

  template <int I, class X> DMC_INLINE void score(float (&s)[4], const X& a, const X& b, uint32_t q0, uint32_t q1) const {
    mma(s, two_of<T, S, I>(a), two_of<T, S, I>(b), two_of<T, S, I + 1>(a), two_of<T, S, I + 1>(b), q0, q1, T{});
  }
  DMC_INLINE void score(float (&s)[4], const Keys& k) const {
    s[0] = s[1] = s[2] = s[3] = 0;
#pragma unroll
    for (int j = 0; j < K32; j++) {
      score<0>(s, k.a.x[j], k.b.x[j], q.x[j].x, q.x[j].y);
      score<2>(s, k.a.x[j], k.b.x[j], q.x[j].z, q.x[j].w);
    }
    if (K16) score<0>(s, k.a2.x[0], k.b2.x[0], q2.x[0].x, q2.x[0].y);
    if constexpr (kCoded<S>) scale_rows(s, k.scale.x);
  }
  static DMC_INLINE void scale_rows(float (&s)[4], const uint16_t (&scale)[2]) {
#pragma unroll
    for (int e = 0; e < 4; e++) s[e] *= widen(scale[e / 2], bf16{});
  }

  // Channels 2 I and 2 I + 1 of the four rows: one fragment of V^T.
  template <int I, class X>
  static DMC_INLINE void add(float (&sum)[4], const X& v0, const X& v1, const X& v2, const X& v3, uint32_t p0, uint32_t p1) {
    uint2 a = pairs_of<Weight, S, I>(v0, v1), b = pairs_of<Weight, S, I>(v2, v3);
    mma(sum, a.x, a.y, b.x, b.y, p0, p1, Weight{});
  }

  // Scores to weights of 16 bits, as the second product takes them; sums so far to the new highest score.
  DMC_INLINE void weigh(float (&s)[4], const Values& v, int n, uint32_t* p0, uint32_t* p1) {
    int r = threadIdx.x % 32 / 4;
    float p[4];
#pragma unroll
    for (int e = 0; e < 4; e++) s[e] = r + e / 2 * 8 < n ? s[e] * scale : -INFINITY;
#pragma unroll
    for (int j = 0; j < 2; j++) {
      float highest = fmaxf(s[j], s[j + 2]);
#pragma unroll
      for (int w = 4; w < 32; w *= 2) highest = fmaxf(highest, __shfl_xor_sync(kAll, highest, w));
      highest = fmaxf(highest, top[j]);
      float base = highest == -INFINITY ? 0.0f : highest, factor = exp2_fast(top[j] - base);
      p[j] = exp2_fast(s[j] - base), p[j + 2] = exp2_fast(s[j + 2] - base);
      total[j] = total[j] * factor + (p[j] + p[j + 2]);
      top[j] = highest;
#pragma unroll
      for (int m = 0; m < D / 16; m++) acc[m][j] *= factor, acc[m][j + 2] *= factor;
    }
    if constexpr (kCoded<S>) scale_rows(p, v.scale.x);
    *p0 = transpose8x8(pack(p[0], p[1], Weight{}));
    *p1 = transpose8x8(pack(p[2], p[3], Weight{}));
  }

  template <int Part> DMC_INLINE void add_part(const Values& v, uint32_t p0, uint32_t p1) {
#pragma unroll
    for (int j = 0; j < V64 / kParts; j++) {
      const Eight &a = v.x[0].x[j], &b = v.x[1].x[j], &c = v.x[2].x[j], &d = v.x[3].x[j];
      constexpr int first = Part * (V64 / kParts) * 4;
      add<0>(acc[first + 4 * j], a, b, c, d, p0, p1);
      add<1>(acc[first + 4 * j + 1], a, b, c, d, p0, p1);
      add<2>(acc[first + 4 * j + 2], a, b, c, d, p0, p1);
      add<3>(acc[first + 4 * j + 3], a, b, c, d, p0, p1);
    }
    if (V32) {
      const Four &a = v.x2[0].x[0], &b = v.x2[1].x[0], &c = v.x2[2].x[0], &d = v.x2[3].x[0];
      add<0>(acc[4 * V64], a, b, c, d, p0, p1);
      add<1>(acc[4 * V64 + (V32 ? 1 : 0)], a, b, c, d, p0, p1);
    }
    if (V16) add<0>(acc[D / 16 - 1], v.x1[0].x[0], v.x1[1].x[0], v.x1[2].x[0], v.x1[3].x[0], p0, p1);
  }

  // While one tile is worked on, the next one's keys and values are on their way.
  DMC_INLINE void run(const Slots<S>& s, int begin, int end) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, tiles = (end - begin + kTile - 1) / kTile, n;
    int mine = warp < tiles ? (tiles - warp + kWarps - 1) / kWarps : 0;
    int2 ahead = make_int2(0, 0);
    // The next 32 tiles lie in the lanes.
    auto locate = [&](int i) {
      if (i % 32 == 0 && i + lane < mine) ahead = s.tile(begin + ((i + lane) * kWarps + warp) * kTile, end);
      int id = __shfl_sync(kAll, ahead.x, i % 32), slots = __shfl_sync(kAll, ahead.y, i % 32);
      n = slots % 64;
      return s.index(id, slots / 64);
    };
    if (!mine) return;
    Keys keys;
    Values values;
    int64_t at = locate(0);
    auto load_keys = [&] {
      load(keys, s.k + at * D, n);
      if constexpr (kCoded<S>) load_scales(keys.scale.x, s.k_scales + at, n);
    };
    auto load_values = [&] {
      load(values, s.v + at * D, n);
      if constexpr (kCoded<S>) load_scales(values.scale.x, s.v_scales + at, n);
    };
    load_keys();
    if (kAhead) load_values();
#pragma unroll 1
    for (int i = 0; i < mine; i++) {
      float scores[4];
      uint32_t p0, p1;
      bool more = i + 1 < mine;
      int now = n;
      score(scores, keys);
      const S* now_at = s.v + at * D;
      if (!kAhead) load(values, now_at, now);
      if (more) {
        at = locate(i + 1);
        if (kAhead) load_keys();
      }
      weigh(scores, values, now, &p0, &p1);
      add_part<0>(values, p0, p1);
      if (!kAhead) {
        __syncwarp();  // these loads must not begin before the first part is used up: there are no registers for both
        load(values, now_at, now, 1);
        if (more) load_keys();
        add_part<kParts - 1>(values, p0, p1);
      } else if (more) {
        load_values();
      }
    }
  }

  DMC_INLINE void finish(Sums<8, D>& to) {
    int warp = threadIdx.x / 32, r = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < 2; j++) {
#pragma unroll
      for (int w = 4; w < 32; w *= 2) total[j] += __shfl_xor_sync(kAll, total[j], w);
      float* row = to.sum[warp][2 * c + j];
      // acc[m][j] and acc[m][j + 2] are neighbouring channels.
#pragma unroll
      for (int m = 0; m < D / 16; m++) {
        int channel = m < 4 * V64 ? m / 4 * 64 + 8 * r + m % 4 * 2
                      : m < 4 * V64 + 2 * V32 ? 64 * V64 + 4 * r + (m - 4 * V64) * 2 : D - 16 + 2 * r;
        *(float2*)(row + channel) = make_float2(acc[m][j], acc[m][j + 2]);
      }
      if (r == 0) to.top[warp][2 * c + j] = top[j], to.total[warp][2 * c + j] = total[j];
    }
  }
};

}  // namespace dmc
