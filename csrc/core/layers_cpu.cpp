// Layer statistics and the average, compiled once per instruction level.
#include "layers.h"
#include "simd.h"

namespace d2v {
namespace {

constexpr int kChunk = 16;  // rows of one two-pass chunk: they stay in registers with 32 of them
constexpr int kRows = kVectorBytes == 64 ? 8 : 4;

struct Merge {  // weights of Chan's merge of `rows` new rows into `seen` old ones
  double mean, m2;
  Merge(int64_t seen, int64_t rows)
      : mean(static_cast<double>(rows) / static_cast<double>(seen + rows)), m2(mean * static_cast<double>(seen)) {}
};

template <class T, class P>
D2V_INLINE void chunk_column(const T* x, int64_t stride, int64_t rows, int lanes, Acc<T> inverse, Acc<T> merge_mean,
                             Acc<T> merge_m2, Acc<T>* mean, Acc<T>* m2) {
  typedef Acc<T> A;
  Vec<A> sum{}, m{}, q{};
  if (rows == kChunk) {
    Vec<A> v[kChunk];
    for (int i = 0; i < kChunk; ++i) v[i] = load_lanes<A, P>(x + i * stride, lanes);
    for (int i = 0; i < kChunk; i += 4) sum += (v[i] + v[i + 1]) + (v[i + 2] + v[i + 3]);
    m = sum * inverse;
    for (int i = 0; i < kChunk; ++i) {
      const Vec<A> d = v[i] - m;
      q += d * d;
    }
  } else {
    for (int64_t i = 0; i < rows; ++i) sum += load_lanes<A, P>(x + i * stride, lanes);
    m = sum * inverse;
    for (int64_t i = 0; i < rows; ++i) {
      const Vec<A> d = load_lanes<A, P>(x + i * stride, lanes) - m;
      q += d * d;
    }
  }
  const Vec<A> old = load_lanes<A, P>(mean, lanes);
  const Vec<A> delta = m - old;
  store_lanes<A, P>(mean, old + delta * merge_mean, lanes);
  store_lanes<A, P>(m2, load_lanes<A, P>(m2, lanes) + (q + delta * delta * merge_m2), lanes);
}

template <class T>
void column_stats_of(const T* x, int64_t stride, int64_t rows, int64_t C, int64_t seen, Acc<T>* mean, Acc<T>* m2) {
  typedef Acc<T> A;
  for (int64_t t = 0; t < rows; t += kChunk) {
    const int64_t n = rows - t < kChunk ? rows - t : kChunk;
    const Merge merge(seen + t, n);
    const A inverse = A(1) / static_cast<A>(n), w = static_cast<A>(merge.mean), w2 = static_cast<A>(merge.m2);
    const T* p = x + t * stride;
    for (int64_t i = 0; i < n; ++i) touch(p + i * stride, C * static_cast<int64_t>(sizeof(T)));
    for_vectors<A>(C, [&](auto part, int64_t c, int lanes) __attribute__((always_inline)) {
      chunk_column<T, decltype(part)>(p + c, stride, n, lanes, inverse, w, w2, mean + c, m2 + c);
    });
  }
}

void column_stats(DType type, const void* x, int64_t stride, int64_t rows, int64_t C, int64_t seen, void* mean,
                  void* m2) {
  with_type(type, [&](auto zero) {
    typedef decltype(zero) T;
    typedef Acc<T> A;
    column_stats_of(static_cast<const T*>(x), stride, rows, C, seen, static_cast<A*>(mean), static_cast<A*>(m2));
  });
}

template <class A>
void column_scale_of(A* m2, int64_t n, int64_t count, double eps, double factor) {
  const A inverse = A(1) / static_cast<A>(count > 0 ? count : 1), e = static_cast<A>(eps), f = static_cast<A>(factor);
  for (int64_t i = 0; i < n; ++i) {
    const A v = m2[i] * inverse + e;
    m2[i] = f / (sizeof(A) == 4 ? static_cast<A>(__builtin_sqrtf(static_cast<float>(v)))
                                : static_cast<A>(__builtin_sqrt(v)));
  }
}

void column_scale(DType type, void* m2, int64_t n, int64_t count, double eps, double factor) {
  if (type == kFloat64) {
    column_scale_of(static_cast<double*>(m2), n, count, eps, factor);
  } else {
    column_scale_of(static_cast<float*>(m2), n, count, eps, factor);
  }
}

// Two passes over a row that the first one brings into the nearest cache.
template <class T>
D2V_INLINE void row_moments(const T* x, int64_t C, Acc<T> inverse, Acc<T>* mean, Acc<T>* variance) {
  typedef Acc<T> A;
  constexpr int L = kLanes<A>;
  Vec<A> s[4] = {}, q[4] = {};
  int64_t c = 0;
  for (; c + 4 * L <= C; c += 4 * L) {
    for (int j = 0; j < 4; ++j) s[j] += load<A>(x + c + j * L);
  }
  for (; c + L <= C; c += L) s[0] += load<A>(x + c);
  if (c < C) s[1] += load_part<A>(x + c, static_cast<int>(C - c));
  const A m = sum_lanes<A>((s[0] + s[1]) + (s[2] + s[3])) * inverse;
  for (c = 0; c + 4 * L <= C; c += 4 * L) {
    for (int j = 0; j < 4; ++j) {
      const Vec<A> d = load<A>(x + c + j * L) - m;
      q[j] += d * d;
    }
  }
  for (; c + L <= C; c += L) {
    const Vec<A> d = load<A>(x + c) - m;
    q[0] += d * d;
  }
  A rest = 0;
  for (; c < C; ++c) {
    const A d = static_cast<A>(widen(x[c])) - m;
    rest += d * d;
  }
  *mean = m;
  *variance = (sum_lanes<A>((q[0] + q[1]) + (q[2] + q[3])) + rest) * inverse;
}

D2V_INLINE float root(float x) { return __builtin_sqrtf(x); }
D2V_INLINE double root(double x) { return __builtin_sqrt(x); }

void row_stats(DType type, const void* x, int64_t stride, int64_t rows, int64_t C, double eps, double factor,
               void* mean, void* scale) {
  with_type(type, [&](auto zero) {
    typedef decltype(zero) T;
    typedef Acc<T> A;
    for (int64_t t = 0; t < rows; ++t) {
      A m, v;
      row_moments(static_cast<const T*>(x) + t * stride, C, A(1) / static_cast<A>(C), &m, &v);
      static_cast<A*>(mean)[t] = m;
      static_cast<A*>(scale)[t] = static_cast<A>(factor) / root(v + static_cast<A>(eps));
    }
  });
}

// N rows at one vector of channels: one load of mean and scale serves them all.
template <class T, class P, int N>
D2V_INLINE void combine_column(const CombineArgs* a, int64_t t, int64_t c, int lanes) {
  typedef Acc<T> A;
  const A* mean = static_cast<const A*>(a->mean) + c;
  const A* scale = static_cast<const A*>(a->scale) + c;
  Vec<A> sum[N] = {};
  for (int64_t k = 0; k < a->K; ++k) {
    const int64_t stride = a->stride[k];
    const T* x = static_cast<const T*>(a->x[k]) + t * stride + c;
    const Vec<A> m = load_lanes<A, P>(mean + k * a->C, lanes), s = load_lanes<A, P>(scale + k * a->C, lanes);
    for (int j = 0; j < N; ++j) sum[j] += (load_lanes<A, P>(x + j * stride, lanes) - m) * s;
  }
  A* out = static_cast<A*>(a->block) + t * a->C + c;
  for (int j = 0; j < N; ++j) store_lanes<A, P>(out + j * a->C, sum[j], lanes);
}

template <class T>
void combine_columns(const CombineArgs* a) {
  int64_t t = 0;
  for (; t + kRows <= a->rows; t += kRows) {
    for (int64_t k = 0; k < a->K; ++k) {
      const T* x = static_cast<const T*>(a->x[k]) + t * a->stride[k];
      for (int j = 0; j < kRows; ++j) touch(x + j * a->stride[k], a->C * static_cast<int64_t>(sizeof(T)));
    }
    for_vectors<Acc<T>>(a->C, [&](auto part, int64_t c, int lanes) __attribute__((always_inline)) {
      combine_column<T, decltype(part), kRows>(a, t, c, lanes);
    });
  }
  for (; t < a->rows; ++t) {
    for_vectors<Acc<T>>(a->C, [&](auto part, int64_t c, int lanes) __attribute__((always_inline)) {
      combine_column<T, decltype(part), 1>(a, t, c, lanes);
    });
  }
}

// One row, N vectors of channels; mean and scale are one number per layer.
template <class T, class P, int N>
D2V_INLINE void combine_row(const CombineArgs* a, int64_t t, int64_t c, int lanes) {
  typedef Acc<T> A;
  const A* mean = static_cast<const A*>(a->mean);
  const A* scale = static_cast<const A*>(a->scale);
  const A even = A(1) / static_cast<A>(a->K);
  Vec<A> sum[N] = {};
  for (int64_t k = 0; k < a->K; ++k) {
    const T* x = static_cast<const T*>(a->x[k]) + t * a->stride[k] + c;
    const A m = mean ? mean[k * a->rows + t] : A(0), s = scale ? scale[k * a->rows + t] : even;
    for (int j = 0; j < N; ++j) sum[j] += (load_lanes<A, P>(x + j * kLanes<A>, lanes) - m) * s;
  }
  A* out = static_cast<A*>(a->block) + t * a->C + c;
  for (int j = 0; j < N; ++j) store_lanes<A, P>(out + j * kLanes<A>, sum[j], lanes);
}

template <class T>
void combine_rows(const CombineArgs* a) {
  constexpr int L = kLanes<Acc<T>>;
  for (int64_t t = 0; t < a->rows; ++t) {
    int64_t c = 0;
    for (; c + 4 * L <= a->C; c += 4 * L) combine_row<T, Full, 4>(a, t, c, L);
    for (; c + L <= a->C; c += L) combine_row<T, Full, 1>(a, t, c, L);
    if (c < a->C) combine_row<T, Part, 1>(a, t, c, static_cast<int>(a->C - c));
  }
}

void combine(const CombineArgs* a) {
  with_type(a->type, [&](auto zero) {
    typedef decltype(zero) T;
    if (a->per_row) {
      combine_rows<T>(a);
    } else {
      combine_columns<T>(a);
    }
  });
}

template <class A>
void normalise_columns_of(A* block, int64_t rows, int64_t C, const A* mean, const A* scale) {
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t c = 0; c < C; ++c) block[t * C + c] = (block[t * C + c] - mean[c]) * scale[c];
  }
}

