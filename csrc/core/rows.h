// What statistics over the channels of a row share, for the files that are compiled once per level.
#pragma once
#include "simd.h"

namespace d2v {
namespace {

template <class A>
D2V_INLINE A median(A a, A b, A c) {
  const A low = a < b ? a : b, high = a < b ? b : a;
  return high < c ? high : (low < c ? c : low);
}

D2V_INLINE float root(float x) { return __builtin_sqrtf(x); }
D2V_INLINE double root(double x) { return __builtin_sqrt(x); }

}  // namespace
}  // namespace d2v
