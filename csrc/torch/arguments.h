// What an operator makes of its tensors, alike on the CPU and on GPUs: checks, addresses, strides.
#pragma once
#include "../core/ema.h"
#include "../core/layers.h"
#include "../core/tokens.h"
#include "common.h"

namespace d2v {

// A call of an operator, and where its tensors must lie.
struct Call {
  const char* op;
  const char* place;  // "the CPU", "CUDA"
  int32_t device;     // of the tensors; below 0: there is but one
  bool (*is_there)(const Tensor&);

  void check(const char* name, const Tensor& t) const {
    STD_TORCH_CHECK(is_there(t) && (device < 0 || t.get_device_index() == device), op, ": ", name,
                    ": expected a tensor on ", place, device < 0 ? "" : " device " + std::to_string(device));
    check_storage(op, name, t);
  }
  void check(const char* name, const Tensor& t, int64_t dims) const {
    STD_TORCH_CHECK(t.dim() == dims, op, ": ", name, ": expected ", dims, " dimensions, got ", t.dim());
    check(name, t);
  }
  Rows3 rows(const char* name, const Tensor& t) const {
    check(name, t, 3);
    check_last_stride(op, name, t);
    return {t.const_data_ptr(), t.stride(0), t.stride(1)};
  }
  Indices index(const char* name, const Tensor& t, int64_t dims) const {
    check(name, t, dims);
    return describe_indices(op, name, t);
  }
};

inline Call host_call(const char* op) {
  return {op, "the CPU", -1, [](const Tensor& t) { return t.is_cpu(); }};
}

// What sums over rows of x are formed in.
inline ScalarType compute_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// ---- average_layers ----

inline Norm norm_of(const char* op, const char* name, const std::string& norm) {
  if (norm == "none") return kNormNone;
  if (norm == "layer") return kNormLayer;
  if (norm == "instance") return kNormInstance;
  STD_TORCH_CHECK(norm == "batch", op, ": ", name, ": expected none, layer, instance or batch, got ", norm);
  return kNormBatch;
}

// Holds what LayersArgs points to.
class LayerArguments {
 public:
  LayerArguments(const Call& call, const std::vector<Tensor>& layers, const OptionalTensor& lengths) : call_(call) {
    const Tensor& first = layers[0];
    for (const Tensor& layer : layers) {
      call.check("layer", layer, 3);
      check_last_stride(call.op, "layer", layer);
      STD_TORCH_CHECK(layer.scalar_type() == first.scalar_type(), call.op, ": layers: expected one dtype");
      for (int d = 0; d < 3; ++d) check_size(call.op, "size of a layer", first.size(d), layer.size(d));
      data_.push_back(layer.const_data_ptr());
      batch_stride_.push_back(layer.stride(0));
      time_stride_.push_back(layer.stride(1));
    }
    if (lengths.has_value()) read_lengths(*lengths, first.size(0), first.size(1));
    cut_ = lengths.has_value();
  }

  LayersArgs describe(const Tensor& first, const std::string& norm, const std::string& out_norm, double eps,
                      const Tensor& out) const {
    const int64_t K = static_cast<int64_t>(data_.size());
    return {data_.data(),
            batch_stride_.data(),
            time_stride_.data(),
            K,
            first.size(0),
            first.size(1),
            first.size(2),
            element_type(call_.op, "layers", first),
            norm_of(call_.op, "norm", norm),
            norm_of(call_.op, "out_norm", out_norm),
            cut_ ? lengths_.data() : nullptr,
            eps,
            out.mutable_data_ptr(),
            element_type(call_.op, "out_dtype", out)};
  }

 private:
  void read_lengths(const Tensor& lengths, int64_t B, int64_t T) {
    check_dims(call_.op, "lengths", lengths, 1);
    check_size(call_.op, "number of lengths", B, lengths.size(0));
    STD_TORCH_CHECK(lengths.scalar_type() == ScalarType::Long, call_.op, ": dtype of lengths: expected int64");
    for (int64_t b = 0; b < B; ++b) {
      lengths_.push_back(lengths.const_data_ptr<int64_t>()[b * lengths.stride(0)]);
      STD_TORCH_CHECK(lengths_.back() >= 0 && lengths_.back() <= T, call_.op, ": lengths: expected 0 to ", T, ", got ",
                      lengths_.back());
    }
  }

