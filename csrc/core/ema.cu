// update_ema on the GPU: a block per chunk, whatever tensor it belongs to.
//
// Bytes moved are the least there can be: average read and written, source read, copy written. The wider one of
// average and source is accessed 16 bytes at a time and the other ones element for element beside it, so that the
// threads of a warp always touch one unbroken piece of memory. Every element is computed by the same fused operation
// on every path, so that a result does not depend on alignment.
#include <string.h>

#include "ema.h"
#include "ema_table.h"
#include "vec.cuh"

namespace d2v {
namespace {

constexpr int kThreads = 256;

// Accesses of each operand that a thread has in flight: fewer where an access holds more elements to compute.
template <int N>
constexpr int kUnroll = N == 8 ? 2 : 4;

// A list short enough for kernel parameters (32,764 bytes, since CUDA 12.1).
constexpr int kListTensors = 864;
struct EmaList {
  void* average[kListTensors];
  const void* source[kListTensors];
  void* copy[kListTensors];
  int64_t count[kListTensors];
  int32_t first_block[kListTensors];
  int8_t copy_type[kListTensors];
  int32_t tensors;

  __device__ __forceinline__ EmaChunk chunk(int32_t block, int average_bytes, int source_bytes) const {
    int32_t i = 0;
    for (int32_t end = tensors; end - i > 1;) {  // the last tensor that begins at this block or before it
      const int32_t middle = (i + end) / 2;
      (first_block[middle] <= block ? i : end) = middle;
    }
    const DType type = static_cast<DType>(copy_type[i]);
    const int64_t begin = static_cast<int64_t>(block - first_block[i]) * kEmaDeviceChunk;
    const int64_t left = count[i] - begin;
    return {static_cast<char*>(average[i]) + begin * average_bytes,
            static_cast<const char*>(source[i]) + begin * source_bytes,
            type == kNone ? nullptr : static_cast<char*>(copy[i]) + begin * size_of(type),
            static_cast<int32_t>(left < kEmaDeviceChunk ? left : kEmaDeviceChunk), type};
  }
};
constexpr size_t kParameterBytes = 32764;
static_assert(sizeof(EmaList) + sizeof(double) + sizeof(void*) <= kParameterBytes, "the list must fit the parameters");

// A table in device memory.
struct EmaTable {
  const EmaChunk* chunks;
  __device__ __forceinline__ EmaChunk chunk(int32_t block, int, int) const {
    const EmaChunk c = in_global(chunks)[block];
    return {in_global(c.average), in_global(c.source), in_global(c.copy), c.count, c.copy_type};
  }
};

template <int N, class TC, class TA>
__device__ __forceinline__ void store_as(void* copy, int at, const Vec<TA, N>& average) {
  Vec<TC, N> out;
#pragma unroll
  for (int k = 0; k < N; ++k) out.v[k] = Narrow<TC>::from(widen(average.v[k]));
  store<N>(static_cast<TC*>(copy) + at, out);
}

// An fp64 copy of another type is rare: it is written one element at a time, which keeps the kernels small.
template <int N, class TA>
constexpr bool kWritesDouble = N == 1 || sizeof(TA) == sizeof(double);

template <int N, class TA>
__device__ __forceinline__ void store_copy(void* copy, DType type, int at, const Vec<TA, N>& average) {
  if (type == kNone) return;
  if (type == kBFloat16) return store_as<N, __nv_bfloat16>(copy, at, average);
  if (type == kFloat16) return store_as<N, __half>(copy, at, average);
  if (type == kFloat32) return store_as<N, float>(copy, at, average);
  if constexpr (kWritesDouble<N, TA>) store_as<N, double>(copy, at, average);
}

// Elements [begin, end) of a chunk, N at a time.
template <int N, class TA, class TS>
__device__ __forceinline__ void update_span(const EmaChunk& chunk, int begin, int end, Acc<TA> weight) {
  TA* const average = static_cast<TA*>(chunk.average);
  const TS* const source = static_cast<const TS*>(chunk.source);
  const bool update = weight != 0;
  for (int i = begin + static_cast<int>(threadIdx.x) * N; i < end; i += kUnroll<N> * kThreads * N) {
    Vec<TA, N> a[kUnroll<N>];
    Vec<TS, N> s[kUnroll<N>];
#pragma unroll
    for (int u = 0; u < kUnroll<N>; ++u) {
      const int at = i + u * kThreads * N;
      if (at < end) a[u] = load<N>(average + at);
      if (at < end && update) s[u] = load<N>(source + at);
    }
#pragma unroll
    for (int u = 0; u < kUnroll<N>; ++u) {
      const int at = i + u * kThreads * N;
      if (at >= end) break;
      if (update) {
#pragma unroll
        for (int k = 0; k < N; ++k) {
          const Acc<TA> before = widen(a[u].v[k]);
          a[u].v[k] = Narrow<TA>::from(multiply_add(weight, widen(s[u].v[k]) - before, before));
        }
        store<N>(average + at, a[u]);
      }
      store_copy(chunk.copy, chunk.copy_type, at, a[u]);
    }
  }
}

template <int N, class TA>
__device__ __forceinline__ bool is_copy_aligned(const EmaChunk& chunk, int at) {
  if (chunk.copy_type == kNone) return true;
  if (chunk.copy_type == kFloat64 && !kWritesDouble<N, TA>) return false;
  const int bytes = static_cast<int>(size_of(chunk.copy_type));
  const int access = bytes * N < kAccessBytes ? bytes * N : kAccessBytes;
  return (reinterpret_cast<uintptr_t>(chunk.copy) + at * bytes) % access == 0;
}

// Elements before the first place where all three addresses suit N elements; all of them where there is none.
template <int N, class TA, class TS>
__device__ __forceinline__ int count_leading(const EmaChunk& chunk) {
  const TA* average = static_cast<const TA*>(chunk.average);
  const int past = static_cast<int>(reinterpret_cast<uintptr_t>(average) % alignof(Vec<TA, N>) / sizeof(TA));
  const int lead = (N - past) % N;
  const bool fits = is_vec_aligned<N>(average + lead) &&
                    is_vec_aligned<N>(static_cast<const TS*>(chunk.source) + lead) &&
                    is_copy_aligned<N, TA>(chunk, lead);
  return fits && lead < chunk.count ? lead : chunk.count;
}

template <class TA, class TS, class Table>
__global__ void __launch_bounds__(kThreads)
    update_ema_kernel(D2V_PARAMETER(Table) table, double host_weight, const double* device_weight) {
  constexpr int N = kAccessBytes / (sizeof(TA) > sizeof(TS) ? sizeof(TA) : sizeof(TS));
  const Acc<TA> weight = static_cast<Acc<TA>>(device_weight ? *device_weight : host_weight);
  const EmaChunk chunk = table.chunk(static_cast<int32_t>(blockIdx.x), sizeof(TA), sizeof(TS));
  if (weight == 0 && chunk.copy_type == kNone) return;
  const int lead = count_leading<N, TA, TS>(chunk);
  const int rest = lead + (chunk.count - lead) / N * N;
  update_span<N, TA, TS>(chunk, lead, rest, weight);
#pragma unroll 1
  for (int part = 0; part < 2; ++part) {
    update_span<1, TA, TS>(chunk, part == 0 ? 0 : rest, part == 0 ? lead : chunk.count, weight);
  }
}

// ---- an average in two halves ----

struct alignas(4) Halves {
  uint16_t high;
  int16_t low;
};

__device__ __forceinline__ float join_halves(uint16_t high, int16_t low) {
  const uint32_t bits = (uint32_t{high} << 16) + static_cast<uint32_t>(int32_t{low});
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}
__device__ __forceinline__ Halves split_halves(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(x));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16 & 0x8000u) | 0x7fc0u), 0};
  const uint32_t high = (bits + 0x8000u) >> 16;
  return {static_cast<uint16_t>(high), static_cast<int16_t>(bits - (high << 16))};
}

