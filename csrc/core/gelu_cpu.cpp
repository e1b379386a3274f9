// GELU and layer_norm_gelu, compiled once per instruction level.
#include "gelu.h"
#include "gelu_table.h"
#include "simd.h"

namespace d2v {
namespace {

// ---- GELU and its derivative of a vector. Comparisons are written so that NaN comes through. ----

// By the exponential function and a polynomial: any type, any level.
// 2^s for s in [-125, 0], from the whole part put into the exponent (a number so large that its last place is 1 rounds
// s and holds the whole part in its lowest bits) and a polynomial of the rest: 9e-8 of the value in float.
D2V_INLINE VF exp2_of(VF s) {
  constexpr float magic = 0x1.8p23f + 127.0f;
  const VF shifted = s + magic, r = s - (shifted - magic);
  VF p = splat(0.0013264562003314495f);
  p = p * r + 0.009671483188867569f;
  p = p * r + 0.055507346987724304f;
  p = p * r + 0.24022242426872253f;
  p = p * r + 0.6931470036506653f;
  p = p * r + 1.0f;
  return p * bit_cast<VF>(bit_cast<VU>(shifted) << 23);
}
D2V_INLINE VD exp2_of(VD s) {
  constexpr double magic = 0x1.8p52 + 1023.0, ln2 = 0.693147180559945309417;
  const VD shifted = s + magic, r = (s - (shifted - magic)) * ln2;
  VD p = splat(1.0);
  for (int k = 13; k > 0; --k) p = p * r * (1.0 / k) + 1.0;
  return p * bit_cast<VD>(bit_cast<VU64>(shifted) << 52);
}

// Phi(-a) from a in [0, 13.2] and exp(-a^2 / 2): 3e-8 of the value in float, before roundings.
D2V_INLINE VF tail_from(VF a, VF density) {
  const VF t = 1.0f / (a * 0.35f + 1.0f);
  VF p = splat(-0.029108893126249313f);
  p = p * t + 0.14378803968429565f;
  p = p * t - 0.25532689690589905f;
  p = p * t + 0.15872156620025635f;
  p = p * t - 0.022790439426898956f;
  p = p * t + 0.10536906868219376f;
  p = p * t + 0.11986912041902542f;
  p = p * t + 0.13985669612884521f;
  p = p * t + 0.13962170481681824f;
  return p * t * density;
}
D2V_INLINE VD tail_from(VD a, VD) {
  VD q;
  for (int i = 0; i < kLanes<double>; ++i) q[i] = 0.5 * __builtin_erfc(a[i] * 0.707106781186547524401);
  return q;
}

// |x| up to a bound beyond which the tail is taken for 0, and what Phi(-|x|) and the derivative at -|x| are made of.
template <class A>
struct ByExponential {
  static constexpr A bound = static_cast<A>(13.125);  // 1e-39 and less
  Vec<A> a, density;

  static D2V_INLINE ByExponential at(Vec<A> x) {
    const Vec<A> size = magnitude(x), a = size > bound ? splat(bound) : size;
    const Vec<A> e = exp2_of(a * a * static_cast<A>(-0.5 * 1.442695040888963407));
    return {a, a >= bound ? Vec<A>{} : e};
  }
  D2V_INLINE Vec<A> tail() const {
    const Vec<A> q = tail_from(a, density);
    return a >= bound ? Vec<A>{} : q;
  }
  D2V_INLINE Vec<A> below() const { return tail() - a * static_cast<A>(0.398942280401432678) * density; }
};

template <class A>
D2V_INLINE Vec<A> gelu_of(Vec<A> x, const ByExponential<A>& n) {
  return (x < A(0) ? Vec<A>{} : x) - n.a * n.tail();
}
template <class A>
D2V_INLINE Vec<A> slope_of(Vec<A> x, const ByExponential<A>& n) {
  const Vec<A> below = n.below();
  return x < A(0) ? below : A(1) - below;
}

template <class A>
struct NormalOf {
  typedef ByExponential<A> type;
};

#if defined(__AVX512F__)
// By tables: half the work, and two registers instead of a division. They end where GELU is -2e-9; a vector with
// numbers below that, which is rare, goes the other way.
struct ByTable {
  static constexpr float bound = 6.2f;
  VF a, r;
  __m512i piece;  // its lowest four bits

