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
  alignas(64) uint32_t random[kStateBlock];
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

OFFLOAD_INLINE void JoinMaster(const Buffers& b, size_t i, size_t n, bool has_second, Block& block) {
  const uint16_t* __restrict high = static_cast<const uint16_t*>(b.param) + i;
  const int16_t* __restrict remainder = static_cast<const int16_t*>(b.master) + i;
  for (size_t k = 0; k < n; ++k) {
    const uint32_t second = has_second ? FloatToBits(block.second[k]) : 0;
    const uint32_t low = static_cast<uint32_t>(int32_t{remainder[k]}) + (second >> 31);
    block.param[k] = BitsToFloat((uint32_t{high[k]} << 16) + low);
    block.second[k] = BitsToFloat(second & 0x7fffffffu);
  }
}

OFFLOAD_INLINE void SplitMaster(const Buffers& b, size_t i, size_t n, Block& block) {
  uint16_t* __restrict high = static_cast<uint16_t*>(b.param) + i;
  int16_t* __restrict remainder = static_cast<int16_t*>(b.master) + i;
  for (size_t k = 0; k < n; ++k) {
    const uint32_t bits = FloatToBits(block.param[k]);
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const uint16_t rounded = FloatToBFloat16(block.param[k]);
    const int32_t dropped = is_nan ? 0 : static_cast<int32_t>(bits - (uint32_t{rounded} << 16));
    const bool is_tie = dropped > 0x7fff;
    high[k] = rounded;
    remainder[k] = static_cast<int16_t>(is_tie ? 0x7fff : dropped);
    block.second[k] = BitsToFloat(FloatToBits(block.second[k]) | (is_tie ? 0x80000000u : 0u));
  }
}

// ---- bfloat16 moments, rounded up with the probability of what is dropped

OFFLOAD_INLINE void RoundToBFloat16(const float* __restrict source, const uint32_t* __restrict random, unsigned shift,
                                    size_t n, uint16_t* __restrict target) {
  for (size_t k = 0; k < n; ++k) {
    const uint32_t bits = FloatToBits(source[k]);
    const uint32_t rounded = (bits + ((random[k] >> shift) & 0xffffu)) >> 16;
    target[k] = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
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

template <class Rule>
OFFLOAD_INLINE void ReadBlock(const Buffers& b, size_t i, size_t n, Block& block) {
  WidenFloats(b.grad, b.grad_format, i, n, block.grad);
  const size_t block_index = i / kStateBlock;
  if (b.state_format == StateFormat::kInt8) {
    if (Rule::kHasFirst) WidenCodes(static_cast<int8_t*>(b.first) + i, b.first_scale[block_index], n, block.first);
    if (Rule::kHasSecond) WidenCodes(static_cast<uint8_t*>(b.second) + i, b.second_scale[block_index], n, block.second);
  } else {
    const Format moments = b.state_format == StateFormat::kBFloat16 ? Format::kBFloat16 : Format::kFloat32;
    if (Rule::kHasFirst) WidenFloats(b.first, moments, i, n, block.first);
    if (Rule::kHasSecond) WidenFloats(b.second, moments, i, n, block.second);
  }
  if (b.max_second != nullptr) WidenFloats(b.max_second, Format::kFloat32, i, n, block.max_second);
  if (b.state_format == StateFormat::kFloat32) {
    WidenFloats(b.master, Format::kFloat32, i, n, block.param);
  } else {
    JoinMaster(b, i, n, Rule::kHasSecond, block);
  }
}

template <class Rule>
OFFLOAD_INLINE void WriteBlock(const Buffers& b, size_t i, size_t n, Block& block) {
  if (b.state_format == StateFormat::kFloat32) {
    NarrowFloats(block.param, Format::kFloat32, i, n, b.master);
    NarrowFloats(block.param, b.param_format, i, n, b.param);
  }
  if (b.state_format == StateFormat::kBFloat16 || b.state_format == StateFormat::kInt8) {
    for (size_t k = 0; k < n; ++k) block.random[k] = b.rounding.Bits(static_cast<uint32_t>(i + k));
  }
  const size_t block_index = i / kStateBlock;
  if (b.state_format == StateFormat::kInt8) {
    int8_t* first = static_cast<int8_t*>(b.first) + i;
    uint8_t* second = static_cast<uint8_t*>(b.second) + i;
    if (Rule::kHasFirst) b.first_scale[block_index] = NarrowToCodes(block.first, block.random, 0, n, first);
    if (Rule::kHasSecond) b.second_scale[block_index] = NarrowToCodes(block.second, block.random, 16, n, second);
    SplitMaster(b, i, n, block);
    return;
  }
  if (b.state_format == StateFormat::kBFloat16) {
    uint16_t* first = static_cast<uint16_t*>(b.first) + i;
    uint16_t* second = static_cast<uint16_t*>(b.second) + i;
    SplitMaster(b, i, n, block);
    if (Rule::kHasFirst) RoundToBFloat16(block.first, block.random, 0, n, first);
    if (Rule::kHasSecond) RoundToBFloat16(block.second, block.random, 16, n, second);
    return;
  }
  if (b.state_format == StateFormat::kSplit16) SplitMaster(b, i, n, block);
  if (Rule::kHasFirst) NarrowFloats(block.first, Format::kFloat32, i, n, b.first);
  if (Rule::kHasSecond) NarrowFloats(block.second, Format::kFloat32, i, n, b.second);
  if (b.max_second != nullptr) NarrowFloats(block.max_second, Format::kFloat32, i, n, b.max_second);
}

#ifdef OFFLOAD_VECTOR_LANE
#include "compact.inl"
#endif

// begin is a multiple of kStateBlock.
template <template <class> class Rule>
void UpdateStaged(const Buffers& buffers, size_t begin, size_t end, const void* scalars) {
  using Lane = WidestLane;
  const Buffers b = buffers;
  const Rule<Lane> rule(*static_cast<const typename Rule<Lane>::Scalars*>(scalars));
#ifdef OFFLOAD_VECTOR_LANE
  begin = UpdateCompact(b, begin, end, rule);
#endif
  Block block{};
  for (size_t i = begin; i < end; i += kStateBlock) {
    const size_t n = std::min(kStateBlock, end - i);
    ReadBlock<Rule<Lane>>(b, i, n, block);
    // Past the end lies what an earlier block left, or zeros: computed and dropped.
    for (size_t k = 0; k < n; k += Lane::kWidth) {
      typename Lane::Vec param = Lane::Load(block.param + k), first = Lane::Load(block.first + k);
      typename Lane::Vec second = Lane::Load(block.second + k), max_second = Lane::Load(block.max_second + k);
      rule.Step(param, first, second, b.max_second != nullptr ? &max_second : nullptr, Lane::Load(block.grad + k));
      Lane::Store(block.param + k, param);
      Lane::Store(block.first + k, first);
      Lane::Store(block.second + k, second);
      Lane::Store(block.max_second + k, max_second);
    }
    WriteBlock<Rule<Lane>>(b, i, n, block);
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
