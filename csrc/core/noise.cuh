// Gaussian noise that is a pure function of (key, row, channel), as noise.h has it for the CPU: Philox4x32-10 (Salmon
// et al. 2011) and Box-Muller. Counter (c / 4, row, 0, 0) gives channels c .. c + 3.
//
// A result in 16 bits has no use for more than the hardware's own logarithm, root, sine and cosine, which are off by
// 2^-20 or less: a third of the instructions, and the same number in nearly all cases.
#pragma once
#include "vec.cuh"

namespace d2v {

struct Words {
  uint32_t x0, x1, x2, x3;
};

// The keys of all rounds: made once for many calls.
constexpr int kRounds = 10;
struct RoundKeys {
  uint32_t k0[kRounds], k1[kRounds];
};
__device__ __forceinline__ RoundKeys round_keys(uint64_t key) {
  RoundKeys keys;
#pragma unroll
  for (uint32_t round = 0; round < kRounds; ++round) {
    keys.k0[round] = static_cast<uint32_t>(key) + round * 0x9E3779B9u;
    keys.k1[round] = static_cast<uint32_t>(key >> 32) + round * 0xBB67AE85u;
#if defined(__CUDACC__)
    // Without this the compiler makes them again for every call.
    asm volatile("" : "+r"(keys.k0[round]), "+r"(keys.k1[round]));
#endif
  }
  return keys;
}

__device__ __forceinline__ Words philox(uint32_t counter0, uint32_t counter1, const RoundKeys& keys) {
  Words w = {counter0, counter1, 0, 0};
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t p0 = uint64_t{w.x0} * 0xD2511F53u, p1 = uint64_t{w.x2} * 0xCD9E8D57u;
    w = {static_cast<uint32_t>(p1 >> 32) ^ w.x1 ^ keys.k0[round], static_cast<uint32_t>(p1),
         static_cast<uint32_t>(p0 >> 32) ^ w.x3 ^ keys.k1[round], static_cast<uint32_t>(p0)};
  }
  return w;
}

// ((x >> 8) + 0.5) * 2^-24, rounded to fp32 once.
__device__ __forceinline__ float to_uniform(uint32_t x) {
  return multiply_add(static_cast<float>(x >> 8), 0x1p-24f, 0x1p-25f);
}

// cos and sin of a full turn times u, u in (0, 1): reduced to an eighth of a turn each side, where the reduction is
// exact, then the polynomials of noise.h.
__device__ __forceinline__ void turn(float u, float* cosine, float* sine) {
  const int quarter = static_cast<int>(u * 4.0f + 0.5f);
  const float r = u - static_cast<float>(quarter) * 0.25f, z = r * r;
  const float s =
      r * ((((0x1.4bc89ap5f * z - 0x1.32ca9ep6f) * z + 0x1.466bbap6f) * z - 0x1.4abbcep5f) * z + 0x1.921fb6p2f);
  const float c = (((0x1.d9f892p5f * z - 0x1.55c668p6f) * z + 0x1.03c1dep6f) * z - 0x1.3bd3ccp4f) * z + 1.0f;
  const bool odd = quarter & 1;
  const float x = odd ? s : c, y = odd ? c : s;
  *cosine = (quarter + 1) & 2 ? -x : x;
  *sine = quarter & 2 ? -y : y;
}

// The hardware's functions; on the CPU, where tests run, the library's.
#if defined(__CUDACC__)
__device__ __forceinline__ float quick_log2(float x) {
  float log;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log) : "f"(x));
  return log;
}
__device__ __forceinline__ float quick_root(float x) {
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
}
__device__ __forceinline__ void quick_turn(float angle, float* cosine, float* sine) {
  *cosine = __cosf(angle);
  *sine = __sinf(angle);
}
#else
inline float quick_log2(float x) { return log2f(x); }
inline float quick_root(float x) { return sqrtf(x); }
inline void quick_turn(float angle, float* cosine, float* sine) {
  *cosine = cosf(angle);
  *sine = sinf(angle);
}
#endif

// Two normal numbers times std.
template <class T>
__device__ __forceinline__ void normal_pair(uint32_t radius, uint32_t angle, float std, float* first, float* second) {
  float length, cosine, sine;
  if constexpr (sizeof(T) == 2) {
    constexpr float kTwoPi = 6.2831853f, kStep = kTwoPi * 0x1p-24f;
    // Near 1 the approximate logarithm has no digits left, and -2 ln u is 2 (1 - u).
    const float u = to_uniform(radius), near_one = multiply_add(-2.0f, u, 2.0f);
    const float square = near_one < 0x1p-10f ? near_one : -1.3862944f * quick_log2(u);  // 2 ln 2
    // The angle less half a turn, so that its size is at most pi; the length below zero makes up for it.
    length = -std * quick_root(square);
    quick_turn(multiply_add(static_cast<float>(angle >> 8), kStep, 0.5f * kStep - 0.5f * kTwoPi), &cosine, &sine);
  } else {
    length = std * sqrtf(-2.0f * logf(to_uniform(radius)));
    turn(to_uniform(angle), &cosine, &sine);
  }
  *first = length * cosine;
  *second = length * sine;
}

// Channels 4 * counter .. 4 * counter + 3, times std.
struct Normals {
  float z[4];
};
template <class T>
__device__ __forceinline__ Normals normals(uint32_t counter, uint32_t row, const RoundKeys& keys, float std) {
  const Words w = philox(counter, row, keys);
  Normals n;
  normal_pair<T>(w.x0, w.x1, std, &n.z[0], &n.z[1]);
  normal_pair<T>(w.x2, w.x3, std, &n.z[2], &n.z[3]);
  return n;
}

// Channels c .. c + N - 1, c a multiple of N, times std, rounded to T.
template <class T, int N>
__device__ __forceinline__ Vec<T, N> noise(uint32_t c, uint32_t row, const RoundKeys& keys, float std) {
  Vec<T, N> v;
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const Normals n = normals<T>((c + i) / 4, row, keys, std);
    if constexpr (N >= 4) {
#pragma unroll
      for (int j = 0; j < 4; ++j) v.v[i + j] = Narrow<T>::from(static_cast<Acc<T>>(n.z[j]));
    } else {  // selected, not indexed: an index known at run time alone would move the four to local memory
      const bool high = c & 2;
      if constexpr (N == 2) v.v[1] = Narrow<T>::from(static_cast<Acc<T>>(high ? n.z[3] : n.z[1]));
      const float even = high ? n.z[2] : n.z[0], odd = high ? n.z[3] : n.z[1];
      v.v[0] = Narrow<T>::from(static_cast<Acc<T>>(N == 1 && (c & 1) ? odd : even));
    }
  }
  return v;
}

}  // namespace d2v
