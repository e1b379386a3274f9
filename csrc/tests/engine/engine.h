// Runs CUDA source on the CPU, for tests. A test includes this, then the .cu file, and is compiled by
//
//   g++ -std=c++20 -ftls-model=initial-exec -Wno-unknown-pragmas -isystem $CUDA/include ...
//
// Differences to CUDA source: kernels are started by d2v::launch, shared memory is declared by D2V_SHARED and
// D2V_DYNAMIC_SHARED, large parameters by D2V_PARAMETER; asynchronous copies, bulk copies and what concerns clusters go
// through the functions of csrc/core/async.cuh and bulk.cuh, whose inline assembly the engine replaces.
//
// Modelled: threads, warps, blocks and clusters in orders that a seed shuffles; barriers of a warp, a block, a cluster;
// shuffles and votes; atomics and fences; shared memory, that of a cluster's other blocks too; copies whose bytes move
// when they are waited for, with the byte counts of their barriers.
//
// Not modelled, so that no test on a CPU proves it:
//   - time, bank conflicts, occupancy, registers (what the compiler says of them, tests/codegen asserts);
//   - the inline assembly itself, and the driver's encoding of a tensor's description (its rules are checked);
//   - memory order weaker than happens-before; the fences between ordinary accesses and those of the copy engine (our
//     kernels need one, after the barriers of copies are made ready);
//   - blocks of different clusters at the same time; two barriers of a cluster split into arriving and waiting;
//   - copies to another block, to several blocks, from shared to global memory; tensor cores;
//   - contraction of a * b + c by nvcc, and the device's approximate functions.
// A kernel that uses any of these has a plain form beside it, and that form is what is proved here.
#pragma once
#if defined(__CUDACC__)
#error "the engine is for the host compiler"
#endif
#define D2V_ENGINE 1
#include "names.h"
