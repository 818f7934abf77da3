// Device memory: an address range that nothing on the host can touch, and its blocks.
//
// Pointers point into `guard_`, which is mapped without any access, so host code that follows one dies at once. The
// bytes are at the same offset in `backing_`, which only operations of the device know. Untouched pages cost nothing,
// so the capacity may exceed what the machine has.
//
// Blocks are reused as CUDA's caching allocator does: at once by the stream they were allocated on, and only after
// events on the other streams that record_stream named. Nothing touches a freed block until its next owner does: its
// first operation finds the block full of NaN. The lock is the runtime's.
#pragma once
#include <c10/core/CachingDeviceAllocator.h>

#include <cstddef>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "runtime.h"

namespace sim {

class DeviceMemory {
 public:
  using Stats = c10::CachingDeviceAllocator::DeviceStats;

  DeviceMemory(int device, size_t capacity_bytes);
  void set_capacity(size_t capacity_bytes);  // with nothing allocated
  size_t capacity() const { return capacity_; }
  size_t live_bytes();

  bool owns(const void* pointer) const { return pointer >= guard_ && pointer < guard_ + capacity_; }
  size_t offset(const void* pointer) const { return static_cast<const char*>(pointer) - guard_; }
  char* bytes_of(const void* pointer) const { return backing_ + offset(pointer); }
  // Where in which block, as text for reports.
  std::string describe(uintptr_t begin, uintptr_t end);

  void* allocate(size_t num_bytes, int stream);  // throws c10::OutOfMemoryError
  void free(void* pointer);
  void record_use(const void* pointer, Stream& stream);
  void release_cached();
  Stats stats();
  void reset_peak_stats();
  void reset_accumulated_stats();
  size_t free_bytes();

 private:
  struct Block {
    size_t offset, size, requested;
    int stream;
    std::set<Stream*> other_streams;  // that record_stream named
  };
  struct Pending {  // freed, but other streams may still use it
    Block block;
    std::vector<EventPtr> uses;
  };

  void map(size_t capacity_bytes);
  bool take_cached(size_t size, int stream, size_t& offset);
  bool take_unused(size_t size, size_t& offset);
  void give_back_unused(size_t offset, size_t size);
  void reclaim_pending();
  void release_cached_blocks();
  void recycle(const Block& block, const std::vector<EventPtr>& ended);
  uintptr_t address(size_t offset) const { return reinterpret_cast<uintptr_t>(guard_) + offset; }
  [[noreturn]] void throw_out_of_memory(size_t num_bytes);

  const int device_;
  size_t capacity_ = 0;
  char* guard_ = nullptr;
  char* backing_ = nullptr;
  std::map<size_t, size_t> unused_;                      // offset -> size
  std::map<int, std::multimap<size_t, size_t>> cached_;  // stream -> size -> offset
  std::map<size_t, Block> live_;                         // by offset
  std::vector<Pending> pending_;
  Stats stats_;
};

DeviceMemory& device_memory(int device);
// The device whose memory `pointer` points to.
std::optional<int> device_of(const void* pointer);
// The bytes behind a device pointer; other pointers as they are.
char* bytes_of(const void* pointer);

}  // namespace sim
