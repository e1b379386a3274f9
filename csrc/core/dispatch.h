// Which instruction level runs.
#pragma once

namespace d2v {

// "base", "avx2", "avx512", "avx512bf16" or "amx": the highest that this machine and D2V_KERNELS_ISA allow.
const char* cpu_isa();

}  // namespace d2v
