// Grouped convolution over a sequence or a grid of tokens, channels last, with as many outputs as inputs; its
// gradients.
#pragma once
#include "dtype.h"

namespace d2v {

// A = fp64 for fp64 rows, else fp32. A sequence is a grid of one row.
struct ConvolutionArgs {
  const void* x;                                      // (N, H, W, C) contiguous
  DType type;                                         // of x, and of what has its channels or D of them
  int64_t N, H, W, C, D, groups, kernel_h, kernel_w;  // C channels in, D out
  int64_t before_h, before_w;                         // zeros before the first row and column
};

struct ConvolutionWeight {
  const void* data;  // (D, C / groups, kernel_h, kernel_w) contiguous; transposed: those of the convolution whose
  DType type;        // gradient this one makes, from D to C channels
  bool transposed;
};

struct ConvolutionEnds {
  const void* bias;   // D numbers of A, or null
  const void* added;  // (N, H, W, D) contiguous in the type of x, or null
  void* out;          // (N, H, W, D)
};
// out = x * weight + bias + added, summed in A.
void convolution(const ConvolutionArgs& args, const ConvolutionWeight& weight, const ConvolutionEnds& ends,
                 Parallel parallel);

// out (D, C / groups, kernel_h, kernel_w) of A from grad (N, H, W, D): sums over samples in order, whatever the
// threads.
void convolution_backward_weight(const ConvolutionArgs& args, const void* grad, void* out, Parallel parallel);

// ---- one instruction level ----

struct ConvolutionKernels {
  // Bytes of the packed weight of a group, and of scratch, which both kernels take as zeros, aligned to 64 bytes.
  int64_t (*packed_bytes)(const ConvolutionArgs* args);
  int64_t (*space_bytes)(const ConvolutionArgs* args);
  // Groups [begin, end); packed starts as zeros.
  void (*pack)(const ConvolutionArgs* args, const ConvolutionWeight* weight, int64_t begin, int64_t end, void* packed);
  // Pairs [begin, end) of N * groups, group by group of each sample.
  void (*forward)(const ConvolutionArgs* args, const void* packed, const ConvolutionEnds* ends, int64_t begin,
                  int64_t end, void* space);
  void (*backward_weight)(const ConvolutionArgs* args, const void* grad, void* out, int64_t begin, int64_t end,
                          void* space);
};
const ConvolutionKernels& convolution_kernels(DType type);

}  // namespace d2v
