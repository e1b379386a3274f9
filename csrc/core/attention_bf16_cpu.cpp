// Attention of one head from bf16 tensors with bf16 products, compiled for the levels that have instructions for them.
//
// Weights lie transposed, (keys, queries of a block): a vector has one key and many queries, so that softmax is a loop
// over keys without sums across lanes, and no result depends on the width of a vector. Products are summed in fp32;
// logits, softmax, dropout and their gradient are fp32, weights and the logits' gradient are rounded to bf16 for the
// products that follow. Numbers below 2^-126 count as 0 there. Keys that are not valid are left out from the start.
#include "attention.h"
#include "attention_head.h"
#include "simd.h"
#include "words.h"

namespace d2v {
namespace {

typedef AttentionBf16Sizes Sizes;

// e^x for x that is hardly above 0: 2^n e^r, r within half of ln 2 of 0, by a polynomial of least relative error (1e-7
// before rounding). 0 where the result would not be a normal number.
D2V_INLINE VF exp_weight(VF x) {
  const VF t = x * 0x1.715476p0f + 0x1.8p23f, r = x - (t - 0x1.8p23f) * 0x1.62e430p-1f;  // n in the last bits of t
  VF p = splat(0x1.106284p-7f);
  p = p * r + 0x1.5729f0p-5f;
  p = p * r + 0x1.5557aep-3f;
  p = p * r + 0x1.fffdfcp-2f;
  p = p * (r * r) + r + 1.0f;
#if defined(__AVX512F__)  // the same bits, with one comparison for both ends
  const __mmask16 left = _mm512_cmp_ps_mask(bit_cast<__m512>(x), _mm512_set1_ps(-87.33f), _CMP_NLT_UQ);
  return bit_cast<VF>(_mm512_maskz_scalef_ps(left, bit_cast<__m512>(p), bit_cast<__m512>(t - 0x1.8p23f)));
#else
  const VF y = bit_cast<VF>(bit_cast<VU>(p) + (bit_cast<VU>(t) << 23));
  const VF positive = x < -87.33f ? VF{} : y;
  return x == x ? positive : x;
#endif
}

// x, rounded to fp32: the compiler cannot take it into a fused operation. Forward and backward must agree in every
// logit, or a query with one key has a weight next to 1 instead of 1.
D2V_INLINE VF rounded(VF x) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(x));
#elif defined(__aarch64__)
  __asm__("" : "+w"(x));
#endif
  return x;
}

// The larger one; y where x is NaN.
D2V_INLINE VF larger(VF x, VF y) {
#if defined(__AVX512F__)
  return bit_cast<VF>(_mm512_maskz_max_ps(0xffff, bit_cast<__m512>(x), bit_cast<__m512>(y)));
#else
  return x > y ? x : y;
#endif
}

// ---- columns of weights: one vector of queries, some keys ----

template <bool BIAS>
D2V_INLINE VF logit_at(const Head& head, const Distances& distances, const float* s, int64_t key) {
  const VF x = load<float>(s) * head.scale;
  return rounded(BIAS ? x - distances.from(head.at[key]) * head.slope : x);
}

// Largest logit; with a bias `s` becomes the logits.
template <bool BIAS>
VF largest_of(const Head& head, const Distances& distances, Floats s, int64_t first, int64_t end, VF most) {
  VF other = most;
  int64_t j = first;
  for (; j + 1 < end; j += 2) {
    float *const a = s.data + j * s.row, *const b = a + s.row;
    const VF x = logit_at<BIAS>(head, distances, a, j), y = logit_at<BIAS>(head, distances, b, j + 1);
    most = larger(x, most), other = larger(y, other);
    if (BIAS) store<float>(a, x), store<float>(b, y);
  }
  if (j < end) {
    const VF x = logit_at<BIAS>(head, distances, s.data + j * s.row, j);
    most = larger(x, most);
    if (BIAS) store<float>(s.data + j * s.row, x);
  }
  return larger(most, other);
}

