// average_layers in CUDA, run by the engine on buffers of the exact size, for the sanitizers, against a plain
// computation in fp64. And the launch choice, which is a function of shapes.
//
// With the name of a defect: arguments that have it, which a sanitizer must report.
#include <cmath>
#include <memory>
#include <string>

#include "engine/engine.h"
// The engine comes first.
#include "../core/layers.cu"

using namespace d2v;

namespace {

constexpr Stream kHere = {0, nullptr};

struct Shape {
  int64_t K, B, T, C;  // K above the stages of the bulk form: places in shared memory are used again
  int offset;          // of the elements
  int multiprocessors;
  bool cut;
};
// A tile of 128 bytes and of 64, a row of a warp and of four, two passes for what is not aligned, pieces of several
// samples, a cluster whose second block has nothing that is valid.
constexpr Shape kShapes[] = {{5, 2, 37, 72, 0, 1, true},    {3, 1, 40, 40, 0, 100, false},
                             {2, 2, 9, 33, 1, 1, true},     {1, 1, 1, 8, 0, 1, false},
                             {2, 5, 100, 16, 0, 1, true},   {5, 1, 130, 24, 0, 100, true},
                             {2, 1, 2, 1032, 0, 100, false}};
// Time steps that take 512 threads, a cluster or, with fewer bytes, two passes, or 48 KiB of dynamic shared memory
// beside the static one; too long for ThreadSanitizer.
constexpr Shape kLongShapes[] = {{2, 1, 300, 64, 0, 1, true},
                                 {2, 1, 128, 16, 0, 1, false},
                                 {2, 1, 600, 16, 0, 100, false},
                                 {2, 1, 900, 16, 0, 1, false},
                                 {2, 1, 2, 3080, 0, 1, false}};

struct Device {
  size_t shared_bytes;
  int cluster_blocks;
};
constexpr Device kDevices[] = {{size_t{16} << 10, 0}, {engine::kMaxShared, 0}, {engine::kMaxShared, 8}};

template <class T>
constexpr DType kType = sizeof(T) == 8   ? kFloat64
                        : sizeof(T) == 4 ? kFloat32
                                         : kBFloat16;

// fp64 all along.
class Truth {
 public:
  Truth(const Shape& s, std::vector<double> x) : s_(s), x_(std::move(x)) {}
  // Standardises the numbers first, first + step, ...
  void normalise(int64_t first, int64_t count, int64_t step, double eps) {
    double mean = 0, variance = 0;
    for (int64_t i = 0; i < count; ++i) mean += at(first + i * step) / static_cast<double>(count);
    for (int64_t i = 0; i < count; ++i) {
      const double d = at(first + i * step) - mean;
      variance += d * d / static_cast<double>(count);
    }
    for (int64_t i = 0; i < count; ++i) {
      at(first + i * step) = (at(first + i * step) - mean) / std::sqrt(variance + eps);
    }
  }
  void normalise(Norm norm, const int64_t* lengths, double eps) {
    for (int64_t b = 0; b < s_.B; ++b) {
      const int64_t first = b * s_.T * s_.C;
      for (int64_t t = 0; norm == kNormLayer && t < lengths[b]; ++t) normalise(first + t * s_.C, s_.C, 1, eps);
      for (int64_t c = 0; norm == kNormInstance && c < s_.C; ++c) normalise(first + c, lengths[b], s_.C, eps);
    }
    for (int64_t c = 0; norm == kNormBatch && c < s_.C; ++c) normalise_batch(c, lengths, eps);
  }
  // One channel, gathered from all samples.
  void normalise_batch(int64_t c, const int64_t* lengths, double eps) {
    std::vector<double> valid;
    const auto visit = [&](auto what) {
      for (int64_t b = 0; b < s_.B; ++b) {
        for (int64_t t = 0; t < lengths[b]; ++t) what(at((b * s_.T + t) * s_.C + c));
      }
    };
    visit([&](double x) { valid.push_back(x); });
    Truth channel({1, 1, static_cast<int64_t>(valid.size()), 1, 0, 1, false}, valid);
    channel.normalise(0, static_cast<int64_t>(valid.size()), 1, eps);
    int64_t i = 0;
    visit([&](double& x) { x = channel.at(i++); });
  }
  double& at(int64_t i) { return x_[static_cast<size_t>(i)]; }

