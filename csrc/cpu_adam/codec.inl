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
  if (OFFLOAD_LIKELY(format == Format::kBFloat16)) {
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
  const Int is_even = Lane::AndNot(upper, Lane::BroadcastInt(0x00010001u));
  const Int is_up = Lane::SpreadSignHalves(Lane::SubHalvesToZero(lower, is_even));  // above half, or half and odd
  const Int remainder = Lane::MinHalves(lower, Lane::Or(is_up, Lane::BroadcastInt(0x7fff7fffu)));
  return {Lane::SubHalves(upper, is_up), remainder, Lane::SubHalves(remainder, lower)};
}

// ---- random bits and bfloat16 moments, rounded up with the probability of what is dropped

// Of the 32 random bits of each element, the lower half for the first moment and the upper one for the second.
struct Thresholds {
  Int first, second;
};

// `number`: of the element, counted from key0. Mixes as state.h says; the last two steps, x ^ (x >> 16) and key1, are
// turned round, so that the upper half is there one operation earlier.
OFFLOAD_INLINE Thresholds RandomThresholds(const Rounding& rounding, Int number) {
  Int x = Lane::MulInt(Lane::Xor(number, Lane::ShiftRight<16>(number)), Lane::BroadcastInt(0x7feb352du));
  x = Lane::MulInt(Lane::Xor(x, Lane::ShiftRight<15>(x)), Lane::BroadcastInt(0x846ca68bu));
  x = Lane::Xor(x, Lane::BroadcastInt(rounding.key1 ^ (rounding.key1 >> 16)));
  const Int upper = Lane::ShiftRight<16>(x);
  return {Lane::And(Lane::Xor(x, upper), Lane::BroadcastInt(0xffff)), upper};
}

// Numbers of the elements at even places from i on; the next vector's are 2 * kWidth more.
OFFLOAD_INLINE Int EvenNumbers(const Rounding& rounding, size_t i) {
  return Lane::CountEven(rounding.first_index + static_cast<uint32_t>(i) + rounding.key0);
}

// The bfloat16 halves.
OFFLOAD_INLINE Int RoundUpAtRandom(Pair moment, Int threshold_x, Int threshold_y) {
  return UpperHalves(Lane::AddInt(CanonicalBits(moment.x), threshold_x),
                     Lane::AddInt(CanonicalBits(moment.y), threshold_y));
}

// ---- 8-bit moments: code * |code| times the block's scale; int8 for the first moment, uint8 for the second

OFFLOAD_INLINE Int Magnitude(Vec x) { return Lane::And(Lane::Bits(x), Lane::BroadcastInt(0x7fffffffu)); }

// Squares of codes fit into 16 bits.
template <bool kIsSecond>
OFFLOAD_INLINE Pair WidenCodes(const void* codes, size_t i, Vec scale) {
  Int x, y;
  if constexpr (kIsSecond) {
    const Int code = Lane::LoadBytes(static_cast<const uint8_t*>(codes) + i);
    const Int square = Lane::MulHalves(code, code);
    x = Lane::And(square, Lane::BroadcastInt(0xffff));
    y = Lane::ShiftRight<16>(square);
  } else {
    const Int code = Lane::LoadSignedBytes(static_cast<const int8_t*>(codes) + i);
    const Int square = Lane::MulHalves(code, Lane::AbsHalves(code));
    x = Lane::ShiftRightSigned<16>(Lane::ShiftLeft<16>(square));
    y = Lane::ShiftRightSigned<16>(square);
  }
  return {Lane::Mul(Lane::ToFloat(x), scale), Lane::Mul(Lane::ToFloat(y), scale)};
}

// What the values of a block are narrowed with.
struct Scaling {
  float scale;    // NaN if any value is NaN or infinite, 0 for a block too small to matter
  float inverse;  // 0 for those: all codes are zero then
};

// `largest`: the largest magnitudes, as bits.
template <bool kIsSecond>
OFFLOAD_INLINE Scaling ChooseScaling(Int largest) {
  constexpr float kSquare = kIsSecond ? 255.0f * 255.0f : 127.0f * 127.0f;  // of the largest code
  const uint32_t bits = Lane::Largest(largest);
  if (bits >= 0x7f800000u) return {BitsToFloat(0x7fc00000u), 0.0f};
  if (BitsToFloat(bits) < 0x1p-96f) return {0.0f, 0.0f};
  const float scale = BitsToFloat(bits) / kSquare;
  return {scale, 1.0f / scale};
}

// Two pairs of a block's moments are narrowed at a time, in two parts: roots take long, and what waits for them would
// leave the processor no room to look ahead. So they are begun, other work is done, and only then are they used.
struct Roots {
  Vec vectors[4];
};

OFFLOAD_INLINE Vec Square(const float* magnitudes, size_t k, Vec inverse) {
  return Lane::Mul(Lane::Load(magnitudes + k * Lane::kWidth), inverse);
}

OFFLOAD_INLINE Roots BeginRoots(const float* magnitudes, Vec inverse) {
  Roots roots;
  for (size_t k = 0; k < 4; ++k) roots.vectors[k] = Lane::Sqrt(Square(magnitudes, k, inverse));
  return roots;
}

// The lower of the two codes that a value lies between, and how far the value is above it.
struct Below {
  Int code;
  Vec excess;
  Vec gap;  // to the next square, times 2^-16, the unit of thresholds
};

OFFLOAD_INLINE Below FindBelow(Vec root, Vec square) {
  const Int code = Lane::Truncate(root);
  const Vec whole = Lane::ToFloat(code);
  return {code, Lane::SubProduct(square, whole, whole),
          Lane::AddProduct(Lane::Broadcast(0x1p-16f), whole, Lane::Broadcast(0x1p-15f))};
}

// A value between two codes takes the upper one with the probability that makes its mean exact. Products of thresholds
// and gaps are exact for first moments.
OFFLOAD_INLINE void NarrowFirst(const float* magnitudes, const uint32_t* signs, const Roots& roots, Vec inverse,
                                const Vec (&thresholds)[4], uint8_t* codes) {
  Int below[4], is_up[4];
  for (size_t k = 0; k < 4; ++k) {
    const Below found = FindBelow(roots.vectors[k], Square(magnitudes, k, inverse));
    below[k] = found.code;
    is_up[k] = Lane::Bits(Lane::ProductSub(thresholds[k], found.gap, found.excess));
  }
  Lane::StoreSignedBytes(codes, below, is_up, Lane::LoadInt(signs), Lane::LoadInt(signs + Lane::kWidth));
}

// Of a second moment only zero is stored as zero: it divides.
OFFLOAD_INLINE void NarrowSecond(const float* moments, const Roots& roots, Vec inverse, const float* thresholds,
                                 uint8_t* codes) {
  Int bits[4], narrowed[4];
  for (size_t k = 0; k < 4; ++k) {
    const Below found = FindBelow(roots.vectors[k], Square(moments, k, inverse));
    const Vec threshold = Lane::Mul(found.gap, Lane::Load(thresholds + k * Lane::kWidth));
    narrowed[k] = Lane::AddWhere(Lane::Greater(found.excess, threshold), found.code);
    bits[k] = Lane::Bits(Lane::Load(moments + k * Lane::kWidth));
  }
  Lane::StoreBytes(codes, narrowed, bits);
}
