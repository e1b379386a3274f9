// Token rows on the GPU: copies by index, and sums of rows by the inverse of an index.
//
// A copied row is opaque bytes, 16 at a time where addresses and strides allow. The gradients gather, too: a first
// kernel inverts each row of the index (first_of_slot), then every output row reads the rows that belong to it and
// adds them in ascending order. So there are no float atomics and no zero-fill, and the same bits come out every time.
#include "tokens_cuda.h"

#include "noise.cuh"
#include "vec.cuh"

namespace d2v {
namespace {

constexpr int kWarps = kTokenThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int64_t index_at(const Indices& index, int64_t row, int64_t column) {
  const int64_t at = row * index.row_stride + column * index.stride;
  return index.wide ? in_global(static_cast<const int64_t*>(index.data))[at]
                    : in_global(static_cast<const int32_t*>(index.data))[at];
}

// ---- copies ----

// Where the output rows come from; strides in bytes. A value below `visible` names a row of kept, else one of fill.
struct RowSource {
  Indices index;
  int64_t columns, clones, visible, limit;
  const char* kept;
  int64_t kept_stride0, kept_stride1;
  const char* fill;
  int64_t fill_stride0, fill_stride1;
};

// An output row: its source, or the number of the noise row.
struct RowOrigin {
  const char* from;
  int64_t row, beyond;  // beyond >= 0: past `visible` by so many
};

__device__ __forceinline__ RowOrigin find_origin(const RowSource& s, int64_t row, int64_t column) {
  const int64_t value = index_at(s.index, row, column), beyond = value - s.visible;
  D2V_CHECK(value >= 0 && value < s.limit, "index out of range");
  const int64_t sample = s.clones == 1 ? row : row / s.clones;
  const char* const kept = s.kept + sample * s.kept_stride0 + value * s.kept_stride1;
  const char* const fill = s.fill + row * s.fill_stride0 + beyond * s.fill_stride1;
  return {in_global(beyond < 0 ? kept : fill), row, beyond};
}

// Calls body(u, origin) for the rows that this thread works on: kRowsInFlight from `first` on, the last one again
// where there are no more.
template <class Body>
__device__ __forceinline__ void for_rows(const RowSource& source, int64_t first, int64_t rows, Body body) {
  int64_t row = first / source.columns, column = first - row * source.columns;
#pragma unroll
  for (int u = 0; u < kRowsInFlight; ++u) {
    body(u, find_origin(source, row, column));
    if (first + u + 1 < rows && ++column == source.columns) {
      column = 0;
      ++row;
    } else if (first + u + 1 >= rows) {
      continue;
    }
  }
}

__device__ __forceinline__ int64_t first_row(int lanes) {
  const int64_t group = int64_t{blockIdx.x} * (kTokenThreads / lanes) + threadIdx.x / lanes;
  return group * kRowsInFlight;
}

template <class V>
__global__ void __launch_bounds__(kTokenThreads)
    copy_rows_kernel(D2V_PARAMETER(RowSource) source, char* out, int64_t rows, int64_t vectors, int lanes) {
  const int64_t first = first_row(lanes);
  if (first >= rows) return;
  const V* from[kRowsInFlight];
  for_rows(source, first, rows, [&](int u, const RowOrigin& o) { from[u] = reinterpret_cast<const V*>(o.from); });
  V* const to = reinterpret_cast<V*>(out) + first * vectors;
  for (int64_t v = threadIdx.x & (lanes - 1); v < vectors; v += lanes) {
    V x[kRowsInFlight];
#pragma unroll
    for (int u = 0; u < kRowsInFlight; ++u) x[u] = in_global(from[u])[v];
#pragma unroll
    for (int u = 0; u < kRowsInFlight; ++u) {
      if (first + u < rows) to[u * vectors + v] = x[u];
    }
  }
}

struct NoiseKeys {
  const int64_t* keys;
  int64_t stride;
  float std;
};

// Rows past `visible` are noise, the others copies.
template <class T, int N>
__global__ void __launch_bounds__(kTokenThreads)
    restore_noise_kernel(D2V_PARAMETER(RowSource) source, D2V_PARAMETER(NoiseKeys) noise_keys, T* out, int64_t rows,
                         int64_t vectors, int lanes) {
  const int64_t first = first_row(lanes);
  if (first >= rows) return;
  RowOrigin origin[kRowsInFlight];
  uint64_t key[kRowsInFlight];
  for_rows(source, first, rows, [&](int u, const RowOrigin& o) {
    origin[u] = o;
    key[u] = static_cast<uint64_t>(in_global(noise_keys.keys)[o.row * noise_keys.stride]);
  });
  for (int64_t v = threadIdx.x & (lanes - 1); v < vectors; v += lanes) {
    Vec<T, N> x[kRowsInFlight];
#pragma unroll
    for (int u = 0; u < kRowsInFlight; ++u) {
      if (origin[u].beyond < 0) x[u] = load<N>(in_global(reinterpret_cast<const T*>(origin[u].from)) + v * N);
    }
#pragma unroll
    for (int u = 0; u < kRowsInFlight; ++u) {
      if (first + u >= rows) break;
      const uint32_t row = static_cast<uint32_t>(origin[u].beyond);
      if (origin[u].beyond >= 0) x[u] = noise<T, N>(v * N, row, key[u], noise_keys.std);
      store<N>(out + ((first + u) * vectors + v) * N, x[u]);
    }
  }
}

// ---- sums ----

// Inverse of one index row: 2 n + 1 where column n alone names the slot, 2 n where n is the first of several.
constexpr uint32_t kNobody = 0xffffffffu;

// A block per index row. Atomic minima are the same in any order: whoever finds the slot taken clears the flag of
// the lower one of the two, and the lowest column's value is the smallest of all.
__global__ void __launch_bounds__(kTokenThreads)
    invert_index_kernel(D2V_PARAMETER(Indices) index, int64_t columns, int64_t slots, int64_t limit,
                        uint32_t* inverse) {
  uint32_t* const first_of_slot = inverse + int64_t{blockIdx.x} * slots;
  for (int64_t s = threadIdx.x; s < slots; s += kTokenThreads) first_of_slot[s] = kNobody;
  __syncthreads();
  for (int64_t n = threadIdx.x; n < columns; n += kTokenThreads) {
    const int64_t slot = index_at(index, blockIdx.x, n);
    D2V_CHECK(slot >= 0 && slot < limit, "index out of range");
    if (slot >= slots) continue;
    const uint32_t alone = static_cast<uint32_t>(2 * n + 1);
    const uint32_t before = atomicMin(&first_of_slot[slot], alone);
    if (before != kNobody) atomicMin(&first_of_slot[slot], (before < alone ? before : alone) & ~1u);
  }
}

struct InverseRows {
  const uint32_t* inverse;  // (rows of the index, slots)
  Indices index;
  int64_t columns, clones, slots;
  const void* grad;
  int64_t stride0, stride1;
};

// N channels here and, if they exist, N channels a warp further on.
template <class T, int N>
struct RowSum {
  Acc<T> sum[2][N] = {};
  bool use[2];

