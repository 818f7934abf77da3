#include "footprint.h"

#include <algorithm>

namespace sim {
namespace {

constexpr size_t kMaxRuns = 1 << 16;  // of the smaller of two; beyond that, tensors whose ranges overlap count as one

// Calls `visit(offset)` for the first byte of each run until it returns true; whether it did.
template <class F>
bool any_run(const Strides& strides, size_t dimension, size_t offset, const F& visit) {
  if (dimension == strides.dimensions.size()) return visit(offset);
  const auto& [size, stride_bytes] = strides.dimensions[dimension];
  for (size_t i = 0; i < size; i++)
    if (any_run(strides, dimension + 1, offset + i * stride_bytes, visit)) return true;
  return false;
}

bool touches(const Footprint& footprint, uintptr_t begin, uintptr_t end) {
  if (begin >= footprint.end || end <= footprint.begin) return false;
  if (!footprint.strides) return true;
  const auto origin = static_cast<int64_t>(footprint.begin);
  return footprint.strides->touches(static_cast<int64_t>(begin) - origin, static_cast<int64_t>(end) - origin);
}

}  // namespace

size_t Strides::num_runs() const {
  size_t num_runs = 1;
  for (const Dimension& dimension : dimensions) num_runs *= dimension.size;
  return num_runs;
}

bool Strides::touches(size_t dimension, int64_t begin, int64_t end) const {
  if (dimension == dimensions.size()) return begin < static_cast<int64_t>(run_bytes) && end > 0;
  auto inner_bytes = static_cast<int64_t>(run_bytes);  // from the first to the last byte of one repetition
  for (size_t i = dimension + 1; i < dimensions.size(); i++)
    inner_bytes += static_cast<int64_t>((dimensions[i].size - 1) * dimensions[i].stride_bytes);
  const auto size = static_cast<int64_t>(dimensions[dimension].size);
  const auto stride = static_cast<int64_t>(dimensions[dimension].stride_bytes);
  const int64_t first = std::max<int64_t>(0, begin < inner_bytes ? 0 : (begin - inner_bytes) / stride + 1);
  for (int64_t i = first; i < size && i * stride < end; i++) {
    if (i * stride >= begin && i * stride < end) return true;  // its first run starts inside
    if (touches(dimension + 1, begin - i * stride, end - i * stride)) return true;
  }
  return false;
}

bool Footprint::is_same(const Footprint& other) const {
  if (begin != other.begin || end != other.end || !strides != !other.strides) return false;
  return !strides || *strides == *other.strides;
}

bool Footprint::overlaps(const Footprint& other) const {
  const uintptr_t first = std::max(begin, other.begin), last = std::min(end, other.end);
  if (first >= last) return false;
  if (!strides) return touches(other, first, last);
  if (!other.strides) return touches(*this, first, last);
  const bool is_smaller = strides->num_runs() <= other.strides->num_runs();
  const Footprint &few = is_smaller ? *this : other, &many = is_smaller ? other : *this;
  if (few.strides->num_runs() > kMaxRuns) return true;
  return any_run(*few.strides, 0, few.begin,
                 [&](uintptr_t run) { return touches(many, run, run + few.strides->run_bytes); });
}

Footprint footprint_of(uintptr_t data, const int64_t* sizes, const int64_t* strides, size_t num_dimensions,
                       size_t element_bytes) {
  std::vector<Strides::Dimension> dimensions;
  size_t num_bytes = element_bytes;
  for (size_t i = 0; i < num_dimensions; i++) {
    if (sizes[i] == 0) return {0, 0, nullptr};
    if (sizes[i] == 1 || strides[i] == 0) continue;
    dimensions.push_back({static_cast<size_t>(sizes[i]), static_cast<size_t>(strides[i]) * element_bytes});
    num_bytes += (dimensions.back().size - 1) * dimensions.back().stride_bytes;
  }
  std::sort(dimensions.begin(), dimensions.end(),
            [](const auto& a, const auto& b) { return a.stride_bytes > b.stride_bytes; });
  size_t run_bytes = element_bytes;
  while (!dimensions.empty() && dimensions.back().stride_bytes == run_bytes) {
    run_bytes *= dimensions.back().size;
    dimensions.pop_back();
  }
  Footprint footprint{data, data + num_bytes, nullptr};
  if (!dimensions.empty()) footprint.strides = std::make_shared<Strides>(Strides{run_bytes, std::move(dimensions)});
  return footprint;
}

}  // namespace sim