// Weights, not yet divided by their sum, of keys [first, end) as words of two keys; dropped ones are 0. Adds to the
// sum.
template <bool BIAS, bool DROPS>
VF soften(const Head& head, const Distances& distances, Dropout& dropout, Floats s, int64_t first, int64_t end, VF most,
          uint32_t* words, int64_t row, VF sum) {
  // With a bias `s` has the logits already.
  const auto weight = [&](const float* at, int64_t j) {
    return exp_weight((BIAS ? load<float>(at) : logit_at<false>(head, distances, at, j)) - most);
  };
  VF other{};
  for (int64_t j = first; j < end; j += 2, words += row) {
    const float* const at = s.data + j * s.row;
    VF x = weight(at, j), y{};
    if (j + 1 < end) y = weight(at + s.row, j + 1);
    sum += x, other += y;
    if (DROPS) {
      x = dropout.keep(x, head.at[j]);
      if (j + 1 < end) y = dropout.keep(y, head.at[j + 1]);
    }
    const VU both = pair_words(x, y);
    memcpy(words, &both, sizeof(both));
  }
  return sum + other;
}

void clear_rows(WordRows x, int64_t first, int64_t end, int64_t bytes) {
  for (int64_t r = first; r < end; ++r) memset(x.data + r * x.row, 0, static_cast<size_t>(bytes));
}

// ---- forward ----

constexpr int64_t kForwardQueries = Sizes::kForwardQueries, kChunk = Sizes::kChunk;
constexpr int kForwardVectors = static_cast<int>(kForwardQueries) / L;

// Hands out scratch, rows that begin on cache lines.
struct Room {
  uint32_t* next;
  WordRows words(int64_t rows, int64_t stride) {
    uint32_t* const data = next;
    next += rows * stride;
    return {data, stride};
  }
  Floats floats(int64_t rows, int64_t stride) { return {reinterpret_cast<float*>(words(rows, stride).data), stride}; }
};

struct Forward {
  WordRows key, value_t;             // (keys, D / 2), (D, keys / 2)
  WordRows pairs;                    // of the values
  WordRows query, query_t, weights;  // (queries, D / 2), (D / 2, queries), (keys of a chunk / 2, queries)
  Floats s, out_t, out, places;      // (keys, queries), (D, queries), (queries, D)
  int32_t* at;
  Forward(const Sizes& z, void* space) {
    Room room{static_cast<uint32_t*>(space)};
    key = room.words(z.keys, z.width / 2);
    value_t = room.words(z.width, z.keys / 2 + 16);
    pairs = room.words(z.keys / 2, z.width);
    query = room.words(kForwardQueries, z.width / 2);
    query_t = room.words(z.width / 2, kForwardQueries);
    weights = room.words(kChunk / 2, kForwardQueries);
    s = room.floats(z.keys, kForwardQueries);
    out_t = room.floats(z.width, kForwardQueries);
    out = room.floats(kForwardQueries, z.width);
    places = room.floats(2, z.keys + 64);
    at = reinterpret_cast<int32_t*>(room.words(1, z.keys).data);
  }
};

// Rows of keys or values of one head as they are and, unless null, transposed (D, keys / 2), by way of pairs.
void read_keys(const Heads& x, const Head& head, int64_t D, WordRows rows, const WordRows* pairs,
               const WordRows* transposed) {
  const int64_t padded = up(head.count, 32);
  read_rows(x, head.at, 0, head.count, D, padded, rows);
  if (!pairs) return;
  pair_rows(rows, padded, *pairs);
  transpose_words(*pairs, padded / 2, up(D, 16), *transposed);
}

