// The part of core_test.cpp that goes by rows: tokens and the loss.
#include "../core/loss.h"
#include "../core/tokens.h"
#include "core_support.h"

using namespace d2v;
using namespace test;

namespace {

// ---- tokens ----

// Row numbers of either width, every `step`-th element of the memory.
class Index {
 public:
  Index(int64_t rows, int64_t columns, int64_t limit, bool wide, int64_t step)
      : rows_(rows), columns_(columns), step_(step), wide_(wide) {
    const size_t size = static_cast<size_t>(rows * columns * step);
    narrow_.resize(wide ? 0 : size, -7);
    broad_.resize(wide ? size : 0, -7);
    for (int64_t i = 0; i < rows * columns; ++i) set(i, below(limit));
  }
  void set(int64_t i, int64_t value) {
    const size_t at = static_cast<size_t>(i * step_);
    if (wide_) {
      broad_[at] = value;
    } else {
      narrow_[at] = static_cast<int32_t>(value);
    }
  }
  int64_t get(int64_t i) const {
    const size_t at = static_cast<size_t>(i * step_);
    return wide_ ? broad_[at] : narrow_[at];
  }
  // Each row a random order of 0 .. columns - 1.
  void shuffle() {
    for (int64_t r = 0; r < rows_; ++r) {
      for (int64_t i = 0; i < columns_; ++i) set(r * columns_ + i, i);
      for (int64_t i = 0; i < columns_; ++i) {
        const int64_t a = r * columns_ + i, b = r * columns_ + below(columns_), value = get(a);
        set(a, get(b));
        set(b, value);
      }
    }
  }
  Indices view() const {
    const void* data = wide_ ? static_cast<const void*>(broad_.data()) : narrow_.data();
    return {data, wide_, columns_ * step_, step_};
  }

