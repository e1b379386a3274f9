// Picks the kernels' instruction level once, at first use.
#include "dispatch.h"

#include <cstdlib>
#include <cstring>

#include "attention.h"
#include "ema.h"
#include "gelu.h"
#include "layers.h"
#include "loss.h"
#include "norm.h"
#include "tokens.h"

namespace d2v {

#define D2V_DECLARE(isa)                                 \
  extern const AttentionKernels attention_kernels_##isa; \
  extern const EmaKernels ema_kernels_##isa;             \
  extern const GeluKernels gelu_kernels_##isa;           \
  extern const LayersKernels layers_kernels_##isa;       \
  extern const LossKernels loss_kernels_##isa;           \
  extern const NormKernels norm_kernels_##isa;           \
  extern const TokensKernels tokens_kernels_##isa;
D2V_DECLARE(base)
#if defined(D2V_X86_LEVELS)
D2V_DECLARE(avx2)
D2V_DECLARE(avx512)
#endif
#undef D2V_DECLARE

namespace {

struct Tables {
  const char* isa;
  const EmaKernels *ema, *narrow_ema;  // narrow: of 16-bit sources and of averages in two halves
  const GeluKernels* gelu;
  const LayersKernels* layers;
  const LossKernels* loss;
  const NormKernels* norm;
  const TokensKernels* tokens;
  const AttentionKernels* attention;
};

#define D2V_TABLES(isa, ema_isa)                                                                                       \
  Tables {                                                                                                             \
    #isa, &ema_kernels_##ema_isa, &ema_kernels_##isa, &gelu_kernels_##isa, &layers_kernels_##isa, &loss_kernels_##isa, \
        &norm_kernels_##isa, &tokens_kernels_##isa, &attention_kernels_##isa                                           \
  }

Tables pick() {
#if defined(D2V_X86_LEVELS)
  const char* highest = std::getenv("D2V_KERNELS_ISA");  // tests ask for less than the machine has
  const int level = !highest || !*highest           ? 2
                    : !std::strcmp(highest, "base") ? 0
                    : !std::strcmp(highest, "avx2") ? 1
                                                    : 2;
  __builtin_cpu_init();  // also looks at what the operating system saves
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  // An fp32 average from an fp32 source is limited by memory, and stores of 32 bytes to lines just read were quicker
  // than those of 64 (0.80 of their time, 0.91 with a bf16 copy). Where numbers are converted on the way in, AVX-512
  // was (0.95 of the time with bf16 sources, 0.88 with averages in two halves, and less in the caches).
  if (level >= 2 && avx512) return D2V_TABLES(avx512, avx2);
  if (level >= 1 && avx2) return D2V_TABLES(avx2, avx2);
#endif
  return D2V_TABLES(base, base);
}

const Tables& tables() {
  static const Tables picked = pick();
  return picked;
}

}  // namespace

const char* cpu_isa() { return tables().isa; }
const EmaKernels& ema_kernels(const EmaTensor& t) {
  const bool narrow = t.average_type == kSplit || t.source_type == kBFloat16 || t.source_type == kFloat16;
  return narrow ? *tables().narrow_ema : *tables().ema;
}
const GeluKernels& gelu_kernels() { return *tables().gelu; }
const LayersKernels& layers_kernels() { return *tables().layers; }
const LossKernels& loss_kernels() { return *tables().loss; }
const AttentionKernels& attention_kernels() { return *tables().attention; }
const NormKernels& norm_kernels() { return *tables().norm; }
const TokensKernels& tokens_kernels() { return *tables().tokens; }

}  // namespace d2v
