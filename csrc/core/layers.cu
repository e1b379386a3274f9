// average_layers on the GPU.
//
// Instance norm reads every layer once where a sample's time fits on the chip (layers_instance.cuh), else twice; layer
// norm and none read every row once (layers_rows.cuh). A norm of the average over another dimension than the layers'
// norm is a second step with the average, kept in fp32 (fp64 for fp64), as its only layer; it runs in place.
#include "layers_instance.cuh"
#include "layers_rows.cuh"

namespace d2v {
namespace {

constexpr int64_t kWorkspaceAlignment = 16;

DType acc_type(DType type) { return type == kFloat64 ? kFloat64 : kFloat32; }
bool norms_mean_apart(const LayersArgs& a) {
  return a.out_norm == kNormInstance || (a.out_norm == kNormLayer && a.norm == kNormInstance);
}
int64_t stats_bytes(const LayersArgs& a) {
  if (a.norm != kNormInstance && a.out_norm != kNormInstance) return 0;
  const int64_t layers = a.norm == kNormInstance ? a.K : 1;
  const int64_t bytes = 2 * a.B * layers * a.C * size_of(acc_type(a.type));
  return (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
}
int64_t mean_bytes(const LayersArgs& a) {
  const bool apart = norms_mean_apart(a) && a.out_type != acc_type(a.type);
  return apart ? a.B * a.T * a.C * size_of(acc_type(a.type)) : 0;
}

// 16-byte accesses of the layers are possible.
bool is_aligned(const LayersArgs& a) {
  const int64_t element = size_of(a.type);
  uint64_t joined = static_cast<uint64_t>(a.C * element) | reinterpret_cast<uintptr_t>(a.out);
  for (int64_t k = 0; k < a.K; ++k) {
    joined |= reinterpret_cast<uintptr_t>(a.layers[k]);
    if (a.B > 1) joined |= static_cast<uint64_t>(a.batch_stride[k] * element);
    if (a.T > 1) joined |= static_cast<uint64_t>(a.time_stride[k] * element);
  }
  return joined % kAccessBytes == 0;
}

LayerList list_of(const LayersArgs& a) {
  LayerList list{};
  list.K = static_cast<int32_t>(a.K);
  for (int64_t k = 0; k < a.K; ++k) {
    list.data[k] = a.layers[k];
    list.batch_stride[k] = a.batch_stride[k];
    list.time_stride[k] = a.time_stride[k];
  }
  return list;
}

// run(list, samples) for as many samples at a time as the list has lengths for and 32 bits have time steps.
template <class Run>
cudaError_t for_samples(const LayersArgs& a, Run run) {
  LayerList list = list_of(a);
  list.cut = a.lengths != nullptr;
  const int64_t steps = INT32_MAX / a.T, most = list.cut && kListSamples < steps ? kListSamples : steps;
  for (int64_t b = 0; b < a.B; b += most) {
    const int64_t samples = a.B - b < most ? a.B - b : most;
    list.first_sample = b;
    for (int64_t i = 0; list.cut && i < samples; ++i) list.length[i] = static_cast<int32_t>(a.lengths[b + i]);
    const cudaError_t error = run(list, samples);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <class... P>
cudaError_t launch_blocks(void (*kernel)(P...), int64_t blocks, int threads, int64_t shared_bytes, Stream on,
                          const typename AsIs<P>::type&... args) {
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const cudaError_t error = allow_shared(kernel, shared_bytes);
  if (error != cudaSuccess) return error;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)),
                static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(on.stream), args...);
}

Output output_of(const LayersArgs& a) { return {a.out, a.out_type, a.T, a.C, a.eps}; }

template <class T, int V, int THREADS>
cudaError_t launch_tile(const LayersArgs& a, const InstancePlan& plan, Stream on) {
  constexpr int64_t width = V * kAccessBytes / sizeof(T);
  const int64_t tiles = (a.C + width - 1) / width;
  return for_samples(a, [&](const LayerList& list, int64_t samples) {
    return launch_blocks(average_instance_kernel<T, V, THREADS>, samples * tiles, THREADS, plan.shared_bytes, on, list,
                         output_of(a), static_cast<uint32_t>(tiles), plan.slots);
  });
}

template <class T>
cudaError_t launch_one_read(const LayersArgs& a, const InstancePlan& plan, Stream on) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return cudaErrorInvalidValue;
  } else {
    if (plan.threads == 256) {
      return plan.vectors == 8 ? launch_tile<T, 8, 256>(a, plan, on) : launch_tile<T, 4, 256>(a, plan, on);
    }
    return plan.vectors == 8 ? launch_tile<T, 8, 512>(a, plan, on) : launch_tile<T, 4, 512>(a, plan, on);
  }
}

