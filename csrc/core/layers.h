// Mean over K layers, each normalised, then the mean normalised once more: the regression targets of data2vec.
//
// Variance is biased, there is no affine part. Statistics are merged from chunks of rows, each of them two-pass
// (Chan, Golub and LeVeque 1979); a difference of moments would lose channels with a large mean.
#pragma once
#include "dtype.h"

namespace d2v {

enum Norm : int32_t { kNormNone, kNormLayer, kNormInstance, kNormBatch };

struct LayersArgs {
  const void* const* layers;    // K addresses of (B, T, C), last stride 1
  const int64_t* batch_stride;  // K each, in elements
  const int64_t* time_stride;
  int64_t K, B, T, C;
  DType type;
  Norm norm, out_norm;
  const int64_t* lengths;  // B, each in [0, T]; null: T for all
  double eps;
  void* out;  // (B, T, C) contiguous
  DType out_type;
};

void average_layers(const LayersArgs& args, Parallel parallel);

// ---- one instruction level ----
// A is float, or double where the layers are fp64 (`type` kFloat64). mean, scale and block hold A.

// Sum over K layers of (x - mean) * scale for `rows` rows of one sample, into block (rows, C).
struct CombineArgs {
  const void* const* x;   // K addresses of the first row
  const int64_t* stride;  // K
  DType type;
  int64_t K, rows, C;
  const void* mean;   // per_row: (K, rows); else (K, C); null: 0
  const void* scale;  // likewise; null: 1 / K
  bool per_row;
  int64_t next;  // the rows so many further on are the ones to combine after these: they are asked for meanwhile
  void* block;
};

struct LayersKernels {
  // Merges `rows` rows into (mean, m2) per channel, which hold `seen` rows before. scratch: 2 C numbers of A.
  void (*column_stats)(DType type, const void* x, int64_t stride, int64_t rows, int64_t C, int64_t seen, void* mean,
                       void* m2, void* scratch);
  // m2 -> factor / sqrt(m2 / count + eps), n numbers.
  void (*column_scale)(DType type, void* m2, int64_t n, int64_t count, double eps, double factor);
  // mean and scale of each row over C.
  void (*row_stats)(DType type, const void* x, int64_t stride, int64_t rows, int64_t C, double eps, double factor,
                    void* mean, void* scale);
  void (*combine)(const CombineArgs* args);
  // block (rows, C) <- (block - mean) * scale, mean and scale per channel.
  void (*normalise_columns)(DType type, void* block, int64_t rows, int64_t C, const void* mean, const void* scale);
  // Each row of block normalised over C.
  void (*normalise_rows)(DType type, void* block, int64_t rows, int64_t C, double eps);
  // n numbers of A, cast to out_type. stream: past the caches.
  void (*emit)(DType type, DType out_type, void* out, const void* block, int64_t n, bool stream);
};
const LayersKernels& layers_kernels();

}  // namespace d2v
