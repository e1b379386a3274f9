// GELU and layer_norm_gelu: how rows are cut into pieces. The arithmetic is in gelu_cpu.cpp.
#include "gelu.h"

#include <algorithm>
#include <vector>

#include "layers.h"
#include "parallel.h"

namespace d2v {
namespace {

constexpr int64_t kPiece = 4096;    // elements that are not cut
constexpr int64_t kBlockRows = 16;  // rows that are gone through twice while they are in the caches

// What is computed here is read at once by a matrix product, so it goes past the caches only where it would not stay in
// the last one.
constexpr int64_t kStreamActivations = 8 << 20;

char* at(void* p, int64_t bytes) { return static_cast<char*>(p) + bytes; }
const char* at(const void* p, int64_t bytes) { return static_cast<const char*>(p) + bytes; }

// Calls body(begin, count) over pieces of [0, n).
template <class F>
void for_pieces(const Parallel& parallel, int64_t n, int64_t bytes, const F& body) {
  parallel_for(parallel, (n + kPiece - 1) / kPiece, grain_of(kPiece * bytes),
               [&](int64_t p0, int64_t p1) { body(p0 * kPiece, std::min(n, p1 * kPiece) - p0 * kPiece); });
}

template <class A>
void statistics(const NormGeluArgs& a, int64_t begin, int64_t rows, A* mean, A* scale) {
  layers_kernels().row_stats(a.type, at(a.x, begin * a.stride * size_of(a.type)), a.stride, rows, a.C, a.eps, 1.0, mean,
                             scale);
}

template <class A>
void norm_forward(const NormGeluArgs& a, void* out, Parallel parallel) {
  const int64_t blocks = (a.rows + kBlockRows - 1) / kBlockRows, row_bytes = a.C * size_of(a.type);
  const bool stream = a.rows * row_bytes >= kStreamActivations;
  parallel_for(parallel, blocks, grain_of(2 * kBlockRows * row_bytes), [&](int64_t b0, int64_t b1) {
    A mean[kBlockRows], scale[kBlockRows];
    for (int64_t b = b0; b < b1; ++b) {
      const int64_t begin = b * kBlockRows, rows = std::min(kBlockRows, a.rows - begin);
      statistics(a, begin, rows, mean, scale);
      gelu_kernels().norm_forward(&a, begin, rows, mean, scale, out, stream);
    }
  });
}

// A block's sums in A, those of a segment in double: no long chain of roundings.
template <class A>
void norm_backward(const NormGeluArgs& a, const NormGeluGradient& g, Parallel parallel) {
  const int64_t per_segment = segment_rows(a.rows, kBlockRows), segments = (a.rows + per_segment - 1) / per_segment;
  const size_t C = static_cast<size_t>(a.C), of_affine = g.sums ? 2 * C : 0, width = of_affine + (g.totals ? C : 0);
  std::vector<double> totals(static_cast<size_t>(segments) * width, 0.0);
  const int64_t bytes = per_segment * a.C * (2 * size_of(a.type) + size_of(g.type));
  parallel_for(parallel, segments, grain_of(bytes), [&](int64_t s0, int64_t s1) {
    A mean[kBlockRows], scale[kBlockRows];
    std::vector<A> sums(width), scratch(C);
    for (int64_t s = s0; s < s1; ++s) {
      double* total = totals.data() + static_cast<size_t>(s) * width;
      const int64_t end = std::min(a.rows, (s + 1) * per_segment);
      for (int64_t begin = s * per_segment; begin < end; begin += kBlockRows) {
        const int64_t rows = std::min(kBlockRows, end - begin);
        statistics(a, begin, rows, mean, scale);
        std::fill(sums.begin(), sums.end(), A(0));
        gelu_kernels().norm_backward(&a, &g, begin, rows, mean, scale, g.sums ? sums.data() : nullptr,
                                     g.totals ? sums.data() + of_affine : nullptr, scratch.data());
        for (size_t i = 0; i < width; ++i) total[i] += static_cast<double>(sums[i]);
      }
    }
  });
  for (size_t i = 0; i < width; ++i) {
    double sum = 0;
    for (int64_t s = 0; s < segments; ++s) sum += totals[static_cast<size_t>(s) * width + i];
    (i < of_affine ? static_cast<A*>(g.sums)[i] : static_cast<A*>(g.totals)[i - of_affine]) = static_cast<A>(sum);
  }
}

}  // namespace

void gelu(DType type, const void* x, void* out, int64_t n, Parallel parallel) {
  const int64_t size = size_of(type);
  for_pieces(parallel, n, 2 * size, [&](int64_t begin, int64_t count) {
    gelu_kernels().forward(type, at(x, begin * size), at(out, begin * size), count, n * size >= kStreamActivations);
  });
}

void gelu_backward(DType type, const void* grad, const void* x, void* out, void* y, int64_t n, Parallel parallel) {
  const int64_t size = size_of(type);
  for_pieces(parallel, n, 4 * size, [&](int64_t begin, int64_t count) {
    const int64_t b = begin * size;
    gelu_kernels().backward(type, at(grad, b), at(x, b), at(out, b), at(y, b), count, n * size >= kStreamActivations);
  });
}

void layer_norm_gelu(const NormGeluArgs& args, void* out, Parallel parallel) {
  if (args.rows * args.C == 0) return;
  if (args.type == kFloat64) {
    norm_forward<double>(args, out, parallel);
  } else {
    norm_forward<float>(args, out, parallel);
  }
}

void layer_norm_gelu_backward(const NormGeluArgs& args, const NormGeluGradient& gradient, Parallel parallel) {
  if (args.C == 0) return;
  if (args.type == kFloat64) {
    norm_backward<double>(args, gradient, parallel);
  } else {
    norm_backward<float>(args, gradient, parallel);
  }
}

}  // namespace d2v
