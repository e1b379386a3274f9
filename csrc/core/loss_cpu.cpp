// The regression loss, compiled once per instruction level.
#include "loss.h"
#include "simd.h"

namespace d2v {
namespace {

constexpr int kChunk = 16;  // rows whose channels are gone through twice while they are in the nearest cache

D2V_INLINE int64_t row_at(const Indices& index, int64_t p) {
  if (!index.data) return p;
  const int64_t at = p * index.stride;
  return index.wide ? static_cast<const int64_t*>(index.data)[at] : static_cast<const int32_t*>(index.data)[at];
}

// Calls body(TP{}, TT{}) with the types of prediction and target: both fp64 or neither.
template <class F>
D2V_INLINE void with_types(const LossArgs* a, F body) {
  if (a->prediction_type == kFloat64) return body(double{}, double{});
  with_type(a->prediction_type, [&](auto prediction) {
    with_type(a->target_type, [&](auto target) {
      if constexpr (!__is_same(decltype(prediction), double) && !__is_same(decltype(target), double)) {
        body(prediction, target);
      }
    });
  });
}

// Smooth-L1 without a branch: m (|d| - m / 2) / beta with m = min(|d|, beta); NaN comes through.
template <class A, bool SQUARED>
D2V_INLINE Vec<A> error_of(Vec<A> d, A beta, A inverse_beta) {
  if (SQUARED) return d * d;
  const Vec<A> size = magnitude(d);
  const Vec<A> m = size < beta ? size : splat(beta);
  return m * (size - m * A(0.5)) * inverse_beta;
}
template <class A, bool SQUARED>
D2V_INLINE Vec<A> slope_of(Vec<A> d, A beta, A inverse_beta) {
  if (SQUARED) return d + d;
  const Vec<A> low = d < -beta ? splat(-beta) : d;
  return (low > beta ? splat(beta) : low) * inverse_beta;
}

template <class A>
struct Chunk {
  int64_t rows;
  A inverse, merge_mean, merge_m2, beta, inverse_beta;
};

template <class A>
struct Moments {
  A *xm, *xq, *ym, *yq;  // mean and m2 of prediction and target, C each
};

template <class TP, class TT>
struct Rows {
  const TP* x[kChunk];
  const TT* y[kChunk];
};

template <class A, class P>
D2V_INLINE void merge_into(A* mean, A* m2, Vec<A> m, Vec<A> q, const Chunk<A>& k, int lanes) {
  const Vec<A> old = load_lanes<A, P>(mean, lanes), delta = m - old;
  store_lanes<A, P>(mean, old + delta * k.merge_mean, lanes);
  store_lanes<A, P>(m2, load_lanes<A, P>(m2, lanes) + (q + delta * delta * k.merge_m2), lanes);
}

// Two vectors of channels over the rows of a chunk, while the rows of the next one are asked for.
template <bool SQUARED, class TP, class TT>
D2V_INLINE Vec<Acc<TP>> chunk_pair(const Chunk<Acc<TP>>& k, const Rows<TP, TT>& rows, const Rows<TP, TT>& next,
                                   int64_t c, const Moments<Acc<TP>>& into) {
  typedef Acc<TP> A;
  typedef SameOrder<A, TP, TP, TT> X;
  typedef SameOrder<A, TT, TP, TT> Y;
  constexpr int L = kLanes<A>;
  Pair<A> sx{}, sy{}, error{}, qx{}, qy{};
#pragma GCC unroll 4
  for (int64_t i = 0; i < k.rows; ++i) {
    prefetch_pair(next.x[i] + c);
    prefetch_pair(next.y[i] + c);
    const Pair<A> x = X::load(rows.x[i] + c), y = Y::load(rows.y[i] + c);
    sx = {sx.a + x.a, sx.b + x.b};
    sy = {sy.a + y.a, sy.b + y.b};
    error.a += error_of<A, SQUARED>(x.a - y.a, k.beta, k.inverse_beta);
    error.b += error_of<A, SQUARED>(x.b - y.b, k.beta, k.inverse_beta);
  }
  const Pair<A> mx{sx.a * k.inverse, sx.b * k.inverse}, my{sy.a * k.inverse, sy.b * k.inverse};
#pragma GCC unroll 4
  for (int64_t i = 0; i < k.rows; ++i) {
    const Pair<A> x = X::load(rows.x[i] + c), y = Y::load(rows.y[i] + c);
    const Vec<A> xa = x.a - mx.a, xb = x.b - mx.b, ya = y.a - my.a, yb = y.b - my.b;
    qx = {qx.a + xa * xa, qx.b + xb * xb};
    qy = {qy.a + ya * ya, qy.b + yb * yb};
  }
  merge_into<A, Full>(into.xm + c, into.xq + c, mx.a, qx.a, k, L);
  merge_into<A, Full>(into.xm + c + L, into.xq + c + L, mx.b, qx.b, k, L);
  merge_into<A, Full>(into.ym + c, into.yq + c, my.a, qy.a, k, L);
  merge_into<A, Full>(into.ym + c + L, into.yq + c + L, my.b, qy.b, k, L);
  return error.a + error.b;
}

// The channels that do not fill two vectors.
template <bool SQUARED, class TP, class TT>
D2V_INLINE Vec<Acc<TP>> chunk_rest(const Chunk<Acc<TP>>& k, const Rows<TP, TT>& rows, int64_t c, int lanes,
                                   const Moments<Acc<TP>>& into) {
  typedef Acc<TP> A;
  Vec<A> sx{}, sy{}, error{}, qx{}, qy{};
  for (int64_t i = 0; i < k.rows; ++i) {
    const Vec<A> x = load_part<A>(rows.x[i] + c, lanes), y = load_part<A>(rows.y[i] + c, lanes);
    sx += x;
    sy += y;
    error += error_of<A, SQUARED>(x - y, k.beta, k.inverse_beta);  // lanes past the row: 0 - 0
  }
  const Vec<A> mx = sx * k.inverse, my = sy * k.inverse;
  for (int64_t i = 0; i < k.rows; ++i) {
    const Vec<A> x = load_part<A>(rows.x[i] + c, lanes) - mx, y = load_part<A>(rows.y[i] + c, lanes) - my;
    qx += x * x;
    qy += y * y;
  }
  merge_into<A, Part>(into.xm + c, into.xq + c, mx, qx, k, lanes);
  merge_into<A, Part>(into.ym + c, into.yq + c, my, qy, k, lanes);
  return error;
}

// Addresses of rows [p, p + n).
template <class TP, class TT>
D2V_INLINE void find_rows(const LossArgs* a, int64_t p, int64_t n, Rows<TP, TT>* rows) {
  for (int64_t i = 0; i < n; ++i) {
    rows->x[i] = static_cast<const TP*>(a->prediction) + row_at(a->prediction_index, p + i) * a->prediction_stride;
    rows->y[i] = static_cast<const TT*>(a->target) + row_at(a->target_index, p + i) * a->target_stride;
  }
}

template <bool SQUARED, class TP, class TT>
double forward_of(const LossArgs* a, int64_t begin, int64_t end, const Moments<Acc<TP>>& into) {
  typedef Acc<TP> A;
  constexpr int L = kLanes<A>;
  const A beta = static_cast<A>(a->beta);
  double total = 0;
  Rows<TP, TT> rows, next;
  for (int64_t p = begin; p < end; p += kChunk) {
    const int64_t n = end - p < kChunk ? end - p : kChunk, seen = p - begin;
    const double share = static_cast<double>(n) / static_cast<double>(seen + n), m2 = share * static_cast<double>(seen);
    const Chunk<A> k{n,    A(1) / static_cast<A>(n),      static_cast<A>(share), static_cast<A>(m2),
                     beta, A(1) / (SQUARED ? A(1) : beta)};
    find_rows(a, p, n, &rows);
    find_rows(a, p + 2 * kChunk <= end ? p + kChunk : p, n, &next);
    Vec<A> error{};
    int64_t c = 0;
    for (; c + 2 * L <= a->C; c += 2 * L) error += chunk_pair<SQUARED>(k, rows, next, c, into);
    for (; c < a->C; c += L) {
      error += chunk_rest<SQUARED>(k, rows, c, a->C - c < L ? static_cast<int>(a->C - c) : L, into);
    }
    total += static_cast<double>(sum_lanes<A>(error));
  }
  return total;
}

double forward(const LossArgs* a, int64_t begin, int64_t end, const LossMoments* moments) {
  double total = 0;
  with_types(a, [&](auto prediction, auto target) {
    typedef decltype(prediction) TP;
    typedef decltype(target) TT;
    typedef Acc<TP> A;
    const Moments<A> into{static_cast<A*>(moments->prediction_mean), static_cast<A*>(moments->prediction_m2),
                          static_cast<A*>(moments->target_mean), static_cast<A*>(moments->target_m2)};
    total =
        a->beta == 0 ? forward_of<true, TP, TT>(a, begin, end, into) : forward_of<false, TP, TT>(a, begin, end, into);
  });
  return total;
}

template <class A>
void merge_of(int64_t C, int64_t seen, int64_t rows, A* mean, A* m2, const A* new_mean, const A* new_m2) {
  const double share = static_cast<double>(rows) / static_cast<double>(seen + rows);
  const A w = static_cast<A>(share), w2 = static_cast<A>(share * static_cast<double>(seen));
  for (int64_t c = 0; c < C; ++c) {
    const A delta = new_mean[c] - mean[c];
    mean[c] += delta * w;
    m2[c] += new_m2[c] + delta * delta * w2;
  }
}

void merge(DType type, int64_t C, int64_t seen, int64_t rows, void* mean, void* m2, const void* new_mean,
           const void* new_m2) {
  if (type == kFloat64) {
    merge_of(C, seen, rows, static_cast<double*>(mean), static_cast<double*>(m2), static_cast<const double*>(new_mean),
             static_cast<const double*>(new_m2));
  } else {
    merge_of(C, seen, rows, static_cast<float*>(mean), static_cast<float*>(m2), static_cast<const float*>(new_mean),
             static_cast<const float*>(new_m2));
  }
}

template <class A>
struct Slope {
  A weight, beta, inverse_beta;
};

template <bool SQUARED, bool STREAM, class TP, class TT>
D2V_INLINE void gradient_row(const TP* x, const TT* y, int64_t C, const Slope<Acc<TP>>& k, TP* out) {
  typedef Acc<TP> A;
  typedef SameOrder<A, TP, TP, TT> X;
  typedef SameOrder<A, TT, TP, TT> Y;
  constexpr int L = kLanes<A>;
  int64_t c = 0;
#pragma GCC unroll 2
  for (; c + 2 * L <= C; c += 2 * L) {
    const Pair<A> p = X::load(x + c), t = Y::load(y + c);
    X::template store<STREAM>(out + c, {slope_of<A, SQUARED>(p.a - t.a, k.beta, k.inverse_beta) * k.weight,
                                        slope_of<A, SQUARED>(p.b - t.b, k.beta, k.inverse_beta) * k.weight});
  }
  for (; c < C; c += L) {
    const int lanes = C - c < L ? static_cast<int>(C - c) : L;
    const Vec<A> d = load_part<A>(x + c, lanes) - load_part<A>(y + c, lanes);
    store_part<A>(out + c, slope_of<A, SQUARED>(d, k.beta, k.inverse_beta) * k.weight, lanes);
  }
}

template <bool SQUARED, class TP, class TT>
void backward_of(const LossArgs* a, double grad, const int64_t* selected, TP* out, int64_t begin, int64_t end,
                 bool stream) {
  typedef Acc<TP> A;
  const A beta = static_cast<A>(a->beta);
  const Slope<A> k{static_cast<A>(grad) * static_cast<A>(a->scale), beta, A(1) / (SQUARED ? A(1) : beta)};
  for (int64_t r = begin; r < end; ++r) {
    TP* const row = out + r * a->C;
    const int64_t p = selected ? selected[r] : r;
    if (p < 0) {
      zero_row(row, a->C * static_cast<int64_t>(sizeof(TP)), stream);
      continue;
    }
    const TP* x = static_cast<const TP*>(a->prediction) + r * a->prediction_stride;
    const TT* y = static_cast<const TT*>(a->target) + row_at(a->target_index, p) * a->target_stride;
    if (stream && is_aligned(row, 64)) {
      gradient_row<SQUARED, true>(x, y, a->C, k, row);
    } else {
      gradient_row<SQUARED, false>(x, y, a->C, k, row);
    }
  }
  if (stream) finish_streaming();
}

void backward(const LossArgs* a, double grad, const int64_t* selected, void* out, int64_t begin, int64_t end,
              bool stream) {
  with_types(a, [&](auto prediction, auto target) {
    typedef decltype(prediction) TP;
    typedef decltype(target) TT;
    TP* const rows = static_cast<TP*>(out);
    if (a->beta == 0) {
      backward_of<true, TP, TT>(a, grad, selected, rows, begin, end, stream);
    } else {
      backward_of<false, TP, TT>(a, grad, selected, rows, begin, end, stream);
    }
  });
}

}  // namespace

extern const LossKernels D2V_TABLE(loss_kernels);
const LossKernels D2V_TABLE(loss_kernels) = {forward, merge, backward};

}  // namespace d2v
