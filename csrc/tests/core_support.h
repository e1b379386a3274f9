// What core_test.cpp needs beside the kernels: element types written once more, plainly, buffers of the exact size,
// threads, and comparisons.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "../core/dtype.h"

namespace test {

using d2v::DType;

// ---- element types: decoded exactly, encoded by rounding on a grid (no bit tricks, unlike simd.h) ----

inline double decode_half(uint16_t bits, int exponent_bits) {
  const int fraction_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits & 0x7fff) >> fraction_bits, fraction = bits & ((1 << fraction_bits) - 1);
  double value;
  if (exponent == (1 << exponent_bits) - 1) {
    value = fraction ? NAN : INFINITY;
  } else if (exponent == 0) {
    value = std::ldexp(fraction, 1 - bias - fraction_bits);
  } else {
    value = std::ldexp(fraction + (1 << fraction_bits), exponent - bias - fraction_bits);
  }
  return bits & 0x8000 ? -value : value;
}

// x to the nearest multiple of the spacing at x, ties to even; no overflow (test data are small).
inline double round_to(double x, int digits, int least_exponent) {
  if (x == 0 || !std::isfinite(x)) return x;
  int exponent;
  std::frexp(x, &exponent);
  const int spacing = (exponent > least_exponent ? exponent : least_exponent) - digits;
  return std::ldexp(std::nearbyint(std::ldexp(x, -spacing)), spacing);
}

inline double round_to_type(DType type, double x) {
  switch (type) {
    case d2v::kFloat32:
      return static_cast<float>(x);
    case d2v::kBFloat16:
      return round_to(static_cast<float>(x), 8, -125);
    case d2v::kFloat16:
      return round_to(static_cast<float>(x), 11, -13);
    default:
      return x;
  }
}

// Largest relative rounding error of a type.
inline double unit(DType type) {
  return type == d2v::kFloat32 ? 0x1p-24 : type == d2v::kBFloat16 ? 0x1p-9 : type == d2v::kFloat16 ? 0x1p-12 : 0x1p-53;
}
inline const char* name_of(DType type) {
  static const char* const names[] = {"none", "fp32", "bf16", "fp16", "fp64"};
  return names[type + 1];
}

// `count` elements that begin `skip` elements behind what the allocator gives, and end where the memory ends.
class Buffer {
 public:
  Buffer() = default;
  Buffer(DType type, int64_t count, int64_t skip = 0)
      : type_(type), count_(count), skip_(skip), bytes_(new char[static_cast<size_t>((count + skip) * size_of(type))]) {
    std::memset(bytes_.get(), 0x7f, static_cast<size_t>((count + skip) * size_of(type)));  // large in every type
  }
  Buffer(const Buffer& other) : Buffer(other.type_, other.count_, other.skip_) {
    std::memcpy(data(), other.data(), static_cast<size_t>(bytes()));
  }
  Buffer(Buffer&&) = default;
  Buffer& operator=(Buffer&&) = default;

  void* data() const { return bytes_.get() + skip_ * size_of(type_); }
  int64_t bytes() const { return count_ * size_of(type_); }
  int64_t count() const { return count_; }
  DType type() const { return type_; }
  double get(int64_t i) const {
    switch (type_) {
      case d2v::kFloat32:
        return static_cast<const float*>(data())[i];
      case d2v::kFloat64:
        return static_cast<const double*>(data())[i];
      default:
        return decode_half(static_cast<const uint16_t*>(data())[i], type_ == d2v::kBFloat16 ? 8 : 5);
    }
  }
  void set(int64_t i, double x) {
    if (type_ == d2v::kFloat32) static_cast<float*>(data())[i] = static_cast<float>(x);
    if (type_ == d2v::kFloat64) static_cast<double*>(data())[i] = x;
    if (size_of(type_) == 2) static_cast<uint16_t*>(data())[i] = encode_half(x);
  }
  bool same_bytes(const Buffer& other) const {
    return bytes() == other.bytes() && std::memcmp(data(), other.data(), static_cast<size_t>(bytes())) == 0;
  }

