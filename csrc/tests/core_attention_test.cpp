// The part of core_test.cpp that is attention.
#include <algorithm>

#include "../core/attention.h"
#include "../core/dispatch.h"
#include "core_support.h"

namespace d2v {
// The kernels for AMX with its tiles in plain C++: for every machine, and compiled as those for AMX are.
extern const AttentionKernels attention_bf16_kernels_emulated, attention_bf16_kernels_emulated_amx;
}  // namespace d2v

using namespace d2v;
using namespace test;

namespace {

struct AttentionCase {
  DType type;
  int64_t N, T, H, D, extra;
  bool bias, lengths, valid, dropout;
};

typedef std::vector<double> Doubles;

// Inputs, and the definition in double.
class Attention {
 public:
  explicit Attention(const AttentionCase& c)
      : c_(c),
        computed_(c.type == kFloat64 ? kFloat64 : kFloat32),
        joint_(c.type, c.N * c.T * 3 * c.H * c.D, 1),
        grad_(c.type, c.N * c.T * c.H * c.D, 1),
        slopes_(computed_, c.H, 1) {
    fill_random(joint_);
    fill_random(grad_);
    fill_random(slopes_);
    for (int64_t i = 0; i < c.N * (c.T - c.extra); ++i) positions_.push_back(static_cast<int32_t>(below(20)));
    for (int64_t i = 0; i < c.N * c.T; ++i) valid_.push_back(below(3) > 0);
    for (int64_t n = 0; n < c.N; ++n) lengths_.push_back(n == 0 ? 0 : c.T - below(c.T));
    for (int64_t n = 0; n < c.N; ++n) keys_.push_back(static_cast<int64_t>(next_random()));
  }

  AttentionArgs args() const {
    AttentionArgs a{};
    a.query = part(0), a.key = part(1), a.value = part(2);
    a.N = c_.N, a.T = c_.T, a.H = c_.H, a.D = c_.D;
    a.wide = computed_ == kFloat64;
    a.slopes = c_.bias ? slopes_.data() : nullptr;
    a.slope_stride = 1;
    a.positions = {positions_.data(), false, c_.T - c_.extra, 1};
    a.placed = c_.T - c_.extra;
    if (c_.lengths) a.lengths = {lengths_.data(), true, 0, 1};
    a.valid = c_.valid ? valid_.data() : nullptr;
    a.valid_row = c_.T;
    a.valid_stride = 1;
    a.keys = keys_.data();
    a.key_stride = 1;
    a.drops = c_.dropout;
    a.last_dropped = kLastDropped;
    a.rescale = c_.dropout ? 4.0 / 3.0 : 1.0;
    a.scale = kScale;
    return a;
  }
  Heads whole(const Buffer& x) const { return {x.data(), c_.T * c_.H * c_.D, c_.H * c_.D, c_.D, c_.type}; }
  DType computed() const { return computed_; }
  const Buffer& grad() const { return grad_; }

  // out, log_sum, and the gradients of query, key, value and slopes.
  std::vector<Doubles> truth() const {
    const size_t size = static_cast<size_t>(c_.N * c_.T * c_.H * c_.D);
    std::vector<Doubles> all{Doubles(size), Doubles(static_cast<size_t>(c_.N * c_.H * c_.T)),
                             Doubles(size), Doubles(size),
                             Doubles(size), Doubles(static_cast<size_t>(c_.H))};
    for (int64_t n = 0; n < c_.N; ++n) {
      for (int64_t h = 0; h < c_.H; ++h) {
        for (int64_t i = 0; i < c_.T; ++i) add_query(n, h, i, &all);
      }
    }
    return all;
  }

 private:
  static constexpr uint32_t kLastDropped = (1u << 30) - 1;  // a quarter
  static constexpr double kScale = 0.125;

  Heads part(int64_t which) const {
    const char* const data = static_cast<const char*>(joint_.data()) + which * c_.H * c_.D * size_of(c_.type);
    return {data, c_.T * 3 * c_.H * c_.D, 3 * c_.H * c_.D, c_.D, c_.type};
  }
  double element(int64_t which, int64_t n, int64_t t, int64_t h, int64_t d) const {
    return joint_.get((((n * c_.T + t) * 3 + which) * c_.H + h) * c_.D + d);
  }
  bool is_key(int64_t n, int64_t j) const {
    return (!c_.lengths || j < lengths_[static_cast<size_t>(n)]) &&
           (!c_.valid || valid_[static_cast<size_t>(n * c_.T + j)]);
  }
  double distance(int64_t n, int64_t i, int64_t j) const {
    if (!c_.bias || i < c_.extra || j < c_.extra) return 0;
    const int32_t* const row = positions_.data() + n * (c_.T - c_.extra);
    return std::abs(row[i - c_.extra] - row[j - c_.extra]);
  }

