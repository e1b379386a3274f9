// Mask sampling. Compiled without contraction of floating-point expressions: the Python rules round every step.
#include "masks.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace d2v {
namespace {

constexpr uint64_t kStep = 0x9E3779B97F4A7C15ull;
constexpr int kAttempts = 10;  // placements tried for one rectangle
constexpr double kMinAspect = 0.3;

uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

// splitmix64 (Steele, Lea, Flood 2014), started from the numbers that name a row.
class Stream {
 public:
  Stream() = default;
  Stream(uint64_t seed, uint64_t epoch, uint64_t sample_id, uint64_t copy) {
    for (const uint64_t word : {seed, epoch, sample_id, copy}) state_ = mix((state_ ^ word) + kStep);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(((next() >> 32) * static_cast<uint64_t>(n)) >> 32); }
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
  // Moves `count` distinct items, uniformly chosen, to the front.
  void choose(int32_t* items, int64_t size, int64_t count) {
    for (int64_t i = 0; i < count; ++i) std::swap(items[i], items[i + below(size - i)]);
  }

 private:
  uint64_t next() { return mix(state_ += kStep); }
  uint64_t state_ = 0;
};

constexpr uint64_t kOnes = 0x0101010101010101ull;  // eight masked tokens
constexpr int64_t kWord = sizeof(uint64_t);

uint64_t load_word(const uint8_t* mask) {
  uint64_t word;
  std::memcpy(&word, mask, sizeof word);
  return word;
}

// Number of ones among `length` bytes that are 0 or 1: eight at a time, summed by the top byte of a product.
int64_t count_ones(const uint8_t* mask, int64_t length) {
  int64_t n = 0, t = 0;
  for (; t + kWord <= length; t += kWord) n += static_cast<int64_t>((load_word(mask + t) * kOnes) >> 56);
  for (; t < length; ++t) n += mask[t];
  return n;
}

// One row at a time; `list` is scratch for as many positions.
class Row {
 public:
  Row(const MaskRule& rule, Stream& stream, uint8_t* mask, int64_t length, int32_t* list)
      : rule_(rule), stream_(stream), mask_(mask), length_(length), list_(list) {}

  void draw() {
    switch (rule_.kind) {
      case kMaskSpan:
        return span();
      case kMaskRectangles:
        return rectangles();
      case kMaskTokenSpan:
        return token_span();
      case kMaskBlock:
        return block();
      case kMaskRandom:
        return random();
    }
  }

  int64_t count() const { return count_ones(mask_, length_); }

  // Clears masked positions, uniformly chosen, until `target` are left.
  void cut_to(int64_t target) {
    const int64_t n = positions(1);
    stream_.choose(list_, n, target);
    for (int64_t i = target; i < n; ++i) mask_[list_[i]] = 0;
  }

 private:
  int64_t positions(uint8_t value) {
    int64_t n = 0;
    for (int64_t t = 0; t < length_; ++t) {
      list_[n] = static_cast<int32_t>(t);
      n += mask_[t] == value;
    }
    return n;
  }

  void mark_spans(int64_t starts, int64_t count) {
    for (int64_t t = 0; t < starts; ++t) list_[t] = static_cast<int32_t>(t);
    stream_.choose(list_, starts, count);
    for (int64_t i = 0; i < count; ++i) mark(list_[i], std::min(rule_.span, length_ - list_[i]));
  }

  // Masks `n` positions from `start`. Published spans have 10 and 4: two stores instead of a call.
  void mark(int64_t start, int64_t n) {
    uint8_t* first = mask_ + start;
    if (n >= kWord && n <= 2 * kWord) {
      std::memcpy(first, &kOnes, sizeof kOnes);
      std::memcpy(first + n - kWord, &kOnes, sizeof kOnes);
    } else {
      std::memset(first, 1, static_cast<size_t>(n));
    }
  }

  void span() {
    const double expected = rule_.ratio * static_cast<double>(length_) / static_cast<double>(rule_.span);
    const int64_t n = std::max(static_cast<int64_t>(expected + stream_.uniform()), int64_t{1});
    const int64_t reserve = length_ - rule_.span > n ? rule_.span : length_ - n - 1;
    const int64_t starts = std::max(length_ - std::max(reserve, int64_t{0}), int64_t{0});
    mark_spans(starts, std::min(n, starts));
  }

  void token_span() {
    const double expected = rule_.ratio * static_cast<double>(length_) / static_cast<double>(rule_.span);
    mark_spans(length_, std::min(static_cast<int64_t>(expected + stream_.uniform()), length_));
  }

  void random() {
    const int64_t visible = static_cast<int64_t>(static_cast<double>(length_) * (1.0 - rule_.ratio));
    const int64_t n = length_ - visible;
    for (int64_t t = 0; t < length_; ++t) list_[t] = static_cast<int32_t>(t);
    stream_.choose(list_, length_, n);
    for (int64_t i = 0; i < n; ++i) mask_[list_[i]] = 1;
  }

  void mark_block(int64_t centre) {
    const int64_t height = rule_.height > 0 ? rule_.height : 1, width = rule_.height > 0 ? rule_.width : length_;
    const int64_t row = centre / width, column = centre % width, before = rule_.span / 2, after = rule_.span - before;
    // Clamping coordinates into the range covers the same cells as cutting the block at the border.
    const int64_t c0 = std::max(column - before, int64_t{0}), c1 = std::min(column + after, width);
    const bool grid = rule_.height > 0;
    const int64_t r0 = grid ? std::max(row - before, int64_t{0}) : 0, r1 = grid ? std::min(row + after, height) : 1;
    for (int64_t r = r0; r < r1; ++r) std::memset(mask_ + r * width + c0, 1, static_cast<size_t>(c1 - c0));
  }