  // Rows at a and b (null: none); a first.
  __device__ __forceinline__ void add(const T* a, const T* b) {
    Vec<T, N> x[2], y[2];
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      if (use[u]) x[u] = load<N>(in_global(a) + u * 32 * N);
      if (use[u] && b) y[u] = load<N>(in_global(b) + u * 32 * N);
    }
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      if (!use[u]) continue;
#pragma unroll
      for (int k = 0; k < N; ++k) sum[u][k] += widen(x[u].v[k]);
      if (!b) continue;
#pragma unroll
      for (int k = 0; k < N; ++k) sum[u][k] += widen(y[u].v[k]);
    }
  }

  __device__ __forceinline__ void write(T* out) const {
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      Vec<T, N> v;
#pragma unroll
      for (int k = 0; k < N; ++k) v.v[k] = Narrow<T>::from(sum[u][k]);
      if (use[u]) store<N>(out + u * 32 * N, v);
    }
  }
};

// Adds what index row `row` says of `slot`, whose first column and flag are `entry`. All lanes together.
template <class T, int N>
__device__ __forceinline__ void add_repeated(const InverseRows& in, const T* grad, int64_t row, int64_t slot,
                                             uint32_t entry, RowSum<T, N>* sum) {
  const T* const base = grad + row * in.stride0;
  sum->add(base + int64_t{entry >> 1} * in.stride1, nullptr);
  if (entry & 1) return;
  const int lane = threadIdx.x % 32;
  for (int64_t n = int64_t{entry >> 1} + 1; n < in.columns; n += 32) {
    const bool hit = n + lane < in.columns && index_at(in.index, row, n + lane) == slot;
    for (unsigned hits = __ballot_sync(kAllLanes, hit); hits; hits &= hits - 1) {
      sum->add(base + (n + __ffs(hits) - 1) * in.stride1, nullptr);
    }
  }
}

