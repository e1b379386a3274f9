// Every kernel file on top of the engine, as the library d2v_emu.
#include "engine/engine.h"
// The engine comes first: a .cu file takes its names from it.
#include "../core/ema.cu"
#include "../core/layers.cu"
#include "../core/tokens.cu"

extern "C" {
// Order of threads and blocks from now on: 0 ascending, 1 descending, else a shuffle with this seed.
D2V_EXPORT void d2v_emu_set_order(uint64_t order) { d2v::engine::options().order = order; }

// What the device says of itself from now on: shared memory of a block, multiprocessors, blocks of a cluster (0: bulk
// copies neither).
D2V_EXPORT void d2v_emu_set_device(uint64_t shared_bytes, int32_t multiprocessors, int32_t cluster_blocks) {
  d2v::engine::options().shared_bytes = shared_bytes;
  d2v::engine::options().multiprocessors = multiprocessors;
  d2v::engine::options().cluster_blocks = cluster_blocks;
}
}
