// The pass over a range of elements: blocks of kStateBlock, two vectors at a time, from any state format through
// registers back to it. Included once per instruction set, inside its target region and a namespace; OFFLOAD_LANE names
// the file of its Lane.

// clang-format off: each needs those before it
#include OFFLOAD_LANE
#include "rules.inl"
#include "codec.inl"
#include "stream.inl"
// clang-format on

// A pair of vectors of elements; in fp32 state, x has the first half of them and y the second. Moments that a rule
// doesn't keep are zero.
struct Elements {
  Pair param, first, second, max_second;
};

template <StateFormat kState>
OFFLOAD_INLINE Pair LoadRow(const void* row, Format format, size_t i) {
  if constexpr (kState != StateFormat::kFloat32) return LoadFloatPair(row, format, i);
  return {LoadFloats(row, format, i), LoadFloats(row, format, i + Lane::kWidth)};
}

template <StateFormat kState>
OFFLOAD_INLINE void StoreRow(void* row, size_t i, Pair values) {
  if constexpr (kState != StateFormat::kFloat32) return StoreFloatPair(row, i, values);
  Lane::Store(static_cast<float*>(row) + i, values.x);
  Lane::Store(static_cast<float*>(row) + i + Lane::kWidth, values.y);
}

// Of a block in kInt8.
struct Scales {
  Vec first, second;
};

template <class Rule, StateFormat kState>
OFFLOAD_INLINE Scales LoadScales(const Buffers& b, size_t begin) {
  Scales scales{Lane::Broadcast(0.0f), Lane::Broadcast(0.0f)};
  if constexpr (kState == StateFormat::kInt8) {
    if constexpr (Rule::kHasFirst) scales.first = Lane::Broadcast(b.first_scale[begin / kStateBlock]);
    if constexpr (Rule::kHasSecond) scales.second = Lane::Broadcast(b.second_scale[begin / kStateBlock]);
  }
  return scales;
}

template <StateFormat kState, bool kIsSecond>
OFFLOAD_INLINE Pair LoadMoment(const void* moment, size_t i, Vec scale) {
  if constexpr (kState == StateFormat::kInt8) return WidenCodes<kIsSecond>(moment, i, scale);
  return LoadRow<kState>(moment, kState == StateFormat::kBFloat16 ? Format::kBFloat16 : Format::kFloat32, i);
}

template <class Rule, StateFormat kState>
OFFLOAD_INLINE Elements Read(const Buffers& b, size_t i, const Scales& scales) {
  const Vec zero = Lane::Broadcast(0.0f);
  Elements e{{zero, zero}, {zero, zero}, {zero, zero}, {zero, zero}};
  if constexpr (Rule::kHasFirst) e.first = LoadMoment<kState, false>(b.first, i, scales.first);
  if constexpr (Rule::kHasSecond) e.second = LoadMoment<kState, true>(b.second, i, scales.second);
  if constexpr (Rule::kHasMaxSecond) e.max_second = LoadRow<kState>(b.max_second, Format::kFloat32, i);
  if constexpr (kState == StateFormat::kFloat32) {
    e.param = LoadRow<kState>(b.master, Format::kFloat32, i);
  } else {
    Int ties = Lane::BroadcastInt(0);
    if constexpr (Rule::kHasSecond && kState != StateFormat::kInt8) {
      ties = Lane::SpreadSignHalves(UpperHalves(Lane::Bits(e.second.x), Lane::Bits(e.second.y)));
      e.second = {Lane::FromBits(Magnitude(e.second.x)), Lane::FromBits(Magnitude(e.second.y))};
    }
    e.param = JoinMaster(Lane::LoadHalves(static_cast<const uint16_t*>(b.param) + i),
                         Lane::LoadHalves(static_cast<const uint16_t*>(b.master) + i), ties);
  }
  return e;
}

