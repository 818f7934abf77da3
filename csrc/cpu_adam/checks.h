// What the C ABI checks of an update before it touches memory. Lengths it must be told; a pointer says whether it is
// there and aligned.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "formats.h"
#include "state.h"

namespace offload {

// Values of the C ABI. Anything but kFine leaves all memory as it was.
enum class Refusal : int { kFine = 0, kUnknown = -1, kMissing = -2, kMisaligned = -3, kLength = -4 };

inline bool IsKnown(Format format, bool may_be_none) {
  return format == Format::kFloat32 || format == Format::kBFloat16 || format == Format::kFloat16 ||
         (may_be_none && format == Format::kNone);
}

inline bool IsAligned(const void* pointer, size_t size) {
  return size == 0 || reinterpret_cast<uintptr_t>(pointer) % size == 0;
}

// Of what a rule needs, as offload/kernels/dispatch.py has it.
inline bool HasMoments(RuleKind rule, const Buffers& buffers) {
  const bool needs_first = rule == RuleKind::kAdam || rule == RuleKind::kLion;
  const bool needs_second = rule == RuleKind::kAdam || rule == RuleKind::kAdagrad;
  if ((needs_first && !buffers.first) || (needs_second && !buffers.second)) return false;
  if (buffers.state_format != StateFormat::kInt8) return true;
  return (!buffers.first || buffers.first_scale) && (!buffers.second || buffers.second_scale);
}

inline Refusal Check(RuleKind rule, const Buffers& buffers, size_t numel, const void* scalars, int num_threads,
                     size_t chunk_numel) {
  if (rule < RuleKind::kAdam || rule > RuleKind::kSgd) return Refusal::kUnknown;
  if (buffers.state_format < StateFormat::kFloat32 || buffers.state_format > StateFormat::kInt8)
    return Refusal::kUnknown;
  const bool is_compact = buffers.state_format != StateFormat::kFloat32;
  const size_t moment_size = SizeOfMoment(buffers.state_format);
  if (!IsKnown(buffers.grad_format, false) || !IsKnown(buffers.param_format, !is_compact)) return Refusal::kUnknown;
  if (is_compact && buffers.param_format != Format::kBFloat16) return Refusal::kUnknown;

  const bool has_param = buffers.param_format != Format::kNone;
  if (!buffers.master || !buffers.grad || !scalars || (has_param && !buffers.param) || !HasMoments(rule, buffers))
    return Refusal::kMissing;
  if (!IsAligned(buffers.master, is_compact ? 2 : 4) || !IsAligned(buffers.first, moment_size) ||
      !IsAligned(buffers.second, moment_size) || !IsAligned(buffers.max_second, 4) ||
      !IsAligned(buffers.first_scale, 4) || !IsAligned(buffers.second_scale, 4) ||
      !IsAligned(buffers.grad, SizeOf(buffers.grad_format)) ||
      !IsAligned(buffers.param, SizeOf(buffers.param_format)) || !IsAligned(scalars, 4))
    return Refusal::kMisaligned;

  const bool keeps_blocks = buffers.state_format != StateFormat::kInt8 || chunk_numel % kStateBlock == 0;
  if (numel > std::numeric_limits<size_t>::max() / 8 || chunk_numel == 0 || num_threads < 1 || !keeps_blocks)
    return Refusal::kLength;
  return Refusal::kFine;
}

}  // namespace offload
