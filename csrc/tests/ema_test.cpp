// update_ema in CUDA, run by the engine on buffers of the exact size, for the sanitizers. Every element must be, bit
// for bit, what one fused operation gives, whatever the path, the alignment and the order of threads.
//
// With the name of a defect: a table that has it, which a sanitizer must report.
#include <memory>
#include <string>

#include "engine/engine.h"
// The engine comes first.
#include "../core/ema.cu"

using namespace d2v;

namespace {

struct Types {
  DType average, source, copy;
};

// One tensor whose first element lies `offset` elements behind an aligned address.
class Buffer {
 public:
  Buffer(DType type, int64_t count, int offset)
      : type_(type), skip_(offset * size_of(type)), bytes_(new char[skip_ + count * size_of(type)]()) {}
  void* data() const { return bytes_.get() + skip_; }
  double get(int64_t i) const {
    if (type_ == kFloat64) return at<double>(i);
    if (type_ == kFloat32) return at<float>(i);
    return type_ == kBFloat16 ? widen(at<__nv_bfloat16>(i)) : widen(at<__half>(i));
  }
  void set(int64_t i, double v) {
    const float f = static_cast<float>(v);
    if (type_ == kFloat64) at<double>(i) = v;
    if (type_ == kFloat32) at<float>(i) = f;
    if (type_ == kBFloat16) at<__nv_bfloat16>(i) = Narrow<__nv_bfloat16>::from(f);
    if (type_ == kFloat16) at<__half>(i) = Narrow<__half>::from(f);
  }

 private:
  template <class T>
  T& at(int64_t i) const {
    return static_cast<T*>(data())[i];
  }
  DType type_;
  int64_t skip_;
  std::unique_ptr<char[]> bytes_;
};

uint64_t random_state = 1;
double random_value() { return static_cast<double>(engine::next_random(random_state) % 4001) / 1000 - 2; }

double expected_average(DType type, double before, double source, double weight) {
  if (type == kFloat64) return weight == 0 ? before : std::fma(weight, source - before, before);
  if (static_cast<float>(weight) == 0) return before;
  const float a = static_cast<float>(before);
  Buffer rounded(type, 1, 0);
  rounded.set(0, std::fma(static_cast<float>(weight), static_cast<float>(source) - a, a));
  return rounded.get(0);
}

bool is_equal(double x, double y) { return x == y || (std::isnan(x) && std::isnan(y)); }

struct Layout {
  int64_t count;
  int average_offset, source_offset, copy_offset;
};
constexpr Layout kLayouts[] = {
    {1, 0, 0, 0},    {0, 0, 0, 0},    {37, 0, 0, 0},   {1024, 0, 0, 0}, {kEmaDeviceChunk + 5, 0, 0, 0},
    {1030, 1, 1, 1}, {1030, 3, 3, 3}, {61, 7, 7, 7},   {1030, 1, 0, 0}, {1030, 0, 1, 0},
    {1030, 0, 0, 1}, {1030, 2, 2, 2}, {1030, 1, 5, 9}, {2, 1, 1, 1},    {kEmaDeviceChunk, 1, 1, 1},
};

class Case {
 public:
  Case(Types types, double weight, bool with_nan) : types_(types), weight_(weight) {
    for (const Layout& l : kLayouts) {
      const DType copy_type = types.copy == kNone ? kFloat32 : types.copy;
      averages_.emplace_back(types.average, l.count, l.average_offset);
      sources_.emplace_back(types.source, l.count, l.source_offset);
      copies_.emplace_back(copy_type, l.count, l.copy_offset);
      for (int64_t i = 0; i < l.count; ++i) {
        averages_.back().set(i, random_value());
        sources_.back().set(i, with_nan ? std::nan("") : random_value());
      }
    }
  }

  std::vector<EmaTensor> tensors() const {
    std::vector<EmaTensor> all;
    for (size_t i = 0; i < averages_.size(); ++i) {
      void* const copy = types_.copy == kNone ? nullptr : copies_[i].data();
      all.push_back({averages_[i].data(), sources_[i].data(), copy, kLayouts[i].count, types_.average, types_.source,
                     types_.copy});
    }
    return all;
  }

