// Decode attention: one query per sequence over all slots of its heads, split over ranges of slots.
//
// Work is bound by memory, so a page is read once for all queries of its group: scores of a tile of 64 slots, online softmax,
// weighted values. A split is 1024 slots whatever the number of threads, so results do not depend on it. Kept slots and recent tokens
// of a model that evicts are one row of slots with a gap.
#include "cpu_int8.h"

namespace {

constexpr int64_t kSplit = 1024;

struct Task {
  int32_t sequence, head;
  int64_t begin, end;
  float* partial;  // of the head's first split when it has several, null else
};

// S: of pages, T: of queries.
template <class S, class T> int decode(const DecodeParams& p) {
  const Cache& c = p.cache;
  int d = c.head_dim, g = (int)p.groups, dp = padded<S>(d);
  int64_t tasks = 0, partials = 0, slots = 0;
  auto view = [&](int64_t i, int64_t h) { return p.rows[i] < 0 ? View{} : view_of(c, head_index(c, p.rows[i], p.layer, h)); };
  for (int64_t i = 0; i < p.n; i++)
    for (int64_t h = 0; h < c.heads; h++) {
      int64_t length = view(i, h).end;
      int64_t splits = length ? (length + kSplit - 1) / kSplit : 1;
      tasks += splits, slots += length;
      if (splits > 1) partials += splits;
    }
  int64_t each = (int64_t)g * (dp + 2);
  Task* list = (Task*)malloc(tasks * sizeof(Task) + 1);
  float* memory = scratch(partials * each + 1);
  if (!list || !memory) { free(list); return 1; }
  int64_t t = 0;
  float* next = memory;
  for (int64_t i = 0; i < p.n; i++)
    for (int64_t h = 0; h < c.heads; h++) {
      int64_t length = view(i, h).end;
      int64_t splits = length ? (length + kSplit - 1) / kSplit : 1;
      for (int64_t s = 0; s < splits; s++) {
        int64_t end = (s + 1) * kSplit;
        list[t++] = {(int32_t)i, (int32_t)h, s * kSplit, end < length ? end : length, splits > 1 ? next : nullptr};
        if (splits > 1) next += each;
      }
    }
  int failed = 0;
  // Starting the other threads costs more than reading some 64 KiB.
  bool alone = tasks == 1 || slots * 2 * d * (int64_t)sizeof(S) < 65536;
#pragma omp parallel num_threads(alone ? 1 : p.threads) reduction(| : failed)
  {
    // Not scratch(): this thread may hold the partial sums in it.
    float* own = (float*)aligned_alloc(64, align_up((int64_t)g * (2 * dp + 2) * 4, 64));
    if (!own) failed = 1;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < tasks; i++) {
      if (failed) continue;
      const Task& task = list[i];
      Heads q = p.q, out = p.out;
      T* to = (T*)out.data + task.sequence * out.token + task.head * g * out.head;
      if (task.begin == task.end) {
        for (int j = 0; j < g; j++) memset(to + j * out.head, 0, d * sizeof(T));
        continue;
      }
      const T* from = (const T*)q.data + task.sequence * q.token + task.head * g * q.head;
      float* acc = task.partial ? task.partial : own + g * dp;
      float *top = acc + g * dp, *total = top + g;
      int32_t table[(kSplit + kTile) / 16];
      Slots s = slots_of(c, view(task.sequence, task.head), task.begin, task.end, table);
      attend<S>(s, task.end - task.begin, from, q.head, g, d, p.scale, own, acc, top, total);
      if (!task.partial)
        for (int j = 0; j < g; j++) write_row(to + j * out.head, acc + j * dp, d, 1.0f / total[j]);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < tasks; i++) {
      if (failed || !list[i].partial || list[i].begin) continue;
      float* parts = list[i].partial;  // of all splits of this head, one after the other
      int64_t splits = 1;
      while (i + splits < tasks && list[i + splits].begin) splits++;
      T* to = (T*)p.out.data + list[i].sequence * p.out.token + list[i].head * g * p.out.head;
      for (int j = 0; j < g; j++) {
        float top = -INFINITY, total = 0;
        for (int64_t s = 0; s < splits; s++) top = fmaxf(top, parts[s * each + g * dp + j]);
        for (int e = 0; e < dp; e++) own[e] = 0;
        for (int64_t s = 0; s < splits; s++) {
          float* part = parts + s * each;
          float factor = exp2f(part[g * dp + j] - top);
          total += factor * part[g * dp + g + j];
          for (int e = 0; e < dp; e += VW) store(own + e, load(own + e) + splat(factor) * load(part + j * dp + e));
        }
        write_row(to + j * p.out.head, own, d, 1.0f / total);
      }
    }
    free(own);
  }
  free(list);
  return failed;
}

template <class T> int decode_for(const DecodeParams& p) {
  switch (p.cache.page_dtype) {
    case kI8: return decode<i8, T>(p);
    case kF8: return decode<f8, T>(p);
    default: return decode<T, T>(p);
  }
}

int decode_any(const DecodeParams& p) {
  switch (p.cache.dtype) {
    case kF32: return decode_for<float>(p);
    case kBF16: return decode_for<bf16>(p);
    default: return decode_for<f16>(p);
  }
}

}  // namespace

extern "C" __attribute__((visibility("hidden"))) int DMC_ISA(decode)(const dmc::DecodeParams& p) { return decode_any(p); }
