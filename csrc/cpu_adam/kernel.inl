// The pass over a range of elements: blocks of kStateBlock, two vectors at a time, from any state format through
// registers back to it. Included once per instruction set, inside its target region and a namespace; OFFLOAD_LANE names
// the file of its Lane.

// clang-format off: each needs those before it
#include OFFLOAD_LANE
#include "rules.inl"
#include "codec.inl"
#include "stream.inl"
// clang-format on

// One vector of elements. Moments that a rule doesn't keep are zero.
struct Elements {
  Vec param, first, second, max_second;
};

template <StateFormat kState, class Code>
OFFLOAD_INLINE Vec LoadMoment(const void* moment, const float* scales, size_t i) {
  if constexpr (kState == StateFormat::kBFloat16) return WidenBFloat16(static_cast<const uint16_t*>(moment) + i);
  if constexpr (kState == StateFormat::kInt8) {
    return WidenCodes(static_cast<const Code*>(moment) + i, scales[i / kStateBlock]);
  }
  return Lane::Load(static_cast<const float*>(moment) + i);
}

template <class Rule, StateFormat kState>
OFFLOAD_INLINE Elements Read(const Buffers& b, size_t i) {
  constexpr bool kHasSignedSecond = Rule::kHasSecond && kState != StateFormat::kInt8;
  const Vec zero = Lane::Broadcast(0.0f);
  Elements e{zero, zero, zero, zero};
  if constexpr (Rule::kHasFirst) e.first = LoadMoment<kState, int8_t>(b.first, b.first_scale, i);
  if constexpr (Rule::kHasSecond) e.second = LoadMoment<kState, uint8_t>(b.second, b.second_scale, i);
  if constexpr (kState == StateFormat::kFloat32) {
    e.param = Lane::Load(static_cast<const float*>(b.master) + i);
  } else {
    Int master = JoinMaster(b.param, b.master, i);
    if constexpr (kHasSignedSecond) {
      master = Lane::AddInt(master, Lane::ShiftRight<31>(Lane::Bits(e.second)));
      e.second = Lane::FromBits(Magnitude(e.second));
    }
    e.param = Lane::FromBits(master);
  }
  if constexpr (Rule::kHasMaxSecond) e.max_second = Lane::Load(b.max_second + i);
  return e;
}

template <class Rule, StateFormat kState>
OFFLOAD_INLINE Elements ReadAndStep(const Buffers& b, size_t i, const Rule& rule) {
  Elements e = Read<Rule, kState>(b, i);
  rule.Step(e.param, e.first, e.second, e.max_second, LoadFloats(b.grad, b.grad_format, i));
  return e;
}

OFFLOAD_INLINE void StoreVectors(void* target, size_t i, Vec x, Vec y) {
  Lane::Store(static_cast<float*>(target) + i, x);
  Lane::Store(static_cast<float*>(target) + i + Lane::kWidth, y);
}

// Parameter and master; in compact formats the ties among them go to the second moment's sign, if it has one.
template <class Rule, StateFormat kState>
OFFLOAD_INLINE void WriteParam(const Buffers& b, size_t i, Elements& x, Elements& y, bool streaming) {
  if constexpr (kState == StateFormat::kFloat32) {
    StoreVectors(b.master, i, x.param, y.param);
    StoreFloats(b.param, b.param_format, i, x.param, y.param, streaming);
    return;
  }
  const Halves of_x = SplitMaster(x.param), of_y = SplitMaster(y.param);
  Lane::StorePair(static_cast<uint16_t*>(b.param) + i, of_x.param, of_y.param, false);
  Lane::StorePair(static_cast<uint16_t*>(b.master) + i, of_x.remainder, of_y.remainder, false);
  if constexpr (Rule::kHasSecond && kState != StateFormat::kInt8) {
    const Int sign = Lane::BroadcastInt(0x80000000u);
    x.second = Lane::FromBits(Lane::Or(Lane::Bits(x.second), Lane::Where(of_x.is_tie, sign)));
    y.second = Lane::FromBits(Lane::Or(Lane::Bits(y.second), Lane::Where(of_y.is_tie, sign)));
  }
}

template <bool kIsSecond>
OFFLOAD_INLINE void RoundMoment(void* moment, size_t i, Vec x, Vec y, Int random_x, Int random_y) {
  const Int rounded_x = RoundUpAt(CanonicalBits(x), Threshold<kIsSecond>(random_x));
  const Int rounded_y = RoundUpAt(CanonicalBits(y), Threshold<kIsSecond>(random_y));
  Lane::StorePair(static_cast<uint16_t*>(moment) + i, rounded_x, rounded_y, false);
}

