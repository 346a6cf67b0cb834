// Mark, rotate and write: the tokens of a step into the cache of one layer of a model that evicts.
//
// `decide` only fills scratch, as for a model that merges; the launcher takes pages after it, and returns them after `write`. Tokens
// are written once and copied once, where they leave the window unmarked. A chunk's own tokens that leave it within the chunk
// never go to the recent pages.
#include "cpu_tokens.h"

namespace {

struct Item {  // one (sequence, head)
  int64_t i, h, begin, count, row, index;
  int64_t before;  // tokens that the head has seen
};

INLINE Item item_of(const EvictParams& p, int64_t i, int64_t h) {
  Item x = {i, h, p.cu_seqlens[i], count_of(p, i), p.rows[i], 0, 0};
  if (x.count) x.index = head_index(p.cache, x.row, p.layer, h), x.before = p.cache.segment[x.index];
  return x;
}

INLINE int64_t mark_place(const Cache& c, int64_t token) { return (uint32_t)token % (uint32_t)marked_places(c); }

INLINE bool marks(const EvictParams& p, int64_t t, int64_t h) { return p.logits[t * p.cache.heads + h] > 0; }

// Kept slots that each token sees: those of tokens that have left its window.
void decide(const EvictParams& p) {
  const Cache& c = p.cache;
  int64_t heads = c.heads, window = c.evict_window;
#pragma omp parallel for schedule(static) num_threads(p.tokens * heads < 4096 ? 1 : p.threads)
  for (int64_t i = 0; i < p.n; i++)
    for (int64_t h = 0; h < heads; h++) {
      Item x = item_of(p, i, h);
      int32_t slots = p.before[i * heads + h] = x.count ? c.lengths[x.index] : 0;
      // Tokens from `decided` on are decided about in this step, those before in the marks.
      int64_t leaving = x.before - window - 1, decided = x.before - !p.about_self;
      int64_t place = leaving < 0 ? 0 : mark_place(c, leaving);
      for (int64_t t = x.begin; t < x.begin + x.count; t++, leaving++) {
        if (leaving >= 0 && leaving >= decided) {
          slots += !marks(p, x.begin + leaving - decided, h);
        } else if (leaving >= 0) {
          slots += !c.marks[x.index * marked_places(c) + place];
          place = place + 1 < marked_places(c) ? place + 1 : 0;
        }
        p.slot_index[t * heads + h] = slots;
      }
    }
}

// Kept slot of the token that leaves the window at token t; below 0: it is evicted.
INLINE int64_t kept_slot(const EvictParams& p, const Item& x, int64_t t) {
  int64_t at = t * p.cache.heads + x.h;
  int32_t earlier = t > x.begin ? p.slot_index[at - p.cache.heads] : p.before[x.i * p.cache.heads + x.h];
  return p.slot_index[at] > earlier ? earlier : -1;
}

// Token t of the step: to k_part and v_part, and to the kept or the recent pages, where it stays at all.
template <class T> INLINE void write_token(const EvictParams& p, const Item& x, int64_t t, const float* table) {
  const Cache& c = p.cache;
  int d = c.head_dim;
  int64_t leaves = t + c.evict_window + 1, bytes = d * (int64_t)sizeof(T);
  bool stays = leaves >= x.begin + x.count;
  Slots s = stays ? recent_slots(c, c.recent_table + x.index * c.recent) : slots_of(c, x.index);
  int64_t slot = stays ? recent_place(c, x.before + t - x.begin) : kept_slot(p, x, leaves);
  T *k_part = p.k_part.data ? head_of<T>(p.k_part, t, x.h) : nullptr, *v_part = k_part ? head_of<T>(p.v_part, t, x.h) : nullptr;
  if (c.quantized) {
    float key[256 + VW], value[256 + VW];
    if (slot < 0 && !k_part) return;
    read_row(key, head_of<T>(p.k, t, x.h), d, 1.0f);
    read_row(value, head_of<T>(p.v, t, x.h), d, 1.0f);
    rotate(key, table, d, p.neuron == kNeuronAll);
    write_codes(c, slot < 0 ? nullptr : &s, slot, key, value);
    if (k_part) write_row(k_part, key, d, 1.0f), write_row(v_part, value, d, 1.0f);
    return;
  }
  T *k = slot < 0 ? nullptr : (T*)s.key<T>(slot), *v = slot < 0 ? nullptr : (T*)s.value<T>(slot);
  const T* value = head_of<T>(p.v, t, x.h);
  if (v_part) memcpy(v_part, value, bytes);
  if (v) memcpy(v, value, bytes);
  T* to = k ? k : k_part;
  if (to) rotate_head<T>(to, k ? k_part : nullptr, head_of<T>(p.k, t, x.h), table, d, in_halves(d), p.neuron == kNeuronAll);
}

// The token of an earlier step that leaves the window at token t, from the recent to the kept pages.
INLINE void keep_token(const EvictParams& p, const Item& x, int64_t t) {
  const Cache& c = p.cache;
  int64_t token = x.before + t - x.begin - c.evict_window - 1;
  if (token < 0 || token >= x.before) return;
  int64_t slot = kept_slot(p, x, t), from = recent_place(c, token), bytes = c.head_dim * element_size(c.page_dtype);
  if (slot < 0) return;
  Slots recent = recent_slots(c, recent_table_before(p, x.i, x.h, x.index)), kept = slots_of(c, x.index);
  memcpy((char*)kept.key<char>(slot), recent.key<char>(from), bytes);
  memcpy((char*)kept.value<char>(slot), recent.value<char>(from), bytes);
  if (!c.quantized) return;
  ((bf16*)kept.k_scales)[kept.place(slot)] = recent.k_scales[recent.place(from)];
  ((bf16*)kept.v_scales)[kept.place(slot)] = recent.v_scales[recent.place(from)];
}

// Marks and number of tokens after the step.
INLINE void remember(const EvictParams& p, const Item& x) {
  const Cache& c = p.cache;
  uint8_t* marked = c.marks + x.index * marked_places(c);
  int64_t decided = x.before - !p.about_self, end = decided + x.count, from = end - marked_places(c);
  from = from > decided ? from : decided;
  for (int64_t j = from > 0 ? from : 0; j < end; j++) marked[mark_place(c, j)] = marks(p, x.begin + j - decided, x.h);
  if (!p.about_self) marked[mark_place(c, end)] = 0;  // nobody has decided about the last token
  c.segment[x.index] = (int32_t)(x.before + x.count);
}

template <class T> void write(const EvictParams& p) {
  const Cache& c = p.cache;
  int d = c.head_dim;
  bool alone = p.tokens * c.heads * (p.groups + 2) * d < 32768;
#pragma omp parallel num_threads(alone ? 1 : p.threads)
  {
    float table[256];
    int64_t i = 0;  // a thread's tokens are consecutive
#pragma omp for schedule(static)
    for (int64_t t = 0; t < p.tokens; t++) {
      while (t >= p.cu_seqlens[i + 1]) i++;
      if (p.rows[i] < 0) {
        clear<T>(p, t);
        continue;
      }
      fill_table(table, p.positions[t], p.inv_freq, d);
      rotate_queries<T>(p, t, table, p.neuron);
      for (int64_t h = 0; h < c.heads; h++) {
        Item x = item_of(p, i, h);
        write_token<T>(p, x, t, table);
        keep_token(p, x, t);
      }
    }
    // Behind the loop's barrier: the numbers of tokens were read above.
#pragma omp for schedule(static)
    for (int64_t at = 0; at < p.n * c.heads; at++) {
      Item x = item_of(p, at / c.heads, at % c.heads);
      if (x.count) remember(p, x);
    }
  }
}

void write_any(const EvictParams& p) {
  switch (p.cache.dtype) {
    case kF32: return write<float>(p);
    case kBF16: return write<bf16>(p);
    default: return write<f16>(p);
  }
}

}  // namespace

extern "C" __attribute__((visibility("hidden"))) void DMC_ISA(evict_decide)(const dmc::EvictParams& p) { decide(p); }
extern "C" __attribute__((visibility("hidden"))) void DMC_ISA(evict_write)(const dmc::EvictParams& p) { write_any(p); }