  static D2V_INLINE ByTable at(VF x) {
    constexpr float magic = 0x1.8p23f;
    const VF size = magnitude(x), a = size > bound ? splat(bound) : size;
    const VF shifted = a * 2.5f + magic;
    return {a, a - (shifted - magic) * 0.4f, bit_cast<__m512i>(shifted)};
  }
  D2V_INLINE VF look_up(const float (&table)[6][16]) const {
    VF p = entry(table[5]);
    for (int k = 4; k >= 0; --k) p = p * r + entry(table[k]);
    return a >= bound ? VF{} : p;
  }
  D2V_INLINE VF entry(const float (&row)[16]) const {
    return bit_cast<VF>(_mm512_permutexvar_ps(piece, _mm512_loadu_ps(row)));
  }
};
template <>
struct NormalOf<float> {
  typedef ByTable type;
};

D2V_INLINE bool has_far(VF x) {
  return __builtin_expect(_mm512_cmp_ps_mask(bit_cast<__m512>(x), _mm512_set1_ps(-ByTable::bound), _CMP_LE_OQ), 0);
}
__attribute__((noinline)) VF far_gelu(VF x) { return gelu_of<float>(x, ByExponential<float>::at(x)); }
__attribute__((noinline)) VF far_slope(VF x) { return slope_of<float>(x, ByExponential<float>::at(x)); }

template <class A>
D2V_INLINE VF gelu_of(VF x, const ByTable& n) {
  const VF y = (x < 0.0f ? VF{} : x) - n.a * n.look_up(kTail);
  return has_far(x) ? (x <= -ByTable::bound ? far_gelu(x) : y) : y;
}
template <class A>
D2V_INLINE VF slope_of(VF x, const ByTable& n) {
  const VF below = n.look_up(kBelow), slope = x < 0.0f ? below : 1.0f - below;
  return has_far(x) ? (x <= -ByTable::bound ? far_slope(x) : slope) : slope;
}
#endif

template <class A>
using Normal = typename NormalOf<A>::type;

template <bool STREAM, class T>
D2V_INLINE void forward_of(const T* x, T* out, int64_t n) {
  typedef Acc<T> A;
  typedef PairOrder<A, T> Order;
  constexpr int L = kLanes<A>;
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) {
    const Pair<A> v = Order::load(x + i);
    Order::template store<STREAM>(out + i, {gelu_of<A>(v.a, Normal<A>::at(v.a)), gelu_of<A>(v.b, Normal<A>::at(v.b))});
  }
  for (; i < n; i += L) {
    const int lanes = n - i < L ? static_cast<int>(n - i) : L;
    const Vec<A> v = load_part<A>(x + i, lanes);
    store_part<A>(out + i, gelu_of<A>(v, Normal<A>::at(v)), lanes);
  }
}

void forward(DType type, const void* x, void* out, int64_t n, bool stream) {
  with_type(type, [&](auto zero) {
    typedef decltype(zero) T;
    const T* const from = static_cast<const T*>(x);
    T* const to = static_cast<T*>(out);
    if (stream && is_aligned(to, 64)) {
      forward_of<true>(from, to, n);
      finish_streaming();
    } else {
      forward_of<false>(from, to, n);
    }
  });
}

// The gradient is stored into lines that were just read where out is grad: not past the caches.
template <bool STREAM, class T>
D2V_INLINE void backward_of(const T* grad, const T* x, T* out, T* y, int64_t n) {
  typedef Acc<T> A;
  typedef PairOrder<A, T> Order;
  constexpr int L = kLanes<A>;
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) {
    const Pair<A> v = Order::load(x + i), g = Order::load(grad + i);
    const Normal<A> na = Normal<A>::at(v.a), nb = Normal<A>::at(v.b);
    Order::template store<false>(out + i, {g.a * slope_of<A>(v.a, na), g.b * slope_of<A>(v.b, nb)});
    Order::template store<STREAM>(y + i, {gelu_of<A>(v.a, na), gelu_of<A>(v.b, nb)});
  }
  for (; i < n; i += L) {
    const int lanes = n - i < L ? static_cast<int>(n - i) : L;
    const Vec<A> v = load_part<A>(x + i, lanes), g = load_part<A>(grad + i, lanes);
    const Normal<A> normal = Normal<A>::at(v);
    store_part<A>(out + i, g * slope_of<A>(v, normal), lanes);
    store_part<A>(y + i, gelu_of<A>(v, normal), lanes);
  }
}

