// Instance norm in one read by bulk copies, for GPUs that have them: a sample's time may be spread over the blocks of a
// cluster, so that samples beyond the reach of one block are read once, too. Bytes moved are K s + s_o an element, the
// fewest there can be (s of a layer, s_o of the output); time steps beyond a length are left out but for those of the
// box that it cuts.
#pragma once
#include "bulk.cuh"
#include "layers_instance.cuh"

namespace d2v {
namespace {

// Of the K layers.
struct TileMaps {
  TileMap map[kBulkLayers];
};

// How a launch cuts its samples: `tiles` of channels, `ranks` blocks in a cluster, of `steps` time steps each, which
// arrive in boxes of `rows`; `stages` layers are on chip at a time.
struct BulkGrid {
  uint32_t tiles;
  int ranks, steps, rows, stages;
};

__device__ __forceinline__ int clamp_steps(int64_t left, int most) {
  return left < 0 ? 0 : left < most ? static_cast<int>(left) : most;
}

#if defined(D2V_HAS_BULK)
// The part of a sample that a block holds: V x 16 bytes of channels of `end` valid time steps from `first` on. The
// average of a thread's elements stays in its registers, as in InstanceTile; the layer is read from shared memory each
// time it is needed, which leaves registers for more of it.
template <class T, int V>
struct BulkTile {
  static constexpr int N = kAccessBytes / sizeof(T), kGroups = kBulkThreads / V, kWarps = kBulkThreads / 32;
  static constexpr int kRowBytes = V * kAccessBytes;

  const TileMaps& maps;
  const BulkGrid& grid;
  unsigned char* const stages;
  CopyBarrier* const arrived;  // of each stage
  const int K, sample, first_channel, first, end;

  __device__ __forceinline__ int time(int i) const { return static_cast<int>(threadIdx.x) / V + i * kGroups; }
  __device__ __forceinline__ unsigned char* stage(int s) const { return stages + s * grid.steps * kRowBytes; }
  __device__ __forceinline__ const Vec<T, N>* row(int s, int i) const {
    return reinterpret_cast<const Vec<T, N>*>(stage(s) + time(i) * kRowBytes) + threadIdx.x % V;
  }

  // By one thread.
  __device__ __forceinline__ void request(int k, int s) const {
    if (k >= K) return;
    const int boxes = (end + grid.rows - 1) / grid.rows, bytes = grid.rows * kRowBytes;
    expect_bytes(&arrived[s], boxes * bytes);
#pragma unroll 1
    for (int i = 0; i < boxes; ++i) {
      copy_tile(stage(s) + i * bytes, &maps.map[k], first_channel, first + i * grid.rows, sample, &arrived[s]);
    }
  }

