// update_ema_ on CUDA tensors.
#include "torch_cuda.h"

namespace d2v {
namespace {

// The list as the kernel takes it: entries of one layout, each one piece of memory.
class EmaArguments {
 public:
  EmaArguments(const char* op, const Tensor& first) : call_(device_call(op, first)) {}

  void add(const Tensor& average, const Tensor& source, const Tensor* copy) {
    EmaTensor e = describe_ema(call_, average, source, copy);
    if (e.count == 0) return;
    if (!is_flat(average, source, copy)) gather(e, average, source, copy);
    tensors_.push_back(e);
  }
  void add_split(const Tensor& high, const Tensor& low, const Tensor& source) {
    const EmaTensor e = describe_split_ema(call_, high, low, source);
    if (e.count > 0) tensors_.push_back(e);
  }

  void update(double weight, const OptionalTensor& weight_tensor) const {
    if (weight_tensor.has_value()) check_weight(call_, *weight_tensor);
    if (tensors_.empty()) return;
    const double* const on_device = weight_tensor.has_value() ? weight_tensor->const_data_ptr<double>() : nullptr;
    const Stream on = stream_of(call_);
    check_launch(call_.op, d2v_launch_ema_list(tensors_.data(), static_cast<int64_t>(tensors_.size()), weight,
                                               on_device, on.device, on.stream));
    // Results of entries that did not run in place go where they belong.
    for (const auto& [to, from] : results_) {
      Tensor target = to;
      torch::stable::copy_(target, from, true);
    }
  }

 private:
  // Layouts that differ: contiguous stand-ins, two more passes over the entry.
  void gather(EmaTensor& e, const Tensor& average, const Tensor& source, const Tensor* copy) {
    check_not_overlapping(call_.op, "average", average);
    const Tensor a = average.is_contiguous() ? average : torch::stable::contiguous(average);
    const Tensor s = torch::stable::contiguous(source);
    e.average = a.mutable_data_ptr();
    e.source = s.const_data_ptr();
    kept_.push_back(s);
    if (!average.is_contiguous()) results_.emplace_back(average, a);
    if (!copy) return;
    check_not_overlapping(call_.op, "copy", *copy);
    const Tensor c = copy->is_contiguous() ? *copy : torch::stable::contiguous(*copy);
    e.copy = c.mutable_data_ptr();
    if (!copy->is_contiguous()) results_.emplace_back(*copy, c);
  }

  Call call_;
  std::vector<EmaTensor> tensors_;
  std::vector<Tensor> kept_;
  std::vector<std::pair<Tensor, Tensor>> results_;
};

}  // namespace

void update_ema_cuda(const std::vector<Tensor>& averages, const std::vector<Tensor>& sources,
                     const std::vector<Tensor>& copies, double weight, const OptionalTensor& weight_tensor) {
  constexpr const char* op = "update_ema_";
  check_ema_lists(op, averages, sources, "copies", copies, false);
  if (averages.empty()) return;
  EmaArguments arguments(op, averages[0]);
  for (size_t i = 0; i < averages.size(); ++i) {
    arguments.add(averages[i], sources[i], copies.empty() ? nullptr : &copies[i]);
  }
  arguments.update(weight, weight_tensor);
}

void update_split_ema_cuda(const std::vector<Tensor>& high, const std::vector<Tensor>& low,
                           const std::vector<Tensor>& sources, double weight, const OptionalTensor& weight_tensor) {
  constexpr const char* op = "update_split_ema_";
  check_ema_lists(op, high, sources, "low halves", low, true);
  if (high.empty()) return;
  EmaArguments arguments(op, high[0]);
  for (size_t i = 0; i < high.size(); ++i) arguments.add_split(high[i], low[i], sources[i]);
  arguments.update(weight, weight_tensor);
}

}  // namespace d2v
