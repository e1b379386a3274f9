// The token operators in CUDA, run by the engine on buffers of the exact size, for the sanitizers. Elements are small
// whole numbers, so that every sum is exact.
//
// With the name of a defect: arguments that have it, which a sanitizer must report.
#include <memory>
#include <string>

#include "engine/engine.h"
// The engine comes first.
#include "../core/tokens.cu"

using namespace d2v;

namespace {

constexpr Stream kHere = {0, nullptr};

// `count` elements, the first one `offset` elements behind an aligned address.
template <class T>
struct Buffer {
  Buffer(int64_t count, int offset) : bytes(new T[static_cast<size_t>(count + offset)]()), data(bytes.get() + offset) {}
  std::unique_ptr<T[]> bytes;
  T* data;
};

template <class T>
T value(int64_t i) {
  return Narrow<T>::from(static_cast<Acc<T>>(i * 7 % 11 - 5));
}

template <class T>
constexpr DType kType = sizeof(T) == 8   ? kFloat64
                        : sizeof(T) == 4 ? kFloat32
                                         : kBFloat16;

struct Shape {
  int64_t samples, clones, tokens, columns, C;
  int offset;  // of the elements
  bool repeated;
};
constexpr Shape kShapes[] = {{2, 2, 9, 5, 64, 0, false},  {1, 3, 5, 40, 33, 1, true}, {2, 1, 7, 7, 600, 0, false},
                             {1, 34, 3, 2, 16, 0, true},  {1, 1, 4, 0, 8, 0, false},  {0, 2, 4, 3, 8, 0, false},
                             {1, 2, 100, 80, 2, 1, true}, {3, 1, 6, 6, 1, 0, false}};

template <class T, class I>
class Case {
 public:
  explicit Case(const Shape& s)
      : s_(s), rows_(s.samples * s.clones), index_(rows_ * s.columns, 0), x_(s.samples * s.tokens * s.C, s.offset) {
    for (int64_t i = 0; i < rows_ * s.columns; ++i) {
      const int64_t row = i / s.columns, n = i % s.columns;
      index_.data[i] = static_cast<I>(s.repeated ? n * n % s.tokens : (n + row) % s.tokens);
    }
    for (int64_t i = 0; i < s.samples * s.tokens * s.C; ++i) x_.data[i] = value<T>(i);
  }

  bool gather() const {
    Buffer<T> out(rows_ * s_.columns * s_.C, s_.offset);
    const GatherArgs args = {
        rows_of(x_.data, s_.tokens), index(), rows_, s_.columns, s_.clones, s_.C, kType<T>, out.data};
    bool right = launch_gather_tokens(args, s_.tokens, kHere) == 0;
    for (int64_t i = 0; i < rows_ * s_.columns; ++i) {
      const T* from = x_.data + (i / s_.columns / s_.clones * s_.tokens + index_.data[i]) * s_.C;
      for (int64_t c = 0; c < s_.C; ++c) right = right && widen(out.data[i * s_.C + c]) == widen(from[c]);
    }
    return right;
  }

  bool gather_backward() const {
    const int64_t outputs = s_.samples * s_.tokens * s_.C;
    Buffer<T> grad(rows_ * s_.columns * s_.C, s_.offset), out(outputs, s_.offset);
    Buffer<double> wanted(outputs, 0);
    for (int64_t i = 0; i < rows_ * s_.columns * s_.C; ++i) grad.data[i] = value<T>(i);
    for (int64_t i = 0; i < rows_ * s_.columns; ++i) {
      const int64_t to = i / s_.columns / s_.clones * s_.tokens + index_.data[i];
      for (int64_t c = 0; c < s_.C; ++c) wanted.data[to * s_.C + c] += widen(grad.data[i * s_.C + c]);
    }
    const GatherBackwardArgs args = {
        rows_of(grad.data, s_.columns), index(), rows_, s_.columns, s_.clones, s_.tokens, s_.C, kType<T>, out.data};
    Buffer<uint4> workspace(gather_backward_workspace(args) / 16, 0);
    bool right = launch_gather_tokens_backward(args, workspace.data, kHere) == 0;
    for (int64_t i = 0; i < outputs; ++i) right = right && widen(out.data[i]) == wanted.data[i];
    return right;
  }

  // A third of the tokens are kept, the others come from the fill.
  bool restore(FillKind kind) const {
    const int64_t visible = s_.tokens / 3, hidden = s_.tokens - visible, total = s_.samples * s_.columns * s_.C;
    const Buffer<T> fill(s_.samples * hidden * s_.C + s_.C, s_.offset);
    const Buffer<int64_t> keys(s_.samples, 0);
    Buffer<T> out(total, s_.offset);
    const Rows3 rows = kind == kFillRows ? rows_of(fill.data, hidden) : Rows3{fill.data, 0, 0};
    const RestoreArgs args = {rows_of(x_.data, visible),
                              index(),
                              s_.samples,
                              visible,
                              s_.columns,
                              s_.C,
                              kType<T>,
                              kind,
                              rows,
                              keys.data,
                              1,
                              0.0f,
                              out.data};
    bool right = launch_restore_tokens(args, hidden, kHere) == 0;
    for (int64_t i = 0; i < total; ++i) {
      const int64_t row = i / s_.C, at = index_.data[row];
      const int64_t from = (row / s_.columns * visible + at) * s_.C + i % s_.C;
      right = right && widen(out.data[i]) == (at < visible ? widen(x_.data[from]) : 0);
    }
    return right;
  }

