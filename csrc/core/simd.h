// Vectors of one instruction level, for the files that are compiled once per level (D2V_ISA, with its flags).
//
// Everything here is in an unnamed namespace and inlined. A function with external linkage would be compiled once per
// level and merged by the linker, and the AVX-512 copy might be the one that an older machine then runs.
#pragma once
#include <stdint.h>
#include <string.h>

#include "dtype.h"
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if !defined(D2V_ISA)
#define D2V_ISA base
#endif
#define D2V_JOIN_(a, b) a##_##b
#define D2V_JOIN(a, b) D2V_JOIN_(a, b)
#define D2V_TABLE(name) D2V_JOIN(name, D2V_ISA)
#define D2V_INLINE inline __attribute__((always_inline))

namespace d2v {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

typedef float VF __attribute__((vector_size(kVectorBytes)));
typedef double VD __attribute__((vector_size(kVectorBytes)));
typedef int32_t VI __attribute__((vector_size(kVectorBytes)));
typedef uint32_t VU __attribute__((vector_size(kVectorBytes)));
typedef uint64_t VU64 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t VH __attribute__((vector_size(kVectorBytes / 2)));

// The type to compute in, and its vector.
template <class T>
struct AccOf {
  typedef float type;
};
template <>
struct AccOf<double> {
  typedef double type;
};
template <class T>
using Acc = typename AccOf<T>::type;
template <class A>
struct VecOf {
  typedef VF type;
};
template <>
struct VecOf<double> {
  typedef VD type;
};
template <class A>
using Vec = typename VecOf<A>::type;
template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <class To, class From>
D2V_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

template <class A>
D2V_INLINE Vec<A> splat(A a) {
  return Vec<A>{} + a;
}

D2V_INLINE VF magnitude(VF d) { return bit_cast<VF>(bit_cast<VU>(d) & 0x7fffffffu); }
D2V_INLINE VD magnitude(VD d) { return bit_cast<VD>(bit_cast<VU64>(d) & 0x7fffffffffffffffull); }

// d with the lanes from `lanes` on set to 0.
template <class A>
D2V_INLINE Vec<A> first_lanes(Vec<A> d, int lanes) {
  Vec<A> number;
  for (int i = 0; i < kLanes<A>; ++i) number[i] = static_cast<A>(i);
  return number < static_cast<A>(lanes) ? d : Vec<A>{};
}

// ---- scalars ----

D2V_INLINE float widen(float x) { return x; }
D2V_INLINE double widen(double x) { return x; }
D2V_INLINE float widen(BF16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
D2V_INLINE float widen(F16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, exponent = (x.bits >> 10) & 31u, fraction = x.bits & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: a multiple of 2^-24, exact in fp32
    return bit_cast<float>(bit_cast<uint32_t>(static_cast<float>(fraction) * 0x1p-24f) | sign);
  }
  const uint32_t biased = exponent == 31 ? 255u : exponent + 112u;
  return bit_cast<float>(sign | biased << 23 | fraction << 13);
}

template <class T>
struct Narrow {
  static D2V_INLINE T from(float x) { return static_cast<T>(x); }
};
template <>
struct Narrow<BF16> {
  static D2V_INLINE BF16 from(float x) {
    const uint32_t u = bit_cast<uint32_t>(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return {0x7fc0};
    return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
  }
};
template <>
struct Narrow<F16> {
  static D2V_INLINE F16 from(float x) {
    const uint32_t u = bit_cast<uint32_t>(x), a = u & 0x7fffffffu;
    const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
    if (a > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
    if (a >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and up round to infinity
    if (a < 0x38800000u) {  // below 2^-14: adding 0.5, whose last place is 2^-24, rounds to the subnormal grid
      const uint32_t r = bit_cast<uint32_t>(bit_cast<float>(a) + 0.5f) - 0x3f000000u;
      return {static_cast<uint16_t>(sign | r)};
    }
    return {static_cast<uint16_t>(sign | (((a + 0xfffu + ((a >> 13) & 1u)) >> 13) - (112u << 10)))};
  }
};
template <class T, class A>
D2V_INLINE T narrow(A x) {
  return Narrow<T>::from(static_cast<float>(x));
}
template <>
D2V_INLINE double narrow<double, double>(double x) {
  return x;
}

// ---- vectors: Convert<A, T> reads and writes kLanes<A> elements of T as a Vec<A>; no alignment is assumed ----

template <class A, class T>
struct Convert {  // pairs that are rare, or have no instruction: calls, which keep the callers small
  static __attribute__((noinline)) Vec<A> load(const T* p) {
    A lanes[kLanes<A>];
    for (int i = 0; i < kLanes<A>; ++i) lanes[i] = static_cast<A>(widen(p[i]));
    return bit_cast<Vec<A>>(lanes);
  }
  static __attribute__((noinline)) void store(T* p, Vec<A> v) {
    for (int i = 0; i < kLanes<A>; ++i) p[i] = narrow<T>(v[i]);
  }
  static D2V_INLINE void stream(T* p, Vec<A> v) { store(p, v); }
};

template <class A>
struct Convert<A, A> {
  static D2V_INLINE Vec<A> load(const A* p) {
    Vec<A> v;
    memcpy(&v, p, sizeof(v));
    return v;
  }
  static D2V_INLINE void store(A* p, Vec<A> v) { memcpy(p, &v, sizeof(v)); }
  static D2V_INLINE void stream(A* p, Vec<A> v) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bit_cast<__m512i>(v));
#elif defined(__AVX2__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bit_cast<__m256i>(v));
#elif defined(__SSE2__)
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), bit_cast<__m128i>(v));
#else
    store(p, v);
#endif
  }
};

