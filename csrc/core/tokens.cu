// Token rows on the GPU: copies by index, and sums of rows by the inverse of an index.
//
// A copied row is opaque bytes, 16 at a time where addresses and strides allow. The gradients gather, too: a first
// kernel inverts each row of the index (invert_index_kernel), then every output row reads the rows that belong to it
// and adds them in ascending order. So there are no float atomics and no zero-fill, and the same bits come out every
// time.
#include "tokens_copy.cuh"
#include "tokens_sum.cuh"

namespace d2v {
namespace {

uint64_t join(const void* data) { return reinterpret_cast<uintptr_t>(data); }
uint64_t join(const Rows3& rows, int64_t element) {
  return join(rows.data) | static_cast<uint64_t>(rows.stride0 * element) |
         static_cast<uint64_t>(rows.stride1 * element);
}

cudaStream_t stream_of(Stream on) { return static_cast<cudaStream_t>(on.stream); }

// A kernel with as many blocks as it needs.
template <class... P>
cudaError_t launch_blocks(void (*kernel)(P...), int64_t blocks, Stream on, const typename AsIs<P>::type&... args) {
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kTokenThreads), 0, stream_of(on), args...);
}

// visit(zero of the element type) for each type.
template <class Visit>
cudaError_t with_type(DType type, Visit visit) {
  switch (type) {
    case kFloat32:
      return visit(float{});
    case kBFloat16:
      return visit(__nv_bfloat16{});
    case kFloat16:
      return visit(__half{});
    case kFloat64:
      return visit(double{});
    default:
      return cudaErrorInvalidValue;
  }
}

template <class V>
cudaError_t launch_copy(const RowSource& source, void* out, int64_t rows, const RowPlan& plan, Stream on) {
  return launch_blocks(copy_rows_kernel<V>, plan.blocks, on, source, static_cast<char*>(out), rows, plan.vectors,
                       plan.lanes);
}

cudaError_t launch_copies(const RowSource& source, void* out, int64_t rows, const RowPlan& plan, Stream on) {
  switch (plan.width) {
    case 16:
      return launch_copy<uint4>(source, out, rows, plan, on);
    case 8:
      return launch_copy<uint2>(source, out, rows, plan, on);
    case 4:
      return launch_copy<uint32_t>(source, out, rows, plan, on);
    case 2:
      return launch_copy<uint16_t>(source, out, rows, plan, on);
    default:
      return cudaErrorInvalidValue;
  }
}

template <class T, int N>
cudaError_t launch_noise(const RowSource& source, const RestoreArgs& a, const RowPlan& plan, Stream on) {
  const NoiseKeys keys = {a.keys, a.key_stride, a.noise_std};
  return launch_blocks(restore_noise_kernel<T, N>, plan.blocks, on, source, keys, static_cast<T*>(a.out), a.N * a.T,
                       plan.vectors, plan.lanes);
}

template <class T>
bool is_wide(uint64_t joined, int64_t C) {
  return (joined | static_cast<uint64_t>(C) * sizeof(T)) % kAccessBytes == 0;
}

// Sums of every slot that the inverse has.
template <class T, int N>
cudaError_t launch_slots(const InverseRows& in, const SlotOutput<T>& out, int64_t samples, int64_t C, Stream on) {
  const int64_t count = samples * in.slots;
  if (count == 0) return cudaSuccess;
  return launch_blocks(sum_slots_kernel<T, N>, (count + kWarps - 1) / kWarps, on, in, out, count, C);
}