 private:
  int64_t rows_, columns_, step_;
  bool wide_;
  std::vector<int32_t> narrow_;
  std::vector<int64_t> broad_;
};

struct TokensCase {
  DType type;
  int64_t B, T, C, clones, n;
  bool wide;
};

void test_gather(const TokensCase& c) {
  const std::string where = std::string("gather_tokens ") + name_of(c.type) + " C " + std::to_string(c.C);
  const int64_t stride = c.C + 2, rows = c.B * c.clones;
  Buffer x(c.type, c.B * c.T * stride - 2, 1);
  fill_random(x);
  const Index index(rows, c.n, c.T, c.wide, c.wide ? 2 : 1);
  const Buffer out = run_both(where, c.type, rows * c.n * c.C, [&](Buffer& to, Parallel parallel) {
    gather_tokens({{x.data(), c.T * stride, stride}, index.view(), rows, c.n, c.clones, c.C, c.type, to.data()},
                  parallel);
  });
  std::vector<double> expected;
  for (int64_t i = 0; i < rows * c.n; ++i) {
    for (int64_t k = 0; k < c.C; ++k) {
      expected.push_back(x.get((i / c.n / c.clones * c.T + index.get(i)) * stride + k));
    }
  }
  check_close(where, out, expected, 0);

  Buffer grad(c.type, rows * c.n * stride, 1);
  fill_random(grad);
  const Buffer back = run_both(where + " backward", c.type, c.B * c.T * c.C, [&](Buffer& to, Parallel parallel) {
    gather_tokens_backward(
        {{grad.data(), c.n * stride, stride}, index.view(), rows, c.n, c.clones, c.T, c.C, c.type, to.data()},
        parallel);
  });
  std::vector<double> sums(static_cast<size_t>(c.B * c.T * c.C));
  for (int64_t i = 0; i < rows * c.n; ++i) {
    for (int64_t k = 0; k < c.C; ++k) {
      sums[static_cast<size_t>((i / c.n / c.clones * c.T + index.get(i)) * c.C + k)] += grad.get(i * stride + k);
    }
  }
  check_close(where + " backward", back, sums, 4 * tolerance_of(c.type, c.type));
}

// One normal number of the stream, in double.
double noise_at(uint64_t key, uint32_t row, int64_t channel) {
  uint32_t x[4] = {static_cast<uint32_t>(channel / 4), row, 0, 0};
  philox(x, key);
  const int pair = channel % 4 / 2 * 2;
  const auto uniform = [](uint32_t bits) { return (static_cast<float>(bits >> 8) + 0.5f) * 0x1p-24f; };
  const double length = std::sqrt(-2 * std::log(static_cast<double>(uniform(x[pair]))));
  const double angle = 2 * M_PI * static_cast<double>(uniform(x[pair + 1]));
  return length * (channel % 2 ? std::sin(angle) : std::cos(angle));
}

void test_restore(const TokensCase& c, FillKind kind) {
  const std::string where =
      std::string("restore_tokens ") + name_of(c.type) + " C " + std::to_string(c.C) + " fill " + std::to_string(kind);
  const int64_t V = c.n, F = c.T - V, stride = c.C + 1;
  Buffer kept(c.type, c.B * V * stride, 1), fill(c.type, kind == kFillVector ? c.C : c.B * F * c.C, 1);
  fill_random(kept);
  fill_random(fill);
  Index restore(c.B, c.T, c.T, c.wide, c.wide ? 3 : 1);
  restore.shuffle();
  std::vector<int64_t> keys;
  for (int64_t b = 0; b < 2 * c.B; ++b) keys.push_back(static_cast<int64_t>(next_random()));
  const Buffer out = run_both(where, c.type, c.B * c.T * c.C, [&](Buffer& to, Parallel parallel) {
    restore_tokens({{kept.data(), V * stride, stride},
                    restore.view(),
                    c.B,
                    V,
                    c.T,
                    c.C,
                    c.type,
                    kind,
                    {fill.data(), F * c.C, c.C},
                    keys.data(),
                    2,
                    0.5f,
                    to.data()},
                   parallel);
  });
  std::vector<double> expected;
  for (int64_t i = 0; i < c.B * c.T; ++i) {
    const int64_t b = i / c.T, j = restore.get(i) - V;
    for (int64_t k = 0; k < c.C; ++k) {
      expected.push_back(j < 0                 ? kept.get((b * V + restore.get(i)) * stride + k)
                         : kind == kFillVector ? fill.get(k)
                         : kind == kFillRows   ? fill.get((b * F + j) * c.C + k)
                                               : 0.5 * noise_at(static_cast<uint64_t>(keys[static_cast<size_t>(2 * b)]),
                                                                static_cast<uint32_t>(j), k));
    }
  }
  check_close(where, out, expected, kind == kFillNoise ? 4e-6 + 2 * unit(c.type) : 0);
  if (kind == kFillNoise) return;

  const Buffer& grad = out;
  Buffer serial_fill = fill, threaded_fill = fill;
  const Buffer back = run_both(where + " backward", c.type, c.B * V * c.C, [&](Buffer& to, Parallel parallel) {
    void* const fill_out = parallel.threads > 1 ? threaded_fill.data() : serial_fill.data();
    restore_tokens_backward({{grad.data(), c.T * c.C, c.C},
                             restore.view(),
                             c.B,
                             V,
                             c.T,
                             c.C,
                             kind == kFillVector ? -1 : F,
                             c.type,
                             to.data(),
                             fill_out},
                            parallel);
  });
  check(serial_fill.same_bytes(threaded_fill), where, "threads changed the gradient of the fill");
  std::vector<double> of_kept(static_cast<size_t>(back.count())), of_fill(static_cast<size_t>(fill.count()));
  for (int64_t i = 0; i < c.B * c.T; ++i) {
    const int64_t b = i / c.T, j = restore.get(i) - V;
    for (int64_t k = 0; k < c.C; ++k) {
      const int64_t at = j < 0 ? (b * V + restore.get(i)) * c.C : kind == kFillVector ? 0 : (b * F + j) * c.C;
      (j < 0 ? of_kept : of_fill)[static_cast<size_t>(at + k)] += grad.get(i * c.C + k);
    }
  }
  check_close(where + " backward", back, of_kept, 0);
  check_close(where + " fill", serial_fill, of_fill, kind == kFillRows ? 0 : 20 * tolerance_of(c.type, c.type));
}

void test_bad_index() {
  Index index(3, 5, 9, true, 2);
  BadIndex bad;
  check(!find_bad_index(index.view(), 3, 5, 9, &bad), "find_bad_index", "found one among good ones");
  check(!find_bad_index(index.view(), 3, 0, 0, &bad), "find_bad_index", "found one in nothing");
  for (const int64_t value : {int64_t{-1}, int64_t{9}, INT64_MIN}) {
    index.set(7, value);
    const bool found = find_bad_index(index.view(), 3, 5, 9, &bad);
    check(found && bad.row == 1 && bad.column == 2 && bad.value == value, "find_bad_index", "did not find it");
  }
}

}  // namespace

void test::test_tokens() {
  int turn = 0;
  for (const DType type : kTypes) {
    for (const int64_t C : kWidths) {
      const TokensCase c{type, 2, 9, C, 1 + turn % 3, 1 + 2 * (turn % 4), turn % 2 == 1};
      test_gather(c);
      for (const FillKind kind : {kFillVector, kFillRows, kFillNoise}) test_restore(c, kind);
      ++turn;
    }
    // Enough for output past the caches, rows at every distance from a line's start.
    const TokensCase large{type, 2, 401, size_of(type) == 2 ? 771 : 387, 3, 120, false};
    test_gather(large);
    for (const FillKind kind : {kFillVector, kFillRows, kFillNoise}) test_restore(large, kind);
    test_gather({type, 1, 3, 64, 1, 0, false});
  }
  test_bad_index();
}

