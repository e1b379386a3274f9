// The eight tile registers of AMX: the instructions, or with D2V_TILES_EMULATED plain C++ that rounds as they do.
//
// Every register is used whole: 16 rows of 64 bytes. A left operand has 16 rows of 16 words, two bf16 numbers k, k + 1
// each; a right operand has a row of 16 words, one a column, for two k; a sum has 16 x 16 fp32 numbers.
#pragma once
#include "simd.h"

namespace d2v {
namespace {

constexpr int kTileSide = 16;

#if defined(D2V_TILES_EMULATED)

// As Intel's manual has tdpbf16ps: even and odd k are summed apart from 0 on, fused multiply-adds in ascending k, then
// the two sums are added and their sum to the register. Numbers below 2^-126 count as 0, also where they come out.
class Tiles {
 public:
  template <int N>
  void zero() {
    memset(registers_[N], 0, sizeof(registers_[N]));
  }
  template <int N>
  void load(const void* data, int64_t row_bytes) {
    for (int i = 0; i < kTileSide; ++i) memcpy(registers_[N][i], static_cast<const char*>(data) + i * row_bytes, 64);
  }
  template <int N>
  void store(void* data, int64_t row_bytes) {
    for (int i = 0; i < kTileSide; ++i) memcpy(static_cast<char*>(data) + i * row_bytes, registers_[N][i], 64);
  }
  template <int SUM, int LEFT, int RIGHT>
  void multiply() {
    for (int m = 0; m < kTileSide; ++m) {
      for (int n = 0; n < kTileSide; ++n) {
        float even = 0, odd = 0;
        for (int k = 0; k < kTileSide; ++k) {
          const uint32_t a = registers_[LEFT][m][k], b = registers_[RIGHT][k][n];
          even = flush(__builtin_fmaf(flush(bit_cast<float>(a << 16)), flush(bit_cast<float>(b << 16)), even));
          odd = flush(__builtin_fmaf(flush(bit_cast<float>(a & kUpper)), flush(bit_cast<float>(b & kUpper)), odd));
        }
        const float sum = flush(bit_cast<float>(registers_[SUM][m][n]));
        registers_[SUM][m][n] = bit_cast<uint32_t>(flush(sum + flush(even + odd)));
      }
    }
  }
  void begin() {}
  void end() {}

 private:
  static constexpr uint32_t kUpper = 0xffff0000u;
  static float flush(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.0f, x) : x; }
  uint32_t registers_[8][kTileSide][kTileSide];
};

#elif defined(D2V_TILES)

// Assembler text, as compilers' intrinsics take no template arguments.
class Tiles {
 public:
  template <int N>
  D2V_INLINE void zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(N));
  }
  template <int N>
  D2V_INLINE void load(const void* data, int64_t row_bytes) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(data), "r"(row_bytes), "i"(N) : "memory");
  }
  template <int N>
  D2V_INLINE void store(void* data, int64_t row_bytes) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(data), "r"(row_bytes), "i"(N) : "memory");
  }
  template <int SUM, int LEFT, int RIGHT>
  D2V_INLINE void multiply() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(LEFT), "i"(RIGHT));
  }
  void begin() {
    alignas(64) uint8_t shape[64] = {};
    shape[0] = 1;  // palette
    for (int i = 0; i < 8; ++i) {
      shape[16 + 2 * i] = 64;     // bytes of a row, 16 bits each
      shape[48 + i] = kTileSide;  // rows
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(shape));
  }
  void end() { __asm__ volatile("tilerelease"); }
};

#endif

}  // namespace
}  // namespace d2v
