// Rows of bf16 numbers as 32-bit words of two, and back: the operands of product_bf16.h.
#pragma once
#include "attention.h"
#include "noise.h"
#include "product_bf16.h"

namespace d2v {
namespace {

D2V_INLINE int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// fp32 to bf16: to nearest, ties to even; NaN stays NaN. The instruction turns numbers below 2^-126 into 0, as the
// products do in any case.
D2V_INLINE VH to_bf16(VF v) {
#if defined(__AVX512BF16__)
  return bit_cast<VH>(_mm512_cvtneps_pbh(bit_cast<__m512>(v)));
#else
  return Convert<float, BF16>::round(v);
#endif
}

// Words of the bf16 numbers of two vectors, `even` in the lower halves; and these numbers vector by vector.
#if defined(__AVX512BF16__)
D2V_INLINE __m512i two_to_bf16(VF even, VF odd) {
  return bit_cast<__m512i>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(odd), bit_cast<__m512>(even)));
}
D2V_INLINE VU interleave_halves(__m512i both) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return bit_cast<VU>(_mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both));
}
D2V_INLINE VU pair_words(VF even, VF odd) { return interleave_halves(two_to_bf16(even, odd)); }
D2V_INLINE void store_two(VF even, VF odd, uint16_t* first, uint16_t* second, uint32_t* words) {
  const __m512i both = two_to_bf16(even, odd);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(first), _mm512_castsi512_si256(both));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(second), _mm512_extracti64x4_epi64(both, 1));
  _mm512_storeu_si512(words, bit_cast<__m512i>(interleave_halves(both)));
}
#else
D2V_INLINE VU pair_words(VF even, VF odd) {
  return __builtin_convertvector(to_bf16(even), VU) | (__builtin_convertvector(to_bf16(odd), VU) << 16);
}
D2V_INLINE void store_two(VF even, VF odd, uint16_t* first, uint16_t* second, uint32_t* words) {
  const VH a = to_bf16(even), b = to_bf16(odd);
  const VU both = pair_words(even, odd);
  memcpy(first, &a, sizeof(a)), memcpy(second, &b, sizeof(b)), memcpy(words, &both, sizeof(both));
}
#endif

// Bf16 numbers of one vector of words: the first n of them, 0 < n, then zeros.
D2V_INLINE VU load_numbers(const uint16_t* p, int64_t n) {
  constexpr int64_t kNumbers = 2 * kLanes<float>;
#if defined(__AVX512BW__)
  const __mmask32 first = n >= kNumbers ? ~__mmask32{0} : static_cast<__mmask32>((1u << n) - 1);
  return bit_cast<VU>(_mm512_maskz_loadu_epi16(first, p));
#else
  VU v{};
  memcpy(&v, p, static_cast<size_t>(n < kNumbers ? n : kNumbers) * 2);
  return v;
#endif
}

// Rows of D numbers, each with zeros up to the whole row of `out`, then rows of zeros up to `padded`. Row r is that of
// token first + r, or of token at[first + r].
void read_rows(const Heads& x, const int32_t* at, int64_t first, int64_t count, int64_t D, int64_t padded,
               WordRows out) {
  constexpr int64_t L = kLanes<float>;
  const uint16_t* const data = static_cast<const uint16_t*>(x.data);
  const int64_t stride = x.token, whole = D / (2 * L) * L, rest = D - 2 * whole;
  for (int64_t r = 0; r < count; ++r) {
    const uint16_t* const from = data + (at ? at[first + r] : first + r) * stride;
    uint32_t* const to = out.data + r * out.row;
    for (int64_t c = 0; c < whole; c += L) {
      VU v;
      memcpy(&v, from + 2 * c, sizeof(v));
      memcpy(to + c, &v, sizeof(v));
    }
    for (int64_t c = whole; c < out.row; c += L) {
      const VU v = c == whole && rest ? load_numbers(from + 2 * c, rest) : VU{};
      memcpy(to + c, &v, sizeof(v));
    }
  }
  if (count < padded) memset(out.data + count * out.row, 0, static_cast<size_t>((padded - count) * out.row) * 4);
}

