// Instance norm in one read: statistics of every channel over the time of one sample.
#pragma once
#include "async.cuh"
#include "layers.cuh"

namespace d2v {
namespace {

// Sums over all threads of a block whose channels are this one's: N of them in V places, one after the other in a warp.
// Between two sums through the same scratch there is a barrier.
template <int V, int N, int WARPS>
__device__ __forceinline__ void sum_groups(float (&v)[N], float (*scratch)[V * N]) {
  static_assert(WARPS * V % 32 == 0, "every lane has as many warps");
#pragma unroll
  for (int n = 0; n < N; ++n) v[n] = sum_lanes<V>(v[n]);
  const int lane = threadIdx.x % 32, column = lane % V * N;
  if (lane < V) {
#pragma unroll
    for (int n = 0; n < N; ++n) scratch[threadIdx.x / 32][column + n] = v[n];
  }
  __syncthreads();
  // The lanes of a place share the warps among them.
#pragma unroll
  for (int n = 0; n < N; ++n) v[n] = 0;
#pragma unroll
  for (int w = 0; w < WARPS; w += 32 / V) {
    const Vec<float, N> part = load<N>(&scratch[w + lane / V][column]);
#pragma unroll
    for (int n = 0; n < N; ++n) v[n] += part.v[n];
  }
#pragma unroll
  for (int n = 0; n < N; ++n) v[n] = sum_lanes<V>(v[n]);
}

// A block holds all time steps of V x 16 bytes of channels of one sample, two layers of them in shared memory: while
// the statistics of one are made, the next one arrives. A thread reads from shared memory what it copied there and
// nothing else, so the copies need no barrier of their own; the barrier in the first sum stands between reading a
// place and copying to it again. The average of the thread's elements stays in its registers.
//
// T is not converted once and kept, but at each use: reload() hides from the compiler that the numbers are the same
// ones, for which it would spend twice the registers.
template <class T, int V, int THREADS>
struct InstanceTile {
  static constexpr int N = kAccessBytes / sizeof(T), kGroups = THREADS / V, kWarps = THREADS / 32;
  const LayerList& list;
  Vec<T, N>* const stage;  // [2][slots][THREADS]
  const int slots;
  const int64_t sample, channel;
  const int end;  // valid time steps; 0 beyond the channels

  __device__ __forceinline__ int time(int i) const { return static_cast<int>(threadIdx.x) / V + i * kGroups; }
  __device__ __forceinline__ Vec<T, N>* place(int k, int i) const {
    return stage + ((k & 1) * slots + i) * THREADS + threadIdx.x;
  }

  __device__ __forceinline__ void copy_layer(int k) const {
    if (k < list.K) {
      const T* from = element<T>(list, k, sample, time(0), channel);
      const int64_t step = list.time_stride[k] * kGroups;
      Vec<T, N>* to = place(k, 0);
#pragma unroll
      for (int i = 0; i < kMaxSlots; ++i) {
        if (time(i) < end) copy_async(to, from);
        from += step;
        to += THREADS;
      }
    }
    commit_copies();
  }
};

template <class V, int COUNT>
__device__ __forceinline__ void reload([[maybe_unused]] V (&x)[COUNT]) {
#if defined(__CUDACC__)
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    uint4 w = *reinterpret_cast<uint4*>(&x[i]);
    asm volatile("" : "+r"(w.x), "+r"(w.y), "+r"(w.z), "+r"(w.w));
    *reinterpret_cast<uint4*>(&x[i]) = w;
  }
#endif
}

template <class T, int V, int THREADS>
__global__ void __launch_bounds__(THREADS, 512 / THREADS)
    average_instance_kernel(D2V_PARAMETER(LayerList) list, D2V_PARAMETER(Output) out, uint32_t tiles, int slots) {
  using Tile = InstanceTile<T, V, THREADS>;
  constexpr int N = Tile::N;
  D2V_DYNAMIC_SHARED(unsigned char, stage);
  D2V_SHARED(Acc<T>, scratch, [2][Tile::kWarps][V * N]);
  const uint32_t local = blockIdx.x / tiles;
  const int64_t sample = list.first_sample + local, length = length_of(list, local, out.T);
  const int64_t channel = int64_t{(blockIdx.x - local * tiles) * V + threadIdx.x % V} * N;
  const Tile tile = {list,    reinterpret_cast<Vec<T, N>*>(stage),           slots, sample,
                     channel, static_cast<int>(channel < out.C ? length : 0)};
  const float count = static_cast<float>(length), inverse = 1.0f / count, eps = static_cast<float>(out.eps);
  const float share = 1.0f / static_cast<float>(list.K);
  float total[kMaxSlots][N] = {};
  tile.copy_layer(0);
  tile.copy_layer(1);
#pragma unroll 1
  for (int k = 0; k < list.K; ++k) {
    wait_copies<1>();
    Vec<T, N> x[kMaxSlots];
    float mean[N] = {}, scale[N] = {};
#pragma unroll
    for (int i = 0; i < kMaxSlots; ++i) {
      if (tile.time(i) >= tile.end) continue;
      x[i] = *tile.place(k, i);
#pragma unroll
      for (int n = 0; n < N; ++n) mean[n] += widen(x[i].v[n]);
    }
    sum_groups<V, N, Tile::kWarps>(mean, scratch[0]);
    tile.copy_layer(k + 2);
    reload(x);
#pragma unroll
    for (int n = 0; n < N; ++n) mean[n] = divide(mean[n], count, inverse);
#pragma unroll
    for (int i = 0; i < kMaxSlots; ++i) {
      if (tile.time(i) >= tile.end) continue;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const float d = widen(x[i].v[n]) - mean[n];
        scale[n] = multiply_add(d, d, scale[n]);
      }
    }
    sum_groups<V, N, Tile::kWarps>(scale, scratch[1]);
#pragma unroll
    for (int n = 0; n < N; ++n) scale[n] = share * reciprocal_root(scale[n] * inverse + eps);
    reload(x);
#pragma unroll
    for (int i = 0; i < kMaxSlots; ++i) {
      if (tile.time(i) >= tile.end) continue;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        total[i][n] = multiply_add(widen(x[i].v[n]) - mean[n], scale[n], total[i][n]);
      }
    }
  }
  if (channel >= out.C) return;
#pragma unroll
  for (int i = 0; i < kMaxSlots; ++i) {
    if (tile.time(i) < out.T) store_result(out, (sample * out.T + tile.time(i)) * out.C + channel, total[i]);
  }
}

}  // namespace
}  // namespace d2v