 private:
  Shape s_;
  std::vector<double> x_;
};

template <class T>
class Case {
 public:
  explicit Case(const Shape& s) : s_(s), size_(s.B * s.T * s.C) {
    uint64_t random = 7;
    for (int64_t k = 0; k < s.K; ++k) {
      // The first element lies `offset` elements behind an aligned address.
      memory_.emplace_back(new T[static_cast<size_t>(size_ + s.offset)]);
      layers_.push_back(memory_.back().get() + s.offset);
      for (int64_t i = 0; i < size_; ++i) {
        const float value = static_cast<float>(engine::next_random(random) % 1000) / 250 + static_cast<float>(i % 3);
        memory_.back()[static_cast<size_t>(i + s.offset)] = Narrow<T>::from(value);
      }
      batch_stride_.push_back(s.T * s.C);
      time_stride_.push_back(s.C);
    }
    for (int64_t b = 0; b < s.B; ++b) lengths_.push_back(s.cut && b == 0 ? s.T / 2 : s.T);
  }

  bool run(Norm norm, Norm out_norm, const Device& device) const {
    engine::options().shared_bytes = device.shared_bytes;
    engine::options().cluster_blocks = device.cluster_blocks;
    engine::options().multiprocessors = s_.multiprocessors;
    std::unique_ptr<Acc<T>[]> out(new Acc<T>[static_cast<size_t>(size_)]);
    const LayersArgs args = {layers_.data(),
                             batch_stride_.data(),
                             time_stride_.data(),
                             s_.K,
                             s_.B,
                             s_.T,
                             s_.C,
                             kType<T>,
                             norm,
                             out_norm,
                             s_.cut ? lengths_.data() : nullptr,
                             1e-5,
                             out.get(),
                             kType<Acc<T>>};
    const std::unique_ptr<uint4[]> workspace(new uint4[static_cast<size_t>(average_layers_workspace(args) / 16)]);
    if (launch_average_layers(args, workspace.get(), kHere) != 0) return false;
    return is_right(out.get(), norm, out_norm);
  }

  LayersArgs arguments(void* out) const {
    return {layers_.data(), batch_stride_.data(), time_stride_.data(), s_.K,    s_.B, s_.T, s_.C,
            kType<T>,       kNormInstance,        kNormNone,           nullptr, 1e-5, out,  kFloat32};
  }

 private:
  // Errors of a mistake are of the order of 1; those of rounding grow where a variance is close to eps.
  bool is_right(const Acc<T>* out, Norm norm, Norm out_norm) const {
    std::vector<double> zero(static_cast<size_t>(size_));
    Truth average(s_, zero);
    for (const void* layer : layers_) {
      std::vector<double> x;
      for (int64_t i = 0; i < size_; ++i) x.push_back(widen(static_cast<const T*>(layer)[i]));
      Truth one(s_, x);
      one.normalise(norm, lengths_.data(), 1e-5);
      for (int64_t i = 0; i < size_; ++i) average.at(i) += one.at(i) / static_cast<double>(s_.K);
    }
    average.normalise(out_norm, lengths_.data(), 1e-5);
    bool right = true;
    for (int64_t i = 0; i < size_; ++i) {
      const bool valid = i / s_.C % s_.T < lengths_[static_cast<size_t>(i / s_.C / s_.T)];
      right = right && std::fabs(static_cast<double>(out[i]) - (valid ? average.at(i) : 0)) < 5e-4;
    }
    return right;
  }

