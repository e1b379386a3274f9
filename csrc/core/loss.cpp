// masked_regression_loss: segments of rows in parallel, merged in order.
#include "loss.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "parallel.h"

namespace d2v {
namespace {

constexpr int64_t kLeastRows = 64;  // of a segment
constexpr int64_t kChunkRows = 16;  // a segment is whole chunks of the kernels

template <class A>
double mean_std(const A* m2, int64_t C, int64_t P) {
  if (P < 2 || C == 0) return std::numeric_limits<double>::quiet_NaN();
  double sum = 0;
  for (int64_t c = 0; c < C; ++c) sum += std::sqrt(static_cast<double>(m2[c]) / static_cast<double>(P - 1) + 1e-6);
  return sum / static_cast<double>(C);
}

template <class A>
LossResult forward(const LossArgs& a, Parallel parallel) {
  const int64_t rows = std::max(kLeastRows, segment_rows(a.P, kChunkRows)), segments = (a.P + rows - 1) / rows;
  const DType type = sizeof(A) == 8 ? kFloat64 : kFloat32;
  std::vector<A> moments(static_cast<size_t>((segments > 0 ? segments : 1) * 4 * a.C));
  std::vector<double> sums(static_cast<size_t>(segments));
  const auto at = [&](int64_t segment, int64_t part) { return moments.data() + (segment * 4 + part) * a.C; };
  const int64_t bytes = rows * a.C * (size_of(a.prediction_type) + size_of(a.target_type));
  parallel_for(parallel, segments, grain_of(bytes), [&](int64_t s0, int64_t s1) {
    for (int64_t s = s0; s < s1; ++s) {
      const LossMoments m{at(s, 0), at(s, 1), at(s, 2), at(s, 3)};
      const int64_t end = (s + 1) * rows < a.P ? (s + 1) * rows : a.P;
      sums[static_cast<size_t>(s)] = loss_kernels().forward(&a, s * rows, end, &m);
    }
  });
  double sum = 0;
  for (int64_t s = 0; s < segments; ++s) {
    sum += sums[static_cast<size_t>(s)];
    if (s == 0) continue;
    const int64_t n = (s + 1) * rows < a.P ? rows : a.P - s * rows;
    for (int part = 0; part < 4; part += 2) {
      loss_kernels().merge(type, a.C, s * rows, n, at(0, part), at(0, part + 1), at(s, part), at(s, part + 1));
    }
  }
  return {sum * a.scale, mean_std(at(0, 1), a.C, a.P), mean_std(at(0, 3), a.C, a.P)};
}

}  // namespace

LossResult masked_regression_loss(const LossArgs& args, Parallel parallel) {
  return args.prediction_type == kFloat64 ? forward<double>(args, parallel) : forward<float>(args, parallel);
}

void masked_regression_loss_backward(const LossArgs& a, double grad, int64_t rows, void* out, Parallel parallel) {
  if (rows * a.C == 0) return;
  std::vector<int64_t> selected;
  if (a.prediction_index.data || a.P < rows) {
    selected.assign(static_cast<size_t>(rows), -1);
    for (int64_t p = 0; p < a.P; ++p) {
      const int64_t at = p * a.prediction_index.stride;
      const int64_t r = !a.prediction_index.data  ? p
                        : a.prediction_index.wide ? static_cast<const int64_t*>(a.prediction_index.data)[at]
                                                  : static_cast<const int32_t*>(a.prediction_index.data)[at];
      selected[static_cast<size_t>(r)] = p;
    }
  }
  const int64_t* by_row = selected.empty() ? nullptr : selected.data();
  const int64_t bytes = a.C * size_of(a.prediction_type);
  parallel_for(parallel, rows, grain_of(2 * bytes), [&](int64_t begin, int64_t end) {
    loss_kernels().backward(&a, grad, by_row, out, begin, end, rows * bytes >= kStreamBytes);
  });
}

}  // namespace d2v
