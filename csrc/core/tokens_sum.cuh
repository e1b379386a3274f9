// Sums of rows by the inverse of an index, in ascending order and without float atomics.
#pragma once
#include "tokens_copy.cuh"

namespace d2v {
namespace {

constexpr int kWarps = kTokenThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Inverse of one index row: 2 n + 1 where column n alone names the slot, 2 n where n is the first of several.
constexpr uint32_t kNobody = 0xffffffffu;

// A block per index row. Atomic minima are the same in any order: whoever finds the slot taken clears the flag of
// the lower one of the two, and the lowest column's value is the smallest of all.
__global__ void __launch_bounds__(kTokenThreads) invert_index_kernel(D2V_PARAMETER(Indices) index, int64_t columns,
                                                                     int64_t slots, int64_t limit, uint32_t* inverse) {
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

// A thread's channels of an output row: N here and, in a second column, N a warp further on. It has four accesses in
// flight: those of kRows rows to kColumns columns.
template <class T, int N>
struct RowSum {
  static constexpr int kColumns = N == 8 ? 1 : 2, kRows = 4 / kColumns;
  Acc<T> sum[kColumns][N] = {};
  bool use[kColumns];  // the column exists

  // Adds rows (null: none) in order.
  __device__ __forceinline__ void add(const T* const (&from)[kRows]) {
    Vec<T, N> x[kRows][kColumns];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int u = 0; u < kColumns; ++u) {
        if (from[i] && use[u]) x[i][u] = load<N>(in_global(from[i]) + u * 32 * N);
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int u = 0; u < kColumns; ++u) {
        if (!from[i] || !use[u]) continue;
#pragma unroll
        for (int k = 0; k < N; ++k) sum[u][k] += widen(x[i][u].v[k]);
      }
    }
  }

  __device__ __forceinline__ void write(T* out) const {
#pragma unroll
    for (int u = 0; u < kColumns; ++u) {
      Vec<T, N> v;
#pragma unroll
      for (int k = 0; k < N; ++k) v.v[k] = Narrow<T>::from(sum[u][k]);
      if (use[u]) store<N>(out + u * 32 * N, v);
    }
  }
};

// The next column after `column` that names the slot, -1 if there is none. All lanes together.
__device__ __forceinline__ int64_t next_column(const InverseRows& in, int64_t row, int64_t slot, int64_t column) {
  const int lane = threadIdx.x % 32;
  for (int64_t n = column + 1; n < in.columns; n += 32) {
    const unsigned hits = __ballot_sync(kAllLanes, n + lane < in.columns && index_at(in.index, row, n + lane) == slot);
    if (hits) return n + __ffs(hits) - 1;
  }
  return -1;
}

// Adds the rows of clones [m0, m0 + 32) for one slot, some at a time; lane i knows the entry of clone m0 + i, `row` is
// the index row of m0. A column that is not alone in its slot is followed by a search for the next one.
template <class T, int N>
__device__ __forceinline__ void add_clones(const InverseRows& in, const T* grad, int64_t row, int64_t slot,
                                           uint32_t entry, RowSum<T, N>* sum) {
  unsigned rest = __ballot_sync(kAllLanes, entry != kNobody);
  const bool repeated = __any_sync(kAllLanes, entry != kNobody && !(entry & 1));
  int64_t next = -1;
  while (rest) {
    const T* from[RowSum<T, N>::kRows] = {};
#pragma unroll
    for (int i = 0; i < RowSum<T, N>::kRows; ++i) {
      if (!rest || (i > 0 && repeated)) continue;
      const int m = __ffs(rest) - 1;
      const uint32_t first = __shfl_sync(kAllLanes, entry, m);
      const int64_t column = next >= 0 ? next : int64_t{first >> 1};
      from[i] = grad + (row + m) * in.stride0 + column * in.stride1;
      if (repeated && !(first & 1)) next = next_column(in, row + m, slot, column);
      if (next < 0) rest &= rest - 1;
    }
    sum->add(from);
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
__global__ void __launch_bounds__(kTokenThreads, 3)
    sum_slots_kernel(D2V_PARAMETER(InverseRows) in, D2V_PARAMETER(SlotOutput<T>) out, int64_t count, int64_t C) {
  const int64_t i = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (i >= count) return;
  const int lane = threadIdx.x % 32;
  const int64_t sample = i / in.slots, slot = i - sample * in.slots, hidden = in.slots - out.visible;
  T* const kept = out.kept + (sample * out.visible + slot) * C;
  T* const to = slot < out.visible ? kept : out.fill + (sample * hidden + slot - out.visible) * C;
  const T* const grad = static_cast<const T*>(in.grad);
  constexpr int kColumns = RowSum<T, N>::kColumns;
  // Of the clones from m0 on, this lane's; up to 32 clones, it is read once for all channels.
  const auto entry_of = [&](int64_t m0) {
    const int64_t m = m0 + lane;
    return m < in.clones ? in_global(in.inverse)[(sample * in.clones + m) * in.slots + slot] : kNobody;
  };
  const uint32_t first = entry_of(0);
  for (int64_t c0 = 0; c0 < C; c0 += kColumns * 32 * N) {
    const int64_t c = c0 + lane * N;
    RowSum<T, N> sum;
#pragma unroll
    for (int u = 0; u < kColumns; ++u) sum.use[u] = c + u * 32 * N < C;
    for (int64_t m0 = 0; m0 < in.clones; m0 += 32) {
      add_clones(in, grad + c, sample * in.clones + m0, slot, m0 == 0 ? first : entry_of(m0), &sum);
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
    int64_t row = i / in.columns, column = i - row * in.columns;
#pragma unroll
    for (int u = 0; u < kRowsInFlight; ++u) {
      use[u] = i + u < end && c < C && (!in.index.data || index_at(in.index, row, column) >= in.visible);
      if (use[u]) x[u] = load<N>(data + row * in.stride0 + column * in.stride1 + c);
      if (++column == in.columns) {
        column = 0;
        ++row;
      }
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

}  // namespace
}  // namespace d2v
