// The floor of a memory-bound operator: a plain loop that reads every input once and writes every output once.
// Compiled by benchmarks/harness/timer.py with -O3 -march=native -fopenmp; measured in the same run as the operators.
#include <stdint.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

typedef uint64_t Lane __attribute__((vector_size(64), aligned(1), may_alias));

static inline Lane read_range(const char* p, const char* end, Lane sum) {
  Lane a = sum, b = sum, c = sum, d = sum;
  for (; p + 256 <= end; p += 256) {
    a ^= *(const Lane*)p, b ^= *(const Lane*)(p + 64), c ^= *(const Lane*)(p + 128), d ^= *(const Lane*)(p + 192);
  }
  for (; p + 64 <= end; p += 64) a ^= *(const Lane*)p;
  return a ^ b ^ c ^ d;
}

static inline void write_range(char* p, char* end, Lane value, bool stream) {
#if defined(__AVX2__)
  if (stream) {
    while (p < end && (uintptr_t)p % 32 != 0) *p++ = 0;
    __m256i v;
    __builtin_memcpy(&v, &value, sizeof(v));
    for (; p + 32 <= end; p += 32) _mm256_stream_si256((__m256i*)p, v);
  }
#endif
  for (; p + 64 <= end; p += 64) *(Lane*)p = value;
}

// Every array is cut into the same number of pieces; piece i of all inputs is read, then piece i of all outputs written
// (with what was read, so that no compiler drops the reads).
extern "C" void stream_once(int inputs, const char* const* in, const int64_t* in_bytes, int outputs, char* const* out,
                            const int64_t* out_bytes, int64_t pieces, int threads, int stream) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < pieces; ++i) {
    Lane sum = {0};
    for (int k = 0; k < inputs; ++k)
      sum = read_range(in[k] + in_bytes[k] * i / pieces, in[k] + in_bytes[k] * (i + 1) / pieces, sum);
    for (int k = 0; k < outputs; ++k)
      write_range(out[k] + out_bytes[k] * i / pieces, out[k] + out_bytes[k] * (i + 1) / pieces, sum, stream != 0);
  }
#if defined(__AVX2__)
  _mm_sfence();
#endif
}
