// Objects that live longer than a call: EMA tables and mask samplers. Tensors come as addresses and sizes, or as numpy
// arrays of their memory, so that this module needs neither torch's headers nor its libraries.
#include <dlfcn.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../core/ema_table.h"
#include "../core/masks.h"

namespace py = pybind11;

namespace d2v {
namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// A C function of one of these files, which are loaded already; null where none has it.
template <class Function>
Function find_function(const std::vector<std::string>& libraries, const char* name) {
  for (const std::string& path : libraries) {
    void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
    void* const found = library ? dlsym(library, name) : nullptr;
    if (library) dlclose(library);
    if (found) return reinterpret_cast<Function>(found);
  }
  return nullptr;
}

// update_ema_ of fixed tensors with the tables built once.
class EmaPlan {
 public:
  // Each entry: (average, source, copy or 0, elements, average type, source type, copy type or -1).
  using Entry = std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t, int, int, int>;

  // Libraries: libd2v_cpu and libd2v_cuda, which have the kernels, torch's threads and torch's tensors; held: what the
  // operator hold_tensors returned, or 0. The plan releases it.
  EmaPlan(const std::vector<Entry>& entries, const std::vector<std::string>& libraries, uintptr_t held)
      : update_(find_function<EmaUpdate>(libraries, "d2v_update_ema")),
        launch_(find_function<EmaLaunch>(libraries, "d2v_launch_ema")),
        moved_(find_function<TensorsMoved>(libraries, "d2v_tensors_moved")),
        held_(pointer<void>(held), find_function<ReleaseTensors>(libraries, "d2v_release_tensors")) {
    for (const auto& [average, source, copy, count, average_type, source_type, copy_type] : entries) {
      tensors_.push_back({pointer<void>(average), pointer<void>(source), pointer<void>(copy), count,
                          static_cast<DType>(average_type), static_cast<DType>(source_type),
                          static_cast<DType>(copy_type)});
      check(tensors_.back());
    }
    first_chunk_.resize(tensors_.size() + 1);
    index_ema_chunks(tensors_.data(), size(), first_chunk_.data());
  }

  void step(double weight) const {
    if (!update_) throw std::runtime_error("EmaPlan: no library has d2v_update_ema");
    update_(tensors_.data(), size(), first_chunk_.data(), weight);
  }
  bool moved() const { return held_ && moved_(held_.get()) != 0; }

  // CUDA: the chunk table, to be copied to the device by the caller, who keeps that memory.
  py::bytes device_table() {
    const int64_t count = count_ema_device_chunks(tensors_.data(), size());
    std::string bytes(static_cast<size_t>(count) * sizeof(EmaChunk), '\0');
    std::vector<EmaChunk> chunks(static_cast<size_t>(count));
    groups_.resize(kEmaGroups);
    groups_.resize(static_cast<size_t>(build_ema_table(tensors_.data(), size(), chunks.data(), groups_.data())));
    std::memcpy(&bytes[0], chunks.data(), bytes.size());
    return py::bytes(bytes);
  }

  // table: device address of what device_table() returned; weight_address: device address of a double that replaces
  // the weight, or 0.
  void step_device(double weight, uintptr_t table, uintptr_t weight_address, int32_t device, uintptr_t stream) const {
    if (!launch_) throw std::runtime_error("EmaPlan: no library has d2v_launch_ema");
    const int error = launch_(pointer<EmaChunk>(table), groups_.data(), static_cast<int64_t>(groups_.size()), weight,
                              pointer<double>(weight_address), device, pointer<void>(stream));
    if (error != 0) throw std::runtime_error("update_ema_: launch failed with CUDA error " + std::to_string(error));
  }

 private:
  static void check(const EmaTensor& t) {
    const auto known = [](DType type) { return type >= kFloat32 && type <= kFloat64; };
    if (t.average_type == kSplit && t.copy_type == kSplit && t.average && t.copy && t.count >= 0 &&
        known(t.source_type) && t.source_type != kFloat64) {
      return;
    }
    const bool wide = t.average_type == kFloat64;
    if (!known(t.average_type) || !known(t.source_type) || (t.source_type == kFloat64) != wide ||
        (t.copy ? !known(t.copy_type) : t.copy_type != kNone) || t.count < 0) {
      throw std::invalid_argument(
          "EmaPlan: entry: expected known types, float64 for both of average and source or neither");
    }
  }
  int64_t size() const { return static_cast<int64_t>(tensors_.size()); }

