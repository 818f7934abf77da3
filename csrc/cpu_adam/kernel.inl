// The pass over a range of elements. Included once per instruction set; where the includer names a file with a
// VectorLane in OFFLOAD_VECTOR_LANE, blocks of 64 elements go through that and the rest through ScalarLane.

#include "lane.inl"
#ifdef OFFLOAD_VECTOR_LANE
#include OFFLOAD_VECTOR_LANE
#endif

struct ScalarLane {
  using Vec = float;
  static OFFLOAD_INLINE Vec Broadcast(float x) { return x; }
  static OFFLOAD_INLINE Vec Add(Vec a, Vec b) { return a + b; }
  static OFFLOAD_INLINE Vec Sub(Vec a, Vec b) { return a - b; }
  static OFFLOAD_INLINE Vec Mul(Vec a, Vec b) { return a * b; }
  static OFFLOAD_INLINE Vec Div(Vec a, Vec b) { return a / b; }
  static OFFLOAD_INLINE Vec Sqrt(Vec a) { return __builtin_sqrtf(a); }
  static OFFLOAD_INLINE Vec Fma(Vec a, Vec b, Vec c) { return __builtin_fmaf(a, b, c); }
  static OFFLOAD_INLINE Vec Max(Vec a, Vec b) { return (a != a || b != b) ? a + b : (a > b ? a : b); }
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
  const BroadcastScalars<ScalarLane> s(scalars);
  for (size_t i = begin; i < end; ++i) {
    UpdateLane<ScalarLane>(b.master[i], b.exp_avg[i], b.exp_avg_sq[i],
                           b.max_exp_avg_sq != nullptr ? b.max_exp_avg_sq + i : nullptr, LoadScalar<kGrad>(b.grad, i),
                           s);
    StoreScalar<kOut>(b.param_out, i, b.master[i]);
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
                                            const BroadcastScalars<VectorLane>& s) {
  VectorLane::Vec param = VectorLane::Load(b.master + i);
  VectorLane::Vec exp_avg = VectorLane::Load(b.exp_avg + i);
  VectorLane::Vec exp_avg_sq = VectorLane::Load(b.exp_avg_sq + i);
  if (b.max_exp_avg_sq != nullptr) {
    VectorLane::Vec max_exp_avg_sq = VectorLane::Load(b.max_exp_avg_sq + i);
    UpdateLane<VectorLane>(param, exp_avg, exp_avg_sq, &max_exp_avg_sq, grad, s);
    VectorLane::Store(b.max_exp_avg_sq + i, max_exp_avg_sq);
  } else {
    UpdateLane<VectorLane>(param, exp_avg, exp_avg_sq, nullptr, grad, s);
  }
  VectorLane::Store(b.master + i, param);
  VectorLane::Store(b.exp_avg + i, exp_avg);
  VectorLane::Store(b.exp_avg_sq + i, exp_avg_sq);
  return param;
}

// Only the parameter copy is written with streaming stores: the state is read first, and a line that is already on
// its way through the cache is cheaper to write back than to write around.
template <Format kGrad, Format kOut>
void UpdateRange(const Buffers& buffers, size_t begin, size_t end, const AdamScalars& scalars) {
  constexpr size_t kBlock = 64;
  constexpr size_t kOutBytes = kOut == Format::kFloat32 ? 4 : 2;
  const Buffers b = buffers;  // a local copy: the stores below can't alias it
  const BroadcastScalars<VectorLane> s(scalars);
  const uintptr_t out_address = reinterpret_cast<uintptr_t>(b.param_out) + begin * kOutBytes;
  const bool streaming = kOut != Format::kNone && out_address % sizeof(VectorLane::Vec) == 0;
  size_t i = begin;
  for (; end - i >= kBlock; i += kBlock) {
    for (size_t j = i; j < i + kBlock; j += 2 * VectorLane::kWidth) {
      const size_t next = j + VectorLane::kWidth;
      const VectorLane::Vec first = UpdateVector(b, j, LoadVector<kGrad>(b.grad, j), s);
      const VectorLane::Vec second = UpdateVector(b, next, LoadVector<kGrad>(b.grad, next), s);
      StorePair<kOut>(b.param_out, j, first, second, streaming);
    }
  }
  if (streaming) _mm_sfence();  // streaming stores are ordered with nothing else until here
  UpdateScalar<kGrad, kOut>(b, i, end, scalars);
}

#else

template <Format kGrad, Format kOut>
void UpdateRange(const Buffers& buffers, size_t begin, size_t end, const AdamScalars& scalars) {
  UpdateScalar<kGrad, kOut>(buffers, begin, end, scalars);
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

inline RangeFn Select(Format grad, Format out) {
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
