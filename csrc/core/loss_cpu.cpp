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

D2V_INLINE Vec<float> magnitude(VF d) { return bit_cast<VF>(bit_cast<VU>(d) & 0x7fffffffu); }
D2V_INLINE VD magnitude(VD d) { return bit_cast<VD>(bit_cast<VU64>(d) & 0x7fffffffffffffffull); }

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
template <class A>
D2V_INLINE Vec<A> error_of(Vec<A> d, A beta, A inverse_beta) {
  if (beta == 0) return d * d;
  const Vec<A> size = magnitude(d);
  const Vec<A> m = size < beta ? size : splat(beta);
  return m * (size - m * A(0.5)) * inverse_beta;
}
template <class A>
D2V_INLINE Vec<A> slope_of(Vec<A> d, A beta, A inverse_beta) {
  if (beta == 0) return d + d;
  const Vec<A> low = d < -beta ? splat(-beta) : d;
  return (low > beta ? splat(beta) : low) * inverse_beta;
}

template <class A>
struct Chunk {
  int64_t rows;
  A inverse, merge_mean, merge_m2, beta, inverse_beta;
};

template <class A, class P>
D2V_INLINE void merge_into(A* mean, A* m2, Vec<A> m, Vec<A> q, const Chunk<A>& k, int lanes) {
  const Vec<A> old = load_lanes<A, P>(mean, lanes), delta = m - old;
  store_lanes<A, P>(mean, old + delta * k.merge_mean, lanes);
  store_lanes<A, P>(m2, load_lanes<A, P>(m2, lanes) + (q + delta * delta * k.merge_m2), lanes);
}

// One vector of channels over the rows of a chunk. N: rows where known at compile time, else 0.
template <class A, class P, int N, class TP, class TT>
D2V_INLINE Vec<A> chunk_column(const Chunk<A>& k, const TP* const* x, const TT* const* y, int64_t c, int lanes, A* xm,
                               A* xq, A* ym, A* yq) {
  Vec<A> sx{}, sy{}, error{}, qx{}, qy{};
  const int64_t rows = N ? N : k.rows;
  for (int64_t i = 0; i < rows; ++i) {
    const Vec<A> a = load_lanes<A, P>(x[i] + c, lanes), b = load_lanes<A, P>(y[i] + c, lanes);
    sx += a;
    sy += b;
    error += error_of<A>(a - b, k.beta, k.inverse_beta);  // lanes past the row: 0 - 0
  }
  const Vec<A> mx = sx * k.inverse, my = sy * k.inverse;
  for (int64_t i = 0; i < rows; ++i) {
    const Vec<A> a = load_lanes<A, P>(x[i] + c, lanes) - mx, b = load_lanes<A, P>(y[i] + c, lanes) - my;
    qx += a * a;
    qy += b * b;
  }
  merge_into<A, P>(xm + c, xq + c, mx, qx, k, lanes);
  merge_into<A, P>(ym + c, yq + c, my, qy, k, lanes);
  return error;
}

template <class TP, class TT>
double forward_of(const LossArgs* a, int64_t begin, int64_t end, const LossMoments* moments) {
  typedef Acc<TP> A;
  A* const xm = static_cast<A*>(moments->prediction_mean);
  A* const xq = static_cast<A*>(moments->prediction_m2);
  A* const ym = static_cast<A*>(moments->target_mean);
  A* const yq = static_cast<A*>(moments->target_m2);
  double total = 0;
  for (int64_t p = begin; p < end; p += kChunk) {
    const int64_t n = end - p < kChunk ? end - p : kChunk, seen = p - begin;
    const double share = static_cast<double>(n) / static_cast<double>(seen + n);
    const A beta = static_cast<A>(a->beta);
    const Chunk<A> k{
        n,    A(1) / static_cast<A>(n),        static_cast<A>(share), static_cast<A>(share * static_cast<double>(seen)),
        beta, A(1) / (beta == 0 ? A(1) : beta)};
    const TP* x[kChunk];
    const TT* y[kChunk];
    for (int64_t i = 0; i < n; ++i) {
      x[i] = static_cast<const TP*>(a->prediction) + row_at(a->prediction_index, p + i) * a->prediction_stride;
      y[i] = static_cast<const TT*>(a->target) + row_at(a->target_index, p + i) * a->target_stride;
    }
    Vec<A> error{};
    constexpr int L = kLanes<A>;
    int64_t c = 0;
    if (n == kChunk) {
      for (; c + L <= a->C; c += L) error += chunk_column<A, Full, kChunk>(k, x, y, c, L, xm, xq, ym, yq);
    }
    for (; c < a->C; c += L) {
      const int lanes = a->C - c < L ? static_cast<int>(a->C - c) : L;
      error += chunk_column<A, Part, 0>(k, x, y, c, lanes, xm, xq, ym, yq);
    }
    total += static_cast<double>(sum_lanes<A>(error));
  }
  return total;
}