  bool restore_backward(int64_t fill_rows) const {
    const int64_t hidden = s_.tokens - 1, kept_count = s_.samples * s_.C;
    Buffer<T> grad(s_.samples * s_.columns * s_.C, s_.offset), kept(kept_count, s_.offset);
    Buffer<T> fill(fill_rows == -1 ? s_.C : s_.samples * hidden * s_.C, s_.offset);
    for (int64_t i = 0; i < s_.samples * s_.columns * s_.C; ++i) grad.data[i] = value<T>(i);
    const RestoreBackwardArgs args = {
        rows_of(grad.data, s_.columns),     index(),  s_.samples, 1,        s_.columns, s_.C,
        fill_rows > 0 ? hidden : fill_rows, kType<T>, kept.data,  fill.data};
    Buffer<uint4> workspace((restore_backward_workspace(args) + 15) / 16, 0);
    bool right = launch_restore_tokens_backward(args, workspace.data, kHere) == 0;
    double difference = 0;  // what goes in comes out, once
    for (int64_t i = 0; i < s_.samples * s_.columns * s_.C; ++i) {
      const bool counts = fill_rows != -2 || index_.data[i / s_.C] == 0;
      difference += counts ? widen(grad.data[i]) : 0;
    }
    for (int64_t i = 0; i < kept_count; ++i) difference -= widen(kept.data[i]);
    for (int64_t i = 0; fill_rows != -2 && i < (fill_rows == -1 ? s_.C : s_.samples * hidden * s_.C); ++i) {
      difference -= widen(fill.data[i]);
    }
    return right && difference == 0;
  }

  bool run() const {
    bool right = gather() && gather_backward();
    if (s_.clones > 1) return right;
    for (const FillKind kind : {kFillVector, kFillRows, kFillNoise}) right = restore(kind) && right;
    for (const int64_t fill_rows : {1, -1, -2}) right = restore_backward(fill_rows) && right;
    return right;
  }

 private:
  Indices index() const { return {index_.data, sizeof(I) == 8, s_.columns, 1}; }
  Rows3 rows_of(const T* data, int64_t rows) const { return {data, rows * s_.C, s_.C}; }

  Shape s_;
  int64_t rows_;
  Buffer<I> index_;
  Buffer<T> x_;
};

template <class T, class I>
int run_shapes() {
  int failures = 0;
  uint64_t order = 0;
  for (const Shape& s : kShapes) {
    engine::options().order = order++ % 4;
    if (Case<T, I>(s).run()) continue;
    printf("failed: %d bytes an element, %d an index, tokens %d, channels %d\n", static_cast<int>(sizeof(T)),
           static_cast<int>(sizeof(I)), static_cast<int>(s.tokens), static_cast<int>(s.C));
    ++failures;
  }
  return failures;
}

int expect_plan(const RowPlan& plan, const RowPlan& wanted) {
  const bool right = plan.width == wanted.width && plan.vectors == wanted.vectors && plan.lanes == wanted.lanes &&
                     plan.blocks == wanted.blocks;
  if (!right) printf("failed: plan %d %d\n", plan.width, plan.lanes);
  return !right;
}

int run_plans() {
  int failures = expect_plan(plan_rows(1000, 1536, 4096, 4), {16, 96, 32, 32});
  failures += expect_plan(plan_rows(1, 1536, 4096 + 8, 4), {8, 192, 32, 1});
  failures += expect_plan(plan_rows(129, 1542, 4096, 1), {2, 771, 32, 17});
  failures += expect_plan(plan_rows(1025, 4, 4, 4), {4, 1, 1, 2});
  failures += expect_plan(plan_rows(5, 80, 16, 4), {16, 5, 8, 1});
  const SumPlan none = plan_sum(0), few = plan_sum(65), many = plan_sum(1 << 20);
  if (none.chunks != 0 || few.chunks != 2 || few.rows != 64 || many.chunks != 256 || many.rows != 4096) {
    puts("failed: plan of a sum");
    ++failures;
  }
  return failures;
}

int run_defect(const std::string& name) {
  std::unique_ptr<float[]> grad(new float[4 * 8]()), kept(new float[2 * 8]), fill(new float[2 * 8]);
  std::unique_ptr<int32_t[]> index(new int32_t[4]{0, 1, 2, 3});
  std::unique_ptr<uint4[]> workspace(new uint4[1]);
  RestoreBackwardArgs a = {{grad.get(), 32, 8}, {index.get(), false, 4, 1}, 1, 2, 4, 8, 2, kFloat32, kept.get(),
                           fill.get()};
  if (name == "index-too-short") {
    a.T = 5;
  } else if (name == "rows-too-short") {
    a.C = 12;
    a.grad.stride1 = 8;
  } else if (name == "outputs-overlap") {
    a.fill = a.kept;
  } else if (name == "index-out-of-range") {
    index[3] = 4;
    try {
      launch_restore_tokens_backward(a, workspace.get(), kHere);
    } catch (const std::runtime_error& error) {
      printf("engine: %s\n", error.what());
    }
    return 0;
  } else {
    printf("no such defect: %s\n", name.c_str());
    return 2;
  }
  return launch_restore_tokens_backward(a, workspace.get(), kHere);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) return run_defect(argv[1]);
  int failures = run_plans() + run_shapes<float, int32_t>();
  if (!engine::kThreadSanitizer) {
    failures +=
        run_shapes<__nv_bfloat16, int64_t>() + run_shapes<double, int64_t>() + run_shapes<__nv_bfloat16, int32_t>();
  }
  if (failures == 0) puts("all right");
  return failures != 0;
}
