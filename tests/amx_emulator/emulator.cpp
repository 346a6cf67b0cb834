// Intel AMX on a CPU that does not have it: its instructions raise SIGILL there, and a handler does what they would do.
//
// So what is tested is the machine code that CPUs with AMX run: encodings, addresses and strides, and the configuration of the tiles.
// Instructions are those of AMX-TILE and AMX-BF16 in the Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, and so
// are the conditions under which one is undefined (#UD) or refused (#GP): a message and abort() here. Tiles belong to a thread.
// What emulation cannot show: timing, and whether the operating system saves the tiles.
#include <immintrin.h>
#include <math.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <atomic>

namespace {

constexpr int kTiles = 8, kRows = 16, kBytes = 64, kColumns = kBytes / 4;  // of palette 1

struct Config {  // as in memory
  uint8_t palette, start_row, reserved[14];
  uint16_t colsb[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64, "LDTILECFG reads 64 bytes");

thread_local Config config;
thread_local uint8_t tiles[kTiles][kRows][kBytes];

std::atomic<int64_t> products{0}, configured{0};
struct sigaction before;

[[noreturn]] void fault(const char* what) {
  fprintf(stderr, "AMX emulator: %s\n", what);
  abort();
}

void load_config(const void* from) {
  Config c;
  memcpy(&c, from, sizeof c);
  configured += (c.palette != 0) - (config.palette != 0);
  if (c.palette > 1) fault("#GP: LDTILECFG of an unknown palette");
  memset(tiles, 0, sizeof tiles);
  if (!c.palette) {
    config = Config{};
    return;
  }
  for (uint8_t x : c.reserved)
    if (x) fault("#GP: LDTILECFG with a reserved byte that is not zero");
  for (int i = 0; i < 16; i++) {
    if (i >= kTiles ? c.rows[i] || c.colsb[i] : c.rows[i] > kRows || c.colsb[i] > kBytes) fault("#GP: LDTILECFG of a tile that is too large");
    if (!c.rows[i] != !c.colsb[i]) fault("#GP: LDTILECFG of a tile of no rows or of no columns");
  }
  config = c;
}

void check(int tile) {
  if (!config.palette) fault("#UD: tiles are not configured");
  if (tile >= kTiles || !config.rows[tile]) fault("#UD: a tile that is not configured");
}

void load_tile(int tile, const char* base, int64_t stride) {
  check(tile);
  memset(tiles[tile], 0, sizeof tiles[tile]);
  for (int i = 0; i < config.rows[tile]; i++) memcpy(tiles[tile][i], base + i * stride, config.colsb[tile]);
}

void store_tile(int tile, char* base, int64_t stride) {
  check(tile);
  for (int i = 0; i < config.rows[tile]; i++) memcpy(base + i * stride, tiles[tile][i], config.colsb[tile]);
}

float widened(const uint8_t* row, int i) {
  uint16_t bits;
  memcpy(&bits, row + 2 * i, sizeof bits);
  uint32_t wide = (uint32_t)bits << 16;
  float x;
  memcpy(&x, &wide, sizeof x);
  return x;
}

// TDPBF16PS: sums of the even and of the odd numbers of pairs by FMA in order, added, and added to the destination; all to nearest even,
// and denormals are zero before and after every step. Behind its columns a tile is zero, so all 16 are computed.
void multiply(int dest, int a, int b) {
  check(dest), check(a), check(b);
  if (dest == a || dest == b || a == b) fault("#UD: TDPBF16PS of equal tiles");
  if (config.colsb[dest] % 4 || config.colsb[a] % 4 || config.colsb[b] != config.colsb[dest] || config.rows[a] != config.rows[dest] ||
      config.rows[b] != config.colsb[a] / 4)
    fault("#UD: TDPBF16PS of tiles that do not fit");
  products++;
  int depth = config.colsb[a] / 4;
  float wide[2][kRows][kColumns];
  for (int odd = 0; odd < 2; odd++)
    for (int k = 0; k < depth; k++)
      for (int n = 0; n < kColumns; n++) wide[odd][k][n] = widened(tiles[b][k], 2 * n + odd);
  unsigned csr = _mm_getcsr();
  _mm_setcsr(0x1f80 | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON);
  for (int m = 0; m < config.rows[dest]; m++) {
    float sums[2][kColumns] = {}, out[kColumns];
    for (int odd = 0; odd < 2; odd++)
      for (int k = 0; k < depth; k++) {
        float x = widened(tiles[a][m], 2 * k + odd);
        for (int n = 0; n < kColumns; n++) sums[odd][n] = __builtin_fmaf(x, wide[odd][k][n], sums[odd][n]);
      }
    memcpy(out, tiles[dest][m], sizeof out);
    for (int n = 0; n < kColumns; n++) out[n] += sums[0][n] + sums[1][n];
    memcpy(tiles[dest][m], out, sizeof out);
  }
  _mm_setcsr(csr);
}

int64_t value_of(const mcontext_t& m, int number) {
  static const int names[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return m.gregs[names[number]];
}

// One instruction at the program counter; false where it is none of these.
bool execute(mcontext_t& m) {
  const uint8_t* code = (const uint8_t*)m.gregs[REG_RIP];
  // VEX in three bytes, map 0F38, W = 0, 128 bits.
  if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x84)) return false;
  int prefix = code[2] & 3, vvvv = ~(code[2] >> 3) & 15, opcode = code[3], modrm = code[4];  // prefix: none, 66, F3, F2
  int mod = modrm >> 6, reg = (modrm >> 3) & 7, rm = modrm & 7;
  bool r = !(code[1] & 0x80), x = !(code[1] & 0x40), b = !(code[1] & 0x20);
  if ((opcode != 0x49 && opcode != 0x4b && opcode != 0x5c) || r || (opcode != 0x5c && vvvv)) return false;
  const uint8_t* next = code + 5;
  int64_t base = 0, index = 0;
  bool indexed = mod != 3 && rm == 4;
  if (mod != 3) {
    int from = rm;
    if (indexed) {
      int sib = *next++;
      from = sib & 7;
      int by = ((sib >> 3) & 7) | (x ? 8 : 0);
      if (by != 4) index = value_of(m, by) << (sib >> 6);
    }
    bool absolute = mod == 0 && from == 5;  // no base, or the program counter
    if (!absolute) base = value_of(m, from | (b ? 8 : 0));
    int32_t wide = 0;
    if (mod == 1) base += (int8_t)*next++;
    else if (mod == 2 || absolute) memcpy(&wide, next, 4), next += 4;
    base += wide;
    if (absolute && !indexed) base += (int64_t)next;
  }
  switch (opcode << 4 | prefix) {
    case 0x490:
      if (mod == 3) {  // TILERELEASE
        if (reg || rm) return false;
        Config none = {};
        load_config(&none);
      } else {
        if (reg) return false;
        load_config((const void*)(base + index));
      }
      break;
    case 0x491:  // STTILECFG
      if (mod == 3 || reg) return false;
      memcpy((void*)(base + index), &config, sizeof config);
      break;
    case 0x493:  // TILEZERO
      if (mod != 3 || rm) return false;
      check(reg);
      memset(tiles[reg], 0, sizeof tiles[reg]);
      break;
    case 0x4b1: case 0x4b3:  // TILELOADDT1, TILELOADD
      if (!indexed) return false;
      load_tile(reg, (const char*)base, index);
      break;
    case 0x4b2:  // TILESTORED
      if (!indexed) return false;
      store_tile(reg, (char*)base, index);
      break;
    case 0x5c2:  // TDPBF16PS
      if (mod != 3) return false;
      multiply(reg, rm | (b ? 8 : 0), vvvv);
      break;
    default: return false;
  }
  m.gregs[REG_RIP] = (int64_t)next;
  return true;
}

// Signals take longer than instructions: all that follow each other are executed at once.
void handle(int, siginfo_t*, void* context) {
  mcontext_t& m = ((ucontext_t*)context)->uc_mcontext;
  if (!execute(m)) {  // some other instruction: it is raised again, for whoever wants it
    sigaction(SIGILL, &before, nullptr);
    return;
  }
  while (execute(m)) {}
}

__attribute__((constructor)) void install() {
  struct sigaction action = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, &before);
}

}  // namespace

// Products of tiles so far, and threads whose tiles are configured.
extern "C" int64_t amx_products() { return products; }
extern "C" int64_t amx_configured() { return configured; }
