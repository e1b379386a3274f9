// Bulk copies of tiles, and what blocks of a cluster see of each other: the names of csrc/core/bulk.cuh.
//
// As with the other asynchronous copies the bytes move when they are waited for, and not before. They do so tile by
// tile, in an order that depends on the seed, until the phase of their barrier ends: a byte count that does not fit
// ends it too early, which is reported, or never, which leaves the threads waiting.
#pragma once
#include <cstdint>
#include <source_location>

#include "block.h"
#include "copies.h"

namespace d2v::engine {

struct TileMap {
  const unsigned char* data;
  int64_t samples, time, row_bytes, sample_stride, time_stride;
  int element_bytes, rows, bytes;  // rows, bytes: of a box
};

struct CopyBarrier {
  uint64_t word;
};

struct PendingTile {
  unsigned char* shared;
  const TileMap* map;
  int64_t begin, time, sample;  // begin: of the row's bytes
};

// What a barrier in shared memory holds.
struct CopyState {
  const CopyBarrier* barrier = nullptr;
  bool arrived = false;  // the one thread that copies has, in this phase
  int64_t missing = 0;   // bytes that are expected and have not arrived
  unsigned phase = 0;
  std::vector<PendingTile> tiles;
};

// Of one block.
class CopyStates {
 public:
  CopyState* find(const CopyBarrier* barrier) {
    for (CopyState& s : states_) {
      if (s.barrier == barrier) return &s;
    }
    return nullptr;
  }
  void add(const CopyBarrier* barrier) { states_.emplace_back().barrier = barrier; }
  size_t number(const CopyState& s) const { return static_cast<size_t>(&s - states_.data()); }