 private:
  // By search: the bits of positive numbers rise with their value.
  uint16_t encode_half(double x) const {
    const int exponent_bits = type_ == d2v::kBFloat16 ? 8 : 5;
    if (std::isnan(x)) return 0x7fff;
    const double rounded = std::fabs(round_to_type(type_, x));
    int low = 0, high = 0x7fff;
    while (low < high) {
      const int middle = (low + high) / 2;
      const double value = decode_half(static_cast<uint16_t>(middle), exponent_bits);
      if (!(value < rounded)) {  // NaN, the largest bits, counts as larger
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return static_cast<uint16_t>(low | (std::signbit(x) ? 0x8000 : 0));
  }

  DType type_ = d2v::kFloat32;
  int64_t count_ = 0, skip_ = 0;
  std::unique_ptr<char[]> bytes_;
};

// ---- numbers ----

inline uint64_t& random_state() {
  static uint64_t state = 1;
  return state;
}
inline uint64_t next_random() {
  uint64_t z = random_state() += 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}
inline int64_t below(int64_t n) { return static_cast<int64_t>(next_random() % static_cast<uint64_t>(n)); }
inline double random_value() { return static_cast<double>(below(4001)) / 1000 - 2; }
inline void fill_random(Buffer& buffer) {
  constexpr int64_t kPeriod = 1009;  // numbers that differ; encoding one takes long
  for (int64_t i = 0; i < buffer.count() && i < kPeriod; ++i) buffer.set(i, random_value());
  char* const bytes = static_cast<char*>(buffer.data());
  const int64_t period = kPeriod * size_of(buffer.type());
  for (int64_t i = period; i < buffer.bytes(); ++i) bytes[i] = bytes[i - period];
}

// ---- threads: every piece on a thread of its own, pieces as small as they may be whatever the caller's grain ----

constexpr int kThreads = 3;

inline void run_on_threads(int64_t n, int64_t, d2v::ParallelBody body, void* context) {
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    const int64_t begin = n * i / kThreads, end = n * (i + 1) / kThreads;
    if (begin < end) threads.emplace_back(body, context, begin, end);
  }
  for (std::thread& t : threads) t.join();
}
inline void run_inline(int64_t n, int64_t, d2v::ParallelBody body, void* context) { body(context, 0, n); }
constexpr d2v::Parallel kThreaded{run_on_threads, kThreads}, kSerial{run_inline, 1};

// ---- checks ----

inline int& failures() {
  static int count = 0;
  return count;
}
inline void fail(const std::string& where, const std::string& what) {
  if (++failures() <= 20) std::printf("%s: %s\n", where.c_str(), what.c_str());
}
inline void check(bool condition, const std::string& where, const char* what) {
  if (!condition) fail(where, what);
}
inline bool is_close(double got, double expected, double tolerance) {
  return (std::isnan(got) && std::isnan(expected)) || got == expected ||  // infinities too
         std::fabs(got - expected) <= tolerance * (1 + std::fabs(expected));
}
inline void check_close(const std::string& where, double got, double expected, double tolerance) {
  if (is_close(got, expected, tolerance)) return;
  char text[96];
  std::snprintf(text, sizeof(text), "expected %.9g, got %.9g", expected, got);
  fail(where, text);
}
inline void check_close(const std::string& where, const Buffer& got, const std::vector<double>& expected,
                        double tolerance) {
  check(got.count() == static_cast<int64_t>(expected.size()), where, "wrong size");
  for (int64_t i = 0; i < got.count(); ++i) {
    const double wanted = expected[static_cast<size_t>(i)];
    if (is_close(got.get(i), wanted, tolerance)) continue;
    return check_close(where + " [" + std::to_string(i) + "]", got.get(i), wanted, tolerance);  // one is enough
  }
}

template <class F>
Buffer run_both(const std::string& where, DType type, int64_t count, const F& run) {
  Buffer serial(type, count, 1), threaded(type, count, 1);
  run(serial, kSerial);
  run(threaded, kThreaded);
  check(serial.same_bytes(threaded), where, "threads changed the result");
  return serial;
}

// ---- cases ----

inline constexpr DType kTypes[] = {d2v::kFloat32, d2v::kBFloat16, d2v::kFloat16, d2v::kFloat64};
inline constexpr int64_t kWidths[] = {1, 15, 64, 131};

inline double tolerance_of(DType computed, DType stored) {
  return (computed == d2v::kFloat64 ? 1e-13 : 2e-6) + 2 * unit(stored);
}

// Philox4x32-10 (Salmon et al. 2011): the words of a counter, in place.
inline void philox(uint32_t (&x)[4], uint64_t key) {
  uint32_t k[2] = {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = 0xD2511F53ull * x[0], p1 = 0xCD9E8D57ull * x[2];
    const uint32_t y[4] = {static_cast<uint32_t>(p1 >> 32) ^ x[1] ^ k[0], static_cast<uint32_t>(p1),
                           static_cast<uint32_t>(p0 >> 32) ^ x[3] ^ k[1], static_cast<uint32_t>(p0)};
    std::memcpy(x, y, sizeof(x));
    k[0] += 0x9E3779B9u;
    k[1] += 0xBB67AE85u;
  }
}

// Word i % 4 of counter (i / 4, row, head).
inline uint32_t random_word(uint64_t key, int64_t i, int64_t row, int64_t head = 0) {
  uint32_t x[4] = {static_cast<uint32_t>(i / 4), static_cast<uint32_t>(row), static_cast<uint32_t>(head), 0};
  philox(x, key);
  return x[i % 4];
}

// core_attention_test.cpp, core_gelu_test.cpp, core_norm_test.cpp
void test_attention();
void test_convolution();
void test_gelu();
void test_norm();
// core_rows_test.cpp
void test_tokens();
void test_loss();

}  // namespace test
