// Sums over a warp or a block, always in the same order, and statistics that are merged.
#pragma once
#include "device.h"

namespace d2v {

// Over the lanes that differ in the bits FIRST and above.
template <int FIRST, class A>
__device__ __forceinline__ A sum_lanes(A v) {
#pragma unroll
  for (int offset = FIRST; offset < 32; offset *= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

// Over a block of WARPS warps; `scratch` holds WARPS numbers, and may be used again at once.
template <int WARPS, class A>
__device__ __forceinline__ A sum_block(A v, A* scratch) {
  v = sum_lanes<1>(v);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  A total = 0;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) total += scratch[w];
  __syncthreads();
  return total;
}

// Mean and sum of squared distances from it of `before` numbers, to which those of `count` numbers are added (Chan,
// Golub and LeVeque 1979); weight = count / (before + count).
template <class A>
__device__ __forceinline__ void merge_moments(A* mean, A* m2, A before, A weight, A other_mean, A other_m2) {
  const A delta = other_mean - *mean;
  *mean += delta * weight;
  *m2 += other_m2 + delta * delta * (before * weight);
}

// Sum of squared distances from the mean, of `count` numbers whose distances from a pivot add up to `sum`, their
// squares to `squares`; what the pivot is away from the mean costs digits only if it is many standard deviations. NaN
// stays.
template <class A>
__device__ __forceinline__ A squares_about_mean(A sum, A squares, A mean_distance) {
  const A m2 = squares - sum * mean_distance;
  return m2 < A{0} ? A{0} : m2;
}

}  // namespace d2v
