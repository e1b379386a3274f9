// Grouped convolution, compiled once per instruction level; for the levels with bf16 products, of bf16 rows alone.
//
// The channels of one group of a sample are copied position by position, with zeros around the grid. Then the numbers
// that a row of the kernel meets lie side by side, windows of neighbouring positions overlap, and the convolution is a
// product of matrices for each row of the kernel, without any further copy. Positions run through whole padded rows;
// what comes out for the padding is dropped.
#include "convolution.h"
#include "product.h"
#include "simd.h"
#if defined(__AVX512BF16__) || defined(D2V_TILES_EMULATED)
#define D2V_WORDS
#include "words.h"
#endif

namespace d2v {
namespace {

constexpr int64_t kSide = 16;          // rows and columns of products are read and written up to a multiple
constexpr int64_t kPositions = 48;     // whose sums exist at once
constexpr int64_t kSlackBytes = 4096;  // behind operands, which are read in whole tiles

D2V_INLINE int64_t whole(int64_t n, int64_t multiple = kSide) { return (n + multiple - 1) / multiple * multiple; }

struct Sizes {
  int64_t inputs, outputs;           // channels of a group
  int64_t across, cells, positions;  // a padded row; the padded grid; outputs, with those dropped between rows
  int64_t taps;
  explicit Sizes(const ConvolutionArgs* a)
      : inputs(a->C / a->groups),
        outputs(a->D / a->groups),
        across(a->W + a->kernel_w - 1),
        cells((a->H + a->kernel_h - 1) * across),
        positions(a->H > 0 && a->W > 0 ? (a->H - 1) * across + a->W : 0),
        taps(a->kernel_h * a->kernel_w) {}
};

// How operands lie. A position has `inner` units of one number each, or, as words, of two.
template <class T>
struct Numbers {
  typedef Acc<T> Unit;
  static constexpr int64_t kEach = 1, kRows = kTileRows;
  static int64_t inner(int64_t channels) { return channels; }
  static void read(const T* x, int64_t channels, Unit* to) {
    for_vectors<Unit>(channels, [&](auto full, int64_t c, int lanes) {
      typedef decltype(full) P;
      store_lanes<Unit, P>(to + c, load_lanes<Unit, P>(x + c, lanes), lanes);
    });
  }
  static void put(Unit* to, Vec<Unit> value, Vec<Unit>) {
    T rounded[kLanes<Unit>];  // to the type of the rows, as words are
    store<Unit>(rounded, value);
    store<Unit>(to, load<Unit>(rounded));
  }

  // Windows times packed weights: rows of `inner` units each begin a window of K units.
  void multiply(bool add, int64_t rows, int64_t columns, int64_t K, const Unit* windows, int64_t inner,
                const Unit* weights, Matrix<Unit> sums) {
    const Left<Unit> left{windows, inner, 1};
    const Matrix<Unit> right{const_cast<Unit*>(weights), sums.row};
    add ? d2v::multiply<Unit, true>(rows, columns, K, left, right, sums)
        : d2v::multiply<Unit>(rows, columns, K, left, right, sums);
  }

  // For the gradient of the weight: sums += grads^T cells of one tap, which is `offset` positions away.
  static int64_t pair_units(const Sizes&) { return 0; }
  void prepare(const Sizes& s, Unit* cells, Unit* grads, Unit*) { cells_ = cells, grads_ = grads, s_ = &s; }
  void add_tap(int64_t offset, Matrix<Unit> sums) {
    const Matrix<Unit> right{cells_ + offset * s_->inputs, s_->inputs};
    d2v::multiply<Unit, true>(s_->outputs, s_->inputs, s_->positions, {grads_, 1, s_->outputs}, right, sums);
  }

 private:
  Unit *cells_, *grads_;
  const Sizes* s_;
};

#if defined(D2V_WORDS)
struct BF16Words {
  typedef uint32_t Unit;
  static constexpr int64_t kEach = 2;
#if defined(D2V_TILES) || defined(D2V_TILES_EMULATED)
  static constexpr int64_t kRows = kTileSide;
#else
  static constexpr int64_t kRows = kWordRows;
#endif
  BF16Words() { tiles_.begin(); }
  ~BF16Words() { tiles_.end(); }
  // Tiles read whole lines of a window: with the channels of the next position there, a NaN would spread.
#if defined(D2V_TILES) || defined(D2V_TILES_EMULATED)
  static int64_t inner(int64_t channels) { return whole(channels, 2 * kSide) / 2; }
#else
  static int64_t inner(int64_t channels) { return whole(channels, 2) / 2; }
#endif
  // In ascending order: whole vectors are written, with zeros behind the channels.
  static void read(const BF16* x, int64_t channels, Unit* to) {
    constexpr int64_t kNumbers = 2 * kLanes<float>;
    for (int64_t c = 0; c < channels; c += kNumbers) {
      const VU v = load_numbers(&x[c].bits, channels - c);
      memcpy(to + c / 2, &v, sizeof(v));
    }
  }
  static void put(Unit* to, VF even, VF odd) {
    const VU words = pair_words(even, odd);
    memcpy(to, &words, sizeof(words));
  }
  void multiply(bool add, int64_t rows, int64_t columns, int64_t K, const Unit* windows, int64_t inner,
                const Unit* weights, Matrix<float> sums) {
    const WordRows left{const_cast<Unit*>(windows), inner}, right{const_cast<Unit*>(weights), sums.row};
    multiply_words(tiles_, add, rows, columns, K, left, right, sums);
  }