  Call call_;
  std::vector<const void*> data_;
  std::vector<int64_t> batch_stride_, time_stride_, lengths_;
  bool cut_ = false;
};

// ---- update_ema_ ----

inline void check_same_shape(const Call& call, const char* name, const Tensor& expected, const Tensor& t) {
  call.check(name, t);
  STD_TORCH_CHECK(t.dim() == expected.dim(), call.op, ": ", name, ": expected ", expected.dim(), " dimensions, got ",
                  t.dim());
  for (int64_t d = 0; d < t.dim(); ++d) check_size(call.op, name, expected.size(d), t.size(d));
}

// Types and addresses; copy may be null.
inline EmaTensor describe_ema(const Call& call, const Tensor& average, const Tensor& source, const Tensor* copy) {
  check_same_shape(call, "average", average, average);
  check_same_shape(call, "source", average, source);
  if (copy) check_same_shape(call, "copy", average, *copy);
  EmaTensor e{};
  e.average_type = element_type(call.op, "average", average);
  e.source_type = element_type(call.op, "source", source);
  e.copy_type = copy ? element_type(call.op, "copy", *copy) : kNone;
  STD_TORCH_CHECK((e.average_type == kFloat64) == (e.source_type == kFloat64), call.op,
                  ": dtypes: expected float64 for both of average and source or for neither");
  e.count = average.numel();
  e.average = average.mutable_data_ptr();
  e.source = source.const_data_ptr();
  e.copy = copy ? copy->mutable_data_ptr() : nullptr;
  return e;
}

// An average in two halves; each tensor one piece of memory, all in one order.
inline EmaTensor describe_split_ema(const Call& call, const Tensor& high, const Tensor& low, const Tensor& source) {
  check_same_shape(call, "high", high, high);
  check_same_shape(call, "low", high, low);
  check_same_shape(call, "source", high, source);
  STD_TORCH_CHECK(high.scalar_type() == ScalarType::BFloat16 && low.scalar_type() == ScalarType::Short, call.op,
                  ": dtypes of high and low: expected bfloat16 and int16");
  const DType source_type = element_type(call.op, "source", source);
  STD_TORCH_CHECK(source_type != kFloat64, call.op, ": dtype of source: expected float32, bfloat16 or float16");
  STD_TORCH_CHECK(is_dense(high) && same_layout(high, low) && same_layout(high, source), call.op,
                  ": layouts: expected high, low and source without gaps and in one order of dimensions");
  return {high.mutable_data_ptr(),
          source.const_data_ptr(),
          low.mutable_data_ptr(),
          high.numel(),
          kSplit,
          source_type,
          kSplit};
}

// One piece of memory each, in one order.
inline bool is_flat(const Tensor& average, const Tensor& source, const Tensor* copy) {
  return is_dense(average) && same_layout(average, source) && (!copy || same_layout(average, *copy));
}

inline void check_not_overlapping(const char* op, const char* name, const Tensor& t) {
  for (int64_t d = 0; d < t.dim(); ++d) {
    STD_TORCH_CHECK(t.size(d) <= 1 || t.stride(d) != 0, op, ": ", name,
                    ": expected a tensor without overlapping elements, got stride 0 in dimension ", d);
  }
}

inline void check_ema_lists(const char* op, const std::vector<Tensor>& averages, const std::vector<Tensor>& sources,
                            const char* copies_name, const std::vector<Tensor>& copies, bool copies_needed) {
  const auto size = [](const std::vector<Tensor>& list) { return static_cast<int64_t>(list.size()); };
  check_size(op, "number of sources", size(averages), size(sources));
  if (copies_needed || !copies.empty()) {
    check_size(op, (std::string("number of ") + copies_name).c_str(), size(averages), size(copies));
  }
}

inline void check_weight(const Call& call, const Tensor& weight) {
  call.check("weight", weight, 0);
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Double, call.op, ": dtype of weight: expected float64");
}

// ---- gather_tokens, restore_tokens ----

inline GatherArgs describe_gather(const Call& call, const Tensor& x, const Tensor& index, int64_t clones) {
  STD_TORCH_CHECK(clones >= 1, call.op, ": clones: expected at least 1, got ", clones);
  const Rows3 rows = call.rows("x", x);
  const Indices at = call.index("index", index, 2);
  check_size(call.op, "rows of index", x.size(0) * clones, index.size(0));
  return {rows, at, index.size(0), index.size(1), clones, x.size(2), element_type(call.op, "x", x), nullptr};
}