  std::vector<EmaTensor> tensors_;
  std::vector<int64_t> first_chunk_;
  std::vector<EmaGroup> groups_;
  EmaUpdate update_;
  EmaLaunch launch_;
  TensorsMoved moved_;
  std::unique_ptr<void, ReleaseTensors> held_;
};

MaskKind mask_kind(const std::string& name) {
  if (name == "span") return kMaskSpan;
  if (name == "rectangles") return kMaskRectangles;
  if (name == "token-span") return kMaskTokenSpan;
  if (name == "block") return kMaskBlock;
  if (name == "random") return kMaskRandom;
  throw std::invalid_argument("MaskSampler: kind: expected span, rectangles, token-span, block or random, got " + name);
}

// The low 64 bits of any Python integer.
uint64_t low_bits(const py::int_& value) {
  const uint64_t bits = PyLong_AsUnsignedLongLongMask(value.ptr());
  if (PyErr_Occurred()) throw py::error_already_set();
  return bits;
}

class MaskSampler {
 public:
  MaskSampler(const std::string& kind, int64_t height, int64_t width, double ratio, int64_t span, double adjust,
              bool inverse, bool equal_counts, const py::int_& seed)
      : rule_{mask_kind(kind), height, width, ratio, span, adjust, inverse, equal_counts, low_bits(seed)} {
    if (height < 0 || width < 1 || rule_.tokens() > INT32_MAX || span < 1 || span > INT32_MAX ||
        !(ratio >= 0 && ratio <= 1) || !(adjust >= -1 && adjust <= 1)) {
      throw std::invalid_argument(
          "MaskSampler: expected 1 to 2^31 - 1 tokens, span of 1 or more, ratio 0 to 1, adjust -1 to 1");
    }
  }

  using Numbers = py::array_t<int64_t, py::array::c_style>;

  // (mask, keep, restore, rows) of `Masks`; keep and restore are None where rows mask different counts.
  py::tuple draw(const Numbers& sample_ids, const py::int_& epoch, int64_t copies,
                 const std::optional<Numbers>& lengths) const {
    using Indices = py::array_t<int32_t>;
    const uint64_t epoch_bits = low_bits(epoch);
    const int64_t samples = sample_ids.size(), rows = samples * copies, tokens = rule_.tokens();
    std::vector<int64_t> counts(static_cast<size_t>(rows));
    py::array_t<bool> mask({rows, tokens});
    auto* const bits = reinterpret_cast<uint8_t*>(mask.mutable_data());
    const int64_t *const ids = sample_ids.data(), *const limits = lengths ? lengths->data() : nullptr;
    {
      py::gil_scoped_release release;
      draw_masks(rule_, ids, samples, epoch_bits, copies, limits, bits, counts.data());
    }
    const bool shared =
        !counts.empty() && std::all_of(counts.begin(), counts.end(), [&](int64_t n) { return n == counts[0]; });
    const int64_t visible = shared ? tokens - counts[0] : -1;
    Numbers numbers(std::accumulate(counts.begin(), counts.end(), int64_t{0}));
    Indices keep({shared ? rows : 0, shared ? visible : 0}), restore({shared ? rows : 0, tokens});
    auto *const keep_data = shared ? keep.mutable_data() : nullptr, *const restore_data =
                                                                        shared ? restore.mutable_data() : nullptr;
    int64_t* const number_data = numbers.mutable_data();
    {
      py::gil_scoped_release release;
      list_masks(bits, rows, tokens, visible, keep_data, restore_data, number_data);
    }
    if (!shared) return py::make_tuple(mask, py::none(), py::none(), numbers);
    return py::make_tuple(mask, keep, restore, numbers);
  }

 private:
  MaskRule rule_;
};

py::dict build_info() {
  py::dict info;
  info["compiler"] = D2V_COMPILER;
  info["flags"] = D2V_FLAGS;
  return info;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "EMA tables, mask samplers and the build record of the native code.";
  m.def("build_info", &build_info, "Compiler and flags of the kernels.");
  py::class_<EmaPlan>(m, "EmaPlan")
      .def(py::init<const std::vector<EmaPlan::Entry>&, const std::vector<std::string>&, uintptr_t>(),
           py::arg("entries"), py::arg("libraries"), py::arg("held") = 0)
      .def("moved", &EmaPlan::moved)
      .def("step", &EmaPlan::step, py::arg("weight"), py::call_guard<py::gil_scoped_release>())
      .def("device_table", &EmaPlan::device_table)
      .def("step_device", &EmaPlan::step_device, py::arg("weight"), py::arg("table"), py::arg("weight_address"),
           py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
  py::class_<MaskSampler>(m, "MaskSampler")
      .def(py::init<const std::string&, int64_t, int64_t, double, int64_t, double, bool, bool, const py::int_&>())
      .def("draw", &MaskSampler::draw);
}

}  // namespace d2v
