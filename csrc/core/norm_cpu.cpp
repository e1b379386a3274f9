// Dropout, residual sum and layer norm, compiled once per instruction level.
#include "noise.h"
#include "norm.h"
#include "rows.h"

namespace d2v {
namespace {

constexpr int kSums = 4;  // of a row: an addition need not wait for the one before it

static_assert(kNormPadding % (2 * kLanes<float>) == 0, "whole draws");

D2V_INLINE void store_factors(float* out, VU words, uint32_t threshold, float scale) {
  store<float>(out, bit_cast<VF>(bit_cast<VU>(words >= threshold) & bit_cast<VU>(splat(scale))));
}
D2V_INLINE void store_factors(double* out, VU words, uint32_t threshold, double scale) {
  for (int i = 0; i < kLanes<float>; ++i) out[i] = words[i] >= threshold ? scale : 0.0;
}

// What the channels of one row are multiplied by: the scale where kept, else 0.
template <class A>
D2V_INLINE void draw_row(const DropoutArgs& d, int64_t n, int64_t t, int64_t C, A* factors) {
  constexpr int L = kLanes<float>;
  const uint64_t key = static_cast<uint64_t>(d.keys[n * d.key_stride]);
  VU64 counter = first_counters();
  for (int64_t c = 0; c < C; c += 2 * L) {
    const Words w = philox(counter, static_cast<uint32_t>(t), key);
    VU low, high;
    word_pair(w, &low, &high);
    store_factors(factors + c, low, d.threshold, static_cast<A>(d.scale));
    store_factors(factors + c + L, high, d.threshold, static_cast<A>(d.scale));
    counter += static_cast<uint64_t>(L / 2);
  }
}

// Row number i of (N, T) as sample and token.
struct Place {
  int64_t n, t;
  template <class T>
  D2V_INLINE const T* in(const Rows3& rows, T) const {
    return static_cast<const T*>(rows.data) + n * rows.stride0 + t * rows.stride1;
  }
  D2V_INLINE void advance(int64_t tokens) {
    if (++t == tokens) t = 0, ++n;
  }
};

// for_vectors whose bodies get a number below kSums too, for independent sums.
template <class A, class F>
D2V_INLINE void for_sums(int64_t n, F body) {
  constexpr int L = kLanes<A>;
  int64_t c = 0;
  for (; c + kSums * L <= n; c += kSums * L) {
    for (int k = 0; k < kSums; ++k) body(Full{}, c + k * L, L, k);
  }
  for (; c + L <= n; c += L) body(Full{}, c, L, 0);
  if (c < n) body(Part{}, c, static_cast<int>(n - c), 0);
}

template <class A>
D2V_INLINE A total_of(const Vec<A>* sums) {
  return sum_lanes<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class A>
D2V_INLINE Vec<A> only(Full, Vec<A> v, int) {
  return v;
}
template <class A>
D2V_INLINE Vec<A> only(Part, Vec<A> v, int lanes) {
  return first_lanes<A>(v, lanes);
}

// Mean and 1 / sqrt(variance + eps) of a row in two passes while it is in the nearest cache. The first takes off a
// number near the mean: beside an outlier channel the others keep their digits, and equal numbers give just that mean.
template <class T>
D2V_INLINE void find_moments(const T* x, int64_t C, double eps, Acc<T>* mean, Acc<T>* scale) {
  typedef Acc<T> A;
  const A inverse = A(1) / static_cast<A>(C);
  const A shift = median<A>(widen(x[0]), widen(x[C / 2]), widen(x[C - 1]));
  Vec<A> sum[kSums] = {}, square[kSums] = {};
  for_sums<A>(C, [&](auto part, int64_t c, int lanes, int k) __attribute__((always_inline)) {
    sum[k] += only<A>(part, load_lanes<A, decltype(part)>(x + c, lanes) - shift, lanes);
  });
  const A m = shift + total_of<A>(sum) * inverse;
  for_sums<A>(C, [&](auto part, int64_t c, int lanes, int k) __attribute__((always_inline)) {
    const Vec<A> d = only<A>(part, load_lanes<A, decltype(part)>(x + c, lanes) - m, lanes);
    square[k] += d * d;
  });
  *mean = m;
  *scale = A(1) / root(total_of<A>(square) * inverse + static_cast<A>(eps));
}

template <class T, bool DROP>
D2V_INLINE void forward_row(const NormArgs* a, const T* branch, const T* residual, const Acc<T>* factors, T* total,
                            T* normed) {
  typedef Acc<T> A;
  for_vectors<A>(a->C, [&](auto part, int64_t c, int lanes) __attribute__((always_inline)) {
    typedef decltype(part) P;
    Vec<A> b = load_lanes<A, P>(branch + c, lanes);
    if (DROP) b *= load<A>(factors + c);
    store_lanes<A, P>(total + c, load_lanes<A, P>(residual + c, lanes) + b, lanes);
  });
  A mean, scale;
  find_moments(total, a->C, a->eps, &mean, &scale);
  const A *const weight = static_cast<const A*>(a->weight), *const bias = static_cast<const A*>(a->bias);
  for_vectors<A>(a->C, [&](auto part, int64_t c, int lanes) __attribute__((always_inline)) {
    typedef decltype(part) P;
    Vec<A> x = (load_lanes<A, P>(total + c, lanes) - mean) * scale;
    if (weight) x *= load_lanes<A, P>(weight + c, lanes);
    if (bias) x += load_lanes<A, P>(bias + c, lanes);
    store_lanes<A, P>(normed + c, x, lanes);
  });
}

template <class T, bool DROP>
void forward_of(const NormArgs* a, int64_t begin, int64_t end, Acc<T>* factors) {
  Place at{begin / a->T, begin % a->T};
  for (int64_t i = begin; i < end; ++i, at.advance(a->T)) {
    if (DROP) draw_row(a->dropout, at.n, at.t, a->C, factors);
    forward_row<T, DROP>(a, at.in(a->branch, T{}), at.in(a->residual, T{}), factors,
                         static_cast<T*>(a->total) + i * a->C, static_cast<T*>(a->normed) + i * a->C);
  }
}

void forward(const NormArgs* a, int64_t begin, int64_t end, void* factors) {
  with_type(a->type, [&](auto zero) {
    typedef decltype(zero) T;
    if (a->dropout.keys) {
      forward_of<T, true>(a, begin, end, static_cast<Acc<T>*>(factors));
    } else {
      forward_of<T, false>(a, begin, end, nullptr);
    }
  });
}

template <class T>
struct GradientRow {
  const T *grad, *straight, *total;  // straight null: 0
  T *of_branch, *of_residual;
};

// With x = (total - mean) * scale and g = grad * weight: scale * (g - mean(g) - x * mean(g x)) + straight.
template <class T, bool DROP>
D2V_INLINE void backward_row(const GradientRow<T>& r, int64_t C, const Acc<T>* weight, double eps,
                             const Acc<T>* factors, Acc<T>* of_weight, Acc<T>* of_bias) {
  typedef Acc<T> A;
  A mean, scale;
  find_moments(r.total, C, eps, &mean, &scale);
  Vec<A> g_sum[kSums] = {}, gx_sum[kSums] = {};
  for_sums<A>(C, [&](auto part, int64_t c, int lanes, int k) __attribute__((always_inline)) {
    typedef decltype(part) P;
    Vec<A> g = load_lanes<A, P>(r.grad + c, lanes);  // 0 past the row
    const Vec<A> x = only<A>(part, (load_lanes<A, P>(r.total + c, lanes) - mean) * scale, lanes);
    store_lanes<A, P>(of_weight + c, load_lanes<A, P>(of_weight + c, lanes) + g * x, lanes);
    store_lanes<A, P>(of_bias + c, load_lanes<A, P>(of_bias + c, lanes) + g, lanes);
    if (weight) g *= load_lanes<A, P>(weight + c, lanes);
    g_sum[k] += g;
    gx_sum[k] += g * x;
  });
  const A mean_g = total_of<A>(g_sum) / static_cast<A>(C), mean_gx = total_of<A>(gx_sum) / static_cast<A>(C);
  for_vectors<A>(C, [&](auto part, int64_t c, int lanes) __attribute__((always_inline)) {
    typedef decltype(part) P;
    Vec<A> g = load_lanes<A, P>(r.grad + c, lanes);
    if (weight) g *= load_lanes<A, P>(weight + c, lanes);
    const Vec<A> x = (load_lanes<A, P>(r.total + c, lanes) - mean) * scale;
    Vec<A> d = (g - mean_g - x * mean_gx) * scale;
    if (r.straight) d += load_lanes<A, P>(r.straight + c, lanes);
    store_lanes<A, P>(r.of_residual + c, d, lanes);
    if (DROP) store_lanes<A, P>(r.of_branch + c, d * load<A>(factors + c), lanes);
  });
}

template <class T, bool DROP>
void backward_of(const NormBackwardArgs* a, int64_t begin, int64_t end, Acc<T>* factors, Acc<T>* sums, Acc<T>* chunk) {
  const int64_t C = a->C;
  Place at{begin / a->T, begin % a->T};
  for (int64_t i = begin; i < end;) {
    const int64_t stop = i + kNormChunk < end ? i + kNormChunk : end;
    memset(chunk, 0, static_cast<size_t>(2 * C) * sizeof(Acc<T>));
    for (; i < stop; ++i, at.advance(a->T)) {
      if (DROP) draw_row(a->dropout, at.n, at.t, C, factors);
      const GradientRow<T> row{at.in(a->grad_normed, T{}), a->grad_total.data ? at.in(a->grad_total, T{}) : nullptr,
                               at.in(a->total, T{}), DROP ? static_cast<T*>(a->grad_branch) + i * C : nullptr,
                               static_cast<T*>(a->grad_residual) + i * C};
      backward_row<T, DROP>(row, C, static_cast<const Acc<T>*>(a->weight), a->eps, factors, chunk, chunk + C);
    }
    for (int64_t c = 0; c < 2 * C; ++c) sums[c] += chunk[c];
  }
}

void backward(const NormBackwardArgs* a, int64_t begin, int64_t end, void* factors, void* sums, void* chunk) {
  with_type(a->type, [&](auto zero) {
    typedef decltype(zero) T;
    typedef Acc<T> A;
    A *const f = static_cast<A*>(factors), *const s = static_cast<A*>(sums), *const k = static_cast<A*>(chunk);
    if (a->dropout.keys) {
      backward_of<T, true>(a, begin, end, f, s, k);
    } else {
      backward_of<T, false>(a, begin, end, f, s, k);
    }
  });
}

}  // namespace

extern const NormKernels D2V_TABLE(norm_kernels);
const NormKernels D2V_TABLE(norm_kernels) = {forward, backward};

}  // namespace d2v