double forward(const LossArgs* a, int64_t begin, int64_t end, const LossMoments* moments) {
  double total = 0;
  with_types(a, [&](auto prediction, auto target) {
    total = forward_of<decltype(prediction), decltype(target)>(a, begin, end, moments);
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

template <class TP, class TT, bool STREAM>
D2V_INLINE void gradient_row(const TP* x, const TT* y, int64_t C, Acc<TP> w, Acc<TP> beta, Acc<TP> inverse, TP* out) {
  typedef Acc<TP> A;
  constexpr int L = kLanes<A>;
  int64_t c = 0;
  for (; c + 2 * L <= C; c += 2 * L) {
    const Vec<A> g0 = slope_of<A>(load<A>(x + c) - load<A>(y + c), beta, inverse) * w;
    const Vec<A> g1 = slope_of<A>(load<A>(x + c + L) - load<A>(y + c + L), beta, inverse) * w;
    if (STREAM) {
      Convert<A, TP>::stream(out + c, g0);
      Convert<A, TP>::stream(out + c + L, g1);
    } else {
      store<A>(out + c, g0);
      store<A>(out + c + L, g1);
    }
  }
  for (; c < C; c += L) {
    const int lanes = C - c < L ? static_cast<int>(C - c) : L;
    const Vec<A> d = load_part<A>(x + c, lanes) - load_part<A>(y + c, lanes);
    store_part<A>(out + c, slope_of<A>(d, beta, inverse) * w, lanes);
  }
}

template <class TP, class TT>
void backward_of(const LossArgs* a, double grad, const int64_t* selected, TP* out, int64_t begin, int64_t end,
                 bool stream) {
  typedef Acc<TP> A;
  const A w = static_cast<A>(grad) * static_cast<A>(a->scale), beta = static_cast<A>(a->beta);
  const A inverse = A(1) / (beta == 0 ? A(1) : beta);
  for (int64_t r = begin; r < end; ++r) {
    TP* const row = out + r * a->C;
    const int64_t p = selected ? selected[r] : r;
    if (p < 0) {
      memset(row, 0, static_cast<size_t>(a->C) * sizeof(TP));
      continue;
    }
    const TP* x = static_cast<const TP*>(a->prediction) + r * a->prediction_stride;
    const TT* y = static_cast<const TT*>(a->target) + row_at(a->target_index, p) * a->target_stride;
    if (stream && is_aligned(row, 64)) {
      gradient_row<TP, TT, true>(x, y, a->C, w, beta, inverse, row);
    } else {
      gradient_row<TP, TT, false>(x, y, a->C, w, beta, inverse, row);
    }
  }
  if (stream) finish_streaming();
}

void backward(const LossArgs* a, double grad, const int64_t* selected, void* out, int64_t begin, int64_t end,
              bool stream) {
  with_types(a, [&](auto prediction, auto target) {
    typedef decltype(prediction) TP;
    backward_of<TP, decltype(target)>(a, grad, selected, static_cast<TP*>(out), begin, end, stream);
  });
}

}  // namespace

extern const LossKernels D2V_TABLE(loss_kernels);
const LossKernels D2V_TABLE(loss_kernels) = {forward, merge, backward};

}  // namespace d2v
