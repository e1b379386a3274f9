// csrc/core against plain loops in double, on buffers of the exact size: for AddressSanitizer (every tail and every
// alignment), UndefinedBehaviorSanitizer and ThreadSanitizer (threads also must change no bit). The instruction level
// is the one that D2V_KERNELS_ISA allows.
#include <tuple>
#include <utility>

#include "../core/dispatch.h"
#include "../core/ema.h"
#include "../core/layers.h"
#include "../core/masks.h"
#include "core_support.h"

using namespace d2v;
using namespace test;

namespace {

// ---- average_layers ----

struct LayersCase {
  DType type, out_type;
  Norm norm, out_norm;
  int64_t K, B, T, C;
  bool with_lengths, spread;  // spread: rows further apart than C
};

class LayersTest {
 public:
  explicit LayersTest(const LayersCase& c) : c_(c), stride_(c.C + (c.spread ? 3 : 0)) {
    for (int64_t b = 0; b < c.B; ++b) lengths_.push_back(!c.with_lengths ? c.T : b == 1 ? 0 : c.T - b);
    for (int64_t k = 0; k < c.K; ++k) {
      layers_.emplace_back(c.type, c.B * c.T * stride_ - (stride_ - c.C), k % 3);
      fill_random(layers_.back());
    }
    // A channel that is NaN in one layer of sample 0, and padding that nothing may read.
    if (c.C > 4 && c.T > 2) layers_[0].set(2 * stride_ + 4, NAN);
    for (int64_t b = 0; b < c.B; ++b) {
      for (int64_t t = lengths_[static_cast<size_t>(b)]; t < c.T; ++t) layers_[0].set((b * c.T + t) * stride_, NAN);
    }
  }

  void run(const std::string& where) const {
    const Buffer serial = average(kSerial), threaded = average(kThreaded);
    check(serial.same_bytes(threaded), where, "threads changed the result");
    check_close(where, serial, expected(), 10 * tolerance_of(c_.type, c_.out_type));
  }

 private:
  Buffer average(Parallel parallel) const {
    std::vector<const void*> data;
    for (const Buffer& layer : layers_) data.push_back(layer.data());
    const std::vector<int64_t> batch(data.size(), c_.T * stride_), time(data.size(), stride_);
    Buffer out(c_.out_type, c_.B * c_.T * c_.C, 1);
    average_layers({data.data(), batch.data(), time.data(), c_.K, c_.B, c_.T, c_.C, c_.type, c_.norm, c_.out_norm,
                    c_.with_lengths ? lengths_.data() : nullptr, 1e-5, out.data(), c_.out_type},
                   parallel);
    return out;
  }

  // Normalises x (B, T, C) over the valid positions.
  void normalise(std::vector<double>& x, Norm norm) const {
    if (norm == kNormNone) return;
    const auto group_of = [&](int64_t b, int64_t t, int64_t c) {
      return norm == kNormLayer ? b * c_.T + t : norm == kNormInstance ? b * c_.C + c : c;
    };
    const size_t groups = static_cast<size_t>(c_.B * (c_.T + c_.C));
    std::vector<double> count(groups), mean(groups), m2(groups);
    const auto each = [&](auto body) {
      for (int64_t b = 0; b < c_.B; ++b) {
        for (int64_t t = 0; t < lengths_[static_cast<size_t>(b)]; ++t) {
          for (int64_t c = 0; c < c_.C; ++c) {
            body(static_cast<size_t>(group_of(b, t, c)), x[static_cast<size_t>((b * c_.T + t) * c_.C + c)]);
          }
        }
      }
    };
    each([&](size_t g, double& v) { count[g] += 1, mean[g] += v; });
    for (size_t g = 0; g < groups; ++g) mean[g] /= count[g];
    each([&](size_t g, double& v) { m2[g] += (v - mean[g]) * (v - mean[g]); });
    each([&](size_t g, double& v) { v = (v - mean[g]) / std::sqrt(m2[g] / count[g] + 1e-5); });
  }

  std::vector<double> expected() const {
    std::vector<double> total(static_cast<size_t>(c_.B * c_.T * c_.C));
    for (const Buffer& layer : layers_) {
      std::vector<double> x(total.size());
      for (int64_t i = 0; i < c_.B * c_.T * c_.C; ++i) {
        const int64_t row = i / c_.C;
        const bool valid = row % c_.T < lengths_[static_cast<size_t>(row / c_.T)];
        x[static_cast<size_t>(i)] = valid ? layer.get(row * stride_ + i % c_.C) : 0;
      }
      normalise(x, c_.norm);
      for (size_t i = 0; i < x.size(); ++i) total[i] += x[i] / static_cast<double>(c_.K);
    }
    normalise(total, c_.out_norm);
    return total;
  }

