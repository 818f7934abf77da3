// The pass over a range of elements. Included once per instruction set; where the includer names a file with a
// VectorLane in OFFLOAD_VECTOR_LANE, blocks of 64 elements go through that and the rest through ScalarLane.
//
// Adam over fp32 state, where most of the time goes, is written out in full for every format of gradient and copy.
// Everything else goes through the first-level cache, see staged.inl.

#include "rules.inl"
#ifdef OFFLOAD_VECTOR_LANE
#include OFFLOAD_VECTOR_LANE
#endif

struct ScalarLane {
  using Vec = float;
  static constexpr size_t kWidth = 1;

  static OFFLOAD_INLINE Vec Broadcast(float x) { return x; }
  static OFFLOAD_INLINE Vec Load(const float* a) { return *a; }
  static OFFLOAD_INLINE void Store(float* a, Vec x) { *a = x; }
  static OFFLOAD_INLINE Vec Add(Vec a, Vec b) { return a + b; }
  static OFFLOAD_INLINE Vec Sub(Vec a, Vec b) { return a - b; }
  static OFFLOAD_INLINE Vec Mul(Vec a, Vec b) { return a * b; }
  static OFFLOAD_INLINE Vec Div(Vec a, Vec b) { return a / b; }
  static OFFLOAD_INLINE Vec Sqrt(Vec a) { return __builtin_sqrtf(a); }
  static OFFLOAD_INLINE Vec Fma(Vec a, Vec b, Vec c) { return __builtin_fmaf(a, b, c); }
  static OFFLOAD_INLINE Vec Max(Vec a, Vec b) { return (a != a || b != b) ? a + b : (a > b ? a : b); }
  static OFFLOAD_INLINE Vec Sign(Vec x) { return x > 0.0f ? 1.0f : (x < 0.0f ? -1.0f : x); }  // zero and NaN: as is
};

template <Format kGrad>
OFFLOAD_INLINE float LoadScalar(const void* grad, size_t i) {
  if constexpr (kGrad == Format::kFloat32) {
    return static_cast<const float*>(grad)[i];
  } else {
    const uint16_t half = static_cast<const uint16_t*>(grad)[i];
    return kGrad == Format::kBFloat16 ? BFloat16ToFloat(half) : Float16ToFloat(half);
  }
}

template <Format kOut>
OFFLOAD_INLINE void StoreScalar(void* out, size_t i, float value) {
  if constexpr (kOut == Format::kFloat32) static_cast<float*>(out)[i] = value;
  if constexpr (kOut == Format::kBFloat16) static_cast<uint16_t*>(out)[i] = FloatToBFloat16(value);
  if constexpr (kOut == Format::kFloat16) static_cast<uint16_t*>(out)[i] = FloatToFloat16(value);
}

template <Format kGrad, Format kOut>
void UpdateScalar(const Buffers& b, size_t begin, size_t end, const AdamScalars& scalars) {
  const Adam<ScalarLane> rule(scalars);
  float* master = static_cast<float*>(b.master);
  float* exp_avg = static_cast<float*>(b.first);
  float* exp_avg_sq = static_cast<float*>(b.second);
  for (size_t i = begin; i < end; ++i) {
    rule.Step(master[i], exp_avg[i], exp_avg_sq[i], b.max_second != nullptr ? b.max_second + i : nullptr,
              LoadScalar<kGrad>(b.grad, i));
    StoreScalar<kOut>(b.param, i, master[i]);
  }
}

#ifdef OFFLOAD_VECTOR_LANE

template <Format kGrad>
OFFLOAD_INLINE VectorLane::Vec LoadVector(const void* grad, size_t i) {
  if constexpr (kGrad == Format::kFloat32) {
    return VectorLane::Load(static_cast<const float*>(grad) + i);
  } else {
    const uint16_t* half = static_cast<const uint16_t*>(grad) + i;
    return kGrad == Format::kBFloat16 ? VectorLane::LoadBFloat16(half) : VectorLane::LoadFloat16(half);
  }
}

