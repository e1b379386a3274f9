// Gaussian noise that is a pure function of (key, row, channel): Philox4x32-10 (Salmon et al. 2011) and Box-Muller.
//
// Counter (c / 4, row, 0, 0) gives channels c .. c + 3. Four of the lanes' 64 bits hold one 32-bit word each; the upper
// halves carry rubbish between rounds, which the 32 x 32 -> 64 bit multiply ignores.
#pragma once
#include "simd.h"

namespace d2v {
namespace {

D2V_INLINE VU64 multiply_low(VU64 a, uint32_t b) {
#if defined(__AVX512F__)
  return bit_cast<VU64>(_mm512_mul_epu32(bit_cast<__m512i>(a), _mm512_set1_epi64(b)));
#elif defined(__AVX2__)
  return bit_cast<VU64>(_mm256_mul_epu32(bit_cast<__m256i>(a), _mm256_set1_epi64x(b)));
#elif defined(__SSE2__)
  return bit_cast<VU64>(_mm_mul_epu32(bit_cast<__m128i>(a), _mm_set1_epi64x(b)));
#else
  return (a & 0xffffffffu) * static_cast<uint64_t>(b);
#endif
}

struct Words {
  VU64 x0, x1, x2, x3;  // the low 32 bits of each lane count
};

D2V_INLINE Words philox(VU64 counter0, VU64 counter1, uint64_t key, uint32_t counter2 = 0) {
  Words w{counter0, counter1, VU64{} + counter2, VU64{}};
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const VU64 p0 = multiply_low(w.x0, 0xD2511F53u), p1 = multiply_low(w.x2, 0xCD9E8D57u);
    w = {(p1 >> 32) ^ w.x1 ^ static_cast<uint64_t>(k0), p1, (p0 >> 32) ^ w.x3 ^ static_cast<uint64_t>(k1), p0};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return w;
}
D2V_INLINE Words philox(VU64 counter0, uint32_t counter1, uint64_t key, uint32_t counter2 = 0) {
  return philox(counter0, VU64{} + counter1, key, counter2);
}

// The words of 2 * kLanes<float> numbers in ascending order: number i has word i % 4 of counter i / 4, with counters as
// `first_counters` orders them.
D2V_INLINE void word_pair(const Words& w, VU* low, VU* high) {
  const VU64 a = (w.x0 & 0xffffffffu) | (w.x1 << 32), b = (w.x2 & 0xffffffffu) | (w.x3 << 32);
#if defined(__AVX512F__)
  *low = bit_cast<VU>(_mm512_unpacklo_epi64(bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
  *high = bit_cast<VU>(_mm512_unpackhi_epi64(bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#elif defined(__AVX2__)
  *low = bit_cast<VU>(_mm256_unpacklo_epi64(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
  *high = bit_cast<VU>(_mm256_unpackhi_epi64(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#else
  *low = bit_cast<VU>(VU64{a[0], b[0]});
  *high = bit_cast<VU>(VU64{a[1], b[1]});
#endif
}

// ((x >> 8) + 0.5) * 2^-24, rounded to fp32 after the addition.
D2V_INLINE VF to_uniform(VU x) { return (__builtin_convertvector(bit_cast<VI>(x >> 8), VF) + 0.5f) * 0x1p-24f; }

// ln u for u in (0, 1]: u = 2^e m with m in [1/sqrt(2), sqrt(2)), ln m by a polynomial in m - 1, exact near 1.
D2V_INLINE VF log_vector(VF u) {
  const VI bits = bit_cast<VI>(u);
  const VI e = (bits - 0x3f3504f3) >> 23;
  const VF f = bit_cast<VF>(bits - (e << 23)) - 1.0f;
  VF p = splat(0x1.1b43a6p-4f);
  p = p * f - 0x1.e2de9ep-4f;
  p = p * f + 0x1.e649fcp-4f;
  p = p * f - 0x1.fb44cep-4f;
  p = p * f + 0x1.233360p-3f;
  p = p * f - 0x1.5562dap-3f;
  p = p * f + 0x1.99a53cp-3f;
  p = p * f - 0x1.ffffeep-3f;
  p = p * f + 0x1.555546p-2f;
  const VF n = __builtin_convertvector(e, VF), z = f * f;
  const VF low = p * f * z - 0.5f * z + n * -2.12194440e-4f;  // ln 2 = 0.693359375 - 2.1219444e-4
  return low + f + n * 0.693359375f;
}

D2V_INLINE VF sqrt_vector(VF v) {
#if defined(__AVX512F__)
  return bit_cast<VF>(_mm512_sqrt_ps(bit_cast<__m512>(v)));
#elif defined(__AVX2__)
  return bit_cast<VF>(_mm256_sqrt_ps(bit_cast<__m256>(v)));
#elif defined(__SSE2__)
  return bit_cast<VF>(_mm_sqrt_ps(bit_cast<__m128>(v)));
#else
  for (int i = 0; i < kLanes<float>; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

// cos and sin of a full turn times u: reduced to an eighth of a turn each side, where the reduction is exact.
D2V_INLINE void turn(VF u, VF* cosine, VF* sine) {
  const VI quarter = __builtin_convertvector(u * 4.0f + 0.5f, VI);
  const VF r = u - __builtin_convertvector(quarter, VF) * 0.25f, z = r * r;
  const VF s =
      r * ((((0x1.4bc89ap5f * z - 0x1.32ca9ep6f) * z + 0x1.466bbap6f) * z - 0x1.4abbcep5f) * z + 0x1.921fb6p2f);
  const VF c = (((0x1.d9f892p5f * z - 0x1.55c668p6f) * z + 0x1.03c1dep6f) * z - 0x1.3bd3ccp4f) * z + 1.0f;
  const VI odd = (quarter & 1) != 0;
  const VU sign_c = bit_cast<VU>(((quarter + 1) & 2) << 30), sign_s = bit_cast<VU>((quarter & 2) << 30);
  const VU odd_mask = bit_cast<VU>(odd), sb = bit_cast<VU>(s), cb = bit_cast<VU>(c);
  *cosine = bit_cast<VF>(((sb & odd_mask) | (cb & ~odd_mask)) ^ sign_c);
  *sine = bit_cast<VF>(((cb & odd_mask) | (sb & ~odd_mask)) ^ sign_s);
}

// Lanes 0, 0, 1, 1 of each 128 bits of (a, b), then 2, 2, 3, 3.
D2V_INLINE void interleave(VF a, VF b, VF* low, VF* high) {
#if defined(__AVX512F__)
  *low = bit_cast<VF>(_mm512_unpacklo_ps(bit_cast<__m512>(a), bit_cast<__m512>(b)));
  *high = bit_cast<VF>(_mm512_unpackhi_ps(bit_cast<__m512>(a), bit_cast<__m512>(b)));
#elif defined(__AVX2__)
  *low = bit_cast<VF>(_mm256_unpacklo_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
  *high = bit_cast<VF>(_mm256_unpackhi_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
#else
  *low = VF{a[0], b[0], a[1], b[1]};
  *high = VF{a[2], b[2], a[3], b[3]};
#endif
}

// First words of the counters of 2 * kLanes<float> channels from 0 on, so ordered that interleaving leaves the channels
// in ascending order. The next ones are kLanes<float> / 2 higher.
D2V_INLINE VU64 first_counters() {
  constexpr int kGroups = kLanes<float> / 4;  // 128-bit groups
  VU64 counter{};
  for (int g = 0; g < kGroups; ++g) {
    counter[2 * g] = static_cast<uint64_t>(g);
    counter[2 * g + 1] = static_cast<uint64_t>(kGroups + g);
  }
  return counter;
}

// 2 * kLanes<float> normal numbers.
D2V_INLINE void normal_pair(VU64 counter, uint32_t row, uint64_t key, VF* low, VF* high) {
  const Words w = philox(counter, row, key);
  const VU radius = bit_cast<VU>((w.x0 & 0xffffffffu) | (w.x2 << 32)),
           angle = bit_cast<VU>((w.x1 & 0xffffffffu) | (w.x3 << 32));
  const VF length = sqrt_vector(log_vector(to_uniform(radius)) * -2.0f);
  VF cosine, sine;
  turn(to_uniform(angle), &cosine, &sine);
  interleave(length * cosine, length * sine, low, high);
}

}  // namespace
}  // namespace d2v
