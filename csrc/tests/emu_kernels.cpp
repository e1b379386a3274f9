// Every kernel file on top of the engine, as the library d2v_emu.
#include "engine/engine.h"
// The engine comes first: a .cu file takes its names from it.
#include "../core/ema.cu"

extern "C" {
// Order of threads and blocks from now on: 0 ascending, 1 descending, else a shuffle with this seed.
D2V_EXPORT void d2v_emu_set_order(uint64_t order) { d2v::engine::options().order = order; }
}
