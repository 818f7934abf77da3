// Whole blocks in the compact formats, a vector at a time: what the first half of staged.inl does element by element
// (its comments have the formats), written with the compilers' own vectors so that one text serves every width.
// Included after staged.inl's conversions, where there is a VectorLane. Comparisons make masks of all ones.

using Bits = uint32_t __attribute__((vector_size(4 * VectorLane::kWidth)));
using SignedBits = int32_t __attribute__((vector_size(4 * VectorLane::kWidth)));
using Halves = uint16_t __attribute__((vector_size(2 * VectorLane::kWidth)));
using SignedHalves = int16_t __attribute__((vector_size(2 * VectorLane::kWidth)));

template <class Vector>
OFFLOAD_INLINE Vector LoadAs(const void* source) {
  Vector value;
  std::memcpy(&value, source, sizeof(value));
  return value;
}

template <class Vector>
OFFLOAD_INLINE void StoreAs(void* target, Vector value) {
  std::memcpy(target, &value, sizeof(value));
}

OFFLOAD_INLINE Bits Choose(SignedBits mask, Bits yes, Bits no) { return ((Bits)mask & yes) | (~(Bits)mask & no); }

OFFLOAD_INLINE SignedBits IsNan(Bits bits) { return (SignedBits)(bits & 0x7fffffffu) > 0x7f800000; }

// The low halves of the lanes.
OFFLOAD_INLINE Halves LowHalves(Bits bits) { return __builtin_convertvector(bits, Halves); }

// Takes the sign of second, which counts as one, with it.
OFFLOAD_INLINE VectorLane::Vec JoinVector(const uint16_t* high, const int16_t* remainder, VectorLane::Vec& second) {
  const Bits second_bits = (Bits)second;
  const Bits low = (Bits) __builtin_convertvector(LoadAs<SignedHalves>(remainder), SignedBits) + (second_bits >> 31);
  second = (VectorLane::Vec)(second_bits & 0x7fffffffu);
  return (VectorLane::Vec)((__builtin_convertvector(LoadAs<Halves>(high), Bits) << 16) + low);
}

