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
  D2V_INLINE const T* in(const Rows3& rows, T) const {  // null where there are none
    return rows.data ? static_cast<const T*>(rows.data) + n * rows.stride0 + t * rows.stride1 : nullptr;
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

template <class B, class T>
constexpr bool kMixed = sizeof(B) != sizeof(T);

template <class B, class T>
struct ForwardRow {
  const B* branch;
  const T* residual;
  T *total, *normed;
  B* copy;  // this and normed: null where it is not wanted
};

template <class B, class T, bool DROP>
D2V_INLINE void forward_row(const NormArgs* a, const ForwardRow<B, T>& r, const Acc<T>* factors) {
  typedef Acc<T> A;
  T* const total = r.total;
  for_vectors<A>(a->C, [&](auto part, int64_t c, int lanes) __attribute__((always_inline)) {
    typedef decltype(part) P;
    Vec<A> b = load_lanes<A, P>(r.branch + c, lanes);
    if (DROP) b *= load<A>(factors + c);
    store_lanes<A, P>(total + c, load_lanes<A, P>(r.residual + c, lanes) + b, lanes);
  });
  A mean, scale;
  find_moments(total, a->C, a->eps, &mean, &scale);
  const A *const weight = static_cast<const A*>(a->weight), *const bias = static_cast<const A*>(a->bias);
  for_vectors<A>(a->C, [&](auto part, int64_t c, int lanes) __attribute__((always_inline)) {
    typedef decltype(part) P;
    Vec<A> x = (load_lanes<A, P>(total + c, lanes) - mean) * scale;
    if (weight) x *= load_lanes<A, P>(weight + c, lanes);
    if (bias) x += load_lanes<A, P>(bias + c, lanes);
    if (!kMixed<B, T> || r.normed) store_lanes<A, P>(r.normed + c, x, lanes);
    if (kMixed<B, T> && r.copy) store_lanes<A, P>(r.copy + c, x, lanes);
  });
}

// Row i of an array (rows, C), or null where there is none.
template <class T>
D2V_INLINE T* row_of(void* rows, int64_t i, int64_t C) {
  return rows ? static_cast<T*>(rows) + i * C : nullptr;
}

template <class B, class T, bool DROP>
void forward_of(const NormArgs* a, int64_t begin, int64_t end, Acc<T>* factors) {
  Place at{begin / a->T, begin % a->T};
  for (int64_t i = begin; i < end; ++i, at.advance(a->T)) {
    if (DROP) draw_row(a->dropout, at.n, at.t, a->C, factors);
    const ForwardRow<B, T> row{at.in(a->branch, B{}), at.in(a->residual, T{}), row_of<T>(a->total, i, a->C),
                               row_of<T>(a->normed, i, a->C), row_of<B>(a->copy, i, a->C)};
    forward_row<B, T, DROP>(a, row, factors);
  }
}

// Calls body(B{}, T{}) with the types of branch and residual.
template <class Args, class F>
D2V_INLINE void with_types(const Args* a, F body) {
  if (a->half == kBFloat16) return body(BF16{}, 0.0f);
  if (a->half == kFloat16) return body(F16{}, 0.0f);
  with_type(a->type, [&](auto zero) { body(zero, zero); });
}

void forward(const NormArgs* a, int64_t begin, int64_t end, void* factors) {
  with_types(a, [&](auto branch, auto zero) {
    typedef decltype(branch) B;
    typedef decltype(zero) T;
    if (a->dropout.keys) {
      forward_of<B, T, true>(a, begin, end, static_cast<Acc<T>*>(factors));
    } else {
      forward_of<B, T, false>(a, begin, end, nullptr);
    }
  });
}

template <class B, class T>
struct GradientRow {
  const T *grad, *straight, *total;  // straight null: 0
  const B* copy;                     // with two types, this and grad may be null: 0
  B* of_branch;
  T* of_residual;

  template <class P>
  D2V_INLINE Vec<Acc<T>> load_grad(int64_t c, int lanes) const {
    typedef Acc<T> A;
    if (!kMixed<B, T>) return load_lanes<A, P>(grad + c, lanes);
    const Vec<A> wide = grad ? load_lanes<A, P>(grad + c, lanes) : Vec<A>{};
    return copy ? wide + load_lanes<A, P>(copy + c, lanes) : wide;
  }
};

// With x = (total - mean) * scale and g = grad * weight: scale * (g - mean(g) - x * mean(g x)) + straight.
template <class B, class T, bool DROP>
D2V_INLINE void backward_row(const GradientRow<B, T>& r, int64_t C, const Acc<T>* weight, double eps,
                             const Acc<T>* factors, Acc<T>* of_weight, Acc<T>* of_bias) {
  typedef Acc<T> A;
  A mean, scale;
  find_moments(r.total, C, eps, &mean, &scale);
  Vec<A> g_sum[kSums] = {}, gx_sum[kSums] = {};
  for_sums<A>(C, [&](auto part, int64_t c, int lanes, int k) __attribute__((always_inline)) {
    typedef decltype(part) P;
    Vec<A> g = r.template load_grad<P>(c, lanes);  // 0 past the row
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
    Vec<A> g = r.template load_grad<P>(c, lanes);
    if (weight) g *= load_lanes<A, P>(weight + c, lanes);
    const Vec<A> x = (load_lanes<A, P>(r.total + c, lanes) - mean) * scale;
    Vec<A> d = (g - mean_g - x * mean_gx) * scale;
    if (r.straight) d += load_lanes<A, P>(r.straight + c, lanes);
    store_lanes<A, P>(r.of_residual + c, d, lanes);
    if (DROP) d *= load<A>(factors + c);
    if (DROP || kMixed<B, T>) store_lanes<A, P>(r.of_branch + c, d, lanes);
  });
}

template <class B, class T, bool DROP>
void backward_of(const NormBackwardArgs* a, int64_t begin, int64_t end, Acc<T>* factors, Acc<T>* sums, Acc<T>* chunk) {
  const int64_t C = a->C;
  Place at{begin / a->T, begin % a->T};
  for (int64_t i = begin; i < end;) {
    const int64_t stop = i + kNormChunk < end ? i + kNormChunk : end;
    memset(chunk, 0, static_cast<size_t>(2 * C) * sizeof(Acc<T>));
    for (; i < stop; ++i, at.advance(a->T)) {
      if (DROP) draw_row(a->dropout, at.n, at.t, C, factors);
      const GradientRow<B, T> row{
          at.in(a->grad_normed, T{}), at.in(a->grad_total, T{}),       at.in(a->total, T{}),
          at.in(a->grad_copy, B{}),   row_of<B>(a->grad_branch, i, C), row_of<T>(a->grad_residual, i, C)};
      backward_row<B, T, DROP>(row, C, static_cast<const Acc<T>*>(a->weight), a->eps, factors, chunk, chunk + C);
    }
    for (int64_t c = 0; c < 2 * C; ++c) sums[c] += chunk[c];
  }
}

void backward(const NormBackwardArgs* a, int64_t begin, int64_t end, void* factors, void* sums, void* chunk) {
  with_types(a, [&](auto branch, auto zero) {
    typedef decltype(branch) B;
    typedef decltype(zero) T;
    typedef Acc<T> A;
    A *const f = static_cast<A*>(factors), *const s = static_cast<A*>(sums), *const k = static_cast<A*>(chunk);
    if (a->dropout.keys) {
      backward_of<B, T, true>(a, begin, end, f, s, k);
    } else {
      backward_of<B, T, false>(a, begin, end, f, s, k);
    }
  });
}

}  // namespace

extern const NormKernels D2V_TABLE(norm_kernels);
const NormKernels D2V_TABLE(norm_kernels) = {forward, backward};

}  // namespace d2v
