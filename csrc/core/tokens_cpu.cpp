// Row copies, row sums and noise rows, compiled once per instruction level.
#include "noise.h"
#include "simd.h"
#include "tokens.h"

namespace d2v {
namespace {

D2V_INLINE int64_t index_at(const Indices& index, int64_t row, int64_t column) {
  const int64_t at = row * index.row_stride + column * index.stride;
  return index.wide ? static_cast<const int64_t*>(index.data)[at] : static_cast<const int32_t*>(index.data)[at];
}

// Rows are opaque bytes here: 1.0, 0x3c00 and 0x3f80 are copied alike.
D2V_INLINE void copy_row(char* out, const char* in, int64_t bytes, bool stream) {
  if (!stream) {
    memcpy(out, in, static_cast<size_t>(bytes));
    return;
  }
  int64_t i = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(out) & 63);
  if (i > bytes) i = bytes;
  memcpy(out, in, static_cast<size_t>(i));
  for (; i + 64 <= bytes; i += 64) {
    for (int j = 0; j < 64; j += kVectorBytes) {
      Convert<float, float>::stream(reinterpret_cast<float*>(out + i + j),
                                    load<float>(reinterpret_cast<const float*>(in + i + j)));
    }
  }
  if (i < bytes) memcpy(out + i, in + i, static_cast<size_t>(bytes - i));
}

void gather(const GatherArgs* a, int64_t begin, int64_t end, bool stream) {
  const int64_t element = size_of(a->type), bytes = a->C * element;
  char* out = static_cast<char*>(a->out) + begin * bytes;
  int64_t row = begin / a->n, column = begin % a->n;
  for (int64_t i = begin; i < end; ++i, out += bytes) {
    const int64_t at = row / a->clones * a->x.stride0 + index_at(a->index, row, column) * a->x.stride1;
    copy_row(out, static_cast<const char*>(a->x.data) + at * element, bytes, stream);
    if (++column == a->n) {
      column = 0;
      ++row;
    }
  }
  if (stream) finish_streaming();
}

template <class T, bool STREAM>
D2V_INLINE void noise_row(T* out, int64_t C, uint32_t row, uint64_t key, float std) {
  constexpr int L = kLanes<float>;
  VU64 counter = first_counters();
  int64_t c = 0;
  VF low, high;
  for (; c + 2 * L <= C; c += 2 * L, counter += static_cast<uint64_t>(L / 2)) {
    normal_pair(counter, row, key, &low, &high);
    NaturalOrder<float, T>::template store<STREAM>(out + c, {low * std, high * std});
  }
  if (c == C) return;
  T rest[2 * L];
  normal_pair(counter, row, key, &low, &high);
  NaturalOrder<float, T>::template store<false>(rest, {low * std, high * std});
  memcpy(out + c, rest, static_cast<size_t>(C - c) * sizeof(T));
}

template <class T>
void restore_of(const RestoreArgs* a, int64_t begin, int64_t end, bool stream) {
  const int64_t bytes = a->C * static_cast<int64_t>(sizeof(T));
  const T* kept = static_cast<const T*>(a->kept.data);
  const T* fill = static_cast<const T*>(a->fill.data);
  T* out = static_cast<T*>(a->out) + begin * a->C;
  int64_t row = begin / a->T, t = begin % a->T;
  for (int64_t i = begin; i < end; ++i, out += a->C) {
    const int64_t from = index_at(a->restore, row, t), beyond = from - a->V;
    if (beyond >= 0 && a->fill_kind == kFillNoise) {
      const uint64_t key = static_cast<uint64_t>(a->keys[row * a->key_stride]);
      if (stream && is_aligned(out, 64)) {
        noise_row<T, true>(out, a->C, static_cast<uint32_t>(beyond), key, a->noise_std);
      } else {
        noise_row<T, false>(out, a->C, static_cast<uint32_t>(beyond), key, a->noise_std);
      }
    } else {
      const T* in = beyond < 0                    ? kept + row * a->kept.stride0 + from * a->kept.stride1
                    : a->fill_kind == kFillVector ? fill
                                                  : fill + row * a->fill.stride0 + beyond * a->fill.stride1;
      copy_row(reinterpret_cast<char*>(out), reinterpret_cast<const char*>(in), bytes, stream);
    }
    if (++t == a->T) {
      t = 0;
      ++row;
    }
  }
  if (stream) finish_streaming();
}

void restore(const RestoreArgs* a, int64_t begin, int64_t end, bool stream) {
  with_type(a->type, [&](auto zero) { restore_of<decltype(zero)>(a, begin, end, stream); });
}

// One output row as the sum of `count` > 1 rows, added in order, rounded once.
template <class T>
D2V_INLINE void sum_row(T* out, int64_t C, const T* base, const int64_t* entries, int64_t count, bool stream) {
  typedef Acc<T> A;
  constexpr int L = kLanes<A>;
  int64_t c = 0;
  for (; c + 4 * L <= C; c += 4 * L) {
    Vec<A> sum[4] = {};
    for (int64_t e = 0; e < count; ++e) {
      for (int j = 0; j < 4; ++j) sum[j] += load<A>(base + entries[e] + c + j * L);
    }
    for (int j = 0; j < 4; ++j) {
      if (stream) {
        Convert<A, T>::stream(out + c + j * L, sum[j]);
      } else {
        store<A>(out + c + j * L, sum[j]);
      }
    }
  }
  for (; c < C; ++c) {
    A sum = 0;
    for (int64_t e = 0; e < count; ++e) sum += static_cast<A>(widen(base[entries[e] + c]));
    out[c] = narrow<T>(sum);
  }
}

template <class T>
void sum_rows_of(T* out, int64_t count, int64_t C, const T* base, const int64_t* start, const int64_t* entries,
                 bool stream) {
  const int64_t bytes = C * static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < count; ++i, out += C) {
    const int64_t n = start[i + 1] - start[i];
    if (n == 0) {
      zero_row(out, bytes, stream);
    } else if (n == 1) {
      copy_row(reinterpret_cast<char*>(out), reinterpret_cast<const char*>(base + entries[start[i]]), bytes, stream);
    } else {
      sum_row(out, C, base, entries + start[i], n, stream && is_aligned(out, 64));
    }
  }
  if (stream) finish_streaming();
}

