// Runs the threads of one block, each as a fiber, until all have returned.
//
// A fiber runs until it reaches a barrier or a warp collective that is not complete; then the next one runs. The
// order depends on a seed: a result that depends on the seed is a race. With ThreadSanitizer every CUDA thread is a
// thread of its own and only what orders memory on the device does so here, so that races show even where results
// agree.
#pragma once
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"

namespace d2v::engine {

inline constexpr int kWarp = 32;
inline constexpr int kMaxThreads = 1024;
inline constexpr size_t kMaxShared = 227 * 1024;
inline constexpr size_t kOrderBytes = 64 * 1024;  // behind shared memory: addresses that stand for barriers
inline constexpr size_t kArenaBytes = kMaxShared + kOrderBytes;
inline constexpr int kCollectives = 4;  // in flight in one warp, for disjoint masks
inline constexpr int kMaxCluster = 8;
inline constexpr size_t kClusterOrder = 1000, kCopiesOrder = 1100;  // numbers of addresses that stand for barriers

struct Options {
  uint64_t order = 0;                // of threads and blocks. 0: ascending, 1: descending, else shuffled with this seed
  bool may_return_early = true;      // a thread may have returned when the others reach a barrier (legal since Volta)
  size_t shared_bytes = kMaxShared;  // that the device says a block may have, and its multiprocessors
  int multiprocessors = 1;
  int cluster_blocks = 0;  // that the device says a cluster may have; 0: neither clusters nor bulk copies
};
inline Options& options() {
  static Options o;
  return o;
}

// A barrier or collective in the source.
struct Site {
  const char* what;
  const char* file;
  int line;
};
inline bool is_same(const Site& a, const Site& b) {
  return a.line == b.line && std::strcmp(a.file, b.file) == 0 && std::strcmp(a.what, b.what) == 0;
}
inline std::string place(const Site& s) { return std::string(s.file) + ":" + std::to_string(s.line); }

// Reproducible shuffle.
inline uint64_t next_random(uint64_t& state) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return state >> 33;
}
inline void arrange(std::vector<int>& order, int n, uint64_t& random) {
  order.resize(n);
  for (int i = 0; i < n; ++i) order[i] = options().order == 1 ? n - 1 - i : i;
  if (options().order < 2) return;
  for (int i = n - 1; i > 0; --i) std::swap(order[i], order[next_random(random) % (i + 1)]);
}

// One warp collective in flight.
struct Collective {
  uint32_t mask = 0;  // the lanes that take part; 0: free
  uint32_t arrived = 0, left = 0;
  Site site{};
  alignas(16) unsigned char values[kWarp][16];
};

enum class State : uint8_t { kReady, kAtBarrier, kInCollective, kAtCopies, kAtCluster, kDone };

// A copy to shared memory that has not been waited for.
struct PendingCopy {
  void* shared;
  const void* global;
  int group;
};

struct Thread {
  Fiber fiber;
  uint3 index{};
  int number = 0;
  State state = State::kDone;
  bool started = false;
  Site site{};                      // where it waits
  const void* waits_for = nullptr;  // a collective, or a barrier of copies
  std::vector<PendingCopy> copies;
  int group = 0;  // of the copies to come
};

class Block;
struct Cluster;
class CopyStates;
inline thread_local Block* current_block = nullptr;
inline thread_local Thread* current_thread = nullptr;
inline thread_local dim3 grid_shape, block_shape;
inline thread_local uint3 block_index;

class Block {
 public:
  Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  // ---- for the launch ----
  void set_shape(dim3 shape);
  // Throws std::runtime_error with what is wrong with the kernel.
  void run(const std::function<void()>& body, size_t dynamic_bytes);
  void begin_grid() { release(&grid_begins_); }
  void end_grid() { acquire(&grid_ends_); }
  uint64_t random = 1;

  // ---- for the launch of a cluster: each block is reset, then resumed until all are done ----
  void reset(uint3 index, Cluster* cluster);
  void start(const std::function<void()>& body) { body_ = &body; }
  void resume();  // runs until none of its threads can
  bool can_run() const;
  bool is_done() const { return live_ == 0; }
  std::string describe_deadlock() const;
  void abandon_fibers();