cudaError_t launch_sums(const InverseRows& in, int64_t samples, int64_t limit, int64_t visible, DType type, int64_t C,
                        void* kept, void* fill, Stream on) {
  const int64_t rows = samples * in.clones;
  if (rows * in.slots == 0) return cudaSuccess;
  if (in.columns >= kMaxIndexColumns) return cudaErrorInvalidValue;
  uint32_t* const inverse = const_cast<uint32_t*>(in.inverse);
  const cudaError_t error =
      launch_blocks(invert_index_kernel, rows, on, in.index, in.columns, in.slots, limit, inverse);
  if (error != cudaSuccess) return error;
  return with_type(type, [&](auto zero) {
    using T = decltype(zero);
    const uint64_t joined = join({in.grad, in.stride0, in.stride1}, sizeof(T)) | join(kept) | join(fill);
    const SlotOutput<T> out = {static_cast<T*>(kept), static_cast<T*>(fill), visible};
    return is_wide<T>(joined, C) ? launch_slots<T, kAccessBytes / sizeof(T)>(in, out, samples, C, on)
                                 : launch_slots<T, 1>(in, out, samples, C, on);
  });
}

template <class TI, class TO, int N>
cudaError_t launch_filled(const FilledRows& in, const SumPlan& plan, int64_t C, TO* out, Stream on) {
  const int64_t tiles = (C + 32 * N - 1) / (32 * N);
  if (tiles > 65535) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(plan.chunks), static_cast<unsigned>(tiles));
  return launch(sum_filled_kernel<TI, TO, N>, grid, dim3(kTokenThreads), 0, stream_of(on), in, plan.rows, C, out);
}

// The gradient of a vector fill: partial sums of chunks of rows, then their sum.
template <class T>
cudaError_t launch_fill_sum(const RestoreBackwardArgs& a, Acc<T>* partial, Stream on) {
  using A = Acc<T>;
  const SumPlan plan = plan_sum(a.N * a.T);
  if (plan.chunks > 0) {
    const FilledRows rows = {a.grad.data, a.grad.stride0, a.grad.stride1, a.T, a.N * a.T, a.restore, a.V};
    constexpr int N = kAccessBytes / sizeof(T);
    const cudaError_t error = is_wide<T>(join(a.grad, sizeof(T)), a.C)
                                  ? launch_filled<T, A, N>(rows, plan, a.C, partial, on)
                                  : launch_filled<T, A, 1>(rows, plan, a.C, partial, on);
    if (error != cudaSuccess) return error;
  }
  const FilledRows partials = {partial, 0, a.C, plan.chunks > 0 ? plan.chunks : 1, plan.chunks, {}, 0};
  return launch_filled<A, T, 1>(partials, {1, plan.chunks}, a.C, static_cast<T*>(a.fill), on);
}

int64_t inverse_bytes(int64_t rows, int64_t slots) { return (rows * slots * 4 + 15) / 16 * 16; }

int64_t slots_of(const RestoreBackwardArgs& a) { return a.V + (a.fill_rows > 0 ? a.fill_rows : 0); }

}  // namespace

RowPlan plan_rows(int64_t rows, int64_t row_bytes, uint64_t joined, int rows_at_once) {
  RowPlan plan = {kAccessBytes, 0, 1, 0};
  while ((joined | static_cast<uint64_t>(row_bytes)) % static_cast<uint64_t>(plan.width) != 0) plan.width /= 2;
  plan.vectors = row_bytes / plan.width;
  while (plan.lanes < 32 && plan.lanes < plan.vectors) plan.lanes *= 2;
  const int64_t per_block = int64_t{kTokenThreads} / plan.lanes * rows_at_once;
  plan.blocks = (rows + per_block - 1) / per_block;
  return plan;
}

SumPlan plan_sum(int64_t rows) {
  constexpr int64_t kLeast = 64, kMostChunks = 256;
  const int64_t least = (rows + kMostChunks - 1) / kMostChunks;
  const int64_t chunk = least < kLeast ? kLeast : least;
  return {(rows + chunk - 1) / chunk, chunk};
}

int launch_gather_tokens(const GatherArgs& a, int64_t tokens, Stream on) {
  const int64_t element = size_of(a.type), rows = a.rows * a.n, bytes = a.C * element;
  if (rows * bytes == 0) return cudaSuccess;
  const DeviceScope scope(on.device);
  if (scope.status != cudaSuccess) return scope.status;
  const RowSource source = {a.index,
                            a.n,
                            a.clones,
                            tokens,
                            tokens,
                            static_cast<const char*>(a.x.data),
                            a.x.stride0 * element,
                            a.x.stride1 * element,
                            nullptr,
                            0,
                            0};
  return launch_copies(source, a.out, rows, plan_rows(rows, bytes, join(a.x, element) | join(a.out), kRowsInFlight),
                       on);
}

