// Picks the kernels' instruction level once, at first use.
#include "dispatch.h"

#include <cstdlib>
#include <cstring>

#if defined(D2V_X86_LEVELS)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include "attention.h"
#include "convolution.h"
#include "ema.h"
#include "gelu.h"
#include "layers.h"
#include "loss.h"
#include "norm.h"
#include "tokens.h"

namespace d2v {

#define D2V_DECLARE(isa)                                     \
  extern const AttentionKernels attention_kernels_##isa;     \
  extern const ConvolutionKernels convolution_kernels_##isa; \
  extern const EmaKernels ema_kernels_##isa;                 \
  extern const GeluKernels gelu_kernels_##isa;               \
  extern const LayersKernels layers_kernels_##isa;           \
  extern const LossKernels loss_kernels_##isa;               \
  extern const NormKernels norm_kernels_##isa;               \
  extern const TokensKernels tokens_kernels_##isa;
D2V_DECLARE(base)
#if defined(D2V_X86_LEVELS)
D2V_DECLARE(avx2)
#endif
#if defined(D2V_HAS_AVX512)
D2V_DECLARE(avx512)
#endif
#undef D2V_DECLARE
#if defined(D2V_HAS_AVX512BF16)
extern const AttentionKernels attention_bf16_kernels_avx512bf16;
extern const ConvolutionKernels convolution_kernels_avx512bf16;
extern const GeluKernels gelu_kernels_avx512bf16;
extern const NormKernels norm_kernels_avx512bf16;
#endif
#if defined(D2V_HAS_AMX)
extern const AttentionKernels attention_bf16_kernels_amx;
extern const ConvolutionKernels convolution_kernels_amx;
extern const GeluKernels gelu_kernels_amx;
extern const NormKernels norm_kernels_amx;
#endif

namespace {

struct Tables {
  const char* isa;
  const EmaKernels *ema, *narrow_ema;  // narrow: of 16-bit sources and of averages in two halves
  const GeluKernels* gelu;
  const LayersKernels* layers;
  const LossKernels* loss;
  const NormKernels* norm;
  const TokensKernels* tokens;
  const AttentionKernels *attention, *bf16_attention;        // bf16: with bf16 products, null without
  const ConvolutionKernels *convolution, *bf16_convolution;  // the same without them
};

#define D2V_TABLES(isa, ema_isa)                                                                                       \
  Tables {                                                                                                             \
    #isa, &ema_kernels_##ema_isa, &ema_kernels_##isa, &gelu_kernels_##isa, &layers_kernels_##isa, &loss_kernels_##isa, \
        &norm_kernels_##isa, &tokens_kernels_##isa, &attention_kernels_##isa, nullptr, &convolution_kernels_##isa,     \
        &convolution_kernels_##isa                                                                                     \
  }

#if defined(D2V_X86_LEVELS)
constexpr const char* kLevels[] = {"base", "avx2", "avx512", "avx512bf16", "amx"};
constexpr int kLevelCount = 5;

// Place in kLevels of what D2V_KERNELS_ISA asks for (tests ask for less than the machine has); the last for all else.
int highest_level() {
  const char* const highest = std::getenv("D2V_KERNELS_ISA");
  int level = 0;
  while (level < kLevelCount - 1 && (!highest || std::strcmp(highest, kLevels[level]) != 0)) ++level;
  return level;
}

#if defined(D2V_HAS_AVX512BF16)
// A bit of cpuid's leaf 7; registers eax, ebx, ecx, edx.
bool has_feature(unsigned subleaf, int which, int bit) {
  unsigned r[4] = {};
  return __get_cpuid_count(7, subleaf, &r[0], &r[1], &r[2], &r[3]) && (r[which] >> bit & 1u);
}

#if defined(D2V_HAS_AMX)
// AMX for bf16: the processor has it, and the system saves its registers and lets this process use them (Linux wants
// to be asked, once a process; it refuses where a thread's signal stack has no room for the registers).
bool may_use_tiles() {
#if defined(__linux__)
  unsigned a, b, c, d;
  if (!has_feature(0, 3, 22) || !has_feature(0, 3, 24)) return false;    // amx-bf16, amx-tile
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1u)) return false;  // xgetbv
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low >> 17 & 3u) != 3u) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif  // D2V_HAS_AMX
#endif  // D2V_HAS_AVX512BF16
#endif

Tables pick() {
#if defined(D2V_X86_LEVELS)
  const int level = highest_level();
  __builtin_cpu_init();  // also looks at what the operating system saves
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#if defined(D2V_HAS_AVX512)
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  // An fp32 average from an fp32 source is limited by memory, and stores of 32 bytes to lines just read were quicker
  // than those of 64 (0.80 of their time, 0.91 with a bf16 copy). Where numbers are converted on the way in, AVX-512
  // was (0.95 of the time with bf16 sources, 0.88 with averages in two halves, and less in the caches).
  if (level >= 2 && avx512) {
    Tables found = D2V_TABLES(avx512, avx2);
    // The levels above differ in bf16 products alone.
#if defined(D2V_HAS_AVX512BF16)
    const bool products = has_feature(1, 0, 5);
#if defined(D2V_HAS_AMX)
    if (level >= 4 && products && may_use_tiles()) {
      found.isa = "amx", found.bf16_attention = &attention_bf16_kernels_amx;
      found.bf16_convolution = &convolution_kernels_amx;
      found.gelu = &gelu_kernels_amx, found.norm = &norm_kernels_amx;
      return found;
    }
#endif
    // Intel's processors take four times as long for vdpbf16ps as for a multiply-add of half the products (measured on
    // one with AMX; there attention through fp32 is the quicker one by a tenth to a quarter): by name alone.
    if (products && (level == 3 || (level > 3 && !__builtin_cpu_is("intel")))) {
      found.isa = "avx512bf16", found.bf16_attention = &attention_bf16_kernels_avx512bf16;
      found.bf16_convolution = &convolution_kernels_avx512bf16;
      found.gelu = &gelu_kernels_avx512bf16, found.norm = &norm_kernels_avx512bf16;
    }
#endif
    return found;
  }
#endif
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
const AttentionKernels* attention_bf16_kernels() { return tables().bf16_attention; }
const ConvolutionKernels& convolution_kernels(DType type) {
  return type == kBFloat16 ? *tables().bf16_convolution : *tables().convolution;
}
const NormKernels& norm_kernels() { return *tables().norm; }
const TokensKernels& tokens_kernels() { return *tables().tokens; }

}  // namespace d2v
