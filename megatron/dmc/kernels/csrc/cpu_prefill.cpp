// Prefill attention: query t of a chunk over the final slots [0, slot_index[t]) of its heads and its own partial state.
//
// A task is 64 queries (tokens times the group) of one KV head. Queries lie in the lanes: scores [slot][query], weights
// likewise, sums [channel][query], so both products broadcast a number of the cache and no sum runs across lanes.
#include "cpu_attention.h"

namespace {

constexpr int kRows = 64;         // queries of a task
constexpr int kBroadcast = VW == 16 ? 8 : 4;  // accumulators: kBroadcast x 2 vectors
constexpr int kPair = 2 * VW;

// out[m][kRows] (+)= sum over e < depth of a[i * a_row + e * a_col] * b[e][kRows], m a multiple of kBroadcast.
template <bool Add> INLINE void product(float* out, const float* a, int64_t a_row, int64_t a_col, const float* b, int m, int depth, int columns) {
  for (int at = 0; at < columns; at += kPair)
    for (int i = 0; i < m; i += kBroadcast) {
      vf acc[kBroadcast][2];
      for (int r = 0; r < kBroadcast; r++)
        for (int e = 0; e < 2; e++) acc[r][e] = Add ? load(out + (i + r) * kRows + at + e * VW) : vf{};
      const float* from = a + i * a_row;
      for (int e = 0; e < depth; e++) {
        vf left = load(b + e * kRows + at), right = load(b + e * kRows + at + VW);
        for (int r = 0; r < kBroadcast; r++) {
          vf x = splat(from[r * a_row + e * a_col]);
          acc[r][0] += x * left;
          acc[r][1] += x * right;
        }
      }
      for (int r = 0; r < kBroadcast; r++)
        for (int e = 0; e < 2; e++) store(out + (i + r) * kRows + at + e * VW, acc[r][e]);
    }
}

struct Block {  // scratch of one task; fp32
  float *q;       // [D][kRows]
  float *sum;     // [D][kRows]
  float *scores;  // [kTile][kRows], then the weights
  float *k, *v;   // [kTile][D]
  float top[kRows], total[kRows];
  int32_t limit[kRows];
  static int64_t floats(int d) { return (int64_t)d * kRows * 2 + kTile * kRows + 2 * kTile * align_up(d, VW); }
  Block(float* memory, int d) {
    q = memory, sum = q + d * kRows, scores = sum + d * kRows, k = scores + kTile * kRows;
    v = k + kTile * align_up(d, VW);
  }
};

// Scores of slots [begin, begin + n) to weights; sums so far are scaled to the new maximum.
INLINE void weigh(Block& b, int64_t begin, int n, int d, int columns, float scale, bool masked) {
  for (int at = 0; at < columns; at += VW) {
    vf before = load(b.top + at), best = before;
    vi limit;
    memcpy(&limit, b.limit + at, sizeof limit);
    for (int r = 0; r < n; r++) {
      vf s = load(b.scores + r * kRows + at) * splat(scale);
      if (masked) s = select(limit > (int32_t)(begin + r), s, splat(-INFINITY));
      store(b.scores + r * kRows + at, s);
      best = vmax(s, best);
    }
    vf base = select(best == splat(-INFINITY), vf{}, best);  // a query that sees nothing yet
    vf factor = vexp2(before - base), total = load(b.total + at) * factor;
    for (int r = 0; r < n; r++) {
      vf p = vexp2(load(b.scores + r * kRows + at) - base);
      total += p;
      store(b.scores + r * kRows + at, p);
    }
    store(b.top + at, best);
    store(b.total + at, total);
    int changed = 0;
    for (int i = 0; i < VW; i++) changed |= factor[i] != 1.0f;
    if (changed)
      for (int c = 0; c < d; c++) store(b.sum + c * kRows + at, load(b.sum + c * kRows + at) * factor);
  }
}

// Rows [begin, begin + n) of K or V as fp32 [n up to a multiple of 8][D]; rows from n on are zeros.
template <class T> INLINE void read_tile(float* out, const Slots& s, bool keys, int64_t begin, int n, int d) {
  for (int r = 0; r < n; r++) {
    const T* row = keys ? s.key<T>(begin + r) : s.value<T>(begin + r);
    int c = 0;
    for (; c + VW <= d; c += VW) store(out + (int64_t)r * d + c, load(row + c));
    if (c < d) store_some(out + (int64_t)r * d + c, load_some(row + c, d - c), d - c);
  }
  memset(out + (int64_t)n * d, 0, sizeof(float) * d * (align_up(n, 8) - n));
}

// Tokens [first, first + count) of a sequence, of one KV head.
template <class T>
void attend_block(const PrefillParams& p, int64_t row, int64_t head, int64_t first, int count, Block& b) {
  const Cache& c = p.cache;
  int d = c.head_dim, g = (int)p.groups, rows = count * g, columns = (int)align_up(rows, kPair);
  Slots s = slots_of(c, row, p.layer, head);
  int32_t least = INT32_MAX, most = 0;
  float scale = p.scale * 1.44269504f;  // weights are powers of 2
  float line[256 + VW];
  for (int i = 0; i < columns; i++) {
    int64_t t = first + i / g;
    b.limit[i] = i < rows ? p.slot_index[t * c.heads + head] : 0;
    b.top[i] = -INFINITY, b.total[i] = 0;
    if (i >= rows) {
      for (int e = 0; e < d; e++) b.q[e * kRows + i] = 0;
      continue;
    }
    least = b.limit[i] < least ? b.limit[i] : least;
    most = b.limit[i] > most ? b.limit[i] : most;
    read_row(line, (const T*)p.q.data + t * p.q.token + (head * g + i % g) * p.q.head, d, 1.0f);
    for (int e = 0; e < d; e++) b.q[e * kRows + i] = line[e];
  }
  memset(b.sum, 0, sizeof(float) * d * kRows);
  for (int64_t at = 0; at < most; at += kTile) {
    int n = most - at < kTile ? (int)(most - at) : kTile;
    read_tile<T>(b.k, s, true, at, n, d);
    product<false>(b.scores, b.k, d, 1, b.q, (int)align_up(n, kBroadcast), d, columns);
    weigh(b, at, n, d, columns, scale, at + n > least);
    read_tile<T>(b.v, s, false, at, n, d);
    product<true>(b.sum, b.v, 1, d, b.scores, d, n, columns);
  }
  float own_v[256 + VW];
  for (int i = 0; i < rows; i++) {
    int64_t t = first + i / g;
    read_row(line, (const T*)p.k_part.data + t * p.k_part.token + head * p.k_part.head, d, 1.0f);
    read_row(own_v, (const T*)p.v_part.data + t * p.v_part.token + head * p.v_part.head, d, 1.0f);
    float score = 0;
    for (int e = 0; e < d; e++) score += line[e] * b.q[e * kRows + i];
    score *= scale;
    float top = score > b.top[i] ? score : b.top[i];
    float factor = exp2f(b.top[i] - top), weight = exp2f(score - top), total = b.total[i] * factor + weight;
    for (int e = 0; e < d; e++) line[e] = b.sum[e * kRows + i] * factor + weight * own_v[e];
    write_row((T*)p.out.data + t * p.out.token + (head * g + i % g) * p.out.head, line, d, 1.0f / total);
  }
}

// The last token of a sequence: its own slot is final and holds its partial state, so this is decoding.
template <class T> void attend_token(const PrefillParams& p, int64_t row, int64_t head, int64_t t, float* memory) {
  int d = p.cache.head_dim, g = (int)p.groups, dp = padded<T>(d);
  float *packed = memory, *acc = packed + g * dp, *top = acc + g * dp, *total = top + g;
  const T* from = (const T*)p.q.data + t * p.q.token + head * g * p.q.head;
  Slots s = slots_of(p.cache, row, p.layer, head);
  attend_range<T>(s, 0, p.slot_index[t * p.cache.heads + head] + 1, from, p.q.head, g, d, p.scale, packed, acc, top, total);
  T* to = (T*)p.out.data + t * p.out.token + head * g * p.out.head;
  for (int j = 0; j < g; j++) write_row(to + j * p.out.head, acc + j * dp, d, 1.0f / total[j]);
}

struct Task {
  int32_t row, head, count;
  int64_t first;
  bool lone;  // the last token of its sequence and nothing else
};

template <class T> int prefill(const PrefillParams& p) {
  const Cache& c = p.cache;
  int d = c.head_dim, g = (int)p.groups;
  int each = kRows / g;  // tokens of a task
  int64_t bound = 0;
  for (int64_t i = 0; i < p.n; i++) bound += ((p.cu_seqlens[i + 1] - p.cu_seqlens[i]) / each + 1) * c.heads;
  Task* list = (Task*)malloc(bound * sizeof(Task) + 1);
  if (!list) return 1;
  int64_t tasks = 0;
  for (int64_t i = 0; i < p.n; i++) {
    int64_t begin = p.cu_seqlens[i], count = p.cu_seqlens[i + 1] - begin;
    if (p.slots[i] < 0) {
      for (int64_t t = begin; t < begin + count; t++)
        for (int64_t h = 0; h < c.heads * g; h++) memset((T*)p.out.data + t * p.out.token + h * p.out.head, 0, d * sizeof(T));
      continue;
    }
    // The last blocks see the most slots: they start first.
    for (int64_t at = (count - 1) / each * each; count > 0 && at >= 0; at -= each)
      for (int64_t h = 0; h < c.heads; h++)
        list[tasks++] = {p.slots[i], (int32_t)h, (int32_t)(count - at < each ? count - at : each), begin + at, at + 1 == count};
  }
  int64_t single = (int64_t)g * (2 * padded<T>(d) + 2), floats = Block::floats(d);
  if (single > floats) floats = single;
  int failed = 0;
#pragma omp parallel num_threads(tasks < 2 ? 1 : p.threads) reduction(| : failed)
  {
    float* memory = scratch(floats);
    if (!memory) failed = 1;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < tasks; i++) {
      const Task& t = list[i];
      if (failed) continue;
      if (t.lone) {
        attend_token<T>(p, t.row, t.head, t.first, memory);
        continue;
      }
      Block block(memory, d);
      attend_block<T>(p, t.row, t.head, t.first, t.count, block);
    }
  }
  free(list);
  return failed;
}

int prefill_any(const PrefillParams& p) {
  switch (p.cache.dtype) {
    case kF32: return prefill<float>(p);
    case kBF16: return prefill<bf16>(p);
    default: return prefill<f16>(p);
  }
}

}  // namespace

extern "C" __attribute__((visibility("hidden"))) int DMC_ISA(prefill)(const dmc::PrefillParams& p) { return prefill_any(p); }