namespace {

// ---- masked_regression_loss ----

struct LossCase {
  DType prediction, target;
  int64_t P, C;
  double beta;
  bool with_rows, with_nan;
};

double mean_std(const std::vector<double>& x, int64_t P, int64_t C) {
  if (P < 2) return NAN;
  double total = 0;
  for (int64_t c = 0; c < C; ++c) {
    double mean = 0, m2 = 0;
    for (int64_t p = 0; p < P; ++p) mean += x[static_cast<size_t>(p * C + c)] / static_cast<double>(P);
    for (int64_t p = 0; p < P; ++p) m2 += std::pow(x[static_cast<size_t>(p * C + c)] - mean, 2);
    total += std::sqrt(m2 / static_cast<double>(P - 1) + 1e-6);
  }
  return total / static_cast<double>(C);
}

void test_loss_case(const LossCase& c) {
  const std::string where = std::string("masked_regression_loss ") + name_of(c.prediction) + ", " + name_of(c.target) +
                            " P " + std::to_string(c.P) + " C " + std::to_string(c.C);
  const int64_t rows = c.P + 4, stride = c.C + 3, x_rows = c.with_rows ? rows : c.P;
  Buffer x(c.prediction, x_rows * stride, 1), y(c.target, rows * stride, 2);
  fill_random(x);
  fill_random(y);
  if (c.with_nan) x.set(stride * (x_rows / 2), NAN);
  Index of_x(1, rows, rows, true, 2), of_y(1, c.P > 0 ? c.P : 1, rows, false, 1);
  of_x.shuffle();  // distinct, as the rule is; target rows repeat
  Indices none{nullptr, false, 0, 0};
  const LossArgs args{x.data(),
                      y.data(),
                      stride,
                      stride,
                      c.prediction,
                      c.target,
                      c.with_rows ? of_x.view() : none,
                      c.with_rows ? of_y.view() : none,
                      c.P,
                      c.C,
                      c.beta,
                      0.25};
  const LossResult serial = masked_regression_loss(args, kSerial), threaded = masked_regression_loss(args, kThreaded);
  check(std::memcmp(&serial, &threaded, sizeof(serial)) == 0, where, "threads changed the result");
  const Buffer gradient = run_both(where + " backward", c.prediction, x_rows * c.C, [&](Buffer& to, Parallel parallel) {
    masked_regression_loss_backward(args, 3.0, x_rows, to.data(), parallel);
  });
  double loss = 0;
  std::vector<double> xs, ys, slopes(static_cast<size_t>(x_rows * c.C));
  for (int64_t p = 0; p < c.P; ++p) {
    const int64_t r = c.with_rows ? of_x.get(p) : p, s = c.with_rows ? of_y.get(p) : p;
    for (int64_t k = 0; k < c.C; ++k) {
      xs.push_back(x.get(r * stride + k));
      ys.push_back(y.get(s * stride + k));
      const double d = xs.back() - ys.back(), size = std::fabs(d);
      const bool inside = c.beta == 0 || !(size >= c.beta);
      loss += 0.25 * (c.beta == 0 ? d * d : inside ? d * d / (2 * c.beta) : size - c.beta / 2);
      const double slope = c.beta == 0 ? 2 * d : inside ? d / c.beta : d > 0 ? 1 : -1;
      slopes[static_cast<size_t>(r * c.C + k)] = 3.0 * 0.25 * slope;
    }
  }
  const double tolerance = c.prediction == kFloat64 ? 1e-12 : 1e-5;
  check_close(where + " loss", serial.loss, loss, tolerance);
  check_close(where + " prediction std", serial.prediction_std, mean_std(xs, c.P, c.C), tolerance);
  check_close(where + " target std", serial.target_std, mean_std(ys, c.P, c.C), tolerance);
  check_close(where + " backward", gradient, slopes, 4 * tolerance_of(c.prediction, c.prediction));
}

}  // namespace

void test::test_loss() {
  int turn = 0;
  for (const DType prediction : kTypes) {
    for (const DType target : kTypes) {
      if ((prediction == kFloat64) != (target == kFloat64)) continue;
      for (const double beta : {0.0, 0.7}) {
        const bool odd = turn % 2 == 1;
        test_loss_case({prediction, target, odd ? 131 : 65, kWidths[turn % 4], beta, turn % 3 != 0, turn % 5 == 4});
        test_loss_case({prediction, target, turn % 3, kWidths[(turn + 1) % 4], beta, odd, false});
        ++turn;
      }
    }
    test_loss_case({prediction, prediction, 333, size_of(prediction) == 2 ? 1603 : 803, 0.0, true, false});
  }
}