  // What dropout leaves of a weight.
  double left_of(int64_t n, int64_t h, int64_t i, int64_t j) const {
    if (!c_.dropout) return 1;
    const uint64_t key = static_cast<uint64_t>(keys_[static_cast<size_t>(n)]);
    // Number `place` of the sixteen of a call.
    const int64_t call = j / 64 * 4 + j % 8 / 2, place = j / 8 % 8 * 2 + j % 2;
    const uint32_t word = random_word(key, call * 4 + place % 4, i, h) << (place / 4 * 8);
    return word > kLastDropped ? 4.0 / 3.0 : 0;
  }

  void add_query(int64_t n, int64_t h, int64_t i, std::vector<Doubles>* all) const {
    Doubles p(static_cast<size_t>(c_.T));
    double total = 0, delta = 0;
    const auto at = [&](int64_t t, int64_t d) { return static_cast<size_t>(((n * c_.T + t) * c_.H + h) * c_.D + d); };
    for (int64_t j = 0; j < c_.T; ++j) {
      double s = -slopes_.get(h) * distance(n, i, j);
      for (int64_t d = 0; d < c_.D; ++d) s += kScale * element(0, n, i, h, d) * element(1, n, j, h, d);
      p[static_cast<size_t>(j)] = is_key(n, j) ? std::exp(s) : 0;
      total += p[static_cast<size_t>(j)];
    }
    (*all)[1][static_cast<size_t>((n * c_.H + h) * c_.T + i)] = c_.D > 0 && total > 0 ? std::log(total) : INFINITY;
    Doubles upstream(static_cast<size_t>(c_.T));
    for (int64_t j = 0; j < c_.T; ++j) {
      double& weight = p[static_cast<size_t>(j)];
      weight = total > 0 ? weight / total : 0;
      const double left = left_of(n, h, i, j);
      for (int64_t d = 0; d < c_.D; ++d) {
        const double g = grad_.get(static_cast<int64_t>(at(i, d)));
        (*all)[0][at(i, d)] += weight * left * element(2, n, j, h, d);
        (*all)[4][at(j, d)] += weight * left * g;
        upstream[static_cast<size_t>(j)] += left * g * element(2, n, j, h, d);
      }
      delta += weight * upstream[static_cast<size_t>(j)];
    }
    for (int64_t j = 0; j < c_.T; ++j) {
      const double of_logit = p[static_cast<size_t>(j)] * (upstream[static_cast<size_t>(j)] - delta);
      for (int64_t d = 0; d < c_.D; ++d) {
        (*all)[2][at(i, d)] += kScale * of_logit * element(1, n, j, h, d);
        (*all)[3][at(j, d)] += kScale * of_logit * element(0, n, i, h, d);
      }
      (*all)[5][static_cast<size_t>(h)] -= of_logit * distance(n, i, j);
    }
  }

