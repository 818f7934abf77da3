// The limit of the update: a pass that reads and writes the same bytes as a step over fp32 gradients without a
// parameter copy (28 per element: four arrays read, three of them written), with one fma for each array written.
// Included after kernel.inl, once per instruction set.

#ifdef OFFLOAD_VECTOR_LANE
using StreamLane = VectorLane;
#else
struct StreamLane : ScalarLane {
  static constexpr size_t kWidth = 1;
  static OFFLOAD_INLINE Vec Load(const float* a) { return *a; }
  static OFFLOAD_INLINE void Store(float* a, Vec x) { *a = x; }
};
#endif

inline void StreamRange(const Buffers& buffers, size_t begin, size_t end) {
  float* const rows[] = {static_cast<float*>(buffers.master), static_cast<float*>(buffers.first),
                         static_cast<float*>(buffers.second)};
  const float* const grad = static_cast<const float*>(buffers.grad);
  const StreamLane::Vec weight = StreamLane::Broadcast(0x1p-30f);
  for (size_t i = begin; i + StreamLane::kWidth <= end; i += StreamLane::kWidth) {  // the last few stay as they are
    const StreamLane::Vec g = StreamLane::Load(grad + i);
    for (float* const row : rows) StreamLane::Store(row + i, StreamLane::Fma(g, weight, StreamLane::Load(row + i)));
  }
}
