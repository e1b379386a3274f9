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
struct Convert {  // pairs that only the mixed-precision corners meet
  static D2V_INLINE Vec<A> load(const T* p) {
    A lanes[kLanes<A>];
    for (int i = 0; i < kLanes<A>; ++i) lanes[i] = static_cast<A>(widen(p[i]));
    return bit_cast<Vec<A>>(lanes);
  }
  static D2V_INLINE void store(T* p, Vec<A> v) {
    for (int i = 0; i < kLanes<A>; ++i) p[i] = narrow<T>(v[i]);
  }
  static D2V_INLINE void stream(T* p, Vec<A> v) { store(p, v); }
  static constexpr int kAlign = 1;
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
  static constexpr int kAlign = kVectorBytes;
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
  static constexpr int kAlign = kVectorBytes / 2;
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
  static constexpr int kAlign = kVectorBytes / 2;
};
#endif

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
  T whole[kLanes<A>];
  store<A>(whole, v);
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

// Reads one word of each cache line, in order, so that the loop that follows, which goes through several rows at
// once, finds its lines near. One run of addresses is what hardware prefetchers follow best.
D2V_INLINE void touch(const void* p, int64_t bytes) {
  const char* c = static_cast<const char*>(p);
  for (int64_t i = 0; i < bytes; i += 64) {
    char byte = *reinterpret_cast<const volatile char*>(c + i);
    __asm__ volatile("" ::"r"(byte));
  }
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