template <class T, int N>
cudaError_t launch_two_passes(const LayersArgs& a, void* workspace, Stream on) {
  using A = Acc<T>;
  A* const mean = static_cast<A*>(workspace);
  const ChannelStats<A> stats = {mean, mean + a.B * a.K * a.C};
  const int64_t tiles = (a.C + 32 * N - 1) / (32 * N), blocks = (a.T + kCombineRows - 1) / kCombineRows;
  return for_samples(a, [&](const LayerList& list, int64_t samples) {
    const int64_t items = samples * blocks * tiles;
    const cudaError_t error = launch_blocks(instance_stats_kernel<T, N>, samples * a.K * tiles, kPassThreads, 0, on,
                                            list, output_of(a), tiles, stats);
    if (error != cudaSuccess) return error;
    return launch_blocks(combine_instance_kernel<T, N>, (items + kPassWarps - 1) / kPassWarps, kPassThreads, 0, on,
                         list, output_of(a), tiles, blocks, items, stats);
  });
}

template <class T>
cudaError_t launch_instance(const LayersArgs& a, void* workspace, Stream on) {
  DeviceLimits limits{};
  const cudaError_t error = query_device(on.device, &limits.shared_bytes, &limits.multiprocessors);
  if (error != cudaSuccess) return error;
  const InstancePlan plan = plan_instance(a.B, a.T, a.C, a.type, is_aligned(a), limits);
  if (plan.one_read) return launch_one_read<T>(a, plan, on);
  return is_aligned(a) ? launch_two_passes<T, kAccessBytes / sizeof(T)>(a, workspace, on)
                       : launch_two_passes<T, 1>(a, workspace, on);
}

template <class T, int WARPS>
cudaError_t launch_row_groups(const LayersArgs& a, RowNorms norms, Stream on) {
  constexpr int groups = WARPS == 1 ? 8 : 1;
  return for_samples(a, [&](const LayerList& list, int64_t samples) {
    const int64_t rows = samples * a.T;
    return launch_blocks(average_rows_kernel<T, WARPS>, (rows + groups - 1) / groups, groups * 32 * WARPS, 0, on, list,
                         output_of(a), static_cast<uint32_t>(rows), norms);
  });
}

template <class T>
cudaError_t launch_rows(const LayersArgs& a, Stream on) {
  const RowNorms norms = {a.norm == kNormLayer, a.out_norm == kNormLayer};
  const int warps = plan_layer_rows(a.C, a.type, is_aligned(a));
  if constexpr (sizeof(T) < sizeof(double)) {
    if (warps == 1) return launch_row_groups<T, 1>(a, norms, on);
    if (warps == 4) return launch_row_groups<T, 4>(a, norms, on);
  }
  return for_samples(a, [&](const LayerList& list, int64_t samples) {
    return launch_blocks(average_long_rows_kernel<T>, samples * a.T, kBlockRowThreads, 0, on, list, output_of(a),
                         norms);
  });
}