template <class Rule, StateFormat kState>
OFFLOAD_INLINE Elements ReadAndStep(const Buffers& b, size_t i, const Scales& scales, const Rule& rule) {
  Elements e = Read<Rule, kState>(b, i, scales);
  const Pair grad = LoadRow<kState>(b.grad, b.grad_format, i);
  rule.Step(e.param.x, e.first.x, e.second.x, e.max_second.x, grad.x);
  rule.Step(e.param.y, e.first.y, e.second.y, e.max_second.y, grad.y);
  return e;
}

// Parameter and master. Returns the ties among them, in memory's order: they go to the second moment's sign.
template <StateFormat kState>
OFFLOAD_INLINE Int WriteParam(const Buffers& b, size_t i, Pair param, bool streaming) {
  if constexpr (kState == StateFormat::kFloat32) {
    StoreRow<kState>(b.master, i, param);
    StoreFloats(b.param, b.param_format, i, param.x, param.y, streaming);
    return Lane::BroadcastInt(0);
  }
  const Halves halves = SplitMaster(param);
  Lane::StoreHalves(static_cast<uint16_t*>(b.param) + i, halves.param);
  Lane::StoreHalves(static_cast<uint16_t*>(b.master) + i, halves.remainder);
  return halves.ties;
}

// The second moment with the sign set where there is a tie.
OFFLOAD_INLINE Pair MarkTies(Pair second, Int ties) {
  const Int sign = Lane::BroadcastInt(0x80000000u);
  return {Lane::FromBits(Lane::Or(Lane::Bits(second.x), Lane::And(Lane::ShiftLeft<16>(ties), sign))),
          Lane::FromBits(Lane::Or(Lane::Bits(second.y), Lane::And(ties, sign)))};
}

template <class Rule, StateFormat kState>
OFFLOAD_INLINE void WriteMoments(const Buffers& b, size_t i, const Elements& e, Int ties) {
  if constexpr (kState == StateFormat::kBFloat16) {
    const Int even = EvenNumbers(b.rounding, i);
    const Thresholds x = RandomThresholds(b.rounding, even);
    const Thresholds y = RandomThresholds(b.rounding, Lane::AddInt(even, Lane::BroadcastInt(1)));
    if constexpr (Rule::kHasFirst) {
      Lane::StoreHalves(static_cast<uint16_t*>(b.first) + i, RoundUpAtRandom(e.first, x.first, y.first));
    }
    if constexpr (Rule::kHasSecond) {
      const Int sign = Lane::And(ties, Lane::BroadcastInt(0x80008000u));
      const Int second = RoundUpAtRandom(e.second, x.second, y.second);
      Lane::StoreHalves(static_cast<uint16_t*>(b.second) + i, Lane::Or(second, sign));
    }
    return;
  }
  if constexpr (Rule::kHasFirst) StoreRow<kState>(b.first, i, e.first);
  if constexpr (Rule::kHasSecond && kState == StateFormat::kFloat32) StoreRow<kState>(b.second, i, e.second);
  if constexpr (Rule::kHasSecond && kState == StateFormat::kSplit16) {
    StoreRow<kState>(b.second, i, MarkTies(e.second, ties));
  }
  if constexpr (Rule::kHasMaxSecond) StoreRow<kState>(b.max_second, i, e.max_second);
}

// A block of kInt8 between its step and its codes, which need the largest magnitudes of the whole block first.
struct Staged {
  alignas(64) float param[kStateBlock];
  alignas(64) float first[kStateBlock];  // magnitudes
  alignas(64) uint32_t first_signs[kStateBlock / 2];
  alignas(64) float second[kStateBlock];
  alignas(64) float second_thresholds[kStateBlock];
};

// As bits.
struct Largest {
  Int first, second;
};