// Rows of clones [m0, m0 + 32) for one slot; lane i knows the entry of clone m0 + i. `row` is the index row of m0.
template <class T, int N>
__device__ __forceinline__ void add_clones(const InverseRows& in, const T* grad, int64_t row, int64_t slot,
                                           uint32_t entry, RowSum<T, N>* sum) {
  unsigned rest = __ballot_sync(kAllLanes, entry != kNobody);
  if (__any_sync(kAllLanes, entry != kNobody && !(entry & 1))) {
    for (; rest; rest &= rest - 1) {
      const int m = __ffs(rest) - 1;
      add_repeated(in, grad, row + m, slot, __shfl_sync(kAllLanes, entry, m), sum);
    }
    return;
  }
  while (rest) {  // two rows at a time
    const T* from[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!rest) continue;
      const int m = __ffs(rest) - 1;
      rest &= rest - 1;
      from[i] = grad + (row + m) * in.stride0 + int64_t{__shfl_sync(kAllLanes, entry, m) >> 1} * in.stride1;
    }
    sum->add(from[0], from[1]);
  }
}

// Slots below `visible` go to kept (samples, visible, C), the others to fill (samples, slots - visible, C).
template <class T>
struct SlotOutput {
  T* kept;
  T* fill;
  int64_t visible;
};

// A warp per (sample, slot).
template <class T, int N>
__global__ void __launch_bounds__(kTokenThreads)
    sum_slots_kernel(D2V_PARAMETER(InverseRows) in, D2V_PARAMETER(SlotOutput<T>) out, int64_t count, int64_t C) {
  const int64_t i = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (i >= count) return;
  const int lane = threadIdx.x % 32;
  const int64_t sample = i / in.slots, slot = i - sample * in.slots, hidden = in.slots - out.visible;
  T* const kept = out.kept + (sample * out.visible + slot) * C;
  T* const to = slot < out.visible ? kept : out.fill + (sample * hidden + slot - out.visible) * C;
  const T* const grad = static_cast<const T*>(in.grad);
  for (int64_t c0 = 0; c0 < C; c0 += 2 * 32 * N) {
    const int64_t c = c0 + lane * N;
    RowSum<T, N> sum;
    sum.use[0] = c < C;
    sum.use[1] = c + 32 * N < C;
    for (int64_t m0 = 0; m0 < in.clones; m0 += 32) {
      const int64_t row = sample * in.clones + m0;
      const uint32_t entry = m0 + lane < in.clones ? in_global(in.inverse)[(row + lane) * in.slots + slot] : kNobody;
      add_clones(in, grad + c, row, slot, entry, &sum);
    }
    sum.write(in_global(to) + c);
  }
}

struct FilledRows {
  const void* data;
  int64_t stride0, stride1, columns, rows;
  Indices index;  // data null: every row counts
  int64_t visible;
};

// Block x adds up the rows of its chunk whose index is `visible` or more: each warp its own, then the warps in order.
template <class TI, class TO, int N>
__global__ void __launch_bounds__(kTokenThreads)
    sum_filled_kernel(D2V_PARAMETER(FilledRows) in, int64_t chunk, int64_t C, TO* out) {
  using A = Acc<TI>;
  constexpr int kTile = 32 * N;
  D2V_SHARED(A, part, [kWarps][kTile]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t tile = int64_t{blockIdx.y} * kTile, c = tile + lane * N, begin = blockIdx.x * chunk;
  const int64_t end = begin + chunk < in.rows ? begin + chunk : in.rows;
  const TI* const data = in_global(static_cast<const TI*>(in.data));
  A sum[N] = {};
  for (int64_t i = begin + warp * kRowsInFlight; i < end; i += kTokenThreads / 32 * kRowsInFlight) {
    Vec<TI, N> x[kRowsInFlight];
    bool use[kRowsInFlight];
#pragma unroll
    for (int u = 0; u < kRowsInFlight; ++u) {
      const int64_t row = (i + u) / in.columns, column = i + u - row * in.columns;
      use[u] = i + u < end && c < C && (!in.index.data || index_at(in.index, row, column) >= in.visible);
      if (use[u]) x[u] = load<N>(data + row * in.stride0 + column * in.stride1 + c);
    }
#pragma unroll
    for (int u = 0; u < kRowsInFlight; ++u) {
#pragma unroll
      for (int k = 0; k < N; ++k) sum[k] += use[u] ? static_cast<A>(widen(x[u].v[k])) : A{0};
    }
  }
#pragma unroll
  for (int k = 0; k < N; ++k) part[warp][lane * N + k] = sum[k];
  __syncthreads();
  for (int j = threadIdx.x; j < kTile && tile + j < C; j += kTokenThreads) {
    A total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += part[w][j];
    out[blockIdx.x * C + tile + j] = Narrow<TO>::from(total);
  }
}
