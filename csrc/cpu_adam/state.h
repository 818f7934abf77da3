// The state of a range of parameters in each format, and the random bits it is rounded with.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats.h"

namespace offload {

// Values of the C ABI, see adam.cpp.
enum class RuleKind : int { kAdam = 0, kLion = 1, kAdagrad = 2, kSgd = 3 };
enum class StateFormat : int { kFloat32 = 0, kSplit16 = 1, kBFloat16 = 2, kInt8 = 3 };

// Elements that share a scale in kInt8, and that are staged at a time.
constexpr size_t kStateBlock = 128;

inline size_t SizeOfMoment(StateFormat format) {
  return format == StateFormat::kInt8 ? 1 : format == StateFormat::kBFloat16 ? 2 : 4;
}

// Random bits of an element: a function of the key, which the caller makes of seed and step, and of the element's
// number, so that neither placement nor threads nor subgroups matter. The mixing is C. Wellons's "lowbias32".
struct Rounding {
  uint32_t key0, key1;
  uint32_t first_index;  // the number of element 0
};

struct Buffers {
  StateFormat state_format;
  void* master;         // fp32, or in the other formats the int16 remainder of it
  void* first;          // fp32, bfloat16 or int8; null for rules without
  void* second;         // fp32, bfloat16 or uint8; null for rules without
  float* max_second;    // null without amsgrad
  float* first_scale;   // kInt8: one a block
  float* second_scale;  // kInt8: one a block
  const void* grad;
  Format grad_format;
  void* param;  // written; in formats other than fp32 also read, and bfloat16
  Format param_format;
  Rounding rounding;
};

}  // namespace offload
