// Products of small matrices in scratch, for the files that are compiled once per instruction level.
#pragma once
#include "simd.h"

namespace d2v {
namespace {

#if defined(__AVX512F__)
constexpr int kTileRows = 6, kTileVectors = 4;  // of 32 registers
#else
constexpr int kTileRows = 4, kTileVectors = 3;  // of 16
#endif
// An operand whose element (m, k) is data[m * row + k * column].
template <class A>
struct Left {
  const A* data;
  int64_t row, column;
};

template <class A>
struct Matrix {
  A* data;
  int64_t row;  // stride
};

// A tile of C = left * right, or of C += left * right.
template <class A, bool ADD, int VECTORS>
D2V_INLINE void multiply_tile(int64_t K, const Left<A>& left, const Matrix<A>& right, const Matrix<A>& out) {
  constexpr int L = kLanes<A>;
  Vec<A> sum[kTileRows][VECTORS];
  for (int i = 0; i < kTileRows; ++i) {
    for (int j = 0; j < VECTORS; ++j) sum[i][j] = ADD ? load<A>(out.data + i * out.row + j * L) : Vec<A>{};
  }
  const A *a = left.data, *b = right.data;
  for (int64_t k = 0; k < K; ++k, a += left.column, b += right.row) {
    Vec<A> x[VECTORS];
    for (int j = 0; j < VECTORS; ++j) x[j] = load<A>(b + j * L);
    for (int i = 0; i < kTileRows; ++i) {
      const Vec<A> y = splat<A>(a[i * left.row]);
      for (int j = 0; j < VECTORS; ++j) sum[i][j] += y * x[j];
    }
  }
  for (int i = 0; i < kTileRows; ++i) {
    for (int j = 0; j < VECTORS; ++j) store<A>(out.data + i * out.row + j * L, sum[i][j]);
  }
}

template <class A, bool ADD, int VECTORS>
__attribute__((noinline)) void multiply_panel(int64_t M, int64_t K, const Left<A>& left, const Matrix<A>& right,
                                              const Matrix<A>& out) {
  for (int64_t m = 0; m < M; m += kTileRows) {
    multiply_tile<A, ADD, VECTORS>(K, {left.data + m * left.row, left.row, left.column}, right,
                                   {out.data + m * out.row, out.row});
  }
}

// M rows and N columns of out; rows up to the next whole tile and columns up to the next whole vector are read and
// written, too.
template <class A, bool ADD = false>
void multiply(int64_t M, int64_t N, int64_t K, const Left<A>& left, const Matrix<A>& right, const Matrix<A>& out) {
  constexpr int L = kLanes<A>;
  const int64_t vectors = (N + L - 1) / L;
  for (int64_t v = 0; v < vectors; v += kTileVectors) {
    const Matrix<A> b{right.data + v * L, right.row}, c{out.data + v * L, out.row};
    switch (vectors - v) {
      case 1:
        multiply_panel<A, ADD, 1>(M, K, left, b, c);
        break;
      case 2:
        multiply_panel<A, ADD, 2>(M, K, left, b, c);
        break;
      case 3:
        multiply_panel<A, ADD, 3>(M, K, left, b, c);
        break;
      default:
        multiply_panel<A, ADD, kTileVectors>(M, K, left, b, c);
    }
  }
}

}  // namespace
}  // namespace d2v