  void block() {
    const double p = rule_.inverse ? 1.0 - rule_.ratio : rule_.ratio, length = static_cast<double>(length_);
    const int64_t target = static_cast<int64_t>(length * p);
    const double area = static_cast<double>(rule_.height > 0 ? rule_.span * rule_.span : rule_.span);
    const int64_t centres = static_cast<int64_t>(length * (p + rule_.adjust) / area);
    for (int64_t i = 0; i < centres; ++i) mark_block(stream_.below(length_));
    const int64_t excess = count() - target;
    const int64_t n = positions(excess > 0 ? 1 : 0), changes = excess > 0 ? excess : -excess;
    stream_.choose(list_, n, changes);
    for (int64_t i = 0; i < changes; ++i) mask_[list_[i]] = excess < 0;
    if (!rule_.inverse) return;
    for (int64_t t = 0; t < length_; ++t) mask_[t] ^= 1;
  }

  void rectangles() {
    const int64_t target = static_cast<int64_t>(rule_.ratio * static_cast<double>(length_) + 0.5);
    for (int64_t masked = 0; masked < target;) {
      const int64_t placed = place_rectangle(target - masked);
      if (!placed) return;
      masked += placed;
    }
  }

  // Returns the number of newly masked cells, 1 .. cap, or 0 if no attempt fitted.
  int64_t place_rectangle(int64_t cap) {
    const double smallest = static_cast<double>(rule_.span * rule_.span);
    const double low = std::log(kMinAspect), high = std::log(1.0 / kMinAspect);
    for (int attempt = 0; attempt < kAttempts; ++attempt) {
      const double area = smallest + stream_.uniform() * (static_cast<double>(cap) - smallest);
      const double aspect = std::exp(low + stream_.uniform() * (high - low));
      const int64_t h = std::llrint(std::sqrt(area * aspect)), w = std::llrint(std::sqrt(area / aspect));
      if (h < 1 || h >= rule_.height || w < 1 || w >= rule_.width) continue;
      const int64_t top = stream_.below(rule_.height - h + 1), left = stream_.below(rule_.width - w + 1);
      int64_t placed = h * w;
      for (int64_t r = top; r < top + h; ++r) {
        for (int64_t c = left; c < left + w; ++c) placed -= mask_[r * rule_.width + c];
      }
      if (placed <= 0 || placed > cap) continue;
      for (int64_t r = top; r < top + h; ++r) std::memset(mask_ + r * rule_.width + left, 1, static_cast<size_t>(w));
      return placed;
    }
    return 0;
  }

  const MaskRule& rule_;
  Stream& stream_;
  uint8_t* mask_;
  int64_t length_;
  int32_t* list_;
};

}  // namespace

void draw_masks(const MaskRule& rule, const int64_t* sample_ids, int64_t samples, uint64_t epoch, int64_t copies,
                const int64_t* lengths, uint8_t* mask, int64_t* counts) {
  const int64_t tokens = rule.tokens(), rows = samples * copies;
  std::vector<int32_t> list(static_cast<size_t>(tokens + 1));
  std::vector<Stream> streams(static_cast<size_t>(rows));
  std::memset(mask, 0, static_cast<size_t>(rows * tokens));
  const auto row = [&](int64_t r) {
    const int64_t length = lengths ? lengths[r / copies] : tokens;
    return Row(rule, streams[static_cast<size_t>(r)], mask + r * tokens, length, list.data());
  };
  for (int64_t r = 0; r < rows; ++r) {
    streams[static_cast<size_t>(r)] =
        Stream(rule.seed, epoch, static_cast<uint64_t>(sample_ids[r / copies]), static_cast<uint64_t>(r % copies));
    if (lengths && lengths[r / copies] == 0) {
      counts[r] = 0;
      continue;
    }
    row(r).draw();
    counts[r] = row(r).count();
  }
  if (!rule.equal_counts || rows == 0) return;
  const int64_t target = *std::min_element(counts, counts + rows);
  for (int64_t r = 0; r < rows; ++r) {
    if (counts[r] > target) row(r).cut_to(target);
    counts[r] = target;
  }
}

namespace {

// Writes first, first + 1, ... for the ones among `tokens` bytes; returns the end of what was written.
int64_t* list_ones(const uint8_t* mask, int64_t tokens, int64_t first, int64_t* out) {
  int64_t t = 0;
  for (; t + kWord <= tokens; t += kWord) {
    const uint64_t word = load_word(mask + t);
    if (word == 0) continue;  // spans make long runs of both kinds
    if (word == kOnes) {
      for (int64_t i = 0; i < kWord; ++i) out[i] = first + t + i;
      out += kWord;
      continue;
    }
    for (int64_t i = t; i < t + kWord; ++i) {
      if (mask[i]) *out++ = first + i;
    }
  }
  for (; t < tokens; ++t) {
    if (mask[t]) *out++ = first + t;
  }
  return out;
}

}  // namespace

void list_masks(const uint8_t* mask, int64_t rows, int64_t tokens, int64_t visible, int32_t* keep, int32_t* restore,
                int64_t* numbers) {
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t* m = mask + r * tokens;
    numbers = list_ones(m, tokens, r * tokens, numbers);
    if (!restore) continue;
    int32_t seen = 0, masked = static_cast<int32_t>(visible);
    for (int64_t t = 0; t < tokens; ++t) {
      if (m[t]) {
        restore[r * tokens + t] = masked++;
      } else {
        keep[r * visible + seen] = static_cast<int32_t>(t);
        restore[r * tokens + t] = seen++;
      }
    }
  }
}

}  // namespace d2v