template <class Rule, StateFormat kState>
OFFLOAD_INLINE void WriteMoments(const Buffers& b, size_t i, const Elements& x, const Elements& y) {
  if constexpr (Rule::kHasMaxSecond) StoreVectors(b.max_second, i, x.max_second, y.max_second);
  if constexpr (kState == StateFormat::kBFloat16) {
    const Int random_x = RandomBits(b.rounding, i), random_y = RandomBits(b.rounding, i + Lane::kWidth);
    if constexpr (Rule::kHasFirst) RoundMoment<false>(b.first, i, x.first, y.first, random_x, random_y);
    if constexpr (Rule::kHasSecond) RoundMoment<true>(b.second, i, x.second, y.second, random_x, random_y);
  } else {
    if constexpr (Rule::kHasFirst) StoreVectors(b.first, i, x.first, y.first);
    if constexpr (Rule::kHasSecond) StoreVectors(b.second, i, x.second, y.second);
  }
}

// The moments of a block in fp32, until its scales are known.
struct Moments {
  alignas(64) float first[kStateBlock];
  alignas(64) float second[kStateBlock];
  Int largest_first, largest_second;

  // Written out: a constructor that the compiler makes is made outside the target region.
  OFFLOAD_INLINE Moments() : largest_first(Lane::BroadcastInt(0)), largest_second(Lane::BroadcastInt(0)) {}

  OFFLOAD_INLINE void Put(size_t k, const Elements& x, const Elements& y) {
    StoreVectors(first, k, x.first, y.first);
    StoreVectors(second, k, x.second, y.second);
    largest_first = Lane::MaxInt(largest_first, Lane::MaxInt(Magnitude(x.first), Magnitude(y.first)));
    largest_second = Lane::MaxInt(largest_second, Lane::MaxInt(Magnitude(x.second), Magnitude(y.second)));
  }

  template <class Rule>
  OFFLOAD_INLINE void Write(const Buffers& b, size_t i) const {
    const size_t block = i / kStateBlock;
    if constexpr (Rule::kHasFirst) {
      b.first_scale[block] = NarrowBlock<false>(first, largest_first, b.rounding, i, b.first);
    }
    if constexpr (Rule::kHasSecond) {
      b.second_scale[block] = NarrowBlock<true>(second, largest_second, b.rounding, i, b.second);
    }
  }
};

// Two vectors of the block that begins at `begin`; in int8 the moments are only put by.
template <class Rule, StateFormat kState>
OFFLOAD_INLINE void Write(const Buffers& b, size_t i, Elements& x, Elements& y, bool streaming, size_t begin,
                          Moments& moments) {
  WriteParam<Rule, kState>(b, i, x, y, streaming);
  if constexpr (kState == StateFormat::kInt8) {
    moments.Put(i - begin, x, y);
  } else {
    WriteMoments<Rule, kState>(b, i, x, y);
  }
}

// Two vectors are written while the next two are computed: roots and divisions take long, and what waits for them would
// leave the processor no room to look further ahead for other work.
template <class Rule, StateFormat kState>
OFFLOAD_INLINE void UpdateBlock(const Buffers& b, size_t begin, const Rule& rule, bool streaming) {
  constexpr size_t kPair = 2 * Lane::kWidth;
  Moments moments;
  Elements x = ReadAndStep<Rule, kState>(b, begin, rule), y = ReadAndStep<Rule, kState>(b, begin + Lane::kWidth, rule);
  for (size_t i = begin + kPair; i < begin + kStateBlock; i += kPair) {
    const Elements next_x = ReadAndStep<Rule, kState>(b, i, rule);
    const Elements next_y = ReadAndStep<Rule, kState>(b, i + Lane::kWidth, rule);
    Write<Rule, kState>(b, i - kPair, x, y, streaming, begin, moments);
    x = next_x;
    y = next_y;
  }
  Write<Rule, kState>(b, begin + kStateBlock - kPair, x, y, streaming, begin, moments);
  if constexpr (kState == StateFormat::kInt8) moments.template Write<Rule>(b, begin);
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
  if (streaming) Lane::FinishStreaming();  // streaming stores are ordered with nothing else until here
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
