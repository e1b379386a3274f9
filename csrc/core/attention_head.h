// What belongs to one head of attention with bf16 products: its keys, its bias, its dropout.
#pragma once
#include "attention.h"
#include "noise.h"
#include "words.h"

namespace d2v {
namespace {

typedef Matrix<float> Floats;
constexpr int L = kLanes<float>;

struct Head {
  int64_t n, h, count;  // keys
  const int32_t* at;    // (count): their tokens
  const float* place;   // (T): positions, 0 for an extra token
  const float* placed;  // (T): 0 for an extra token, else 1
  float scale, slope;   // of logits
  uint64_t dropout_key;
};

D2V_INLINE int64_t integer_at(const Indices& index, int64_t row, int64_t column) {
  const int64_t at = row * index.row_stride + column * index.stride;
  return index.wide ? static_cast<const int64_t*>(index.data)[at] : static_cast<const int32_t*>(index.data)[at];
}

Head describe_head(const AttentionArgs* a, int64_t n, int64_t h, int32_t* at, Floats places) {
  int64_t length = a->T, count = 0;
  if (a->lengths.data) {
    const int64_t wanted = integer_at(a->lengths, 0, n);
    length = wanted < 0 ? 0 : wanted < length ? wanted : length;
  }
  for (int64_t j = 0; j < length; ++j) {
    if (!a->valid || a->valid[n * a->valid_row + j * a->valid_stride]) at[count++] = static_cast<int32_t>(j);
  }
  float *const place = places.data, *const placed = place + places.row;
  const int64_t extra = a->T - a->placed;
  for (int64_t j = 0; a->slopes && j < a->T; ++j) {
    place[j] = j < extra ? 0.0f : static_cast<float>(integer_at(a->positions, n, j - extra));
    placed[j] = j < extra ? 0.0f : 1.0f;
  }
  const float slope = a->slopes ? static_cast<const float*>(a->slopes)[h * a->slope_stride] : 0.0f;
  const float scale = static_cast<float>(a->scale);
  const uint64_t key = a->drops ? static_cast<uint64_t>(a->keys[n * a->key_stride]) : 0;
  return {n, h, count, at, place, placed, scale, slope, key};
}

D2V_INLINE Heads head_of(const Heads& x, int64_t n, int64_t h) {
  const int64_t at = n * x.row + h * x.head;
  return {static_cast<const uint16_t*>(x.data) + at, 0, x.token, 0, x.type};
}

// Distances of the queries of one vector from a key, 0 where either is an extra token.
struct Distances {
  const Head* head;
  VF place, placed;
  Distances(const Head& of, int64_t query) : head(&of) {
    place = load<float>(of.place + query), placed = load<float>(of.placed + query);
  }
  D2V_INLINE VF from(int64_t token) const {
    return magnitude(place - head->place[token]) * (placed * head->placed[token]);
  }
};

// Dropout of the weights of one vector of queries, drawn for 64 keys at once.
class Dropout {
 public:
  Dropout(const AttentionArgs* a, const Head& head, int64_t query)
      : key_(head.dropout_key), head_(static_cast<uint32_t>(head.h)), last_(a->last_dropped) {
    for (int i = 0; i < L / 2; ++i) queries_[i] = static_cast<uint64_t>(query + 2 * i);
  }
  // x where the weight to this token is kept, else 0; tokens ascend.
  D2V_INLINE VF keep(VF x, int64_t token) {
    if (token / 64 != block_) draw(token / 64);
    const DropoutPlace place = place_of(token % 64);
    return (words_[place.counter][place.word] << static_cast<uint32_t>(place.shift)) > last_ ? x : VF{};
  }

 private:
  D2V_INLINE void draw(int64_t block) {
    block_ = block;
    for (int64_t call = 0; call < 4; ++call) {
      const VU64 counter = VU64{} + static_cast<uint64_t>(4 * block + call);
      const Words even = philox(counter, queries_, key_, head_), odd = philox(counter, queries_ + 1, key_, head_);
      words_[call][0] = bit_cast<VU>((even.x0 & 0xffffffffu) | (odd.x0 << 32));
      words_[call][1] = bit_cast<VU>((even.x1 & 0xffffffffu) | (odd.x1 << 32));
      words_[call][2] = bit_cast<VU>((even.x2 & 0xffffffffu) | (odd.x2 << 32));
      words_[call][3] = bit_cast<VU>((even.x3 & 0xffffffffu) | (odd.x3 << 32));
    }
  }
  VU words_[4][4];
  VU64 queries_{};
  uint64_t key_;
  int64_t block_ = -1;
  uint32_t head_, last_;
};

// Rows of the same tokens of the next head.
void prefetch_next(const AttentionArgs* a, const Head& head, int64_t first, int64_t rows, const Heads* grad) {
  const int64_t unit = head.n * a->H + head.h + 1, n = unit / a->H, h = unit % a->H;
  if (n == a->N) return;
  const Heads* const tensors[] = {&a->key, &a->value, &a->query, grad};
  for (const Heads* x : tensors) {
    if (x) prefetch_rows(head_of(*x, n, h), first, rows, a->D);
  }
}

}  // namespace
}  // namespace d2v