// Two vectors at a time, so that 16-bit copies fill whole registers.
template <Format kOut>
OFFLOAD_INLINE void StorePair(void* out, size_t i, VectorLane::Vec first, VectorLane::Vec second, bool streaming) {
  if constexpr (kOut == Format::kFloat32) {
    VectorLane::StoreCopy(static_cast<float*>(out) + i, first, streaming);
    VectorLane::StoreCopy(static_cast<float*>(out) + i + VectorLane::kWidth, second, streaming);
  } else if constexpr (kOut != Format::kNone) {
    const auto halves =
        kOut == Format::kBFloat16 ? VectorLane::PackBFloat16(first, second) : VectorLane::PackFloat16(first, second);
    VectorLane::StoreCopy(static_cast<uint16_t*>(out) + i, halves, streaming);
  }
}

OFFLOAD_INLINE VectorLane::Vec UpdateVector(const Buffers& b, size_t i, VectorLane::Vec grad,
                                            const Adam<VectorLane>& rule) {
  float* master = static_cast<float*>(b.master) + i;
  float* first = static_cast<float*>(b.first) + i;
  float* second = static_cast<float*>(b.second) + i;
  VectorLane::Vec param = VectorLane::Load(master);
  VectorLane::Vec exp_avg = VectorLane::Load(first);
  VectorLane::Vec exp_avg_sq = VectorLane::Load(second);
  if (b.max_second != nullptr) {
    VectorLane::Vec max_exp_avg_sq = VectorLane::Load(b.max_second + i);
    rule.Step(param, exp_avg, exp_avg_sq, &max_exp_avg_sq, grad);
    VectorLane::Store(b.max_second + i, max_exp_avg_sq);
  } else {
    rule.Step(param, exp_avg, exp_avg_sq, nullptr, grad);
  }
  VectorLane::Store(master, param);
  VectorLane::Store(first, exp_avg);
  VectorLane::Store(second, exp_avg_sq);
  return param;
}

// Only the parameter copy is written with streaming stores: the state is read first, and a line that is already on
// its way through the cache is cheaper to write back than to write around.
template <Format kGrad, Format kOut>
void UpdateRange(const Buffers& buffers, size_t begin, size_t end, const void* scalars) {
  constexpr size_t kBlock = 64;
  constexpr size_t kOutBytes = kOut == Format::kFloat32 ? 4 : 2;
  const Buffers b = buffers;  // a local copy: the stores below can't alias it
  const AdamScalars& s = *static_cast<const AdamScalars*>(scalars);
  const Adam<VectorLane> rule(s);
  const uintptr_t out_address = reinterpret_cast<uintptr_t>(b.param) + begin * kOutBytes;
  const bool streaming = kOut != Format::kNone && out_address % sizeof(VectorLane::Vec) == 0;
  size_t i = begin;
  for (; end - i >= kBlock; i += kBlock) {
    for (size_t j = i; j < i + kBlock; j += 2 * VectorLane::kWidth) {
      const size_t next = j + VectorLane::kWidth;
      const VectorLane::Vec first = UpdateVector(b, j, LoadVector<kGrad>(b.grad, j), rule);
      const VectorLane::Vec second = UpdateVector(b, next, LoadVector<kGrad>(b.grad, next), rule);
      StorePair<kOut>(b.param, j, first, second, streaming);
    }
  }
  if (streaming) _mm_sfence();  // streaming stores are ordered with nothing else until here
  UpdateScalar<kGrad, kOut>(b, i, end, s);
}

#else

template <Format kGrad, Format kOut>
void UpdateRange(const Buffers& buffers, size_t begin, size_t end, const void* scalars) {
  UpdateScalar<kGrad, kOut>(buffers, begin, end, *static_cast<const AdamScalars*>(scalars));
}

#endif  // OFFLOAD_VECTOR_LANE

template <Format kGrad>
RangeFn SelectOut(Format out) {
  switch (out) {
    case Format::kNone:
      return UpdateRange<kGrad, Format::kNone>;
    case Format::kFloat32:
      return UpdateRange<kGrad, Format::kFloat32>;
    case Format::kBFloat16:
      return UpdateRange<kGrad, Format::kBFloat16>;
    case Format::kFloat16:
      return UpdateRange<kGrad, Format::kFloat16>;
  }
  return nullptr;
}

inline RangeFn SelectDirect(Format grad, Format out) {
  switch (grad) {
    case Format::kFloat32:
      return SelectOut<Format::kFloat32>(out);
    case Format::kBFloat16:
      return SelectOut<Format::kBFloat16>(out);
    case Format::kFloat16:
      return SelectOut<Format::kFloat16>(out);
    case Format::kNone:
      break;
  }
  return nullptr;
}

#include "staged.inl"
