// update_ema_ on CUDA tensors.
#include "../core/ema.h"
#include "torch_cuda.h"

namespace d2v {
namespace {

constexpr const char* kOp = "update_ema_";

// The list as the kernel takes it: entries of one layout, each one piece of memory.
class EmaArguments {
 public:
  explicit EmaArguments(const Tensor& first) : device_(first.get_device_index()) {}

  void add(const Tensor& average, const Tensor& source, const Tensor* copy) {
    EmaTensor e = describe(average, source, copy);
    if (e.count == 0) return;
    if (is_dense(average) && same_layout(average, source) && (!copy || same_layout(average, *copy))) {
      e.average = average.mutable_data_ptr();
      e.source = source.const_data_ptr();
      e.copy = copy ? copy->mutable_data_ptr() : nullptr;
    } else {
      gather(e, average, source, copy);
    }
    tensors_.push_back(e);
  }

  int32_t device() const { return device_; }
  const std::vector<EmaTensor>& tensors() const { return tensors_; }

  // Results of entries that did not run in place go where they belong.
  void scatter() {
    for (auto& [to, from] : results_) torch::stable::copy_(to, from, true);
  }

 private:
  EmaTensor describe(const Tensor& average, const Tensor& source, const Tensor* copy) const {
    check(average, average, "average");
    check(average, source, "source");
    if (copy) check(average, *copy, "copy");
    EmaTensor e{};
    e.count = average.numel();
    e.average_type = element_type(kOp, "average", average);
    e.source_type = element_type(kOp, "source", source);
    e.copy_type = copy ? element_type(kOp, "copy", *copy) : kNone;
    STD_TORCH_CHECK((e.average_type == kFloat64) == (e.source_type == kFloat64), kOp,
                    ": dtypes: expected float64 for both of average and source or for neither");
    return e;
  }

  void check(const Tensor& average, const Tensor& t, const char* name) const {
    STD_TORCH_CHECK(is_on_device(t) && t.get_device_index() == device_, kOp, ": ", name, ": expected a tensor on ",
                    kDeviceName, " device ", device_);
    STD_TORCH_CHECK(t.dim() == average.dim(), kOp, ": ", name, ": expected ", average.dim(), " dimensions, got ",
                    t.dim());
    for (int64_t d = 0; d < t.dim(); ++d) check_size(kOp, name, average.size(d), t.size(d));
  }

  // Layouts that differ: contiguous stand-ins, two more passes over the entry.
  void gather(EmaTensor& e, const Tensor& average, const Tensor& source, const Tensor* copy) {
    check_written(average, "average");
    const Tensor a = average.is_contiguous() ? average : torch::stable::contiguous(average);
    const Tensor s = torch::stable::contiguous(source);
    e.average = a.mutable_data_ptr();
    e.source = s.const_data_ptr();
    kept_.push_back(s);
    if (!average.is_contiguous()) results_.emplace_back(average, a);
    if (!copy) return;
    check_written(*copy, "copy");
    const Tensor c = copy->is_contiguous() ? *copy : torch::stable::contiguous(*copy);
    e.copy = c.mutable_data_ptr();
    if (!copy->is_contiguous()) results_.emplace_back(*copy, c);
  }

  void check_written(const Tensor& t, const char* name) const {
    for (int64_t d = 0; d < t.dim(); ++d) {
      STD_TORCH_CHECK(t.size(d) <= 1 || t.stride(d) != 0, kOp, ": ", name,
                      ": expected a tensor without overlapping elements, got stride 0 in dimension ", d);
    }
  }

  int32_t device_;
  std::vector<EmaTensor> tensors_;
  std::vector<Tensor> kept_;
  std::vector<std::pair<Tensor, Tensor>> results_;
};

const double* device_weight(const EmaArguments& arguments, const OptionalTensor& weight) {
  if (!weight.has_value()) return nullptr;
  STD_TORCH_CHECK(weight->dim() == 0, kOp, ": weight: expected 0 dimensions, got ", weight->dim());
  STD_TORCH_CHECK(weight->scalar_type() == ScalarType::Double, kOp, ": dtype of weight: expected float64");
  STD_TORCH_CHECK(is_on_device(*weight) && weight->get_device_index() == arguments.device(), kOp,
                  ": weight: expected a tensor on ", kDeviceName, " device ", arguments.device());
  return weight->const_data_ptr<double>();
}

}  // namespace

void update_ema_cuda(const std::vector<Tensor>& averages, const std::vector<Tensor>& sources,
                     const std::vector<Tensor>& copies, double weight, const OptionalTensor& weight_tensor) {
  check_size(kOp, "number of sources", static_cast<int64_t>(averages.size()), static_cast<int64_t>(sources.size()));
  if (!copies.empty()) {
    check_size(kOp, "number of copies", static_cast<int64_t>(averages.size()), static_cast<int64_t>(copies.size()));
  }
  if (averages.empty()) return;
  EmaArguments arguments(averages[0]);
  for (size_t i = 0; i < averages.size(); ++i) {
    arguments.add(averages[i], sources[i], copies.empty() ? nullptr : &copies[i]);
  }
  const std::vector<EmaTensor>& tensors = arguments.tensors();
  const double* const on_device = device_weight(arguments, weight_tensor);
  if (tensors.empty()) return;
  const int error = d2v_launch_ema_list(tensors.data(), static_cast<int64_t>(tensors.size()), weight, on_device,
                                        arguments.device(), current_stream(kOp, arguments.device()));
  check_launch(kOp, error);
  arguments.scatter();
}

}  // namespace d2v
