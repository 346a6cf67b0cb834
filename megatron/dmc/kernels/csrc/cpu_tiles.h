// Products of bf16 by the tiles of Intel's CPUs (AMX): a tile is 16 rows of 64 bytes, and one instruction adds to 16 x 16 sums in fp32
// the products of 16 rows of 32 numbers and 16 rows of 16 pairs. See "TDPBF16PS" in Intel's Software Developer's Manual, volume 2.
//
// Sums are to nearest; denormals are zero. Whoever multiplies configures the tiles of its thread first and releases them in the end:
// until then every switch of threads saves 8 KiB. The operating system has to be asked once per process, see cpu_launch.cpp.
#pragma once
#include "cpu_attention.h"

namespace {

template <class T> constexpr bool kHasTiles = false;
constexpr int kSide = 32;  // rows and columns of what multiply_tiles() computes: two by two tiles

#if defined(__AMX_BF16__)
template <> constexpr bool kHasTiles<bf16> = true;

// What LDTILECFG reads: all tiles are as large as they can be. It lies in memory for good, because g++ takes the instruction to read
// eight bytes, and leaves out stores to the others.
struct TileConfig { uint8_t palette, start_row, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; };
alignas(64) const TileConfig kTileConfig = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

INLINE void configure_tiles() { _tile_loadconfig(&kTileConfig); }

INLINE void release_tiles() { _tile_release(); }

// c [kSide][kSide] fp32, with rows `c_row` apart, becomes (or, of Add, grows by) a b. a: bf16 [kSide][32 steps], of which `a0` and `a1`
// are the first and the last 16 rows, `a_bytes` apart. b: pairs [16 steps][kSide], rows `b_row` apart: pairs of numbers of a meet them.
template <bool Add>
INLINE void multiply_tiles(float* c, int64_t c_row, const void* a0, const void* a1, int64_t a_bytes, const float* b, int64_t b_row, int steps) {
  int64_t c_bytes = c_row * sizeof(float), b_bytes = b_row * sizeof(float);
  float* low = c + 16 * c_row;
  asm volatile("" ::: "memory");  // g++ does not know that tiles are loaded from memory
  if (Add) {
    _tile_loadd(0, c, c_bytes);
    _tile_loadd(1, c + 16, c_bytes);
    _tile_loadd(2, low, c_bytes);
    _tile_loadd(3, low + 16, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int s = 0; s < steps; s++, b += 16 * b_row) {
    _tile_loadd(4, (const char*)a0 + 64 * s, a_bytes);
    _tile_loadd(6, b, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, (const char*)a1 + 64 * s, a_bytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(7, b + 16, b_bytes);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + 16, c_bytes);
  _tile_stored(2, low, c_bytes);
  _tile_stored(3, low + 16, c_bytes);
}

// out [d][kTile] = rows [n][d] turned, zeros in the columns up to the next multiple of kSide. d: a multiple of 8.
INLINE void turn_rows(bf16* out, const bf16* const* rows, int n, int d) {
  static const bf16 zeros[256] = {};
  for (int s = 0; s < n; s += kSide) {
    const bf16* from[kSide];
    for (int i = 0; i < kSide; i++) from[i] = s + i < n ? rows[s + i] : zeros;
    for (int c = 0; c < d; c += 8) {
      // Block of 128 bits b of x[j]: eight channels of slot 8 b + j. Each block is turned by itself.
      __m512i x[8], y[8];
#pragma GCC unroll 8
      for (int j = 0; j < 8; j++) {
        auto part = [&](int b) { return _mm_loadu_si128((const __m128i*)(from[8 * b + j] + c)); };
        x[j] = _mm512_inserti32x4(_mm512_castsi128_si512(part(0)), part(1), 1);
        x[j] = _mm512_inserti32x4(_mm512_inserti32x4(x[j], part(2), 2), part(3), 3);
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {  // channels 2 e and 2 e + 1 of slots 2 j and 2 j + 1: pairs of 32 bits
        y[j] = _mm512_unpacklo_epi16(x[2 * j], x[2 * j + 1]);
        y[j + 4] = _mm512_unpackhi_epi16(x[2 * j], x[2 * j + 1]);
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        x[2 * j] = _mm512_unpacklo_epi32(y[2 * j], y[2 * j + 1]);
        x[2 * j + 1] = _mm512_unpackhi_epi32(y[2 * j], y[2 * j + 1]);
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {  // x: channels 4 h + 2 e, of slots 4 q ... in x[4 h + 2 q + e]
        int at = j / 2 * 4 + j % 2;
        bf16* to = out + (c + 2 * j) * kTile + s;
        _mm512_storeu_si512(to, _mm512_unpacklo_epi64(x[at], x[at + 2]));
        _mm512_storeu_si512(to + kTile, _mm512_unpackhi_epi64(x[at], x[at + 2]));
      }
    }
  }
}

#else
INLINE void configure_tiles() {}
INLINE void release_tiles() {}
#endif

}  // namespace
