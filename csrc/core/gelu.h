// GELU, alone and after a layer norm over channels, with gradients.
//
// GELU is z Phi(z), Phi the normal distribution function. Both come from the tail Q(a) = Phi(-a), a = |z|, by
// z Phi(z) = max(z, 0) - a Q(a), which does not cancel as 1 + erf does. Q is exp(-a^2 / 2) f(1 / (1 + p a)), f a
// polynomial (the form of Hastings 1955, coefficients fitted anew), or, with AVX-512, looked up by pieces. At -inf GELU
// and its derivative are their limit 0, at inf GELU is inf and its derivative 1; NaN stays NaN.
#pragma once
#include "dtype.h"

namespace d2v {

// out = gelu(x), n elements of one type.
void gelu(DType type, const void* x, void* out, int64_t n, Parallel parallel);
// out = grad * gelu'(x), y = gelu(x); out may be grad.
void gelu_backward(DType type, const void* grad, const void* x, void* out, void* y, int64_t n, Parallel parallel);

// A is float, or double for fp64 rows.
struct NormGeluArgs {
  const void* x;  // (rows, C), last stride 1
  int64_t stride, rows, C;
  DType type;
  const void *weight, *bias;  // C of A each; null: 1 and 0
  double eps;
  const void* added = nullptr;  // (rows, C) contiguous in x's type, to the result
};
// out (rows, C) contiguous in x's type.
void layer_norm_gelu(const NormGeluArgs& args, void* out, Parallel parallel);

struct NormGeluGradient {
  const void* grad;  // (rows, C), last stride 1
  int64_t stride;
  DType type;              // that of x, or A
  void* out;               // (rows, C) contiguous in x's type
  void* sums;              // of weight, then of bias: 2 C of A; null where neither is wanted
  void* totals = nullptr;  // C of A, or null: sums of out over the rows, before it is rounded
};
void layer_norm_gelu_backward(const NormGeluArgs& args, const NormGeluGradient& gradient, Parallel parallel);

// ---- one instruction level ----

struct GeluKernels {
  void (*forward)(DType type, const void* x, void* out, int64_t n, bool stream);
  void (*backward)(DType type, const void* grad, const void* x, void* out, void* y, int64_t n, bool stream);
  // Rows [begin, begin + rows), whose mean and scale (A) stand at the front of these arrays.
  void (*norm_forward)(const NormGeluArgs* args, int64_t begin, int64_t rows, const void* mean, const void* scale,
                       void* out, bool stream);
  // Adds to sums (2 C of A) and totals (C), which may be null; scratch: C of A.
  void (*norm_backward)(const NormGeluArgs* args, const NormGeluGradient* gradient, int64_t begin, int64_t rows,
                        const void* mean, const void* scale, void* sums, void* totals, void* scratch);
};
const GeluKernels& gelu_kernels();

}  // namespace d2v