template <bool BIAS, bool DROPS>
void soften_block(const AttentionArgs* a, const Head& head, int64_t query, int64_t rows, const Forward& f, Tiles& tiles,
                  float* factors, float* log_sum) {
  const int64_t count = head.count, width = up(rows, 16);
  VF most[kForwardVectors], sum[kForwardVectors];
  for (int v = 0; v < kForwardVectors; ++v) most[v] = splat(-__builtin_inff()), sum[v] = VF{};
  for (int64_t first = 0; first < count; first += kChunk) {
    const int64_t end = first + kChunk < count ? first + kChunk : count;
    multiply_words(tiles, false, end - first, width, (a->D + 1) / 2, {f.key.data + first * f.key.row, f.key.row},
                   f.query_t, {f.s.data + first * f.s.row, f.s.row});
    for (int64_t v = 0; v * L < width; ++v) {
      const Distances distances(head, BIAS ? query + v * L : 0);
      most[v] = largest_of<BIAS>(head, distances, {f.s.data + v * L, f.s.row}, first, end, most[v]);
    }
  }
  for (VF& m : most) m = m == -__builtin_inff() ? VF{} : m;
  for (int64_t first = 0; first < count; first += kChunk) {
    const int64_t end = first + kChunk < count ? first + kChunk : count, words = (end - first + 1) / 2;
    for (int64_t v = 0; v * L < width; ++v) {
      Dropout dropout(a, head, query + v * L);
      sum[v] = soften<BIAS, DROPS>(head, Distances(head, 0), dropout, {f.s.data + v * L, f.s.row}, first, end, most[v],
                                   f.weights.data + v * L, f.weights.row, sum[v]);
    }
    clear_rows(f.weights, words, up(words, 16), 4 * kForwardQueries);
    multiply_words(tiles, first > 0, a->D, width, words, {f.value_t.data + first / 2, f.value_t.row}, f.weights,
                   f.out_t);
  }
  float sums[kForwardQueries];
  for (int64_t v = 0; v * L < width; ++v) {
    const VF natural = most[v] + log_vector(sum[v]);
    const VF safe = sum[v] == 0.0f ? splat(1.0f) : sum[v], factor = static_cast<float>(a->rescale) / safe;
    store<float>(factors + v * L, sum[v] == 0.0f ? VF{} : factor);
    VF result = sum[v] == 0.0f ? splat(__builtin_inff()) : natural;
    store<float>(sums + v * L, sum[v] == sum[v] ? result : sum[v]);
  }
  transpose_words(as_words(f.out_t), up(a->D, 16), width, as_words(f.out));
  memcpy(log_sum, sums, static_cast<size_t>(rows) * sizeof(float));
}

void attend_block(const AttentionArgs* a, const Head& head, int64_t first, int64_t rows, const Forward& f, Tiles& tiles,
                  uint16_t* out, float* log_sum) {
  read_rows(head_of(a->query, head.n, head.h), nullptr, first, rows, a->D, up(rows, 16), f.query);
  transpose_words(f.query, up(rows, 16), up((a->D + 1) / 2, 16), f.query_t);
  prefetch_next(a, head, first, rows, nullptr);
  float* const sums = log_sum + (head.n * a->H + head.h) * a->T + first;
  float factors[kForwardQueries];
  if (a->slopes) {
    a->drops ? soften_block<true, true>(a, head, first, rows, f, tiles, factors, sums)
             : soften_block<true, false>(a, head, first, rows, f, tiles, factors, sums);
  } else {
    a->drops ? soften_block<false, true>(a, head, first, rows, f, tiles, factors, sums)
             : soften_block<false, false>(a, head, first, rows, f, tiles, factors, sums);
  }
  uint16_t* to = out + ((head.n * a->T + first) * a->H + head.h) * a->D;
  for (int64_t r = 0; r < rows; ++r, to += a->H * a->D)
    write_row(f.out.data + r * f.out.row, factors[r], a->D, a->stream, to);
}

// Results of queries that have no key.
void write_empty(const AttentionArgs* a, const Head& head, int64_t first, int64_t end, uint16_t* out, float* log_sum) {
  for (int64_t i = first; i < end; ++i) {
    memset(out + ((head.n * a->T + i) * a->H + head.h) * a->D, 0, static_cast<size_t>(a->D) * 2);
    log_sum[(head.n * a->H + head.h) * a->T + i] = __builtin_inff();
  }
}

