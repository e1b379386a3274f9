// Instance norm: statistics of every channel over the time of one sample.
#pragma once
#include "async.cuh"
#include "layers.cuh"

namespace d2v {
namespace {

// ---- one read ----

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
  using A = float;

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

  // Sums over all threads with this one's channels. Between two sums through the same scratch there is a barrier.
  __device__ __forceinline__ void sum_groups(A (&v)[N], A (*scratch)[V * N]) const {
#pragma unroll
    for (int n = 0; n < N; ++n) v[n] = sum_lanes<V>(v[n]);
    const int lane = threadIdx.x % 32, column = lane % V * N;
    if (lane < V) {
#pragma unroll
      for (int n = 0; n < N; ++n) scratch[threadIdx.x / 32][column + n] = v[n];
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < N; ++n) v[n] = 0;
#pragma unroll 2
    for (int w = 0; w < kWarps; ++w) {
      const Vec<A, N> part = load<N>(&scratch[w][column]);
#pragma unroll
      for (int n = 0; n < N; ++n) v[n] += part.v[n];
    }
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
  const float count = static_cast<float>(length), eps = static_cast<float>(out.eps);
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
    tile.sum_groups(mean, scratch[0]);
    tile.copy_layer(k + 2);
    reload(x);
#pragma unroll
    for (int n = 0; n < N; ++n) mean[n] /= count;
#pragma unroll
    for (int i = 0; i < kMaxSlots; ++i) {
      if (tile.time(i) >= tile.end) continue;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const float d = widen(x[i].v[n]) - mean[n];
        scale[n] = multiply_add(d, d, scale[n]);
      }
    }
    tile.sum_groups(scale, scratch[1]);
#pragma unroll
    for (int n = 0; n < N; ++n) scale[n] = share * reciprocal_root(scale[n] / count + eps);
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

// ---- two passes ----

constexpr int kPassThreads = 256, kPassWarps = kPassThreads / 32;
constexpr int kStatRows = 4;     // of a chunk: its statistics are made from registers in two passes, then merged
constexpr int kCombineRows = 4;  // of a thread

// (B, K, C) each.
template <class A>
struct ChannelStats {
  A* mean;
  A* scale;
};

template <class T, int N>
struct ChannelMoments {
  using A = Acc<T>;
  A mean[N] = {}, m2[N] = {};
  int count = 0;

  __device__ __forceinline__ void add_chunk(const Vec<T, N> (&x)[kStatRows], int rows) {
    const A inverse = A{1} / static_cast<A>(rows), before = static_cast<A>(count);
    count += rows;
    const A weight = static_cast<A>(rows) / static_cast<A>(count);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      A m = 0, s = 0;
#pragma unroll
      for (int i = 0; i < kStatRows; ++i) m += i < rows ? widen(x[i].v[n]) : A{0};
      m *= inverse;
#pragma unroll
      for (int i = 0; i < kStatRows; ++i) {
        const A d = i < rows ? widen(x[i].v[n]) - m : A{0};
        s = multiply_add(d, d, s);
      }
      merge_moments(&mean[n], &m2[n], before, weight, m, s);
    }
  }
};

// A block per (sample, layer, 32 N channels); its warps take chunks of time in turn and are merged in order.
template <class T, int N>
__global__ void __launch_bounds__(kPassThreads)
    instance_stats_kernel(D2V_PARAMETER(LayerList) list, D2V_PARAMETER(Output) out, int64_t tiles,
                          ChannelStats<Acc<T>> stats) {
  using A = Acc<T>;
  constexpr int kTile = 32 * N;
  D2V_SHARED(A, means, [kPassWarps][kTile]);
  D2V_SHARED(A, m2s, [kPassWarps][kTile]);
  D2V_SHARED(int, counts, [kPassWarps]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t item = blockIdx.x / tiles, first = (blockIdx.x - item * tiles) * kTile, c = first + lane * N;
  const int64_t local = item / list.K, sample = list.first_sample + local, length = length_of(list, local, out.T);
  const int k = static_cast<int>(item - local * list.K);
  ChannelMoments<T, N> moments;
  for (int64_t t = warp * kStatRows; t < length; t += kPassWarps * kStatRows) {
    Vec<T, N> x[kStatRows];
    const int rows = static_cast<int>(length - t < kStatRows ? length - t : kStatRows);
#pragma unroll
    for (int i = 0; i < kStatRows; ++i) {
      if (i < rows && c < out.C) x[i] = load<N>(element<T>(list, k, sample, t + i, c));
    }
    if (c < out.C) moments.add_chunk(x, rows);
  }
#pragma unroll
  for (int n = 0; n < N; ++n) {
    means[warp][lane * N + n] = moments.mean[n];
    m2s[warp][lane * N + n] = moments.m2[n];
  }
  if (lane == 0) counts[warp] = moments.count;
  __syncthreads();
  for (int j = threadIdx.x; j < kTile && first + j < out.C; j += kPassThreads) {
    A mean = 0, m2 = 0;
    int seen = 0;
    for (int w = 0; w < kPassWarps && counts[w] > 0; ++w) {
      const A before = static_cast<A>(seen);
      seen += counts[w];
      merge_moments(&mean, &m2, before, static_cast<A>(counts[w]) / static_cast<A>(seen), means[w][j], m2s[w][j]);
    }
    const int64_t at = (sample * list.K + k) * out.C + first + j;
    in_global(stats.mean)[at] = mean;
    const A variance = m2 / static_cast<A>(seen > 0 ? seen : 1);
    const A share = A{1} / static_cast<A>(list.K);
    in_global(stats.scale)[at] = share * reciprocal_root(variance + static_cast<A>(out.eps));
  }
}

// A warp per (sample, kCombineRows time steps, 32 N channels).
template <class T, int N>
__global__ void __launch_bounds__(kPassThreads)
    combine_instance_kernel(D2V_PARAMETER(LayerList) list, D2V_PARAMETER(Output) out, int64_t tiles,
                            int64_t time_blocks, int64_t count, ChannelStats<Acc<T>> stats) {
  using A = Acc<T>;
  const int64_t item = int64_t{blockIdx.x} * kPassWarps + threadIdx.x / 32, rows = item / tiles;
  const int64_t c = ((item - rows * tiles) * 32 + threadIdx.x % 32) * N;
  if (item >= count || c >= out.C) return;
  const int64_t local = rows / time_blocks, sample = list.first_sample + local, length = length_of(list, local, out.T);
  const int64_t t = (rows - local * time_blocks) * kCombineRows;
  A total[kCombineRows][N] = {};
#pragma unroll 1
  for (int k = 0; k < list.K; ++k) {
    Vec<T, N> x[kCombineRows];
#pragma unroll
    for (int i = 0; i < kCombineRows; ++i) {
      if (t + i < length) x[i] = load<N>(element<T>(list, k, sample, t + i, c));
    }
    const int64_t at = (sample * list.K + k) * out.C + c;
    const Vec<A, N> mean = load<N>(in_global(stats.mean) + at), scale = load<N>(in_global(stats.scale) + at);
#pragma unroll
    for (int i = 0; i < kCombineRows; ++i) {
      if (t + i >= length) continue;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        total[i][n] = multiply_add(widen(x[i].v[n]) - mean.v[n], scale.v[n], total[i][n]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kCombineRows; ++i) {
    if (t + i < out.T) store_result(out, (sample * out.T + t + i) * out.C + c, total[i]);
  }
}

}  // namespace
}  // namespace d2v