D2V_INLINE void stream_half(uint16_t* p, VH v) {
#if defined(__AVX512F__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bit_cast<__m256i>(v));
#elif defined(__AVX2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), bit_cast<__m128i>(v));
#elif defined(__SSE2__)
  _mm_stream_si64(reinterpret_cast<long long*>(p), bit_cast<long long>(v));
#else
  memcpy(p, &v, sizeof(v));
#endif
}

template <>
struct Convert<float, BF16> {
  static D2V_INLINE VF load(const BF16* p) {
    VH h;
    memcpy(&h, p, sizeof(h));
    return bit_cast<VF>(__builtin_convertvector(h, VU) << 16);
  }
  static D2V_INLINE VH round(VF v) {  // to nearest, ties to even; NaN stays NaN
#if defined(__AVX512BF16__)           // and numbers below 2^-126 become 0
    return bit_cast<VH>(_mm512_cvtneps_pbh(bit_cast<__m512>(v)));
#endif
    const VU u = bit_cast<VU>(v);
    const VU rounded = u + 0x7fffu + ((u >> 16) & 1u);
    const VI is_nan = bit_cast<VI>(u & 0x7fffffffu) > 0x7f800000;
    const VU mask = bit_cast<VU>(is_nan);
    return __builtin_convertvector(((rounded & ~mask) | (0x7fc00000u & mask)) >> 16, VH);
  }
  static D2V_INLINE void store(BF16* p, VF v) {
    const VH h = round(v);
    memcpy(p, &h, sizeof(h));
  }
  static D2V_INLINE void stream(BF16* p, VF v) { stream_half(&p->bits, round(v)); }
};

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__F16C__)) || defined(__aarch64__)
template <>
struct Convert<float, F16> {
  static D2V_INLINE VF load(const F16* p) {
    VH h;
    memcpy(&h, p, sizeof(h));
#if defined(__AVX512F__)
    return bit_cast<VF>(_mm512_cvtph_ps(bit_cast<__m256i>(h)));
#elif defined(__AVX2__)
    return bit_cast<VF>(_mm256_cvtph_ps(bit_cast<__m128i>(h)));
#else
    return bit_cast<VF>(vcvt_f32_f16(bit_cast<float16x4_t>(h)));
#endif
  }
  static D2V_INLINE VH round(VF v) {
#if defined(__AVX512F__)
    return bit_cast<VH>(_mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
    return bit_cast<VH>(_mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    return bit_cast<VH>(vcvt_f16_f32(bit_cast<float32x4_t>(v)));
#endif
  }
  static D2V_INLINE void store(F16* p, VF v) {
    const VH h = round(v);
    memcpy(p, &h, sizeof(h));
  }
  static D2V_INLINE void stream(F16* p, VF v) { stream_half(&p->bits, round(v)); }
};
#endif

// Two vectors at once, in whatever order of lanes is quickest; to_natural puts them back into memory order. Sums over
// rows do not mind the order, as long as every operand has the same.
template <class A>
struct Pair {
  Vec<A> a, b;
};
template <class A, class T>
struct NaturalOrder {
  static D2V_INLINE Pair<A> load(const T* p) { return {Convert<A, T>::load(p), Convert<A, T>::load(p + kLanes<A>)}; }
  static D2V_INLINE Pair<A> to_natural(Pair<A> v) { return v; }
  template <bool STREAM>
  static D2V_INLINE void store(T* p, Pair<A> v) {
    if (STREAM) {
      Convert<A, T>::stream(p, v.a);
      Convert<A, T>::stream(p + kLanes<A>, v.b);
    } else {
      Convert<A, T>::store(p, v.a);
      Convert<A, T>::store(p + kLanes<A>, v.b);
    }
  }
};
template <class A, class T>
struct PairOrder : NaturalOrder<A, T> {};
#if defined(__AVX512BF16__)
template <>
struct PairOrder<float, BF16> : NaturalOrder<float, BF16> {  // one instruction rounds both
  template <bool STREAM>
  static D2V_INLINE void store(BF16* p, Pair<float> v) {
    const VF both = bit_cast<VF>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(v.b), bit_cast<__m512>(v.a)));
    if (STREAM) {
      Convert<float, float>::stream(reinterpret_cast<float*>(p), both);
    } else {
      memcpy(p, &both, sizeof(both));
    }
  }
};
#elif defined(__AVX512F__) || defined(__AVX2__)
template <>
struct PairOrder<float, BF16> {  // even and odd elements: a shift and a mask instead of two widening permutes
  static D2V_INLINE Pair<float> load(const BF16* p) {
    VU u;
    memcpy(&u, p, sizeof(u));
    return {bit_cast<VF>(u << 16), bit_cast<VF>(u & 0xffff0000u)};
  }
  static D2V_INLINE VU round(VF v) {  // into the upper halves
    const VU u = bit_cast<VU>(v);
    const VU mask = bit_cast<VU>(bit_cast<VI>(u & 0x7fffffffu) > 0x7f800000);
    return ((u + 0x7fffu + ((u >> 16) & 1u)) & ~mask) | (0x7fc00000u & mask);
  }
  template <bool STREAM>
  static D2V_INLINE void store(BF16* p, Pair<float> v) {
    const VF both = bit_cast<VF>((round(v.a) >> 16) | (round(v.b) & 0xffff0000u));
    if (STREAM) {
      Convert<float, float>::stream(reinterpret_cast<float*>(p), both);
    } else {
      memcpy(p, &both, sizeof(both));
    }
  }
  static D2V_INLINE Pair<float> to_natural(Pair<float> v) {
#if defined(__AVX512F__)
    const __m512 a = bit_cast<__m512>(v.a), b = bit_cast<__m512>(v.b);
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    return {bit_cast<VF>(_mm512_permutex2var_ps(a, low, b)), bit_cast<VF>(_mm512_permutex2var_ps(a, high, b))};
#else
    const __m256 a = bit_cast<__m256>(v.a), b = bit_cast<__m256>(v.b);
    const __m256 low = _mm256_unpacklo_ps(a, b), high = _mm256_unpackhi_ps(a, b);
    return {bit_cast<VF>(_mm256_permute2f128_ps(low, high, 0x20)),
            bit_cast<VF>(_mm256_permute2f128_ps(low, high, 0x31))};
#endif
  }
};
#endif

