// a <- a + w (s - a) over many tensors, with an optional copy in another type.
//
// The arithmetic is fp32 (fp64 where the average is fp64), w rounded to that type once. The copy is a cast of the
// average as stored. With w == 0 averages are not touched, so NaN in a source does not spread; copies are written.
#pragma once
#include "dtype.h"

namespace d2v {

// An average of type kSplit is fp32 in two halves of 16 bits: `average` is a bf16 tensor, fp32 rounded to nearest (ties
// away from zero), and at once the copy that a forward pass reads; `copy`, of type kSplit too, is int16, what the fp32
// bits have beyond those of the bf16 number. Together they are the fp32 number: a step gives the bits that it gives an
// fp32 average, and moves 8 bytes an element beside the source instead of 10 with an fp32 average and a bf16 copy, in 4
// bytes of memory instead of 6. A NaN stays NaN in both, without its payload; +-3.4e38 near the end of fp32 is infinite
// in the bf16 half alone.
constexpr DType kSplit = static_cast<DType>(4);

// One tensor, flat. average: any type; source: fp64 only if the average is; copy: may be null (copy_type kNone).
struct EmaTensor {
  void* average;
  const void* source;
  void* copy;
  int64_t count;
  DType average_type, source_type, copy_type;
};

// ---- CPU ----

// Elements [begin, end) of one tensor.
struct EmaKernels {
  void (*update)(const EmaTensor* tensor, int64_t begin, int64_t end, double weight);
  void (*finish)();  // after the last update of a thread: what it wrote past the caches becomes visible
};
const EmaKernels& ema_kernels(const EmaTensor& tensor);

// The unit in which work is shared out: a multiple of every vector, so that pieces stay aligned, and about as many
// elements as take the time that a tensor costs whatever its size.
constexpr int64_t kEmaChunk = 512;

// first_chunk[i] = number of chunks before tensor i; count + 1 entries. Inline: a plan indexes in another library.
inline void index_ema_chunks(const EmaTensor* tensors, int64_t count, int64_t* first_chunk) {
  first_chunk[0] = 0;
  for (int64_t i = 0; i < count; ++i) {
    first_chunk[i + 1] = first_chunk[i] + (tensors[i].count + kEmaChunk - 1) / kEmaChunk;
  }
}
void update_ema(const EmaTensor* tensors, int64_t count, const int64_t* first_chunk, double weight, Parallel parallel);

// update_ema on torch's threads; libd2v_cpu exports it as the C function d2v_update_ema, for plans.
typedef void (*EmaUpdate)(const EmaTensor* tensors, int64_t count, const int64_t* first_chunk, double weight);
// d2v_tensors_moved and d2v_release_tensors of libd2v_cpu: about the tensors that its operator hold_tensors took.
typedef int (*TensorsMoved)(const void* held);
typedef void (*ReleaseTensors)(void* held);

// ---- CUDA: ema.cu, in the library d2v_cuda ----

// A piece of one tensor for one thread block. A table of these lies in device memory; ema_table.h fills it. All
// pieces of a tensor but its last are kEmaDeviceChunk long, so that they are aligned alike.
struct EmaChunk {
  void* average;
  const void* source;
  void* copy;
  int32_t count;  // 1 .. kEmaDeviceChunk
  DType copy_type;
};
static_assert(sizeof(EmaChunk) == 32, "the module and the library agree on it");
constexpr int32_t kEmaDeviceChunk = 16384;

// Neighbouring chunks of one (average, source) type, which one launch updates.
struct EmaGroup {
  DType average_type, source_type;
  int64_t first, count;
};
// (fp32, bf16, fp16, split) x (fp32, bf16, fp16), and (fp64, fp64)
constexpr int kEmaGroups = 13;

// The update of a table: `chunks` is device memory, `groups` host memory. device_weight: device address of a double
// that replaces `weight`, or null. Launches on `stream` of `device` and returns at once: 0, or a cudaError_t.
typedef int (*EmaLaunch)(const EmaChunk* chunks, const EmaGroup* groups, int64_t group_count, double weight,
                         const double* device_weight, int32_t device, void* stream);

extern "C" {
// An EmaLaunch.
D2V_EXPORT int d2v_launch_ema(const EmaChunk* chunks, const EmaGroup* groups, int64_t group_count, double weight,
                              const double* device_weight, int32_t device, void* stream);
// The same without a table in device memory: the list travels in the kernel's parameters. So there is nothing to
// upload or to keep alive, and a CUDA graph may capture it; but the host walks the list at every call.
D2V_EXPORT int d2v_launch_ema_list(const EmaTensor* tensors, int64_t count, double weight, const double* device_weight,
                                   int32_t device, void* stream);
// What an error code of the two means.
D2V_EXPORT const char* d2v_cuda_error_text(int code);
}

}  // namespace d2v
