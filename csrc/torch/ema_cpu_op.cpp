// update_ema_ on CPU tensors, and the tensors of plans.
#include <memory>

#include "arguments.h"

namespace d2v {
namespace {

class Tables {
 public:
  explicit Tables(const char* op) : call_(host_call(op)) {}

  void add(const Tensor& average, const Tensor& source, const Tensor* copy) {
    const EmaTensor e = describe_ema(call_, average, source, copy);
    if (e.count == 0) return;
    if (is_flat(average, source, copy)) {
      tensors_.push_back(e);
    } else {
      check_not_overlapping(call_.op, "average", average);
      if (copy) check_not_overlapping(call_.op, "copy", *copy);
      add_strided(e, average, source, copy, 0);
    }
  }
  void add_split(const Tensor& high, const Tensor& low, const Tensor& source) {
    const EmaTensor e = describe_split_ema(call_, high, low, source);
    if (e.count > 0) tensors_.push_back(e);
  }

  void update(double weight, const OptionalTensor& weight_tensor) const {
    if (weight_tensor.has_value()) {
      check_weight(call_, *weight_tensor);
      weight = *weight_tensor->const_data_ptr<double>();
    }
    const int64_t count = static_cast<int64_t>(tensors_.size());
    std::vector<int64_t> first_chunk(static_cast<size_t>(count + 1));
    index_ema_chunks(tensors_.data(), count, first_chunk.data());
    update_ema(tensors_.data(), count, first_chunk.data(), weight, torch_parallel());
  }

 private:
  // Tensors whose layouts differ: runs along the last dimension where all of them are dense there, else single numbers.
  void add_strided(const EmaTensor& e, const Tensor& average, const Tensor& source, const Tensor* copy, int64_t d) {
    const int64_t last = average.dim() - 1, n = d > last ? 1 : average.size(d);
    const int64_t sa = d > last ? 1 : average.stride(d), ss = d > last ? 1 : source.stride(d);
    const int64_t sc = d > last || !copy ? 1 : copy->stride(d);
    if (d > last || (d == last && sa == 1 && ss == 1 && sc == 1)) {
      tensors_.push_back(e);
      tensors_.back().count = n;
      return;
    }
    for (int64_t i = 0; i < n; ++i) {
      EmaTensor at = e;
      at.average = static_cast<char*>(e.average) + i * sa * size_of(e.average_type);
      at.source = static_cast<const char*>(e.source) + i * ss * size_of(e.source_type);
      if (copy) at.copy = static_cast<char*>(e.copy) + i * sc * size_of(e.copy_type);
      add_strided(at, average, source, copy, d + 1);
    }
  }

  Call call_;
  std::vector<EmaTensor> tensors_;
};

}  // namespace

void update_ema_cpu(const std::vector<Tensor>& averages, const std::vector<Tensor>& sources,
                    const std::vector<Tensor>& copies, double weight, const OptionalTensor& weight_tensor) {
  constexpr const char* op = "update_ema_";
  check_ema_lists(op, averages, sources, "copies", copies, false);
  Tables tables(op);
  for (size_t i = 0; i < averages.size(); ++i)
    tables.add(averages[i], sources[i], copies.empty() ? nullptr : &copies[i]);
  tables.update(weight, weight_tensor);
}

void update_split_ema_cpu(const std::vector<Tensor>& high, const std::vector<Tensor>& low,
                          const std::vector<Tensor>& sources, double weight, const OptionalTensor& weight_tensor) {
  constexpr const char* op = "update_split_ema_";
  check_ema_lists(op, high, sources, "low halves", low, true);
  Tables tables(op);
  for (size_t i = 0; i < high.size(); ++i) tables.add_split(high[i], low[i], sources[i]);
  tables.update(weight, weight_tensor);
}

// The tensors of a plan, held, so that a step can look at their addresses without asking Python. What moves a tensor's
// memory (`.data =`, `set_`) changes the object that is held here too; torch refuses to swap a tensor that is held.
struct HeldTensors {
  std::vector<Tensor> tensors;
  std::vector<const void*> addresses;
  std::vector<int64_t> counts;
};

namespace {

const void* address_of(const Tensor& t) {
  void* address = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(t.get(), &address));
  return address;
}

int64_t hold_tensors(const std::vector<Tensor>& tensors) {
  auto held = std::make_unique<HeldTensors>();
  held->tensors = tensors;
  for (const Tensor& t : tensors) {
    held->addresses.push_back(address_of(t));
    held->counts.push_back(t.numel());
  }
  return static_cast<int64_t>(reinterpret_cast<intptr_t>(held.release()));
}

}  // namespace
}  // namespace d2v

extern "C" {
// 1 if one of the tensors has other memory, or more or fewer elements, than when they were taken.
D2V_EXPORT int d2v_tensors_moved(const void* held) {
  const auto* h = static_cast<const d2v::HeldTensors*>(held);
  for (size_t i = 0; i < h->tensors.size(); ++i) {
    if (d2v::address_of(h->tensors[i]) != h->addresses[i] || h->tensors[i].numel() != h->counts[i]) return 1;
  }
  return 0;
}

D2V_EXPORT void d2v_release_tensors(void* held) { delete static_cast<d2v::HeldTensors*>(held); }
}

// For plans alone; without a public twin.
D2V_LIBRARY_FRAGMENT(D2V_NAMESPACE, m) { m.def("hold_tensors(Tensor[] tensors) -> int"); }
D2V_LIBRARY_IMPL(D2V_NAMESPACE, CompositeExplicitAutograd, m) { m.impl("hold_tensors", TORCH_BOX(&d2v::hold_tensors)); }
