// The limit of the update: a pass that reads and writes the same bytes as a step over fp32 gradients without a
// parameter copy (28 per element: four arrays read, three of them written), with one fma for each array written.
// Included by kernel.inl.

inline void StreamRange(const Buffers& buffers, size_t begin, size_t end) {
  float* const rows[] = {static_cast<float*>(buffers.master), static_cast<float*>(buffers.first),
                         static_cast<float*>(buffers.second)};
  const float* const grad = static_cast<const float*>(buffers.grad);
  const Vec weight = Lane::Broadcast(0x1p-30f);
  for (size_t i = begin; i + Lane::kWidth <= end; i += Lane::kWidth) {  // the last few stay as they are
    const Vec g = Lane::Load(grad + i);
    for (float* const row : rows) Lane::Store(row + i, Lane::Fma(g, weight, Lane::Load(row + i)));
  }
}
