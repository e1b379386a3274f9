// Regression targets of data2vec in C++, without torch: the mean of two layers, each normalised over time, at the
// positions that a mask rule picks. docs/install.md says how to build it.
#include <d2v/dispatch.h>
#include <d2v/layers.h>
#include <d2v/masks.h>

#include <cstdio>
#include <vector>

int main() {
  // Work is handed out in pieces of [0, n). One thread here; a program with a pool gives its pieces to that.
  const d2v::Parallel serial{[](int64_t n, int64_t, d2v::ParallelBody body, void* context) { body(context, 0, n); }, 1};

  const int64_t batch = 1, time = 8, channels = 2;
  std::vector<float> first, second, target(batch * time * channels);
  for (int64_t i = 0; i < batch * time * channels; ++i) {
    first.push_back(static_cast<float>(i));        // both channels rise with time
    second.push_back(static_cast<float>(10 * i));  // so does every multiple, which a normalisation takes back
  }
  const void* const layers[] = {first.data(), second.data()};
  const int64_t batch_stride[] = {time * channels, time * channels}, time_stride[] = {channels, channels};
  const d2v::LayersArgs args{
      layers,        batch_stride,       time_stride,    2,       batch, time,          channels,
      d2v::kFloat32, d2v::kNormInstance, d2v::kNormNone, nullptr, 1e-5,  target.data(), d2v::kFloat32};
  d2v::average_layers(args, serial);

  const d2v::MaskRule rule{d2v::kMaskSpan, 0, time, 0.5, 2, 0.0, false, true, 1};
  std::vector<uint8_t> mask(time);
  int64_t masked = 0;
  const int64_t sample = 0;
  d2v::draw_masks(rule, &sample, 1, 0, 1, nullptr, mask.data(), &masked);
  std::printf("%s: %lld of %lld masked\n", d2v::cpu_isa(), static_cast<long long>(masked),
              static_cast<long long>(time));
  std::printf("time masked target\n");
  for (int64_t t = 0; t < time; ++t) {
    std::printf("%lld %d %.4f\n", static_cast<long long>(t), mask[t], target[t * channels]);
  }
}
