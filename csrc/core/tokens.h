// Rows of a token sequence: gather, its transpose, and the decoder's input from kept rows and a fill.
#pragma once
#include "dtype.h"

namespace d2v {

// First (row, column) of index (rows, columns) whose value is not in [0, limit); returns false if there is none.
struct BadIndex {
  int64_t row, column, value;
};
bool find_bad_index(const Indices& index, int64_t rows, int64_t columns, int64_t limit, BadIndex* bad);

// A 3-D tensor with last stride 1, strides in elements.
struct Rows3 {
  const void* data;
  int64_t stride0, stride1;
};

struct GatherArgs {
  Rows3 x;        // (rows / clones, tokens, C)
  Indices index;  // (rows, n), values in [0, tokens)
  int64_t rows, n, clones, C;
  DType type;
  void* out;  // (rows, n, C) contiguous
};
void gather_tokens(const GatherArgs& args, Parallel parallel);

struct GatherBackwardArgs {
  Rows3 grad;     // (rows, n, C)
  Indices index;  // (rows, n)
  int64_t rows, n, clones, tokens, C;
  DType type;
  void* out;  // (rows / clones, tokens, C) contiguous
};
void gather_tokens_backward(const GatherBackwardArgs& args, Parallel parallel);

enum FillKind : int32_t { kFillVector, kFillRows, kFillNoise };

struct RestoreArgs {
  Rows3 kept;       // (N, V, C)
  Indices restore;  // (N, T)
  int64_t N, V, T, C;
  DType type;
  FillKind fill_kind;
  Rows3 fill;  // vector: data alone; rows: (N, F, C)
  const int64_t* keys;
  int64_t key_stride;
  float noise_std;
  void* out;  // (N, T, C) contiguous
};
void restore_tokens(const RestoreArgs& args, Parallel parallel);

struct RestoreBackwardArgs {
  Rows3 grad;       // (N, T, C)
  Indices restore;  // (N, T)
  int64_t N, V, T, C;
  int64_t fill_rows;  // F; -1: vector fill; -2: no gradient of the fill
  DType type;
  void* kept;  // (N, V, C) contiguous
  void* fill;  // (N, F, C), (C,) or nothing
};
void restore_tokens_backward(const RestoreBackwardArgs& args, Parallel parallel);

// ---- one instruction level ----

struct TokensKernels {
  // Output rows [begin, end) of rows * n.
  void (*gather)(const GatherArgs* args, int64_t begin, int64_t end, bool stream);
  // Output rows [begin, end) of N * T.
  void (*restore)(const RestoreArgs* args, int64_t begin, int64_t end, bool stream);
  // out row i (C numbers) = sum over e in [start[i], start[i + 1]) of the row at base + entries[e] (elements), in that
  // order, in fp32 (fp64 for fp64).
  void (*sum_rows)(DType type, void* out, int64_t count, int64_t C, const void* base, const int64_t* start,
                   const int64_t* entries, bool stream);
  // sum (C numbers of float, or double for fp64) += the rows at base + entries[e], e in [0, count).
  void (*add_rows)(DType type, void* sum, int64_t C, const void* base, const int64_t* entries, int64_t count);
  // out = cast of sum.
  void (*cast_row)(DType type, void* out, const void* sum, int64_t C);
};
const TokensKernels& tokens_kernels();

}  // namespace d2v
