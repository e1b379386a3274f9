// Runs CUDA source on the CPU, for tests. A test includes this, then the .cu file, and is compiled by
//
//   g++ -std=c++20 -ftls-model=initial-exec -Wno-unknown-pragmas -isystem $CUDA/include ...
//
// Differences to CUDA source: kernels are started by d2v::launch, shared memory is declared by D2V_SHARED and
// D2V_DYNAMIC_SHARED, large parameters by D2V_PARAMETER. Not modelled: time, bank conflicts, occupancy, memory order
// weaker than happens-before, clusters, bulk copies, tensor cores, contraction of a * b + c by nvcc.
#pragma once
#if defined(__CUDACC__)
#error "the engine is for the host compiler"
#endif
#define D2V_ENGINE 1
#include "names.h"
