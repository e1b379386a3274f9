// average_layers: order of the passes. The arithmetic is in layers_cpu.cpp.
#include "layers.h"

#include <cstring>
#include <vector>

#include "parallel.h"

namespace d2v {
namespace {

constexpr int64_t kStatRows = 128;  // rows of one layer before the next layer's turn, in the statistics pass

class Average {
 public:
  Average(const LayersArgs& args, Parallel parallel)
      : a_(args),
        parallel_(parallel),
        kernels_(layers_kernels()),
        element_(size_of(args.type)),
        wide_(args.type == kFloat64),
        acc_(wide_ ? 8 : 4),
        acc_type_(wide_ ? kFloat64 : kFloat32),
        row_bytes_(args.C * element_),
        stream_(args.B * args.T * args.C * size_of(args.out_type) >= kStreamBytes) {}

  void run() {
    const bool second_pass = a_.out_norm == kNormInstance || a_.out_norm == kNormBatch;
    std::vector<char> whole;
    if (second_pass) {
      if (a_.out_type != acc_type_) whole.resize(static_cast<size_t>(a_.B * a_.T * a_.C * acc_));
      mean_out_ = whole.empty() ? static_cast<char*>(a_.out) : whole.data();
    }
    switch (a_.norm) {
      case kNormInstance:
        run_instance();
        break;
      case kNormBatch:
        run_batch();
        break;
      default:
        run_rows();
    }
    if (second_pass) normalise_mean();
  }

 private:
  int64_t length(int64_t b) const { return a_.lengths ? a_.lengths[b] : a_.T; }
  const char* row(int64_t k, int64_t b, int64_t t) const {
    return static_cast<const char*>(a_.layers[k]) + (b * a_.batch_stride[k] + t * a_.time_stride[k]) * element_;
  }
  char* out_row(int64_t b, int64_t t) const {
    return static_cast<char*>(a_.out) + (b * a_.T + t) * a_.C * size_of(a_.out_type);
  }
  // Rows whose K layers together take about `bytes`; they are gone through twice, or in several places at once.
  int64_t rows_of(int64_t bytes, int64_t most) const {
    const int64_t rows = bytes / (a_.K * row_bytes_);
    return rows < 8 ? 8 : rows > most ? most : rows & ~int64_t{7};
  }
  int64_t block_rows() const { return a_.norm == kNormLayer ? rows_of(384 << 10, 48) : rows_of(384 << 10, 32); }

  // Rows [t0, t1) of sample b: combine, normalise if that is over C, cast, write. Rows past the length become 0.
  void write_rows(int64_t b, int64_t t0, int64_t t1, const char* mean, const char* scale, bool per_row, char* block) {
    const int64_t end = length(b) < t1 ? length(b) : t1;
    if (end > t0) {
      std::vector<const void*> x(static_cast<size_t>(a_.K));
      for (int64_t k = 0; k < a_.K; ++k) x[static_cast<size_t>(k)] = row(k, b, t0);
      char* into = mean_out_ ? mean_out_ + (b * a_.T + t0) * a_.C * acc_ : block;
      const CombineArgs c{x.data(), a_.time_stride, a_.type, a_.K,    end - t0,
                          a_.C,     mean,           scale,   per_row, per_row ? 0 : -block_rows(),
                          into};
      kernels_.combine(&c);
      if (!mean_out_) {
        if (a_.out_norm == kNormLayer) kernels_.normalise_rows(acc_type_, block, end - t0, a_.C, a_.eps);
        kernels_.emit(acc_type_, a_.out_type, out_row(b, t0), block, (end - t0) * a_.C, stream_);
      }
    }
    const int64_t from = end > t0 ? end : t0;
    if (t1 > from) std::memset(out_row(b, from), 0, static_cast<size_t>((t1 - from) * a_.C * size_of(a_.out_type)));
  }