  Shape s_;
  int64_t size_;
  std::vector<std::unique_ptr<T[]>> memory_;
  std::vector<const void*> layers_;
  std::vector<int64_t> batch_stride_, time_stride_, lengths_;
};

template <class T>
int run_shape(const Shape& s, bool every_norm) {
  static uint64_t order = 0;
  const Case<T> input(s);
  int failures = 0;
  for (const Device& device : kDevices) {
    for (const Norm norm : {kNormInstance, kNormLayer, kNormBatch, kNormNone}) {
      if (norm == kNormNone && !every_norm) continue;
      if (norm != kNormInstance && &device != kDevices) continue;  // the device makes no difference
      for (const Norm out_norm : {kNormNone, kNormLayer, kNormInstance, kNormBatch}) {
        if (out_norm != kNormNone && !every_norm) continue;
        engine::options().order = order++ % 4;
        if (input.run(norm, out_norm, device)) continue;
        printf("failed: %d bytes an element, norms %d and %d, time %d, channels %d, %d bytes shared, clusters of %d\n",
               static_cast<int>(sizeof(T)), norm, out_norm, static_cast<int>(s.T), static_cast<int>(s.C),
               static_cast<int>(device.shared_bytes), device.cluster_blocks);
        ++failures;
      }
    }
  }
  return failures;
}

int expect(const InstancePlan& plan, const InstancePlan& wanted) {
  const bool right = plan.one_read == wanted.one_read && plan.threads == wanted.threads &&
                     plan.vectors == wanted.vectors && plan.slots == wanted.slots &&
                     plan.shared_bytes == wanted.shared_bytes;
  if (!right) printf("failed: plan of %d threads, %d vectors, %d slots\n", plan.threads, plan.vectors, plan.slots);
  return !right;
}

int run_plans() {
  const DeviceLimits h200 = {227 << 10, 132, 8}, a100 = {163 << 10, 108, 0}, small = {99 << 10, 84, 0};
  const InstancePlan two_passes = {false, 256, 0, 0, 0};
  const auto plan = [](int64_t B, int64_t T, int64_t C, DType type, const DeviceLimits& limits) {
    return plan_instance(B, T, C, type, true, limits);
  };
  int failures = expect(plan(16, 196, 768, kBFloat16, h200), {true, 256, 8, 7, 57344});
  failures += expect(plan(8, 256, 1280, kBFloat16, h200), {true, 512, 8, 4, 65536});
  failures += expect(plan(4, 512, 768, kBFloat16, h200), {true, 512, 4, 4, 65536});
  failures += expect(plan(24, 500, 768, kBFloat16, h200), {true, 512, 4, 4, 65536});
  failures += expect(plan(24, 780, 768, kFloat16, a100), {true, 512, 4, 7, 114688});
  failures += expect(plan(24, 780, 768, kFloat16, small), two_passes);
  failures += expect(plan(24, 2000, 768, kBFloat16, h200), two_passes);
  failures += expect(plan(16, 196, 768, kFloat32, small), {true, 256, 8, 7, 57344});
  failures += expect(plan(1, 196, 768, kFloat32, h200), {true, 256, 4, 4, 32768});
  failures += expect(plan(16, 196, 768, kFloat64, h200), two_passes);
  failures += expect(plan_instance(16, 196, 771, kBFloat16, false, h200), two_passes);
  const bool rows = plan_layer_rows(768, kBFloat16, true) == 1 && plan_layer_rows(3072, kFloat32, true) == 4 &&
                    plan_layer_rows(3080, kFloat32, true) == 0 && plan_layer_rows(8, kFloat64, true) == 0;
  if (!rows) puts("failed: plan of rows");
  return failures + !rows;
}

int expect_bulk(const BulkPlan& plan, const BulkPlan& wanted) {
  const bool right = plan.vectors == wanted.vectors && plan.ranks == wanted.ranks && plan.steps == wanted.steps &&
                     plan.rows == wanted.rows && plan.stages == wanted.stages &&
                     plan.shared_bytes == wanted.shared_bytes;
  if (!right) {
    printf("failed: bulk plan of %d vectors, %d ranks, %d steps, %d rows, %d stages, %d bytes\n", plan.vectors,
           plan.ranks, plan.steps, plan.rows, plan.stages, static_cast<int>(plan.shared_bytes));
  }
  return !right;
}

int run_bulk_plans() {
  const DeviceLimits h200 = {227 << 10, 132, 8}, a100 = {163 << 10, 108, 0}, alone = {99 << 10, 84, 1};
  const auto plan = [](int64_t B, int64_t T, int64_t C, DType type, const DeviceLimits& limits, int64_t K = 8) {
    return plan_bulk(B, T, C, K, type, true, limits);
  };
  // A sample in one block, lines of 128 bytes; of 64, where it is longer; in two blocks; in eight.
  int failures = expect_bulk(plan(16, 196, 768, kBFloat16, h200), {8, 1, 200, 50, 3, 76800});
  failures += expect_bulk(plan(8, 256, 1280, kBFloat16, h200), {8, 1, 256, 64, 3, 98304});
  failures += expect_bulk(plan(24, 500, 768, kBFloat16, h200), {4, 1, 512, 64, 3, 98304});
  failures += expect_bulk(plan(4, 782, 768, kBFloat16, h200), {8, 4, 200, 50, 3, 76800});
  failures += expect_bulk(plan(1, 1000, 1024, kBFloat16, h200), {8, 8, 128, 64, 3, 49152});
  failures += expect_bulk(plan(2, 4096, 768, kBFloat16, h200), {4, 8, 512, 64, 3, 98304});
  failures += expect_bulk(plan(16, 196, 768, kFloat32, h200), {8, 1, 200, 50, 3, 76800});
  // Too few samples for the multiprocessors: narrower, then spread.
  failures += expect_bulk(plan(6, 196, 768, kBFloat16, h200), {4, 1, 200, 50, 3, 38400});
  failures += expect_bulk(plan(2, 512, 768, kBFloat16, h200), {8, 8, 64, 64, 3, 24576});
  failures += expect_bulk(plan(1, 130, 24, kBFloat16, {227 << 10, 100, 8}), {8, 2, 68, 34, 3, 26112});
  // Less shared memory: two stages, one block at a time; no clusters.
  failures += expect_bulk(plan(16, 256, 768, kBFloat16, alone), {8, 1, 256, 64, 2, 65536});
  failures += expect_bulk(plan(16, 700, 768, kBFloat16, alone), {});
  // Another form runs.
  failures += expect_bulk(plan(16, 196, 768, kBFloat16, a100), {});
  failures += expect_bulk(plan(16, 4097, 768, kBFloat16, h200), {});
  failures += expect_bulk(plan(16, 196, 768, kFloat64, h200), {});
  failures += expect_bulk(plan(16, 196, 768, kBFloat16, h200, kBulkLayers + 1), {});
  failures += expect_bulk(plan_bulk(16, 196, 768, 8, kBFloat16, false, h200), {});
  return failures;
}

int run_defect(const std::string& name) {
  engine::options().shared_bytes = name == "lengths-too-long" ? engine::kMaxShared : size_t{1} << 10;
  const Case<float> input({2, 1, 20, 8, 0, 1, false});
  const std::unique_ptr<float[]> out(new float[20 * 8]);
  LayersArgs args = input.arguments(out.get());
  if (name == "lengths-too-long") {
    args.T = 21;
  } else if (name == "workspace-overlaps-output") {
    return launch_average_layers(args, out.get(), kHere);
  } else {
    printf("no such defect: %s\n", name.c_str());
    return 2;
  }
  const std::unique_ptr<uint4[]> workspace(new uint4[static_cast<size_t>(average_layers_workspace(args) / 16)]);
  return launch_average_layers(args, workspace.get(), kHere);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) return run_defect(argv[1]);
  int failures = run_plans() + run_bulk_plans();
  for (const Shape& s : kShapes) {
    if (engine::kThreadSanitizer && s.C > 1000) continue;
    failures += run_shape<__nv_bfloat16>(s, s.T < 10);
    if (engine::kThreadSanitizer) continue;
    failures += run_shape<float>(s, true) + run_shape<double>(s, s.T < 10);
  }
  if (!engine::kThreadSanitizer) {
    for (const Shape& s : kLongShapes) failures += run_shape<__nv_bfloat16>(s, false) + run_shape<float>(s, false);
  }
  if (failures == 0) puts("all right");
  return failures != 0;
}
