// A launch: the blocks of a grid one after the other, in an order that depends on the seed.
#pragma once
#include <memory>

#include "block.h"

namespace d2v::engine {

inline Block& this_thread_block() {
  static thread_local std::unique_ptr<Block> block = std::make_unique<Block>();
  return *block;
}

inline void check_launch(dim3 grid, dim3 block, size_t shared_bytes) {
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  const bool grid_fits =
      grid.x >= 1 && grid.y >= 1 && grid.z >= 1 && grid.x <= 0x7fffffffu && grid.y <= 65535u && grid.z <= 65535u;
  const bool block_fits = threads >= 1 && threads <= static_cast<uint64_t>(kMaxThreads) && block.z <= 64;
  if (!grid_fits || !block_fits || shared_bytes > kMaxShared) {
    throw std::runtime_error("invalid launch: a grid of (" + std::to_string(grid.x) + "," + std::to_string(grid.y) +
                             "," + std::to_string(grid.z) + ") blocks of " + std::to_string(threads) +
                             " threads with " + std::to_string(shared_bytes) + " bytes of shared memory");
  }
}

inline void run_grid(dim3 grid, dim3 shape, size_t shared_bytes, const std::function<void()>& body) {
  check_launch(grid, shape, shared_bytes);
  Block& block = this_thread_block();
  std::vector<int> order;
  {
    const Quiet quiet;
    block.set_shape(shape);
    block.random = options().order * 0x9e3779b97f4a7c15u + 1;
    grid_shape = grid;
    block_shape = shape;
    arrange(order, static_cast<int>(grid.x), block.random);
  }
  block.begin_grid();
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (const int x : order) {
        const Quiet quiet;
        block_index = make_uint3(x, y, z);
        block.run(body, shared_bytes);
      }
    }
  }
  block.end_grid();
}

template <class T>
struct AsIs {
  using type = T;
};

// Runs the kernel before it returns. Parameters are converted once, as for <<<>>>.
template <class... P>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t /*stream*/,
                   const typename AsIs<P>::type&... args) {
  run_grid(grid, block, shared_bytes, [&] { kernel(args...); });
  return cudaSuccess;
}

// There is one device, the CPU.
struct DeviceScope {
  explicit DeviceScope(int) {}
  cudaError_t status = cudaSuccess;
};

template <class... P>
cudaError_t allow_shared(void (*)(P...), int64_t) {
  return cudaSuccess;
}

inline cudaError_t query_device(int, int64_t* shared_bytes, int* multiprocessors) {
  *shared_bytes = static_cast<int64_t>(options().shared_bytes);
  *multiprocessors = options().multiprocessors;
  return cudaSuccess;
}

inline const char* error_text(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "invalid argument" : "error of the engine";
}

}  // namespace d2v::engine
