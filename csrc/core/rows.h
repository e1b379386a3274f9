// What statistics over the channels of a row share, for the files that are compiled once per level.
#pragma once
#include "simd.h"

namespace d2v {
namespace {

// d with the lanes from `lanes` on set to 0.
template <class A>
D2V_INLINE Vec<A> first_lanes(Vec<A> d, int lanes) {
  Vec<A> number;
  for (int i = 0; i < kLanes<A>; ++i) number[i] = static_cast<A>(i);
  return number < static_cast<A>(lanes) ? d : Vec<A>{};
}

template <class A>
D2V_INLINE A median(A a, A b, A c) {
  const A low = a < b ? a : b, high = a < b ? b : a;
  return high < c ? high : (low < c ? c : low);
}

D2V_INLINE float root(float x) { return __builtin_sqrtf(x); }
D2V_INLINE double root(double x) { return __builtin_sqrt(x); }

}  // namespace
}  // namespace d2v
