// Statistics of every channel in two passes over the layers: instance norm of samples too long for the chip, and batch
// norm. Bytes moved are 2 K s + s_o an element (s of a layer, s_o of the output): batch statistics are not known before
// all of a layer has been read, and what a batch holds is more than the chip does. The second pass goes through the
// layers backwards, so that it begins with what the first one has left in the L2 cache.
#pragma once
#include "layers.cuh"

namespace d2v {
namespace {

constexpr int kPassThreads = 256, kPassWarps = kPassThreads / 32;
constexpr int kStatRows = 4;     // of a chunk, loaded before the first is needed
constexpr int kCombineRows = 4;  // of a thread

// Per (piece, layer, channel): mean, and the squared distances from it (`scale` of a sample that is one piece).
template <class A>
struct ChannelStats {
  A* mean;
  A* scale;
};

// A piece: `samples` samples whole, or `steps` time steps of one. `slices` pieces make up that many samples.
struct Pieces {
  int samples, steps, slices;
};
constexpr int kPieceRows = 256;  // of batch norm, about: the moments of that many rows are a hundredth of their bytes

// Sums of distances from a pivot, the mean of the first rows, and of their squares.
template <class T, int N>
struct ChannelMoments {
  using A = Acc<T>;
  A pivot[N] = {}, sum[N] = {}, squares[N] = {};
  int count = 0;

  template <int ROWS>
  __device__ __forceinline__ void add(const Packed<T, N> (&x)[ROWS]) {
    if (count == 0) {
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
        A wide[N];
        widen(x[i], wide);
#pragma unroll
        for (int n = 0; n < N; ++n) pivot[n] = multiply_add(wide[n], A{1} / ROWS, pivot[n]);
      }
    }
    count += ROWS;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      A wide[N];
      widen(x[i], wide);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const A d = wide[n] - pivot[n];
        sum[n] += d;
        squares[n] = multiply_add(d, d, squares[n]);
      }
    }
  }

  __device__ __forceinline__ void finish(int n, A inverse, A* mean, A* m2) const {
    const A distance = sum[n] * inverse;
    *mean = pivot[n] + distance;
    *m2 = squares_about_mean(sum[n], squares[n], distance);
  }
};

