// The average's inner loop, compiled once per instruction level.
#include "ema.h"
#include "simd.h"

namespace d2v {
namespace {

constexpr int64_t kBlock = 256;    // elements that stay in the nearest cache between the update and the copy
constexpr int64_t kLarge = 65536;  // elements of a tensor whose copy has left the caches when it is read
constexpr int64_t kAhead = 256;    // elements of halves that are fetched before they are needed

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

// ---- fp32 in two halves ----

typedef int16_t VS __attribute__((vector_size(kVectorBytes / 2)));

// A lane: high << 16 plus low, as bits.
D2V_INLINE VF join(VH high, VS low) {
  return bit_cast<VF>((__builtin_convertvector(high, VU) << 16) + bit_cast<VU>(__builtin_convertvector(low, VI)));
}
D2V_INLINE VU upper_half(VF v) {
  const VU u = bit_cast<VU>(v);
  const VU is_nan = bit_cast<VU>(bit_cast<VI>(u & 0x7fffffffu) > 0x7f800000);
  return (((u + 0x8000u) >> 16) & ~is_nan) | (((u >> 16 & 0x8000u) | 0x7fc0u) & is_nan);
}
D2V_INLINE VU lower_half(VF v, VU high) {
  const VU u = bit_cast<VU>(v);
  const VU is_nan = bit_cast<VU>(bit_cast<VI>(u & 0x7fffffffu) > 0x7f800000);
  return (u - (high << 16)) & ~is_nan;
}

// One vector; fewer elements by way of a whole one.
template <class TS>
D2V_INLINE void update_halves(uint16_t* high, int16_t* low, const TS* source, float w) {
  VH h;
  VS l;
  memcpy(&h, high, sizeof(h));
  memcpy(&l, low, sizeof(l));
  const VF a = join(h, l), updated = a + (load<float>(source) - a) * w;
  const VU upper = upper_half(updated);
  h = __builtin_convertvector(upper, VH);
  l = __builtin_convertvector(bit_cast<VI>(lower_half(updated, upper)), VS);
  memcpy(high, &h, sizeof(h));
  memcpy(low, &l, sizeof(l));
}

// Two vectors. AVX2 widens and narrows lanes in several steps each; unpacking and packing work within 128 bits, and
// what the one has put out of order the other puts back.
template <class TS>
D2V_INLINE void update_two_halves(uint16_t* high, int16_t* low, const TS* source, float w) {
  constexpr int L = kLanes<float>;
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(high));
  const __m256i l = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low));
  // A negative lower half takes 1 from the upper one.
  const __m256i carried = _mm256_add_epi16(h, _mm256_srai_epi16(l, 15));
  const VF a0 = bit_cast<VF>(_mm256_unpacklo_epi16(l, carried)), a1 = bit_cast<VF>(_mm256_unpackhi_epi16(l, carried));
  const __m256 s0 = bit_cast<__m256>(load<float>(source)), s1 = bit_cast<__m256>(load<float>(source + L));
  const VF first = bit_cast<VF>(_mm256_permute2f128_ps(s0, s1, 0x20));
  const VF second = bit_cast<VF>(_mm256_permute2f128_ps(s0, s1, 0x31));
  const VF b0 = a0 + (first - a0) * w, b1 = a1 + (second - a1) * w;
  const __m256i nan = bit_cast<__m256i>((b0 != b0) | (b1 != b1));
  if (_mm256_testz_si256(nan, nan)) {
    const VU u0 = bit_cast<VU>(b0), u1 = bit_cast<VU>(b1), upper0 = (u0 + 0x8000u) >> 16, upper1 = (u1 + 0x8000u) >> 16;
    const __m256i upper = _mm256_packus_epi32(bit_cast<__m256i>(upper0), bit_cast<__m256i>(upper1));
    const __m256i lower = _mm256_packus_epi32(bit_cast<__m256i>(u0 & 0xffffu), bit_cast<__m256i>(u1 & 0xffffu));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(high), upper);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(low), lower);
    return;
  }
#endif
  update_halves(high, low, source, w);
  update_halves(high + L, low + L, source + L, w);
}

template <class TS>
void update_split_block(void* average, void* low, const void* source, int64_t n, double weight) {
  constexpr int L = kLanes<float>;
  uint16_t* const h = static_cast<uint16_t*>(average);
  int16_t* const l = static_cast<int16_t*>(low);
  const TS* const s = static_cast<const TS*>(source);
  const float w = static_cast<float>(weight);
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) {
    __builtin_prefetch(h + i + kAhead, 1);
    __builtin_prefetch(l + i + kAhead, 1);
    __builtin_prefetch(s + i + kAhead);
    update_two_halves(h + i, l + i, s + i, w);
  }
  for (; i + L <= n; i += L) update_halves(h + i, l + i, s + i, w);
  if (i == n) return;
  uint16_t last_high[L] = {};
  int16_t last_low[L] = {};
  TS last_source[L] = {};
  memcpy(last_high, h + i, (n - i) * sizeof(*h));
  memcpy(last_low, l + i, (n - i) * sizeof(*l));
  memcpy(last_source, s + i, (n - i) * sizeof(TS));
  update_halves(last_high, last_low, last_source, w);
  memcpy(h + i, last_high, (n - i) * sizeof(*h));
  memcpy(l + i, last_low, (n - i) * sizeof(*l));
}

typedef void (*UpdateSplit)(void* average, void* low, const void* source, int64_t n, double weight);
// By source type.
constexpr UpdateSplit kSplitUpdates[] = {update_split_block<float>, update_split_block<BF16>, update_split_block<F16>};

void update_split(const EmaTensor* e, int64_t begin, int64_t end, double weight) {
  if (static_cast<float>(weight) == 0) return;
  kSplitUpdates[e->source_type](static_cast<uint16_t*>(e->average) + begin, static_cast<int16_t*>(e->copy) + begin,
                                static_cast<const char*>(e->source) + begin * size_of(e->source_type), end - begin,
                                weight);
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
  if (e->average_type == kSplit) return update_split(e, begin, end, weight);
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
