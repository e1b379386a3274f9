// The average's inner loop, compiled once per instruction level.
#include "ema.h"
#include "simd.h"

namespace d2v {
namespace {

struct NoCopy {};

// The average as it reads back from memory; for fp32 and fp64 that is the number itself.
template <class A, class T>
D2V_INLINE Vec<A> as_stored(Vec<A> v) {
  if (sizeof(T) == sizeof(A)) return v;
  T lanes[kLanes<A>];
  store<A>(lanes, v);
  return load<A>(lanes);
}

template <class TA, class TS, class TC, bool UPDATE, bool STREAM>
D2V_INLINE void step_vector(TA* average, const TS* source, TC* copy, Acc<TA> w, int64_t i) {
  typedef Acc<TA> A;
  Vec<A> a = load<A>(average + i);
  if constexpr (UPDATE) {
    a += (load<A>(source + i) - a) * w;
    store<A>(average + i, a);
  }
  if constexpr (!__is_same(TC, NoCopy)) {
    const Vec<A> stored = UPDATE ? as_stored<A, TA>(a) : a;
    if constexpr (STREAM) {
      Convert<A, TC>::stream(copy + i, stored);
    } else {
      store<A>(copy + i, stored);
    }
  }
}

template <class TA, class TS, class TC, bool UPDATE>
void step(TA* average, const TS* source, TC* copy, int64_t n, double weight) {
  typedef Acc<TA> A;
  constexpr int L = kLanes<A>;
  const A w = static_cast<A>(weight);
  int64_t i = 0;
  if constexpr (!__is_same(TC, NoCopy)) {
    if (is_aligned(copy, 64)) {
      for (; i + 2 * L <= n; i += 2 * L) {  // two: a whole line of a 16-bit copy
        step_vector<TA, TS, TC, UPDATE, true>(average, source, copy, w, i);
        step_vector<TA, TS, TC, UPDATE, true>(average, source, copy, w, i + L);
      }
      finish_streaming();
    }
  }
  for (; i + L <= n; i += L) step_vector<TA, TS, TC, UPDATE, false>(average, source, copy, w, i);
  for (; i < n; ++i) {
    TA stored = average[i];
    if constexpr (UPDATE) {
      const A a = static_cast<A>(widen(stored));
      stored = narrow<TA>(a + (static_cast<A>(widen(source[i])) - a) * w);
      average[i] = stored;
    }
    if constexpr (!__is_same(TC, NoCopy)) copy[i] = narrow<TC>(static_cast<A>(widen(stored)));
  }
}

template <class TA, class TS, class TC>
void step_piece(const EmaTensor* e, TC* copy, int64_t begin, int64_t n, double weight) {
  TA* average = static_cast<TA*>(e->average) + begin;
  const TS* source = static_cast<const TS*>(e->source) + begin;
  if (weight != 0) {
    step<TA, TS, TC, true>(average, source, copy, n, weight);
  } else if constexpr (!__is_same(TC, NoCopy)) {
    step<TA, TS, TC, false>(average, source, copy, n, weight);
  }
}

template <class TA, class TS>
void with_copy(const EmaTensor* e, int64_t begin, int64_t n, double weight) {
  if (e->copy_type == kNone) return step_piece<TA, TS>(e, static_cast<NoCopy*>(nullptr), begin, n, weight);
  with_type(e->copy_type, [&](auto zero) {
    typedef decltype(zero) TC;
    step_piece<TA, TS>(e, static_cast<TC*>(e->copy) + begin, begin, n, weight);
  });
}

void update(const EmaTensor* e, int64_t begin, int64_t end, double weight) {
  if (e->average_type == kFloat64) return with_copy<double, double>(e, begin, end - begin, weight);
  with_type(e->average_type, [&](auto average) {
    with_type(e->source_type, [&](auto source) {
      typedef decltype(average) TA;
      typedef decltype(source) TS;
      if constexpr (!__is_same(TA, double) && !__is_same(TS, double)) with_copy<TA, TS>(e, begin, end - begin, weight);
    });
  });
}

}  // namespace

extern const EmaKernels D2V_TABLE(ema_kernels);
const EmaKernels D2V_TABLE(ema_kernels) = {update};

}  // namespace d2v