void sum_rows(DType type, void* out, int64_t count, int64_t C, const void* base, const int64_t* start,
              const int64_t* entries, bool stream) {
  with_type(type, [&](auto zero) {
    typedef decltype(zero) T;
    sum_rows_of(static_cast<T*>(out), count, C, static_cast<const T*>(base), start, entries, stream);
  });
}

void add_rows(DType type, void* sum, int64_t C, const void* base, const int64_t* entries, int64_t count) {
  with_type(type, [&](auto zero) {
    typedef decltype(zero) T;
    typedef Acc<T> A;
    A* total = static_cast<A*>(sum);
    for (int64_t e = 0; e < count; ++e) {
      const T* row = static_cast<const T*>(base) + entries[e];
      for_vectors<A>(C, [&](auto part, int64_t c, int lanes) __attribute__((always_inline)) {
        typedef decltype(part) P;
        store_lanes<A, P>(total + c, load_lanes<A, P>(total + c, lanes) + load_lanes<A, P>(row + c, lanes), lanes);
      });
    }
  });
}

void cast_row(DType type, void* out, const void* sum, int64_t C) {
  with_type(type, [&](auto zero) {
    typedef decltype(zero) T;
    for (int64_t c = 0; c < C; ++c) static_cast<T*>(out)[c] = narrow<T>(static_cast<const Acc<T>*>(sum)[c]);
  });
}

}  // namespace

extern const TokensKernels D2V_TABLE(tokens_kernels);
const TokensKernels D2V_TABLE(tokens_kernels) = {gather, restore, sum_rows, add_rows, cast_row};

}  // namespace d2v
