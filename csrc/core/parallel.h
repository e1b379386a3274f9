// C++ face of Parallel for the host files (never for those compiled per instruction level).
#pragma once
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

// Outputs at least this large leave the caches before anyone reads them: write them past the caches.
constexpr int64_t kStreamBytes = 1 << 20;

}  // namespace d2v
