// The part of core_test.cpp for GELU, alone and after a layer norm.
#include "../core/gelu.h"
#include "core_support.h"

using namespace d2v;
using namespace test;

namespace {

double cdf(double z) { return 0.5 * std::erfc(-z * std::sqrt(0.5)); }
double gelu_at(double z) { return std::isinf(z) ? (z > 0 ? z : 0.0) : z * cdf(z); }
double slope_at(double z) {
  return std::isinf(z) ? (z > 0 ? 1.0 : 0.0) : cdf(z) + z * std::exp(-0.5 * z * z) * std::sqrt(0.5 / std::acos(-1.0));
}
DType compute_type(DType type) { return type == kFloat64 ? kFloat64 : kFloat32; }

// ---- gelu ----

void test_gelu_case(DType type, int64_t n, int64_t skip) {
  const std::string where = std::string("gelu ") + name_of(type) + " " + std::to_string(n);
  Buffer x(type, n, skip), grad(type, n, 1);
  fill_random(x);
  fill_random(grad);
  const double special[] = {-INFINITY, INFINITY, NAN, -6.25, 6.25, -30.0, 30.0, -6.125, -13.5, 0.0};
  for (int64_t i = 0; i < 10 && 3 * i < n; ++i) x.set(3 * i, special[i]);
  Buffer serial(type, n, skip), threaded(type, n, skip), of_x(type, n, 1), y(type, n, skip), product(grad);
  gelu(type, x.data(), serial.data(), n, kSerial);
  gelu(type, x.data(), threaded.data(), n, kThreaded);
  check(serial.same_bytes(threaded), where, "threads changed the result");
  gelu_backward(type, grad.data(), x.data(), of_x.data(), y.data(), n, kThreaded);
  check(serial.same_bytes(y), where, "backward gives another activation");
  gelu_backward(type, product.data(), x.data(), product.data(), y.data(), n, kSerial);
  check(product.same_bytes(of_x) && serial.same_bytes(y), where, "in place is something else");
  std::vector<double> values, gradients;
  for (int64_t i = 0; i < n; ++i) {
    values.push_back(gelu_at(x.get(i)));
    gradients.push_back(grad.get(i) * slope_at(x.get(i)));
  }
  const double tolerance = type == kFloat64 ? 1e-15 : 2e-7 + unit(type);
  check_close(where, serial, values, tolerance);
  check_close(where + " gradient", of_x, gradients, 2 * tolerance);
}

// ---- layer_norm_gelu ----

struct NormCase {
  DType type, grad_type;
  int64_t rows, C;
  bool with_weight, with_bias;
};

struct NormResult {
  std::vector<double> y, of_x, of_weight, of_bias;
};

NormResult norm_truth(const NormCase& c, const Buffer& x, const Buffer& grad, int64_t stride, const Buffer& weight,
                      const Buffer& bias) {
  NormResult r;
  r.of_weight.assign(static_cast<size_t>(c.C), 0.0);
  r.of_bias.assign(static_cast<size_t>(c.C), 0.0);
  const double C = static_cast<double>(c.C);
  for (int64_t i = 0; i < c.rows; ++i) {
    double mean = 0, variance = 0, along = 0, dot = 0;
    for (int64_t k = 0; k < c.C; ++k) mean += x.get(i * stride + k) / C;
    for (int64_t k = 0; k < c.C; ++k) variance += std::pow(x.get(i * stride + k) - mean, 2) / C;
    const double scale = 1 / std::sqrt(variance + 1e-5);
    std::vector<double> normal, g;
    for (int64_t k = 0; k < c.C; ++k) {
      const double w = c.with_weight ? weight.get(k) : 1, b = c.with_bias ? bias.get(k) : 0;
      normal.push_back((x.get(i * stride + k) - mean) * scale);
      const double z = normal.back() * w + b, of_z = grad.get(i * stride + k) * slope_at(z);
      r.y.push_back(gelu_at(z));
      r.of_weight[static_cast<size_t>(k)] += of_z * normal.back();
      r.of_bias[static_cast<size_t>(k)] += of_z;
      g.push_back(of_z * w);
      along += g.back() / C;
      dot += g.back() * normal.back() / C;
    }
    for (size_t k = 0; k < g.size(); ++k) r.of_x.push_back((g[k] - along - normal[k] * dot) * scale);
  }
  return r;
}

void test_norm_case(const NormCase& c) {
  const std::string where = std::string("layer_norm_gelu ") + name_of(c.type) + ", " + name_of(c.grad_type) + " " +
                            std::to_string(c.rows) + " x " + std::to_string(c.C);
  const DType wide = compute_type(c.type);
  const int64_t stride = c.C + 3, count = c.rows > 0 ? (c.rows - 1) * stride + c.C : 0;
  Buffer x(c.type, count, 1), grad(c.grad_type, count, 2), weight(wide, c.C), bias(wide, c.C, 1);
  for (Buffer* b : {&x, &grad, &weight, &bias}) fill_random(*b);
  const NormGeluArgs args{x.data(),
                          stride,
                          c.rows,
                          c.C,
                          c.type,
                          c.with_weight ? weight.data() : nullptr,
                          c.with_bias ? bias.data() : nullptr,
                          1e-5};
  std::vector<Buffer> y, of_x, sums;
  const bool wanted = c.with_weight || c.with_bias;
  for (const Parallel& parallel : {kSerial, kThreaded}) {
    y.emplace_back(c.type, c.rows * c.C, 1);
    of_x.emplace_back(c.type, c.rows * c.C);
    sums.emplace_back(wide, 2 * c.C);
    layer_norm_gelu(args, y.back().data(), parallel);
    const NormGeluGradient gradient{grad.data(), stride, c.grad_type, of_x.back().data(),
                                    wanted ? sums.back().data() : nullptr};
    layer_norm_gelu_backward(args, gradient, parallel);
  }
  check(y[0].same_bytes(y[1]) && of_x[0].same_bytes(of_x[1]) && sums[0].same_bytes(sums[1]), where,
        "threads changed the result");
  NormResult truth = norm_truth(c, x, grad, stride, weight, bias);
  const double tolerance = 4 * tolerance_of(c.type, c.type);
  check_close(where, y[0], truth.y, tolerance);
  // A row of one channel is all mean: its gradient is a difference of equal numbers times 1 / sqrt(eps).
  check_close(where + " gradient", of_x[0], truth.of_x, c.C == 1 ? 1e3 * tolerance : 10 * tolerance);
  if (!wanted) return;
  truth.of_weight.insert(truth.of_weight.end(), truth.of_bias.begin(), truth.of_bias.end());
  check_close(where + " sums", sums[0], truth.of_weight, 4 * tolerance_of(wide, wide));
}

}  // namespace

void test::test_gelu() {
  int turn = 0;
  for (const DType type : kTypes) {
    for (const int64_t n : {0, 1, 37, 131, 9001}) test_gelu_case(type, n, turn++ % 3);
    test_gelu_case(type, (int64_t{1} << 20) / size_of(type) + 21, 0);  // past the caches
    for (const DType grad_type : {type, compute_type(type)}) {
      for (const int64_t C : kWidths) {
        ++turn;
        test_norm_case({type, grad_type, turn % 40, C, turn % 2 == 0, turn % 3 == 0});
      }
      test_norm_case({type, grad_type, 1101, 64, true, true});
    }
  }
}
