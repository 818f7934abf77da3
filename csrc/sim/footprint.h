// Which bytes an access touches: a range, and the gaps in it where the tensor is strided.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace sim {

// The bytes of a strided tensor from its first one on: runs of `run_bytes`, repeated along each dimension.
struct Strides {
  struct Dimension {
    size_t size, stride_bytes;
    bool operator==(const Dimension& other) const { return size == other.size && stride_bytes == other.stride_bytes; }
  };
  size_t run_bytes;
  std::vector<Dimension> dimensions;  // the largest stride first

  bool operator==(const Strides& other) const { return run_bytes == other.run_bytes && dimensions == other.dimensions; }
  size_t num_runs() const;
  // Whether any run has a byte in [begin, end), counted from the first byte.
  bool touches(int64_t begin, int64_t end) const { return touches(0, begin, end); }

 private:
  bool touches(size_t dimension, int64_t begin, int64_t end) const;
};

struct Footprint {
  uintptr_t begin, end;                    // as data_ptr() gives them
  std::shared_ptr<const Strides> strides;  // null if there are no gaps

  bool is_empty() const { return begin >= end; }
  bool is_same(const Footprint& other) const;
  bool overlaps(const Footprint& other) const;
};

// `strides` in elements; a tensor without elements has an empty footprint.
Footprint footprint_of(uintptr_t data, const int64_t* sizes, const int64_t* strides, size_t num_dimensions,
                       size_t element_bytes);

}  // namespace sim
