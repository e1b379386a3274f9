// Host side of the CUDA update_ema: tensors cut into chunks and sorted by type. Header only, because the module that
// builds a table and the library that launches it are different ones.
#pragma once
#include <algorithm>
#include <vector>

#include "ema.h"

namespace d2v {

// Tensors with elements, those of one (average, source) type side by side, else in the given order.
inline std::vector<const EmaTensor*> sort_ema_tensors(const EmaTensor* tensors, int64_t count) {
  std::vector<const EmaTensor*> order;
  order.reserve(count);
  for (int64_t i = 0; i < count; ++i) {
    if (tensors[i].count > 0) order.push_back(&tensors[i]);
  }
  const auto place = [](const EmaTensor* t) { return t->average_type * kDTypes + t->source_type; };
  std::stable_sort(order.begin(), order.end(), [&](auto* s, auto* t) { return place(s) < place(t); });
  return order;
}

inline bool is_same_group(const EmaTensor& s, const EmaTensor& t) {
  return s.average_type == t.average_type && s.source_type == t.source_type;
}

inline int64_t count_ema_chunks(const EmaTensor& t) { return (t.count + kEmaDeviceChunk - 1) / kEmaDeviceChunk; }

// Number of chunks of `count` tensors.
inline int64_t count_ema_device_chunks(const EmaTensor* tensors, int64_t count) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += count_ema_chunks(tensors[i]);
  return total;
}

// Fills chunks (count_ema_device_chunks of them) and groups (up to kEmaGroups); returns the number of groups.
inline int build_ema_table(const EmaTensor* tensors, int64_t count, EmaChunk* chunks, EmaGroup* groups) {
  int used = 0;
  int64_t filled = 0;
  const EmaTensor* before = nullptr;
  for (const EmaTensor* t : sort_ema_tensors(tensors, count)) {
    if (!before || !is_same_group(*before, *t)) groups[used++] = {t->average_type, t->source_type, filled, 0};
    before = t;
    char* const average = static_cast<char*>(t->average);
    const char* const source = static_cast<const char*>(t->source);
    char* const copy = static_cast<char*>(t->copy);
    for (int64_t begin = 0; begin < t->count; begin += kEmaDeviceChunk) {
      chunks[filled++] = {average + begin * size_of(t->average_type), source + begin * size_of(t->source_type),
                          copy ? copy + begin * size_of(t->copy_type) : nullptr,
                          static_cast<int32_t>(std::min<int64_t>(kEmaDeviceChunk, t->count - begin)),
                          copy ? t->copy_type : kNone};
      ++groups[used - 1].count;
    }
  }
  return used;
}

}  // namespace d2v