  // ---- for the kernel ----
  void barrier(const Site& site, bool predicate);
  bool any() const { return votes_.any; }
  bool all() const { return votes_.all; }
  int count() const { return votes_.count; }
  // Deposits `value`, waits until every lane of the mask has, and calls read(collective, lane).
  template <class T, class Read>
  void collective(uint32_t mask, const T& value, const Site& site, Read read);
  // A __shared__ variable of this block, known by the address of its key.
  void* shared(const void* key, size_t bytes, size_t alignment);
  void* dynamic_shared() { return shared(&dynamic_key_, 0, 1); }
  void allocate_dynamic(size_t bytes) {
    if (bytes > 0) shared(&dynamic_key_, bytes, 128);
  }
  // Bytes of all variables of the block that ran last, dynamic ones too.
  size_t shared_bytes() const { return shared_bytes_; }
  [[noreturn]] void fail(const std::string& text);
  void cluster_barrier(const Site& site);
  Cluster* cluster() const { return cluster_; }
  size_t offset_of(const void* p) const { return static_cast<size_t>(static_cast<const unsigned char*>(p) - arena_); }
  void* at_offset(size_t offset) const { return arena_ + offset; }
  CopyStates& copies() { return *copies_; }
  // The running thread waits until wake(cause).
  void wait(State state, const void* cause, const Site& site);
  void wake(State state, const void* cause);
  // Where barrier or collective i keeps its order: new in each block, with the arena.
  void* order_of(size_t i) { return arena_ + kMaxShared + 8 * i; }

 private:
  struct Votes {
    bool any = false, all = true;
    int count = 0;
  };
  struct Variable {
    const void* key;
    void* address;
  };

  static void run_fiber();
  void finish_thread();
  void next();
  Thread* choose();
  void release_barrier();
  void release_cluster();
  Collective& join(uint32_t mask, int lane, const Site& site);
  void make_fibers(int n);
  std::string describe(const Thread& t) const;

  std::vector<Thread> sets_[kFiberSets];
  Thread* threads_ = nullptr;
  unsigned turn_ = 0;
  std::vector<int> order_;
  size_t cursor_ = 0;
  std::vector<Collective> collectives_;
  std::vector<Variable> variables_;
  unsigned char* arena_ = nullptr;
  size_t arena_used_ = 0, shared_bytes_ = 0;
  Fiber launcher_;
  const std::function<void()>* body_ = nullptr;
  int size_ = 0, live_ = 0, waiting_ = 0;
  unsigned phase_ = 0;
  Votes counting_, votes_;
  Site barrier_site_{};
  std::string error_;
  char grid_begins_ = 0, grid_ends_ = 0;
  static inline char dynamic_key_ = 0;
  uint3 index_{};
  Cluster* cluster_ = nullptr;
  std::shared_ptr<CopyStates> copies_;
};

// Blocks that run at once, in the order of their ranks.
struct Cluster {
  std::vector<Block*> blocks;
  int waiting = 0;
  unsigned phase = 0;
};

inline Block::Block() {
  void* memory = mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  arena_ = static_cast<unsigned char*>(memory);
  for (auto& set : sets_) set.reserve(kMaxThreads);  // fibers must not move
}

inline void Block::make_fibers(int n) {
  for (auto& set : sets_) {
    while (static_cast<int>(set.size()) < n) {
      set.emplace_back();
      allocate_stack(set.back().fiber);
      renew_sanitizer_state(set.back().fiber);
    }
  }
}

inline void Block::set_shape(dim3 shape) {
  size_ = static_cast<int>(shape.x * shape.y * shape.z);
  make_fibers(size_);
  collectives_.resize((size_ + kWarp - 1) / kWarp * kCollectives);
  for (auto& set : sets_) {
    for (int i = 0; i < size_; ++i) {
      set[i].number = i;
      set[i].index = make_uint3(i % shape.x, i / shape.x % shape.y, i / (shape.x * shape.y));
    }
  }
}