int64_t gather_backward_workspace(const GatherBackwardArgs& a) { return inverse_bytes(a.rows, a.tokens); }

int launch_gather_tokens_backward(const GatherBackwardArgs& a, void* workspace, Stream on) {
  if (a.rows * a.tokens * a.C == 0) return cudaSuccess;
  const DeviceScope scope(on.device);
  if (scope.status != cudaSuccess) return scope.status;
  const InverseRows in = {static_cast<const uint32_t*>(workspace),
                          a.index,
                          a.n,
                          a.clones,
                          a.tokens,
                          a.grad.data,
                          a.grad.stride0,
                          a.grad.stride1};
  return launch_sums(in, a.rows / a.clones, a.tokens, a.tokens, a.type, a.C, a.out, nullptr, on);
}

int launch_restore_tokens(const RestoreArgs& a, int64_t fill_rows, Stream on) {
  const int64_t element = size_of(a.type), rows = a.N * a.T, bytes = a.C * element;
  if (rows * bytes == 0) return cudaSuccess;
  const DeviceScope scope(on.device);
  if (scope.status != cudaSuccess) return scope.status;
  const bool noise = a.fill_kind == kFillNoise;
  const Rows3 fill = noise ? Rows3{nullptr, 0, 0} : a.fill;
  const RowSource source = {a.restore,
                            a.T,
                            1,
                            a.V,
                            a.fill_kind == kFillRows ? a.V + fill_rows : INT64_MAX,
                            static_cast<const char*>(a.kept.data),
                            a.kept.stride0 * element,
                            a.kept.stride1 * element,
                            static_cast<const char*>(fill.data),
                            fill.stride0 * element,
                            fill.stride1 * element};
  const uint64_t joined = join(a.kept, element) | join(fill, element) | join(a.out);
  if (!noise) return launch_copies(source, a.out, rows, plan_rows(rows, bytes, joined, kRowsInFlight), on);
  return with_type(a.type, [&](auto zero) {
    using T = decltype(zero);
    if (is_wide<T>(joined, a.C)) {
      return launch_noise<T, kAccessBytes / sizeof(T)>(source, a, plan_rows(rows, bytes, joined, 1), on);
    }
    return launch_noise<T, 1>(source, a, plan_rows(rows, bytes, sizeof(T), 1), on);
  });
}

int64_t restore_backward_workspace(const RestoreBackwardArgs& a) {
  const int64_t partials = a.fill_rows == -1 ? plan_sum(a.N * a.T).chunks * a.C : 0;
  return inverse_bytes(a.N, slots_of(a)) + partials * (a.type == kFloat64 ? 8 : 4);
}

int launch_restore_tokens_backward(const RestoreBackwardArgs& a, void* workspace, Stream on) {
  if (a.C == 0) return cudaSuccess;
  const DeviceScope scope(on.device);
  if (scope.status != cudaSuccess) return scope.status;
  const int64_t slots = slots_of(a);
  const InverseRows in = {
      static_cast<const uint32_t*>(workspace), a.restore, a.T, 1, slots, a.grad.data, a.grad.stride0, a.grad.stride1};
  const int64_t limit = a.fill_rows >= 0 ? slots : INT64_MAX;
  const cudaError_t error =
      launch_sums(in, a.N, limit, a.V, a.type, a.C, a.kept, a.fill_rows > 0 ? a.fill : nullptr, on);
  if (error != cudaSuccess || a.fill_rows != -1) return error;
  void* const partial = static_cast<char*>(workspace) + inverse_bytes(a.N, slots);
  return with_type(a.type, [&](auto zero) {
    using T = decltype(zero);
    return launch_fill_sum<T>(a, static_cast<Acc<T>*>(partial), on);
  });
}

}  // namespace d2v