  AttentionCase c_;
  DType computed_;
  Buffer joint_, grad_, slopes_;
  std::vector<int32_t> positions_;
  std::vector<uint8_t> valid_;
  std::vector<int64_t> lengths_, keys_;
};

std::vector<Buffer> results_of(const Attention& x, const AttentionCase& c) {
  const int64_t count = c.N * c.T * c.H * c.D;
  std::vector<Buffer> all;
  all.emplace_back(c.type, count, 1);
  all.emplace_back(x.computed(), c.N * c.H * c.T, 1);
  for (int i = 0; i < 3; ++i) all.emplace_back(c.type, count, 1);
  all.emplace_back(x.computed(), c.bias ? c.H : 0, 1);
  return all;
}

AttentionGradient gradient_of(const Attention& x, const AttentionCase& c, std::vector<Buffer>& all, double* of_slopes) {
  const LogSums sums{all[1].data(), c.H * c.T, c.T, 1};
  return {x.whole(x.grad()), sums, all[2].data(), all[3].data(), all[4].data(), of_slopes};
}

std::vector<Buffer> run(const Attention& x, const AttentionCase& c, Parallel parallel) {
  std::vector<Buffer> all = results_of(x, c);
  const AttentionArgs a = x.args();
  attention(a, all[0].data(), all[1].data(), parallel);
  attention_backward(a, gradient_of(x, c, all, nullptr), all[5].data(), parallel);
  return all;
}

// The same by given kernels for bf16, on one thread, `queries` of a head at once.
std::vector<Buffer> run_kernels(const AttentionKernels& kernels, const Attention& x, const AttentionCase& c,
                                int64_t queries) {
  std::vector<Buffer> all = results_of(x, c);
  const AttentionArgs a = x.args();
  const AttentionBf16Sizes sizes(a);
  const size_t words = static_cast<size_t>(std::max(sizes.forward(), sizes.backward())) + 16;
  std::vector<uint32_t> space(words), more(words);
  const auto aligned = [](std::vector<uint32_t>& s) {
    return s.data() + (64 - reinterpret_cast<uintptr_t>(s.data()) % 64) % 64 / 4;
  };
  kernels.forward(&a, all[0].data(), all[1].data(), queries, 0, c.N * c.H * ((c.T + queries - 1) / queries),
                  aligned(space));
  Doubles of_slopes(static_cast<size_t>(c.N * c.H));
  const AttentionGradient g = gradient_of(x, c, all, c.bias ? of_slopes.data() : nullptr);
  kernels.backward(&a, &g, 0, c.N * c.H, aligned(more));
  for (int64_t h = 0; c.bias && h < c.H; ++h) {
    double total = 0;
    for (int64_t n = 0; n < c.N; ++n) total += of_slopes[static_cast<size_t>(n * c.H + h)];
    all[5].set(h, total);
  }
  return all;
}

void check_all(const std::string& where, const Attention& x, const AttentionCase& c, const std::vector<Buffer>& got) {
  static const char* const names[] = {"out", "log_sum", "query", "key", "value", "slopes"};
  std::vector<Doubles> truth = x.truth();
  if (!c.bias) truth[5].clear();
  for (size_t i = 0; i < got.size(); ++i) {
    const double size = i == 5 ? 40.0 * static_cast<double>(c.T) : 40.0;  // terms cancel
    check_close(where + names[i], got[i], truth[i], size * tolerance_of(x.computed(), got[i].type()));
  }
}

std::string words_of(const AttentionCase& c) {
  return std::string("attention ") + name_of(c.type) + " T " + std::to_string(c.T) + " D " + std::to_string(c.D) +
         (c.dropout ? " dropout" : "") + (c.bias ? " bias " : " ");
}

void check_same(const std::string& where, const std::vector<Buffer>& a, const std::vector<Buffer>& b) {
  for (size_t i = 0; i < a.size(); ++i) check(a[i].same_bytes(b[i]), where + std::to_string(i), "other bits");
}

void test_case(const AttentionCase& c) {
  const Attention x(c);
  const std::vector<Buffer> serial = run(x, c, kSerial);
  check_same(words_of(c) + "threads ", serial, run(x, c, kThreaded));
  check_all(words_of(c), x, c, serial);
  if (c.type != kBFloat16 || c.N * c.T * c.D == 0) return;
  const std::vector<Buffer> emulated = run_kernels(attention_bf16_kernels_emulated, x, c, 48);
  check_all(words_of(c) + "emulated ", x, c, emulated);
  check_same(words_of(c) + "queries ", emulated, run_kernels(attention_bf16_kernels_emulated, x, c, 96));
#if defined(D2V_HAS_AMX)
  if (std::strcmp(cpu_isa(), "amx") != 0) return;
  // The processor's tiles against those in C++: every bit, as all else is compiled alike.
  check_same(words_of(c) + "tiles ", serial, run_kernels(attention_bf16_kernels_emulated_amx, x, c, 48));
#endif
}

// The kernels for bf16 must be those that run: their weights are rounded, so that results differ from fp32's bits.
void test_that_bf16_has_its_own_kernels() {
  const AttentionCase c{kBFloat16, 2, 70, 2, 64, 0, false, false, false, false};
  const Attention x(c);
  const AttentionKernels* const kernels = attention_bf16_kernels();
  const bool higher = std::strcmp(cpu_isa(), "avx512bf16") == 0 || std::strcmp(cpu_isa(), "amx") == 0;
  check((kernels != nullptr) == higher, "attention bf16", "kernels of another level");
  if (kernels) check_same("attention bf16 kernels ", run(x, c, kSerial), run_kernels(*kernels, x, c, 48));
}

}  // namespace

namespace test {

void test_attention() {
  for (const DType type : kTypes) {
    for (const int64_t D : kWidths) test_case({type, 2, 9 + D % 7, 2, D, 1, true, true, false, D != 64});
    test_case({type, 1, 101, 1, 17, 2, true, false, true, true});  // more than two blocks of queries
    test_case({type, 2, 50, 1, 33, 0, false, false, false, false});
    test_case({type, 2, 1, 3, 4, 1, true, false, false, true});
  }
  for (const int64_t T : {31, 40, 300}) {  // about a block, and more keys than go through the first cache at once
    test_case({kBFloat16, 2, T, 1, T == 300 ? 40 : 64, 1, true, T == 40, T == 300, T != 40});
  }
  test_that_bf16_has_its_own_kernels();
  for (const int64_t D : {0, 3}) test_case({kFloat32, D == 0 ? 1 : 0, 4, 2, D, 0, true, false, false, false});
}

}  // namespace test
