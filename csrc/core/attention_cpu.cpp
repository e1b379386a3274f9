// Attention of one head, compiled once per instruction level.
//
// A block of queries goes through everything while its weights are in the caches: logits by a matrix product, bias,
// softmax and dropout by rows, and the products that follow. All operands of products lie in scratch, in the computed
// type A, with whole vectors in every row.
#include "attention.h"
#include "noise.h"
#include "product.h"
#include "simd.h"

namespace d2v {
namespace {

static_assert(kQueryBlock % kTileRows == 0, "blocks of whole tiles");

// ---- rows in and out of scratch ----

// One head of a tensor: rows of D elements.
D2V_INLINE Heads head_of(const Heads& x, int64_t n, int64_t h) {
  const int64_t at = n * x.row + h * x.head;
  return {static_cast<const char*>(x.data) + at * size_of(x.type), 0, x.token, 0, x.type};
}

// Rows [first, first + count) times factor. Rows that are no key, where `off` is below 0, become 0: times a weight of 0
// they must not lend a NaN.
template <class A>
void read_rows(const Heads& x, int64_t first, int64_t count, int64_t D, A factor, const A* off, const Matrix<A>& out) {
  with_type(x.type, [&](auto zero) {
    typedef decltype(zero) T;
    for (int64_t r = 0; r < count; ++r) {
      const T* const from = static_cast<const T*>(x.data) + (first + r) * x.token;
      const A weight = off && off[r] < 0 ? A(0) : factor;
      for_vectors<A>(D, [&](auto full, int64_t c, int lanes) {
        const Vec<A> v = load_lanes<A, decltype(full)>(from + c, lanes) * weight;
        store<A>(out.data + r * out.row + c, off && off[r] < 0 ? Vec<A>{} : v);
      });
    }
  });
}

// Rows times a factor each into a contiguous (N, T, H, D) tensor, `stride` elements from token to token.
template <class A>
void write_rows(const Matrix<A>& x, int64_t count, int64_t D, const A* factors, DType type, void* data, int64_t at,
                int64_t stride) {
  with_type(type, [&](auto zero) {
    typedef decltype(zero) T;
    T* out = static_cast<T*>(data) + at;
    for (int64_t r = 0; r < count; ++r, out += stride) {
      for_vectors<A>(D, [&](auto full, int64_t c, int lanes) {
        store_lanes<A, decltype(full)>(out + c, load<A>(x.data + r * x.row + c) * factors[r], lanes);
      });
    }
  });
}

void zero_rows(int64_t count, int64_t D, DType type, void* data, int64_t at, int64_t stride) {
  for (int64_t r = 0; r < count; ++r) {
    zero_row(static_cast<char*>(data) + (at + r * stride) * size_of(type), D * size_of(type), false);
  }
}

// out (D, rows) from x (rows, D), four rows at a time; x has whole vectors of rows.
template <class A>
void transpose(const Matrix<A>& x, int64_t rows, int64_t D, const Matrix<A>& out) {
  for (int64_t r = 0; r < rows; r += 4) {
    const A *const a = x.data + r * x.row, *const b = a + x.row, *const c = b + x.row, *const d = c + x.row;
    for (int64_t k = 0; k < D; ++k) {
      A* const to = out.data + k * out.row + r;
      const A four[4] = {a[k], b[k], c[k], d[k]};
      memcpy(to, four, sizeof(four));
    }
  }
}

// ---- rows of weights ----

template <class V>
D2V_INLINE V select_nan_too(V value, V x) {
  return x == x ? value : x;
}

// e^x: 2^n e^r, r within half of ln 2 of 0, by a polynomial of least relative error (4e-9 before rounding). 0 where the
// result would not be a normal number, infinity where it would be too large.
D2V_INLINE VF exp_vector(VF x) {
  const VF t = x * 0x1.715476p0f + 0x1.8p23f, n = t - 0x1.8p23f;  // n in the last bits of t
  const VF r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  VF p = splat(0x1.6a2256p-10f);
  p = p * r + 0x1.123b02p-7f;
  p = p * r + 0x1.5558f8p-5f;
  p = p * r + 0x1.555490p-3f;
  p = p * r + 0x1.fffffcp-2f;
  p = p * (r * r) + r + 1.0f;
  VF y = bit_cast<VF>(bit_cast<VU>(p) + (bit_cast<VU>(t) << 23));
  y = x < -87.33f ? VF{} : y;
  y = x > 88.72f ? splat(__builtin_inff()) : y;
  return select_nan_too(y, x);
}

// The same with the series up to r^13, whose rest is below 4e-18.
D2V_INLINE VD exp_vector(VD x) {
  const VD t = x * 0x1.71547652b82fep0 + 0x1.8p52, n = t - 0x1.8p52;
  const VD r = (x - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33;  // ln 2 in two parts, n * the first exact
  double factorial = 6227020800.0;
  VD p = splat(1.0 / factorial);
  for (int k = 13; k > 0; --k) {
    factorial /= k;
    p = p * r + 1.0 / factorial;
  }
  VD y = bit_cast<VD>(bit_cast<VU64>(p) + (bit_cast<VU64>(t) << 52));
  y = x < -708.0 ? VD{} : y;
  y = x > 709.7 ? splat(__builtin_inf()) : y;
  return select_nan_too(y, x);
}

// 32-bit numbers, of which the highest eight bits decide, of the weights of one query, keys 0 on (place_of,
// attention.h). A block of 64 keys takes four calls: every row of 8 keys the first or the last two words of each,
// shifted alike.
D2V_INLINE void draw_words(uint32_t* words, int64_t count, uint32_t query, uint32_t head, uint64_t key) {
  typedef uint32_t Eight __attribute__((vector_size(32)));
  typedef uint64_t Pairs __attribute__((vector_size(32)));
  constexpr int L = kLanes<float>, kWords = 2 * L < 16 ? 16 : 2 * L;
  VU64 counter = first_counters();
  for (int64_t first = 0; first < count; first += 4 * kWords) {
    uint32_t drawn[kWords];
    for (int at = 0; at < kWords; at += 2 * L, counter += static_cast<uint64_t>(L / 2)) {
      VU low, high;
      word_pair(philox(counter, query, key, head), &low, &high);
      memcpy(drawn + at, &low, sizeof(low));
      memcpy(drawn + at + L, &high, sizeof(high));
    }
    for (int block = 0; block < kWords / 16; ++block) {
      Pairs a, b;
      memcpy(&a, drawn + 16 * block, sizeof(a));
      memcpy(&b, drawn + 16 * block + 8, sizeof(b));
      const Eight pairs[2] = {bit_cast<Eight>(Pairs{a[0], a[2], b[0], b[2]}),
                              bit_cast<Eight>(Pairs{a[1], a[3], b[1], b[3]})};
      for (int row = 0; row < 8; ++row) {
        const int64_t j = first + 64 * block + 8 * row;
        const Eight numbers = pairs[row % 2] << static_cast<uint32_t>(row / 2 * 8);
        if (j < count) memcpy(words + j, &numbers, sizeof(numbers));
      }
    }
  }
}

// x where the number is above `last`, else 0.
D2V_INLINE VF keep(VF x, const uint32_t* words, uint32_t last) {
  VU w;
  memcpy(&w, words, sizeof(w));
  return w > last ? x : VF{};
}
D2V_INLINE VD keep(VD x, const uint32_t* words, uint32_t last) {
  typedef uint32_t Half __attribute__((vector_size(kVectorBytes / 2)));
  Half w;
  memcpy(&w, words, sizeof(w));
  return __builtin_convertvector(w, VU64) > static_cast<uint64_t>(last) ? x : VD{};
}

// What belongs to the keys of one head; arrays of whole vectors.
template <class A>
struct Keys {
  int64_t count;  // keys from here on are not valid
  A slope;
  A *place, *placed, *off;  // position, 0 for an extra token else 1, below 0 where it is no key
  uint32_t* words;
};

D2V_INLINE int64_t integer_at(const Indices& index, int64_t row, int64_t column) {
  const int64_t at = row * index.row_stride + column * index.stride;
  return index.wide ? static_cast<const int64_t*>(index.data)[at] : static_cast<const int32_t*>(index.data)[at];
}

template <class A>
void describe_keys(const AttentionArgs* a, int64_t n, int64_t h, int64_t columns, Keys<A>* keys) {
  int64_t count = a->T;
  if (a->lengths.data) {
    const int64_t length = integer_at(a->lengths, 0, n);
    count = length < 0 ? 0 : length < count ? length : count;
  }
  keys->count = count;
  const int64_t extra = a->T - a->placed;
  keys->slope = a->slopes ? static_cast<const A*>(a->slopes)[h * a->slope_stride] : A(0);
  for (int64_t j = 0; j < columns; ++j) {
    const bool placed = a->slopes && j >= extra && j < a->T;
    keys->place[j] = placed ? static_cast<A>(integer_at(a->positions, n, j - extra)) : A(0);
    keys->placed[j] = placed ? A(1) : A(0);
    const bool is_key = j < count && (!a->valid || a->valid[n * a->valid_row + j * a->valid_stride]);
    keys->off[j] = is_key ? A(0) : A(-1);
  }
}

// Of query i: whether its logits have a bias, and the numbers that dropout goes by.
template <class A>
D2V_INLINE bool prepare_row(const AttentionArgs* a, const Keys<A>& keys, int64_t n, int64_t h, int64_t i) {
  if (a->drops) {
    draw_words(keys.words, keys.count, static_cast<uint32_t>(i), static_cast<uint32_t>(h),
               static_cast<uint64_t>(a->keys[n * a->key_stride]));
  }
  return a->slopes && i >= a->T - a->placed;
}

template <class A>
D2V_INLINE Vec<A> distance_at(const Keys<A>& keys, A place, int64_t j) {
  return load<A>(keys.placed + j) * magnitude(load<A>(keys.place + j) - place);
}

template <class A, bool BIAS>
D2V_INLINE Vec<A> logit_at(const Keys<A>& keys, const A* s, A place, int64_t j) {
  Vec<A> x = load<A>(s + j);
  if (BIAS) x -= distance_at(keys, place, j) * keys.slope;
  return load<A>(keys.off + j) < A(0) ? splat<A>(-static_cast<A>(__builtin_inf())) : x;
}

// Logits s of one query to weights, not yet divided by their sum; dropped ones are 0. Returns what to multiply with.
template <class A, bool BIAS>
D2V_INLINE A soften_row(const AttentionArgs* a, const Keys<A>& keys, A place, A* s, A* log_sum) {
  constexpr int L = kLanes<A>;
  Vec<A> most = splat<A>(-static_cast<A>(__builtin_inf()));
  for (int64_t j = 0; j < keys.count; j += L) {
    const Vec<A> x = logit_at<A, BIAS>(keys, s, place, j);
    most = x > most ? x : most;  // a NaN comes back from its own exponential
    store<A>(s + j, x);
  }
  A largest = most[0];
  for (int i = 1; i < L; ++i) largest = most[i] > largest ? most[i] : largest;
  if (largest == -static_cast<A>(__builtin_inf())) largest = 0;
  Vec<A> sum{};
  for (int64_t j = 0; j < keys.count; j += L) {
    const Vec<A> e = exp_vector(load<A>(s + j) - largest);
    sum += e;
    store<A>(s + j, a->drops ? keep(e, keys.words + j, a->last_dropped) : e);
  }
  const A total = sum_lanes<A>(sum);
  const bool empty = total == 0;
  *log_sum = empty ? static_cast<A>(__builtin_inf()) : largest + static_cast<A>(__builtin_log(total));
  return empty ? A(0) : static_cast<A>(a->rescale) / total;
}

// Logits s and the gradient g of the dropped weights, of one query, to dropped weights and the gradient of the logits.
// Returns the sum over keys of that gradient times the distance. What softmax subtracts is summed over the keys: the
// product of the result with its gradient is the same but for the result's rounding, which 16 bits make large.
template <class A, bool BIAS>
D2V_INLINE A differentiate_row(const AttentionArgs* a, const Keys<A>& keys, A place, A log_sum, A* s, A* g) {
  constexpr int L = kLanes<A>;
  const A rescale = static_cast<A>(a->rescale);
  Vec<A> sum{}, along{};
  for (int64_t j = 0; j < keys.count; j += L) {
    const Vec<A> p = exp_vector(logit_at<A, BIAS>(keys, s, place, j) - log_sum);
    Vec<A> upstream = load<A>(g + j) * rescale;
    if (a->drops) upstream = keep(upstream, keys.words + j, a->last_dropped);
    upstream = load<A>(keys.off + j) < A(0) ? Vec<A>{} : upstream;
    sum += p * upstream;
    store<A>(s + j, p);
    store<A>(g + j, upstream);
  }
  const A delta = sum_lanes<A>(sum);
  for (int64_t j = 0; j < keys.count; j += L) {
    const Vec<A> p = load<A>(s + j), left = p * rescale;
    const Vec<A> of_logit = load<A>(keys.off + j) < A(0) ? Vec<A>{} : p * (load<A>(g + j) - delta);
    store<A>(s + j, a->drops ? keep(left, keys.words + j, a->last_dropped) : left);
    store<A>(g + j, of_logit);
    if (BIAS) along += of_logit * distance_at(keys, place, j);
  }
  return BIAS ? sum_lanes<A>(along) : A(0);
}

// ---- one head ----

// Hands out scratch.
template <class A>
struct Room {
  A* next;
  Matrix<A> take(int64_t rows, int64_t stride) {
    A* const data = next;
    next += rows * stride;
    return {data, stride};
  }
  Keys<A> take_keys(int64_t columns) {
    A* const data = next;
    next += 4 * columns;
    return {0, A(0), data, data + columns, data + 2 * columns, reinterpret_cast<uint32_t*>(data + 3 * columns)};
  }
};

template <class A>
struct Forward {
  Matrix<A> key_t, value;      // of all keys; _t: (D, keys)
  Matrix<A> query, result, s;  // of a block of queries
  Keys<A> keys;
  Forward(const AttentionSizes& sizes, A* space) {
    Room<A> room{space};
    key_t = room.take(sizes.width, sizes.columns);
    value = room.take(sizes.columns, sizes.width);
    query = room.take(kQueryBlock, sizes.width);
    result = room.take(kQueryBlock, sizes.width);
    s = room.take(kQueryBlock, sizes.columns);
    keys = room.take_keys(sizes.columns);
  }
};

template <class A>
void attend_block(const AttentionArgs* a, int64_t n, int64_t h, int64_t first, int64_t rows, const Forward<A>& f,
                  void* out, A* log_sum) {
  const int64_t D = a->D, token = a->H * D, count = f.keys.count;
  read_rows<A>(head_of(a->query, n, h), first, rows, D, static_cast<A>(a->scale), nullptr, f.query);
  multiply<A>(rows, count, D, {f.query.data, f.query.row, 1}, f.key_t, f.s);
  A factors[kQueryBlock];
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t i = first + r;
    A *const s = f.s.data + r * f.s.row, *const at = log_sum + (n * a->H + h) * a->T + i;
    factors[r] = prepare_row(a, f.keys, n, h, i) ? soften_row<A, true>(a, f.keys, f.keys.place[i], s, at)
                                                 : soften_row<A, false>(a, f.keys, A(0), s, at);
  }
  multiply<A>(rows, D, count, {f.s.data, f.s.row, 1}, f.value, f.result);
  write_rows<A>(f.result, rows, D, factors, a->query.type, out, (n * a->T + first) * token + h * D, token);
}

template <class A>
void forward_of(const AttentionArgs* a, void* out, A* log_sum, int64_t queries, int64_t begin, int64_t end, A* space) {
  const AttentionSizes sizes(*a);
  Forward<A> f(sizes, space);
  const int64_t parts = (a->T + queries - 1) / queries;
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t n = piece / parts / a->H, h = piece / parts % a->H, start = piece % parts * queries;
    if (piece == begin || start == 0) {
      describe_keys(a, n, h, sizes.columns, &f.keys);
      read_rows<A>(head_of(a->key, n, h), 0, f.keys.count, a->D, A(1), f.keys.off, f.value);
      transpose(f.value, f.keys.count, a->D, f.key_t);
      read_rows<A>(head_of(a->value, n, h), 0, f.keys.count, a->D, A(1), f.keys.off, f.value);
    }
    const int64_t stop = start + queries < a->T ? start + queries : a->T;
    for (int64_t first = start; first < stop; first += kQueryBlock) {
      attend_block(a, n, h, first, stop - first < kQueryBlock ? stop - first : kQueryBlock, f, out, log_sum);
    }
  }
}

void forward(const AttentionArgs* a, void* out, void* log_sum, int64_t queries, int64_t begin, int64_t end,
             void* space) {
  if (a->wide) {
    forward_of(a, out, static_cast<double*>(log_sum), queries, begin, end, static_cast<double*>(space));
  } else {
    forward_of(a, out, static_cast<float*>(log_sum), queries, begin, end, static_cast<float*>(space));
  }
}

// Scratch of a head's gradient.
template <class A>
struct Backward {
  Matrix<A> key, key_t, value_t, of_key, of_value;  // of all keys; _t: (D, keys)
  Matrix<A> query, grad, result, s, g;              // of a block of queries
  Keys<A> keys;
  Backward(const AttentionSizes& sizes, A* space) {
    Room<A> room{space};
    key = room.take(sizes.columns, sizes.width);
    key_t = room.take(sizes.width, sizes.columns);
    value_t = room.take(sizes.width, sizes.columns);
    of_key = room.take(sizes.columns, sizes.width);
    of_value = room.take(sizes.columns, sizes.width);
    query = room.take(kQueryBlock, sizes.width);
    grad = room.take(kQueryBlock, sizes.width);
    result = room.take(kQueryBlock, sizes.width);
    s = room.take(kQueryBlock, sizes.columns);
    g = room.take(kQueryBlock, sizes.columns);
    keys = room.take_keys(sizes.columns);
  }
};

// A block of queries: adds to the gradients of keys and values, writes that of the queries, returns the slope's part.
template <class A>
double differentiate_block(const AttentionArgs* a, const AttentionGradient* gradient, int64_t n, int64_t h,
                           int64_t first, int64_t rows, const Backward<A>& b) {
  const int64_t T = a->T, D = a->D, token = a->H * D, count = b.keys.count;
  read_rows<A>(head_of(a->query, n, h), first, rows, D, static_cast<A>(a->scale), nullptr, b.query);
  read_rows<A>(head_of(gradient->grad, n, h), first, rows, D, A(1), nullptr, b.grad);
  multiply<A>(rows, count, D, {b.query.data, b.query.row, 1}, b.key_t, b.s);
  multiply<A>(rows, count, D, {b.grad.data, b.grad.row, 1}, b.value_t, b.g);
  const LogSums& sums = gradient->log_sum;
  const A* const log_sum = static_cast<const A*>(sums.data) + n * sums.row + h * sums.head + first * sums.token;
  double of_slope = 0;
  A scales[kQueryBlock];
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t i = first + r;
    A *const s = b.s.data + r * b.s.row, *const g = b.g.data + r * b.g.row;
    const A along = prepare_row(a, b.keys, n, h, i)
                        ? differentiate_row<A, true>(a, b.keys, b.keys.place[i], log_sum[r * sums.token], s, g)
                        : differentiate_row<A, false>(a, b.keys, A(0), log_sum[r * sums.token], s, g);
    of_slope -= static_cast<double>(along);
    scales[r] = static_cast<A>(a->scale);
  }
  multiply<A, true>(count, D, rows, {b.s.data, 1, b.s.row}, b.grad, b.of_value);
  multiply<A, true>(count, D, rows, {b.g.data, 1, b.g.row}, b.query, b.of_key);  // the query has its scale
  multiply<A>(rows, D, count, {b.g.data, b.g.row, 1}, b.key, b.result);
  write_rows<A>(b.result, rows, D, scales, a->query.type, gradient->of_query, (n * T + first) * token + h * D, token);
  return of_slope;
}