  LayersCase c_;
  int64_t stride_;
  std::vector<int64_t> lengths_;
  std::vector<Buffer> layers_;
};

void test_layers() {
  constexpr Norm kNorms[] = {kNormNone, kNormLayer, kNormInstance, kNormBatch};
  int turn = 0;
  for (const Norm norm : kNorms) {
    for (const Norm out_norm : kNorms) {
      for (const DType type : kTypes) {
        const int64_t C = kWidths[turn % 4];
        // Over one channel, or few rows, a layer norm divides by the rounding of its mean.
        const bool one = C == 1 && (norm == kNormLayer || out_norm == kNormLayer);
        const LayersCase c{type,          kTypes[(turn / 2) % 4], norm,      out_norm,
                           1 + turn % 3,  1 + turn % 4,           21 + turn, one ? 2 : C,
                           turn % 2 == 1, turn % 3 == 2};
        LayersTest(c).run("average_layers " + std::string(name_of(type)) + " norms " + std::to_string(norm) + ", " +
                          std::to_string(out_norm) + " C " + std::to_string(c.C) + " case " + std::to_string(turn));
        ++turn;
      }
    }
  }
  for (const Norm norm : kNorms) {  // one row, no rows, and enough for output past the caches
    LayersTest({kFloat32, kFloat32, norm, kNormNone, 2, 1, 1, 33, false, false}).run("average_layers one row");
    LayersTest({kBFloat16, kFloat32, norm, kNormNone, 2, 1, 0, 33, false, false}).run("average_layers no row");
    LayersTest({kBFloat16, kBFloat16, norm, kNormNone, 1, 2, 401, 771, true, false}).run("average_layers large bf16");
    LayersTest({kFloat32, kFloat32, norm, kNormNone, 1, 2, 201, 771, false, true}).run("average_layers large fp32");
  }
}

// ---- update_ema ----

struct EmaCase {
  DType average, source, copy;
  double weight;
  bool with_nan;
};

void test_ema_case(const EmaCase& c) {
  const std::string where = std::string("update_ema ") + name_of(c.average) + ", " + name_of(c.source) + ", " +
                            name_of(c.copy) + " w " + std::to_string(c.weight);
  constexpr int64_t kCounts[] = {1, 0, 7, 63, 64, 65, 129, kEmaChunk, kEmaChunk + 1, 66100};
  std::vector<Buffer> averages, sources, copies;
  int64_t skip = 0;
  for (const int64_t n : kCounts) {
    averages.emplace_back(c.average, n, skip % 3);
    sources.emplace_back(c.source, n, skip % 5);
    copies.emplace_back(c.copy == kNone ? kFloat32 : c.copy, n, n < 100 ? skip % 2 : 0);
    fill_random(averages.back());
    fill_random(sources.back());
    if (c.with_nan && n > 0) sources.back().set(n / 2, NAN);
    ++skip;
  }
  const auto update = [&](std::vector<Buffer>& out, std::vector<Buffer>& low, Parallel parallel) {
    std::vector<EmaTensor> tensors;
    for (size_t i = 0; i < out.size(); ++i) {
      tensors.push_back({out[i].data(), sources[i].data(), c.copy == kNone ? nullptr : low[i].data(), out[i].count(),
                         c.average, c.source, c.copy});
    }
    std::vector<int64_t> first(tensors.size() + 1);
    index_ema_chunks(tensors.data(), static_cast<int64_t>(tensors.size()), first.data());
    update_ema(tensors.data(), static_cast<int64_t>(tensors.size()), first.data(), c.weight, parallel);
  };
  std::vector<Buffer> serial = averages, threaded = averages, serial_low = copies, threaded_low = copies;
  update(serial, serial_low, kSerial);
  update(threaded, threaded_low, kThreaded);
  for (size_t i = 0; i < averages.size(); ++i) {
    check(serial[i].same_bytes(threaded[i]) && serial_low[i].same_bytes(threaded_low[i]), where, "threads changed it");
    std::vector<double> expected, low;
    for (int64_t j = 0; j < averages[i].count(); ++j) {
      const double a = averages[i].get(j);
      expected.push_back(c.weight == 0 ? a : a + c.weight * (sources[i].get(j) - a));
      low.push_back(round_to_type(c.copy, serial[i].get(j)));  // the copy is the average as stored
    }
    check_close(where, serial[i], expected, tolerance_of(c.average, c.average));
    if (c.copy != kNone) check_close(where + " copy", serial_low[i], low, 0);
  }
}

// Halves beside an fp32 average: the same bits, whatever the number of elements.
void test_split_ema(DType source_type) {
  for (const int64_t n : {int64_t{1}, int64_t{15}, int64_t{16}, int64_t{63}, int64_t{64}, int64_t{1029}}) {
    Buffer source(source_type, n), whole(kFloat32, n), high(kBFloat16, n), low(kBFloat16, n);
    fill_random(source);
    fill_random(whole);
    const auto halves = [&](int64_t i) {
      uint32_t bits;
      std::memcpy(&bits, static_cast<char*>(whole.data()) + i * 4, sizeof(bits));
      const uint32_t upper = (bits + 0x8000u) >> 16;
      return std::pair<uint16_t, uint16_t>(static_cast<uint16_t>(upper), static_cast<uint16_t>(bits - (upper << 16)));
    };
    auto* const h = static_cast<uint16_t*>(high.data());
    auto* const l = static_cast<uint16_t*>(low.data());
    for (int64_t i = 0; i < n; ++i) std::tie(h[i], l[i]) = halves(i);
    const EmaTensor tensors[] = {{whole.data(), source.data(), nullptr, n, kFloat32, source_type, kNone},
                                 {h, source.data(), l, n, kSplit, source_type, kSplit}};
    int64_t first[3];
    index_ema_chunks(tensors, 2, first);
    update_ema(tensors, 2, first, 0.3, kThreaded);
    bool same = true;
    for (int64_t i = 0; i < n; ++i) same = same && halves(i) == std::pair<uint16_t, uint16_t>(h[i], l[i]);
    check(same, std::string("update_ema in halves, ") + name_of(source_type), "not the bits of fp32");
  }
}

void test_ema() {
  for (const DType source : {kFloat32, kBFloat16, kFloat16}) test_split_ema(source);
  for (const DType average : kTypes) {
    for (const DType source : kTypes) {
      if ((average == kFloat64) != (source == kFloat64)) continue;
      for (const DType copy : {kNone, kFloat32, kBFloat16, kFloat16, kFloat64}) {
        test_ema_case({average, source, copy, 0.001, true});
      }
      test_ema_case({average, source, kBFloat16, 0, true});
      test_ema_case({average, source, kFloat16, 1, false});
    }
  }
}

// ---- masks ----

void test_masks() {
  constexpr MaskKind kKinds[] = {kMaskSpan, kMaskRectangles, kMaskTokenSpan, kMaskBlock, kMaskRandom};
  for (const MaskKind kind : kKinds) {
    for (const int64_t width : {1, 7, 50}) {
      const std::string where = "masks kind " + std::to_string(kind) + " width " + std::to_string(width);
      const bool grid = kind == kMaskRectangles;
      const MaskRule rule{kind, grid ? width : 0, width, 0.6, 3, 0.05, width == 7, true, 5};
      const int64_t tokens = rule.tokens(), samples = 3, copies = 2, rows = samples * copies;
      const int64_t ids[] = {4, -1, 9}, lengths[] = {tokens, tokens / 2, 0};
      for (const int64_t* valid : {static_cast<const int64_t*>(nullptr), grid ? nullptr : lengths}) {
        std::vector<uint8_t> mask(static_cast<size_t>(rows * tokens));
        std::vector<int64_t> counts(static_cast<size_t>(rows));
        draw_masks(rule, ids, samples, 2, copies, valid, mask.data(), counts.data());
        std::vector<int64_t> numbers, expected;
        bool equal = true;
        for (int64_t r = 0; r < rows; ++r) {
          int64_t count = 0;
          for (int64_t t = 0; t < tokens; ++t) {
            if (!mask[static_cast<size_t>(r * tokens + t)]) continue;
            check(t < (valid ? valid[r / copies] : tokens), where, "masked past the length");
            expected.push_back(r * tokens + t);
            ++count;
          }
          check(count == counts[static_cast<size_t>(r)], where, "wrong count");
          equal = equal && count == counts[0];
        }
        const int64_t visible = equal ? tokens - counts[0] : -1;
        std::vector<int32_t> keep(static_cast<size_t>(equal ? rows * visible : 0)),
            restore(static_cast<size_t>(equal ? rows * tokens : 0));
        numbers.resize(expected.size());
        list_masks(mask.data(), rows, tokens, visible, equal ? keep.data() : nullptr, equal ? restore.data() : nullptr,
                   numbers.data());
        check(numbers == expected, where, "wrong row numbers");
        for (size_t i = 0; i < keep.size(); ++i) {
          const int64_t r = static_cast<int64_t>(i) / visible;
          const int32_t place = restore[static_cast<size_t>(r * tokens + keep[i])];
          check(place == static_cast<int32_t>(i) % visible, where, "restore is not the inverse of keep");
        }
      }
    }
  }
}

}  // namespace

int main() {
  test_layers();
  test_ema();
  test_tokens();
  test_loss();
  test_attention();
  test_convolution();
  test_gelu();
  test_norm();
  test_masks();
  if (failures() > 0) {
    std::printf("%d failures\n", failures());
    return 1;
  }
  std::printf("%s: all right\n", cpu_isa());
  return 0;
}
