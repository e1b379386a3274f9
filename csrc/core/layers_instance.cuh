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

// How a layer's statistics are made. 16-bit numbers: one pass over distances from a pivot, the sample's first time
// step, which is at most root(steps) standard deviations away from the mean: the variance loses a digit or two, of the
// eleven bits or fewer that the numbers have. Wider ones: the mean first, which then is the pivot.
template <class T>
constexpr bool kOnePass = sizeof(T) == 2;

// A block's sums for CHANNELS channels, and what comes of them.
template <class T, int CHANNELS, int WARPS>
struct alignas(16) TileMoments {
  float sums[2][WARPS][CHANNELS];  // of each warp: distances from the pivot, their squares
  float first[kOnePass<T> ? 1 : WARPS][CHANNELS];
  float pivot[CHANNELS];
  float mean[CHANNELS], scale[CHANNELS];  // of the layer, with its share of the average
};

// Leaves the sums over each warp's threads of the same channels; ends with a barrier.
template <class T, int V, int N, int WARPS>
__device__ __forceinline__ void share_sums(float (&sum)[N], float (&squares)[N], const float (&pivot)[N],
                                           TileMoments<T, V * N, WARPS>* moments) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    sum[n] = sum_lanes<V>(sum[n]);
    squares[n] = sum_lanes<V>(squares[n]);
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (lane < V) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      moments->sums[0][warp][lane * N + n] = sum[n];
      moments->sums[1][warp][lane * N + n] = squares[n];
      if (warp == 0) moments->pivot[lane * N + n] = pivot[n];
    }
  }
  __syncthreads();
}

// Of a channel, from what share_sums left: mean and sum of squared distances of `count` time steps.
template <class Moments>
__device__ __forceinline__ void block_moments(const Moments& moments, int channel, float count, float inverse,
                                              float* mean, float* m2) {
  float sum = 0, squares = 0;
#pragma unroll
  for (size_t w = 0; w < sizeof(moments.sums[0]) / sizeof(moments.sums[0][0]); ++w) {
    sum += moments.sums[0][w][channel];
    squares += moments.sums[1][w][channel];
  }
  const float distance = divide(sum, count, inverse);
  *mean = moments.pivot[channel] + distance;
  *m2 = squares_about_mean(sum, squares, distance);
}

// A block holds all time steps of V x 16 bytes of channels of one sample, two layers of them in shared memory: while
// the statistics of one are made, the next one arrives. A thread reads from shared memory what it copied there and,
// behind a barrier, the first time step; the barrier of the sums stands between reading a place and copying to it
// again. The average of the thread's elements stays in its registers.
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

  __device__ __forceinline__ Packed<T, N> read(int k, int i, unsigned thread) const {
    return load_packed<N>(reinterpret_cast<const T*>(stage + ((k & 1) * slots + i) * THREADS + thread));
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

template <class T, int V, int THREADS>
__global__ void __launch_bounds__(THREADS, 512 / THREADS)
    average_instance_kernel(D2V_PARAMETER(LayerList) list, D2V_PARAMETER(Output) out, uint32_t tiles, int slots) {
  using Tile = InstanceTile<T, V, THREADS>;
  constexpr int N = Tile::N;
  D2V_DYNAMIC_SHARED(unsigned char, stage);
  using Moments = TileMoments<T, V * N, Tile::kWarps>;
  D2V_SHARED(Moments, shared, [1]);
  Moments& moments = shared[0];
  const uint32_t local = blockIdx.x / tiles;
  const int64_t sample = list.first_sample + local, length = length_of(list, local, out.T);
  const int column = static_cast<int>(threadIdx.x) % V * N;
  const int64_t channel = int64_t{blockIdx.x - local * tiles} * V * N + column;
  const Tile tile = {list,    reinterpret_cast<Vec<T, N>*>(stage),           slots, sample,
                     channel, static_cast<int>(channel < out.C ? length : 0)};
  const float count = static_cast<float>(length > 0 ? length : 1), inverse = 1.0f / count;
  const float share = 1.0f / static_cast<float>(list.K), eps = static_cast<float>(out.eps);
  float total[kMaxSlots][N] = {};
  tile.copy_layer(0);
  tile.copy_layer(1);
#pragma unroll 1
  for (int k = 0; k < list.K; ++k) {
    wait_copies<1>();
    Packed<T, N> x[kMaxSlots];
    float pivot[N] = {}, sum[N] = {}, squares[N] = {}, wide[N];
    if constexpr (kOnePass<T>) {
      __syncthreads();
      if (tile.end > 0) widen(tile.read(k, 0, threadIdx.x % V), pivot);
    }
#pragma unroll
    for (int i = 0; i < kMaxSlots; ++i) {
      if (tile.time(i) >= tile.end) continue;
      x[i] = tile.read(k, i, threadIdx.x);
      widen(x[i], wide);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const float d = wide[n] - pivot[n];
        sum[n] += d;
        if (kOnePass<T>) squares[n] = multiply_add(d, d, squares[n]);
      }
    }
    if constexpr (!kOnePass<T>) {
      sum_groups<V, N, Tile::kWarps>(sum, moments.first);
#pragma unroll
      for (int n = 0; n < N; ++n) pivot[n] = divide(sum[n], count, inverse), sum[n] = 0;
#pragma unroll
      for (int i = 0; i < kMaxSlots; ++i) {
        if (tile.time(i) >= tile.end) continue;
        widen(x[i], wide);
#pragma unroll
        for (int n = 0; n < N; ++n) {
          const float d = wide[n] - pivot[n];
          sum[n] += d;
          squares[n] = multiply_add(d, d, squares[n]);
        }
      }
    }
    share_sums<T, V>(sum, squares, pivot, &moments);
    tile.copy_layer(k + 2);
    if (threadIdx.x < V * N) {
      float mean, m2;
      block_moments(moments, threadIdx.x, count, inverse, &mean, &m2);
      moments.mean[threadIdx.x] = mean;
      moments.scale[threadIdx.x] = share * reciprocal_root(m2 * inverse + eps);
    }
    __syncthreads();
    const Vec<float, N> mean = load<N>(&moments.mean[column]), scale = load<N>(&moments.scale[column]);
#pragma unroll
    for (int i = 0; i < kMaxSlots; ++i) {
      if (tile.time(i) >= tile.end) continue;
      widen(x[i], wide);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        total[i][n] = multiply_add(wide[n] - mean.v[n], scale.v[n], total[i][n]);
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
