// The part of core_test.cpp for grouped convolutions.
#include "../core/convolution.h"
#include "../core/parallel.h"
#include "core_support.h"

namespace d2v {
extern const ConvolutionKernels convolution_kernels_emulated;
}

using namespace d2v;
using namespace test;

namespace {

struct ConvolutionCase {
  DType type, weight_type;
  int64_t N, H, W, C, D, groups, kernel_h, kernel_w;
};
typedef std::vector<double> Doubles;

class Convolution {
 public:
  explicit Convolution(const ConvolutionCase& c)
      : c_(c),
        wide_(c.type == kFloat64 ? kFloat64 : kFloat32),
        x_(c.type, c.N * c.H * c.W * c.C, 1),
        weight_(c.weight_type, c.D * c.C / c.groups * taps(), 1),
        bias_(wide_, c.D, 1),
        added_(c.type, c.N * c.H * c.W * c.D, 1) {
    for (Buffer* b : {&x_, &weight_, &bias_, &added_}) fill_random(*b);
  }
  ConvolutionArgs args() const {
    return {x_.data(),   c_.type,         c_.N,           c_.H, c_.W, c_.C, c_.D, c_.groups, c_.kernel_h,
            c_.kernel_w, c_.kernel_h / 2, c_.kernel_w / 2};
  }
  ConvolutionWeight weight(bool transposed) const { return {weight_.data(), c_.weight_type, transposed}; }
  const Buffer& bias() const { return bias_; }
  const Buffer& added() const { return added_; }
  DType wide() const { return wide_; }

  // The convolution's result; and with the rows of `added` as its gradient, those of x and of the weight.
  std::vector<Doubles> truth() const {
    const int64_t inputs = c_.C / c_.groups, outputs = c_.D / c_.groups;
    std::vector<Doubles> all{Doubles(count(added_)), Doubles(count(x_)), Doubles(count(weight_))};
    for (int64_t row = 0; row < c_.N * c_.H * c_.W; ++row) {
      const int64_t y = row / c_.W % c_.H, x = row % c_.W;
      for (int64_t d = 0; d < c_.D; ++d) {
        const size_t out = static_cast<size_t>(row * c_.D + d);
        all[0][out] += bias_.get(d) + added_.get(row * c_.D + d);
        for (int64_t tap = 0; tap < taps(); ++tap) {
          const int64_t dy = tap / c_.kernel_w - c_.kernel_h / 2, dx = tap % c_.kernel_w - c_.kernel_w / 2;
          if (y + dy < 0 || y + dy >= c_.H || x + dx < 0 || x + dx >= c_.W) continue;
          for (int64_t i = 0; i < inputs; ++i) {
            const int64_t in = (row + dy * c_.W + dx) * c_.C + d / outputs * inputs + i;
            const int64_t w = (d * inputs + i) * taps() + tap;
            const double factor = round_to_type(c_.type, weight_.get(w));
            all[0][out] += x_.get(in) * factor;
            all[1][static_cast<size_t>(in)] += added_.get(row * c_.D + d) * factor;
            all[2][static_cast<size_t>(w)] += added_.get(row * c_.D + d) * x_.get(in);
          }
        }
      }
    }
    return all;
  }

 private:
  int64_t taps() const { return c_.kernel_h * c_.kernel_w; }
  static size_t count(const Buffer& b) { return static_cast<size_t>(b.count()); }

