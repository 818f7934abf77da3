// The pass for every rule and state format: a block's state and gradient are widened to fp32 in the first-level cache,
// updated there, and narrowed again. So a format is a pair of conversions, and no rule knows of it. Included at the
// end of kernel.inl. The loops below are over plain arrays and left to the compiler to vectorise: integers, and
// operations that round once each.
//
// Compact formats keep no master. Its upper half is the bfloat16 parameter itself, master rounded to nearest even, and
// an int16 holds what the rounding dropped: master's bits = (param's bits << 16) + remainder. Ties leave one value too
// many for that: half an ulp above an even parameter is +32768. The sign of the second moment, which is otherwise
// never set, counts as one more there. Where no second moment has room for it, master moves one fp32 ulp.

#ifdef OFFLOAD_VECTOR_LANE
using WidestLane = VectorLane;
#else
using WidestLane = ScalarLane;
#endif

struct Block {
  alignas(64) float param[kStateBlock];
  alignas(64) float first[kStateBlock];
  alignas(64) float second[kStateBlock];
  alignas(64) float max_second[kStateBlock];
  alignas(64) float grad[kStateBlock];
  alignas(64) float signed_second[kStateBlock];
  alignas(64) uint32_t random[kStateBlock];
};

// Where a block's values are as fp32: in the cache, or, if they are fp32 there and the block is whole, in the state.
struct Rows {
  float* param;
  float* first;
  float* second;
  float* max_second;
};

template <class Source, class Convert>
OFFLOAD_INLINE void Map(const Source* __restrict source, float* __restrict target, size_t n, Convert convert) {
  for (size_t k = 0; k < n; ++k) target[k] = convert(source[k]);
}

OFFLOAD_INLINE void WidenFloats(const void* source, Format format, size_t i, size_t n, float* target) {
  if (format == Format::kFloat32) {
    std::memcpy(target, static_cast<const float*>(source) + i, n * sizeof(float));
  } else if (format == Format::kBFloat16) {
    Map(static_cast<const uint16_t*>(source) + i, target, n, [](uint16_t half) { return BFloat16ToFloat(half); });
  } else {
    Map(static_cast<const uint16_t*>(source) + i, target, n, [](uint16_t half) { return Float16ToFloat(half); });
  }
}

OFFLOAD_INLINE void NarrowFloats(const float* __restrict source, Format format, size_t i, size_t n, void* target) {
  if (format == Format::kFloat32) {
    std::memcpy(static_cast<float*>(target) + i, source, n * sizeof(float));
  } else if (format != Format::kNone) {
    uint16_t* __restrict halves = static_cast<uint16_t*>(target) + i;
    if (format == Format::kBFloat16) {
      for (size_t k = 0; k < n; ++k) halves[k] = FloatToBFloat16(source[k]);
    } else {
      for (size_t k = 0; k < n; ++k) halves[k] = FloatToFloat16(source[k]);
    }
  }
}

// ---- the two halves of a master

OFFLOAD_INLINE uint32_t Bits32(float value) { return FloatToBits(value); }
OFFLOAD_INLINE uint32_t Bits32(uint16_t bfloat16) { return uint32_t{bfloat16} << 16; }

// signed_second is the second moment as stored, float or bfloat16; null where it has no sign to spare.
template <class Stored>
OFFLOAD_INLINE void JoinMaster(const uint16_t* __restrict high, const int16_t* __restrict remainder,
                               const Stored* __restrict signed_second, size_t n, float* __restrict param,
                               float* __restrict second) {
  if (signed_second == nullptr) {
    for (size_t k = 0; k < n; ++k) {
      param[k] = BitsToFloat((uint32_t{high[k]} << 16) + static_cast<uint32_t>(int32_t{remainder[k]}));
    }
    return;
  }
  for (size_t k = 0; k < n; ++k) {
    const uint32_t bits = Bits32(signed_second[k]);
    const uint32_t low = static_cast<uint32_t>(int32_t{remainder[k]}) + (bits >> 31);
    param[k] = BitsToFloat((uint32_t{high[k]} << 16) + low);
    second[k] = BitsToFloat(bits & 0x7fffffffu);
  }
}

