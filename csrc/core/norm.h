// Dropout, residual sum and layer norm over channels in one pass over the rows, and its gradient.
#pragma once
#include "dtype.h"
#include "tokens.h"

namespace d2v {

// A = fp64 for fp64 rows, else fp32.
struct DropoutArgs {
  const int64_t* keys;  // one a sample; null: nothing is dropped
  int64_t key_stride;
  uint32_t threshold;  // an element is kept where its 32 random bits are this or more
  double scale;        // of a kept element
};

// Element (n, t, c) is dropped with this probability, by word c % 4 of Philox with counter (c / 4, t, 0, 0) and
// keys[n].
DropoutArgs describe_dropout(const int64_t* keys, int64_t key_stride, double probability);

struct NormArgs {
  Rows3 branch, residual;
  int64_t N, T, C;
  DType type;
  DType half = kNone;  // of branch and copy, 16 bits beside rows of fp32; kNone: they have `type`, and no copy is made
  const void *weight, *bias;  // C of A, or null
  DropoutArgs dropout;
  double eps;
  void *normed, *total, *copy;  // (N, T, C) contiguous; with `half`, normed or copy may be null
};
void dropout_add_layer_norm(const NormArgs& args, Parallel parallel);

struct NormBackwardArgs {
  // grad_total.data null: 0; with `half` the same holds for grad_normed and grad_copy.
  Rows3 grad_normed, grad_copy, grad_total, total;
  int64_t N, T, C;
  DType type;
  DType half = kNone;  // of grad_copy and grad_branch
  const void* weight;  // C of A, or null
  DropoutArgs dropout;
  double eps;
  void *grad_branch, *grad_residual;  // (N, T, C) contiguous; grad_branch null (not with `half`): it is grad_residual
  void *grad_weight, *grad_bias;      // C of A
};
void dropout_add_layer_norm_backward(const NormBackwardArgs& args, Parallel parallel);

// ---- one instruction level ----

constexpr int64_t kNormChunk = 64;    // rows whose sums are formed before they are added to those of others
constexpr int64_t kNormPadding = 32;  // factors of a row are drawn in groups of up to as many

// Numbers that the factors of a row take.
static constexpr int64_t factors_of(int64_t C) { return (C + kNormPadding - 1) / kNormPadding * kNormPadding; }

struct NormKernels {
  // Rows [begin, end) of N * T. factors: scratch, factors_of(C) of A where something is dropped.
  void (*forward)(const NormArgs* args, int64_t begin, int64_t end, void* factors);
  // sums: gradients of weight and bias, C each, which start at 0; chunk: the same again, scratch.
  void (*backward)(const NormBackwardArgs* args, int64_t begin, int64_t end, void* factors, void* sums, void* chunk);
};
const NormKernels& norm_kernels();

}  // namespace d2v