  // The averages are where `before` had them and a step further now.
  bool is_right_after(const Case& before) const {
    bool right = true;
    for (size_t t = 0; t < averages_.size(); ++t) {
      Buffer copy(types_.copy == kNone ? kFloat32 : types_.copy, 1, 0);
      for (int64_t i = 0; i < kLayouts[t].count; ++i) {
        const double average = averages_[t].get(i);
        const double expected =
            expected_average(types_.average, before.averages_[t].get(i), before.sources_[t].get(i), weight_);
        copy.set(0, average);
        right = right && is_equal(average, expected);
        if (types_.copy != kNone) right = right && is_equal(copies_[t].get(i), copy.get(0));
      }
    }
    return right;
  }

 private:
  Types types_;
  double weight_;
  std::vector<Buffer> averages_, sources_, copies_;
};

int step_by_table(const std::vector<EmaTensor>& tensors, double weight, const double* device_weight) {
  const int64_t count = static_cast<int64_t>(tensors.size());
  const int64_t chunks = count_ema_device_chunks(tensors.data(), count);
  std::unique_ptr<EmaChunk[]> table(new EmaChunk[chunks]);
  EmaGroup groups[kEmaGroups];
  const int used = build_ema_table(tensors.data(), count, table.get(), groups);
  return d2v_launch_ema(table.get(), groups, used, weight, device_weight, 0, nullptr);
}

bool run_case(Types types, double weight, bool with_nan, bool by_table, bool on_device) {
  const uint64_t seed = random_state;
  const Case before(types, weight, with_nan);
  random_state = seed;
  const Case now(types, weight, with_nan);
  const std::vector<EmaTensor> tensors = now.tensors();
  const std::unique_ptr<double> device_weight(on_device ? new double(weight) : nullptr);
  const double host_weight = on_device ? 0.75 : weight;
  const int error = by_table ? step_by_table(tensors, host_weight, device_weight.get())
                             : d2v_launch_ema_list(tensors.data(), static_cast<int64_t>(tensors.size()), host_weight,
                                                   device_weight.get(), 0, nullptr);
  if (error == 0 && now.is_right_after(before)) return true;
  printf("failed: types %d %d %d, weight %g, nan %d, table %d, device weight %d, order %d, error %d\n", types.average,
         types.source, types.copy, weight, with_nan, by_table, on_device, static_cast<int>(engine::options().order),
         error);
  return false;
}

std::vector<Types> all_types() {
  std::vector<Types> all;
  for (const DType copy : {kNone, kFloat32, kBFloat16, kFloat16, kFloat64}) {
    all.push_back({kFloat64, kFloat64, copy});
    for (const DType average : {kFloat32, kBFloat16, kFloat16}) {
      for (const DType source : {kFloat32, kBFloat16, kFloat16}) all.push_back({average, source, copy});
    }
  }
  return all;
}

int run_everything_right() {
  int failures = 0, runs = 0;
  const std::vector<Types> all = all_types();
  // ThreadSanitizer is slow, and the paths through memory are the same for most types.
  for (size_t i = 0; i < all.size(); i += engine::kThreadSanitizer ? 9 : 1) {
    const Types& types = all[i];
    for (const bool by_table : {false, true}) {
      engine::options().order = static_cast<uint64_t>(runs++ % 4);
      failures += !run_case(types, 0.3, false, by_table, false);
    }
  }
  for (uint64_t order = 0; order < (engine::kThreadSanitizer ? 1 : 4); ++order) {
    engine::options().order = order;
    for (const Types& types : {Types{kFloat32, kFloat32, kBFloat16}, Types{kBFloat16, kBFloat16, kNone}}) {
      for (const bool by_table : {false, true}) {
        for (const bool on_device : {false, true}) {
          for (const double weight : {0.0, 1.0, 1e-4, 1e-60}) {
            failures += !run_case(types, weight, weight < 1e-50, by_table, on_device);
          }
        }
      }
    }
  }
  return failures;
}

// More tensors than one launch's parameters hold, of two types.
int run_long_list() {
  constexpr int n = 2 * kListTensors + 7;
  std::unique_ptr<float[]> averages(new float[n]()), sources(new float[n]);
  std::unique_ptr<__half[]> copies(new __half[n]);
  std::vector<EmaTensor> tensors;
  for (int i = 0; i < n; ++i) {
    sources[i] = static_cast<float>(i);
    tensors.push_back(
        {&averages[i], &sources[i], i % 3 ? &copies[i] : nullptr, 1, kFloat32, kFloat32, i % 3 ? kFloat16 : kNone});
  }
  if (d2v_launch_ema_list(tensors.data(), n, 0.5, nullptr, 0, nullptr) != 0) return 1;
  int wrong = 0;
  for (int i = 0; i < n; ++i) {
    const float expected = 0.5f * static_cast<float>(i);
    wrong += averages[i] != expected || (i % 3 && widen(copies[i]) != widen(__float2half_rn(expected)));
  }
  if (wrong) printf("failed: long list, %d wrong\n", wrong);
  return wrong;
}

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return std::isnan(x) ? 0x7fc00000u : bits;
}

