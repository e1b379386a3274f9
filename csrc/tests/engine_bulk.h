// Kernels for the engine's own tests: bulk copies and clusters. Each has switches for defects.
#pragma once
#include "../core/bulk.cuh"
#include "../core/vec.cuh"

namespace bulk_tests {
namespace {

constexpr int kSteps = 5, kTileRows = 4, kTiles = 2, kRowFloats = 32, kThreads = 64;
constexpr int kStepFloats = kTiles * kTileRows * kRowFloats;
constexpr int kTileBytes = kTileRows * kRowFloats * 4, kStepBytes = kTiles * kTileBytes;

struct BulkDefects {
  bool init = true, wait = true, barrier = true;
  int bytes = kStepBytes;  // expected
  int offset = 0;          // of the destination
  int steps = kSteps;
};

// Doubles kSteps samples of kTiles x kTileRows rows that pass through two buffers. A thread doubles numbers that
// another one has asked for.
__global__ void double_tiles(const d2v::TileMap& map, float* out, const BulkDefects& with) {
  D2V_DYNAMIC_SHARED(float, buffer);  // [2][kStepFloats], and a little more
  D2V_SHARED(d2v::CopyBarrier, arrived, [2]);
  const auto request = [&](int step) {
    if (step >= with.steps) return;
    d2v::expect_bytes(&arrived[step & 1], with.bytes);
    for (int i = 0; i < kTiles; ++i) {
      float* const to = buffer + (step & 1) * kStepFloats + i * kTileRows * kRowFloats + with.offset;
      d2v::copy_tile(to, &map, 0, i * kTileRows, step, &arrived[step & 1]);
    }
  };
  if (threadIdx.x == 0 && with.init) d2v::init_copies(arrived, 2);
  __syncthreads();
  if (threadIdx.x == 0) {
    request(0);
    request(1);
  }
  for (int step = 0; step < with.steps; ++step) {
    if (with.wait) d2v::wait_bytes(&arrived[step & 1], step / 2 & 1);
    for (int i = static_cast<int>(threadIdx.x); i < kStepFloats; i += kThreads) {
      out[step * kStepFloats + i] = 2 * buffer[(step & 1) * kStepFloats + i];
    }
    if (with.barrier) __syncthreads();
    if (threadIdx.x == 0) request(step + 2);
  }
}

struct ClusterDefects {
  bool barrier = true;  // between writing and reading
  bool stay = true;     // until the others have read
};

// Every block adds up what the blocks of its cluster have, in the order of their ranks.
__global__ void sum_cluster(const float* x, float* out, int ranks, const ClusterDefects& with) {
  D2V_SHARED(float, own, [kThreads]);
  const int i = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  own[threadIdx.x] = x[i];
  if (with.barrier) d2v::cluster_barrier();
  float total = 0;
  for (int r = 0; r < ranks; ++r) total += d2v::load_peer(&own[(threadIdx.x + 1) % kThreads], r);
  out[i] = total;
  if (with.stay) d2v::cluster_barrier();
}

// Without a barrier at its end a block may be done before another one looks.
__global__ void look_at_first_block(float* out) {
  D2V_SHARED(float, own, [1]);
  own[0] = 1;
  d2v::cluster_barrier();
  if (blockIdx.x > 0) d2v::cluster_barrier();
  out[blockIdx.x] = d2v::load_peer(&own[0], 0);
}

__global__ void look_outside_cluster(float* out) {
  D2V_SHARED(float, own, [1]);
  own[0] = 1;
  d2v::cluster_barrier();
  *out = d2v::load_peer(&own[0], 2);
}

__global__ void wait_for_no_cluster() { d2v::cluster_barrier(); }

// False unless the result is right.
bool run_tiles(const BulkDefects& with) {
  const std::unique_ptr<float[]> x(new float[kSteps * kStepFloats]), out(new float[kSteps * kStepFloats]());
  std::fill(x.get(), x.get() + kSteps * kStepFloats, 1.0f);
  const d2v::TileSource source = {x.get(),        kSteps, kTiles * kTileRows, kRowFloats,    kStepFloats * 4,
                                  kRowFloats * 4, 4,      kTileRows,          kRowFloats * 4};
  d2v::TileMap map;
  if (!d2v::describe_tiles(source, &map)) return false;
  d2v::launch(double_tiles, 1, kThreads, 2 * kStepBytes + 128, nullptr, map, out.get(), with);
  return std::all_of(out.get(), out.get() + with.steps * kStepFloats, [](float v) { return v == 2; });
}

// What lies beyond the tensor arrives as zeros; sizes and addresses that the driver refuses are refused.
bool run_edges() {
  const std::unique_ptr<float[]> x(new float[3 * kRowFloats]), out(new float[kSteps * kStepFloats]());
  std::fill(x.get(), x.get() + 3 * kRowFloats, 1.0f);
  d2v::TileSource source = {x.get(),        1, 3,         kRowFloats - 4, 3 * kRowFloats * 4,
                            kRowFloats * 4, 4, kTileRows, kRowFloats * 4};
  d2v::TileMap map;
  if (!d2v::describe_tiles(source, &map)) return false;
  d2v::launch(double_tiles, 1, kThreads, 2 * kStepBytes + 128, nullptr, map, out.get(), BulkDefects{});
  bool right = true;
  for (int i = 0; i < kSteps * kStepFloats; ++i) {
    const bool inside = i < 3 * kRowFloats && i % kRowFloats < kRowFloats - 4;
    right = right && out[static_cast<size_t>(i)] == (inside ? 2 : 0);
  }
  source.rows = 257;
  right = right && !d2v::describe_tiles(source, &map);
  source.rows = 4, source.time_stride = 8;
  right = right && !d2v::describe_tiles(source, &map);
  source.time_stride = 16, source.data = x.get() + 1;
  return right && !d2v::describe_tiles(source, &map);
}

bool run_clusters(unsigned ranks, const ClusterDefects& with) {
  const unsigned blocks = 2 * ranks, n = blocks * kThreads;
  const std::unique_ptr<float[]> x(new float[n]), out(new float[n]());
  for (unsigned i = 0; i < n; ++i) x[i] = static_cast<float>(i / kThreads + 1);
  const d2v::LaunchShape shape = {blocks, kThreads, 0, ranks};
  d2v::launch(sum_cluster, shape, nullptr, x.get(), out.get(), static_cast<int>(ranks), with);
  bool right = true;
  for (unsigned i = 0; i < n; ++i) {
    float sum = 0;
    for (unsigned r = 0; r < ranks; ++r) sum += static_cast<float>(i / kThreads / ranks * ranks + r + 1);
    right = right && out[i] == sum;
  }
  return right;
}

}  // namespace
}  // namespace bulk_tests
