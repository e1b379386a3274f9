// Gaussian noise that is a pure function of (key, row, channel), as noise.h has it for the CPU: Philox4x32-10 (Salmon
// et al. 2011) and Box-Muller. Counter (c / 4, row, 0, 0) gives channels c .. c + 3.
#pragma once
#include "vec.cuh"

namespace d2v {

struct Words {
  uint32_t x0, x1, x2, x3;
};

__device__ __forceinline__ Words philox(uint32_t counter0, uint32_t counter1, uint64_t key) {
  Words w = {counter0, counter1, 0, 0};
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{w.x0} * 0xD2511F53u, p1 = uint64_t{w.x2} * 0xCD9E8D57u;
    w = {static_cast<uint32_t>(p1 >> 32) ^ w.x1 ^ k0, static_cast<uint32_t>(p1),
         static_cast<uint32_t>(p0 >> 32) ^ w.x3 ^ k1, static_cast<uint32_t>(p0)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return w;
}

// ((x >> 8) + 0.5) * 2^-24, rounded to fp32 after the addition.
__device__ __forceinline__ float to_uniform(uint32_t x) { return (static_cast<float>(x >> 8) + 0.5f) * 0x1p-24f; }

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

__device__ __forceinline__ void normal_pair(uint32_t radius, uint32_t angle, float* first, float* second) {
  const float length = sqrtf(-2.0f * logf(to_uniform(radius)));
  float cosine, sine;
  turn(to_uniform(angle), &cosine, &sine);
  *first = length * cosine;
  *second = length * sine;
}

// Channels 4 * counter .. 4 * counter + 3.
struct Normals {
  float z[4];
};
__device__ __forceinline__ Normals normals(uint32_t counter, uint32_t row, uint64_t key) {
  const Words w = philox(counter, row, key);
  Normals n;
  normal_pair(w.x0, w.x1, &n.z[0], &n.z[1]);
  normal_pair(w.x2, w.x3, &n.z[2], &n.z[3]);
  return n;
}

// Channels c .. c + N - 1, c a multiple of N, times std, rounded to T.
template <class T, int N>
__device__ __forceinline__ Vec<T, N> noise(int64_t c, uint32_t row, uint64_t key, float std) {
  Vec<T, N> v;
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const Normals n = normals(static_cast<uint32_t>((c + i) / 4), row, key);
    if constexpr (N >= 4) {
#pragma unroll
      for (int j = 0; j < 4; ++j) v.v[i + j] = Narrow<T>::from(static_cast<Acc<T>>(n.z[j] * std));
    } else {  // selected, not indexed: an index known at run time alone would move the four to local memory
      const bool high = c & 2;
      if constexpr (N == 2) v.v[1] = Narrow<T>::from(static_cast<Acc<T>>((high ? n.z[3] : n.z[1]) * std));
      const float even = high ? n.z[2] : n.z[0], odd = high ? n.z[3] : n.z[1];
      v.v[0] = Narrow<T>::from(static_cast<Acc<T>>((N == 1 && (c & 1) ? odd : even) * std));
    }
  }
  return v;
}

}  // namespace d2v