void forward(const AttentionArgs* a, void* out, void* log_sum, int64_t queries, int64_t begin, int64_t end,
             void* space) {
  const Sizes sizes(*a);
  const Forward f(sizes, space);
  const int64_t parts = (a->T + queries - 1) / queries;
  uint16_t* const results = static_cast<uint16_t*>(out);
  float* const sums = static_cast<float*>(log_sum);
  Tiles tiles;
  tiles.begin();
  Head head{};
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t n = piece / parts / a->H, h = piece / parts % a->H, start = piece % parts * queries;
    const int64_t stop = start + queries < a->T ? start + queries : a->T;
    if (piece == begin || start == 0) {
      head = describe_head(a, n, h, f.at, f.places);
      read_keys(head_of(a->value, n, h), head, a->D, f.key, &f.pairs, &f.value_t);
      read_keys(head_of(a->key, n, h), head, a->D, f.key, nullptr, nullptr);
    }
    if (head.count == 0) write_empty(a, head, start, stop, results, sums);
    for (int64_t first = start; head.count > 0 && first < stop; first += kForwardQueries) {
      const int64_t rows = stop - first < kForwardQueries ? stop - first : kForwardQueries;
      attend_block(a, head, first, rows, f, tiles, results, sums);
    }
  }
  tiles.end();
  finish_streaming();
}

// ---- backward ----

constexpr int64_t kBackwardQueries = Sizes::kBackwardQueries;

struct Backward {
  WordRows key, value, key_t;            // (keys, D / 2), the same, (D, keys / 2)
  WordRows pairs;                        // of keys
  WordRows query, query_t, query_pairs;  // (queries, D / 2), (D / 2, queries), (queries / 2, D)
  WordRows grad, grad_t, grad_pairs;     // the same
  WordRows weights, slope, slope_pairs;  // (keys, queries / 2) twice, (keys / 2, queries); slope: gradient of logits
  Floats s, g;                           // (keys, queries)
  Floats of_key, of_value;               // (keys, D)
  Floats of_query_t, of_query, places;   // (D, queries), (queries, D)
  int32_t* at;
  Backward(const Sizes& z, void* space) {
    Room room{static_cast<uint32_t*>(space)};
    key = room.words(z.keys, z.width / 2);
    value = room.words(z.keys, z.width / 2);
    key_t = room.words(z.width, z.keys / 2 + 16);
    pairs = room.words(z.keys / 2, z.width);
    query = room.words(kBackwardQueries, z.width / 2);
    query_t = room.words(z.width / 2, kBackwardQueries);
    query_pairs = room.words(kBackwardQueries / 2, z.width);
    grad = room.words(kBackwardQueries, z.width / 2);
    grad_t = room.words(z.width / 2, kBackwardQueries);
    grad_pairs = room.words(kBackwardQueries / 2, z.width);
    weights = room.words(z.keys, kBackwardQueries / 2);
    slope = room.words(z.keys, kBackwardQueries / 2);
    slope_pairs = room.words(z.keys / 2, kBackwardQueries);
    s = room.floats(z.keys, kBackwardQueries);
    g = room.floats(z.keys, kBackwardQueries);
    of_key = room.floats(z.keys, z.width);
    of_value = room.floats(z.keys, z.width);
    of_query_t = room.floats(z.width, kBackwardQueries);
    of_query = room.floats(kBackwardQueries, z.width);
    places = room.floats(2, z.keys + 64);
    at = reinterpret_cast<int32_t*>(room.words(1, z.keys).data);
  }
};

// One vector of queries. Logits `s` to weights, and the gradient `g` of dropped weights to that of weights; dropped
// weights go to `weights`. Returns what softmax subtracts, summed over the keys as in attention_cpu.cpp.
template <bool BIAS, bool DROPS>
VF weigh(const AttentionArgs* a, const Head& head, int64_t query, VF log_sum, Floats s, Floats g, WordRows weights,
         int64_t at) {
  const float rescale = static_cast<float>(a->rescale);
  const Distances distances(head, BIAS ? query : 0);
  Dropout dropout(a, head, query);
  VF sum{};
  for (int64_t j = 0; j < head.count; ++j) {
    float *const to = s.data + j * s.row, *const of = g.data + j * g.row;
    const VF p = exp_weight(logit_at<BIAS>(head, distances, to, j) - log_sum);
    VF upstream = load<float>(of);
    VF left = p;
    if (DROPS) {
      left = dropout.keep(p, head.at[j]) * rescale;
      upstream = dropout.keep(upstream, head.at[j]) * rescale;
    }
    sum += p * upstream;
    store<float>(to, p), store<float>(of, upstream);
    const VH numbers = to_bf16(left);
    memcpy(reinterpret_cast<uint16_t*>(weights.data + j * weights.row) + at, &numbers, sizeof(numbers));
  }
  return sum;
}