// Gradients of keys or values: rows of keys, then zeros.
template <class A>
void write_keys(const AttentionArgs* a, const Matrix<A>& x, int64_t count, int64_t at, DType type, void* data) {
  const int64_t token = a->H * a->D;
  A ones[kQueryBlock];
  for (int64_t i = 0; i < kQueryBlock; ++i) ones[i] = A(1);
  for (int64_t j = 0; j < count; j += kQueryBlock) {
    const int64_t rows = count - j < kQueryBlock ? count - j : kQueryBlock;
    write_rows<A>({x.data + j * x.row, x.row}, rows, a->D, ones, type, data, at + j * token, token);
  }
  zero_rows(a->T - count, a->D, type, data, at + count * token, token);
}

template <class A>
void backward_of(const AttentionArgs* a, const AttentionGradient* gradient, int64_t begin, int64_t end, A* space) {
  const AttentionSizes sizes(*a);
  const int64_t T = a->T, D = a->D;
  Backward<A> b(sizes, space);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / a->H, h = unit % a->H, at = n * T * a->H * D + h * D;
    describe_keys(a, n, h, sizes.columns, &b.keys);
    const int64_t count = b.keys.count;
    read_rows<A>(head_of(a->value, n, h), 0, count, D, A(1), b.keys.off, b.key);
    transpose(b.key, count, D, b.value_t);
    read_rows<A>(head_of(a->key, n, h), 0, count, D, A(1), b.keys.off, b.key);
    transpose(b.key, count, D, b.key_t);
    memset(b.of_key.data, 0, static_cast<size_t>(2 * sizes.columns * sizes.width) * sizeof(A));  // of_value follows
    double of_slope = 0;
    for (int64_t first = 0; first < T; first += kQueryBlock) {
      const int64_t rows = T - first < kQueryBlock ? T - first : kQueryBlock;
      of_slope += differentiate_block(a, gradient, n, h, first, rows, b);
    }
    if (gradient->of_slopes) gradient->of_slopes[unit] = of_slope;
    write_keys(a, b.of_key, count, at, a->key.type, gradient->of_key);
    write_keys(a, b.of_value, count, at, a->value.type, gradient->of_value);
  }
}

void backward(const AttentionArgs* a, const AttentionGradient* gradient, int64_t begin, int64_t end, void* space) {
  if (a->wide) {
    backward_of(a, gradient, begin, end, static_cast<double*>(space));
  } else {
    backward_of(a, gradient, begin, end, static_cast<float*>(space));
  }
}

}  // namespace

extern const AttentionKernels D2V_TABLE(attention_kernels);
const AttentionKernels D2V_TABLE(attention_kernels) = {forward, backward};

}  // namespace d2v
