// Table of one build of the CPU kernels, for their launcher.
//
// The kernels are compiled once per instruction set, from the same sources; the launcher picks a table at run time. They use no
// library templates, so that no function compiled for a newer CPU can replace the launcher's.
#pragma once
#include "params.h"

namespace dmc {

// Pages have 16, 32 or 64 slots; a division would take longer than what is done with the result.
static inline int page_shift(const Cache& c) { return __builtin_ctz(c.page_size); }

static inline int64_t pages_of(const Cache& c, int64_t slots) { return (slots + c.page_size - 1) >> page_shift(c); }

static inline int element_size(Dtype d) { return d == kF32 ? 4 : d == kBF16 || d == kF16 ? 2 : 1; }

// Places of a head's marks.
static inline int64_t marked_places(const Cache& c) { return c.evict_window ? c.evict_window + 2 : 0; }

// Recent pages [first, last) of a head that has seen so many tokens; page i in column i mod C.
struct RecentPages { int64_t first, last; };

static inline RecentPages recent_pages(const Cache& c, int64_t tokens) {
  return {(tokens > c.evict_window ? tokens - c.evict_window - 1 : 0) >> page_shift(c), pages_of(c, tokens)};
}

// Row of the table of recent pages of head h of sequence i, whose index in the cache is `index`, before a step. Without a copy of it
// no sequence has more than one token: then a page that is taken never comes to the column of one that is returned.
static inline const int32_t* recent_table_before(const EvictParams& p, int64_t i, int64_t h, int64_t index) {
  const Cache& c = p.cache;
  return p.recent_before ? p.recent_before + (i * c.heads + h) * c.recent : c.recent_table + index * c.recent;
}

struct Kernels {
  const char* name;
  int (*decode)(const DecodeParams&);    // 0, or 1: out of memory
  int (*prefill)(const PrefillParams&);
  void (*decide)(const AppendParams&);   // merge, omega, slot_index, before
  void (*write)(const AppendParams&);    // everything else, after the pages were taken
  void (*evict_decide)(const EvictParams&);  // slot_index, before
  void (*evict_write)(const EvictParams&);   // everything else
  void (*norm)(const NormParams&);
  void (*silu)(const SiluParams&);
  void (*linear)(const LinearParams&);     // over numbers
  int (*quantized)(const LinearParams&);   // over codes; 0, or 1: out of memory
};

}  // namespace dmc