template <class Rule>
OFFLOAD_INLINE Largest StepBlock(const Buffers& b, size_t begin, const Rule& rule, Staged& staged) {
  const Scales scales = LoadScales<Rule, StateFormat::kInt8>(b, begin);
  Largest largest{Lane::BroadcastInt(0), Lane::BroadcastInt(0)};
  for (size_t k = 0; k < kStateBlock; k += 2 * Lane::kWidth) {
    const Elements e = ReadAndStep<Rule, StateFormat::kInt8>(b, begin + k, scales, rule);
    const Int x = Magnitude(e.first.x), y = Magnitude(e.first.y);
    StoreRow<StateFormat::kFloat32>(staged.param, k, e.param);
    StoreRow<StateFormat::kFloat32>(staged.first, k, {Lane::FromBits(x), Lane::FromBits(y)});
    Lane::StoreInt(staged.first_signs + k / 2, Lane::PackHalves(Lane::Bits(e.first.x), Lane::Bits(e.first.y)));
    StoreRow<StateFormat::kFloat32>(staged.second, k, e.second);
    largest.first = Lane::MaxInt(largest.first, Lane::MaxInt(x, y));
    largest.second = Lane::MaxInt(largest.second, Lane::MaxInt(Lane::Bits(e.second.x), Lane::Bits(e.second.y)));
  }
  return largest;
}

constexpr size_t kTwoPairs = 4 * Lane::kWidth;

// Codes of the first moment, and thresholds for those of the second.
template <class Rule>
OFFLOAD_INLINE void WriteFirst(const Buffers& b, size_t begin, Staged& staged, const Scaling& scaling) {
  const Vec inverse = Lane::Broadcast(scaling.inverse);
  Int number = EvenNumbers(b.rounding, begin);
  for (size_t i = 0; i < kStateBlock; i += kTwoPairs) {
    const Roots roots = BeginRoots(staged.first + i, inverse);
    Vec thresholds[4];
    for (size_t k = 0; k < 4; ++k) {
      const Thresholds both = RandomThresholds(b.rounding, number);
      number = Lane::AddInt(number, Lane::BroadcastInt(k % 2 == 0 ? 1 : 2 * Lane::kWidth - 1));
      thresholds[k] = Lane::ToFloat(both.first);
      Lane::Store(staged.second_thresholds + i + k * Lane::kWidth, Lane::ToFloat(both.second));
    }
    if constexpr (Rule::kHasFirst) {
      uint8_t* const codes = static_cast<uint8_t*>(b.first) + begin + i;
      NarrowFirst(staged.first + i, staged.first_signs + i / 2, roots, inverse, thresholds, codes);
    }
  }
  if constexpr (Rule::kHasFirst) {
    b.first_scale[begin / kStateBlock] = scaling.scale;
    if (scaling.inverse == 0.0f) std::memset(static_cast<uint8_t*>(b.first) + begin, 0, kStateBlock);
  }
}

// Parameters, and codes of the second moment.
template <class Rule>
OFFLOAD_INLINE void WriteSecond(const Buffers& b, size_t begin, const Staged& staged, const Scaling& scaling) {
  const Vec inverse = Lane::Broadcast(scaling.inverse);
  for (size_t i = 0; i < kStateBlock; i += kTwoPairs) {
    const Roots roots = BeginRoots(staged.second + i, inverse);
    for (size_t k = i; k < i + kTwoPairs; k += 2 * Lane::kWidth) {
      WriteParam<StateFormat::kInt8>(b, begin + k, LoadRow<StateFormat::kFloat32>(staged.param, Format::kFloat32, k),
                                     false);
    }
    if constexpr (Rule::kHasSecond) {
      uint8_t* const codes = static_cast<uint8_t*>(b.second) + begin + i;
      NarrowSecond(staged.second + i, roots, inverse, staged.second_thresholds + i, codes);
    }
  }
  if constexpr (Rule::kHasSecond) {
    b.second_scale[begin / kStateBlock] = scaling.scale;
    if (scaling.inverse == 0.0f) std::memset(static_cast<uint8_t*>(b.second) + begin, 0, kStateBlock);
  }
}

// A pair of elements, but for kInt8.
template <class Rule, StateFormat kState>
OFFLOAD_INLINE void Write(const Buffers& b, size_t i, const Elements& e, bool streaming) {
  const Int ties = WriteParam<kState>(b, i, e.param, streaming);
  WriteMoments<Rule, kState>(b, i, e, ties);
}