void normalise_columns(DType type, void* block, int64_t rows, int64_t C, const void* mean, const void* scale) {
  if (type == kFloat64) {
    normalise_columns_of(static_cast<double*>(block), rows, C, static_cast<const double*>(mean),
                         static_cast<const double*>(scale));
  } else {
    normalise_columns_of(static_cast<float*>(block), rows, C, static_cast<const float*>(mean),
                         static_cast<const float*>(scale));
  }
}

template <class A>
void normalise_rows_of(A* block, int64_t rows, int64_t C, double eps) {
  for (int64_t t = 0; t < rows; ++t) {
    A* row = block + t * C;
    A m, v;
    row_moments(row, C, A(1) / static_cast<A>(C), &m, &v);
    const A s = A(1) / root(v + static_cast<A>(eps));
    for (int64_t c = 0; c < C; ++c) row[c] = (row[c] - m) * s;
  }
}

void normalise_rows(DType type, void* block, int64_t rows, int64_t C, double eps) {
  if (type == kFloat64) {
    normalise_rows_of(static_cast<double*>(block), rows, C, eps);
  } else {
    normalise_rows_of(static_cast<float*>(block), rows, C, eps);
  }
}

template <class A, class T>
void emit_of(T* out, const A* block, int64_t n, bool stream) {
  int64_t i = 0;
  if (stream) {
    for (; i < n && !is_aligned(out + i, 64); ++i) out[i] = narrow<T>(block[i]);
    for (; i + 2 * kLanes<A> <= n; i += 2 * kLanes<A>) {  // two: a whole line of 16-bit numbers
      Convert<A, T>::stream(out + i, load<A>(block + i));
      Convert<A, T>::stream(out + i + kLanes<A>, load<A>(block + i + kLanes<A>));
    }
    finish_streaming();
  }
  for (; i + kLanes<A> <= n; i += kLanes<A>) store<A>(out + i, load<A>(block + i));
  for (; i < n; ++i) out[i] = narrow<T>(block[i]);
}

void emit(DType type, DType out_type, void* out, const void* block, int64_t n, bool stream) {
  with_type(out_type, [&](auto zero) {
    typedef decltype(zero) T;
    if (type == kFloat64) {
      emit_of(static_cast<T*>(out), static_cast<const double*>(block), n, stream);
    } else {
      emit_of(static_cast<T*>(out), static_cast<const float*>(block), n, stream);
    }
  });
}

}  // namespace

extern const LayersKernels D2V_TABLE(layers_kernels);
const LayersKernels D2V_TABLE(layers_kernels) = {column_stats,      column_scale,   row_stats, combine,
                                                 normalise_columns, normalise_rows, emit};

}  // namespace d2v