void backward(DType type, const void* grad, const void* x, void* out, void* y, int64_t n, bool stream) {
  with_type(type, [&](auto zero) {
    typedef decltype(zero) T;
    const T *const g = static_cast<const T*>(grad), *const from = static_cast<const T*>(x);
    T *const to = static_cast<T*>(out), *const value = static_cast<T*>(y);
    if (stream && is_aligned(value, 64)) {
      backward_of<true>(g, from, to, value, n);
      finish_streaming();
    } else {
      backward_of<false>(g, from, to, value, n);
    }
  });
}

template <class A>
struct Affine {
  const A *weight, *bias;
  template <class P>
  D2V_INLINE Vec<A> scaled(Vec<A> v, int64_t c, int lanes) const {
    return weight ? v * load_lanes<A, P>(weight + c, lanes) : v;
  }
  template <class P>
  D2V_INLINE Vec<A> apply(Vec<A> v, int64_t c, int lanes) const {
    const Vec<A> z = scaled<P>(v, c, lanes);
    return bias ? z + load_lanes<A, P>(bias + c, lanes) : z;
  }
};

// x less the row's mean; lanes that a row lacks are 0.
template <class A, class P, class T>
D2V_INLINE Vec<A> centred(const T* x, A mean, int lanes) {
  const Vec<A> d = load_lanes<A, P>(x, lanes) - mean;
  return P::value ? d : first_lanes<A>(d, lanes);
}

template <class T>
void norm_forward_of(const NormGeluArgs* k, int64_t begin, int64_t rows, const Acc<T>* mean, const Acc<T>* scale,
                     T* out, bool stream) {
  typedef Acc<T> A;
  const Affine<A> affine{static_cast<const A*>(k->weight), static_cast<const A*>(k->bias)};
  for (int64_t j = 0; j < rows; ++j) {
    const T* x = static_cast<const T*>(k->x) + (begin + j) * k->stride;
    T* row = out + (begin + j) * k->C;
    const A m = mean[j], s = scale[j];
    const T* const added = k->added ? static_cast<const T*>(k->added) + (begin + j) * k->C : nullptr;
    const bool past = stream && is_aligned(row, 64);
    for_vectors<A>(k->C, [&](auto full, int64_t c, int lanes) {
      typedef decltype(full) P;
      const Vec<A> z = affine.template apply<P>(centred<A, P>(x + c, m, lanes) * s, c, lanes);
      Vec<A> y = gelu_of<A>(z, Normal<A>::at(z));
      if (added) y += load_lanes<A, P>(added + c, lanes);
      if (P::value && past) {
        Convert<A, T>::stream(row + c, y);
      } else {
        store_lanes<A, P>(row + c, y, lanes);
      }
    });
  }
  if (stream) finish_streaming();
}

void norm_forward(const NormGeluArgs* args, int64_t begin, int64_t rows, const void* mean, const void* scale, void* out,
                  bool stream) {
  with_type(args->type, [&](auto zero) {
    typedef decltype(zero) T;
    typedef Acc<T> A;
    norm_forward_of(args, begin, rows, static_cast<const A*>(mean), static_cast<const A*>(scale), static_cast<T*>(out),
                    stream);
  });
}

