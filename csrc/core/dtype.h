// Element types, and how a core function runs on several threads.
#pragma once
#include <stdint.h>

// Visible outside its library, all else is hidden.
#define D2V_EXPORT __attribute__((visibility("default")))

// Callable from kernels too.
#if defined(__CUDACC__)
#define D2V_HOST_DEVICE __host__ __device__
#else
#define D2V_HOST_DEVICE
#endif

namespace d2v {

// int32_t so that the structs that hold it have the same layout for the host compiler and for nvcc.
enum DType : int32_t { kNone = -1, kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };
constexpr int kDTypes = 4;

D2V_HOST_DEVICE constexpr int64_t size_of(DType t) {
  return t == kFloat64 ? 8 : t == kFloat32 ? 4 : t == kNone ? 0 : 2;
}

// Row numbers of 32 or 64 bits behind one pointer; `stride` counts elements.
struct Indices {
  const void* data;
  bool wide;
  int64_t row_stride, stride;
};

// Runs body(context, begin, end) over disjoint pieces of [0, n), a piece being `grain` items or more. Every result in
// core is the same for any number of threads: work is cut at places that depend on the shapes alone.
typedef void (*ParallelBody)(void* context, int64_t begin, int64_t end);
typedef void (*ParallelFor)(int64_t n, int64_t grain, ParallelBody body, void* context);
struct Parallel {
  ParallelFor run;
  int threads;
};

}  // namespace d2v