  // norm "layer" and "none": every row by itself.
  void run_rows() {
    const int64_t rows = block_rows(), blocks = (a_.T + rows - 1) / rows;
    parallel_for(parallel_, a_.B * blocks, grain_of(a_.K * rows * row_bytes_), [&](int64_t i0, int64_t i1) {
      std::vector<char> block(static_cast<size_t>(rows * a_.C * acc_)),
          stats(static_cast<size_t>(2 * a_.K * rows * acc_));
      for (int64_t i = i0; i < i1; ++i) {
        const int64_t b = i / blocks, t0 = (i % blocks) * rows, t1 = t0 + rows < a_.T ? t0 + rows : a_.T;
        const int64_t n = (length(b) < t1 ? length(b) : t1) - t0;
        char* scale = stats.data() + a_.K * rows * acc_;
        if (a_.norm == kNormLayer && n > 0) {
          for (int64_t k = 0; k < a_.K; ++k) {
            kernels_.row_stats(a_.type, row(k, b, t0), a_.time_stride[k], n, a_.C, a_.eps,
                               1.0 / static_cast<double>(a_.K), stats.data() + k * n * acc_, scale + k * n * acc_);
          }
        }
        const bool normalised = a_.norm == kNormLayer;
        write_rows(b, t0, t1, normalised ? stats.data() : nullptr, normalised ? scale : nullptr, true, block.data());
      }
    });
  }

  // Statistics of sample b over time for layers [k0, k1), added to (mean, m2), each (K, C).
  void add_sample(int64_t b, int64_t k0, int64_t k1, int64_t seen, char* mean, char* m2) {
    std::vector<char> scratch(static_cast<size_t>(2 * a_.C * acc_));
    for (int64_t t = 0; t < length(b); t += kStatRows) {
      const int64_t n = length(b) - t < kStatRows ? length(b) - t : kStatRows;
      for (int64_t k = k0; k < k1; ++k) {
        kernels_.column_stats(a_.type, row(k, b, t), a_.time_stride[k], n, a_.C, seen + t, mean + k * a_.C * acc_,
                              m2 + k * a_.C * acc_, scratch.data());
      }
    }
  }

  // Last rows first: those are the ones that the statistics pass has left in the caches.
  void write_sample(int64_t b, int64_t block0, int64_t block1, const char* mean, const char* scale) {
    const int64_t rows = block_rows();
    std::vector<char> block(static_cast<size_t>(rows * a_.C * acc_));
    for (int64_t i = block1; i-- > block0;) {
      const int64_t t1 = (i + 1) * rows < a_.T ? (i + 1) * rows : a_.T;
      write_rows(b, i * rows, t1, mean, scale, false, block.data());
    }
  }

  void run_instance() {
    const int64_t table = a_.K * a_.C, rows = block_rows(), blocks = (a_.T + rows - 1) / rows;
    const double factor = 1.0 / static_cast<double>(a_.K);
    if (a_.B >= parallel_.threads) {  // a sample per thread at a time
      parallel_for(parallel_, a_.B, grain_of(a_.K * a_.T * row_bytes_), [&](int64_t b0, int64_t b1) {
        std::vector<char> stats(static_cast<size_t>(2 * table * acc_));
        for (int64_t b = b0; b < b1; ++b) {
          std::memset(stats.data(), 0, stats.size());
          char* m2 = stats.data() + table * acc_;
          add_sample(b, 0, a_.K, 0, stats.data(), m2);
          kernels_.column_scale(acc_type_, m2, table, length(b), a_.eps, factor);
          write_sample(b, 0, blocks, stats.data(), m2);
        }
      });
      return;
    }
    std::vector<char> stats(static_cast<size_t>(2 * table * acc_));
    char* m2 = stats.data() + table * acc_;
    for (int64_t b = 0; b < a_.B; ++b) {  // all threads on one sample: layers first, then blocks of rows
      std::memset(stats.data(), 0, stats.size());
      parallel_for(parallel_, a_.K, grain_of(a_.T * row_bytes_), [&](int64_t k0, int64_t k1) {
        add_sample(b, k0, k1, 0, stats.data(), m2);
        kernels_.column_scale(acc_type_, m2 + k0 * a_.C * acc_, (k1 - k0) * a_.C, length(b), a_.eps, factor);
      });
      parallel_for(parallel_, blocks, grain_of(a_.K * rows * row_bytes_),
                   [&](int64_t i0, int64_t i1) { write_sample(b, i0, i1, stats.data(), m2); });
    }
  }