OFFLOAD_INLINE void SplitVector(VectorLane::Vec param, uint16_t* high, int16_t* remainder, VectorLane::Vec& second) {
  const Bits bits = (Bits)param;
  const SignedBits is_nan = IsNan(bits);
  const Bits rounded = Choose(is_nan, Bits{} + 0x7fc0u, (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  const SignedBits dropped = (SignedBits)Choose(is_nan, Bits{}, bits - (rounded << 16));
  const SignedBits is_tie = dropped > 0x7fff;
  StoreAs(high, LowHalves(rounded));
  StoreAs(remainder, LowHalves((Bits)(dropped + is_tie)));  // a tie drops 0x8000, and one less is stored
  second = (VectorLane::Vec)((Bits)second | ((Bits)is_tie & 0x80000000u));
}

// Rounding::Bits of elements i, i + 1, ...
OFFLOAD_INLINE Bits RandomVector(const Rounding& rounding, size_t i) {
  Bits x;
  for (uint32_t lane = 0; lane < VectorLane::kWidth; ++lane) x[lane] = lane;
  x += rounding.first_index + static_cast<uint32_t>(i) + rounding.key0;
  for (int round = 0; round < 2; ++round) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    x ^= x >> 16;
    if (round == 0) x ^= rounding.key1;
  }
  return x;
}

OFFLOAD_INLINE void StoreRounded(VectorLane::Vec value, Bits random, uint16_t* target) {
  const Bits bits = (Bits)value;
  StoreAs(target, LowHalves(Choose(IsNan(bits), Bits{} + 0x7fc0u, (bits + (random & 0xffffu)) >> 16)));
}

// (Functions rather than lambdas, which GCC compiles without the instructions of the target region.)
template <bool kIsBFloat16>
OFFLOAD_INLINE VectorLane::Vec LoadMoment(const char* row, size_t k) {
  if constexpr (kIsBFloat16) return VectorLane::LoadBFloat16(reinterpret_cast<const uint16_t*>(row) + k);
  return VectorLane::Load(reinterpret_cast<const float*>(row) + k);
}

template <bool kIsBFloat16>
OFFLOAD_INLINE void StoreMoment(char* row, size_t k, VectorLane::Vec value, Bits random) {
  if constexpr (kIsBFloat16) return StoreRounded(value, random, reinterpret_cast<uint16_t*>(row) + k);
  VectorLane::Store(reinterpret_cast<float*>(row) + k, value);
}

// i is a multiple of kStateBlock, and there are as many elements from there. Nothing of one block is seen by another.
template <class Rule, StateFormat kFormat>
OFFLOAD_INLINE void UpdateCompactBlock(const Buffers& b, size_t i, const Rule& rule, Block& block) {
  using Vec = VectorLane::Vec;
  constexpr bool kIsInt8 = kFormat == StateFormat::kInt8, kIsBFloat16 = kFormat == StateFormat::kBFloat16;
  constexpr size_t kMomentBytes = kIsBFloat16 ? 2 : 4;
  const size_t index = i / kStateBlock;
  WidenFloats(b.grad, b.grad_format, i, kStateBlock, block.grad);
  if constexpr (kIsInt8) {
    if (Rule::kHasFirst) WidenCodes(static_cast<int8_t*>(b.first) + i, b.first_scale[index], kStateBlock, block.first);
    if (Rule::kHasSecond) {
      WidenCodes(static_cast<uint8_t*>(b.second) + i, b.second_scale[index], kStateBlock, block.second);
    }
  }
  char* const firsts = kIsInt8 ? reinterpret_cast<char*>(block.first) : static_cast<char*>(b.first) + i * kMomentBytes;
  char* const seconds =
      kIsInt8 ? reinterpret_cast<char*>(block.second) : static_cast<char*>(b.second) + i * kMomentBytes;
  for (size_t k = 0; k < kStateBlock; k += VectorLane::kWidth) {
    uint16_t* const high = static_cast<uint16_t*>(b.param) + i + k;
    int16_t* const remainder = static_cast<int16_t*>(b.master) + i + k;
    Vec first = Rule::kHasFirst ? LoadMoment<kIsBFloat16>(firsts, k) : VectorLane::Broadcast(0.0f);
    Vec second = Rule::kHasSecond ? LoadMoment<kIsBFloat16>(seconds, k) : VectorLane::Broadcast(0.0f);
    Vec param = JoinVector(high, remainder, second);
    if (b.max_second != nullptr) {
      Vec max_second = VectorLane::Load(b.max_second + i + k);
      rule.Step(param, first, second, &max_second, VectorLane::Load(block.grad + k));
      VectorLane::Store(b.max_second + i + k, max_second);
    } else {
      rule.Step(param, first, second, nullptr, VectorLane::Load(block.grad + k));
    }
    const Bits random = kIsBFloat16 ? RandomVector(b.rounding, i + k) : Bits{};
    const Vec unmarked = second;
    SplitVector(param, high, remainder, second);
    if (Rule::kHasFirst) StoreMoment<kIsBFloat16>(firsts, k, first, random);
    if (Rule::kHasSecond) StoreMoment<kIsBFloat16>(seconds, k, kIsInt8 ? unmarked : second, random >> 16);
  }
  if constexpr (kIsInt8) {
    for (size_t k = 0; k < kStateBlock; k += VectorLane::kWidth) {
      StoreAs(block.random + k, RandomVector(b.rounding, i + k));
    }
    if (Rule::kHasFirst) {
      int8_t* codes = static_cast<int8_t*>(b.first) + i;
      b.first_scale[index] = NarrowToCodes(block.first, block.random, 0, kStateBlock, codes);
    }
    if (Rule::kHasSecond) {
      uint8_t* codes = static_cast<uint8_t*>(b.second) + i;
      b.second_scale[index] = NarrowToCodes(block.second, block.random, 16, kStateBlock, codes);
    }
  }
}

// As many whole blocks of begin..end as there are; returns where it ended.
template <class Rule, StateFormat kFormat>
OFFLOAD_INLINE size_t UpdateCompactBlocks(const Buffers& b, size_t begin, size_t end, const Rule& rule) {
  Block block;
  size_t i = begin;
  for (; end - i >= kStateBlock; i += kStateBlock) UpdateCompactBlock<Rule, kFormat>(b, i, rule, block);
  return i;
}

template <class Rule>
size_t UpdateCompact(const Buffers& b, size_t begin, size_t end, const Rule& rule) {
  switch (b.state_format) {
    case StateFormat::kSplit16:
      return UpdateCompactBlocks<Rule, StateFormat::kSplit16>(b, begin, end, rule);
    case StateFormat::kBFloat16:
      return UpdateCompactBlocks<Rule, StateFormat::kBFloat16>(b, begin, end, rule);
    case StateFormat::kInt8:
      return UpdateCompactBlocks<Rule, StateFormat::kInt8>(b, begin, end, rule);
    case StateFormat::kFloat32:
      break;
  }
  return begin;
}
