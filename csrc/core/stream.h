// Where a launch goes.
#pragma once
#include <stdint.h>

namespace d2v {

struct Stream {
  int32_t device;
  void* stream;  // a cudaStream_t
};

}  // namespace d2v