// How to go through T beside others: in the quickest order where types T1 and T2 agree on one.
template <class A, class T, class T1, class T2>
struct SameOrder : NaturalOrder<A, T> {};
template <class A, class T>
struct SameOrder<A, T, T, T> : PairOrder<A, T> {};

template <class A, class T>
D2V_INLINE Vec<A> load(const T* p) {
  return Convert<A, T>::load(p);
}
template <class A, class T>
D2V_INLINE void store(T* p, Vec<A> v) {
  Convert<A, T>::store(p, v);
}

// The first n lanes, 0 < n <= kLanes<A>; the others read as 0 and are not written.
template <class A, class T>
D2V_INLINE Vec<A> load_part(const T* p, int n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if (sizeof(A) == 4 && sizeof(T) == 4) {
    return bit_cast<Vec<A>>(_mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << n) - 1), p));
  }
  if (sizeof(A) == 4 && sizeof(T) == 2) {
    const __m256i h = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p);
    T whole[kLanes<A>];
    static_assert(sizeof(A) != 4 || sizeof(T) != 2 || sizeof(whole) == sizeof(h), "sixteen halves");
    memcpy(whole, &h, sizeof(T) == 2 ? sizeof(h) : 0);
    return load<A>(whole);
  }
#endif
  T whole[kLanes<A>];
  memset(whole, 0, sizeof(whole));
  memcpy(whole, p, static_cast<size_t>(n) * sizeof(T));
  return load<A>(whole);
}
template <class A, class T>
D2V_INLINE void store_part(T* p, Vec<A> v, int n) {
#if defined(__AVX512F__)
  if (sizeof(A) == 4 && sizeof(T) == 4) {
    _mm512_mask_storeu_epi32(p, static_cast<__mmask16>((1u << n) - 1), bit_cast<__m512i>(v));
    return;
  }
#endif
  T whole[kLanes<A>];
  store<A>(whole, v);
#if defined(__AVX512F__)
  if (sizeof(A) == 4 && sizeof(T) == 2) {
    __m256i h;
    memcpy(&h, whole, sizeof(T) == 2 ? sizeof(h) : 0);
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), h);
    return;
  }