OFFLOAD_INLINE void SplitMaster(const float* __restrict param, const float* __restrict second, size_t n,
                                uint16_t* __restrict high, int16_t* __restrict remainder,
                                float* __restrict signed_second) {
  for (size_t k = 0; k < n; ++k) {
    const uint32_t bits = FloatToBits(param[k]);
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const uint32_t rounded = is_nan ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const int32_t dropped = is_nan ? 0 : static_cast<int32_t>(bits - (rounded << 16));
    const bool is_tie = dropped > 0x7fff;
    high[k] = static_cast<uint16_t>(rounded);
    remainder[k] = static_cast<int16_t>(is_tie ? 0x7fff : dropped);
    signed_second[k] = BitsToFloat(FloatToBits(second[k]) | (is_tie ? 0x80000000u : 0u));
  }
}

// ---- bfloat16 moments, rounded up with the probability of what is dropped

OFFLOAD_INLINE uint16_t RoundUpAt(float value, uint32_t threshold) {
  const uint32_t bits = FloatToBits(value);
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : (bits + threshold) >> 16);
}

OFFLOAD_INLINE void RoundFirst(const float* __restrict first, const Rounding& rounding, uint32_t begin, size_t n,
                               uint16_t* __restrict target) {
  for (size_t k = 0; k < n; ++k) {
    target[k] = RoundUpAt(first[k], rounding.Bits(begin + static_cast<uint32_t>(k)) & 0xffffu);
  }
}

OFFLOAD_INLINE void RoundSecond(const float* __restrict second, const Rounding& rounding, uint32_t begin, size_t n,
                                uint16_t* __restrict target) {
  for (size_t k = 0; k < n; ++k) {
    target[k] = RoundUpAt(second[k], rounding.Bits(begin + static_cast<uint32_t>(k)) >> 16);
  }
}

OFFLOAD_INLINE void RoundBoth(const float* __restrict first, const float* __restrict second, const Rounding& rounding,
                              uint32_t begin, size_t n, uint16_t* __restrict first_target,
                              uint16_t* __restrict second_target) {
  for (size_t k = 0; k < n; ++k) {
    const uint32_t random = rounding.Bits(begin + static_cast<uint32_t>(k));
    first_target[k] = RoundUpAt(first[k], random & 0xffffu);
    second_target[k] = RoundUpAt(second[k], random >> 16);
  }
}

// ---- 8-bit moments: code * |code| times the block's scale

template <class Code>
OFFLOAD_INLINE void WidenCodes(const Code* __restrict codes, float scale, size_t n, float* __restrict target) {
  for (size_t k = 0; k < n; ++k) {
    const int32_t code = codes[k];
    target[k] = static_cast<float>(code * (code < 0 ? -code : code)) * scale;
  }
}

// Returns the scale: NaN if any value is NaN or infinite, 0 for a block too small to matter. A value between two codes
// takes the upper one with the probability that makes its mean exact. Of a second moment only zero is stored as zero:
// it divides.
template <class Code>
OFFLOAD_INLINE float NarrowToCodes(const float* __restrict source, const uint32_t* __restrict random, unsigned shift,
                                   size_t n, Code* __restrict codes) {
  constexpr bool kIsSigned = static_cast<Code>(-1) < 0;
  constexpr int32_t kLargestCode = kIsSigned ? 127 : 255;
  uint32_t largest = 0;
  for (size_t k = 0; k < n; ++k) largest = std::max(largest, FloatToBits(source[k]) & 0x7fffffffu);
  const bool is_finite = largest < 0x7f800000u;
  if (!is_finite || BitsToFloat(largest) < 0x1p-96f) {
    std::memset(codes, 0, n);
    return is_finite ? 0.0f : BitsToFloat(0x7fc00000u);
  }
  const float scale = BitsToFloat(largest) / static_cast<float>(kLargestCode * kLargestCode);
  const float inverse = 1.0f / scale;
  for (size_t k = 0; k < n; ++k) {
    const uint32_t bits = FloatToBits(source[k]);
    const float square = BitsToFloat(bits & 0x7fffffffu) * inverse;
    const int32_t below = static_cast<int32_t>(__builtin_sqrtf(square));
    const float threshold = static_cast<float>((random[k] >> shift) & 0xffffu) * 0x1p-16f;
    const float excess = square - static_cast<float>(below * below);
    int32_t code = below + (excess > threshold * static_cast<float>(2 * below + 1) ? 1 : 0);
    code = code > kLargestCode ? kLargestCode : code;
    if constexpr (kIsSigned) {
      code = bits >> 31 ? -code : code;
    } else {
      code = code == 0 && (bits & 0x7fffffffu) != 0 ? 1 : code;
    }
    codes[k] = static_cast<Code>(code);
  }
  return scale;
}

