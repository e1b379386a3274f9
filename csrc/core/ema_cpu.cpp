// The average's inner loop, compiled once per instruction level.
#include "ema.h"
#include "simd.h"

namespace d2v {
namespace {

constexpr int64_t kBlock = 2048;   // elements that stay in the nearest cache between the update and the copy
constexpr int64_t kLarge = 65536;  // elements of a tensor whose copy has left the caches when it is read

template <class TA, class TS>
void update_block(TA* average, const TS* source, int64_t n, Acc<TA> w) {
  typedef Acc<TA> A;
  constexpr int L = kLanes<A>;
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) {
    const Vec<A> a0 = load<A>(average + i), a1 = load<A>(average + i + L);
    store<A>(average + i, a0 + (load<A>(source + i) - a0) * w);
    store<A>(average + i + L, a1 + (load<A>(source + i + L) - a1) * w);
  }
  for (; i < n; ++i) {
    const A a = static_cast<A>(widen(average[i]));
    average[i] = narrow<TA>(a + (static_cast<A>(widen(source[i])) - a) * w);
  }
}

// stream: past the caches where the address allows: nobody reads the copies before the next forward pass.
template <class TA, class TC>
void copy_block(TC* copy, const TA* average, int64_t n, bool stream) {
  typedef Acc<TA> A;
  constexpr int L = kLanes<A>;
  int64_t i = 0;
  if (stream && is_aligned(copy, 64)) {
    for (; i + 2 * L <= n; i += 2 * L) {  // two: a whole line of a 16-bit copy
      Convert<A, TC>::stream(copy + i, load<A>(average + i));
      Convert<A, TC>::stream(copy + i + L, load<A>(average + i + L));
    }
  }
  for (; i + L <= n; i += L) store<A>(copy + i, load<A>(average + i));
  for (; i < n; ++i) copy[i] = narrow<TC>(static_cast<A>(widen(average[i])));
}

typedef void (*UpdateBlock)(void* average, const void* source, int64_t n, double weight);
typedef void (*CopyBlock)(void* copy, const void* average, int64_t n, bool stream);

template <class TA, class TS>
void update_types(void* average, const void* source, int64_t n, double weight) {
  update_block(static_cast<TA*>(average), static_cast<const TS*>(source), n, static_cast<Acc<TA>>(weight));
}
template <class TA, class TC>
void copy_types(void* copy, const void* average, int64_t n, bool stream) {
  copy_block(static_cast<TC*>(copy), static_cast<const TA*>(average), n, stream);
}

// By average type and source type, in the order of DType; fp64 goes with fp64 alone.
constexpr UpdateBlock kUpdates[kDTypes][kDTypes] = {
    {update_types<float, float>, update_types<float, BF16>, update_types<float, F16>, nullptr},
    {update_types<BF16, float>, update_types<BF16, BF16>, update_types<BF16, F16>, nullptr},
    {update_types<F16, float>, update_types<F16, BF16>, update_types<F16, F16>, nullptr},
    {nullptr, nullptr, nullptr, update_types<double, double>}};
// By average type and copy type.
constexpr CopyBlock kCopies[kDTypes][kDTypes] = {
    {copy_types<float, float>, copy_types<float, BF16>, copy_types<float, F16>, copy_types<float, double>},
    {copy_types<BF16, float>, copy_types<BF16, BF16>, copy_types<BF16, F16>, copy_types<BF16, double>},
    {copy_types<F16, float>, copy_types<F16, BF16>, copy_types<F16, F16>, copy_types<F16, double>},
    {copy_types<double, float>, copy_types<double, BF16>, copy_types<double, F16>, copy_types<double, double>}};

void update(const EmaTensor* e, int64_t begin, int64_t end, double weight) {
  const UpdateBlock update_one = kUpdates[e->average_type][e->source_type];
  const CopyBlock copy_one = e->copy_type == kNone ? nullptr : kCopies[e->average_type][e->copy_type];
  const int64_t a = size_of(e->average_type), s = size_of(e->source_type), c = size_of(e->copy_type);
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t n = end - i < kBlock ? end - i : kBlock;
    char* const average = static_cast<char*>(e->average) + i * a;
    if (weight != 0) update_one(average, static_cast<const char*>(e->source) + i * s, n, weight);
    if (copy_one) copy_one(static_cast<char*>(e->copy) + i * c, average, n, e->count >= kLarge);
  }
}

void finish() { finish_streaming(); }

}  // namespace

extern const EmaKernels D2V_TABLE(ema_kernels);
const EmaKernels D2V_TABLE(ema_kernels) = {update, finish};

}  // namespace d2v