// The sums of a row that its gradient needs, over channels: of g w, and of g w times the normalised x.
template <class A>
struct RowSums {
  Vec<A> along, dot;
};

template <class A, class P, class T, class G>
D2V_INLINE void first_pass(const T* x, const G* grad, A m, A s, const Affine<A>& affine, int64_t c, int lanes, A* sums,
                           int64_t C, A* scratch, RowSums<A>& row) {
  const Vec<A> normal = centred<A, P>(x + c, m, lanes) * s;
  const Vec<A> z = affine.template apply<P>(normal, c, lanes);
  const Vec<A> g = load_lanes<A, P>(grad + c, lanes) * slope_of<A>(z, Normal<A>::at(z));
  if (sums) {
    store_lanes<A, P>(sums + c, load_lanes<A, P>(sums + c, lanes) + g * normal, lanes);
    store_lanes<A, P>(sums + C + c, load_lanes<A, P>(sums + C + c, lanes) + g, lanes);
  }
  const Vec<A> gw = affine.template scaled<P>(g, c, lanes);
  store_lanes<A, P>(scratch + c, gw, lanes);
  row.along += gw;
  row.dot += gw * normal;
}

template <class T, class G>
void norm_backward_of(const NormGeluArgs* k, const NormGeluGradient* gradient, int64_t begin, int64_t rows,
                      const Acc<T>* mean, const Acc<T>* scale, Acc<T>* sums, Acc<T>* totals, Acc<T>* scratch) {
  typedef Acc<T> A;
  const Affine<A> affine{static_cast<const A*>(k->weight), static_cast<const A*>(k->bias)};
  const A inverse = A(1) / static_cast<A>(k->C);
  for (int64_t j = 0; j < rows; ++j) {
    const T* x = static_cast<const T*>(k->x) + (begin + j) * k->stride;
    const G* grad = static_cast<const G*>(gradient->grad) + (begin + j) * gradient->stride;
    T* out = static_cast<T*>(gradient->out) + (begin + j) * k->C;
    const A m = mean[j], s = scale[j];
    RowSums<A> row{};
    for_vectors<A>(k->C, [&](auto full, int64_t c, int lanes) {
      first_pass<A, decltype(full)>(x, grad, m, s, affine, c, lanes, sums, k->C, scratch, row);
    });
    const A along = sum_lanes<A>(row.along) * inverse, dot = sum_lanes<A>(row.dot) * inverse;
    for_vectors<A>(k->C, [&](auto full, int64_t c, int lanes) {
      typedef decltype(full) P;
      const Vec<A> normal = centred<A, P>(x + c, m, lanes) * s;
      const Vec<A> of_x = (load_lanes<A, P>(scratch + c, lanes) - along - normal * dot) * s;
      store_lanes<A, P>(out + c, of_x, lanes);
      if (totals) store_lanes<A, P>(totals + c, load_lanes<A, P>(totals + c, lanes) + of_x, lanes);
    });
  }
}

void norm_backward(const NormGeluArgs* args, const NormGeluGradient* gradient, int64_t begin, int64_t rows,
                   const void* mean, const void* scale, void* sums, void* totals, void* scratch) {
  with_type(args->type, [&](auto zero) {
    typedef decltype(zero) T;
    typedef Acc<T> A;
    const auto run = [&](auto of_grad) {
      norm_backward_of<T, decltype(of_grad)>(args, gradient, begin, rows, static_cast<const A*>(mean),
                                             static_cast<const A*>(scale), static_cast<A*>(sums),
                                             static_cast<A*>(totals), static_cast<A*>(scratch));
    };
    gradient->type == args->type ? run(T{}) : run(A{});
  });
}

}  // namespace

extern const GeluKernels D2V_TABLE(gelu_kernels);
const GeluKernels D2V_TABLE(gelu_kernels) = {forward, backward, norm_forward, norm_backward};

}  // namespace d2v
