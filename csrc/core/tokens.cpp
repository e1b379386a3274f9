// Token operators: index checks, inverse lists, and the split over threads. Copies and sums are in tokens_cpu.cpp.
#include "tokens.h"

#include <cstring>
#include <vector>

#include "parallel.h"

namespace d2v {
namespace {

int64_t index_at(const Indices& index, int64_t row, int64_t column) {
  const int64_t at = row * index.row_stride + column * index.stride;
  return index.wide ? static_cast<const int64_t*>(index.data)[at] : static_cast<const int32_t*>(index.data)[at];
}

template <class I>
bool row_in_range(const I* index, int64_t stride, int64_t n, int64_t limit) {
  // Unsigned: a negative number is out of range as well. No early exit, so that the loop is vectorised.
  uint64_t most = 0;
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) {
      const uint64_t v = static_cast<uint64_t>(static_cast<int64_t>(index[i]));
      most = v > most ? v : most;
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const uint64_t v = static_cast<uint64_t>(static_cast<int64_t>(index[i * stride]));
      most = v > most ? v : most;
    }
  }
  return most < static_cast<uint64_t>(limit);
}

// Which entries of `index` go to which slot: counting sort, so that entries of a slot stay in ascending order.
class Inverse {
 public:
  Inverse(int64_t groups, int64_t slots)
      : slots_(slots), start_(static_cast<size_t>(groups * (slots + 1))), groups_(groups) {}

  // Group g holds rows [g * rows, (g + 1) * rows) of index (all of n columns); entries lists element offsets in grad.
  void build(const Indices& index, int64_t rows, int64_t n, const Rows3& grad, Parallel parallel) {
    entries_.resize(static_cast<size_t>(groups_ * rows * n));
    per_group_ = rows * n;
    parallel_for(parallel, groups_, 1 + 65536 / (rows * n + 1), [&](int64_t g0, int64_t g1) {
      std::vector<int64_t> next(static_cast<size_t>(slots_));
      for (int64_t g = g0; g < g1; ++g) build_group(index, g, rows, n, grad, next.data());
    });
  }
  const int64_t* start(int64_t group) const { return start_.data() + group * (slots_ + 1); }
  const int64_t* entries(int64_t group) const { return entries_.data() + group * per_group_; }

 private:
  // A value past the last slot belongs to the last one.
  int64_t slot_of(int64_t value) const { return value < slots_ ? value : slots_ - 1; }

  void build_group(const Indices& index, int64_t g, int64_t rows, int64_t n, const Rows3& grad, int64_t* next) {
    int64_t* start = start_.data() + g * (slots_ + 1);
    for (int64_t r = g * rows; r < (g + 1) * rows; ++r) {
      for (int64_t i = 0; i < n; ++i) ++start[slot_of(index_at(index, r, i)) + 1];
    }
    for (int64_t s = 0; s < slots_; ++s) {
      start[s + 1] += start[s];
      next[s] = start[s];
    }
    int64_t* entries = entries_.data() + g * per_group_;
    for (int64_t r = g * rows; r < (g + 1) * rows; ++r) {
      for (int64_t i = 0; i < n; ++i) {
        entries[next[slot_of(index_at(index, r, i))]++] = r * grad.stride0 + i * grad.stride1;
      }
    }
  }

  int64_t slots_;
  std::vector<int64_t> start_, entries_;
  int64_t groups_, per_group_ = 0;
};

// out (groups, count, C) = sums of slots [first, first + count) of every group.
void sum_slots(const Inverse& inverse, int64_t groups, int64_t first, int64_t count, DType type, const void* base,
               int64_t C, void* out, Parallel parallel) {
  const int64_t bytes = C * size_of(type);
  const bool stream = groups * count * bytes >= kStreamBytes;
  if (count == 0) return;
  parallel_for(parallel, groups * count, grain_of(bytes), [&](int64_t i0, int64_t i1) {
    while (i0 < i1) {
      const int64_t g = i0 / count, s = i0 % count, n = i1 - i0 < count - s ? i1 - i0 : count - s;
      tokens_kernels().sum_rows(type, static_cast<char*>(out) + i0 * bytes, n, C, base, inverse.start(g) + first + s,
                                inverse.entries(g), stream);
      i0 += n;
    }
  });
}

}  // namespace