// ---- a block

// fp32 values of the state: used where they are if the block is whole, since whole vectors are loaded and stored.
OFFLOAD_INLINE float* InPlaceOrCopied(void* state, size_t i, size_t n, float* copy) {
  float* values = static_cast<float*>(state) + i;
  if (n == kStateBlock) return values;
  std::memcpy(copy, values, n * sizeof(float));
  return copy;
}

OFFLOAD_INLINE void CopyBack(const float* values, size_t n, void* state, size_t i) {
  float* target = static_cast<float*>(state) + i;
  if (values != target) std::memcpy(target, values, n * sizeof(float));
}

template <class Rule>
OFFLOAD_INLINE Rows ReadBlock(const Buffers& b, size_t i, size_t n, Block& block) {
  Rows rows{block.param, block.first, block.second, block.max_second};
  const uint16_t* high = static_cast<const uint16_t*>(b.param) + i;
  const int16_t* remainder = static_cast<const int16_t*>(b.master) + i;
  WidenFloats(b.grad, b.grad_format, i, n, block.grad);
  switch (b.state_format) {
    case StateFormat::kFloat32:
      rows.param = InPlaceOrCopied(b.master, i, n, block.param);
      if (Rule::kHasFirst) rows.first = InPlaceOrCopied(b.first, i, n, block.first);
      if (Rule::kHasSecond) rows.second = InPlaceOrCopied(b.second, i, n, block.second);
      break;
    case StateFormat::kSplit16: {
      if (Rule::kHasFirst) rows.first = InPlaceOrCopied(b.first, i, n, block.first);
      const float* second = Rule::kHasSecond ? static_cast<const float*>(b.second) + i : nullptr;
      JoinMaster(high, remainder, second, n, block.param, block.second);
      break;
    }
    case StateFormat::kBFloat16: {
      if (Rule::kHasFirst) WidenFloats(b.first, Format::kBFloat16, i, n, block.first);
      const uint16_t* second = Rule::kHasSecond ? static_cast<const uint16_t*>(b.second) + i : nullptr;
      JoinMaster(high, remainder, second, n, block.param, block.second);
      break;
    }
    case StateFormat::kInt8: {
      const size_t scale = i / kStateBlock;
      if (Rule::kHasFirst) WidenCodes(static_cast<int8_t*>(b.first) + i, b.first_scale[scale], n, block.first);
      if (Rule::kHasSecond) WidenCodes(static_cast<uint8_t*>(b.second) + i, b.second_scale[scale], n, block.second);
      JoinMaster<float>(high, remainder, nullptr, n, block.param, block.second);
      break;
    }
  }
  if (b.max_second != nullptr) rows.max_second = InPlaceOrCopied(b.max_second, i, n, block.max_second);
  return rows;
}