// Elements [begin, end) of a chunk, N at a time: `average` has the upper halves, `copy` the lower ones.
template <int N, class TS>
__device__ __forceinline__ void update_split_span(const EmaChunk& chunk, int begin, int end, float weight) {
  uint16_t* const high = static_cast<uint16_t*>(chunk.average);
  int16_t* const low = static_cast<int16_t*>(chunk.copy);
  const TS* const source = static_cast<const TS*>(chunk.source);
  for (int i = begin + static_cast<int>(threadIdx.x) * N; i < end; i += kUnroll<N> * kThreads * N) {
    Vec<uint16_t, N> h[kUnroll<N>];
    Vec<int16_t, N> l[kUnroll<N>];
    Vec<TS, N> s[kUnroll<N>];
#pragma unroll
    for (int u = 0; u < kUnroll<N>; ++u) {
      const int at = i + u * kThreads * N;
      if (at >= end) break;
      h[u] = load<N>(high + at);
      l[u] = load<N>(low + at);
      s[u] = load<N>(source + at);
    }
#pragma unroll
    for (int u = 0; u < kUnroll<N>; ++u) {
      const int at = i + u * kThreads * N;
      if (at >= end) break;
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const float before = join_halves(h[u].v[k], l[u].v[k]);
        const Halves after = split_halves(multiply_add(weight, widen(s[u].v[k]) - before, before));
        h[u].v[k] = after.high;
        l[u].v[k] = after.low;
      }
      store<N>(high + at, h[u]);
      store<N>(low + at, l[u]);
    }
  }
}

