// attention: heads in parallel, the slopes' gradient added up in order.
#include "attention.h"

#include <cstddef>
#include <limits>
#include <vector>

#include "parallel.h"

namespace d2v {
namespace {

int64_t element_bytes(const AttentionArgs& a) { return a.wide ? 8 : 4; }

// The kernels with bf16 products, where they take this.
const AttentionKernels* bf16_kernels(const AttentionArgs& a, DType grad = kBFloat16) {
  const bool fits = a.query.type == kBFloat16 && a.key.type == kBFloat16 && a.value.type == kBFloat16;
  return fits && grad == kBFloat16 && !a.wide ? attention_bf16_kernels() : nullptr;
}

AttentionArgs with_stream(AttentionArgs a) {
  a.stream = a.N * a.T * a.H * a.D * size_of(a.query.type) >= kStreamBytes;
  return a;
}

// Heads that make a piece worth a thread, by their weights and by their rows.
int64_t head_grain(const AttentionArgs& a) { return grain_of(8 * a.T * (a.T + a.D)); }

// Queries of a head that one thread takes in forward: all, unless that leaves threads without work. No result depends
// on it, each query being on its own.
int64_t queries_of_piece(const AttentionArgs& a, int threads) {
  const int64_t heads = a.N * a.H, blocks = (a.T + kQueryBlock - 1) / kQueryBlock;
  const int64_t wanted = threads > 1 ? (2 * threads + heads - 1) / heads : 1;
  const int64_t parts = wanted < blocks ? wanted : blocks;
  return (blocks + parts - 1) / parts * kQueryBlock;
}

}  // namespace

void attention(const AttentionArgs& a, void* out, void* log_sum, Parallel parallel) {
  if (a.N * a.T * a.H == 0) return;
  if (a.D == 0) {
    const int64_t count = a.N * a.H * a.T;
    for (int64_t i = 0; i < count; ++i) {
      if (a.wide) {
        static_cast<double*>(log_sum)[i] = std::numeric_limits<double>::infinity();
      } else {
        static_cast<float*>(log_sum)[i] = std::numeric_limits<float>::infinity();
      }
    }
    return;
  }
  const int64_t queries = queries_of_piece(a, parallel.threads), parts = (a.T + queries - 1) / queries;
  const AttentionKernels* const narrow = bf16_kernels(a);
  const AttentionArgs b = with_stream(a);
  const int64_t bytes = narrow ? AttentionBf16Sizes(a).forward() * 4 : AttentionSizes(a).forward() * element_bytes(a);
  parallel_for(parallel, a.N * a.H * parts, head_grain(a), [&](int64_t begin, int64_t end) {
    Space space(bytes);
    (narrow ? *narrow : attention_kernels()).forward(&b, out, log_sum, queries, begin, end, space.data());
  });
}

void attention_backward(const AttentionArgs& a, const AttentionGradient& gradient, void* totals, Parallel parallel) {
  std::vector<double> partial(static_cast<size_t>(a.slopes ? a.N * a.H : 0));
  if (a.N * a.T * a.H * a.D > 0) {
    AttentionGradient g = gradient;
    g.of_slopes = a.slopes ? partial.data() : nullptr;
    const AttentionKernels* const narrow = bf16_kernels(a, g.grad.type);
    const AttentionArgs b = with_stream(a);
    const int64_t bytes =
        narrow ? AttentionBf16Sizes(a).backward() * 4 : AttentionSizes(a).backward() * element_bytes(a);
    parallel_for(parallel, a.N * a.H, head_grain(a), [&](int64_t begin, int64_t end) {
      Space space(bytes);
      (narrow ? *narrow : attention_kernels()).backward(&b, &g, begin, end, space.data());
    });
  }
  for (int64_t h = 0; a.slopes && h < a.H; ++h) {
    double total = 0;
    for (int64_t n = 0; n < a.N; ++n) total += partial[static_cast<size_t>(n * a.H + h)];
    if (a.wide) {
      static_cast<double*>(totals)[h] = total;
    } else {
      static_cast<float*>(totals)[h] = static_cast<float>(total);
    }
  }
}

}  // namespace d2v
