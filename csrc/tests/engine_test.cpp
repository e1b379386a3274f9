// The engine's own tests. Without an argument: kernels that are right, in several orders, must give their results and
// no report from any sanitizer. With the name of a defect: a kernel that has it, which must be reported.
#include "engine/engine.h"

#include <algorithm>
#include <memory>
// The engine comes first.
#include "../core/async.cuh"
#include "../core/vec.cuh"
#include "engine_bulk.h"

using d2v::launch;
namespace engine = d2v::engine;

namespace {

constexpr unsigned kAll = 0xffffffffu;

void expect(bool condition, const char* what) {
  if (condition) return;
  printf("failed: %s (order %d)\n", what, static_cast<int>(engine::options().order));
  std::exit(1);
}

// ---- kernels that are right ----

__global__ void add_indices(int* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] += 1;
}

__global__ void shuffle_halves(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  out[lane] = lane < 16 ? __shfl_xor_sync(0xffffu, lane, 1) : __shfl_down_sync(0xffff0000u, lane, 1, 16);
}

__global__ void shuffle_groups(int* out) {
  out[threadIdx.x] = __shfl_sync(kAll, static_cast<int>(threadIdx.x), 3, 8) +
                     100 * __shfl_up_sync(kAll, static_cast<int>(threadIdx.x), 2);
}

__global__ void vote(unsigned* out) {
  const unsigned lanes = __ballot_sync(kAll, threadIdx.x % 3 == 0);
  const unsigned any = __any_sync(kAll, false), all = __all_sync(kAll, true);
  const int sum = __reduce_add_sync(kAll, static_cast<int>(threadIdx.x));
  const int most = __reduce_max_sync(kAll, static_cast<int>(threadIdx.x % 7));
  if (threadIdx.x == 0) {
    out[0] = lanes;
    out[1] = any + 2 * all;
    out[2] = static_cast<unsigned>(sum);
    out[3] = static_cast<unsigned>(most);
  }
}

__global__ void vote_block(int* out) {
  const int odd = __syncthreads_count(threadIdx.x & 1), any = __syncthreads_or(threadIdx.x == 99);
  const int all = __syncthreads_and(threadIdx.x < 99);
  out[threadIdx.x] = odd * 100 + any * 10 + all;
}