#endif
  memcpy(p, whole, static_cast<size_t>(n) * sizeof(T));
}

// Lanes as given by `full`: a compile-time yes, or the first n.
struct Full {
  static constexpr bool value = true;
};
struct Part {
  static constexpr bool value = false;
};
template <class A, class P, class T>
D2V_INLINE Vec<A> load_lanes(const T* p, int n) {
  return P::value ? load<A>(p) : load_part<A>(p, n);
}
template <class A, class P, class T>
D2V_INLINE void store_lanes(T* p, Vec<A> v, int n) {
  if (P::value) {
    store<A>(p, v);
  } else {
    store_part<A>(p, v, n);
  }
}

// Calls body(Full{}, c, lanes) for whole vectors of [0, n) and body(Part{}, c, rest) for what is left.
template <class A, class F>
D2V_INLINE void for_vectors(int64_t n, F body) {
  int64_t c = 0;
  for (; c + kLanes<A> <= n; c += kLanes<A>) body(Full{}, c, kLanes<A>);
  if (c < n) body(Part{}, c, static_cast<int>(n - c));
}

template <class A>
D2V_INLINE A sum_lanes(Vec<A> v) {
#if defined(__AVX512F__)
  if (sizeof(A) == 4) return static_cast<A>(_mm512_reduce_add_ps(bit_cast<__m512>(v)));
#endif
  A lanes[kLanes<A>];
  memcpy(lanes, &v, sizeof(v));
  for (int width = kLanes<A> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

D2V_INLINE bool is_aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Makes streaming stores visible before whatever tells another thread that they are done.
D2V_INLINE void finish_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

D2V_INLINE void zero_row(void* out, int64_t bytes, bool stream) {
  char* const p = static_cast<char*>(out);
  int64_t i = 0;
  if (stream && is_aligned(p, 64)) {
    for (; i + kVectorBytes <= bytes; i += kVectorBytes) {
      Convert<float, float>::stream(reinterpret_cast<float*>(p + i), VF{});
    }
  }
  memset(p + i, 0, static_cast<size_t>(bytes - i));
}

// Asks for a line that is read some hundred instructions later.
D2V_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// The lines of a pair of vectors.
template <class T>
D2V_INLINE void prefetch_pair(const T* p) {
  for (int64_t i = 0; i < 2 * kLanes<Acc<T>>; i += 64 / static_cast<int>(sizeof(T))) prefetch(p + i);
}

// Calls body(T{}) with the element type that t names.
template <class F>
D2V_INLINE void with_type(DType t, F body) {
  switch (t) {
    case kFloat32:
      return body(float{});
    case kBFloat16:
      return body(BF16{});
    case kFloat16:
      return body(F16{});
    case kFloat64:
      return body(double{});
    case kNone:
      return;
  }
}

}  // namespace
}  // namespace d2v