inline GatherBackwardArgs describe_gather_backward(const Call& call, const Tensor& grad, const Tensor& index,
                                                   int64_t clones, int64_t tokens) {
  STD_TORCH_CHECK(clones >= 1, call.op, ": clones: expected at least 1, got ", clones);
  STD_TORCH_CHECK(tokens >= 0, call.op, ": tokens: expected 0 or more, got ", tokens);
  const Rows3 rows = call.rows("grad", grad);
  const Indices at = call.index("index", index, 2);
  const int64_t N = index.size(0), n = index.size(1);
  check_size(call.op, "rows of grad", N, grad.size(0));
  check_size(call.op, "columns of grad", n, grad.size(1));
  STD_TORCH_CHECK(N % clones == 0, call.op, ": rows of index: expected a multiple of ", clones, ", got ", N);
  return {rows, at, N, n, clones, tokens, grad.size(2), element_type(call.op, "grad", grad), nullptr};
}

inline void describe_noise(const Call& call, const Tensor& keys, double std, RestoreArgs* a) {
  call.check("noise keys", keys, 1);
  check_size(call.op, "number of noise keys", a->N, keys.size(0));
  STD_TORCH_CHECK(keys.scalar_type() == ScalarType::Long, call.op, ": dtype of noise keys: expected int64");
  a->fill_kind = kFillNoise;
  a->keys = keys.const_data_ptr<int64_t>();
  a->key_stride = keys.stride(0);
  a->noise_std = static_cast<float>(std);
}

inline void describe_fill(const Call& call, const Tensor& fill, RestoreArgs* a) {
  STD_TORCH_CHECK(element_type(call.op, "fill", fill) == a->type, call.op, ": dtype of fill: expected that of kept");
  if (fill.dim() == 1) {
    call.check("fill", fill, 1);
    check_last_stride(call.op, "fill", fill);
    check_size(call.op, "channels of fill", a->C, fill.size(0));
    a->fill_kind = kFillVector;
    a->fill = {fill.const_data_ptr(), 0, 0};
    return;
  }
  a->fill_kind = kFillRows;
  a->fill = call.rows("fill", fill);
  check_size(call.op, "samples of fill", a->N, fill.size(0));
  check_size(call.op, "channels of fill", a->C, fill.size(2));
}

inline RestoreArgs describe_restore(const Call& call, const Tensor& kept, const Tensor& restore,
                                    const OptionalTensor& fill, const OptionalTensor& noise_keys, double noise_std) {
  RestoreArgs a{};
  a.kept = call.rows("kept", kept);
  a.restore = call.index("restore", restore, 2);
  a.type = element_type(call.op, "kept", kept);
  a.N = kept.size(0), a.V = kept.size(1), a.C = kept.size(2), a.T = restore.size(1);
  check_size(call.op, "rows of restore", a.N, restore.size(0));
  STD_TORCH_CHECK(fill.has_value() != noise_keys.has_value(), call.op, ": fill: expected a tensor or noise keys, got ",
                  fill.has_value() ? "both" : "neither");
  if (noise_keys.has_value()) {
    describe_noise(call, *noise_keys, noise_std, &a);
  } else {
    describe_fill(call, *fill, &a);
  }
  return a;
}

inline RestoreBackwardArgs describe_restore_backward(const Call& call, const Tensor& grad, const Tensor& restore,
                                                     int64_t visible, int64_t fill_rows) {
  STD_TORCH_CHECK(visible >= 0, call.op, ": visible: expected 0 or more, got ", visible);
  STD_TORCH_CHECK(fill_rows >= -2, call.op, ": fill_rows: expected -2 or more, got ", fill_rows);
  RestoreBackwardArgs a{};
  a.grad = call.rows("grad", grad);
  a.restore = call.index("restore", restore, 2);
  a.type = element_type(call.op, "grad", grad);
  a.N = grad.size(0), a.T = grad.size(1), a.C = grad.size(2), a.V = visible, a.fill_rows = fill_rows;
  check_size(call.op, "rows of restore", a.N, restore.size(0));
  check_size(call.op, "columns of restore", a.T, restore.size(1));
  return a;
}

// The gradient of the fill, by what fill_rows says it was.
inline Tensor new_fill_gradient(const Tensor& grad, int64_t fill_rows) {
  const int64_t N = grad.size(0), C = grad.size(2);
  return fill_rows == -2   ? new_tensor(grad, {0})
         : fill_rows == -1 ? new_tensor(grad, {C})
                           : new_tensor(grad, {N, fill_rows, C});
}

}  // namespace d2v
