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
  __device__ __forceinline__ Packed<T, N> read(int s, int time) const {
    return load_packed<N>(reinterpret_cast<const T*>(stage(s) + time * kRowBytes) + threadIdx.x % V * N);
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

  // add(numbers of a time step, number of the slot) for each time step of the thread.
  template <class Add>
  __device__ __forceinline__ void for_steps(int s, Add add) const {
#pragma unroll
    for (int i = 0; i < kBulkSlots; ++i) {
      if (time(i) >= end) continue;
      float x[N];
      widen(read(s, time(i)), x);
      add(x, i);
    }
  }
};

// Moments of a channel of the block, merged with those of the cluster's other blocks: all blocks add them in the order
// of time and get the same bits. All threads come here; those of `owner` have moments, and leave with the merged ones.
// `moments` has a place for every other layer: a block may write those of the next one while another still reads these.
template <int CHANNELS>
__device__ __forceinline__ void merge_cluster(const BulkGrid& grid, int length, float inverse, bool owner,
                                              float (*moments)[CHANNELS], float* mean, float* m2) {
  const int channel = threadIdx.x;
  if (owner) moments[0][channel] = *mean, moments[1][channel] = *m2;
  cluster_barrier();
  if (!owner) return;
  // All reads are on the way before the first is needed.
  float means[kBulkRanks] = {}, m2s[kBulkRanks] = {}, counts[kBulkRanks] = {}, distance = 0;
#pragma unroll
  for (int r = 0; r < kBulkRanks; ++r) {
    if (r >= grid.ranks || r * grid.steps >= length) continue;
    means[r] = load_peer(&moments[0][channel], r);
    m2s[r] = load_peer(&moments[1][channel], r);
    counts[r] = static_cast<float>(clamp_steps(length - r * grid.steps, grid.steps));
  }
#pragma unroll
  for (int r = 1; r < kBulkRanks; ++r) {
    if (counts[r] > 0) distance = multiply_add(means[r] - means[0], counts[r] * inverse, distance);
  }
  *mean = means[0] + distance;
  *m2 = 0;
#pragma unroll
  for (int r = 0; r < kBulkRanks; ++r) {
    const float d = means[r] - *mean;
    if (counts[r] > 0) *m2 = multiply_add(counts[r] * d, d, *m2 + m2s[r]);
  }
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
  using Moments = TileMoments<T, kChannels, Tile::kWarps>;
  D2V_SHARED(Moments, shared, [1]);
  D2V_SHARED(float, peers, [2][2][kChannels]);  // of every other layer: mean, squared distances
  D2V_SHARED(CopyBarrier, arrived, [kBulkStages]);
  const int rank = static_cast<int>(blockIdx.x) % grid.ranks;
  const uint32_t part = blockIdx.x / grid.ranks, local = part / grid.tiles;
  const int64_t sample = list.first_sample + local, length = length_of(list, local, out.T);
  const int first_channel = static_cast<int>(part - local * grid.tiles) * kChannels;
  const int column = static_cast<int>(threadIdx.x) % V * N;
  const int64_t channel = first_channel + column;
  const int first = rank * grid.steps, end = clamp_steps(length - first, grid.steps);
  const Tile tile = {maps, grid, stages, arrived, list.K, static_cast<int>(sample), first_channel, first, end};
  Moments& moments = shared[0];
  const float inverse = 1.0f / static_cast<float>(length), eps = static_cast<float>(out.eps);
  const float here = static_cast<float>(end > 0 ? end : 1), inverse_here = 1.0f / here,
              share = 1.0f / static_cast<float>(list.K);
  if (threadIdx.x == 0) init_copies(arrived, grid.stages);
  __syncthreads();
  const bool courier = threadIdx.x == kBulkThreads - 32, owner = threadIdx.x < kChannels;
  if (courier) {
#pragma unroll 1
    for (int s = 0; s < grid.stages; ++s) tile.request(s, s);
  }
  float total[kBulkSlots][N] = {};
  int stage = 0, parity = 0;
#pragma unroll 1
  for (int k = 0; k < list.K; ++k) {
    wait_bytes(&arrived[stage], parity);
    float pivot[N] = {}, sum[N] = {}, squares[N] = {};
    if constexpr (kOnePass<T>) {
      if (end > 0) widen(tile.read(stage, 0), pivot);
    } else {
      tile.for_steps(stage, [&](const float (&x)[N], int) {
#pragma unroll
        for (int n = 0; n < N; ++n) pivot[n] += x[n];
      });
      sum_groups<V, N, Tile::kWarps>(pivot, moments.first);
#pragma unroll
      for (int n = 0; n < N; ++n) pivot[n] = divide(pivot[n], here, inverse_here);
    }
    tile.for_steps(stage, [&](const float (&x)[N], int) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const float d = x[n] - pivot[n];
        sum[n] += d;
        squares[n] = multiply_add(d, d, squares[n]);
      }
    });
    share_sums<T, V>(sum, squares, pivot, &moments);
    // After that barrier nobody reads the layer before this one any more.
    if (courier && k > 0) tile.request(k - 1 + grid.stages, stage > 0 ? stage - 1 : grid.stages - 1);
    float mean, m2;
    if (owner) block_moments(moments, threadIdx.x, here, inverse_here, &mean, &m2);
    if (grid.ranks > 1) {
      merge_cluster<kChannels>(grid, static_cast<int>(length), inverse, owner, peers[k & 1], &mean, &m2);
    }
    if (owner) {
      moments.mean[threadIdx.x] = mean;
      moments.scale[threadIdx.x] = share * reciprocal_root(m2 * inverse + eps);
    }
    __syncthreads();
    const Vec<float, N> centre = load<N>(&moments.mean[column]), scale = load<N>(&moments.scale[column]);
    tile.for_steps(stage, [&](const float (&x)[N], int i) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        total[i][n] = multiply_add(x[n] - centre.v[n], scale.v[n], total[i][n]);
      }
    });
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
