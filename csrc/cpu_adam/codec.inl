// The storage formats, a vector at a time: each is widened to fp32 in registers and narrowed again, so no rule knows of
// it. Included by kernel.inl.
//
// Compact formats keep no master. Its upper half is the bfloat16 parameter itself, master rounded to nearest even, and
// an int16 holds what the rounding dropped: master's bits = (param's bits << 16) + remainder. Ties leave one value too
// many for that: half an ulp above an even parameter is +32768. The sign of the second moment, which is otherwise
// never set, counts as one more there. Where no second moment has room for it, master moves one fp32 ulp.

using Vec = Lane::Vec;
using Int = Lane::Int;

// ---- gradients and parameter copies

OFFLOAD_INLINE Vec WidenBFloat16(const uint16_t* source) {
  return Lane::FromBits(Lane::ShiftLeft<16>(Lane::LoadWide(source)));
}

OFFLOAD_INLINE Vec LoadFloats(const void* source, Format format, size_t i) {
  if (format == Format::kFloat32) return Lane::Load(static_cast<const float*>(source) + i);
  const uint16_t* halves = static_cast<const uint16_t*>(source) + i;
  return format == Format::kBFloat16 ? WidenBFloat16(halves) : Lane::LoadFloat16(halves);
}

// Bits of x, and of the canonical NaN for any.
OFFLOAD_INLINE Int CanonicalBits(Vec x) {
  return Lane::Select(Lane::IsNan(x), Lane::BroadcastInt(0x7fc00000u), Lane::Bits(x));
}

// To the nearest bfloat16, ties to even, in the lower half of each lane; see FloatToBFloat16.
OFFLOAD_INLINE Int NearestBFloat16(Int canonical_bits) {
  const Int is_odd = Lane::And(Lane::ShiftRight<16>(canonical_bits), Lane::BroadcastInt(1));
  const Int bias = Lane::AddInt(is_odd, Lane::BroadcastInt(0x7fff));
  return Lane::ShiftRight<16>(Lane::AddInt(canonical_bits, bias));
}

OFFLOAD_INLINE void StoreFloats(void* target, Format format, size_t i, Vec x, Vec y, bool streaming) {
  uint16_t* const halves = static_cast<uint16_t*>(target) + i;
  switch (format) {
    case Format::kNone:
      break;
    case Format::kFloat32:
      Lane::StorePair(static_cast<float*>(target) + i, x, y, streaming);
      break;
    case Format::kBFloat16:
      Lane::StorePair(halves, NearestBFloat16(CanonicalBits(x)), NearestBFloat16(CanonicalBits(y)), streaming);
      break;
    case Format::kFloat16:
      Lane::StorePair(halves, Lane::ToFloat16(x), Lane::ToFloat16(y), streaming);
      break;
  }
}

// ---- the two halves of a master

OFFLOAD_INLINE Int JoinMaster(const void* param, const void* remainder, size_t i) {
  const Int high = Lane::ShiftLeft<16>(Lane::LoadWide(static_cast<const uint16_t*>(param) + i));
  return Lane::AddInt(high, Lane::LoadWide(static_cast<const int16_t*>(remainder) + i));
}

struct Halves {
  Int param, remainder;  // in the lower half of each lane
  Lane::Mask is_tie;     // the remainder is one too small
};

// The lower half of the master, read as a signed number, is the remainder. Only a tie above an even parameter, which is
// rounded down, would need +32768 rather than -32768: it gets 32767.
OFFLOAD_INLINE Halves SplitMaster(Vec master) {
  const Int bits = CanonicalBits(master);
  const Lane::Mask is_tie = Lane::EqualInt(Lane::And(bits, Lane::BroadcastInt(0x1ffffu)), Lane::BroadcastInt(0x8000u));
  const Int remainder = Lane::And(Lane::SubWhere(is_tie, bits), Lane::BroadcastInt(0xffffu));
  return {NearestBFloat16(bits), remainder, is_tie};
}

// ---- random bits and bfloat16 moments, rounded up with the probability of what is dropped

