// convolution: samples and groups in parallel; the gradient of the weight by groups, which share no sum.
#include "convolution.h"

#include "parallel.h"

namespace d2v {
namespace {

int64_t operations(const ConvolutionArgs& a) {
  return a.H * a.W * a.kernel_h * a.kernel_w * a.C / a.groups * a.D / a.groups;
}

// Pairs of sample and group that make a piece worth a thread, `bytes` as work goes.
int64_t pair_grain(const ConvolutionArgs& a) { return grain_of(operations(a) / 16); }

}  // namespace

void convolution(const ConvolutionArgs& a, const ConvolutionWeight& weight, const ConvolutionEnds& ends,
                 Parallel parallel) {
  if (a.N * a.H * a.W * a.D == 0) return;
  const ConvolutionKernels& kernels = convolution_kernels(a.type);
  Space packed(a.groups * kernels.packed_bytes(&a));
  parallel_for(parallel, a.groups, grain_of(kernels.packed_bytes(&a)),
               [&](int64_t begin, int64_t end) { kernels.pack(&a, &weight, begin, end, packed.data()); });
  parallel_for(parallel, a.N * a.groups, pair_grain(a), [&](int64_t begin, int64_t end) {
    Space space(kernels.space_bytes(&a));
    kernels.forward(&a, packed.data(), &ends, begin, end, space.data());
  });
}

void convolution_backward_weight(const ConvolutionArgs& a, const void* grad, void* out, Parallel parallel) {
  const ConvolutionKernels& kernels = convolution_kernels(a.type);
  parallel_for(parallel, a.groups, grain_of(a.N * operations(a) / 16), [&](int64_t begin, int64_t end) {
    Space space(kernels.space_bytes(&a));
    kernels.backward_weight(&a, grad, out, begin, end, space.data());
  });
}

}  // namespace d2v