 private:
  std::vector<CopyState> states_;
};

// The rules of the driver.
template <class Source>
bool encode_tiles(const Source& s, TileMap* map) {
  const int64_t row = s.channels * s.element_bytes;
  const auto is_stride = [](int64_t n) { return n > 0 && n % 16 == 0 && n < int64_t{1} << 40; };
  if (reinterpret_cast<uintptr_t>(s.data) % 16 != 0 || !is_stride(s.sample_stride) || !is_stride(s.time_stride)) {
    return false;
  }
  if (s.bytes % 16 != 0 || s.bytes / s.element_bytes > 256 || s.rows < 1 || s.rows > 256 || row % 16 != 0) return false;
  *map = {static_cast<const unsigned char*>(s.data),
          s.samples,
          s.time,
          row,
          s.sample_stride,
          s.time_stride,
          s.element_bytes,
          s.rows,
          s.bytes};
  return true;
}

inline Site site_of(const char* what, const std::source_location& at) {
  return {what, at.file_name(), static_cast<int>(at.line())};
}

inline CopyState& state_of(const CopyBarrier* barrier, const Site& site) {
  CopyState* const state = current_block->copies().find(barrier);
  if (!state) current_block->fail(std::string(site.what) + " at " + place(site) + ": before init_copies");
  return *state;
}

inline void init_copies(CopyBarrier* barriers, int count) {
  for (int i = 0; i < count; ++i) barriers[i].word = 0;
  const Quiet quiet;
  for (int i = 0; i < count; ++i) current_block->copies().add(barriers + i);
}

// Ends the phase if nothing is missing.
inline void end_phase(CopyState& s) {
  if (!s.arrived || s.missing != 0) return;
  if (!s.tiles.empty()) {
    current_block->fail("bulk copies: a phase ends with " + std::to_string(s.tiles.size()) +
                        " tiles on the way: fewer bytes were expected than copied");
  }
  s.arrived = false;
  ++s.phase;
}

inline void expect_bytes(CopyBarrier* barrier, int bytes,
                         const std::source_location& at = std::source_location::current()) {
  const Quiet quiet;
  CopyState& s = state_of(barrier, site_of("expect_bytes", at));
  if (s.arrived) current_block->fail("expect_bytes at " + place(site_of("", at)) + ": twice in one phase");
  s.arrived = true;
  s.missing += bytes;
  release(current_block->order_of(kCopiesOrder + current_block->copies().number(s)));
  end_phase(s);
  current_block->wake(State::kAtCopies, barrier);
}

// Until they arrive the destination holds NaN, written by the thread that copies: so ThreadSanitizer sees what reads it
// meanwhile.
inline void copy_tile(void* shared, const TileMap* map, int channel, int time, int sample, CopyBarrier* barrier,
                      const std::source_location& at = std::source_location::current()) {
  const Site site = site_of("copy_tile", at);
  if (reinterpret_cast<uintptr_t>(shared) % 128 != 0) current_block->fail("misaligned bulk copy at " + place(site));
  auto* const to = static_cast<CopiedBytes*>(shared);
  for (int i = 0; i < map->rows * map->bytes / static_cast<int>(kCopyBytes); ++i) to[i] = {~uint64_t{0}, ~uint64_t{0}};
  const Quiet quiet;
  CopyState& s = state_of(barrier, site);
  s.tiles.push_back({static_cast<unsigned char*>(shared), map, int64_t{channel} * map->element_bytes, time, sample});
  release(current_block->order_of(kCopiesOrder + current_block->copies().number(s)));
  current_block->wake(State::kAtCopies, barrier);
}

// Moves the bytes; zeros where there is no tensor.
inline void move_tile(const PendingTile& tile) {
  const TileMap& m = *tile.map;
  for (int row = 0; row < m.rows; ++row) {
    const int64_t t = tile.time + row;
    for (int i = 0; i < m.bytes; i += static_cast<int>(kCopyBytes)) {
      const bool inside = tile.sample < m.samples && t < m.time && tile.begin + i < m.row_bytes;
      const int64_t from = tile.sample * m.sample_stride + t * m.time_stride + tile.begin + i;
      auto* const to = reinterpret_cast<CopiedBytes*>(tile.shared + row * m.bytes + i);
      *to = inside ? *reinterpret_cast<const CopiedBytes*>(m.data + from) : CopiedBytes{0, 0};
    }
  }
}

// Takes a tile that is on the way, whichever; false if there is none.
inline bool take_tile(CopyState& s, PendingTile* tile) {
  if (s.tiles.empty()) return false;
  const size_t at = options().order == 0   ? 0
                    : options().order == 1 ? s.tiles.size() - 1
                                           : next_random(current_block->random) % s.tiles.size();
  *tile = s.tiles[at];
  s.tiles.erase(s.tiles.begin() + static_cast<std::ptrdiff_t>(at));
  return true;
}

inline void wait_bytes(CopyBarrier* barrier, int parity,
                       const std::source_location& at = std::source_location::current()) {
  Block& block = *current_block;
  const Site site = site_of("wait_bytes", at);
  for (;;) {
    PendingTile tile;
    bool arrives;
    {
      const Quiet quiet;
      CopyState& s = state_of(barrier, site);
      acquire(block.order_of(kCopiesOrder + block.copies().number(s)));
      if (static_cast<int>(s.phase & 1) != parity) return;
      arrives = take_tile(s, &tile);
      if (!arrives) block.wait(State::kAtCopies, barrier, site);
    }
    if (!arrives) continue;
    move_tile(tile);
    const Quiet quiet;
    CopyState& s = state_of(barrier, site);
    s.missing -= static_cast<int64_t>(tile.map->rows) * tile.map->bytes;
    if (s.arrived && s.missing < 0) block.fail("bulk copies: more bytes arrive than were expected");
    release(block.order_of(kCopiesOrder + block.copies().number(s)));
    end_phase(s);
    block.wake(State::kAtCopies, barrier);
  }
}

inline void cluster_barrier(const std::source_location& at = std::source_location::current()) {
  current_block->cluster_barrier(site_of("cluster_barrier", at));
}

template <class T>
T load_peer(const T* p, int rank, const std::source_location& at = std::source_location::current()) {
  const T* there;
  {
    const Quiet quiet;
    Block& block = *current_block;
    const std::string where = "load_peer at " + place(site_of("", at)) + ": ";
    const Cluster* const cluster = block.cluster();
    if (!cluster || rank < 0 || rank >= static_cast<int>(cluster->blocks.size())) block.fail(where + "no such block");
    const Block& peer = *cluster->blocks[static_cast<size_t>(rank)];
    if (block.offset_of(p) + sizeof(T) > kMaxShared) block.fail(where + "no shared memory");
    if (peer.is_done()) block.fail(where + "block " + std::to_string(rank) + " has ended");
    there = static_cast<const T*>(peer.at_offset(block.offset_of(p)));
  }
  return *there;
}

}  // namespace d2v::engine