bool find_bad_index(const Indices& index, int64_t rows, int64_t columns, int64_t limit, BadIndex* bad) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = r * index.row_stride;
    const bool good = index.wide
                          ? row_in_range(static_cast<const int64_t*>(index.data) + at, index.stride, columns, limit)
                          : row_in_range(static_cast<const int32_t*>(index.data) + at, index.stride, columns, limit);
    if (good || columns == 0) continue;
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t value = index_at(index, r, c);
      if (value < 0 || value >= limit) {
        *bad = {r, c, value};
        return true;
      }
    }
  }
  return false;
}

void gather_tokens(const GatherArgs& a, Parallel parallel) {
  const int64_t bytes = a.C * size_of(a.type), total = a.rows * a.n;
  if (total * bytes == 0) return;
  parallel_for(parallel, total, grain_of(bytes), [&](int64_t begin, int64_t end) {
    tokens_kernels().gather(&a, begin, end, total * bytes >= kStreamBytes);
  });
}

void gather_tokens_backward(const GatherBackwardArgs& a, Parallel parallel) {
  const int64_t samples = a.rows / a.clones;
  if (samples * a.tokens * a.C == 0) return;
  Inverse inverse(samples, a.tokens);
  inverse.build(a.index, a.clones, a.n, a.grad, parallel);
  sum_slots(inverse, samples, 0, a.tokens, a.type, a.grad.data, a.C, a.out, parallel);
}

void restore_tokens(const RestoreArgs& a, Parallel parallel) {
  const int64_t bytes = a.C * size_of(a.type), total = a.N * a.T;
  if (total * bytes == 0) return;
  // A noise row takes as long as eight copied ones.
  const int64_t grain = grain_of(a.fill_kind == kFillNoise ? 8 * bytes : bytes);
  parallel_for(parallel, total, grain, [&](int64_t begin, int64_t end) {
    tokens_kernels().restore(&a, begin, end, total * bytes >= kStreamBytes);
  });
}

void restore_tokens_backward(const RestoreBackwardArgs& a, Parallel parallel) {
  const int64_t fill_slots = a.fill_rows > 0 ? a.fill_rows : 0;
  const int64_t acc = a.type == kFloat64 ? 8 : 4;
  if (a.C == 0) return;
  Inverse inverse(a.N, a.V + fill_slots + 1);  // the last slot takes what belongs to neither
  inverse.build(a.restore, 1, a.T, a.grad, parallel);
  sum_slots(inverse, a.N, 0, a.V, a.type, a.grad.data, a.C, a.kept, parallel);
  sum_slots(inverse, a.N, a.V, fill_slots, a.type, a.grad.data, a.C, a.fill, parallel);
  if (a.fill_rows != -1) return;
  std::vector<char> partial(static_cast<size_t>(a.N * a.C * acc), 0), total(static_cast<size_t>(a.C * acc), 0);
  parallel_for(parallel, a.N, grain_of(a.T * a.C * size_of(a.type)), [&](int64_t r0, int64_t r1) {
    for (int64_t r = r0; r < r1; ++r) {
      const int64_t* start = inverse.start(r) + a.V;
      tokens_kernels().add_rows(a.type, partial.data() + r * a.C * acc, a.C, a.grad.data, inverse.entries(r) + start[0],
                                start[1] - start[0]);
    }
  });
  std::vector<int64_t> rows(static_cast<size_t>(a.N));
  for (int64_t r = 0; r < a.N; ++r) rows[static_cast<size_t>(r)] = r * a.C;
  tokens_kernels().add_rows(a.type == kFloat64 ? kFloat64 : kFloat32, total.data(), a.C, partial.data(), rows.data(),
                            a.N);
  tokens_kernels().cast_row(a.type, a.fill, total.data(), a.C);
}

}  // namespace d2v
