// update_ema: many tensors as one row of equal chunks, which threads share evenly.
#include "ema.h"

#include <algorithm>

#include "parallel.h"

namespace d2v {
namespace {

constexpr int64_t kGrain = 512;  // chunks worth a thread, which takes some 50 us to wake

}  // namespace

void update_ema(const EmaTensor* tensors, int64_t count, const int64_t* first_chunk, double weight, Parallel parallel) {
  parallel_for(parallel, first_chunk[count], kGrain, [&](int64_t c0, int64_t c1) {
    int64_t i = std::upper_bound(first_chunk, first_chunk + count + 1, c0) - first_chunk - 1;
    for (int64_t c = c0; c < c1;) {
      while (first_chunk[i + 1] <= c) ++i;  // empty tensors have no chunk
      const int64_t last = std::min(c1, first_chunk[i + 1]);
      const int64_t begin = (c - first_chunk[i]) * kEmaChunk, end = (last - first_chunk[i]) * kEmaChunk;
      ema_kernels(tensors[i]).update(&tensors[i], begin, std::min(end, tensors[i].count), weight);
      c = last;
    }
    if (count > 0) ema_kernels(tensors[0]).finish();
  });
}

}  // namespace d2v
