// Attention with a distance bias, valid keys and dropout from row keys, and its gradient; one head of a row at a time.
#pragma once
#include "dtype.h"

namespace d2v {

// (N, T, H, D), last stride 1; strides in elements.
struct Heads {
  const void* data;
  int64_t row, token, head;
  DType type;
};

// Where the byte lies that decides on the weight of key j: at the top of a word of Philox with counter (counter, query,
// head, 0), shifted left. The sixteen keys of a call are those that a thread of a GPU has of a row of 64 logits.
struct DropoutPlace {
  int64_t counter, word, shift;
};
inline DropoutPlace place_of(int64_t j) {
  const int64_t place = j / 8 % 8 * 2 + j % 2;
  return {j / 64 * 4 + j % 8 / 2, place % 4, place / 4 * 8};
}

struct AttentionArgs {
  Heads query, key, value;
  int64_t N, T, H, D;
  bool wide;           // computed in fp64, else in fp32: the type of slopes and log_sum
  const void* slopes;  // (H), null: no bias
  int64_t slope_stride;
  Indices positions;     // (N, placed): of the last `placed` tokens
  int64_t placed;        // the others have no bias
  Indices lengths;       // (N); data null: all tokens are keys
  const uint8_t* valid;  // (N, T) bool; null: all
  int64_t valid_row, valid_stride;
  const int64_t* keys;  // (N), of dropout
  int64_t key_stride;
  bool drops;             // false: no number is low enough
  uint32_t last_dropped;  // a weight is dropped where its number is not above this one, whose low 24 bits are ones
  double rescale;         // 1 / (1 - probability), of the weights that are left
  double scale;           // of the logits
  bool stream;            // results leave the caches before anyone reads them; set by `attention` itself
};

// out (N, T, H, D) in query's type and log_sum (N, H, T), contiguous; log_sum is infinite where no key is valid.
void attention(const AttentionArgs& args, void* out, void* log_sum, Parallel parallel);

struct LogSums {  // (N, H, T)
  const void* data;
  int64_t row, head, token;
};

struct AttentionGradient {
  Heads grad;  // of any type
  LogSums log_sum;
  void *of_query, *of_key, *of_value;  // contiguous, in the types of query, key and value
  double* of_slopes;                   // (N, H) scratch, one sum each; null without a bias
};

// totals: (H) in the computed type, null without a bias.
void attention_backward(const AttentionArgs& args, const AttentionGradient& gradient, void* totals, Parallel parallel);

// ---- one instruction level ----

constexpr int64_t kQueryBlock = 48;  // queries whose weights exist at once; a multiple of every level's tile rows

// Sizes of scratch, alike for all levels: rows that begin on cache lines, room for whole vectors and tiles, and a
// number of lines that spreads a column over the cache's sets.
struct AttentionSizes {
  int64_t width, columns;
  explicit AttentionSizes(const AttentionArgs& a) : width((a.D + 15) / 16 * 16), columns((a.T + 15) / 16 * 16 + 16) {}
  // Elements, the second with the gradient's.
  int64_t forward() const { return 2 * columns * width + kQueryBlock * (2 * width + columns) + 4 * columns; }
  int64_t backward() const { return 5 * columns * width + kQueryBlock * (3 * width + 2 * columns) + 4 * columns; }
};

// Heads [begin, end) of N * H; forward: pieces of N * H * parts, which have `queries` queries of a head each, the last
// fewer. `space`: zeros, aligned to 64 bytes.
struct AttentionKernels {
  void (*forward)(const AttentionArgs* args, void* out, void* log_sum, int64_t queries, int64_t begin, int64_t end,
                  void* space);
  void (*backward)(const AttentionArgs* args, const AttentionGradient* gradient, int64_t begin, int64_t end,
                   void* space);
};
const AttentionKernels& attention_kernels();

// Those for query, key, value and gradient in bf16, with bf16 products; null where the machine has no instructions for
// them. Scratch in 32-bit words.
const AttentionKernels* attention_bf16_kernels();

struct AttentionBf16Sizes {
  static constexpr int64_t kForwardQueries = 32, kBackwardQueries = 64;  // whose weights exist at once
  static constexpr int64_t kChunk = 256;  // keys whose weights go through the first cache
  int64_t width, keys;
  explicit AttentionBf16Sizes(const AttentionArgs& a) : width((a.D + 31) / 32 * 32), keys((a.T + 31) / 32 * 32) {}
  int64_t of_all() const { return 2 * (keys + 64) + keys + width * (keys / 2 + 16) + keys * width; }
  int64_t forward() const { return of_all() + kForwardQueries * (3 * width + keys + kChunk / 2); }
  int64_t backward() const {
    return of_all() + 2 * width * keys + keys * width / 2 + kBackwardQueries * (5 * width + 7 * keys / 2);
  }
};

}  // namespace d2v