// Averages in two halves, beside fp32 ones: the same bits after every step.
template <class TS>
int run_split(DType source_type, const Layout& l, bool by_table) {
  const size_t n = static_cast<size_t>(l.count);
  const std::unique_ptr<uint16_t[]> high(new uint16_t[n + static_cast<size_t>(l.average_offset)]);
  const std::unique_ptr<int16_t[]> low(new int16_t[n + static_cast<size_t>(l.copy_offset)]);
  const std::unique_ptr<TS[]> source(new TS[n + static_cast<size_t>(l.source_offset)]);
  std::vector<float> expected(n);
  uint16_t* const h = high.get() + l.average_offset;
  int16_t* const lower = low.get() + l.copy_offset;
  TS* const s = source.get() + l.source_offset;
  for (size_t i = 0; i < n; ++i) {
    uint32_t bits = static_cast<uint32_t>(engine::next_random(random_state) << 1);
    if (i % 5 == 0) bits &= 0xffff8000u;
    std::memcpy(&expected[i], &bits, sizeof(bits));
    const Halves halves = split_halves(expected[i]);
    h[i] = halves.high, lower[i] = halves.low;
    s[i] = Narrow<TS>::from(static_cast<float>(random_value()));
  }
  const std::vector<EmaTensor> tensors = {{h, s, lower, l.count, kSplit, source_type, kSplit}};
  int wrong = 0;
  for (const double weight : {0.3, 0.0, 1e-3}) {
    wrong += by_table ? step_by_table(tensors, weight, nullptr)
                      : d2v_launch_ema_list(tensors.data(), 1, weight, nullptr, 0, nullptr);
    const float w = static_cast<float>(weight);
    for (size_t i = 0; i < n; ++i) {
      if (w != 0) expected[i] = std::fma(w, widen(s[i]) - expected[i], expected[i]);
      wrong += bits_of(join_halves(h[i], lower[i])) != bits_of(expected[i]);
    }
  }
  if (wrong)
    printf("failed: halves, source %d, %d elements, %d wrong\n", source_type, static_cast<int>(l.count), wrong);
  return wrong;
}

int run_splits() {
  int wrong = 0;
  for (const Layout& l : kLayouts) {
    engine::options().order = static_cast<uint64_t>(l.count) % 4;
    for (const bool by_table : {false, true}) {
      wrong += run_split<float>(kFloat32, l, by_table);
      if (engine::kThreadSanitizer) continue;
      wrong += run_split<__nv_bfloat16>(kBFloat16, l, by_table) + run_split<__half>(kFloat16, l, by_table);
    }
  }
  return wrong;
}

int run_refusals() {
  float x[1] = {};
  const EmaTensor wrong = {x, x, nullptr, 1, kFloat32, kFloat64, kNone};
  const int error = d2v_launch_ema_list(&wrong, 1, 0.5, nullptr, 0, nullptr);
  const bool refused = error != 0 && std::string(d2v_cuda_error_text(error)) == "invalid argument";
  const bool nothing = d2v_launch_ema(nullptr, nullptr, 0, 0.5, nullptr, 0, nullptr) == 0 &&
                       d2v_launch_ema_list(nullptr, 0, 0.5, nullptr, 0, nullptr) == 0;
  if (!refused || !nothing) puts("failed: refusals");
  return !refused + !nothing;
}

int run_defect(const std::string& name) {
  std::unique_ptr<float[]> average(new float[64]()), source(new float[64]());
  EmaTensor t = {average.get(), source.get(), nullptr, 64, kFloat32, kFloat32, kNone};
  if (name == "count-too-large") {
    t.count = 65;
    return d2v_launch_ema_list(&t, 1, 0.5, nullptr, 0, nullptr);
  }
  if (name == "tensor-listed-twice") {
    const EmaTensor twice[] = {t, t};
    return d2v_launch_ema_list(twice, 2, 0.5, nullptr, 0, nullptr);
  }
  printf("no such defect: %s\n", name.c_str());
  return 2;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) return run_defect(argv[1]);
  const int failures = run_everything_right() + run_splits() + run_long_list() + run_refusals();
  if (failures == 0) puts("all right");
  return failures != 0;
}
