// average_layers on the GPU.
//
// Instance norm reads every layer once where a sample's time fits on the chip (layers_bulk.cuh, layers_instance.cuh),
// else twice, as batch norm does (layers_channels.cuh); layer norm and none read every row once (layers_rows.cuh). A
// norm of the average over another dimension than the layers' norm is a second step with the average, kept in fp32
// (fp64 for fp64), as its only layer; it runs in place.
#include <atomic>

#include "layers_bulk.cuh"
#include "layers_channels.cuh"
#include "layers_instance.cuh"
#include "layers_rows.cuh"

namespace d2v {
namespace {

constexpr int64_t kWorkspaceAlignment = 16;

std::atomic<int32_t> cluster_limit{-1};

DType acc_type(DType type) { return type == kFloat64 ? kFloat64 : kFloat32; }
bool is_over_time(Norm norm) { return norm == kNormInstance || norm == kNormBatch; }
bool norms_mean_apart(const LayersArgs& a) {
  return is_over_time(a.out_norm) || (a.out_norm == kNormLayer && is_over_time(a.norm));
}

// Memory of the statistics of a norm of K layers: the pieces' moments, what they are merged to, the pieces' sizes.
struct StatsPlan {
  Pieces pieces;
  int64_t piece_count, stats, merged;  // numbers of each of the two kinds; merged: 0 where each piece is a sample
};
StatsPlan plan_stats(const LayersArgs& a, Norm norm, int64_t K) {
  if (norm == kNormInstance) return {{1, static_cast<int>(a.T), 1}, a.B, a.B * K * a.C, 0};
  int samples = 1, slices = 1;
  while (samples < kListSamples && 2 * samples * a.T <= kPieceRows) samples *= 2;
  if (samples == 1) slices = static_cast<int>((a.T + kPieceRows - 1) / kPieceRows);
  const int steps = static_cast<int>((a.T + slices - 1) / slices);
  const int64_t count = (a.B + samples - 1) / samples * slices;
  return {{samples, steps, slices}, count, count * K * a.C, K * a.C};
}
int64_t stats_bytes(const LayersArgs& a, Norm norm, int64_t K) {
  if (!is_over_time(norm)) return 0;
  const StatsPlan plan = plan_stats(a, norm, K);
  const int64_t numbers = 2 * plan.stats + (plan.merged > 0 ? 2 * plan.merged + plan.piece_count : 0);
  const int64_t bytes = numbers * size_of(acc_type(a.type));
  return (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
}
// The two steps use the same memory, one after the other.
int64_t stats_bytes(const LayersArgs& a) {
  const int64_t layers = stats_bytes(a, a.norm, a.K), mean = stats_bytes(a, a.out_norm, 1);
  return layers > mean ? layers : mean;
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

// The layers can be described for bulk copies.
bool is_tiled(const LayersArgs& a) {
  constexpr int64_t kLongest = int64_t{1} << 40;
  bool fits = is_aligned(a) && a.B <= INT32_MAX && a.C <= INT32_MAX;
  for (int64_t k = 0; k < a.K; ++k) {
    const auto is_fine = [&](int64_t size, int64_t stride) {
      return size == 1 || (stride > 0 && stride * size_of(a.type) < kLongest);
    };
    fits = fits && is_fine(a.B, a.batch_stride[k]) && is_fine(a.T, a.time_stride[k]);
  }
  return fits;
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

// run(list, samples) for as many samples at a time as the list has lengths for and 32 bits have time steps; a multiple
// of `unit`, a power of two up to kListSamples.
template <class Run>
cudaError_t for_samples(const LayersArgs& a, Run run, int64_t unit = 1) {
  LayerList list = list_of(a);
  list.cut = a.lengths != nullptr;
  const int64_t steps = INT32_MAX / a.T, bound = list.cut && kListSamples < steps ? kListSamples : steps;
  const int64_t most = bound > unit ? bound / unit * unit : unit;
  for (int64_t b = 0; b < a.B; b += most) {
    const int64_t samples = a.B - b < most ? a.B - b : most;
    list.first_sample = b;
    for (int64_t i = 0; list.cut && i < samples; ++i) list.length[i] = static_cast<int32_t>(a.lengths[b + i]);
    const cudaError_t error = run(list, samples);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// `cluster`: blocks of one, which `blocks` is a multiple of.
template <class... P>
cudaError_t launch_clusters(void (*kernel)(P...), int64_t blocks, int threads, int64_t shared_bytes, int cluster,
                            Stream on, const typename AsIs<P>::type&... args) {
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const cudaError_t error = allow_shared(kernel, shared_bytes);
  if (error != cudaSuccess) return error;
  const LaunchShape shape = {dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)),
                             static_cast<size_t>(shared_bytes), static_cast<unsigned>(cluster)};
  return launch(kernel, shape, static_cast<cudaStream_t>(on.stream), args...);
}
template <class... P>
cudaError_t launch_blocks(void (*kernel)(P...), int64_t blocks, int threads, int64_t shared_bytes, Stream on,
                          const typename AsIs<P>::type&... args) {
  return launch_clusters(kernel, blocks, threads, shared_bytes, 1, on, args...);
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

// Fills what the kernel takes; false where a layer cannot be described.
bool describe_layers(const LayersArgs& a, const BulkPlan& plan, TileMaps* maps) {
  const int64_t element = size_of(a.type);
  for (int64_t k = 0; k < a.K; ++k) {
    // A stride over a single sample or time step means nothing; a valid one is wanted all the same.
    const int64_t time = a.T > 1 ? a.time_stride[k] : a.C, batch = a.B > 1 ? a.batch_stride[k] : a.T * time;
    const TileSource source = {a.layers[k],
                               a.B,
                               a.T,
                               a.C,
                               batch * element,
                               time * element,
                               static_cast<int>(element),
                               plan.rows,
                               plan.vectors * kAccessBytes};
    if (!describe_tiles(source, &maps->map[k])) return false;
  }
  return true;
}

template <class T, int V>
cudaError_t launch_bulk_tile(const LayersArgs& a, const BulkPlan& plan, const TileMaps& maps, Stream on) {
  constexpr int64_t width = V * kAccessBytes / sizeof(T);
  const BulkGrid grid = {static_cast<uint32_t>((a.C + width - 1) / width), plan.ranks, plan.steps, plan.rows,
                         plan.stages};
  return for_samples(a, [&](const LayerList& list, int64_t samples) {
    return launch_clusters(average_bulk_kernel<T, V>, samples * grid.tiles * plan.ranks, kBulkThreads,
                           plan.shared_bytes, plan.ranks, on, list, maps, output_of(a), grid);
  });
}

template <class T>
cudaError_t launch_bulk(const LayersArgs& a, const BulkPlan& plan, const TileMaps& maps, Stream on) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return cudaErrorInvalidValue;
  } else {
    return plan.vectors == 8 ? launch_bulk_tile<T, 8>(a, plan, maps, on) : launch_bulk_tile<T, 4>(a, plan, maps, on);
  }
}

template <class T, int N>
cudaError_t launch_two_passes(const LayersArgs& a, void* workspace, Stream on) {
  using A = Acc<T>;
  const StatsPlan plan = plan_stats(a, a.norm, a.K);
  const bool merge = plan.merged > 0;
  A* const mean = static_cast<A*>(workspace);
  A* const total = mean + 2 * plan.stats;
  const ChannelStats<A> stats = {mean, mean + plan.stats};
  const ChannelStats<A> used = merge ? ChannelStats<A>{total, total + plan.merged} : stats;
  A* const counts = merge ? total + 2 * plan.merged : nullptr;
  const int64_t tiles = (a.C + 32 * N - 1) / (32 * N), blocks = (a.T + kCombineRows - 1) / kCombineRows;
  const auto measure = [&](const LayerList& list, int64_t samples) {
    const int64_t groups = (samples + plan.pieces.samples - 1) / plan.pieces.samples * plan.pieces.slices;
    return launch_blocks(channel_stats_kernel<T, N>, groups * a.K * tiles, kPassThreads, 0, on, list, output_of(a),
                         plan.pieces, static_cast<int>(samples), tiles, stats, counts);
  };
  const auto combine = [&](const LayerList& list, int64_t samples) {
    const int64_t items = samples * blocks * tiles;
    return launch_blocks(combine_channels_kernel<T, N>, (items + kPassWarps - 1) / kPassWarps, kPassThreads, 0, on,
                         list, output_of(a), tiles, blocks, items, used, merge ? int64_t{0} : a.K * a.C);
  };
  if (!merge) {
    return for_samples(a, [&](const LayerList& list, int64_t samples) {
      const cudaError_t error = measure(list, samples);
      return error != cudaSuccess ? error : combine(list, samples);
    });
  }
  cudaError_t error = for_samples(a, measure, plan.pieces.samples);
  if (error != cudaSuccess) return error;
  error = launch_blocks(merge_pieces_kernel<A>, (plan.merged + 31) / 32, kPassThreads, 0, on, stats, counts,
                        plan.piece_count, plan.merged, A{1} / static_cast<A>(a.K), static_cast<A>(a.eps), used);
  return error != cudaSuccess ? error : for_samples(a, combine);
}

template <class T>
cudaError_t launch_aligned_passes(const LayersArgs& a, void* workspace, Stream on) {
  return is_aligned(a) ? launch_two_passes<T, kAccessBytes / sizeof(T)>(a, workspace, on)
                       : launch_two_passes<T, 1>(a, workspace, on);
}

template <class T>
cudaError_t launch_instance(const LayersArgs& a, void* workspace, Stream on) {
  DeviceLimits limits{};
  cudaError_t error = query_device(on.device, &limits.shared_bytes, &limits.multiprocessors);
  if (error == cudaSuccess) error = query_clusters(on.device, &limits.cluster_blocks);
  if (error != cudaSuccess) return error;
  const int32_t limit = cluster_limit.load(std::memory_order_relaxed);
  if (limit >= 0 && limit < limits.cluster_blocks) limits.cluster_blocks = limit;
  const BulkPlan bulk = plan_bulk(a.B, a.T, a.C, a.K, a.type, is_tiled(a), limits);
  if (bulk.vectors > 0) {
    TileMaps maps;
    if (describe_layers(a, bulk, &maps)) return launch_bulk<T>(a, bulk, maps, on);
  }
  const InstancePlan plan = plan_instance(a.B, a.T, a.C, a.type, is_aligned(a), limits);
  return plan.one_read ? launch_one_read<T>(a, plan, on) : launch_aligned_passes<T>(a, workspace, on);
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

template <class T>
cudaError_t launch_type(const LayersArgs& a, void* workspace, Stream on) {
  if (a.norm == kNormInstance) return launch_instance<T>(a, workspace, on);
  return a.norm == kNormBatch ? launch_aligned_passes<T>(a, workspace, on) : launch_rows<T>(a, on);
}

// One step: a norm of the layers and, by rows, one of the average.
cudaError_t launch_step(const LayersArgs& a, void* workspace, Stream on) {
  switch (a.type) {
    case kFloat32:
      return launch_type<float>(a, workspace, on);
    case kBFloat16:
      return launch_type<__nv_bfloat16>(a, workspace, on);
    case kFloat16:
      return launch_type<__half>(a, workspace, on);
    case kFloat64:
      return launch_type<double>(a, workspace, on);
    default:
      return cudaErrorInvalidValue;
  }
}

// The slots that a tile needs, or 0 if it does not fit.
int count_slots(int64_t T, int threads, int vectors, int64_t shared_bytes) {
  const int64_t groups = threads / vectors, slots = (T + groups - 1) / groups;
  // Beside the tile there are the sums of each warp, two of them, and three more, up to 64 channels of 4 bytes.
  const int64_t sums = (2 * (threads / 32) + 3) * 64 * 4;
  return slots <= kMaxSlots && 2 * slots * threads * kAccessBytes + sums <= shared_bytes ? static_cast<int>(slots) : 0;
}

// Parts of a sample of `rows_most` time steps at most; vectors 0 where they are too long.
BulkPlan cut_sample(int64_t T, int vectors, int ranks, int64_t shared_bytes) {
  constexpr int kBoxRows = 64;
  const int64_t most = kBulkThreads / vectors * kBulkSlots, part = (T + ranks - 1) / ranks;
  if (part > most) return {};
  // Boxes of one size, an even number of rows (of 64 bytes, where places in shared memory are multiples of 128).
  const int boxes = static_cast<int>((part + kBoxRows - 1) / kBoxRows);
  const int rows = static_cast<int>((part + boxes - 1) / boxes + 1) / 2 * 2, steps = boxes * rows;
  // Beside the stages there are sums and moments: of 8 warps and 7 more, up to 64 channels of 4 bytes, and barriers.
  constexpr int64_t kBeside = (2 * kBulkThreads / 32 + 7) * 64 * 4 + 8 * kBulkStages + 128, kReserved = 1024;
  const int64_t stage = int64_t{steps} * vectors * kAccessBytes;
  // Two blocks on a multiprocessor, if each then has two stages or more; more than three hide nothing more.
  const int64_t shared = (shared_bytes - kReserved) / 2 - kBeside, alone = shared_bytes - kBeside;
  const int64_t fitting = shared / stage >= 2 ? shared / stage : alone / stage;
  const int stages = static_cast<int>(fitting < 3 ? fitting : 3);
  if (stages < 2) return {};
  return {vectors, ranks, steps, rows, stages, stages * stage};
}

}  // namespace

BulkPlan plan_bulk(int64_t B, int64_t T, int64_t C, int64_t K, DType type, bool tiled, const DeviceLimits& limits) {
  if (limits.cluster_blocks < 1 || !tiled || type == kFloat64 || T == 0 || K > kBulkLayers) return {};
  // From the best to the last: rows of a line of 128 bytes, no exchange between blocks.
  constexpr struct {
    int vectors, ranks;
  } kForms[] = {{8, 1}, {4, 1}, {8, 2}, {8, 4}, {8, 8}, {4, 8}};
  BulkPlan best{};
  int64_t most = 0;
  for (const auto& form : kForms) {
    const BulkPlan plan = cut_sample(T, form.vectors, form.ranks, limits.shared_bytes);
    if (plan.vectors == 0 || form.ranks > limits.cluster_blocks) continue;
    if (best.vectors > 0 && form.ranks > 1 && T < int64_t{form.ranks} * kSpreadSteps) continue;
    const int64_t width = form.vectors * kAccessBytes / size_of(type);
    const int64_t blocks = B * ((C + width - 1) / width) * form.ranks;
    if (blocks > most) best = plan, most = blocks;
    if (4 * blocks >= 3 * int64_t{limits.multiprocessors}) break;
  }
  return best;
}

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

void d2v_limit_clusters(int32_t blocks) { cluster_limit.store(blocks, std::memory_order_relaxed); }

int64_t average_layers_workspace(const LayersArgs& a) { return stats_bytes(a) + mean_bytes(a); }

int launch_average_layers(const LayersArgs& a, void* workspace, Stream on) {
  if (a.B * a.T * a.C == 0) return cudaSuccess;
  if (a.K < 1 || a.K > kMaxLayers || a.T > INT32_MAX) return cudaErrorInvalidValue;
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