// A block per (piece, layer, 32 N channels); its warps take chunks of rows in turn and are merged in order. With
// `counts` the results are moments and the pieces' sizes, to be merged; without, each piece is a sample and the results
// are what the second pass takes.
template <class T, int N>
__global__ void __launch_bounds__(kPassThreads, 3)
    channel_stats_kernel(D2V_PARAMETER(LayerList) list, D2V_PARAMETER(Output) out, Pieces pieces, int samples,
                         int64_t tiles, ChannelStats<Acc<T>> stats, Acc<T>* counts) {
  using A = Acc<T>;
  constexpr int kTile = 32 * N;
  D2V_SHARED(A, means, [kPassWarps][kTile]);
  D2V_SHARED(A, m2s, [kPassWarps][kTile]);
  D2V_SHARED(int, rows_of, [kPassWarps]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t item = blockIdx.x / tiles, first = (blockIdx.x - item * tiles) * kTile, c = first + lane * N;
  const int64_t piece = item / list.K, group = piece / pieces.slices, slice = piece - group * pieces.slices;
  const int k = static_cast<int>(item - piece * list.K);
  const int64_t local = group * pieces.samples, step = slice * pieces.steps, left = samples - local;
  const int64_t whole = left < pieces.samples ? left : pieces.samples;
  // Short samples take a part of the warps each.
  int time_warps = kPassWarps;
  while (time_warps > 1 && time_warps / 2 * kStatRows >= pieces.steps) time_warps /= 2;
  const int64_t stride = list.time_stride[k];
  const int turn = time_warps * kStatRows;
  ChannelMoments<T, N> moments;
  for (int64_t i = warp / time_warps; i < whole; i += kPassWarps / time_warps) {
    const int64_t length = length_of(list, local + i, out.T) - step;
    const int end = length < pieces.steps ? static_cast<int>(length) : pieces.steps;
    int t = warp % time_warps * kStatRows;
    const T* from = element<T>(list, k, list.first_sample + local + i, step + t, c);
#pragma unroll 1
    for (; t + kStatRows <= end; t += turn, from += turn * stride) {
      Packed<T, N> x[kStatRows] = {};
#pragma unroll
      for (int j = 0; j < kStatRows; ++j) {
        if (c < out.C) x[j] = load_packed<N>(from + j * stride);
      }
      moments.add(x);
    }
#pragma unroll 1
    for (int j = 0; j < kStatRows && t + j < end; ++j) {
      Packed<T, N> x[1] = {};
      if (c < out.C) x[0] = load_packed<N>(from + j * stride);
      moments.add(x);
    }
  }
  const A inverse = A{1} / static_cast<A>(moments.count > 0 ? moments.count : 1);
#pragma unroll
  for (int n = 0; n < N; ++n) moments.finish(n, inverse, &means[warp][lane * N + n], &m2s[warp][lane * N + n]);
  if (lane == 0) rows_of[warp] = moments.count;
  __syncthreads();
  // Launches count samples from first_sample on, which is a whole number of pieces.
  const int64_t place = list.first_sample / pieces.samples * pieces.slices + piece;
  for (int j = threadIdx.x; j < kTile && first + j < out.C; j += kPassThreads) {
    A mean = 0, m2 = 0;
    int seen = 0;
    for (int w = 0; w < kPassWarps; ++w) {
      if (rows_of[w] == 0) continue;
      const A before = static_cast<A>(seen);
      seen += rows_of[w];
      merge_moments(&mean, &m2, before, static_cast<A>(rows_of[w]) / static_cast<A>(seen), means[w][j], m2s[w][j]);
    }
    const int64_t at = (place * list.K + k) * out.C + first + j;
    in_global(stats.mean)[at] = mean;
    if (counts) {
      in_global(stats.scale)[at] = m2;
      if (k == 0 && first + j == 0) in_global(counts)[place] = static_cast<A>(seen);
    } else {
      const A variance = m2 / static_cast<A>(seen > 0 ? seen : 1), share = A{1} / static_cast<A>(list.K);
      in_global(stats.scale)[at] = share * reciprocal_root(variance + static_cast<A>(out.eps));
    }
  }
}

// Merges the pieces of each of `channels` (layer, channel): a warp of the block takes a run of neighbouring pieces, and
// the warps are merged in order (Chan, Golub and LeVeque 1979). A block per 32 channels.
template <class A>
__global__ void __launch_bounds__(kPassThreads)
    merge_pieces_kernel(ChannelStats<A> pieces, const A* counts, int64_t piece_count, int64_t channels, A share, A eps,
                        ChannelStats<A> merged) {
  D2V_SHARED(A, means, [kPassWarps][32]);
  D2V_SHARED(A, m2s, [kPassWarps][32]);
  D2V_SHARED(A, sizes, [kPassWarps]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t channel = int64_t{blockIdx.x} * 32 + lane, run = (piece_count + kPassWarps - 1) / kPassWarps;
  const int64_t begin = warp * run, end = begin + run < piece_count ? begin + run : piece_count;
  A mean = 0, m2 = 0, seen = 0;
#pragma unroll 4
  for (int64_t p = begin; p < end; ++p) {
    const A count = in_global(counts)[p];
    if (count == 0 || channel >= channels) continue;
    const int64_t at = p * channels + channel;
    merge_moments(&mean, &m2, seen, count / (seen + count), in_global(pieces.mean)[at], in_global(pieces.scale)[at]);
    seen += count;
  }
  means[warp][lane] = mean;
  m2s[warp][lane] = m2;
  if (lane == 0) sizes[warp] = seen;
  __syncthreads();
  if (warp != 0 || channel >= channels) return;
  for (int w = 1; w < kPassWarps; ++w) {
    const A count = sizes[w];
    if (count == 0) continue;
    merge_moments(&mean, &m2, seen, count / (seen + count), means[w][lane], m2s[w][lane]);
    seen += count;
  }
  in_global(merged.mean)[channel] = mean;
  in_global(merged.scale)[channel] = share * reciprocal_root(m2 / (seen > 0 ? seen : A{1}) + eps);
}

// A warp per (sample, kCombineRows time steps, 32 N channels). The statistics of a sample lie `sample_stride` behind
// those of the one before; 0 where all samples have the same.
template <class T, int N>
__global__ void __launch_bounds__(kPassThreads)
    combine_channels_kernel(D2V_PARAMETER(LayerList) list, D2V_PARAMETER(Output) out, int64_t tiles,
                            int64_t time_blocks, int64_t count, ChannelStats<Acc<T>> stats, int64_t sample_stride) {
  using A = Acc<T>;
  const int64_t item = count - 1 - (int64_t{blockIdx.x} * kPassWarps + threadIdx.x / 32), rows = item / tiles;
  const int64_t c = ((item - rows * tiles) * 32 + threadIdx.x % 32) * N;
  if (item < 0 || c >= out.C) return;
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
    const int64_t at = sample * sample_stride + k * out.C + c;
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
