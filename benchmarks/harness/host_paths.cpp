// Host paths of a training step, once each, for instruction counts: host_paths NAME REPEATS.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "masks.h"

namespace {

// Masks and their lists for a batch, as a loader worker makes them.
void collate(const d2v::MaskRule& rule, int64_t samples, int64_t copies, int64_t epoch) {
  const int64_t rows = samples * copies, tokens = rule.tokens();
  std::vector<int64_t> ids(samples), counts(rows);
  for (int64_t i = 0; i < samples; ++i) ids[i] = i;
  std::vector<uint8_t> mask(rows * tokens);
  d2v::draw_masks(rule, ids.data(), samples, epoch, copies, nullptr, mask.data(), counts.data());
  int64_t total = 0;
  bool equal = true;
  for (const int64_t c : counts) total += c, equal = equal && c == counts[0];
  const int64_t visible = equal ? tokens - counts[0] : -1;
  std::vector<int32_t> keep(equal ? rows * visible : 0), restore(equal ? rows * tokens : 0);
  std::vector<int64_t> numbers(total);
  d2v::list_masks(mask.data(), rows, tokens, visible, equal ? keep.data() : nullptr, equal ? restore.data() : nullptr,
                  numbers.data());
}

}  // namespace

int main(int argc, char** argv) {
  const char* name = argc > 1 ? argv[1] : "";
  const int repeats = argc > 2 ? atoi(argv[2]) : 0;
  for (int i = 0; i < repeats; ++i) {
    if (!strcmp(name, "images")) {
      collate({d2v::kMaskBlock, 14, 14, 0.8, 3, 0.07, true, false, 0}, 16, 16, i);
    } else if (!strcmp(name, "speech 2.0")) {
      collate({d2v::kMaskBlock, 0, 999, 0.5, 5, 0.05, false, false, 0}, 3, 8, i);
    } else if (!strcmp(name, "speech 1.0")) {
      collate({d2v::kMaskSpan, 0, 999, 0.65, 10, 0.0, false, false, 0}, 11, 1, i);
    } else {
      fprintf(stderr, "host_paths: expected images, speech 1.0 or speech 2.0, got %s\n", name);
      return 2;
    }
  }
  return 0;
}
