// The storage formats of gradients and parameter copies, and their scalar conversions to and from fp32 in integer
// arithmetic, which no compiler flag and no control register can change.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace offload {

// Values of the C ABI, see adam.cpp.
enum class Format : int { kNone = -1, kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

inline size_t SizeOf(Format format) { return format == Format::kFloat32 ? 4 : format == Format::kNone ? 0 : 2; }

inline __attribute__((always_inline)) float BitsToFloat(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline __attribute__((always_inline)) uint32_t FloatToBits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline __attribute__((always_inline)) float BFloat16ToFloat(uint16_t half) { return BitsToFloat(uint32_t{half} << 16); }

// To nearest, ties to even; every NaN becomes the canonical one. (The instruction vcvtneps2bf16 flushes denormals.)
inline __attribute__((always_inline)) uint16_t FloatToBFloat16(float value) {
  const uint32_t bits = FloatToBits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline __attribute__((always_inline)) float Float16ToFloat(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 0x1fu;
  const uint32_t fraction = half & 0x3ffu;
  if (exponent == 31) return BitsToFloat(sign | 0x7f800000u | (fraction << 13) | (fraction ? 0x400000u : 0u));
  if (exponent != 0) return BitsToFloat(sign | ((exponent + 112) << 23) | (fraction << 13));
  const float magnitude = static_cast<float>(fraction) * 0x1p-24f;  // exact: zero or a half-precision denormal
  return BitsToFloat(sign | FloatToBits(magnitude));
}

inline __attribute__((always_inline)) uint16_t FloatToFloat16(float value) {
  const uint32_t bits = FloatToBits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more round to infinity
  if (magnitude < 0x38800000u) {  // denormal in half precision: adding 0.5 rounds to multiples of 2^-24
    return static_cast<uint16_t>(sign | (FloatToBits(BitsToFloat(magnitude) + 0.5f) - 0x3f000000u));
  }
  magnitude += 0xc8000fffu + ((magnitude >> 13) & 1u);  // rebias the exponent by -112, round to nearest even
  return static_cast<uint16_t>(sign | (magnitude >> 13));
}

}  // namespace offload