// One step: a norm of the layers and, by rows, one of the average.
cudaError_t launch_step(const LayersArgs& a, void* workspace, Stream on) {
  switch (a.type) {
    case kFloat32:
      return a.norm == kNormInstance ? launch_instance<float>(a, workspace, on) : launch_rows<float>(a, on);
    case kBFloat16:
      return a.norm == kNormInstance ? launch_instance<__nv_bfloat16>(a, workspace, on)
                                     : launch_rows<__nv_bfloat16>(a, on);
    case kFloat16:
      return a.norm == kNormInstance ? launch_instance<__half>(a, workspace, on) : launch_rows<__half>(a, on);
    case kFloat64:
      return a.norm == kNormInstance ? launch_instance<double>(a, workspace, on) : launch_rows<double>(a, on);
    default:
      return cudaErrorInvalidValue;
  }
}

// The slots that a tile needs, or 0 if it does not fit.
int count_slots(int64_t T, int threads, int vectors, int64_t shared_bytes) {
  const int64_t groups = threads / vectors, slots = (T + groups - 1) / groups;
  // Beside the tile there are the sums of each warp: two of them, up to 64 channels of 4 bytes.
  const int64_t sums = 2 * (threads / 32) * 64 * 4;
  return slots <= kMaxSlots && 2 * slots * threads * kAccessBytes + sums <= shared_bytes ? static_cast<int>(slots) : 0;
}

}  // namespace

InstancePlan plan_instance(int64_t B, int64_t T, int64_t C, DType type, bool aligned, const DeviceLimits& limits) {
  const InstancePlan two_passes = {false, kPassThreads, 0, 0, 0};
  if (!aligned || type == kFloat64 || T == 0) return two_passes;
  // 8 vectors are a line of 128 bytes; half of that where the tiles would leave multiprocessors without work.
  const int64_t width = 8 * kAccessBytes / size_of(type), tiles = B * ((C + width - 1) / width);
  const bool narrow_first = tiles < limits.multiprocessors;
  for (const int vectors : {narrow_first ? 4 : 8, narrow_first ? 8 : 4}) {
    for (const int threads : {256, 512}) {
      const int slots = count_slots(T, threads, vectors, limits.shared_bytes);
      if (slots > 0) return {true, threads, vectors, slots, int64_t{2} * slots * threads * kAccessBytes};
    }
  }
  return two_passes;
}

int plan_layer_rows(int64_t C, DType type, bool aligned) {
  if (!aligned || type == kFloat64) return 0;
  return C <= 32 * kRowElements ? 1 : C <= 4 * 32 * kRowElements ? 4 : 0;
}

int64_t average_layers_workspace(const LayersArgs& a) { return stats_bytes(a) + mean_bytes(a); }

int launch_average_layers(const LayersArgs& a, void* workspace, Stream on) {
  if (a.B * a.T * a.C == 0) return cudaSuccess;
  if (a.K < 1 || a.K > kMaxLayers || a.T > INT32_MAX || a.norm == kNormBatch || a.out_norm == kNormBatch) {
    return cudaErrorInvalidValue;
  }
  const DeviceScope scope(on.device);
  if (scope.status != cudaSuccess) return scope.status;
  if (!norms_mean_apart(a)) return launch_step(a, workspace, on);
  LayersArgs first = a, second = a;
  first.out_norm = kNormNone;
  first.out_type = acc_type(a.type);
  if (mean_bytes(a) > 0) first.out = static_cast<char*>(workspace) + stats_bytes(a);
  const void* const mean = first.out;
  const int64_t batch_stride = a.T * a.C, time_stride = a.C;
  second.layers = &mean;
  second.batch_stride = &batch_stride;
  second.time_stride = &time_stride;
  second.K = 1;
  second.type = first.out_type;
  second.norm = a.out_norm;
  second.out_norm = kNormNone;
  const cudaError_t error = launch_step(first, workspace, on);
  return error != cudaSuccess ? error : launch_step(second, workspace, on);
}

}  // namespace d2v
