// dropout_add_layer_norm: rows in parallel; sums over rows by segments, merged in order.
#include "norm.h"

#include <cmath>
#include <vector>

#include "parallel.h"

namespace d2v {
namespace {

template <class A>
std::vector<A> factors_for(const DropoutArgs& dropout, int64_t C) {
  return std::vector<A>(static_cast<size_t>(dropout.keys ? factors_of(C) : 0));
}

template <class A>
void forward(const NormArgs& a, Parallel parallel) {
  parallel_for(parallel, a.N * a.T, grain_of(a.C * size_of(a.type)), [&](int64_t begin, int64_t end) {
    std::vector<A> factors = factors_for<A>(a.dropout, a.C);
    norm_kernels().forward(&a, begin, end, factors.data());
  });
}

template <class A>
void backward(const NormBackwardArgs& a, Parallel parallel) {
  const int64_t rows = a.N * a.T, part = segment_rows(rows, kNormChunk), segments = (rows + part - 1) / part;
  std::vector<A> sums(static_cast<size_t>((segments > 0 ? segments : 1) * 2 * a.C));
  parallel_for(parallel, segments, grain_of(part * a.C * size_of(a.type)), [&](int64_t s0, int64_t s1) {
    std::vector<A> factors = factors_for<A>(a.dropout, a.C), chunk(static_cast<size_t>(2 * a.C));
    for (int64_t s = s0; s < s1; ++s) {
      const int64_t end = (s + 1) * part < rows ? (s + 1) * part : rows;
      norm_kernels().backward(&a, s * part, end, factors.data(), sums.data() + s * 2 * a.C, chunk.data());
    }
  });
  for (int64_t s = 1; s < segments; ++s) {
    for (int64_t c = 0; c < 2 * a.C; ++c) sums[static_cast<size_t>(c)] += sums[static_cast<size_t>(s * 2 * a.C + c)];
  }
  for (int64_t c = 0; c < a.C; ++c) {
    static_cast<A*>(a.grad_weight)[c] = sums[static_cast<size_t>(c)];
    static_cast<A*>(a.grad_bias)[c] = sums[static_cast<size_t>(a.C + c)];
  }
}

}  // namespace

DropoutArgs describe_dropout(const int64_t* keys, int64_t key_stride, double probability) {
  if (probability == 0) return {nullptr, 0, 0, 1};
  const double threshold = std::nearbyint(probability * 0x1p32);
  if (threshold >= 0x1p32) return {keys, key_stride, UINT32_MAX, 0};  // the probability rounds to 1
  return {keys, key_stride, static_cast<uint32_t>(threshold), 1 / (1 - probability)};
}

void dropout_add_layer_norm(const NormArgs& args, Parallel parallel) {
  if (args.C == 0) return;
  args.type == kFloat64 ? forward<double>(args, parallel) : forward<float>(args, parallel);
}

void dropout_add_layer_norm_backward(const NormBackwardArgs& args, Parallel parallel) {
  if (args.C == 0) return;
  args.type == kFloat64 ? backward<double>(args, parallel) : backward<float>(args, parallel);
}

}  // namespace d2v
