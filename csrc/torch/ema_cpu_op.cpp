// update_ema_ on CPU tensors, and the tensors of plans.
#include <memory>

#include "../core/ema.h"
#include "common.h"

namespace d2v {
namespace {

constexpr const char* kOp = "update_ema_";

class Tables {
 public:
  void add(const Tensor& average, const Tensor& source, const Tensor* copy) {
    EmaTensor e{};
    e.average_type = element_type(kOp, "average", average);
    e.source_type = element_type(kOp, "source", source);
    e.copy_type = copy ? element_type(kOp, "copy", *copy) : kNone;
    STD_TORCH_CHECK(e.average_type == kFloat64 ? e.source_type == kFloat64 : e.source_type != kFloat64, kOp,
                    ": dtypes: expected float64 for both of average and source or for neither");
    check(average, average, "average");
    check(average, source, "source");
    if (copy) check(average, *copy, "copy");
    if (average.numel() == 0) return;
    e.average = average.mutable_data_ptr();
    e.source = source.const_data_ptr();
    e.copy = copy ? copy->mutable_data_ptr() : nullptr;
    if (is_dense(average) && same_layout(average, source) && (!copy || same_layout(average, *copy))) {
      e.count = average.numel();
      tensors_.push_back(e);
    } else {
      add_strided(e, average, source, copy, 0);
    }
  }
  const std::vector<EmaTensor>& tensors() const { return tensors_; }

 private:
  static void check(const Tensor& average, const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.is_cpu(), kOp, ": ", name, ": expected a tensor on the CPU");
    STD_TORCH_CHECK(t.dim() == average.dim(), kOp, ": ", name, ": expected ", average.dim(), " dimensions, got ",
                    t.dim());
    for (int64_t d = 0; d < t.dim(); ++d) check_size(kOp, name, average.size(d), t.size(d));
  }

  // Tensors whose layouts differ: runs along the last dimension where all of them are dense there, else single numbers.
  void add_strided(const EmaTensor& e, const Tensor& average, const Tensor& source, const Tensor* copy, int64_t d) {
    const int64_t last = average.dim() - 1, n = d > last ? 1 : average.size(d);
    if (d > last) {
      tensors_.push_back(e);
      tensors_.back().count = 1;
      return;
    }
    const int64_t sa = average.stride(d), ss = source.stride(d), sc = copy ? copy->stride(d) : 1;
    if (d == last && sa == 1 && ss == 1 && sc == 1) {
      tensors_.push_back(e);
      tensors_.back().count = n;
      return;
    }
    STD_TORCH_CHECK(n == 1 || (sa != 0 && (!copy || sc != 0)), kOp,
                    ": average and copy: expected tensors without overlapping elements");
    for (int64_t i = 0; i < n; ++i) {
      EmaTensor at = e;
      at.average = static_cast<char*>(e.average) + i * sa * size_of(e.average_type);
      at.source = static_cast<const char*>(e.source) + i * ss * size_of(e.source_type);
      if (copy) at.copy = static_cast<char*>(e.copy) + i * sc * size_of(e.copy_type);
      add_strided(at, average, source, copy, d + 1);
    }
  }

  std::vector<EmaTensor> tensors_;
};

}  // namespace

void update_ema_cpu(const std::vector<Tensor>& averages, const std::vector<Tensor>& sources,
                    const std::vector<Tensor>& copies, double weight, const OptionalTensor& weight_tensor) {
  check_size(kOp, "number of sources", static_cast<int64_t>(averages.size()), static_cast<int64_t>(sources.size()));
  STD_TORCH_CHECK(copies.empty() || copies.size() == averages.size(), kOp, ": number of copies: expected ",
                  averages.size(), ", got ", copies.size());
  if (weight_tensor.has_value()) {
    check_dims(kOp, "weight", *weight_tensor, 0);
    STD_TORCH_CHECK(weight_tensor->scalar_type() == ScalarType::Double, kOp, ": dtype of weight: expected float64");
    weight = *weight_tensor->const_data_ptr<double>();
  }
  Tables tables;
  for (size_t i = 0; i < averages.size(); ++i)
    tables.add(averages[i], sources[i], copies.empty() ? nullptr : &copies[i]);
  const int64_t count = static_cast<int64_t>(tables.tensors().size());
  std::vector<int64_t> first_chunk(static_cast<size_t>(count + 1));
  index_ema_chunks(tables.tensors().data(), count, first_chunk.data());
  update_ema(tables.tensors().data(), count, first_chunk.data(), weight, torch_parallel());
}

// The tensors of a plan, held, so that a step can look at their addresses without asking Python. What moves a tensor's
// memory (`.data =`, `set_`) changes the object that is held here too; torch refuses to swap a tensor that is held.
struct HeldTensors {
  std::vector<Tensor> tensors;
  std::vector<const void*> addresses;
};

namespace {

const void* address_of(const Tensor& t) {
  void* address = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(t.get(), &address));
  return address;
}

int64_t hold_tensors(const std::vector<Tensor>& tensors) {
  auto held = std::make_unique<HeldTensors>();
  held->tensors = tensors;
  for (const Tensor& t : tensors) held->addresses.push_back(address_of(t));
  return static_cast<int64_t>(reinterpret_cast<intptr_t>(held.release()));
}

}  // namespace
}  // namespace d2v

extern "C" {
// 1 if the memory of one of the tensors lies elsewhere than when they were taken.
D2V_EXPORT int d2v_tensors_moved(const void* held) {
  const auto* h = static_cast<const d2v::HeldTensors*>(held);
  for (size_t i = 0; i < h->tensors.size(); ++i) {
    if (d2v::address_of(h->tensors[i]) != h->addresses[i]) return 1;
  }
  return 0;
}

D2V_EXPORT void d2v_release_tensors(void* held) { delete static_cast<d2v::HeldTensors*>(held); }
}

// For plans alone; without a public twin.
STABLE_TORCH_LIBRARY_FRAGMENT(d2v_native, m) { m.def("hold_tensors(Tensor[] tensors) -> int"); }
STABLE_TORCH_LIBRARY_IMPL(d2v_native, CompositeExplicitAutograd, m) {
  m.impl("hold_tensors", TORCH_BOX(&d2v::hold_tensors));
}
