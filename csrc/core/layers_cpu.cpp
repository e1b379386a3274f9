// Layer statistics and the average, compiled once per instruction level.
#include "layers.h"
#include "rows.h"

namespace d2v {
namespace {

constexpr int kChunk = 8;  // rows that are gone through twice while they are in the nearest cache
constexpr int kSums = 2;   // of a column: an addition need not wait for the one before it
constexpr int kRows = kVectorBytes == 64 ? 8 : 4;
constexpr int kStatRows = kVectorBytes == 64 ? 8 : 2;  // whose statistics over channels are formed together

struct Merge {  // weights of Chan's merge of `rows` new rows into `seen` old ones
  double mean, m2;
  Merge(int64_t seen, int64_t rows)
      : mean(static_cast<double>(rows) / static_cast<double>(seen + rows)), m2(mean * static_cast<double>(seen)) {}
};

template <class A>
struct Chunk {
  int64_t rows;
  A inverse, mean, m2;  // 1 / rows and the weights of the merge
};

template <class A>
D2V_INLINE void merge_vector(A* mean, A* m2, Vec<A> m, Vec<A> q, const Chunk<A>& k) {
  const Vec<A> old = load<A>(mean), delta = m - old;
  store<A>(mean, old + delta * k.mean);
  store<A>(m2, load<A>(m2) + (q + delta * delta * k.m2));
}

// Two vectors of channels. N: rows where known at compile time, else 0; a whole chunk meanwhile asks for the next one,
// which keeps memory busy during the arithmetic.
template <class T, int N>
D2V_INLINE void chunk_pair(const T* x, int64_t stride, const T* next, const Chunk<Acc<T>>& k, Acc<T>* mean,
                           Acc<T>* m2) {
  typedef Acc<T> A;
  typedef PairOrder<A, T> Order;
  constexpr int L = kLanes<A>;
  const int64_t rows = N ? N : k.rows;
  const Pair<A> first = Order::load(x);  // taken off, so that the mean of equal numbers is that number exactly
  Pair<A> sum[kSums] = {}, square[kSums] = {};
  for (int64_t i = 0; i < rows; ++i) {
    if (N) prefetch_pair(next + i * stride);
    const Pair<A> v = Order::load(x + i * stride);
    sum[i % kSums].a += v.a - first.a;
    sum[i % kSums].b += v.b - first.b;
  }
  const Vec<A> ma = first.a + (sum[0].a + sum[1].a) * k.inverse, mb = first.b + (sum[0].b + sum[1].b) * k.inverse;
  for (int64_t i = 0; i < rows; ++i) {
    const Pair<A> v = Order::load(x + i * stride);
    const Vec<A> da = v.a - ma, db = v.b - mb;
    square[i % kSums].a += da * da;
    square[i % kSums].b += db * db;
  }
  merge_vector<A>(mean, m2, ma, square[0].a + square[1].a, k);
  merge_vector<A>(mean + L, m2 + L, mb, square[0].b + square[1].b, k);
}

// The channels that do not fill two vectors.
template <class T>
void chunk_rest(const T* x, int64_t stride, int lanes, const Chunk<Acc<T>>& k, Acc<T>* mean, Acc<T>* m2) {
  typedef Acc<T> A;
  const Vec<A> first = load_part<A>(x, lanes);
  Vec<A> sum{}, q{};
  for (int64_t i = 0; i < k.rows; ++i) sum += load_part<A>(x + i * stride, lanes) - first;
  const Vec<A> m = first + sum * k.inverse;
  for (int64_t i = 0; i < k.rows; ++i) {
    const Vec<A> d = load_part<A>(x + i * stride, lanes) - m;
    q += d * d;
  }
  const Vec<A> old = load_part<A>(mean, lanes), delta = m - old;
  store_part<A>(mean, old + delta * k.mean, lanes);
  store_part<A>(m2, load_part<A>(m2, lanes) + (q + delta * delta * k.m2), lanes);
}

// Statistics of rows by themselves, into (mean, m2) that are 0.
template <class T>
void block_stats(const T* x, int64_t stride, int64_t rows, int64_t C, Acc<T>* mean, Acc<T>* m2) {
  typedef Acc<T> A;
  constexpr int L = kLanes<A>;
  for (int64_t t = 0; t < rows; t += kChunk) {
    const int64_t n = rows - t < kChunk ? rows - t : kChunk;
    const Merge merge(t, n);
    const Chunk<A> k{n, A(1) / static_cast<A>(n), static_cast<A>(merge.mean), static_cast<A>(merge.m2)};
    const T* p = x + t * stride;
    const T* next = t + 2 * kChunk <= rows ? p + kChunk * stride : p;
    int64_t c = 0;
    for (; c + 2 * L <= C; c += 2 * L) {
      if (n == kChunk) {
        chunk_pair<T, kChunk>(p + c, stride, next + c, k, mean + c, m2 + c);
      } else {
        chunk_pair<T, 0>(p + c, stride, next + c, k, mean + c, m2 + c);
      }
    }
    for (; c < C; c += L) chunk_rest(p + c, stride, C - c < L ? static_cast<int>(C - c) : L, k, mean + c, m2 + c);
  }
}

// In two levels, chunks into a block and the block into what was seen: few merges, few roundings.
template <class T>
void column_stats_of(const T* x, int64_t stride, int64_t rows, int64_t C, int64_t seen, Acc<T>* mean, Acc<T>* m2,
                     Acc<T>* scratch) {
  typedef Acc<T> A;
  A *const block_mean = scratch, *const block_m2 = scratch + C;
  memset(scratch, 0, static_cast<size_t>(2 * C) * sizeof(A));
  block_stats(x, stride, rows, C, block_mean, block_m2);
  const Merge merge(seen, rows);
  const A w = static_cast<A>(merge.mean), w2 = static_cast<A>(merge.m2);
  for (int64_t c = 0; c < C; ++c) {
    const A delta = block_mean[c] - mean[c];
    mean[c] += delta * w;
    m2[c] += block_m2[c] + delta * delta * w2;
  }
}

void column_stats(DType type, const void* x, int64_t stride, int64_t rows, int64_t C, int64_t seen, void* mean,
                  void* m2, void* scratch) {
  with_type(type, [&](auto zero) {
    typedef decltype(zero) T;
    typedef Acc<T> A;
    column_stats_of(static_cast<const T*>(x), stride, rows, C, seen, static_cast<A*>(mean), static_cast<A*>(m2),
                    static_cast<A*>(scratch));
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

// Sums of x - from, or of its square, over N rows at once: no row's additions wait for another's. The first pass asks
// for the rows after these.
template <class T, int N, bool SQUARE>
D2V_INLINE void sum_rows(const T* x, int64_t stride, int64_t C, const Acc<T>* from, Acc<T>* total) {
  typedef Acc<T> A;
  typedef PairOrder<A, T> Order;
  constexpr int L = kLanes<A>;
  Pair<A> sum[N] = {};
  int64_t c = 0;
  for (; c + 2 * L <= C; c += 2 * L) {
    for (int j = 0; j < N; ++j) {
      if (!SQUARE) prefetch_pair(x + (j + N) * stride + c);
      const Pair<A> v = Order::load(x + j * stride + c);
      const Vec<A> da = v.a - from[j], db = v.b - from[j];
      sum[j].a += SQUARE ? da * da : da;
      sum[j].b += SQUARE ? db * db : db;
    }
  }
  for (; c < C; c += L) {
    const int lanes = C - c < L ? static_cast<int>(C - c) : L;
    for (int j = 0; j < N; ++j) {
      const Vec<A> d = first_lanes<A>(load_part<A>(x + j * stride + c, lanes) - from[j], lanes);
      sum[j].a += SQUARE ? d * d : d;
    }
  }
  for (int j = 0; j < N; ++j) total[j] = sum_lanes<A>(sum[j].a + sum[j].b);
}

// Mean and variance of N rows in two passes. One number of the row is taken off in the first, so that the mean of equal
// numbers is that number exactly. It is the median of three, because an outlier channel (common in transformers) would
// cost every other number the digits that it lacks.
template <class T, int N>
D2V_INLINE void row_moments(const T* x, int64_t stride, int64_t C, Acc<T>* mean, Acc<T>* variance) {
  typedef Acc<T> A;
  const A inverse = A(1) / static_cast<A>(C);
  A shift[N], sum[N];
  for (int j = 0; j < N; ++j) {
    const T* row = x + j * stride;
    shift[j] = median<A>(widen(row[0]), widen(row[C / 2]), widen(row[C - 1]));
  }
  sum_rows<T, N, false>(x, stride, C, shift, sum);
  for (int j = 0; j < N; ++j) mean[j] = shift[j] + sum[j] * inverse;
  sum_rows<T, N, true>(x, stride, C, mean, sum);
  for (int j = 0; j < N; ++j) variance[j] = sum[j] * inverse;
}

void row_stats(DType type, const void* x, int64_t stride, int64_t rows, int64_t C, double eps, double factor,
               void* mean, void* scale) {
  with_type(type, [&](auto zero) {
    typedef decltype(zero) T;
    typedef Acc<T> A;
    const T* const row = static_cast<const T*>(x);
    A *const m = static_cast<A*>(mean), *const s = static_cast<A*>(scale);
    int64_t t = 0;
    for (; t + kStatRows <= rows; t += kStatRows) row_moments<T, kStatRows>(row + t * stride, stride, C, m + t, s + t);
    for (; t < rows; ++t) row_moments<T, 1>(row + t * stride, stride, C, m + t, s + t);
    for (t = 0; t < rows; ++t) s[t] = static_cast<A>(factor) / root(s[t] + static_cast<A>(eps));
  });
}

// N rows at two vectors of channels: one load of mean and scale serves them all.
template <class T, int N>
D2V_INLINE void combine_pair(const CombineArgs* a, int64_t t, int64_t c) {
  typedef Acc<T> A;
  typedef PairOrder<A, T> Order;
  constexpr int L = kLanes<A>;
  const A* mean = static_cast<const A*>(a->mean) + c;
  const A* scale = static_cast<const A*>(a->scale) + c;
  Pair<A> sum[N] = {};
  for (int64_t k = 0; k < a->K; ++k) {
    const int64_t stride = a->stride[k];
    const T* x = static_cast<const T*>(a->x[k]) + t * stride + c;
    const Vec<A> ma = load<A>(mean + k * a->C), mb = load<A>(mean + k * a->C + L);
    const Vec<A> wa = load<A>(scale + k * a->C), wb = load<A>(scale + k * a->C + L);
    for (int j = 0; j < N; ++j) {
      if (N > 1) prefetch_pair(x + (j + a->next) * stride);
      const Pair<A> v = Order::load(x + j * stride);
      sum[j].a += (v.a - ma) * wa;
      sum[j].b += (v.b - mb) * wb;
    }
  }
  A* out = static_cast<A*>(a->block) + t * a->C + c;
  for (int j = 0; j < N; ++j) {
    const Pair<A> v = Order::to_natural(sum[j]);
    store<A>(out + j * a->C, v.a);
    store<A>(out + j * a->C + L, v.b);
  }
}

// The channels that do not fill two vectors.
template <class T, int N>
D2V_INLINE void combine_rest(const CombineArgs* a, int64_t t, int64_t c, int lanes) {
  typedef Acc<T> A;
  const A* mean = static_cast<const A*>(a->mean) + c;
  const A* scale = static_cast<const A*>(a->scale) + c;
  Vec<A> sum[N] = {};
  for (int64_t k = 0; k < a->K; ++k) {
    const T* x = static_cast<const T*>(a->x[k]) + t * a->stride[k] + c;
    const Vec<A> m = load_part<A>(mean + k * a->C, lanes), w = load_part<A>(scale + k * a->C, lanes);
    for (int j = 0; j < N; ++j) sum[j] += (load_part<A>(x + j * a->stride[k], lanes) - m) * w;
  }
  A* out = static_cast<A*>(a->block) + t * a->C + c;
  for (int j = 0; j < N; ++j) store_part<A>(out + j * a->C, sum[j], lanes);
}

template <class T, int N>
D2V_INLINE void combine_columns_block(const CombineArgs* a, int64_t t) {
  constexpr int L = kLanes<Acc<T>>;
  int64_t c = 0;
  for (; c + 2 * L <= a->C; c += 2 * L) combine_pair<T, N>(a, t, c);
  for (; c < a->C; c += L) combine_rest<T, N>(a, t, c, a->C - c < L ? static_cast<int>(a->C - c) : L);
}

template <class T>
void combine_columns(const CombineArgs* a) {
  int64_t t = 0;
  for (; t + kRows <= a->rows; t += kRows) combine_columns_block<T, kRows>(a, t);
  for (; t < a->rows; ++t) combine_columns_block<T, 1>(a, t);
}

// One row, N pairs of vectors of channels; mean and scale are one number per layer.
template <class T, int N>
D2V_INLINE void combine_row(const CombineArgs* a, int64_t t, int64_t c) {
  typedef Acc<T> A;
  typedef PairOrder<A, T> Order;
  constexpr int L = kLanes<A>;
  const A* mean = static_cast<const A*>(a->mean);
  const A* scale = static_cast<const A*>(a->scale);
  const A even = A(1) / static_cast<A>(a->K);
  Pair<A> sum[N] = {};
  for (int64_t k = 0; k < a->K; ++k) {
    const T* x = static_cast<const T*>(a->x[k]) + t * a->stride[k] + c;
    const A m = mean ? mean[k * a->rows + t] : A(0), s = scale ? scale[k * a->rows + t] : even;
    for (int j = 0; j < N; ++j) {
      const Pair<A> v = Order::load(x + 2 * j * L);
      sum[j].a += (v.a - m) * s;
      sum[j].b += (v.b - m) * s;
    }
  }
  A* out = static_cast<A*>(a->block) + t * a->C + c;
  for (int j = 0; j < N; ++j) {
    const Pair<A> v = Order::to_natural(sum[j]);
    store<A>(out + 2 * j * L, v.a);
    store<A>(out + (2 * j + 1) * L, v.b);
  }
}

template <class T>
D2V_INLINE void combine_row_part(const CombineArgs* a, int64_t t, int64_t c, int lanes) {
  typedef Acc<T> A;
  const A* mean = static_cast<const A*>(a->mean);
  const A* scale = static_cast<const A*>(a->scale);
  Vec<A> sum{};
  for (int64_t k = 0; k < a->K; ++k) {
    const T* x = static_cast<const T*>(a->x[k]) + t * a->stride[k] + c;
    const A m = mean ? mean[k * a->rows + t] : A(0), s = scale ? scale[k * a->rows + t] : A(1) / static_cast<A>(a->K);
    sum += (load_part<A>(x, lanes) - m) * s;
  }
  store_part<A>(static_cast<A*>(a->block) + t * a->C + c, sum, lanes);
}

template <class T>
void combine_rows(const CombineArgs* a) {
  constexpr int L = kLanes<Acc<T>>;
  for (int64_t t = 0; t < a->rows; ++t) {
    int64_t c = 0;
    for (; c + 8 * L <= a->C; c += 8 * L) combine_row<T, 4>(a, t, c);
    for (; c + 2 * L <= a->C; c += 2 * L) combine_row<T, 1>(a, t, c);
    for (; c < a->C; c += L) combine_row_part<T>(a, t, c, a->C - c < L ? static_cast<int>(a->C - c) : L);
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
    row_moments<A, 1>(row, C, C, &m, &v);
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
