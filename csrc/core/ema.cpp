// update_ema: cuts many tensors into equal chunks, so that threads and thread blocks share them evenly.
#include "ema.h"

#include <algorithm>

#include "parallel.h"

namespace d2v {
namespace {

constexpr int64_t kChunk = 16384;  // elements; a multiple of every vector, so that chunks stay aligned

int64_t chunks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

}  // namespace

int64_t index_ema_chunks(const EmaTensor* tensors, int64_t count, int64_t* first_chunk) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) {
    first_chunk[i] = total;
    total += chunks_of(tensors[i].count, kChunk);
  }
  first_chunk[count] = total;
  return total;
}

void update_ema(const EmaTensor* tensors, int64_t count, const int64_t* first_chunk, double weight, Parallel parallel) {
  const EmaKernels& kernels = ema_kernels();
  parallel_for(parallel, first_chunk[count], 4, [&](int64_t c0, int64_t c1) {
    int64_t i = std::upper_bound(first_chunk, first_chunk + count + 1, c0) - first_chunk - 1;
    for (int64_t c = c0; c < c1;) {
      while (first_chunk[i + 1] <= c) ++i;  // empty tensors have no chunk
      const int64_t last = std::min(c1, first_chunk[i + 1]);
      const int64_t begin = (c - first_chunk[i]) * kChunk, end = (last - first_chunk[i]) * kChunk;
      kernels.update(&tensors[i], begin, std::min(end, tensors[i].count), weight);
      c = last;
    }
  });
}

}  // namespace d2v
