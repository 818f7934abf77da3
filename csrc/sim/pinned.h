// Host memory that copies may use asynchronously: whole pages, and as many as were asked for.
#pragma once
#include <ATen/core/CachingHostAllocator.h>

#include <atomic>
#include <cstddef>
#include <map>
#include <mutex>

namespace sim {

// Without a cache, so that host tools see use after free. A copy in flight keeps its block alive.
class PinnedAllocator final : public at::HostAllocator {
 public:
  at::DataPtr allocate(size_t num_bytes) override;
  c10::DeleterFnPtr raw_deleter() const override;
  void copy_data(void* destination, const void* source, size_t num_bytes) const override;
  bool record_event(void*, void*, c10::Stream) override { return true; }  // copies retain their blocks themselves
  void empty_cache() override {}
  at::HostStats get_stats() override;
  void reset_accumulated_stats() override;
  void reset_peak_stats() override;

  // Whether pages are really locked, so that the system counts them and its limits hold. They are touched then.
  void lock_pages(bool locks) { locks_ = locks; }
  bool locks_pages() const { return locks_; }

  bool owns(const void* pointer);
  // Around a copy that reads or writes at `pointer`.
  void retain(const void* pointer);
  void release(const void* pointer);

 private:
  struct Block {
    size_t num_bytes;
    int num_copies = 0;
    bool is_freed = false;
  };
  using Blocks = std::map<uintptr_t, Block>;

  static void free(void* pointer);
  Blocks::iterator find(const void* pointer);
  void drop_if_unused(Blocks::iterator block);

  std::atomic<bool> locks_{false};
  std::mutex mutex_;
  Blocks blocks_;  // by address
  at::HostStats stats_;
};

PinnedAllocator& pinned_allocator();

}  // namespace sim
