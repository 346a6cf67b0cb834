// Pages of the CPU cache: taken, shared, copied and returned. For the launcher, one head after the other, so that every backend gives
// the same pages to the same heads.
#pragma once
#include <string.h>

#include <algorithm>
#include <vector>

#include <tvm/ffi/error.h>

#include "cpu.h"

namespace {

int64_t available(const Cache& c) { return c.num_pages - (c.counters[kTaken] - c.counters[kReturned]); }

int32_t take_page(const Cache& c) {
  int32_t page = c.free_pages[c.counters[kTaken]++ % c.num_pages];
  c.refcounts[page] = 1;
  return page;
}

void release_page(const Cache& c, int32_t page) {
  if (--c.refcounts[page] == 0) c.free_pages[c.counters[kReturned]++ % c.num_pages] = page;
}

// Refuse a step that needs more pages than are free, or a head with more slots than its row of the page table has.
void check_demand(const Cache& c, int64_t pages, int64_t longest) {
  if (longest > c.max_pages * c.page_size)
    TVM_FFI_THROW(RuntimeError) << "a head would hold " << longest << " slots, and its row of the page table " << c.max_pages * c.page_size;
  if (pages > available(c))
    TVM_FFI_THROW(RuntimeError) << "the step needs " << pages << " pages and " << available(c) << " are free; nothing was written";
}

// Slots of a head after a step: what `decide` found for the sequence's last token.
int64_t slots_after(const AppendParams& p, int64_t i, int64_t h) {
  return p.slot_index[(p.cu_seqlens[i + 1] - 1) * p.cache.heads + h] + 1;
}

int64_t slots_after(const EvictParams& p, int64_t i, int64_t h) {
  return p.slot_index[(p.cu_seqlens[i + 1] - 1) * p.cache.heads + h];
}

// A head that a step grows.
struct Growth {
  int64_t i, index, before, after;  // sequence, head of the cache, slots before and after the step; of a model that evicts, kept ones
};

// Calls visit(Growth) for every head of a step in the order (sequence, head). P: AppendParams or EvictParams, after `decide`.
template <class P, class Visit> void for_each_head(const P& p, Visit visit) {
  const Cache& c = p.cache;
  for (int64_t i = 0; i < p.n; i++)
    for (int64_t h = 0; h < c.heads && p.rows[i] >= 0 && p.cu_seqlens[i] < p.cu_seqlens[i + 1]; h++)
      visit(Growth{i, (p.rows[i] * c.layers + p.layer) * c.heads + h, p.before[i * c.heads + h], slots_after(p, i, h)});
}

void take_slots(const Cache& c, const Growth& g) {
  int32_t* table = c.page_table + g.index * c.max_pages;
  for (int64_t page = pages_of(c, g.before); page < pages_of(c, g.after); page++) table[page] = take_page(c);
  c.lengths[g.index] = (int32_t)g.after;
}

// Demand per head -> exclusive prefix sum over (sequence, head) -> slice of the ring of free pages.
void take_pages(const AppendParams& p) {
  const Cache& c = p.cache;
  int64_t total = 0, longest = 0;
  for_each_head(p, [&](const Growth& g) {
    longest = std::max(longest, g.after);
    total += pages_of(c, g.after) - pages_of(c, g.before);
  });
  check_demand(c, total, longest);
  for_each_head(p, [&](const Growth& g) { take_slots(c, g); });
}

// Takes all pages of a step, of each head those for kept slots first, then returns those that its window leaves behind. Nobody takes
// these before the next step, so they are still read by `write`, and by prefill attention through recent_before.
void take_pages(const EvictParams& p) {
  const Cache& c = p.cache;
  struct Step { RecentPages before, after; };
  auto step = [&](const Growth& g) {
    int64_t tokens = c.segment[g.index];
    return Step{recent_pages(c, tokens), recent_pages(c, tokens + p.cu_seqlens[g.i + 1] - p.cu_seqlens[g.i])};
  };
  int64_t total = 0, longest = 0;
  for_each_head(p, [&](const Growth& g) {
    Step s = step(g);
    longest = std::max(longest, g.after);
    total += pages_of(c, g.after) - pages_of(c, g.before) + s.after.last - std::max(s.before.last, s.after.first);
  });
  check_demand(c, total, longest);
  for (int64_t i = 0; p.recent_before && i < p.n; i++) {
    int64_t row = std::max(p.rows[i], 0), width = c.heads * c.recent;
    memcpy(p.recent_before + i * width, c.recent_table + (row * c.layers + p.layer) * width, width * sizeof(int32_t));
  }
  for_each_head(p, [&](const Growth& g) {
    Step s = step(g);
    take_slots(c, g);
    int32_t* columns = c.recent_table + g.index * c.recent;
    int64_t first = std::max(s.before.last, s.after.first);
    for (int64_t page = first; page < s.after.last; page++) columns[page % c.recent] = take_page(c);
  });
  for_each_head(p, [&](const Growth& g) {
    Step s = step(g);
    const int32_t* columns = recent_table_before(p, g.i, g.index % c.heads, g.index);
    int64_t last = std::min(s.before.last, s.after.first);
    for (int64_t page = s.before.first; page < last; page++) release_page(c, columns[page % c.recent]);
  });
}

// The pages of a head: calls visit(table, column, final) for each, kept before recent ones; `final`: no slot of it is written again.
template <class Visit> void for_each_page(const Cache& c, int64_t index, Visit visit) {
  // A model that merges may write its last slot again, any model the slot after it.
  int64_t slots = c.lengths[index], last = c.ring && slots ? slots - 1 : slots;
  for (int64_t page = 0; page < pages_of(c, slots); page++) visit(c.page_table, index * c.max_pages + page, page < last / c.page_size);
  if (!c.recent) return;
  int64_t tokens = c.segment[index];
  RecentPages recent = recent_pages(c, tokens);
  for (int64_t page = recent.first; page < recent.last; page++)
    visit(c.recent_table, index * c.recent + page % c.recent, page < tokens / c.page_size);
}

void check_copies(const ForkParams& p) {
  const Cache& c = p.cache;
  const int32_t *from = p.source, *to = p.target;
  int64_t all = c.layers * c.heads, total = 0;
  std::vector<bool> taken(c.rows);
  for (int64_t i = 0; i < p.n; i++)
    if (from[i] >= 0 && to[i] >= 0) taken[from[i]] = true;
  for (int64_t i = 0; i < p.n; i++) {
    if (from[i] < 0 || to[i] < 0) continue;
    bool empty = !taken[to[i]];
    taken[to[i]] = true;
    for (int64_t e = 0; e < all; e++) {
      empty = empty && !c.lengths[to[i] * all + e] && !c.segment[to[i] * all + e];
      for_each_page(c, from[i] * all + e, [&](int32_t*, int64_t, bool final) { total += !final; });
    }
    if (!empty) TVM_FFI_THROW(ValueError) << "target[" << i << "] is row " << to[i] << "; targets must be distinct empty rows that are no sources";
  }
  if (total > available(c))
    TVM_FFI_THROW(RuntimeError) << "the copies need " << total << " pages and " << available(c) << " are free; nothing was written";
}

// Copies the head `a` to the head `b`.
void copy_head(const Cache& c, int64_t a, int64_t b) {
  auto copy = [](void* base, int64_t from, int64_t to, int64_t bytes) {
    memcpy((char*)base + to * bytes, (char*)base + from * bytes, bytes);
  };
  int64_t page_bytes = c.page_size * c.head_dim * element_size(c.page_dtype), scale_bytes = c.quantized ? c.page_size * 2 : 0;
  int64_t ring_bytes = c.ring * c.head_dim * element_size(c.ring_dtype);
  for_each_page(c, a, [&](int32_t* table, int64_t at, bool final) {
    int64_t width = table == c.page_table ? c.max_pages : c.recent;
    int32_t page = table[at], *to = table + at + (b - a) * width;
    if (final) {
      c.refcounts[*to = page]++;
      return;
    }
    *to = take_page(c);
    copy(c.k_pages, page, *to, page_bytes);
    copy(c.v_pages, page, *to, page_bytes);
    copy(c.k_scales, page, *to, scale_bytes);
    copy(c.v_scales, page, *to, scale_bytes);
  });
  c.lengths[b] = c.lengths[a], c.segment[b] = c.segment[a];
  copy(c.ring_k, a, b, ring_bytes);
  copy(c.ring_v, a, b, ring_bytes);
  copy(c.ring_w, a, b, c.ring * sizeof(float));
  copy(c.marks, a, b, marked_places(c));
}

void copy_rows(const ForkParams& p) {
  int64_t all = p.cache.layers * p.cache.heads;
  for (int64_t i = 0; i < p.n; i++) {
    int64_t from = p.source[i], to = p.target[i];
    for (int64_t e = 0; from >= 0 && to >= 0 && e < all; e++) copy_head(p.cache, from * all + e, to * all + e);
  }
}

void empty_rows(const FreeParams& p) {
  const Cache& c = p.cache;
  int64_t all = c.layers * c.heads;
  for (int64_t i = 0; i < p.n; i++)
    for (int64_t e = 0; p.rows[i] >= 0 && e < all; e++) {
      int64_t index = p.rows[i] * all + e;
      for_each_page(c, index, [&](int32_t* table, int64_t at, bool) { release_page(c, table[at]); });
      c.lengths[index] = c.segment[index] = 0;
    }
}

}  // namespace
