// The token operators on the GPU: tokens.cu, in the library d2v_cuda.
//
// Each function launches on a stream of a device and returns at once: 0, or a cudaError_t (d2v_cuda_error_text of
// ema.h says what it means). Index values stay on the device: one out of range stops the kernel with a device-side
// assertion, as torch's own indexing does. `workspace` is device memory, 16-byte aligned, of the size that the
// function beside it tells.
#pragma once
#include "stream.h"
#include "tokens.h"

namespace d2v {

int launch_gather_tokens(const GatherArgs& args, int64_t tokens, Stream on);

int64_t gather_backward_workspace(const GatherBackwardArgs& args);
int launch_gather_tokens_backward(const GatherBackwardArgs& args, void* workspace, Stream on);

// fill_rows: F of a fill by rows.
int launch_restore_tokens(const RestoreArgs& args, int64_t fill_rows, Stream on);

int64_t restore_backward_workspace(const RestoreBackwardArgs& args);
int launch_restore_tokens_backward(const RestoreBackwardArgs& args, void* workspace, Stream on);

// An index row has fewer columns than this in the two gradients (a position and a flag share 32 bits).
constexpr int64_t kMaxIndexColumns = INT32_MAX;

// ---- launch choice: functions of shapes and addresses alone ----

// Rows are accessed `width` bytes at a time by `lanes` threads each, with `rows_at_once` rows per thread.
struct RowPlan {
  int width;        // 16, 8, 4, 2 or 1
  int64_t vectors;  // accesses in a row
  int lanes;        // a power of two, 1 to 32
  int64_t blocks;
};
constexpr int kTokenThreads = 256;
constexpr int kRowsInFlight = 4;
// `joined` is the bitwise or of all addresses and strides in bytes.
RowPlan plan_rows(int64_t rows, int64_t row_bytes, uint64_t joined, int rows_at_once);

// Rows summed in two stages: `chunks` partial sums of `rows` rows each, then those.
struct SumPlan {
  int64_t chunks, rows;
};
SumPlan plan_sum(int64_t rows);

}  // namespace d2v
