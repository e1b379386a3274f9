// attention and its gradient on CPU tensors.
#include <algorithm>
#include <cmath>

#include "../core/attention.h"
#include "arguments.h"

namespace d2v {
namespace {

// A (N, T, H, D) tensor of the sizes of `like`.
Heads heads_of(const Call& call, const char* name, const Tensor& t, const Tensor& like) {
  call.check(name, t, 4);
  check_last_stride(call.op, name, t);
  for (int d = 0; d < 4; ++d) check_size(call.op, name, like.size(d), t.size(d));
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2), element_type(call.op, name, t)};
}

void check_type(const Call& call, const char* name, const Tensor& t, ScalarType type, const char* words) {
  STD_TORCH_CHECK(t.scalar_type() == type, call.op, ": dtype of ", name, ": expected ", words, ", got type number ",
                  static_cast<int>(t.scalar_type()));
}

void describe_bias(const Call& call, const OptionalTensor& slopes, const OptionalTensor& positions, AttentionArgs* a) {
  STD_TORCH_CHECK(slopes.has_value() == positions.has_value(), call.op,
                  ": slopes and positions: expected both or neither, got one of them");
  if (!slopes.has_value()) return;
  call.check("slopes", *slopes, 1);
  check_size(call.op, "number of slopes", a->H, slopes->size(0));
  check_type(call, "slopes", *slopes, a->wide ? ScalarType::Double : ScalarType::Float, "that of log_sum");
  a->slopes = slopes->const_data_ptr();
  a->slope_stride = slopes->stride(0);
  a->positions = call.index("positions", *positions, 2);
  a->placed = positions->size(1);
  check_size(call.op, "rows of positions", a->N, positions->size(0));
  STD_TORCH_CHECK(a->placed <= a->T, call.op, ": columns of positions: expected at most ", a->T, ", got ", a->placed);
}

void describe_valid(const Call& call, const OptionalTensor& lengths, const OptionalTensor& valid, AttentionArgs* a) {
  if (lengths.has_value()) {
    a->lengths = call.index("lengths", *lengths, 1);
    check_size(call.op, "number of lengths", a->N, lengths->size(0));
  }
  if (!valid.has_value()) return;
  call.check("valid", *valid, 2);
  check_type(call, "valid", *valid, ScalarType::Bool, "bool");
  check_size(call.op, "rows of valid", a->N, valid->size(0));
  check_size(call.op, "columns of valid", a->T, valid->size(1));
  a->valid = static_cast<const uint8_t*>(valid->const_data_ptr());
  a->valid_row = valid->stride(0);
  a->valid_stride = valid->stride(1);
}

void set_dropout(const Call& call, const OptionalTensor& keys, double dropout, AttentionArgs* a) {
  STD_TORCH_CHECK(dropout >= 0 && dropout < 1, call.op, ": dropout: expected 0 or more and less than 1, got ", dropout);
  // Of 256 numbers so many drop a weight; ties to even as in Python.
  const double dropped = std::min(std::nearbyint(dropout * 256), 255.0);
  a->rescale = 1.0 / (1.0 - dropped / 256);
  if (dropout == 0) return;
  STD_TORCH_CHECK(keys.has_value(), call.op, ": dropout keys: expected a tensor where dropout is above 0, got None");
  call.check("dropout keys", *keys, 1);
  check_type(call, "dropout keys", *keys, ScalarType::Long, "int64");
  check_size(call.op, "number of dropout keys", a->N, keys->size(0));
  a->keys = keys->const_data_ptr<int64_t>();
  a->key_stride = keys->stride(0);
  a->drops = dropped > 0;
  a->last_dropped = a->drops ? (static_cast<uint32_t>(dropped) << 24) - 1 : 0;
}

AttentionArgs describe(const Call& call, const Tensor& query, const Tensor& key, const Tensor& value,
                       const OptionalTensor& slopes, const OptionalTensor& positions, const OptionalTensor& lengths,
                       const OptionalTensor& valid, const OptionalTensor& dropout_keys, double dropout, double scale) {
  AttentionArgs a{};
  a.query = heads_of(call, "query", query, query);
  a.key = heads_of(call, "key", key, query);
  a.value = heads_of(call, "value", value, query);
  a.N = query.size(0), a.T = query.size(1), a.H = query.size(2), a.D = query.size(3);
  a.wide = a.query.type == kFloat64;
  a.scale = scale;
  describe_bias(call, slopes, positions, &a);
  describe_valid(call, lengths, valid, &a);
  set_dropout(call, dropout_keys, dropout, &a);
  return a;
}

Tensor new_like(const Tensor& x) { return new_tensor(x, {x.size(0), x.size(1), x.size(2), x.size(3)}); }

}  // namespace

std::tuple<Tensor, Tensor> attention_cpu(const Tensor& query, const Tensor& key, const Tensor& value,
                                         const OptionalTensor& slopes, const OptionalTensor& positions,
                                         const OptionalTensor& lengths, const OptionalTensor& valid,
                                         const OptionalTensor& dropout_keys, double dropout, double scale) {
  const Call call = host_call("attention");
  const AttentionArgs a =
      describe(call, query, key, value, slopes, positions, lengths, valid, dropout_keys, dropout, scale);
  Tensor out = new_like(query);
  Tensor log_sum = new_tensor(query, {a.N, a.H, a.T}, a.wide ? ScalarType::Double : ScalarType::Float);
  attention(a, out.mutable_data_ptr(), log_sum.mutable_data_ptr(), torch_parallel());
  return {out, log_sum};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward_cpu(
    const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
    const Tensor& log_sum, const OptionalTensor& slopes, const OptionalTensor& positions, const OptionalTensor& lengths,
    const OptionalTensor& valid, const OptionalTensor& dropout_keys, double dropout, double scale) {
  const Call call = host_call("attention_backward");
  const AttentionArgs a =
      describe(call, query, key, value, slopes, positions, lengths, valid, dropout_keys, dropout, scale);
  const ScalarType computed = a.wide ? ScalarType::Double : ScalarType::Float;
  call.check("log_sum", log_sum, 3);
  check_type(call, "log_sum", log_sum, computed, "float32, or float64 for float64 queries");
  check_size(call.op, "rows of log_sum", a.N, log_sum.size(0));
  check_size(call.op, "heads of log_sum", a.H, log_sum.size(1));
  check_size(call.op, "tokens of log_sum", a.T, log_sum.size(2));
  AttentionGradient g{};
  g.grad = heads_of(call, "grad", grad, query);
  heads_of(call, "out", out, query);  // checked as the others are; the gradient is exact without it
  g.log_sum = {log_sum.const_data_ptr(), log_sum.stride(0), log_sum.stride(1), log_sum.stride(2)};
  Tensor of_query = new_like(query), of_key = new_like(key), of_value = new_like(value);
  Tensor of_slopes = new_tensor(query, {a.slopes ? a.H : 0}, computed);
  g.of_query = of_query.mutable_data_ptr();
  g.of_key = of_key.mutable_data_ptr();
  g.of_value = of_value.mutable_data_ptr();
  attention_backward(a, g, of_slopes.mutable_data_ptr(), torch_parallel());
  return {of_query, of_key, of_value, of_slopes};
}

}  // namespace d2v