__global__ void return_early(int* out) {
  if (threadIdx.x >= 40) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void reverse_dynamic(int* out) {
  D2V_DYNAMIC_SHARED(int, s);
  s[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = s[blockDim.x - 1 - threadIdx.x];
}

// Lanes hand values on through shared memory; only __syncwarp orders them.
__global__ void pass_in_warp(int* out) {
  D2V_SHARED(int, s, [32]);
  s[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncwarp();
  out[threadIdx.x] = s[31 - threadIdx.x];
}

// ---- kernels with a switch for a defect ----

// Sums 64 numbers twice through the same scratch.
__global__ void sum_twice(const float* x, float* out, bool barrier_after_write, bool barrier_before_reuse) {
  D2V_SHARED(float, scratch, [64]);
  float total = 0;
  for (int pass = 0; pass < 2; ++pass) {
    if (barrier_before_reuse) __syncthreads();
    scratch[threadIdx.x] = x[pass * 64 + threadIdx.x];
    if (barrier_after_write) __syncthreads();
    for (int i = 0; i < 64; ++i) total += scratch[i];
  }
  out[threadIdx.x] = total;
}

__global__ void sum_columns(const float* x, float* out, bool atomic) {
  const float v = x[blockIdx.x * blockDim.x + threadIdx.x];
  if (atomic) {
    atomicAdd(&out[threadIdx.x], v);
  } else {
    out[threadIdx.x] += v;
  }
}

// The block that finishes last adds up what the others left.
__global__ void sum_by_last_block(const float* x, float* partial, unsigned* finished, float* out, bool fence) {
  if (threadIdx.x != 0) return;
  partial[blockIdx.x] = x[blockIdx.x];
  if (fence) __threadfence();
  const bool last = atomicAdd(finished, 1u) == gridDim.x - 1;
  if (!last) return;
  if (fence) __threadfence();
  float total = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) total += partial[i];
  *out = total;
}

__global__ void copy_rows(const float* x, float* out, int n) {
  for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) out[i % 64] = x[i];
}

__global__ void copy_vectors(const float* x, float* out) {
  d2v::store<4>(out + threadIdx.x * 4, d2v::load<4>(x + threadIdx.x * 4));
}

__global__ void index_shared(float* out, int offset) {
  D2V_SHARED(float, s, [32]);
  s[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = s[static_cast<int>(threadIdx.x) + offset];
}

__global__ void barrier_in_both_branches() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void barrier_in_one_branch() {
  if (threadIdx.x < 32) __syncthreads();
}

__global__ void leave_shuffle(float* out) {
  if (threadIdx.x == 5) return;
  out[threadIdx.x] = __shfl_xor_sync(kAll, 1.0f, 1);
}

__global__ void shuffle_outside_mask(float* out) { out[threadIdx.x] = __shfl_xor_sync(1u, 1.0f, 1); }

__global__ void shuffle_at_two_places(float* out) {
  if (threadIdx.x < 16) {
    out[threadIdx.x] = __shfl_xor_sync(kAll, 1.0f, 1);
  } else {
    out[threadIdx.x] = __shfl_xor_sync(kAll, 1.0f, 2);
  }
}

__global__ void take_too_much_shared(char* out) {
  D2V_SHARED(char, s, [300 * 1024]);
  out[0] = s[0];
}

// 48 KiB of dynamic shared memory alone need not be asked for; beside static ones they must be.
constexpr int64_t kWithoutAsking = 48 * 1024;
__global__ void take_both_kinds_of_shared(char* out) {
  D2V_SHARED(char, s, [1024]);
  D2V_DYNAMIC_SHARED(char, more);
  s[threadIdx.x] = more[threadIdx.x] = 1;
  if (threadIdx.x == 0) out[0] = static_cast<char>(s[0] + more[0]);
}

// Doubles STEPS rows of 32 numbers that pass through two buffers: while one is read, the next row arrives in the other.
constexpr int kSteps = 5;
__global__ void double_rows(const float* x, float* out, bool wait, bool read_before_copy, bool own_place) {
  D2V_SHARED(float, buffer, [2][32 * 4]);
  const int lane = static_cast<int>(threadIdx.x), place = own_place ? lane : 31 - lane;
  const auto copy = [&](int step) {
    if (step < kSteps) d2v::copy_async(&buffer[step & 1][lane * 4], x + (step * 32 + lane) * 4);
    d2v::commit_copies();
  };
  copy(0);
  copy(1);
  for (int step = 0; step < kSteps; ++step) {
    if (wait) d2v::wait_copies<1>();
    if (!own_place) __syncthreads();
    if (!read_before_copy) copy(step + 2);
    const d2v::Vec<float, 4> v = d2v::load<4>(&buffer[step & 1][place * 4]);
    if (own_place) __syncthreads();
    if (read_before_copy) copy(step + 2);
    for (int i = 0; i < 4; ++i) out[(step * 32 + place) * 4 + i] = 2 * v.v[i];
  }
}

__global__ void copy_misaligned(const float* x) {
  D2V_SHARED(float, buffer, [8]);
  d2v::copy_async(buffer, x + 1);
}

// ---- running them ----

// On the heap and of the exact size, so that AddressSanitizer sees the end.
template <class T>
std::unique_ptr<T[]> make(size_t n, T value = T()) {
  std::unique_ptr<T[]> p(new T[n]);
  std::fill(p.get(), p.get() + n, value);
  return p;
}

void run_warp_kernels() {
  auto out = make<int>(128);
  auto bits = make<unsigned>(4);
  launch(shuffle_halves, 1, 32, 0, nullptr, out.get());
  for (int i = 0; i < 32; ++i) expect(out[i] == (i < 16 ? i ^ 1 : i == 31 ? 31 : i + 1), "shuffle_halves");
  launch(shuffle_groups, 1, 32, 0, nullptr, out.get());
  for (int i = 0; i < 32; ++i) expect(out[i] == i / 8 * 8 + 3 + 100 * (i < 2 ? i : i - 2), "shuffle_groups");
  launch(vote, 1, 32, 0, nullptr, bits.get());
  expect(bits[0] == 0x49249249u && bits[1] == 2 && bits[2] == 496 && bits[3] == 6, "vote");
  launch(pass_in_warp, 1, 32, 0, nullptr, out.get());
  for (int i = 0; i < 32; ++i) expect(out[i] == 31 - i, "pass_in_warp");
}

void run_block_kernels() {
  auto out = make<int>(192);
  launch(add_indices, dim3(2, 2, 2), dim3(4, 3, 2), 0, nullptr, out.get());
  for (int i = 0; i < 192; ++i) expect(out[i] == 1, "add_indices");
  launch(vote_block, 1, 100, 0, nullptr, out.get());
  expect(out[0] == 5010 && out[99] == 5010, "vote_block");
  launch(return_early, 1, 64, 0, nullptr, out.get());
  expect(out[0] == 1 && out[39] == 1 && out[40] == 5010, "return_early");
  launch(reverse_dynamic, 1, 96, 96 * sizeof(int), nullptr, out.get());
  expect(out[0] == 95 && out[95] == 0, "reverse_dynamic");
}

void run_sum_twice(bool barrier_after_write, bool barrier_before_reuse) {
  auto x = make<float>(128, 1.0f), out = make<float>(64);
  launch(sum_twice, 1, 64, 0, nullptr, x.get(), out.get(), barrier_after_write, barrier_before_reuse);
  const bool right = std::all_of(out.get(), out.get() + 64, [](float v) { return v == 128; });
  if (barrier_after_write) expect(right, "sum_twice");
  if (!right) puts("wrong result: sum_twice");
}

void run_sum_columns(bool atomic) {
  auto x = make<float>(64 * 5, 1.0f), out = make<float>(64);
  launch(sum_columns, 5, 64, 0, nullptr, x.get(), out.get(), atomic);
  expect(out[3] == 5, "sum_columns");
}

void run_sum_by_last_block(bool fence) {
  auto x = make<float>(5, 1.0f), partial = make<float>(5), out = make<float>(1);
  auto finished = make<unsigned>(1);
  launch(sum_by_last_block, 5, 32, 0, nullptr, x.get(), partial.get(), finished.get(), out.get(), fence);
  expect(out[0] == 5, "sum_by_last_block");
}

void run_vectors(int offset) {
  auto x = make<float>(132, 1.0f), out = make<float>(128);
  launch(copy_vectors, 1, 32, 0, nullptr, x.get() + offset, out.get());
  expect(out[127] == 1, "copy_vectors");
}

void run_double_rows(bool wait, bool read_before_copy, bool own_place) {
  constexpr size_t n = kSteps * 32 * 4;
  auto x = make<float>(n, 1.0f), out = make<float>(n);
  launch(double_rows, 1, 32, 0, nullptr, x.get(), out.get(), wait, read_before_copy, own_place);
  const bool right = std::all_of(out.get(), out.get() + n, [](float v) { return v == 2; });
  if (wait && read_before_copy && own_place) expect(right, "double_rows");
  if (!right) puts("wrong result: double_rows");
}

void run_rows(int n) {
  auto x = make<float>(64, 1.0f), out = make<float>(64);
  launch(copy_rows, 1, 32, 0, nullptr, x.get(), out.get(), n);
}

void run_index_shared(int offset) {
  auto out = make<float>(32);
  launch(index_shared, 1, 32, 0, nullptr, out.get(), offset);
}

void run_bulk(const bulk_tests::BulkDefects& with, bool must_be_right) {
  const bool right = bulk_tests::run_tiles(with);
  if (must_be_right) expect(right, "double_tiles");
  if (!right) puts("wrong result: double_tiles");
}

void run_cluster_sum(unsigned ranks, const bulk_tests::ClusterDefects& with, bool must_be_right) {
  const bool right = bulk_tests::run_clusters(ranks, with);
  if (must_be_right) expect(right, "sum_cluster");
  if (!right) puts("wrong result: sum_cluster");
}

void run_everything_right() {
  for (uint64_t order = 0; order < 4; ++order) {
    engine::options().order = order;
    run_warp_kernels();
    run_block_kernels();
    run_sum_twice(true, true);
    run_sum_columns(true);
    run_sum_by_last_block(true);
    run_vectors(0);
    run_double_rows(true, true, true);
    run_rows(64);
    run_index_shared(0);
    run_bulk({}, true);
    expect(bulk_tests::run_edges(), "edges of tiles");
    run_cluster_sum(2, {}, true);
    run_cluster_sum(8, {}, true);
  }
}

// After an error the engine must be usable again.
template <class F>
void report_error(F run) {
  try {
    run();
  } catch (const std::runtime_error& error) {
    printf("engine: %s\n", error.what());
    if (!engine::kThreadSanitizer) run_warp_kernels();  // (the fibers given up would be reported)
    return;
  }
  puts("no error");
}

bool run_defect_of_the_launch(const std::string& name) {
  auto out = make<float>(64);
  auto ints = make<int>(64);
  auto bytes = make<char>(1);
  const auto strictly = [](void (*kernel)()) {
    engine::options().may_return_early = false;
    report_error([&] { launch(kernel, 1, 64, 0, nullptr); });
  };
  const auto in_warp = [&](void (*kernel)(float*)) {
    report_error([&] { launch(kernel, 1, 32, 0, nullptr, out.get()); });
  };
  if (name == "barrier-in-both-branches") {
    report_error([] { launch(barrier_in_both_branches, 1, 64, 0, nullptr); });
  } else if (name == "barrier-not-reached") {
    strictly(barrier_in_one_branch);
  } else if (name == "lane-gone") {
    in_warp(leave_shuffle);
  } else if (name == "lane-outside-mask") {
    in_warp(shuffle_outside_mask);
  } else if (name == "shuffle-at-two-places") {
    in_warp(shuffle_at_two_places);
  } else if (name == "half-a-warp") {
    report_error([&] { launch(shuffle_groups, 1, 16, 0, nullptr, ints.get()); });
  } else if (name == "too-much-shared") {
    report_error([&] { launch(take_too_much_shared, 1, 32, 0, nullptr, bytes.get()); });
  } else if (name == "shared-not-asked-for") {
    report_error([&] { launch(take_both_kinds_of_shared, 1, 32, kWithoutAsking, nullptr, bytes.get()); });
  } else if (name == "too-many-threads") {
    report_error([&] { launch(barrier_in_one_branch, 1, 1025, 0, nullptr); });
  } else if (name == "copy-misaligned") {
    report_error([&] { launch(copy_misaligned, 1, 1, 0, nullptr, out.get()); });
  } else if (name == "grid-too-high") {
    report_error([&] { launch(barrier_in_one_branch, dim3(1, 65536), 32, 0, nullptr); });
  } else {
    return false;
  }
  return true;
}

bool run_defect_of_bulk(const std::string& name) {
  using bulk_tests::kStepBytes, bulk_tests::kSteps;
  auto out = make<float>(2);
  const d2v::LaunchShape pair = {2, 1, 0, 2};
  const auto tiles = [](const bulk_tests::BulkDefects& with) { report_error([&] { bulk_tests::run_tiles(with); }); };
  if (name == "bulk-not-initialised") {
    tiles({false, true, true, kStepBytes, 0, kSteps});
  } else if (name == "bulk-too-few-bytes") {
    tiles({true, true, true, bulk_tests::kTileBytes, 0, kSteps});
  } else if (name == "bulk-not-all-bytes") {
    tiles({true, true, true, kStepBytes - 16, 0, kSteps});
  } else if (name == "bulk-too-many-bytes") {
    tiles({true, true, true, kStepBytes + 16, 0, kSteps});
  } else if (name == "bulk-misaligned") {
    tiles({true, true, true, kStepBytes, 16, kSteps});
  } else if (name == "cluster-block-gone") {
    report_error([&] { launch(bulk_tests::look_at_first_block, pair, nullptr, out.get()); });
  } else if (name == "cluster-block-unknown") {
    report_error([&] { launch(bulk_tests::look_outside_cluster, pair, nullptr, out.get()); });
  } else if (name == "cluster-not-launched") {
    report_error([] { launch(bulk_tests::wait_for_no_cluster, 1, 32, 0, nullptr); });
  } else if (name == "cluster-does-not-divide") {
    report_error([] { launch(bulk_tests::wait_for_no_cluster, d2v::LaunchShape{3, 32, 0, 2}, nullptr); });
  } else if (name == "bulk-not-waited-for") {
    run_bulk({true, false, true, kStepBytes, 0, 2}, false);
  } else if (name == "bulk-overwritten-too-early") {
    tiles({true, true, false, kStepBytes, 0, kSteps});
  } else if (name == "cluster-barrier-missing") {
    run_cluster_sum(2, {false, true}, false);
  } else {
    return false;
  }
  return true;
}

bool run_defect_of_memory(const std::string& name) {
  if (name == "read-past-the-end") {
    run_rows(65);
  } else if (name == "shared-index-too-large") {
    run_index_shared(1);
  } else if (name == "misaligned-vector") {
    run_vectors(1);
  } else if (name == "barrier-missing-after-write") {
    run_sum_twice(false, true);
  } else if (name == "barrier-missing-before-reuse") {
    run_sum_twice(true, false);
  } else if (name == "addition-not-atomic") {
    run_sum_columns(false);
  } else if (name == "fence-missing") {
    run_sum_by_last_block(false);
  } else if (name == "copy-not-waited-for") {
    run_double_rows(false, true, true);
  } else if (name == "buffer-overwritten-too-early") {
    run_double_rows(true, false, true);
  } else if (name == "buffer-of-another-overwritten-too-early") {
    run_double_rows(true, true, false);
  } else {
    return false;
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    run_everything_right();
    puts("all right");
    return 0;
  }
  const std::string name = argv[1];
  if (run_defect_of_the_launch(name) || run_defect_of_bulk(name) || run_defect_of_memory(name)) return 0;
  printf("no such defect: %s\n", argv[1]);
  return 2;
}