template <class Rule>
OFFLOAD_INLINE void WriteBlock(const Buffers& b, size_t i, size_t n, const Rows& rows, Block& block) {
  uint16_t* high = static_cast<uint16_t*>(b.param) + i;
  int16_t* remainder = static_cast<int16_t*>(b.master) + i;
  const uint32_t number = static_cast<uint32_t>(i);
  switch (b.state_format) {
    case StateFormat::kFloat32:
      CopyBack(rows.param, n, b.master, i);
      NarrowFloats(rows.param, b.param_format, i, n, b.param);
      if (Rule::kHasFirst) CopyBack(rows.first, n, b.first, i);
      if (Rule::kHasSecond) CopyBack(rows.second, n, b.second, i);
      break;
    case StateFormat::kSplit16:
      if (Rule::kHasFirst) CopyBack(rows.first, n, b.first, i);
      SplitMaster(block.param, block.second, n, high, remainder,
                  Rule::kHasSecond ? static_cast<float*>(b.second) + i : block.signed_second);
      break;
    case StateFormat::kBFloat16: {
      uint16_t* first = static_cast<uint16_t*>(b.first) + i;
      uint16_t* second = static_cast<uint16_t*>(b.second) + i;
      SplitMaster(block.param, block.second, n, high, remainder, block.signed_second);
      if (Rule::kHasFirst && Rule::kHasSecond) {
        RoundBoth(block.first, block.signed_second, b.rounding, number, n, first, second);
      } else if (Rule::kHasFirst) {
        RoundFirst(block.first, b.rounding, number, n, first);
      } else if (Rule::kHasSecond) {
        RoundSecond(block.signed_second, b.rounding, number, n, second);
      }
      break;
    }
    case StateFormat::kInt8: {
      const size_t scale = i / kStateBlock;
      int8_t* first = static_cast<int8_t*>(b.first) + i;
      uint8_t* second = static_cast<uint8_t*>(b.second) + i;
      for (size_t k = 0; k < n; ++k) block.random[k] = b.rounding.Bits(number + static_cast<uint32_t>(k));
      SplitMaster(block.param, block.second, n, high, remainder, block.signed_second);
      if (Rule::kHasFirst) b.first_scale[scale] = NarrowToCodes(block.first, block.random, 0, n, first);
      if (Rule::kHasSecond) b.second_scale[scale] = NarrowToCodes(block.second, block.random, 16, n, second);
      break;
    }
  }
  if (b.max_second != nullptr) CopyBack(rows.max_second, n, b.max_second, i);
}

// begin is a multiple of kStateBlock.
template <template <class> class Rule>
void UpdateStaged(const Buffers& buffers, size_t begin, size_t end, const void* scalars) {
  using Lane = WidestLane;
  const Buffers b = buffers;
  const Rule<Lane> rule(*static_cast<const typename Rule<Lane>::Scalars*>(scalars));
  Block block{};
  for (size_t i = begin; i < end; i += kStateBlock) {
    const size_t n = std::min(kStateBlock, end - i);
    const Rows rows = ReadBlock<Rule<Lane>>(b, i, n, block);
    // Past the end lies what an earlier block left, or zeros: computed and dropped.
    for (size_t k = 0; k < n; k += Lane::kWidth) {
      typename Lane::Vec param = Lane::Load(rows.param + k), first = Lane::Load(rows.first + k);
      typename Lane::Vec second = Lane::Load(rows.second + k), max_second = second;
      if (b.max_second != nullptr) max_second = Lane::Load(rows.max_second + k);
      rule.Step(param, first, second, b.max_second != nullptr ? &max_second : nullptr, Lane::Load(block.grad + k));
      Lane::Store(rows.param + k, param);
      if (Rule<Lane>::kHasFirst) Lane::Store(rows.first + k, first);
      if (Rule<Lane>::kHasSecond) Lane::Store(rows.second + k, second);
      if (b.max_second != nullptr) Lane::Store(rows.max_second + k, max_second);
    }
    WriteBlock<Rule<Lane>>(b, i, n, rows, block);
  }
}

inline RangeFn Select(RuleKind rule, const Buffers& b) {
  switch (rule) {
    case RuleKind::kAdam:
      if (b.state_format == StateFormat::kFloat32) return SelectDirect(b.grad_format, b.param_format);
      return UpdateStaged<Adam>;
    case RuleKind::kLion:
      return UpdateStaged<Lion>;
    case RuleKind::kAdagrad:
      return UpdateStaged<Adagrad>;
    case RuleKind::kSgd:
      return b.first == nullptr ? UpdateStaged<Sgd> : UpdateStaged<SgdMomentum>;
  }
  return nullptr;
}