// Then the gradient of the logits, as rows of keys and as words of two keys. Returns its sum over keys times distance.
template <bool BIAS>
VF differentiate(const Head& head, int64_t query, VF delta, const Backward& b, int64_t at) {
  const Distances distances(head, BIAS ? query : 0);
  VF along{};
  for (int64_t j = 0; j < head.count; j += 2) {
    const bool two = j + 1 < head.count;
    const float *const p = b.s.data + j * b.s.row + at, *const g = b.g.data + j * b.g.row + at;
    const VF x = load<float>(p) * (load<float>(g) - delta);
    const VF y = two ? load<float>(p + b.s.row) * (load<float>(g + b.g.row) - delta) : VF{};
    if (BIAS) along += x * distances.from(head.at[j]);
    if (BIAS && two) along += y * distances.from(head.at[j + 1]);
    uint16_t* const rows = reinterpret_cast<uint16_t*>(b.slope.data + j * b.slope.row) + at;
    store_two(x, y, rows, rows + 2 * b.slope.row, b.slope_pairs.data + j / 2 * b.slope_pairs.row + at);
  }
  return along;
}

// Columns from `first` to the next multiple of 16 become 0: beyond the last query a NaN or an infinity of a key would
// not.
void clear_columns(Floats x, int64_t rows, int64_t first) {
  const size_t bytes = static_cast<size_t>(up(first, 16) - first) * sizeof(float);
  for (int64_t r = 0; bytes && r < rows; ++r) memset(x.data + r * x.row + first, 0, bytes);
}

template <bool BIAS, bool DROPS>
double differentiate_columns(const AttentionArgs* a, const Head& head, const LogSums& sums, int64_t first, int64_t rows,
                             const Backward& b) {
  const float* const log_sum = static_cast<const float*>(sums.data) + head.n * sums.row + head.h * sums.head;
  float sum[kBackwardQueries] = {};
  for (int64_t r = 0; r < rows; ++r) sum[r] = log_sum[(first + r) * sums.token];
  clear_columns(b.s, head.count, rows), clear_columns(b.g, head.count, rows);
  double of_slope = 0;
  for (int64_t at = 0; at < up(rows, 16); at += L) {
    const VF delta = weigh<BIAS, DROPS>(a, head, first + at, load<float>(sum + at), {b.s.data + at, b.s.row},
                                        {b.g.data + at, b.g.row}, b.weights, at);
    const VF along = differentiate<BIAS>(head, first + at, delta, b, at);
    for (int i = 0; BIAS && i < L; ++i) of_slope -= static_cast<double>(along[i]);
  }
  return of_slope;
}

// Queries, or the gradient of their results: rows, words of two columns, words of two rows.
void read_queries(const Heads& x, int64_t first, int64_t rows, int64_t D, WordRows whole, WordRows transposed,
                  WordRows pairs) {
  read_rows(x, nullptr, first, rows, D, up(rows, 32), whole);
  transpose_words(whole, up(rows, 16), up((D + 1) / 2, 16), transposed);
  pair_rows(whole, up(rows, 32), pairs);
}