  ConvolutionCase c_;
  DType wide_;
  Buffer x_, weight_, bias_, added_;
};

std::vector<Buffer> results_of(const Convolution& x, const ConvolutionCase& c) {
  std::vector<Buffer> all;
  all.emplace_back(c.type, c.N * c.H * c.W * c.D, 1);
  all.emplace_back(c.type, c.N * c.H * c.W * c.C, 1);
  all.emplace_back(x.wide(), c.D * c.C / c.groups * c.kernel_h * c.kernel_w, 1);
  return all;
}

// Arguments of the gradient of x: a convolution of `added`.
ConvolutionArgs turned(const Convolution& x, const ConvolutionCase& c) {
  ConvolutionArgs a = x.args();
  a.x = x.added().data();
  a.C = c.D, a.D = c.C;
  a.before_h = c.kernel_h - 1 - a.before_h, a.before_w = c.kernel_w - 1 - a.before_w;
  return a;
}

std::vector<Buffer> run(const Convolution& x, const ConvolutionCase& c, Parallel parallel) {
  std::vector<Buffer> all = results_of(x, c);
  convolution(x.args(), x.weight(false), {x.bias().data(), x.added().data(), all[0].data()}, parallel);
  convolution(turned(x, c), x.weight(true), {nullptr, nullptr, all[1].data()}, parallel);
  convolution_backward_weight(x.args(), x.added().data(), all[2].data(), parallel);
  return all;
}

void run_forward(const ConvolutionKernels& kernels, const ConvolutionArgs& a, ConvolutionWeight weight,
                 ConvolutionEnds ends) {
  Space packed(a.groups * kernels.packed_bytes(&a)), space(kernels.space_bytes(&a));
  kernels.pack(&a, &weight, 0, a.groups, packed.data());
  kernels.forward(&a, packed.data(), &ends, 0, a.N * a.groups, space.data());
}

// The kernels for AMX with its tiles in plain C++.
std::vector<Buffer> run_emulated(const Convolution& x, const ConvolutionCase& c) {
  std::vector<Buffer> all = results_of(x, c);
  const ConvolutionKernels& kernels = convolution_kernels_emulated;
  const ConvolutionArgs a = x.args();
  run_forward(kernels, a, x.weight(false), {x.bias().data(), x.added().data(), all[0].data()});
  run_forward(kernels, turned(x, c), x.weight(true), {nullptr, nullptr, all[1].data()});
  Space space(kernels.space_bytes(&a));
  kernels.backward_weight(&a, x.added().data(), all[2].data(), 0, c.groups, space.data());
  return all;
}

void check_all(const std::string& where, const ConvolutionCase& c, const Convolution& x,
               const std::vector<Buffer>& got) {
  static const char* const names[] = {"out", "of x", "of weight"};
  const std::vector<Doubles> truth = x.truth();
  for (size_t i = 0; i < got.size(); ++i) {
    // Sums of products of numbers up to 2.
    const double terms = static_cast<double>(i == 2 ? c.N * c.H * c.W : c.kernel_h * c.kernel_w * c.C / c.groups);
    check_close(where + names[i], got[i], truth[i], 8 * (unit(x.wide()) * (4 + terms) + unit(got[i].type())));
  }
}

void test_case(const ConvolutionCase& c) {
  const Convolution x(c);
  const std::string where = std::string("convolution ") + name_of(c.type) + " " + std::to_string(c.H) + " x " +
                            std::to_string(c.W) + " C " + std::to_string(c.C) + " ";
  const std::vector<Buffer> serial = run(x, c, kSerial), threaded = run(x, c, kThreaded);
  for (size_t i = 0; i < serial.size(); ++i) check(serial[i].same_bytes(threaded[i]), where, "threads changed bits");
  check_all(where, c, x, serial);
  if (c.type == kBFloat16) check_all(where + "emulated ", c, x, run_emulated(x, c));
}

}  // namespace

namespace test {

void test_convolution() {
  for (const DType type : kTypes) {
    for (const DType weight : {type, type == kFloat64 ? kFloat64 : kFloat32}) {
      test_case({type, weight, 2, 1, 61, 48, 48, 2, 1, 19});  // more positions than have sums at once
      test_case({type, weight, 1, 8, 8, 24, 72, 1, 3, 3});    // row by row
      test_case({type, weight, 3, 5, 3, 21, 14, 7, 4, 2});
      test_case({type, weight, 2, 1, 1, 34, 34, 2, 1, 7});
    }
  }
  test_case({kFloat32, kFloat32, 0, 4, 4, 8, 8, 2, 3, 3});
}

}  // namespace test
