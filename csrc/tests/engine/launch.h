// A launch: the blocks of a grid one after the other, in an order that depends on the seed.
#pragma once
#include <algorithm>
#include <map>
#include <memory>
#include <mutex>

#include "bulk.h"

namespace d2v::engine {

// Blocks of this thread, as many as a cluster needs.
inline Block& this_thread_block(size_t number = 0) {
  static thread_local std::vector<std::unique_ptr<Block>> blocks;
  while (blocks.size() <= number) blocks.push_back(std::make_unique<Block>());
  return *blocks[number];
}

// cluster: neighbouring blocks along x that run at once.
struct LaunchShape {
  dim3 grid, block;
  size_t shared_bytes;
  unsigned cluster;
};

inline void check_launch(const LaunchShape& shape) {
  const dim3 grid = shape.grid, block = shape.block;
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  const bool grid_fits =
      grid.x >= 1 && grid.y >= 1 && grid.z >= 1 && grid.x <= 0x7fffffffu && grid.y <= 65535u && grid.z <= 65535u;
  const bool block_fits = threads >= 1 && threads <= static_cast<uint64_t>(kMaxThreads) && block.z <= 64;
  const bool cluster_fits = shape.cluster >= 1 && shape.cluster <= kMaxCluster && grid.x % shape.cluster == 0;
  if (!grid_fits || !block_fits || !cluster_fits || shape.shared_bytes > kMaxShared) {
    throw std::runtime_error("invalid launch: a grid of (" + std::to_string(grid.x) + "," + std::to_string(grid.y) +
                             "," + std::to_string(grid.z) + ") blocks of " + std::to_string(threads) +
                             " threads with " + std::to_string(shape.shared_bytes) +
                             " bytes of shared memory, in clusters of " + std::to_string(shape.cluster));
  }
}

// Dynamic shared memory that kernels were allowed, by their addresses.
struct AllowedShared {
  std::mutex mutex;
  std::map<const void*, size_t> bytes;
};
inline AllowedShared& allowed_shared() {
  static AllowedShared allowed;
  return allowed;
}

// A kernel that was not allowed more has 48 KiB for static and dynamic variables together. What it declares is known
// once a block has run.
inline void check_shared(const void* kernel, size_t dynamic) {
  const size_t total = this_thread_block().shared_bytes();
  constexpr size_t kWithoutAsking = 48 * 1024;
  AllowedShared& allowed = allowed_shared();
  const std::lock_guard<std::mutex> lock(allowed.mutex);
  const auto found = allowed.bytes.find(kernel);
  const bool fits = found == allowed.bytes.end() ? total <= kWithoutAsking : dynamic <= found->second;
  if (fits) return;
  throw std::runtime_error("invalid launch: " + std::to_string(dynamic) + " bytes of dynamic and " +
                           std::to_string(total - dynamic) + " of static shared memory that were not asked for");
}

// The blocks of one cluster: one goes on until all of its threads wait, then another one, in an order that depends on
// the seed, until all are done.
inline void run_cluster(uint3 first, unsigned size, size_t shared_bytes, const std::function<void()>& body) {
  Cluster cluster;
  for (unsigned rank = 0; rank < size; ++rank) cluster.blocks.push_back(&this_thread_block(rank));
  for (unsigned rank = 0; rank < size; ++rank) {
    cluster.blocks[rank]->reset(make_uint3(first.x + rank, first.y, first.z), &cluster);
    cluster.blocks[rank]->start(body);
  }
  current_block = cluster.blocks[0];
  cluster.blocks[0]->allocate_dynamic(shared_bytes);
  const auto stuck = [&](const Block* block) { return !block->is_done(); };
  try {
    for (bool goes_on = true; goes_on;) {
      goes_on = false;
      std::vector<int> order;
      arrange(order, static_cast<int>(size), cluster.blocks[0]->random);
      for (const int rank : order) {
        if (!cluster.blocks[static_cast<size_t>(rank)]->can_run()) continue;
        cluster.blocks[static_cast<size_t>(rank)]->resume();
        goes_on = true;
      }
    }
    const auto at = std::find_if(cluster.blocks.begin(), cluster.blocks.end(), stuck);
    if (at != cluster.blocks.end()) throw std::runtime_error((*at)->describe_deadlock());
  } catch (...) {
    for (Block* block : cluster.blocks) block->abandon_fibers();
    throw;
  }
}

inline void run_grid(const LaunchShape& shape, const std::function<void()>& body) {
  check_launch(shape);
  const dim3 grid = shape.grid;
  Block& first = this_thread_block();
  std::vector<int> order;
  {
    const Quiet quiet;
    for (unsigned i = 0; i < shape.cluster; ++i) this_thread_block(i).set_shape(shape.block);
    first.random = options().order * 0x9e3779b97f4a7c15u + 1;
    grid_shape = grid;
    block_shape = shape.block;
    arrange(order, static_cast<int>(grid.x / shape.cluster), first.random);
  }
  for (unsigned i = 0; i < shape.cluster; ++i) this_thread_block(i).begin_grid();
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (const int x : order) {
        const Quiet quiet;
        block_index = make_uint3(static_cast<unsigned>(x) * shape.cluster, y, z);
        if (shape.cluster == 1) {
          first.run(body, shape.shared_bytes);
        } else {
          run_cluster(block_index, shape.cluster, shape.shared_bytes, body);
        }
      }
    }
  }
  for (unsigned i = 0; i < shape.cluster; ++i) this_thread_block(i).end_grid();
}

template <class T>
struct AsIs {
  using type = T;
};

// Runs the kernel before it returns. Parameters are converted once, as for <<<>>>.
template <class... P>
cudaError_t launch(void (*kernel)(P...), const LaunchShape& shape, cudaStream_t /*stream*/,
                   const typename AsIs<P>::type&... args) {
  run_grid(shape, [&] { kernel(args...); });
  check_shared(reinterpret_cast<const void*>(kernel), shape.shared_bytes);
  return cudaSuccess;
}
template <class... P>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   const typename AsIs<P>::type&... args) {
  return launch(kernel, LaunchShape{grid, block, shared_bytes, 1}, stream, args...);
}

// There is one device, the CPU.
struct DeviceScope {
  explicit DeviceScope(int) {}
  cudaError_t status = cudaSuccess;
};

template <class... P>
cudaError_t allow_shared(void (*kernel)(P...), int64_t bytes) {
  AllowedShared& allowed = allowed_shared();
  const std::lock_guard<std::mutex> lock(allowed.mutex);
  if (bytes > 0) allowed.bytes[reinterpret_cast<const void*>(kernel)] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

inline cudaError_t query_device(int, int64_t* shared_bytes, int* multiprocessors) {
  *shared_bytes = static_cast<int64_t>(options().shared_bytes);
  *multiprocessors = options().multiprocessors;
  return cudaSuccess;
}

inline cudaError_t query_clusters(int, int* blocks) {
  *blocks = options().cluster_blocks;
  return cudaSuccess;
}

inline const char* error_text(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "invalid argument" : "error of the engine";
}

}  // namespace d2v::engine