  // Pairs of positions of the grid, from an even and from an odd one on; of the gradients, with channels as rows.
  static int64_t pairs_of(int64_t n) { return whole(n, 2 * kSide) / 2; }
  static int64_t row_of(int64_t channels) { return whole(channels, 2 * kSide); }
  static int64_t pair_units(const Sizes& s) {
    return 2 * (pairs_of(s.cells) + kSide) * row_of(s.inputs) + 2 * pairs_of(s.positions) * row_of(s.outputs);
  }
  void prepare(const Sizes& s, Unit* cells, Unit* grads, Unit* space) {
    s_ = &s;
    const int64_t pairs = pairs_of(s.cells), row = row_of(s.inputs), inner_x = inner(s.inputs);
    even_ = {space, row}, odd_ = {space + (pairs + kSide) * row, row};
    pair_rows({cells, inner_x}, 2 * pairs, even_);
    pair_rows({cells + inner_x, inner_x}, 2 * pairs, odd_);
    const WordRows of_grads{odd_.data + (pairs + kSide) * row, row_of(s.outputs)};
    const int64_t length = pairs_of(s.positions);
    pair_rows({grads, inner(s.outputs)}, 2 * length, of_grads);
    grads_ = {of_grads.data + length * of_grads.row, length};
    transpose_words(of_grads, length, of_grads.row, grads_);
  }
  void add_tap(int64_t offset, Matrix<float> sums) {
    const WordRows& pairs = offset % 2 ? odd_ : even_;
    const WordRows right{pairs.data + offset / 2 * pairs.row, pairs.row};
    multiply_words(tiles_, true, s_->outputs, s_->inputs, (s_->positions + 1) / 2, grads_, right, sums);
  }

 private:
  Tiles tiles_;
  WordRows even_, odd_, grads_;
  const Sizes* s_;
};
#endif

// How rows of type T are multiplied here.
template <class P, class T>
struct Kind {
  typedef P Operands;
  typedef T Type;
};
template <class F>
D2V_INLINE void with_kind(DType type, F body) {
#if defined(D2V_WORDS)
  (void)type;
  body(Kind<BF16Words, BF16>());
#else
  with_type(type, [&](auto zero) { body(Kind<Numbers<decltype(zero)>, decltype(zero)>()); });
#endif
}

// ---- sizes ----

template <class P>
int64_t group_units(const ConvolutionArgs* a) {
  const Sizes s(a);
  return (a->kernel_h * a->kernel_w * P::inner(s.inputs) + kSide) * whole(s.outputs);
}

int64_t packed_bytes(const ConvolutionArgs* a) {
  int64_t bytes = 0;
  with_kind(a->type, [&](auto kind) {
    typedef typename decltype(kind)::Operands P;
    bytes = group_units<P>(a) * static_cast<int64_t>(sizeof(typename P::Unit));
  });
  return bytes;
}

// Of scratch, each with room behind it.
template <class K>
struct Parts {
  typedef typename K::Operands P;
  typedef Acc<typename K::Type> A;
  typename P::Unit *cells, *grads, *pairs;
  A* sums;
  int64_t bytes;
  Parts(const ConvolutionArgs* a, void* memory) : bytes(0) {
    const Sizes s(a);
    const int64_t tap_sums = s.taps * whole(s.outputs) * whole(s.inputs, 2 * kSide);
    const int64_t row_sums = (kPositions + kSide) * whole(s.outputs);
    char* const from = static_cast<char*>(memory);
    cells = take<typename P::Unit>(from, (s.cells + 2 * kSide) * P::inner(s.inputs));
    grads = take<typename P::Unit>(from, (s.positions + 2 * kSide) * P::inner(s.outputs));
    pairs = take<typename P::Unit>(from, P::pair_units(s));
    sums = take<A>(from, tap_sums > row_sums ? tap_sums : row_sums);
  }

