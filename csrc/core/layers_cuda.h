// average_layers on the GPU: layers.cu, in the library d2v_cuda.
#pragma once
#include "layers.h"
#include "stream.h"

namespace d2v {

// Layers travel in the kernel's parameters, lengths too (samples beyond kListSamples take another launch). So nothing
// is copied to the device, and a CUDA graph that captures the call keeps the lengths of that call.
constexpr int kMaxLayers = 128;
constexpr int kListSamples = 256;

// Launches on a stream of a device and returns at once: 0, or a cudaError_t. `workspace` is device memory, 16-byte
// aligned, of the size that average_layers_workspace tells.
int64_t average_layers_workspace(const LayersArgs& args);
int launch_average_layers(const LayersArgs& args, void* workspace, Stream on);

extern "C" {
// For benchmarks and tests: from now on instance norm is launched as on a device whose clusters have `blocks` blocks at
// most, 0: one without bulk copies. Below 0: as the device is.
D2V_EXPORT void d2v_limit_clusters(int32_t blocks);
}

// ---- launch choice: functions of shapes, types and what the device has ----

struct DeviceLimits {
  int64_t shared_bytes;  // that one block may have
  int multiprocessors;
  int cluster_blocks;  // of a cluster at most; 0: neither clusters nor bulk copies (before sm_90)
};

// Instance norm takes the first of three forms that can run. One read by bulk copies: a block holds `steps` time steps
// of a sample, `vectors` x 16 bytes of channels wide, for each of `stages` layers; they arrive in boxes of `rows` time
// steps; the `ranks` blocks of a cluster hold the sample together. vectors 0: not this form.
struct BulkPlan {
  int vectors, ranks, steps, rows, stages;
  int64_t shared_bytes;
};
constexpr int kBulkLayers = 32;  // that are described in the kernel's parameters
constexpr int kBulkThreads = 256;
constexpr int kBulkSlots = 8;  // rows of a thread: what two blocks' registers take without spilling
constexpr int kBulkStages = 4;
constexpr int kBulkRanks = 8;     // blocks of a cluster at most
constexpr int kSpreadSteps = 64;  // a sample that one block could hold is spread over more in parts of so many at least
// tiled: tiles of every layer can be described (describe_tiles).
BulkPlan plan_bulk(int64_t B, int64_t T, int64_t C, int64_t K, DType type, bool tiled, const DeviceLimits& limits);

// One read by a thread's own asynchronous copies: a block holds a tile of a sample, `vectors` x 16 bytes of channels
// wide, `slots` rows of it in each of its threads / vectors groups, twice. Else two passes over the layers, statistics
// first.
struct InstancePlan {
  bool one_read;
  int threads, vectors, slots;
  int64_t shared_bytes;
};
constexpr int kMaxSlots = 7;  // what the registers of two blocks of 256 threads take without spilling
InstancePlan plan_instance(int64_t B, int64_t T, int64_t C, DType type, bool aligned, const DeviceLimits& limits);

// Layer norm and none. `warps` that hold a row together; 0: a block per row that reads it again for each step.
int plan_layer_rows(int64_t C, DType type, bool aligned);

}  // namespace d2v
