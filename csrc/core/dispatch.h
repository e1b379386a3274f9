// Which instruction level runs.
#pragma once

namespace d2v {

// "base", "avx2" or "avx512": the highest that this machine and D2V_KERNELS_ISA allow.
const char* cpu_isa();

}  // namespace d2v