// A block of queries: adds to the gradients of keys and values, writes that of the queries, returns the slope's part.
double differentiate_block(const AttentionArgs* a, const AttentionGradient* gradient, const Head& head, int64_t first,
                           int64_t rows, const Backward& b, Tiles& tiles) {
  const int64_t D = a->D, count = head.count, width = up(rows, 16);
  read_queries(head_of(a->query, head.n, head.h), first, rows, D, b.query, b.query_t, b.query_pairs);
  read_queries(head_of(gradient->grad, head.n, head.h), first, rows, D, b.grad, b.grad_t, b.grad_pairs);
  prefetch_next(a, head, first, rows, &gradient->grad);
  multiply_words(tiles, false, count, width, (D + 1) / 2, b.key, b.query_t, b.s);
  multiply_words(tiles, false, count, width, (D + 1) / 2, b.value, b.grad_t, b.g);
  const LogSums& sums = gradient->log_sum;
  const double of_slope = a->slopes ? (a->drops ? differentiate_columns<true, true>(a, head, sums, first, rows, b)
                                                : differentiate_columns<true, false>(a, head, sums, first, rows, b))
                                    : (a->drops ? differentiate_columns<false, true>(a, head, sums, first, rows, b)
                                                : differentiate_columns<false, false>(a, head, sums, first, rows, b));
  const int64_t words = (count + 1) / 2, queries = up(rows, 32);
  clear_rows(b.slope_pairs, words, up(words, 16), 4 * kBackwardQueries);
  if (width < queries) {  // what a product reads beyond the last query
    clear_rows({b.weights.data + width / 2, b.weights.row}, 0, count, 32);
    clear_rows({b.slope.data + width / 2, b.slope.row}, 0, count, 32);
  }
  multiply_words(tiles, first > 0, count, D, (rows + 1) / 2, b.weights, b.grad_pairs, b.of_value);
  multiply_words(tiles, first > 0, count, D, (rows + 1) / 2, b.slope, b.query_pairs, b.of_key);
  multiply_words(tiles, false, D, width, words, b.key_t, b.slope_pairs, b.of_query_t);
  transpose_words(as_words(b.of_query_t), up(D, 16), width, as_words(b.of_query));
  uint16_t* to = static_cast<uint16_t*>(gradient->of_query) + ((head.n * a->T + first) * a->H + head.h) * D;
  for (int64_t r = 0; r < rows; ++r, to += a->H * D) {
    write_row(b.of_query.data + r * b.of_query.row, static_cast<float>(a->scale), D, a->stream, to);
  }
  return of_slope;
}

// Gradients of keys or values; zeros for tokens that are no key.
void write_keys(const AttentionArgs* a, const Head& head, Floats x, float factor, void* data) {
  uint16_t* to = static_cast<uint16_t*>(data) + (head.n * a->T * a->H + head.h) * a->D;
  for (int64_t t = 0, j = 0; t < a->T; ++t, to += a->H * a->D) {
    if (j < head.count && head.at[j] == t) {
      write_row(x.data + j++ * x.row, factor, a->D, a->stream, to);
    } else {
      memset(to, 0, static_cast<size_t>(a->D) * 2);
    }
  }
}

void backward(const AttentionArgs* a, const AttentionGradient* gradient, int64_t begin, int64_t end, void* space) {
  const Sizes sizes(*a);
  const Backward b(sizes, space);
  Tiles tiles;
  tiles.begin();
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / a->H, h = unit % a->H;
    const Head head = describe_head(a, n, h, b.at, b.places);
    read_keys(head_of(a->value, n, h), head, a->D, b.value, nullptr, nullptr);
    read_keys(head_of(a->key, n, h), head, a->D, b.key, &b.pairs, &b.key_t);
    double of_slope = 0;
    if (head.count == 0) {
      uint16_t* to = static_cast<uint16_t*>(gradient->of_query) + (n * a->T * a->H + h) * a->D;
      for (int64_t t = 0; t < a->T; ++t, to += a->H * a->D) memset(to, 0, static_cast<size_t>(a->D) * 2);
    }
    for (int64_t first = 0; head.count > 0 && first < a->T; first += kBackwardQueries) {
      const int64_t rows = a->T - first < kBackwardQueries ? a->T - first : kBackwardQueries;
      of_slope += differentiate_block(a, gradient, head, first, rows, b, tiles);
    }
    if (gradient->of_slopes) gradient->of_slopes[unit] = of_slope;
    write_keys(a, head, b.of_key, static_cast<float>(a->scale), gradient->of_key);
    write_keys(a, head, b.of_value, 1.0f, gradient->of_value);
  }
  tiles.end();
  finish_streaming();
}

}  // namespace

extern const AttentionKernels D2V_TABLE(attention_bf16_kernels);
const AttentionKernels D2V_TABLE(attention_bf16_kernels) = {forward, backward};

}  // namespace d2v