  // Sum over the time steps of f(element, n), n the place of the channel among the thread's.
  template <class F>
  __device__ __forceinline__ void add(int s, float (&sum)[N], F f) const {
#pragma unroll
    for (int i = 0; i < kBulkSlots; ++i) {
      if (time(i) >= end) continue;
      const Vec<T, N> x = *row(s, i);
#pragma unroll
      for (int n = 0; n < N; ++n) sum[n] = f(widen(x.v[n]), n, sum[n]);
    }
  }
};

// Moments of the block's channels, merged with those of the cluster's other blocks: in the order of time, so that all
// blocks get the same bits. `moments` has a place for every other layer: a block may write those of the next one while
// another still reads these.
template <int CHANNELS>
__device__ __forceinline__ void merge_cluster(const BulkGrid& grid, int64_t length, const float (*moments)[CHANNELS],
                                              float (*merged)[CHANNELS]) {
  cluster_barrier();
  if (threadIdx.x < CHANNELS) {
    float mean = 0, m2 = 0, seen = 0;
#pragma unroll 1
    for (int r = 0; r < grid.ranks; ++r) {
      const float count = static_cast<float>(clamp_steps(length - int64_t{r} * grid.steps, grid.steps));
      if (count == 0) break;
      const float other_mean = load_peer(&moments[0][threadIdx.x], r),
                  other_m2 = load_peer(&moments[1][threadIdx.x], r);
      merge_moments(&mean, &m2, seen, count / (seen + count), other_mean, other_m2);
      seen += count;
    }
    merged[0][threadIdx.x] = mean;
    merged[1][threadIdx.x] = m2;
  }
  __syncthreads();
}
#endif

template <class T, int V>
__global__ void __launch_bounds__(kBulkThreads, 2)
    average_bulk_kernel(D2V_PARAMETER(LayerList) list, D2V_PARAMETER(TileMaps) maps, D2V_PARAMETER(Output) out,
                        BulkGrid grid) {
#if defined(D2V_HAS_BULK)
  using Tile = BulkTile<T, V>;
  constexpr int N = Tile::N, kChannels = V * N;
  D2V_DYNAMIC_SHARED(unsigned char, stages);
  D2V_SHARED(float, scratch, [2][Tile::kWarps][kChannels]);
  D2V_SHARED(float, moments, [2][2][kChannels]);  // of every other layer: mean, squared distances
  D2V_SHARED(float, merged, [2][kChannels]);
  D2V_SHARED(CopyBarrier, arrived, [kBulkStages]);
  const int rank = static_cast<int>(blockIdx.x) % grid.ranks;
  const uint32_t part = blockIdx.x / grid.ranks, local = part / grid.tiles;
  const int64_t sample = list.first_sample + local, length = length_of(list, local, out.T);
  const int first_channel = static_cast<int>(part - local * grid.tiles) * kChannels;
  const int column = static_cast<int>(threadIdx.x) % V * N;
  const int64_t channel = first_channel + column;
  const int first = rank * grid.steps, end = clamp_steps(length - first, grid.steps);
  const Tile tile = {maps, grid, stages, arrived, list.K, static_cast<int>(sample), first_channel, first, end};
  const float inverse = 1.0f / static_cast<float>(length), eps = static_cast<float>(out.eps);
  const float here = static_cast<float>(end > 0 ? end : 1), inverse_here = 1.0f / here,
              share = 1.0f / static_cast<float>(list.K);
  if (threadIdx.x == 0) init_copies(arrived, grid.stages);
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll 1
    for (int s = 0; s < grid.stages; ++s) tile.request(s, s);
  }
  float total[kBulkSlots][N] = {};
  int stage = 0, parity = 0;
#pragma unroll 1
  for (int k = 0; k < list.K; ++k) {
    wait_bytes(&arrived[stage], parity);
    float mean[N] = {}, scale[N] = {};
    tile.add(stage, mean, [](float x, int, float sum) { return sum + x; });
    sum_groups<V, N, Tile::kWarps>(mean, scratch[0]);
    // After that barrier nobody reads the layer before this one any more.
    if (threadIdx.x == 0 && k > 0) tile.request(k - 1 + grid.stages, stage > 0 ? stage - 1 : grid.stages - 1);
#pragma unroll
    for (int n = 0; n < N; ++n) mean[n] = divide(mean[n], here, inverse_here);
    tile.add(stage, scale, [&](float x, int n, float sum) { return multiply_add(x - mean[n], x - mean[n], sum); });
    sum_groups<V, N, Tile::kWarps>(scale, scratch[1]);
    if (grid.ranks > 1) {
      if (threadIdx.x < V) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
          moments[k & 1][0][column + n] = mean[n];
          moments[k & 1][1][column + n] = scale[n];
        }
      }
      merge_cluster<kChannels>(grid, length, moments[k & 1], merged);
      const Vec<float, N> all_mean = load<N>(&merged[0][column]), all_m2 = load<N>(&merged[1][column]);
#pragma unroll
      for (int n = 0; n < N; ++n) mean[n] = all_mean.v[n], scale[n] = all_m2.v[n];
    }
#pragma unroll
    for (int n = 0; n < N; ++n) scale[n] = share * reciprocal_root(scale[n] * inverse + eps);
#pragma unroll
    for (int i = 0; i < kBulkSlots; ++i) {
      if (tile.time(i) >= end) continue;
      const Vec<T, N> x = *tile.row(stage, i);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        total[i][n] = multiply_add(widen(x.v[n]) - mean[n], scale[n], total[i][n]);
      }
    }
    if (++stage == grid.stages) stage = 0, parity ^= 1;
  }
  if (grid.ranks > 1) cluster_barrier();  // nobody leaves while its moments are read
  if (channel >= out.C) return;
#pragma unroll
  for (int i = 0; i < kBulkSlots; ++i) {
    const int64_t t = first + tile.time(i);
    if (tile.time(i) < grid.steps && t < out.T) store_result(out, (sample * out.T + t) * out.C + channel, total[i]);
  }
#endif
}

}  // namespace
}  // namespace d2v
