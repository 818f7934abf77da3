// The optimizer update on the CPU: one translation unit, a plain C ABI, no torch and no Python headers.
//
// The binary is portable: each instruction set has a target region of its own, chosen at run time. The standard
// headers come first, so that none of their inline code is compiled for more than the baseline. Built with
// -ffp-contract=off, repeated below for compilers that read it: GCC contracts intrinsics too, and then the bits
// depend on the compiler.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "affinity.h"
#include "checks.h"
#include "formats.h"
#include "padded_block.h"
#include "scalars.h"
#include "shares.h"
#include "state.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

#define OFFLOAD_INLINE inline __attribute__((always_inline))
#define OFFLOAD_LIKELY(condition) __builtin_expect(condition, 1)
#define OFFLOAD_UNLIKELY(condition) __builtin_expect(condition, 0)
#define OFFLOAD_EXPORT extern "C" __attribute__((visibility("default")))

namespace offload {
namespace {

using RangeFn = void (*)(const Buffers&, size_t begin, size_t end, const void* scalars);

namespace scalar {
#define OFFLOAD_LANE "lane_scalar.inl"
#include "kernel.inl"
#undef OFFLOAD_LANE
}  // namespace scalar

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace avx2 {
#define OFFLOAD_LANE "lane_avx2.inl"
#include "kernel.inl"
#undef OFFLOAD_LANE
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif
namespace avx512 {
#define OFFLOAD_LANE "lane_avx512.inl"
#include "kernel.inl"
#undef OFFLOAD_LANE
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__

// Values of the C ABI.
enum class Isa : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2 };

#if defined(__x86_64__)
bool HasF16c() {  // clang 14 does not know it by name
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

bool IsSupported(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // Asked once: a virtual machine's host answers cpuid, which takes longer than a small update.
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && HasF16c();
  if (isa == Isa::kAvx2) return has_avx2;
  if (isa == Isa::kAvx512) {
    return has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
#endif
  return isa == Isa::kScalar;
}

RangeFn Select(Isa isa, RuleKind rule, const Buffers& buffers) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return avx512::Select(rule, buffers);
  if (isa == Isa::kAvx2) return avx2::Select(rule, buffers);
#endif
  return scalar::Select(rule, buffers);
}

using StreamFn = void (*)(const Buffers&, size_t begin, size_t end);

StreamFn SelectStream(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return avx512::StreamRange;
  if (isa == Isa::kAvx2) return avx2::StreamRange;
#endif
  return scalar::StreamRange;
}

// Round to nearest, denormals kept, exceptions masked; what the thread had before comes back at the end. The control
// register is per thread and inherited from whoever started it, torch.set_flush_denormal(True) included.
class IeeeArithmetic {
#if defined(__x86_64__)
 public:
  IeeeArithmetic() : previous_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~IeeeArithmetic() { _mm_setcsr(previous_); }

 private:
  const unsigned previous_;
#endif
};

}  // namespace
}  // namespace offload

// Raised with every change of a signature or of a struct of scalars; offload/kernels/native.py refuses another.
OFFLOAD_EXPORT int offload_adam_abi_version() { return 3; }

// isa: 0 scalar, 1 AVX2, 2 AVX-512. Whether this processor (and operating system) runs it.
OFFLOAD_EXPORT int offload_adam_supports(int isa) { return offload::IsSupported(static_cast<offload::Isa>(isa)); }

// What of an update is the same at every step. rule: 0 Adam, 1 Lion, 2 Adagrad, 3 SGD. state_format: 0 fp32, 1 split16,
// 2 bf16, 3 int8; state.h says what the state's buffers then are. Formats of grad and param: -1 none (param only), 0
// fp32, 1 bfloat16, 2 fp16. Buffers don't overlap; alignment is that of their element. Work is handed out in chunks of
// chunk_numel elements (> 0, in int8 a multiple of 128).
struct OffloadWork {
  int32_t isa, rule, state_format, grad_format, param_format;
  void* master;
  void* first;
  void* second;
  float* max_second;
  float* first_scale;
  float* second_scale;
  const void* grad;
  void* param;
  size_t numel, chunk_numel;
};

// One step, in place, by at most num_threads threads, the caller included. scalars: the struct of the rule's name in
// scalars.h. key and first_index: of Rounding in state.h. Returns 0, or a Refusal of checks.h,
// before any memory is touched.
OFFLOAD_EXPORT int offload_update(const OffloadWork* work, const void* scalars, uint64_t key, uint32_t first_index,
                                  int num_threads) {
  using namespace offload;
  const Isa isa = static_cast<Isa>(work->isa);
  if (!IsSupported(isa)) return static_cast<int>(Refusal::kUnknown);
  const Buffers buffers{static_cast<StateFormat>(work->state_format),
                        work->master,
                        work->first,
                        work->second,
                        work->max_second,
                        work->first_scale,
                        work->second_scale,
                        work->grad,
                        static_cast<Format>(work->grad_format),
                        work->param,
                        static_cast<Format>(work->param_format),
                        Rounding{static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32), first_index}};
  const Refusal refusal =
      Check(static_cast<RuleKind>(work->rule), buffers, work->numel, scalars, num_threads, work->chunk_numel);
  if (refusal != Refusal::kFine) return static_cast<int>(refusal);
  const RangeFn update = Select(isa, static_cast<RuleKind>(work->rule), buffers);
  if (update == nullptr) return -1;
  ForRanges(work->numel, work->chunk_numel, num_threads, [&](size_t begin, size_t end) {
    const IeeeArithmetic arithmetic;
    update(buffers, begin, end, scalars);
  });
  return 0;
}

// A pass over the same memory as a step over fp32 gradients without a parameter copy, that computes next to nothing:
// what the machine's memory allows. It changes the three arrays by a few last bits. Returns 0, or -1 as above.
OFFLOAD_EXPORT int offload_adam_stream(int isa, float* master, float* exp_avg, float* exp_avg_sq, const float* grad,
                                       size_t numel, int num_threads, size_t chunk_numel) {
  using namespace offload;
  if (!IsSupported(static_cast<Isa>(isa)) || chunk_numel == 0) return -1;
  const Buffers buffers{StateFormat::kFloat32, master,  exp_avg,       exp_avg_sq, nullptr, nullptr, nullptr, grad,
                        Format::kFloat32,      nullptr, Format::kNone, Rounding{}};
  const StreamFn stream = SelectStream(static_cast<Isa>(isa));
  ForRanges(numel, chunk_numel, num_threads, [&](size_t begin, size_t end) { stream(buffers, begin, end); });
  return 0;
}

// Zeros, each page written first by the thread that will update it: with the same number of elements, chunk_bytes for
// chunk_numel of them, and num_threads, the shares are those of offload_update.
OFFLOAD_EXPORT void offload_zero(char* memory, size_t num_bytes, int num_threads, size_t chunk_bytes) {
  offload::ForRanges(num_bytes, chunk_bytes, num_threads,
                     [&](size_t begin, size_t end) { std::memset(memory + begin, 0, end - begin); });
}

// From the next call on, thread s of an update runs on processor cpus[s % num_cpus]; with num_cpus 0 wherever it may.
// Returns 0, or -1 if a number is out of the system's range or this system can't bind threads.
OFFLOAD_EXPORT int offload_bind_threads(const int* cpus, int num_cpus) {
#if defined(__linux__)
  for (int i = 0; i < num_cpus; ++i) {
    if (cpus[i] < 0 || cpus[i] >= CPU_SETSIZE) return -1;
  }
  const offload::CpuList* chosen = num_cpus > 0 ? new offload::CpuList(cpus, cpus + num_cpus) : nullptr;
  offload::ChosenCpus().store(chosen, std::memory_order_release);
  return 0;
#else
  return num_cpus > 0 ? -1 : 0;
#endif
}
