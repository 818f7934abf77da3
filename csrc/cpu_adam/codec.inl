// The storage formats, a vector at a time: each is widened to fp32 in registers and narrowed again, so no rule knows of
// it. Included by kernel.inl.
//
// Compact formats keep no master. Its upper half is the bfloat16 parameter itself, master rounded to nearest even, and
// an int16 holds what the rounding dropped: master's bits = (param's bits << 16) + remainder. Ties leave one value too
// many for that: half an ulp above an even parameter is +32768. The sign of the second moment, which is otherwise never
// set, counts as one more there. Where no second moment has room for it, master moves one fp32 ulp.

using Vec = Lane::Vec;
using Int = Lane::Int;

// ---- gradients and parameter copies

OFFLOAD_INLINE Vec LoadFloats(const void* source, Format format, size_t i) {
  if (format == Format::kFloat32) return Lane::Load(static_cast<const float*>(source) + i);
  const uint16_t* halves = static_cast<const uint16_t*>(source) + i;
  if (format == Format::kFloat16) return Lane::LoadFloat16(halves);
  return Lane::FromBits(Lane::ShiftLeft<16>(Lane::LoadWide(halves)));
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

// ---- pairs: of 2 * kWidth elements, x has those at even places and y those at odd ones. So two 16-bit values that are
// neighbours in memory are one in x and one in y, and hardly anything moves between lanes.

struct Pair {
  Vec x, y;
};

OFFLOAD_INLINE Pair LoadFloatPair(const void* source, Format format, size_t i) {
  if (format == Format::kBFloat16) {
    const Int halves = Lane::LoadHalves(static_cast<const uint16_t*>(source) + i);
    return {Lane::FromBits(Lane::ShiftLeft<16>(halves)),
            Lane::FromBits(Lane::And(halves, Lane::BroadcastInt(0xffff0000u)))};
  }
  Pair pair;
  Lane::Deinterleave(LoadFloats(source, format, i), LoadFloats(source, format, i + Lane::kWidth), pair.x, pair.y);
  return pair;
}

OFFLOAD_INLINE void StoreFloatPair(void* target, size_t i, Pair pair) {
  Vec first, second;
  Lane::Interleave(pair.x, pair.y, first, second);
  Lane::Store(static_cast<float*>(target) + i, first);
  Lane::Store(static_cast<float*>(target) + i + Lane::kWidth, second);
}

// The upper halves of x and y, in memory's order.
OFFLOAD_INLINE Int UpperHalves(Int x, Int y) { return Lane::Blend(Lane::ShiftRight<16>(x), y); }
OFFLOAD_INLINE Int LowerHalves(Int x, Int y) { return Lane::Blend(x, Lane::ShiftLeft<16>(y)); }

// ---- the two halves of a master, 16 bits at a time

// ties: all ones where the second moment's sign says that the remainder is one too small.
OFFLOAD_INLINE Pair JoinMaster(Int param, Int remainder, Int ties) {
  // One less above a negative remainder.
  const Int upper = Lane::AddHalves(param, Lane::SpreadSignHalves(remainder));
  const Int lower = Lane::SubHalves(remainder, ties);
  return {Lane::FromBits(Lane::Blend(lower, Lane::ShiftLeft<16>(upper))),
          Lane::FromBits(Lane::Blend(Lane::ShiftRight<16>(lower), upper))};
}

struct Halves {
  Int param, remainder;
  Int ties;  // all ones where the remainder is one too small
};

// The lower half of the master, read as a signed number, is the remainder. Only a tie above an even parameter, which is
// rounded down, would need +32768 rather than -32768: it gets 32767.
OFFLOAD_INLINE Halves SplitMaster(Pair master) {
  const Int x = CanonicalBits(master.x), y = CanonicalBits(master.y);
  const Int upper = UpperHalves(x, y), lower = LowerHalves(x, y);
  const Int odd = Lane::And(upper, Lane::BroadcastInt(0x00010001u));
  const Int ties = Lane::And(Lane::EqualHalves(lower, Lane::BroadcastInt(0x80008000u)),
                             Lane::EqualHalves(odd, Lane::BroadcastInt(0)));
  const Int is_up = Lane::AndNot(ties, Lane::SpreadSignHalves(lower));
  return {Lane::SubHalves(upper, is_up), Lane::AddHalves(lower, ties), ties};
}

// ---- random bits and bfloat16 moments, rounded up with the probability of what is dropped

// Rounding::Bits of those elements whose numbers, counted from key0, are these.
OFFLOAD_INLINE Int RandomBits(const Rounding& rounding, Int x) {
  x = Lane::MulInt(Lane::Xor(x, Lane::ShiftRight<16>(x)), Lane::BroadcastInt(0x7feb352du));
  x = Lane::MulInt(Lane::Xor(x, Lane::ShiftRight<15>(x)), Lane::BroadcastInt(0x846ca68bu));
  return Lane::Xor(Lane::Xor(x, Lane::ShiftRight<16>(x)), Lane::BroadcastInt(rounding.key1));
}

struct RandomPair {
  Int x, y;
};

OFFLOAD_INLINE RandomPair RandomBits(const Rounding& rounding, size_t i) {
  const Int even = Lane::CountEven(rounding.first_index + static_cast<uint32_t>(i) + rounding.key0);
  return {RandomBits(rounding, even), RandomBits(rounding, Lane::AddInt(even, Lane::BroadcastInt(1)))};
}

// The first moment is rounded with the lower half of the random bits, the second one with the upper half.
template <bool kIsSecond>
OFFLOAD_INLINE Int Threshold(Int random) {
  return kIsSecond ? Lane::ShiftRight<16>(random) : Lane::And(random, Lane::BroadcastInt(0xffffu));
}

// The bfloat16 halves.
template <bool kIsSecond>
OFFLOAD_INLINE Int RoundUpAtRandom(Pair moment, RandomPair random) {
  return UpperHalves(Lane::AddInt(CanonicalBits(moment.x), Threshold<kIsSecond>(random.x)),
                     Lane::AddInt(CanonicalBits(moment.y), Threshold<kIsSecond>(random.y)));
}

// ---- 8-bit moments: code * |code| times the block's scale; int8 for the first moment, uint8 for the second

OFFLOAD_INLINE Int Magnitude(Vec x) { return Lane::And(Lane::Bits(x), Lane::BroadcastInt(0x7fffffffu)); }

OFFLOAD_INLINE Vec WidenCode(Int code, float scale) {
  const Vec root = Lane::ToFloat(code);
  return Lane::Mul(Lane::Mul(root, Lane::FromBits(Magnitude(root))), Lane::Broadcast(scale));
}

template <bool kIsSecond>
OFFLOAD_INLINE Pair WidenCodes(const void* codes, const float* scales, size_t i) {
  const Int both = Lane::LoadWide(static_cast<const uint8_t*>(codes) + i);
  const float scale = scales[i / kStateBlock];
  if constexpr (kIsSecond) {
    return {WidenCode(Lane::And(both, Lane::BroadcastInt(0xff)), scale), WidenCode(Lane::ShiftRight<8>(both), scale)};
  }
  return {WidenCode(Lane::ShiftRightSigned<24>(Lane::ShiftLeft<24>(both)), scale),
          WidenCode(Lane::ShiftRightSigned<24>(Lane::ShiftLeft<16>(both)), scale)};
}

// What the values of a block are narrowed with.
struct Scaling {
  float scale;  // NaN if any value is NaN or infinite, 0 for a block too small to matter
  Vec inverse;
  Int magnitude_mask;  // of no bits where the scale is NaN or 0: all codes are zero then
};

// `largest`: the largest magnitudes, as bits.
template <bool kIsSecond>
OFFLOAD_INLINE Scaling ChooseScaling(Int largest) {
  constexpr float kSquare = kIsSecond ? 255.0f * 255.0f : 127.0f * 127.0f;  // of the largest code
  const uint32_t bits = Lane::Largest(largest);
  const bool is_finite = bits < 0x7f800000u;
  if (!is_finite || BitsToFloat(bits) < 0x1p-96f) {
    return {is_finite ? 0.0f : BitsToFloat(0x7fc00000u), Lane::Broadcast(0.0f), Lane::BroadcastInt(0)};
  }
  const float scale = BitsToFloat(bits) / kSquare;
  return {scale, Lane::Broadcast(1.0f / scale), Lane::BroadcastInt(0x7fffffffu)};
}

// A value between two codes takes the upper one with the probability that makes its mean exact. Of a second moment only
// zero is stored as zero: it divides.
template <bool kIsSecond>
OFFLOAD_INLINE Int NarrowToCode(Vec x, const Scaling& scaling, Int random) {
  const Int magnitude = Lane::And(Lane::Bits(x), scaling.magnitude_mask);
  const Vec square = Lane::Mul(Lane::FromBits(magnitude), scaling.inverse);
  const Int below = Lane::Truncate(Lane::Sqrt(square));
  const Vec root = Lane::ToFloat(below);
  const Vec excess = Lane::Sub(square, Lane::Mul(root, root));
  const Vec gap = Lane::Fma(root, Lane::Broadcast(0x1p-15f), Lane::Broadcast(0x1p-16f));  // to the next square, * 2^-16
  const Lane::Mask is_up = Lane::Greater(excess, Lane::Mul(Lane::ToFloat(Threshold<kIsSecond>(random)), gap));
  const Int code = Lane::MinInt(Lane::AddWhere(is_up, below), Lane::BroadcastInt(kIsSecond ? 255 : 127));
  if constexpr (kIsSecond) return Lane::MaxInt(code, Lane::MinInt(magnitude, Lane::BroadcastInt(1)));
  const Int sign = Lane::ShiftRightSigned<31>(Lane::Bits(x));
  return Lane::And(Lane::SubInt(Lane::Xor(code, sign), sign), Lane::BroadcastInt(0xff));
}

template <bool kIsSecond>
OFFLOAD_INLINE void NarrowToCodes(Pair moment, const Scaling& scaling, RandomPair random, void* codes, size_t i) {
  const Int x = NarrowToCode<kIsSecond>(moment.x, scaling, random.x);
  const Int y = NarrowToCode<kIsSecond>(moment.y, scaling, random.y);
  Lane::StoreNarrow(static_cast<uint8_t*>(codes) + i, Lane::Or(x, Lane::ShiftLeft<8>(y)));
}
