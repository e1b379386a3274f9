// Layer norm and none: every time step by itself, K rows of it read once.
#pragma once
#include "layers.cuh"

namespace d2v {
namespace {

constexpr int kRowElements = 24;  // of a row, in one thread's registers
constexpr int kBlockRowThreads = 256;

struct RowNorms {
  bool layers, mean;  // layer norm of each layer, of the average
};

// A row of up to WARPS x 768 channels, spread over WARPS warps: N channels a thread, then the next N.
template <class T, int WARPS>
struct RowGroup {
  static constexpr int N = kAccessBytes / sizeof(T), kVectors = kRowElements / N, kThreads = 32 * WARPS;
  using A = float;
  float* const scratch;  // WARPS numbers
  const int64_t C;

  __device__ __forceinline__ int64_t channel(int i) const { return (threadIdx.x % kThreads + i * kThreads) * N; }

  __device__ __forceinline__ float sum(float v) const {
    if constexpr (WARPS == 1) return sum_lanes<1>(v);
    return sum_block<WARPS>(v, scratch);
  }

  __device__ __forceinline__ void read(const T* row, Packed<T, N> (&x)[kVectors]) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      x[i] = {};
      if (channel(i) < C) x[i] = load_packed<N>(row + channel(i));
    }
  }

  // Mean of the row, and factor / sqrt(variance + eps).
  __device__ __forceinline__ void measure(const float (&v)[kVectors][N], float eps, float factor, float* mean,
                                          float* scale) const {
    float total = 0, m2 = 0;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (channel(i) >= C) continue;
#pragma unroll
      for (int n = 0; n < N; ++n) total += v[i][n];
    }
    *mean = sum(total) / static_cast<float>(C);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (channel(i) >= C) continue;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const float d = v[i][n] - *mean;
        m2 = multiply_add(d, d, m2);
      }
    }
    *scale = factor * reciprocal_root(sum(m2) / static_cast<float>(C) + eps);
  }
};

// WARPS warps per row; while a layer is worked on, the rows of the next two are on the way.
template <class T, int WARPS>
__global__ void __launch_bounds__(WARPS == 1 ? 256 : 32 * WARPS, WARPS == 1 ? 2 : 16 / WARPS)
    average_rows_kernel(D2V_PARAMETER(LayerList) list, D2V_PARAMETER(Output) out, uint32_t rows, RowNorms norms) {
  using Group = RowGroup<T, WARPS>;
  constexpr int N = Group::N, kVectors = Group::kVectors, kGroups = WARPS == 1 ? 8 : 1;
  D2V_SHARED(float, scratch, [WARPS]);
  const Group group = {scratch, out.C};
  const uint32_t row = blockIdx.x * kGroups + threadIdx.x / Group::kThreads, steps = static_cast<uint32_t>(out.T);
  if (row >= rows) return;
  const uint32_t local = row / steps, t = row - local * steps;
  const int64_t sample = list.first_sample + local;
  const bool valid = t < length_of(list, local, out.T);
  const float share = 1.0f / static_cast<float>(list.K), eps = static_cast<float>(out.eps);
  float total[kVectors][N] = {};
  if (valid) {
    Packed<T, N> even[kVectors], odd[kVectors];
    // Layer k, which is in `from`, to which layer k + 2 is then on the way.
    const auto add_layer = [&](int k, Packed<T, N>(&from)[kVectors]) {
      float x[kVectors][N];
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        widen(from[i], x[i]);
        keep(x[i]);
      }
      if (k + 2 < list.K) group.read(element<T>(list, k + 2, sample, t, 0), from);
      float mean = 0, scale = share;
      if (norms.layers) group.measure(x, eps, share, &mean, &scale);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
#pragma unroll
        for (int n = 0; n < N; ++n) total[i][n] = multiply_add(x[i][n] - mean, scale, total[i][n]);
      }
    };
    group.read(element<T>(list, 0, sample, t, 0), even);
    if (list.K > 1) group.read(element<T>(list, 1, sample, t, 0), odd);
#pragma unroll 1
    for (int k = 0; k < list.K; k += 2) {
      add_layer(k, even);
      if (k + 1 < list.K) add_layer(k + 1, odd);
    }
    if (norms.mean) {
      float mean, scale;
      group.measure(total, eps, 1.0f, &mean, &scale);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
#pragma unroll
        for (int n = 0; n < N; ++n) total[i][n] = (total[i][n] - mean) * scale;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (group.channel(i) < out.C) store_result(out, (sample * out.T + t) * out.C + group.channel(i), total[i]);
  }
}

// ---- any row: a block each, element by element, every step reads the layers again ----

template <class T>
struct LongRow {
  using A = Acc<T>;
  const LayerList& list;
  const Output& out;
  const int64_t sample, t;
  A* const scratch;  // kBlockRowThreads / 32 numbers
  A* const mean;     // of each layer
  A* const scale;

  // Sum over the channels of f(c).
  template <class F>
  __device__ __forceinline__ A sum(F f) const {
    A total = 0;
    for (int64_t c = threadIdx.x; c < out.C; c += kBlockRowThreads) total += f(c);
    return sum_block<kBlockRowThreads / 32>(total, scratch);
  }

  // Two passes over the numbers f(c).
  template <class F>
  __device__ __forceinline__ void measure(F f, A factor, A* row_mean, A* row_scale) const {
    const A count = static_cast<A>(out.C), m = sum(f) / count;
    const A m2 = sum([&](int64_t c) { return (f(c) - m) * (f(c) - m); });
    *row_mean = m;
    *row_scale = factor * reciprocal_root(m2 / count + static_cast<A>(out.eps));
  }

  __device__ __forceinline__ A average(int64_t c) const {
    A total = 0;
    for (int k = 0; k < list.K; ++k) {
      total = multiply_add(widen(*element<T>(list, k, sample, t, c)) - mean[k], scale[k], total);
    }
    return total;
  }
};

template <class T>
__global__ void __launch_bounds__(kBlockRowThreads)
    average_long_rows_kernel(D2V_PARAMETER(LayerList) list, D2V_PARAMETER(Output) out, RowNorms norms) {
  using A = Acc<T>;
  D2V_SHARED(A, scratch, [kBlockRowThreads / 32]);
  D2V_SHARED(A, means, [kMaxLayers]);
  D2V_SHARED(A, scales, [kMaxLayers]);
  const uint32_t steps = static_cast<uint32_t>(out.T), local = blockIdx.x / steps, t = blockIdx.x - local * steps;
  const int64_t sample = list.first_sample + local;
  const bool valid = t < length_of(list, local, out.T);
  const LongRow<T> row = {list, out, sample, t, scratch, means, scales};
  const A share = A{1} / static_cast<A>(list.K);
  A mean = 0, scale = 1;
  if (valid) {
    for (int k = 0; k < list.K; ++k) {
      A m = 0, s = share;
      if (norms.layers) {
        row.measure([&](int64_t c) { return static_cast<A>(widen(*element<T>(list, k, sample, t, c))); }, share, &m,
                    &s);
      }
      if (threadIdx.x == 0) {
        means[k] = m;
        scales[k] = s;
      }
    }
    __syncthreads();
    if (norms.mean) row.measure([&](int64_t c) { return row.average(c); }, A{1}, &mean, &scale);
  }
  for (int64_t c = threadIdx.x; c < out.C; c += kBlockRowThreads) {
    const A result[1] = {valid ? (row.average(c) - mean) * scale : A{0}};
    store_result(out, (sample * out.T + t) * out.C + c, result);
  }
}

}  // namespace
}  // namespace d2v