  void run_batch() {
    const int64_t table = a_.K * a_.C, rows = block_rows(), blocks = (a_.T + rows - 1) / rows;
    std::vector<char> stats(static_cast<size_t>(2 * table * acc_), 0);
    char* m2 = stats.data() + table * acc_;
    parallel_for(parallel_, a_.K, grain_of(a_.B * a_.T * row_bytes_), [&](int64_t k0, int64_t k1) {
      int64_t seen = 0;
      for (int64_t b = 0; b < a_.B; ++b) {
        add_sample(b, k0, k1, seen, stats.data(), m2);
        seen += length(b);
      }
      kernels_.column_scale(acc_type_, m2 + k0 * a_.C * acc_, (k1 - k0) * a_.C, seen, a_.eps,
                            1.0 / static_cast<double>(a_.K));
    });
    parallel_for(parallel_, a_.B * blocks, grain_of(a_.K * rows * row_bytes_), [&](int64_t i0, int64_t i1) {
      for (int64_t i = i0; i < i1; ++i) write_sample(i / blocks, i % blocks, i % blocks + 1, stats.data(), m2);
    });
  }

  // out_norm "instance" and "batch": the mean is complete in mean_out_, in A; normalise it and cast.
  void normalise_mean() {
    const int64_t groups = a_.out_norm == kNormInstance ? a_.B : 1, per_group = a_.B / (groups > 0 ? groups : 1);
    const int64_t sample = a_.T * a_.C;
    parallel_for(parallel_, groups, grain_of(per_group * sample * acc_), [&](int64_t g0, int64_t g1) {
      std::vector<char> stats(static_cast<size_t>(2 * a_.C * acc_)), scratch(stats.size());
      char* m2 = stats.data() + a_.C * acc_;
      for (int64_t g = g0; g < g1; ++g) {
        std::memset(stats.data(), 0, stats.size());
        int64_t seen = 0;
        for (int64_t b = g * per_group; b < (g + 1) * per_group; ++b) {
          for (int64_t t = 0; t < length(b); t += kStatRows) {
            const int64_t n = length(b) - t < kStatRows ? length(b) - t : kStatRows;
            kernels_.column_stats(acc_type_, mean_out_ + (b * sample + t * a_.C) * acc_, a_.C, n, a_.C, seen + t,
                                  stats.data(), m2, scratch.data());
          }
          seen += length(b);
        }
        kernels_.column_scale(acc_type_, m2, a_.C, seen, a_.eps, 1.0);
        for (int64_t b = g * per_group; b < (g + 1) * per_group; ++b) {
          char* mean = mean_out_ + b * sample * acc_;
          kernels_.normalise_columns(acc_type_, mean, length(b), a_.C, stats.data(), m2);
          if (mean != out_row(b, 0))
            kernels_.emit(acc_type_, a_.out_type, out_row(b, 0), mean, length(b) * a_.C, stream_);
        }
      }
    });
  }

  const LayersArgs& a_;
  const Parallel parallel_;
  const LayersKernels& kernels_;
  const int64_t element_;
  const bool wide_;
  const int64_t acc_;  // bytes of a number of the type computed in
  const DType acc_type_;
  const int64_t row_bytes_;
  const bool stream_;
  char* mean_out_ = nullptr;  // (B, T, C) of A, where a second pass over the mean follows
};

}  // namespace

void average_layers(const LayersArgs& args, Parallel parallel) {
  if (args.B * args.T * args.C == 0) return;
  Average(args, parallel).run();
}

}  // namespace d2v
