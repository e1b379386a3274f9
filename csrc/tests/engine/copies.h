// Asynchronous copies to shared memory. The bytes move when they are waited for, and not before: until then the
// destination holds NaN, so that one not waited for shows, and one that overwrites what is still to be read, too.
#pragma once
#include "block.h"

namespace d2v::engine {

inline constexpr size_t kCopyBytes = 16;

// (Not by memset and memcpy: where g++ expands them, ThreadSanitizer does not see the accesses.)
struct __attribute__((may_alias)) CopiedBytes {
  uint64_t low, high;
};

// The destination is written here and once more on arrival, both times by the kernel's own thread: between the two the
// device may do it at any time, so ThreadSanitizer sees every access that would collide.
inline void copy_async(void* shared, const void* global) {
  if (reinterpret_cast<uintptr_t>(shared) % kCopyBytes != 0 || reinterpret_cast<uintptr_t>(global) % kCopyBytes != 0) {
    current_block->fail("misaligned asynchronous copy");
  }
  *static_cast<CopiedBytes*>(shared) = {~uint64_t{0}, ~uint64_t{0}};
  const Quiet quiet;
  current_thread->copies.push_back({shared, global, current_thread->group});
}

inline void commit_copies() {
  const Quiet quiet;
  ++current_thread->group;
}

// All groups but the N last committed ones arrive; copies not committed yet stay on the way.
template <int N>
void wait_copies() {
  std::vector<PendingCopy> arrived;
  {
    const Quiet quiet;
    std::vector<PendingCopy> on_the_way;
    for (const PendingCopy& c : current_thread->copies) {
      (c.group < current_thread->group - N ? arrived : on_the_way).push_back(c);
    }
    current_thread->copies.swap(on_the_way);
  }
  for (const PendingCopy& c : arrived) {
    *static_cast<CopiedBytes*>(c.shared) = *static_cast<const CopiedBytes*>(c.global);
  }
}

}  // namespace d2v::engine
