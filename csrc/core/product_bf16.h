// Products of bf16 matrices in scratch, summed in fp32, for the levels that have instructions for it.
//
// Two numbers of neighbouring k are one 32-bit word, the even one in the lower half: the left operand has rows of such
// words, the right one has a row of words, one a column, for each two k.
#pragma once
#include "product.h"
#include "tiles.h"

namespace d2v {
namespace {

typedef Matrix<uint32_t> WordRows;

#if defined(D2V_TILES) || defined(D2V_TILES_EMULATED)

// Registers 0 to 3: sums, 4 and 5: left, 6 and 7: right.
template <int ROWS, int COLUMNS>
D2V_INLINE void multiply_tiles(Tiles& tiles, bool add, int64_t K, WordRows left, WordRows right, Matrix<float> out) {
  const int64_t a_row = left.row * 4, b_row = right.row * 4, c_row = out.row * 4;
  float *const c0 = out.data, *const c1 = c0 + kTileSide * out.row;
  if (add) {
    tiles.template load<0>(c0, c_row);
    if (COLUMNS > 1) tiles.template load<1>(c0 + kTileSide, c_row);
    if (ROWS > 1) tiles.template load<2>(c1, c_row);
    if (ROWS > 1 && COLUMNS > 1) tiles.template load<3>(c1 + kTileSide, c_row);
  } else {
    tiles.template zero<0>();
    if (COLUMNS > 1) tiles.template zero<1>();
    if (ROWS > 1) tiles.template zero<2>();
    if (ROWS > 1 && COLUMNS > 1) tiles.template zero<3>();
  }
  for (int64_t k = 0; k < K; k += kTileSide) {
    const uint32_t *const a = left.data + k, *const b = right.data + k * right.row;
    tiles.template load<4>(a, a_row);
    tiles.template load<6>(b, b_row);
    tiles.template multiply<0, 4, 6>();
    if (COLUMNS > 1) tiles.template load<7>(b + kTileSide, b_row);
    if (COLUMNS > 1) tiles.template multiply<1, 4, 7>();
    if (ROWS > 1) tiles.template load<5>(a + kTileSide * left.row, a_row);
    if (ROWS > 1) tiles.template multiply<2, 5, 6>();
    if (ROWS > 1 && COLUMNS > 1) tiles.template multiply<3, 5, 7>();
  }
  tiles.template store<0>(c0, c_row);
  if (COLUMNS > 1) tiles.template store<1>(c0 + kTileSide, c_row);
  if (ROWS > 1) tiles.template store<2>(c1, c_row);
  if (ROWS > 1 && COLUMNS > 1) tiles.template store<3>(c1 + kTileSide, c_row);
}

// out = left * right, or out += left * right: M rows, N columns, K words. Rows and columns up to the next multiple of
// 16 are read and written, too, and words up to the next multiple of 16 are read, where one operand must be 0 and the
// other finite.
__attribute__((noinline)) void multiply_words(Tiles& tiles, bool add, int64_t M, int64_t N, int64_t K, WordRows left,
                                              WordRows right, Matrix<float> out) {
  for (int64_t n = 0; n < N; n += 2 * kTileSide) {
    const WordRows b{right.data + n, right.row};
    for (int64_t m = 0; m < M; m += 2 * kTileSide) {
      const WordRows a{left.data + m * left.row, left.row};
      const Matrix<float> c{out.data + m * out.row + n, out.row};
      const bool two_rows = M - m > kTileSide, two_columns = N - n > kTileSide;
      if (two_rows && two_columns) {
        multiply_tiles<2, 2>(tiles, add, K, a, b, c);
      } else if (two_rows) {
        multiply_tiles<2, 1>(tiles, add, K, a, b, c);
      } else if (two_columns) {
        multiply_tiles<1, 2>(tiles, add, K, a, b, c);
      } else {
        multiply_tiles<1, 1>(tiles, add, K, a, b, c);
      }
    }
  }
}

#else

struct Tiles {
  void begin() {}
  void end() {}
};

constexpr int kWordRows = 8, kWordVectors = 3;  // of 32 registers; 3 * 8 sums hide the instruction's latency

template <int VECTORS>
__attribute__((noinline)) void multiply_word_panel(bool add, int64_t M, int64_t K, WordRows left, WordRows right,
                                                   Matrix<float> out) {
  for (int64_t m = 0; m < M; m += kWordRows) {
    float* const c = out.data + m * out.row;
    __m512 sum[kWordRows][VECTORS];
    for (int i = 0; i < kWordRows; ++i) {
      for (int j = 0; j < VECTORS; ++j) {
        sum[i][j] = add ? _mm512_loadu_ps(c + i * out.row + 16 * j) : _mm512_setzero_ps();
      }
    }
    const uint32_t *a = left.data + m * left.row, *b = right.data;
    for (int64_t k = 0; k < K; ++k, ++a, b += right.row) {
      __m512bh x[VECTORS];
      for (int j = 0; j < VECTORS; ++j) x[j] = bit_cast<__m512bh>(_mm512_loadu_si512(b + 16 * j));
      for (int i = 0; i < kWordRows; ++i) {
        const __m512bh y = bit_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a[i * left.row])));
        for (int j = 0; j < VECTORS; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], y, x[j]);
      }
    }
    for (int i = 0; i < kWordRows; ++i) {
      for (int j = 0; j < VECTORS; ++j) _mm512_storeu_ps(c + i * out.row + 16 * j, sum[i][j]);
    }
  }
}

// As above; words beyond K are not read.
void multiply_words(Tiles&, bool add, int64_t M, int64_t N, int64_t K, WordRows left, WordRows right,
                    Matrix<float> out) {
  const int64_t vectors = (N + 15) / 16;
  for (int64_t panels = (vectors + kWordVectors - 1) / kWordVectors, v = 0; panels > 0; --panels) {
    const int64_t share = (vectors - v + panels - 1) / panels;  // alike, as wide ones are quicker
    const WordRows b{right.data + 16 * v, right.row};
    const Matrix<float> c{out.data + 16 * v, out.row};
    switch (share) {
      case 1:
        multiply_word_panel<1>(add, M, K, left, b, c);
        break;
      case 2:
        multiply_word_panel<2>(add, M, K, left, b, c);
        break;
      default:
        multiply_word_panel<3>(add, M, K, left, b, c);
    }
    v += share;
  }
}

#endif

}  // namespace
}  // namespace d2v
