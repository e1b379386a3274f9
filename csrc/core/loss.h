// Masked regression loss, its gradient, and the spread of prediction and target that warns of collapse.
#pragma once
#include "dtype.h"

namespace d2v {

struct LossArgs {
  const void* prediction;  // (prediction_rows, C), last stride 1
  const void* target;
  int64_t prediction_stride, target_stride;  // of a row, in elements
  DType prediction_type, target_type;        // both fp64 or neither
  Indices prediction_index, target_index;    // data null: row p
  int64_t P, C;
  double beta, scale;
};

struct LossResult {
  double loss, prediction_std, target_std;
};
LossResult masked_regression_loss(const LossArgs& args, Parallel parallel);

// out (rows, C) contiguous in prediction's type: grad * d loss / d prediction, 0 in rows that are not selected.
void masked_regression_loss_backward(const LossArgs& args, double grad, int64_t rows, void* out, Parallel parallel);

// ---- one instruction level ----
// A is float, or double for an fp64 prediction.

struct LossMoments {
  void *prediction_mean, *prediction_m2, *target_mean, *target_m2;  // C of A each
};

struct LossKernels {
  // Rows [begin, end) of P: adds to the moments, which start empty, and returns the sum of errors.
  double (*forward)(const LossArgs* args, int64_t begin, int64_t end, const LossMoments* moments);
  // Merges (mean, m2) of `rows` rows into those of `seen` rows.
  void (*merge)(DType type, int64_t C, int64_t seen, int64_t rows, void* mean, void* m2, const void* new_mean,
                const void* new_m2);
  // Gradient rows [begin, end) of out; row r is selected number selected[r] (-1: none), or r where selected is null.
  void (*backward)(const LossArgs* args, double grad, const int64_t* selected, void* out, int64_t begin, int64_t end,
                   bool stream);
};
const LossKernels& loss_kernels();

}  // namespace d2v
