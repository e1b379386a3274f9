// Rows copied by index: opaque bytes, several rows of a thread in flight, or noise computed in their place.
#pragma once
#include "noise.cuh"
#include "tokens_cuda.h"

namespace d2v {
namespace {

__device__ __forceinline__ int64_t index_at(const Indices& index, int64_t row, int64_t column) {
  const int64_t at = row * index.row_stride + column * index.stride;
  return index.wide ? in_global(static_cast<const int64_t*>(index.data))[at]
                    : in_global(static_cast<const int32_t*>(index.data))[at];
}

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

// Calls body(u, origin) for ROWS rows from `first` on, with the last row again where there are no more.
template <int ROWS, class Body>
__device__ __forceinline__ void for_rows(const RowSource& source, int64_t first, int64_t rows, Body body) {
  int64_t row = first / source.columns, column = first - row * source.columns;
#pragma unroll
  for (int u = 0; u < ROWS; ++u) {
    body(u, find_origin(source, row, column));
    if (first + u + 1 < rows && ++column == source.columns) {
      column = 0;
      ++row;
    }
  }
}

// Number of this thread's group of `lanes` threads in the grid.
__device__ __forceinline__ int64_t group_of(int lanes) {
  return int64_t{blockIdx.x} * (kTokenThreads / lanes) + threadIdx.x / lanes;
}

template <class V>
__global__ void __launch_bounds__(kTokenThreads)
    copy_rows_kernel(D2V_PARAMETER(RowSource) source, char* out, int64_t rows, int64_t vectors, int lanes) {
  const int64_t first = group_of(lanes) * kRowsInFlight;
  if (first >= rows) return;
  const V* from[kRowsInFlight];
  for_rows<kRowsInFlight>(source, first, rows,
                          [&](int u, const RowOrigin& o) { from[u] = reinterpret_cast<const V*>(o.from); });
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

// Rows past `visible` are noise, the others copies. A row per group of threads: here the arithmetic takes the time.
template <class T, int N>
__global__ void __launch_bounds__(kTokenThreads)
    restore_noise_kernel(D2V_PARAMETER(RowSource) source, D2V_PARAMETER(NoiseKeys) noise_keys, T* out, int64_t rows,
                         int64_t vectors, int lanes) {
  const int64_t row = group_of(lanes);
  if (row >= rows) return;
  RowOrigin origin;
  for_rows<1>(source, row, rows, [&](int, const RowOrigin& o) { origin = o; });
  const int first = static_cast<int>(threadIdx.x) & (lanes - 1);
  T* to = out + (row * vectors + first) * N;
  if (origin.beyond < 0) {
    const T* from = in_global(reinterpret_cast<const T*>(origin.from)) + first * N;
    for (int64_t v = first; v < vectors; v += lanes, from += lanes * N, to += lanes * N) store<N>(to, load<N>(from));
    return;
  }
  const uint32_t beyond = static_cast<uint32_t>(origin.beyond);
  const RoundKeys keys = round_keys(static_cast<uint64_t>(in_global(noise_keys.keys)[origin.row * noise_keys.stride]));
  for (int64_t v = first; v < vectors; v += lanes, to += lanes * N) {
    store<N>(to, noise<T, N>(static_cast<uint32_t>(v * N), beyond, keys, noise_keys.std));
  }
}

}  // namespace
}  // namespace d2v