// Rounding::Bits of elements i, i + 1, ...
OFFLOAD_INLINE Int RandomBits(const Rounding& rounding, size_t i) {
  Int x = Lane::CountFrom(rounding.first_index + static_cast<uint32_t>(i) + rounding.key0);
  x = Lane::MulInt(Lane::Xor(x, Lane::ShiftRight<16>(x)), Lane::BroadcastInt(0x7feb352du));
  x = Lane::MulInt(Lane::Xor(x, Lane::ShiftRight<15>(x)), Lane::BroadcastInt(0x846ca68bu));
  return Lane::Xor(Lane::Xor(x, Lane::ShiftRight<16>(x)), Lane::BroadcastInt(rounding.key1));
}

// The first moment is rounded with the lower half of the random bits, the second one with the upper half.
template <bool kIsSecond>
OFFLOAD_INLINE Int Threshold(Int random) {
  return kIsSecond ? Lane::ShiftRight<16>(random) : Lane::And(random, Lane::BroadcastInt(0xffffu));
}

OFFLOAD_INLINE Int RoundUpAt(Int canonical_bits, Int threshold) {
  return Lane::ShiftRight<16>(Lane::AddInt(canonical_bits, threshold));
}

// ---- 8-bit moments: code * |code| times the block's scale; int8 for the first moment, uint8 for the second

OFFLOAD_INLINE Int Magnitude(Vec x) { return Lane::And(Lane::Bits(x), Lane::BroadcastInt(0x7fffffffu)); }

template <class Code>
OFFLOAD_INLINE Vec WidenCodes(const Code* codes, float scale) {
  const Vec code = Lane::ToFloat(Lane::LoadWide(codes));
  return Lane::Mul(Lane::Mul(code, Lane::FromBits(Magnitude(code))), Lane::Broadcast(scale));
}

// A value between two codes takes the upper one with the probability that makes its mean exact. Of a second moment
// only zero is stored as zero: it divides.
template <bool kIsSecond>
OFFLOAD_INLINE Int NarrowToCodes(Vec x, Vec inverse_scale, Int random) {
  const Int magnitude = Magnitude(x);
  const Vec square = Lane::Mul(Lane::FromBits(magnitude), inverse_scale);
  const Int below = Lane::Truncate(Lane::Sqrt(square));
  const Vec root = Lane::ToFloat(below);
  const Vec excess = Lane::Sub(square, Lane::Mul(root, root));
  const Vec gap = Lane::Fma(root, Lane::Broadcast(0x1p-15f), Lane::Broadcast(0x1p-16f));  // to the next square, * 2^-16
  const Lane::Mask is_up = Lane::Greater(excess, Lane::Mul(Lane::ToFloat(Threshold<kIsSecond>(random)), gap));
  const Int code = Lane::MinInt(Lane::AddWhere(is_up, below), Lane::BroadcastInt(kIsSecond ? 255 : 127));
  if constexpr (kIsSecond) {
    return Lane::MaxInt(code, Lane::MinInt(magnitude, Lane::BroadcastInt(1)));
  } else {
    const Int sign = Lane::SpreadSign(Lane::Bits(x));
    return Lane::And(Lane::SubInt(Lane::Xor(code, sign), sign), Lane::BroadcastInt(0xff));
  }
}

// Codes of a whole block, of whose magnitudes `largest` is the largest. Returns the scale: NaN if any value is NaN or
// infinite, 0 for a block too small to matter.
template <bool kIsSecond>
OFFLOAD_INLINE float NarrowBlock(const float* values, Int largest, const Rounding& rounding, size_t i, void* codes) {
  constexpr float kSquare = kIsSecond ? 255.0f * 255.0f : 127.0f * 127.0f;  // of the largest code
  uint8_t* const target = static_cast<uint8_t*>(codes) + i;
  const uint32_t bits = Lane::Largest(largest);
  const bool is_finite = bits < 0x7f800000u;
  if (!is_finite || BitsToFloat(bits) < 0x1p-96f) {
    std::memset(target, 0, kStateBlock);
    return is_finite ? 0.0f : BitsToFloat(0x7fc00000u);
  }
  const float scale = BitsToFloat(bits) / kSquare;
  const Vec inverse = Lane::Broadcast(1.0f / scale);
  for (size_t k = 0; k < kStateBlock; k += 2 * Lane::kWidth) {
    const size_t next = k + Lane::kWidth;
    const Int x = NarrowToCodes<kIsSecond>(Lane::Load(values + k), inverse, RandomBits(rounding, i + k));
    const Int y = NarrowToCodes<kIsSecond>(Lane::Load(values + next), inverse, RandomBits(rounding, i + next));
    Lane::StorePair(target + k, x, y);
  }
  return scale;
}
