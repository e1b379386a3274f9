// Warp collectives: shuffles, votes, reductions, __syncwarp.
#pragma once
#include "block.h"

namespace d2v::engine {

inline Collective& Block::join(uint32_t mask, int lane, const Site& site) {
  Collective* const first = &collectives_[static_cast<size_t>(current_thread->number / kWarp) * kCollectives];
  for (Collective* c = first; c < first + kCollectives; ++c) {
    if (c->mask != mask || (c->arrived >> lane & 1)) continue;
    if (!is_same(c->site, site)) {
      fail("divergent warp collective: " + describe(*current_thread) + " while others are in " + c->site.what + " at " +
           place(c->site));
    }
    return *c;
  }
  for (Collective* c = first; c < first + kCollectives; ++c) {
    if (c->mask != 0) continue;
    c->mask = mask;
    c->arrived = c->left = 0;
    c->site = site;
    return *c;
  }
  fail(describe(*current_thread) + ": too many collectives in flight in one warp");
}

template <class T, class Read>
void Block::collective(uint32_t mask, const T& value, const Site& site, Read read) {
  static_assert(sizeof(T) <= sizeof(Collective::values[0]), "a lane's value is at most 16 bytes");
  const Quiet quiet;
  Thread& t = *current_thread;
  const int lane = t.number % kWarp;
  t.site = site;
  if (!(mask >> lane & 1)) fail(describe(t) + ": the mask leaves out the calling lane");
  Collective& c = join(mask, lane, site);
  // Of all collectives, CUDA lets only this one order memory.
  const bool orders_memory = std::strcmp(site.what, "__syncwarp") == 0;
  void* const order = order_of(2 + (&c - collectives_.data()));
  std::memcpy(c.values[lane], &value, sizeof(T));
  c.arrived |= 1u << lane;
  if (orders_memory) release(order);
  if (c.arrived == mask) {
    wake(State::kInCollective, &c);
  } else {
    t.state = State::kInCollective;
    t.waits_for = &c;
    next();
  }
  if (orders_memory) acquire(order);
  read(c, lane);
  c.left |= 1u << lane;
  if (c.left == mask) c.mask = 0;
}

inline void synchronize_warp(const Site& site, uint32_t mask = 0xffffffffu) {
  current_block->collective(mask, 0, site, [](const Collective&, int) {});
}

template <class T>
T value_of(const Collective& c, int lane) {
  T value;
  std::memcpy(&value, c.values[lane], sizeof(T));
  return value;
}

enum class Shuffle { kIndex, kUp, kDown, kXor };

template <class T>
T shuffle(const Site& site, Shuffle kind, uint32_t mask, T value, int offset, int width = kWarp) {
  T result = value;
  current_block->collective(mask, value, site, [&](const Collective& c, int lane) {
    const int first = lane / width * width, end = first + width;
    int from = lane;
    if (kind == Shuffle::kIndex) from = first + (offset & (width - 1));
    if (kind == Shuffle::kUp && lane - offset >= first) from = lane - offset;
    if (kind == Shuffle::kDown && lane + offset < end) from = lane + offset;
    if (kind == Shuffle::kXor && (lane ^ offset) < end) from = lane ^ offset;
    if (!(mask >> from & 1)) {
      current_block->fail(std::string(site.what) + " at " + place(site) + " reads a lane that the mask leaves out");
    }
    result = value_of<T>(c, from);
  });
  return result;
}

inline uint32_t ballot(const Site& site, uint32_t mask, bool predicate) {
  uint32_t result = 0;
  current_block->collective(mask, predicate, site, [&](const Collective& c, int) {
    for (int i = 0; i < kWarp; ++i) {
      if ((mask >> i & 1) && value_of<bool>(c, i)) result |= 1u << i;
    }
  });
  return result;
}

template <class T, class Combine>
T reduce(const Site& site, uint32_t mask, T value, Combine combine) {
  T result{};
  current_block->collective(mask, value, site, [&](const Collective& c, int) {
    bool first = true;
    for (int i = 0; i < kWarp; ++i) {
      if (!(mask >> i & 1)) continue;
      result = first ? value_of<T>(c, i) : combine(result, value_of<T>(c, i));
      first = false;
    }
  });
  return result;
}

}  // namespace d2v::engine
