// Bulk copies of tiles from global to shared memory, and clusters of blocks: sm_90 and newer.
//
// A tile is a box of a tensor (samples, time, channels), one sample deep. What lies beyond the tensor arrives as zeros,
// and counts as bytes all the same. Copies complete on a CopyBarrier: each of its phases ends when as many bytes as
// expect_bytes() announced have arrived, and wait_bytes() returns when the phase of the given parity (0 first, then 1,
// then 0 ...) has ended; what has arrived is visible to every thread that waited. Shared memory that was read must not
// be copied to before a barrier of the readers.
//
// Blocks of a cluster see each other's shared memory after a cluster_barrier(), and must not end before the others have
// done with theirs.
#pragma once
#include "device.h"

namespace d2v {

// What tiles are cut from: strides in bytes, multiples of 16 as the address is; a box is `rows` (up to 256) time steps
// of `bytes` bytes.
struct TileSource {
  const void* data;
  int64_t samples, time, channels, sample_stride, time_stride;
  int element_bytes, rows, bytes;
};

}  // namespace d2v

#if defined(__CUDACC__)
#include <cuda.h>

// Older code is compiled without the kernels that need this.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define D2V_HAS_BULK 1
#endif

namespace d2v {

using TileMap = CUtensorMap;
using CopyBarrier = unsigned long long;

// False where the driver does not take the source.
inline bool describe_tiles(const TileSource& s, TileMap* map) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status);
    return error == cudaSuccess && status == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
  }();
  if (!encode) return false;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(s.channels), static_cast<cuuint64_t>(s.time),
                              static_cast<cuuint64_t>(s.samples)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(s.time_stride), static_cast<cuuint64_t>(s.sample_stride)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(s.bytes / s.element_bytes), static_cast<cuuint32_t>(s.rows), 1};
  const cuuint32_t steps[] = {1, 1, 1};
  const CUtensorMapDataType type =
      s.element_bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_UINT16 : CU_TENSOR_MAP_DATA_TYPE_UINT32;
  return encode(map, type, 3, const_cast<void*>(s.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

#if defined(D2V_HAS_BULK)
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// By one thread; a barrier of the block follows.
__device__ __forceinline__ void init_copies(CopyBarrier* barriers, int count) {
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barriers + i)) : "memory");
  }
  // The copy engine must not meet barriers that it cannot see yet.
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// By the thread that copies, before it does.
__device__ __forceinline__ void expect_bytes(CopyBarrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// The box whose first element is (sample, time, channel). `shared` is a multiple of 128.
__device__ __forceinline__ void copy_tile(void* shared, const TileMap* map, int channel, int time, int sample,
                                          CopyBarrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
      "[%5];" ::"r"(shared_address(shared)),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(channel), "r"(time), "r"(sample), "r"(shared_address(barrier))
      : "memory");
}

__device__ __forceinline__ void wait_bytes(CopyBarrier* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// What the block number `rank` of the cluster has where this one has p.
__device__ __forceinline__ float load_peer(const float* p, int rank) {
  float value;
  asm volatile(
      "{\n"
      ".reg .u32 there;\n"
      "mapa.shared::cluster.u32 there, %1, %2;\n"
      "ld.shared::cluster.f32 %0, [there];\n"
      "}\n"
      : "=f"(value)
      : "r"(shared_address(p)), "r"(rank)
      : "memory");
  return value;
}
#endif

}  // namespace d2v
#else
#define D2V_HAS_BULK 1
namespace d2v {
using engine::cluster_barrier;
using engine::copy_tile;
using engine::CopyBarrier;
using engine::expect_bytes;
using engine::init_copies;
using engine::load_peer;
using engine::TileMap;
using engine::wait_bytes;
inline bool describe_tiles(const TileSource& source, TileMap* map) { return engine::encode_tiles(source, map); }
}  // namespace d2v
#endif