 private:
  template <class U>
  U* take(char* from, int64_t count) {
    U* const part = reinterpret_cast<U*>(from + bytes);
    bytes += whole(count * static_cast<int64_t>(sizeof(U)), 64) + kSlackBytes;
    return part;
  }
};

int64_t space_bytes(const ConvolutionArgs* a) {
  int64_t bytes = 0;
  with_kind(a->type, [&](auto kind) { bytes = Parts<decltype(kind)>(a, nullptr).bytes; });
  return bytes;
}

// ---- kernels ----

// Weights of `count` outputs from d on for one input and tap of group g, then zeros; with `transposed` those of the
// gradient: ends exchanged, taps reversed.
template <class A, class W>
D2V_INLINE Vec<A> weights_at(const Sizes& s, const ConvolutionWeight* w, int64_t g, int64_t d, int64_t c, int64_t tap,
                             int64_t count) {
  const int64_t place = w->transposed ? ((g * s.inputs + c) * s.outputs + d) * s.taps + s.taps - 1 - tap
                                      : ((g * s.outputs + d) * s.inputs + c) * s.taps + tap;
  const int64_t step = w->transposed ? s.taps : s.inputs * s.taps;
  const W* const data = static_cast<const W*>(w->data) + place;
  A lanes[kLanes<A>] = {};
  for (int64_t i = 0; i < kLanes<A> && i < count; ++i) lanes[i] = static_cast<A>(widen(data[i * step]));
  return bit_cast<Vec<A>>(lanes);
}

template <class K, class W>
void pack_group(const ConvolutionArgs* a, const ConvolutionWeight* weight, int64_t g, typename K::Operands::Unit* to) {
  typedef typename K::Operands P;
  typedef Acc<typename K::Type> A;
  const Sizes s(a);
  const int64_t columns = whole(s.outputs), inner = P::inner(s.inputs);
  for (int64_t tap = 0; tap < s.taps; ++tap) {
    for (int64_t c = 0; c < s.inputs; c += P::kEach) {
      for (int64_t d = 0; d < s.outputs; d += kLanes<A>) {
        const Vec<A> even = weights_at<A, W>(s, weight, g, d, c, tap, s.outputs - d);
        const bool two = P::kEach == 2 && c + 1 < s.inputs;
        const Vec<A> odd = two ? weights_at<A, W>(s, weight, g, d, c + 1, tap, s.outputs - d) : Vec<A>{};
        P::put(to + (tap * inner + c / P::kEach) * columns + d, even, odd);
      }
    }
  }
}

void pack(const ConvolutionArgs* a, const ConvolutionWeight* weight, int64_t begin, int64_t end, void* packed) {
  with_kind(a->type, [&](auto kind) {
    typedef decltype(kind) K;
    typedef typename K::Operands P;
    with_type(weight->type, [&](auto zero) {
      for (int64_t g = begin; g < end; ++g) {
        pack_group<K, decltype(zero)>(a, weight, g, static_cast<typename P::Unit*>(packed) + g * group_units<P>(a));
      }
    });
  });
}

// The grid of one sample's group into rows of `across` cells, `skip` of them first; those between stay as they are.
template <class P, class T>
void read_grid(const T* x, int64_t H, int64_t W, int64_t stride, int64_t channels, int64_t skip, int64_t across,
               typename P::Unit* cells) {
  const int64_t inner = P::inner(channels);
  for (int64_t y = 0; y < H; ++y) {
    typename P::Unit* to = cells + (skip + y * across) * inner;
    for (int64_t i = 0; i < W; ++i, to += inner, x += stride) {
      prefetch(x + H * W * stride);
      P::read(x, channels, to);
    }
  }
}

template <class P, class T>
void read_cells(const ConvolutionArgs* a, const Sizes& s, int64_t n, int64_t g, typename P::Unit* cells) {
  const T* const x = static_cast<const T*>(a->x) + n * a->H * a->W * a->C + g * s.inputs;
  read_grid<P>(x, a->H, a->W, a->C, s.inputs, a->before_h * s.across + a->before_w, s.across, cells);
}

// Sums of a row of a group's outputs; their place among all channels, and in `added` and `out`.
template <class T>
D2V_INLINE void write_sums(const Acc<T>* sums, int64_t channels, const ConvolutionEnds& ends, int64_t channel,
                           int64_t place) {
  typedef Acc<T> A;
  const A* const bias = static_cast<const A*>(ends.bias);
  const T* const added = static_cast<const T*>(ends.added);
  T* const out = static_cast<T*>(ends.out);
  for_vectors<A>(channels, [&](auto full, int64_t c, int lanes) {
    typedef decltype(full) P;
    Vec<A> v = load<A>(sums + c);
    if (bias) v += load_lanes<A, P>(bias + channel + c, lanes);
    if (added) v += load_lanes<A, P>(added + place + c, lanes);
    store_lanes<A, P>(out + place + c, v, lanes);
  });
}

// `rows` positions from (y, x) on, but for those between the rows of the grid.
template <class K>
void write_positions(const ConvolutionArgs* a, const Sizes& s, Matrix<Acc<typename K::Type>> sums, int64_t y, int64_t x,
                     int64_t rows, const ConvolutionEnds& ends, int64_t channel, int64_t sample) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t place = sample + (y * a->W + x) * a->D + channel;
    if (x < a->W) write_sums<typename K::Type>(sums.data + r * sums.row, s.outputs, ends, channel, place);
    if (++x == s.across) x = 0, ++y;
  }
}

