// The part of core_test.cpp about dropout, residual sum and layer norm.
#include "../core/norm.h"
#include "core_support.h"

using namespace d2v;
using namespace test;

namespace {

struct NormCase {
  DType type;
  int64_t N, T, C;
  double dropout;
  bool affine, straight, with_nan;
};

struct Inputs {
  Buffer branch, residual, grad, straight, weight, bias;
  std::vector<int64_t> keys;
  int64_t stride;
};

double at(const NormCase& c, const Inputs& in, const Buffer& x, int64_t row, int64_t k) {
  return x.get((row / c.T * (c.T + 1) + row % c.T) * in.stride + k);
}

double factor_of(const NormCase& c, const Inputs& in, int64_t row, int64_t k) {
  if (c.dropout == 0) return 1;
  const uint64_t key = static_cast<uint64_t>(in.keys[static_cast<size_t>(2 * (row / c.T))]);
  const uint32_t word = random_word(key, k, row % c.T);
  return word >= std::nearbyint(c.dropout * 0x1p32) ? 1 / (1 - c.dropout) : 0;
}

struct Moments {
  double mean = 0, scale = 0;
  Moments(const Buffer& total, int64_t row, int64_t C) {
    double m2 = 0;
    for (int64_t k = 0; k < C; ++k) mean += total.get(row * C + k) / static_cast<double>(C);
    for (int64_t k = 0; k < C; ++k) m2 += std::pow(total.get(row * C + k) - mean, 2);
    scale = 1 / std::sqrt(m2 / static_cast<double>(C) + 1e-5);
  }
};

void check_forward(const std::string& where, const NormCase& c, const Inputs& in, const Buffer& total,
                   const Buffer& normed) {
  std::vector<double> sums, norms;
  for (int64_t row = 0; row < c.N * c.T; ++row) {
    const Moments m(total, row, c.C);
    for (int64_t k = 0; k < c.C; ++k) {
      sums.push_back(at(c, in, in.residual, row, k) + factor_of(c, in, row, k) * at(c, in, in.branch, row, k));
      const double x = (total.get(row * c.C + k) - m.mean) * m.scale;
      norms.push_back(c.affine ? x * in.weight.get(k) + in.bias.get(k) : x);
    }
  }
  check_close(where + " total", total, sums, tolerance_of(c.type, c.type));
  check_close(where + " normed", normed, norms, 4 * tolerance_of(c.type, c.type));
}

// Its total: the residual, with the strides of the inputs.
void check_backward(const std::string& where, const NormCase& c, const Inputs& in, const NormBackwardArgs& args) {
  const int64_t rows = c.N * c.T;
  const Buffer all = run_both(where, c.type, 2 * rows * c.C, [&](Buffer& to, Parallel parallel) {
    NormBackwardArgs a = args;
    Buffer of_weight(in.weight.type(), c.C), of_bias(in.weight.type(), c.C);
    a.grad_residual = to.data();
    char* const second = static_cast<char*>(to.data()) + rows * c.C * size_of(c.type);
    if (c.dropout > 0) a.grad_branch = second;
    a.grad_weight = of_weight.data(), a.grad_bias = of_bias.data();
    dropout_add_layer_norm_backward(a, parallel);
    if (c.dropout == 0) std::memcpy(second, to.data(), static_cast<size_t>(rows * c.C * size_of(c.type)));
  });
  Buffer dense(c.type, rows * c.C);
  for (int64_t i = 0; i < rows * c.C; ++i) dense.set(i, at(c, in, in.residual, i / c.C, i % c.C));
  std::vector<double> of_residual, of_branch;
  for (int64_t row = 0; row < rows; ++row) {
    const Moments m(dense, row, c.C);
    const auto g = [&](int64_t k) { return at(c, in, in.grad, row, k) * (c.affine ? in.weight.get(k) : 1); };
    const auto x = [&](int64_t k) { return (dense.get(row * c.C + k) - m.mean) * m.scale; };
    double mean_g = 0, mean_gx = 0;
    for (int64_t k = 0; k < c.C; ++k) {
      mean_g += g(k) / static_cast<double>(c.C);
      mean_gx += g(k) * x(k) / static_cast<double>(c.C);
    }
    for (int64_t k = 0; k < c.C; ++k) {
      double d = (g(k) - mean_g - x(k) * mean_gx) * m.scale;
      if (c.straight) d += at(c, in, in.straight, row, k);
      of_residual.push_back(d);
      of_branch.push_back(d * factor_of(c, in, row, k));
    }
  }
  of_residual.insert(of_residual.end(), of_branch.begin(), of_branch.end());
  // One channel: 0 over sqrt(eps), so the rounding of one product shows.
  check_close(where, all, of_residual, (c.C == 1 ? 1000 : 20) * tolerance_of(c.type, c.type));
}

void test_case(const NormCase& c) {
  const std::string where = std::string("dropout_add_layer_norm ") + name_of(c.type) + " N " + std::to_string(c.N) +
                            " T " + std::to_string(c.T) + " C " + std::to_string(c.C);
  const DType wide = c.type == kFloat64 ? kFloat64 : kFloat32;
  const int64_t stride = c.C + 3, size = c.N > 0 ? (c.N * (c.T + 1) - 2) * stride + c.C : 0, rows = c.N * c.T;
  Inputs in{Buffer(c.type, size, 1),
            Buffer(c.type, size, 2),
            Buffer(c.type, size, 1),
            Buffer(c.type, size, 3),
            Buffer(wide, c.C),
            Buffer(wide, c.C),
            {},
            stride};
  for (Buffer* b : {&in.branch, &in.residual, &in.grad, &in.straight, &in.weight, &in.bias}) fill_random(*b);
  if (c.with_nan && size > 0) in.branch.set(stride + c.C / 2, NAN);
  for (int64_t n = 0; n < 2 * c.N; ++n) in.keys.push_back(static_cast<int64_t>(next_random()));
  const auto view = [&](const Buffer& b) { return Rows3{b.data(), (c.T + 1) * stride, stride}; };
  NormArgs a{};
  a.branch = view(in.branch), a.residual = view(in.residual);
  a.N = c.N, a.T = c.T, a.C = c.C, a.type = c.type, a.eps = 1e-5;
  a.weight = c.affine ? in.weight.data() : nullptr, a.bias = c.affine ? in.bias.data() : nullptr;
  a.dropout = describe_dropout(in.keys.data(), 2, c.dropout);
  Buffer normed(c.type, rows * c.C, 1);
  const Buffer total = run_both(where, c.type, rows * c.C, [&](Buffer& to, Parallel parallel) {
    a.total = to.data(), a.normed = normed.data();
    dropout_add_layer_norm(a, parallel);
  });
  check_forward(where, c, in, total, normed);
  NormBackwardArgs b{};
  b.grad_normed = view(in.grad), b.total = view(in.residual);
  if (c.straight) b.grad_total = view(in.straight);
  b.N = c.N, b.T = c.T, b.C = c.C, b.type = c.type, b.weight = a.weight, b.dropout = a.dropout, b.eps = a.eps;
  check_backward(where + " backward", c, in, b);
}

// Rows of fp32 beside a branch of 16 bits: what the kernels of one type make of the widened branch, rounded once.
void test_two_types(DType half, int64_t C, double dropout) {
  const std::string where = std::string("dropout_add_layer_norm fp32 and ") + name_of(half) + " C " + std::to_string(C);
  const int64_t N = 2, T = 67, size = N * T * C;
  Buffer branch(half, size), of_copy(half, size), wide_branch(kFloat32, size), wide_grad(kFloat32, size);
  Buffer residual(kFloat32, size), of_normed(kFloat32, size), of_total(kFloat32, size), weight(kFloat32, C);
  for (Buffer* b : {&branch, &of_copy, &residual, &of_normed, &of_total, &weight}) fill_random(*b);
  for (int64_t i = 0; i < size; ++i) {
    wide_branch.set(i, branch.get(i));
    wide_grad.set(i, static_cast<float>(of_normed.get(i)) + static_cast<float>(of_copy.get(i)));
  }
  const std::vector<int64_t> keys = {5, -6};
  const auto view = [&](const Buffer& b) { return Rows3{b.data(), T * C, C}; };
  const auto forward = [&](DType type, const Buffer& from, void* total, void* normed, void* copy) {
    NormArgs a{};
    a.branch = view(from), a.residual = view(residual);
    a.N = N, a.T = T, a.C = C, a.type = kFloat32, a.half = type, a.weight = weight.data(), a.eps = 1e-5;
    a.dropout = describe_dropout(keys.data(), 1, dropout);
    a.total = total, a.normed = normed, a.copy = copy;
    dropout_add_layer_norm(a, kThreaded);
  };
  Buffer total(kFloat32, size), normed(kFloat32, size), copy(half, size), alone(half, size), again(kFloat32, size);
  Buffer expected_total(kFloat32, size), expected(kFloat32, size);
  forward(half, branch, total.data(), normed.data(), copy.data());
  forward(half, branch, again.data(), nullptr, alone.data());
  forward(kNone, wide_branch, expected_total.data(), expected.data(), nullptr);
  const auto backward = [&](DType type, const Buffer& grad, void* of_branch, void* of_residual, void* sums) {
    NormBackwardArgs b{};
    b.grad_normed = view(grad), b.grad_total = view(of_total), b.total = view(total);
    if (type != kNone) b.grad_copy = view(of_copy);
    b.N = N, b.T = T, b.C = C, b.type = kFloat32, b.half = type, b.weight = weight.data(), b.eps = 1e-5;
    b.dropout = describe_dropout(keys.data(), 1, dropout);
    b.grad_branch = of_branch, b.grad_residual = of_residual;
    b.grad_weight = sums, b.grad_bias = static_cast<float*>(sums) + C;
    dropout_add_layer_norm_backward(b, kThreaded);
  };
  Buffer of_branch(half, size), of_residual(kFloat32, size), sums(kFloat32, 2 * C);
  Buffer wide_of_branch(kFloat32, size), wide_of_residual(kFloat32, size), wide_sums(kFloat32, 2 * C);
  backward(half, of_normed, of_branch.data(), of_residual.data(), sums.data());
  backward(kNone, wide_grad, wide_of_branch.data(), wide_of_residual.data(), wide_sums.data());
  const Buffer& unscaled = dropout == 0 ? wide_of_residual : wide_of_branch;
  bool equal = true;
  std::vector<double> residuals, branches, vectors;
  for (int64_t i = 0; i < size; ++i) {
    equal = equal && total.get(i) == expected_total.get(i) && again.get(i) == total.get(i);
    equal = equal && normed.get(i) == expected.get(i) && copy.get(i) == round_to_type(half, expected.get(i));
    equal = equal && alone.get(i) == copy.get(i);
    residuals.push_back(wide_of_residual.get(i));
    branches.push_back(unscaled.get(i));
  }
  check(equal, where, "not the bits of one type");
  // Compilers may form other fused multiply-adds.
  for (int64_t i = 0; i < 2 * C; ++i) vectors.push_back(wide_sums.get(i));
  check_close(where + " residual", of_residual, residuals, 4 * tolerance_of(kFloat32, kFloat32));
  check_close(where + " branch", of_branch, branches, tolerance_of(kFloat32, half));
  check_close(where + " weight and bias", sums, vectors, 4 * tolerance_of(kFloat32, kFloat32));
}

}  // namespace

void test::test_norm() {
  for (const DType half : {kBFloat16, kFloat16}) {
    for (const int64_t C : kWidths) test_two_types(half, C, 0.0), test_two_types(half, C, 0.3);
  }
  int turn = 0;
  for (const DType type : kTypes) {
    for (const int64_t C : kWidths) {
      test_case({type, 2, 5, C, turn % 2 ? 0.3 : 0.0, turn % 3 != 0, turn % 4 < 2, turn % 5 == 4});
      test_case({type, turn % 3, 67, C, turn % 2 ? 0.0 : 0.9, turn % 3 == 0, turn % 4 > 1, false});
      ++turn;
    }
  }
}