template <class TS, class Table>
__global__ void __launch_bounds__(kThreads)
    update_split_ema_kernel(D2V_PARAMETER(Table) table, double host_weight, const double* device_weight) {
  constexpr int N = kAccessBytes / sizeof(uint16_t);
  const float weight = static_cast<float>(device_weight ? *device_weight : host_weight);
  if (weight == 0) return;
  const EmaChunk chunk = table.chunk(static_cast<int32_t>(blockIdx.x), sizeof(uint16_t), sizeof(TS));
  const uint16_t* const high = static_cast<const uint16_t*>(chunk.average);
  const int past = static_cast<int>(reinterpret_cast<uintptr_t>(high) % alignof(Vec<uint16_t, N>) / sizeof(uint16_t));
  const int first = (N - past) % N;
  const bool fits = is_vec_aligned<N>(high + first) && is_vec_aligned<N>(static_cast<int16_t*>(chunk.copy) + first) &&
                    is_vec_aligned<N>(static_cast<const TS*>(chunk.source) + first);
  const int lead = fits && first < chunk.count ? first : chunk.count;
  const int rest = lead + (chunk.count - lead) / N * N;
  update_split_span<N, TS>(chunk, lead, rest, weight);
#pragma unroll 1
  for (int part = 0; part < 2; ++part) {
    update_split_span<1, TS>(chunk, part == 0 ? 0 : rest, part == 0 ? lead : chunk.count, weight);
  }
}

struct Weight {
  double host;
  const double* device;
};

template <class TA, class TS, class Table>
cudaError_t launch_kernel(const Table& table, int64_t blocks, Weight weight, cudaStream_t stream) {
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  return launch(update_ema_kernel<TA, TS, Table>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, table,
                weight.host, weight.device);
}

template <class TS, class Table>
cudaError_t launch_split(const Table& table, int64_t blocks, Weight weight, cudaStream_t stream) {
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  return launch(update_split_ema_kernel<TS, Table>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream,
                table, weight.host, weight.device);
}

template <class Table>
cudaError_t launch_split_source(DType source, const Table& table, int64_t blocks, Weight weight, cudaStream_t stream) {
  switch (source) {
    case kFloat32:
      return launch_split<float>(table, blocks, weight, stream);
    case kBFloat16:
      return launch_split<__nv_bfloat16>(table, blocks, weight, stream);
    case kFloat16:
      return launch_split<__half>(table, blocks, weight, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <class TA, class Table>
cudaError_t launch_source(DType source, const Table& table, int64_t blocks, Weight weight, cudaStream_t stream) {
  switch (source) {
    case kFloat32:
      return launch_kernel<TA, float>(table, blocks, weight, stream);
    case kBFloat16:
      return launch_kernel<TA, __nv_bfloat16>(table, blocks, weight, stream);
    case kFloat16:
      return launch_kernel<TA, __half>(table, blocks, weight, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <class Table>
cudaError_t launch_types(DType average, DType source, const Table& table, int64_t blocks, Weight weight,
                         cudaStream_t stream) {
  if (average == kSplit) return launch_split_source(source, table, blocks, weight, stream);
  switch (average) {
    case kFloat32:
      return launch_source<float>(source, table, blocks, weight, stream);
    case kBFloat16:
      return launch_source<__nv_bfloat16>(source, table, blocks, weight, stream);
    case kFloat16:
      return launch_source<__half>(source, table, blocks, weight, stream);
    case kFloat64:
      if (source != kFloat64) return cudaErrorInvalidValue;
      return launch_kernel<double, double>(table, blocks, weight, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

// Adds a tensor to a list; the blocks of the list with it.
int64_t append(EmaList& list, int64_t blocks, const EmaTensor& t) {
  const int32_t i = list.tensors++;
  list.average[i] = t.average;
  list.source[i] = t.source;
  list.copy[i] = t.copy;
  list.count[i] = t.count;
  list.first_block[i] = static_cast<int32_t>(blocks);
  list.copy_type[i] = static_cast<int8_t>(t.copy ? t.copy_type : kNone);
  return blocks + count_ema_chunks(t);
}

}  // namespace

int d2v_launch_ema(const EmaChunk* chunks, const EmaGroup* groups, int64_t group_count, double weight,
                   const double* device_weight, int32_t device, void* stream) {
  if (group_count == 0) return cudaSuccess;
  const DeviceScope scope(device);
  if (scope.status != cudaSuccess) return scope.status;
  for (int64_t i = 0; i < group_count; ++i) {
    const EmaTable table = {chunks + groups[i].first};
    const cudaError_t error = launch_types(groups[i].average_type, groups[i].source_type, table, groups[i].count,
                                           {weight, device_weight}, static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

int d2v_launch_ema_list(const EmaTensor* tensors, int64_t count, double weight, const double* device_weight,
                        int32_t device, void* stream) {
  const std::vector<const EmaTensor*> order = sort_ema_tensors(tensors, count);
  if (order.empty()) return cudaSuccess;
  const DeviceScope scope(device);
  if (scope.status != cudaSuccess) return scope.status;
  EmaList list;
  for (size_t i = 0; i < order.size();) {
    const EmaTensor& first = *order[i];
    int64_t blocks = 0;
    list.tensors = 0;
    while (i < order.size() && list.tensors < kListTensors && is_same_group(first, *order[i])) {
      blocks = append(list, blocks, *order[i++]);
    }
    const cudaError_t error = launch_types(first.average_type, first.source_type, list, blocks, {weight, device_weight},
                                           static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

const char* d2v_cuda_error_text(int code) { return error_text(static_cast<cudaError_t>(code)); }

}  // namespace d2v
