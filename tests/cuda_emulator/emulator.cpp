// Fibers, barriers and collectives of emulator.h.
#include <ucontext.h>

#include <deque>
#include <utility>
#include <vector>

#include "cuda_device.cuh"

dim3 threadIdx, blockIdx, blockDim, gridDim;

#if defined(__x86_64__) && !defined(DMC_UCONTEXT)
#define OWN_SWITCH
// ucontext's switch asks the operating system for the signal mask each time; this one saves what the ABI says a function keeps.
extern "C" void dmc_emulator_switch(void** from, void* to);
asm(R"(
.text
.type dmc_emulator_switch, @function
dmc_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size dmc_emulator_switch, .-dmc_emulator_switch
)");
#endif

namespace emulator {

unsigned char* dynamic_shared;

namespace {

constexpr size_t kStack = 64 * 1024;

struct Barrier {
  int arrived = 0, generation = 0;
};

struct Copy {
  void* to;
  unsigned char data[16];
};

struct Fiber {
  char* stack = nullptr;
#if defined(OWN_SWITCH)
  void* at;
#else
  ucontext_t at;
#endif
  int thread;
  bool done;
  const Barrier* waits;  // for its generation to change from `generation`
  int generation;
  unsigned collectives;  // so far
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

struct Warp {
  Barrier barrier;
  Exchange lanes[2][32];
  const char* kinds[2][32];
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
Barrier block;
int alive;
Fiber* current;
void (*body)(void*);
void* argument;
uint64_t state = 0;
#if defined(OWN_SWITCH)
void* scheduler;
#else
ucontext_t scheduler;
#endif

uint64_t draw() {  // splitmix64
  uint64_t z = (state += 0x9e3779b97f4a7c15ull);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

void to_scheduler() {
#if defined(OWN_SWITCH)
  dmc_emulator_switch(&current->at, scheduler);
#else
  swapcontext(&current->at, &scheduler);
#endif
}

void to_fiber(Fiber& f) {
  current = &f;
  threadIdx.x = f.thread;
#if defined(OWN_SWITCH)
  dmc_emulator_switch(&scheduler, f.at);
#else
  swapcontext(&scheduler, &f.at);
#endif
}

void release(Barrier& b) { b.arrived = 0, b.generation++; }

void wait(Barrier& b, int size) {
  current->waits = &b, current->generation = b.generation;
  if (++b.arrived == size) release(b);
  // Even the last to arrive gives way: who goes on first is drawn.
  to_scheduler();
}

void fiber_main() {
  body(argument);
  if (!current->open.empty()) fail("a thread ended with copies that were not committed");
  current->done = true;
  alive--;
  if (block.arrived && block.arrived == alive) release(block);
  for (;;) to_scheduler();
}

void start(Fiber& f) {
  if (!f.stack) f.stack = (char*)aligned_alloc(64, kStack);
#if defined(OWN_SWITCH)
  void** top = (void**)(f.stack + kStack);
  *--top = nullptr;  // where fiber_main would return to; keeps the stack aligned as after a call
  *--top = (void*)fiber_main;
  for (int i = 0; i < 6; i++) *--top = nullptr;
  f.at = top;
#else
  getcontext(&f.at);
  f.at.uc_stack.ss_sp = f.stack, f.at.uc_stack.ss_size = kStack, f.at.uc_link = nullptr;
  makecontext(&f.at, fiber_main, 0);
#endif
  f.done = false, f.waits = nullptr, f.collectives = 0;
  f.open.clear(), f.groups.clear();
}

void run_block(int threads) {
  if ((int)fibers.size() < threads) fibers.resize(threads);
  warps.assign((threads + 31) / 32, Warp());
  block = Barrier(), alive = threads;
  std::vector<int> order(threads);
  for (int i = 0; i < threads; i++) {
    fibers[i].thread = order[i] = i;
    start(fibers[i]);
  }
  while (alive) {
    bool moved = false;
    // Warps in any order, and lanes of a warp too.
    for (int i = threads - 1; i > 0; i--) std::swap(order[i], order[draw() % (i + 1)]);
    for (int i : order) {
      Fiber& f = fibers[i];
      if (f.done || (f.waits && f.waits->generation == f.generation)) continue;
      moved = true;
      to_fiber(f);
    }
    if (!moved) fail("threads wait for each other: a barrier or a collective that not all of them reach");
  }
}

}  // namespace

void fail(const char* what) {
  fprintf(stderr, "CUDA emulator: %s (block %u of %u, thread %u of %u)\n", what, blockIdx.x, gridDim.x, threadIdx.x, blockDim.x);
  abort();
}

const Exchange* exchange(const char* kind, const Exchange& mine) {
  int thread = current->thread, lane = thread & 31, side = current->collectives++ & 1;
  Warp& w = warps[thread / 32];
  w.lanes[side][lane] = mine, w.kinds[side][lane] = kind;
  wait(w.barrier, 32);
  // A side is written again only after every lane has come to the next collective.
  for (const char* other : w.kinds[side])
    if (strcmp(other, kind)) fail("lanes of one warp are in different collectives");
  return w.lanes[side];
}

void barrier() { wait(block, alive); }

void run(void (*what)(void*), void* with, int64_t blocks, int threads, size_t shared) {
  const char* seed = getenv("DMC_EMULATOR_SEED");
  if (seed) state = strtoull(seed, nullptr, 10);
  body = what, argument = with;
  dynamic_shared = (unsigned char*)aligned_alloc(128, (shared + 127) / 128 * 128 + 128);
  gridDim = {(unsigned)blocks, 1, 1}, blockDim = {(unsigned)threads, 1, 1}, threadIdx = {0, 0, 0};
  for (int64_t b = 0; b < blocks; b++) {
    blockIdx = {(unsigned)b, 0, 0};
    memset(dynamic_shared, 0xff, shared);  // NaN in every type
    run_block(threads);
  }
  free(dynamic_shared);
}

void mma(float (&c)[4], const uint32_t (&ab)[6], float (*value)(uint32_t)) {
  Exchange mine = {};
  memcpy(mine.word, ab, sizeof ab);
  const Exchange* all = exchange("mma", mine);
  int lane = current->thread & 31, row = lane / 4, column = lane % 4 * 2;
  // a: lane 4 r + q holds rows r (registers 0, 2) and r + 8 (1, 3), columns 2 q (+ 8 in registers 2, 3);
  // b: lane 4 n + q holds column n, rows 2 q (register 4) and 2 q + 8 (5).
  for (int e = 0; e < 4; e++) {
    double sum = 0;  // products of 16-bit elements are exact
    for (int k = 0; k < 16; k++) {
      int q = k % 8 / 2, high = k % 2 * 16;
      uint32_t a = all[row * 4 + q].word[e / 2 + k / 8 * 2] >> high, b = all[(column + e % 2) * 4 + q].word[4 + k / 8] >> high;
      sum += (double)value(a & 0xffff) * value(b & 0xffff);
    }
    c[e] = (float)(c[e] + sum);
  }
}

void matrices(uint32_t (&x)[4], const void* row, bool transposed) {
  if ((uintptr_t)row % 16) fail("ldmatrix of a row that is not aligned to 16 bytes");
  Exchange mine = {};
  mine.address = row;
  const Exchange* all = exchange(transposed ? "ldmatrix.trans" : "ldmatrix", mine);
  int lane = current->thread & 31, r = lane / 4, q = lane % 4 * 2;
  for (int m = 0; m < 4; m++) {
    auto element = [&](int i, int j) { return (uint32_t)((const uint16_t*)all[8 * m + i].address)[j]; };
    x[m] = transposed ? element(q, r) | element(q + 1, r) << 16 : element(r, q) | element(r, q + 1) << 16;
  }
}

uint32_t transpose8x8(uint32_t x) {
  Exchange mine = {};
  mine.word[0] = x;
  const Exchange* all = exchange("movmatrix", mine);
  int lane = current->thread & 31, r = lane / 4, q = lane % 4 * 2;
  auto element = [&](int i, int j) { return all[4 * i + j / 2].word[0] >> (j % 2 * 16) & 0xffff; };
  return element(q, r) | element(q + 1, r) << 16;
}

}  // namespace emulator

namespace dmc {

void copy16(void* shared, const void* global, bool valid) {
  if (((uintptr_t)shared | (valid ? (uintptr_t)global : 0)) % 16) emulator::fail("cp.async of an address that is not aligned to 16 bytes");
  emulator::Copy c = {shared, {}};
  if (valid) memcpy(c.data, global, 16);
  emulator::current->open.push_back(c);
}

void copies_commit() {
  emulator::current->groups.push_back(std::move(emulator::current->open));
  emulator::current->open.clear();
}

void copies_wait_for(int left) {
  auto& groups = emulator::current->groups;
  for (; (int)groups.size() > left; groups.pop_front())
    for (const emulator::Copy& c : groups.front()) memcpy(c.to, c.data, 16);
}

}  // namespace dmc