inline void Block::reset(uint3 index, Cluster* cluster) {
  index_ = index;
  cluster_ = cluster;
  copies_ = std::make_shared<CopyStates>();
  live_ = size_;
  waiting_ = 0;
  counting_ = votes_ = {};
  error_.clear();
  variables_.clear();
  arena_used_ = shared_bytes_ = 0;
#if defined(__SANITIZE_THREAD__)
  launcher_.thread_state = __tsan_get_current_fiber();
  // Blocks are not ordered among themselves, so their shared memory must be new to ThreadSanitizer in each. (Mapping
  // over the old pages would keep what it knows of them.)
  munmap(arena_, kArenaBytes);
  if (mmap(arena_, kArenaBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != arena_) {
    throw std::bad_alloc();
  }
#endif
  forbid(arena_, kArenaBytes);
  current_thread = nullptr;
  for (Collective& c : collectives_) c.mask = 0;
  threads_ = sets_[turn_++ % kFiberSets].data();
  for (int i = 0; i < size_; ++i) {
    threads_[i].state = State::kReady;
    threads_[i].copies.clear();
    threads_[i].group = 0;
  }
  arrange(order_, size_, random);
  cursor_ = order_.size() - 1;
}

inline void Block::run(const std::function<void()>& body, size_t dynamic_bytes) {
  const Quiet quiet;
  reset(block_index, nullptr);
  current_block = this;
  allocate_dynamic(dynamic_bytes);
  start(body);
  resume();
}

inline void Block::resume() {
  const Quiet quiet;
  current_block = this;
  block_index = index_;
  next();
  if (error_.empty()) return;
  if (!cluster_) abandon_fibers();
  throw std::runtime_error(error_);
}

inline bool Block::can_run() const {
  for (int i = 0; i < size_; ++i) {
    if (threads_[i].state == State::kReady) return true;
  }
  return false;
}

// They stay where they are, and start afresh in the next block.
inline void Block::abandon_fibers() {
  for (auto& set : sets_) {
    for (Thread& t : set) {
      t.started = false;
      renew_sanitizer_state(t.fiber);
    }
  }
}

inline void Block::run_fiber() {
  finish_switch(nullptr);
  Block* block;
  {
    const Quiet quiet;
    block = current_block;
  }
  for (;;) {  // one turn per block: between blocks the fiber waits in finish_thread
    acquire(&block->grid_begins_);
    (*block->body_)();
    release(&block->grid_ends_);
    block->finish_thread();
  }
}

inline void Block::finish_thread() {
  const Quiet quiet;
  current_thread->state = State::kDone;
  --live_;
  if (waiting_ > 0 && !options().may_return_early) {
    fail("divergent barrier: a thread has returned while others wait at " + place(barrier_site_));
  }
  if (waiting_ > 0 && waiting_ == live_) release_barrier();
  release_cluster();
  next();
}

inline Thread* Block::choose() {
  const size_t n = order_.size();
  for (size_t k = 0; k < n; ++k) {
    cursor_ = cursor_ + 1 == n ? 0 : cursor_ + 1;
    Thread& t = threads_[order_[cursor_]];
    if (t.state == State::kReady) return &t;
  }
  return nullptr;
}

// From the running fiber (or the launching thread) to the next one that can run; to the launching thread when none can.
inline void Block::next() {
  Thread* const self = current_thread;
  Thread* to = error_.empty() ? choose() : nullptr;
  if (!to && error_.empty() && live_ > 0 && !cluster_) error_ = describe_deadlock();
  if (to && to == self) return;
  Fiber& from = self ? self->fiber : launcher_;
  current_thread = to;
  if (!to) {
    if (self) switch_fibers(from, launcher_);
    return;
  }
  if (!to->started) {
    to->started = true;
    prepare(to->fiber, &Block::run_fiber);
  }
  switch_fibers(from, to->fiber);
}

inline std::string Block::describe(const Thread& t) const {
  char text[64];
  snprintf(text, sizeof(text), "thread (%u,%u,%u) in %s at ", t.index.x, t.index.y, t.index.z, t.site.what);
  return text + place(t.site);
}

inline std::string Block::describe_deadlock() const {
  char text[160];
  snprintf(text, sizeof(text), "block (%u,%u,%u) cannot go on: %d of %d threads have returned", index_.x, index_.y,
           index_.z, size_ - live_, size_);
  std::string all = text;
  const Site* seen = nullptr;
  int shown = 0;
  for (int i = 0; i < size_ && shown < kCollectives; ++i) {
    const Thread& t = threads_[i];
    if (t.state == State::kDone || (seen && is_same(*seen, t.site))) continue;
    seen = &t.site;
    ++shown;
    all += "\n  waits: " + describe(t);
  }
  return all;
}

inline void Block::fail(const std::string& text) {
  if (error_.empty()) error_ = text;
  if (!current_thread) throw std::runtime_error(error_);
  current_thread->state = State::kAtBarrier;
  next();        // to the launching thread, which throws; this fiber is abandoned
  std::abort();  // not reached
}

inline void Block::barrier(const Site& site, bool predicate) {
  const Quiet quiet;
  Thread& t = *current_thread;
  t.site = site;
  if (!options().may_return_early && live_ != size_) {
    fail("divergent barrier: " + describe(t) + " but " + std::to_string(size_ - live_) + " threads have returned");
  }
  if (waiting_ == 0) {
    barrier_site_ = site;
  } else if (!is_same(barrier_site_, site)) {
    fail("divergent barrier: " + describe(t) + " while others wait at " + place(barrier_site_));
  }
  counting_.any |= predicate;
  counting_.all &= predicate;
  counting_.count += predicate;
  void* const order = order_of(phase_ % 2);
  release(order);
  t.state = State::kAtBarrier;
  if (++waiting_ == live_) release_barrier();
  next();
  acquire(order);
}

inline void Block::release_barrier() {
  waiting_ = 0;
  ++phase_;
  votes_ = counting_;
  counting_ = {};
  for (int i = 0; i < size_; ++i) {
    if (threads_[i].state == State::kAtBarrier) threads_[i].state = State::kReady;
  }
  if (options().order > 1) arrange(order_, size_, random);
  cursor_ = order_.size() - 1;
}

// Blocks of a cluster have their variables at the same places.
inline void* Block::shared(const void* key, size_t bytes, size_t alignment) {
  const Quiet quiet;
  for (const Variable& v : variables_) {
    if (v.key == key) return v.address;
  }
  constexpr size_t red_zone = 32;
  const size_t begin = (arena_used_ + red_zone + alignment - 1) / alignment * alignment;
  if (begin + bytes > kMaxShared) fail("more shared memory than a block has");
  const auto place = [&](Block& block) {
    unsigned char* const address = block.arena_ + begin;
    block.arena_used_ = begin + bytes;
    block.shared_bytes_ += bytes;
    allow(address, bytes);
    std::memset(address, 0xff, bytes);  // NaN or -1: a read of what nobody wrote shows
    block.variables_.push_back({key, address});
  };
  if (!cluster_) {
    place(*this);
  } else {
    for (Block* block : cluster_->blocks) place(*block);
  }
  return arena_ + begin;
}

inline void Block::wait(State state, const void* cause, const Site& site) {
  Thread& t = *current_thread;
  t.site = site;
  t.state = state;
  t.waits_for = cause;
  next();
}

inline void Block::wake(State state, const void* cause) {
  for (int i = 0; i < size_; ++i) {
    Thread& t = threads_[i];
    if (t.state == state && t.waits_for == cause) t.state = State::kReady;
  }
}

// Threads that have returned count as there.
inline void Block::release_cluster() {
  if (!cluster_ || cluster_->waiting == 0) return;
  int live = 0;
  for (const Block* block : cluster_->blocks) live += block->live_;
  if (cluster_->waiting != live) return;
  cluster_->waiting = 0;
  ++cluster_->phase;
  for (Block* block : cluster_->blocks) block->wake(State::kAtCluster, cluster_);
}

inline void Block::cluster_barrier(const Site& site) {
  const Quiet quiet;
  if (!cluster_) fail("cluster_barrier at " + place(site) + ": the launch has no clusters");
  Cluster& cluster = *cluster_;
  void* const order = cluster.blocks[0]->order_of(kClusterOrder + cluster.phase % 2);
  release(order);
  current_thread->state = State::kAtCluster;
  current_thread->waits_for = cluster_;
  current_thread->site = site;
  ++cluster.waiting;
  release_cluster();
  next();
  acquire(order);
}

}  // namespace d2v::engine
