// average_layers on the GPU: layers.cu, in the library d2v_cuda. Norms none, layer and instance.
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

// ---- launch choice: functions of shapes, types and what the device has ----

struct DeviceLimits {
  int64_t shared_bytes;  // that one block may have
  int multiprocessors;
};

// Instance norm. One read: a block holds a tile of a sample, `vectors` x 16 bytes of channels wide, `slots` rows of it
// in each of its threads / vectors groups, twice. Else two passes over the layers, statistics first.
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
