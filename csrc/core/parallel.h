// C++ face of Parallel for the host files (never for those compiled per instruction level).
#pragma once
#include <cstddef>
#include <vector>

#include "dtype.h"

namespace d2v {

template <class F>
void parallel_for(const Parallel& parallel, int64_t n, int64_t grain, const F& body) {
  if (n <= 0) return;
  const auto call = [](void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); };
  parallel.run(n, grain < 1 ? 1 : grain, call, const_cast<void*>(static_cast<const void*>(&body)));
}

// Items of `bytes` each that make a piece worth a thread.
inline int64_t grain_of(int64_t bytes) { return bytes >= (1 << 18) ? 1 : (1 << 18) / (bytes > 0 ? bytes : 1); }

// Sums over rows are formed in at most so many segments, which bounds the scratch memory, and merged in order.
constexpr int64_t kSegments = 64;

// Rows of a segment, whole blocks: a function of the rows alone, so that no sum depends on the threads.
inline int64_t segment_rows(int64_t rows, int64_t block) {
  const int64_t share = (rows + kSegments - 1) / kSegments, blocks = (share + block - 1) / block;
  return (blocks > 1 ? blocks : 1) * block;
}

// Zeros that begin on a cache line.
class Space {
 public:
  explicit Space(int64_t bytes) : memory_(static_cast<size_t>(bytes + 64)) {}
  void* data() { return memory_.data() + (64 - reinterpret_cast<uintptr_t>(memory_.data()) % 64) % 64; }

 private:
  std::vector<char> memory_;
};

// Outputs at least this large leave the caches before anyone reads them: write them past the caches.
constexpr int64_t kStreamBytes = 1 << 20;

}  // namespace d2v