template <class K>
void forward_of(const ConvolutionArgs* a, const void* packed, const ConvolutionEnds* ends, int64_t begin, int64_t end,
                void* memory) {
  typedef typename K::Operands P;
  typedef typename K::Type T;
  typedef Acc<T> A;
  typedef typename P::Unit Unit;
  const Sizes s(a);
  const Parts<K> space(a, memory);
  P operands;
  const int64_t inner = P::inner(s.inputs), window = a->kernel_w * inner;
  const Matrix<A> sums{space.sums, whole(s.outputs)};
  // Row by row where that takes fewer tiles than going through what lies between rows, too.
  const bool by_rows = a->H * ((a->W - 1) / P::kRows + 1) < (s.positions - 1) / P::kRows + 1;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / a->groups, g = i % a->groups;
    read_cells<P, T>(a, s, n, g, space.cells);
    const Unit* const weights = static_cast<const Unit*>(packed) + g * group_units<P>(a);
    for (int64_t position = 0; position < s.positions;) {
      const int64_t y = position / s.across, x = position % s.across;
      const int64_t left = by_rows ? a->W - x : s.positions - position, rows = left < kPositions ? left : kPositions;
      for (int64_t ky = 0; ky < a->kernel_h; ++ky) {
        operands.multiply(ky > 0, rows, s.outputs, window, space.cells + (position + ky * s.across) * inner, inner,
                          weights + ky * window * sums.row, sums);
      }
      write_positions<K>(a, s, sums, y, x, rows, *ends, g * s.outputs, n * a->H * a->W * a->D);
      position += by_rows && rows == left ? s.across - x : rows;
    }
  }
}

void forward(const ConvolutionArgs* a, const void* packed, const ConvolutionEnds* ends, int64_t begin, int64_t end,
             void* space) {
  with_kind(a->type, [&](auto kind) { forward_of<decltype(kind)>(a, packed, ends, begin, end, space); });
}

template <class K>
void backward_weight_of(const ConvolutionArgs* a, const typename K::Type* grad, Acc<typename K::Type>* out,
                        int64_t begin, int64_t end, void* memory) {
  typedef typename K::Operands P;
  typedef typename K::Type T;
  typedef Acc<T> A;
  const Sizes s(a);
  const Parts<K> space(a, memory);
  P operands;
  const int64_t row = whole(s.inputs, 2 * kSide), tap_sums = whole(s.outputs) * row;
  for (int64_t g = begin; g < end; ++g) {
    memset(space.sums, 0, static_cast<size_t>(s.taps * tap_sums) * sizeof(A));
    for (int64_t n = 0; n < a->N; ++n) {
      read_cells<P, T>(a, s, n, g, space.cells);
      const T* const from = grad + n * a->H * a->W * a->D + g * s.outputs;
      read_grid<P>(from, a->H, a->W, a->D, s.outputs, 0, s.across, space.grads);
      operands.prepare(s, space.cells, space.grads, space.pairs);
      for (int64_t tap = 0; tap < s.taps; ++tap) {
        const int64_t offset = tap / a->kernel_w * s.across + tap % a->kernel_w;
        operands.add_tap(offset, {space.sums + tap * tap_sums, row});
      }
    }
    A* const to = out + g * s.outputs * s.inputs * s.taps;
    for (int64_t tap = 0; tap < s.taps; ++tap) {
      for (int64_t d = 0; d < s.outputs; ++d) {
        const A* const sums = space.sums + tap * tap_sums + d * row;
        for (int64_t c = 0; c < s.inputs; ++c) to[(d * s.inputs + c) * s.taps + tap] = sums[c];
      }
    }
  }
}

void backward_weight(const ConvolutionArgs* a, const void* grad, void* out, int64_t begin, int64_t end, void* space) {
  with_kind(a->type, [&](auto kind) {
    typedef typename decltype(kind)::Type T;
    backward_weight_of<decltype(kind)>(a, static_cast<const T*>(grad), static_cast<Acc<T>*>(out), begin, end, space);
  });
}

}  // namespace

extern const ConvolutionKernels D2V_TABLE(convolution_kernels);
const ConvolutionKernels D2V_TABLE(convolution_kernels) = {packed_bytes, space_bytes, pack, forward, backward_weight};

}  // namespace d2v
