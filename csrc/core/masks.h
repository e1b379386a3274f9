// Which tokens are masked. The rules and their random stream are those of d2v_kernels/ops/masks.py, bit for bit.
#pragma once
#include <stdint.h>

namespace d2v {

enum MaskKind : int32_t { kMaskSpan, kMaskRectangles, kMaskTokenSpan, kMaskBlock, kMaskRandom };

struct MaskRule {
  MaskKind kind;
  int64_t height, width;  // height 0: a sequence of `width` tokens
  double ratio;
  int64_t span;
  double adjust;
  bool inverse, equal_counts;
  uint64_t seed;

  int64_t tokens() const { return width * (height > 0 ? height : 1); }
};

// mask (samples * copies, tokens), 1 = masked; counts (samples * copies): masked positions of each row.
// lengths: `samples` numbers in [0, tokens], or null.
void draw_masks(const MaskRule& rule, const int64_t* sample_ids, int64_t samples, uint64_t epoch, int64_t copies,
                const int64_t* lengths, uint8_t* mask, int64_t* counts);

// numbers: flat numbers r * tokens + t of the masked positions, ascending. With visible >= 0 (every row leaves that
// many visible) also keep (rows, visible) and restore (rows, tokens); else both are null.
void list_masks(const uint8_t* mask, int64_t rows, int64_t tokens, int64_t visible, int32_t* keep, int32_t* restore,
                int64_t* numbers);

}  // namespace d2v