// Two words' worth of a vector: numbers 0 on of a and b side by side.
#if defined(__AVX512BW__)
D2V_INLINE void pair_vectors(const uint32_t* a, const uint32_t* b, uint32_t* out) {
  alignas(64) static constexpr uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                    8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i even = _mm512_loadu_si512(a), odd = _mm512_loadu_si512(b), low = _mm512_load_si512(kLow);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  _mm512_storeu_si512(out, _mm512_permutex2var_epi16(even, low, odd));
  _mm512_storeu_si512(out + 16, _mm512_permutex2var_epi16(even, high, odd));
}
#else
D2V_INLINE void pair_vectors(const uint32_t* a, const uint32_t* b, uint32_t* out) {
  for (int i = 0; i < kLanes<float>; ++i) {
    out[2 * i] = (a[i] & 0xffffu) | b[i] << 16;
    out[2 * i + 1] = a[i] >> 16 | (b[i] & 0xffff0000u);
  }
}
#endif

// Asks for rows of D numbers that are read later: they lie far apart, where the processor does not look ahead by
// itself.
D2V_INLINE void prefetch_rows(const Heads& x, int64_t first, int64_t count, int64_t D) {
  for (int64_t r = first; r < first + count; ++r) {
    const uint16_t* const row = static_cast<const uint16_t*>(x.data) + r * x.token;
    for (int64_t c = 0; c < D; c += 32) prefetch(row + c);
  }
}

// Words of two rows each: word (r, c) has elements c of rows 2r and 2r + 1; twice as many in a row as x has.
void pair_rows(WordRows x, int64_t rows, WordRows out) {
  for (int64_t r = 0; r < rows; r += 2) {
    const uint32_t *const a = x.data + r * x.row, *const b = a + x.row;
    uint32_t* const to = out.data + r / 2 * out.row;
    for (int64_t c = 0; c < x.row; c += kLanes<float>) pair_vectors(a + c, b + c, to + 2 * c);
  }
}

#if defined(__AVX512F__)
D2V_INLINE void transpose_square(const uint32_t* from, int64_t from_row, uint32_t* to, int64_t to_row) {
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(from + i * from_row);
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(to + i * to_row, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_si512(to + (i + 8) * to_row, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
    _mm512_storeu_si512(to + (i + 4) * to_row, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88));
    _mm512_storeu_si512(to + (i + 12) * to_row, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd));
  }
}
#else
D2V_INLINE void transpose_square(const uint32_t* from, int64_t from_row, uint32_t* to, int64_t to_row) {
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) to[j * to_row + i] = from[i * from_row + j];
  }
}
#endif

// 32-bit elements: out (columns, rows) from x (rows, columns), both multiples of 16.
void transpose_words(WordRows x, int64_t rows, int64_t columns, WordRows out) {
  for (int64_t r = 0; r < rows; r += 16) {
    for (int64_t c = 0; c < columns; c += 16) {
      transpose_square(x.data + r * x.row + c, x.row, out.data + c * out.row + r, out.row);
    }
  }
}
D2V_INLINE WordRows as_words(Matrix<float> x) { return {reinterpret_cast<uint32_t*>(x.data), x.row}; }

// A row of fp32 numbers times `factor` as bf16; stream: past the caches, until `finish_streaming`.
D2V_INLINE void write_row(const float* x, float factor, int64_t D, bool stream, uint16_t* out) {
#if defined(__AVX512BF16__)
  for (; stream && D >= 32 && is_aligned(out, 64); D -= 32, x += 32, out += 32) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out),
                        two_to_bf16(load<float>(x) * factor, load<float>(x + 16) * factor));
  }
  for (; D >= 32; D -= 32, x += 32, out += 32) {  // whole cache lines
    _mm512_storeu_si512(out, two_to_bf16(load<float>(x) * factor, load<float>(x + 16) * factor));
  }
#else
  (void)stream;
#endif
  for_vectors<float>(D, [&](auto full, int64_t c, int lanes) {
    const VH numbers = to_bf16(load<float>(x + c) * factor);
    if (decltype(full)::value) {
      memcpy(out + c, &numbers, sizeof(numbers));
    } else {
      memcpy(out + c, &numbers, static_cast<size_t>(lanes) * 2);
    }
  });
}

}  // namespace
}  // namespace d2v