// A pair is written while the next one is computed: roots and divisions take long, and what waits for them would leave
// the processor no room to look further ahead for other work.
template <class Rule, StateFormat kState>
OFFLOAD_INLINE void UpdateBlock(const Buffers& b, size_t begin, const Rule& rule, bool streaming) {
  if constexpr (kState == StateFormat::kInt8) {
    Staged staged;
    const Largest largest = StepBlock(b, begin, rule, staged);
    // Both now: their divisions take long as well.
    const Scaling of_first = ChooseScaling<false>(largest.first), of_second = ChooseScaling<true>(largest.second);
    WriteFirst<Rule>(b, begin, staged, of_first);
    WriteSecond<Rule>(b, begin, staged, of_second);
    return;
  }
  constexpr size_t kPair = 2 * Lane::kWidth;
  const Scales scales = LoadScales<Rule, kState>(b, begin);
  Elements e = ReadAndStep<Rule, kState>(b, begin, scales, rule);
  for (size_t i = begin + kPair; i < begin + kStateBlock; i += kPair) {
    const Elements next = ReadAndStep<Rule, kState>(b, i, scales, rule);
    Write<Rule, kState>(b, i - kPair, e, streaming);
    e = next;
  }
  Write<Rule, kState>(b, begin + kStateBlock - kPair, e, streaming);
}

// Only a parameter copy beside a master is written with streaming stores: all else is read first, and a line that is
// already on its way through the cache is cheaper to write back than to write around.
OFFLOAD_INLINE bool CanStream(const Buffers& b, size_t begin) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(b.param) + begin * SizeOf(b.param_format);
  return b.param_format != Format::kNone && address % sizeof(Vec) == 0;
}

// In kInt8 begin is a multiple of kStateBlock.
template <class Rule, StateFormat kState>
void UpdateRange(const Buffers& buffers, size_t begin, size_t end, const void* scalars) {
  const Buffers whole = buffers;  // a local copy: the stores below can't alias it
  const Rule rule(*static_cast<const typename Rule::Scalars*>(scalars));
  const bool streaming = kState == StateFormat::kFloat32 && CanStream(whole, begin);
  PaddedBlock last;
  for (size_t i = begin; i < end; i += kStateBlock) {
    if (end - i >= kStateBlock) {
      UpdateBlock<Rule, kState>(whole, i, rule, streaming);
    } else {
      last.Fill(whole, i, end - i);
      UpdateBlock<Rule, kState>(last.buffers(), 0, rule, false);
      last.WriteBack();
    }
  }
  if (streaming)
    Lane::FinishStreaming();  // streaming stores are ordered with nothing else
                              // until here
}

template <class Rule>
RangeFn SelectFormat(StateFormat state_format) {
  switch (state_format) {
    case StateFormat::kFloat32:
      return UpdateRange<Rule, StateFormat::kFloat32>;
    case StateFormat::kSplit16:
      return UpdateRange<Rule, StateFormat::kSplit16>;
    case StateFormat::kBFloat16:
      return UpdateRange<Rule, StateFormat::kBFloat16>;
    case StateFormat::kInt8:
      return UpdateRange<Rule, StateFormat::kInt8>;
  }
  return nullptr;
}

inline RangeFn Select(RuleKind rule, const Buffers& b) {
  switch (rule) {
    case RuleKind::kAdam:
      return b.max_second == nullptr ? SelectFormat<Adam>(b.state_format) : SelectFormat<AdamAmsgrad>(b.state_format);
    case RuleKind::kLion:
      return SelectFormat<Lion>(b.state_format);
    case RuleKind::kAdagrad:
      return SelectFormat<Adagrad>(b.state_format);
    case RuleKind::kSgd:
      return b.first == nullptr ? SelectFormat<Sgd>(b.state_format) : SelectFormat<SgdMomentum>(b.state_format);
  }
  return nullptr;
}
