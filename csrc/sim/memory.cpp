#include "memory.h"

#include <c10/util/Exception.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <iterator>

#include "faults.h"

namespace sim {
namespace {

constexpr size_t kBlockBytes = 512;       // sizes are rounded up to it, as CUDA's allocator does
constexpr size_t kAdviseBytes = 1 << 20;  // released blocks from this size on give their pages back
constexpr size_t kInitialCapacity = 1 << 30;

char* map_pages(size_t num_bytes, int protection) {
  void* pages = mmap(nullptr, num_bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  TORCH_CHECK(pages != MAP_FAILED, "sim: cannot reserve ", num_bytes,
              " bytes of address space for device memory; configure a smaller capacity");
  return static_cast<char*>(pages);
}

template <class F>
void for_byte_stats(DeviceMemory::Stats& stats, F apply) {
  for (auto* group :
       {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes, &stats.requested_bytes, &stats.allocation})
    for (auto& stat : *group) apply(stat);
}

}  // namespace

DeviceMemory& device_memory(int device) {
  static auto* memories = new std::array<DeviceMemory, kNumDevices>{
      DeviceMemory(0, kInitialCapacity), DeviceMemory(1, kInitialCapacity)};  // tensors may outlive static objects
  return memories->at(device);
}

std::optional<int> device_of(const void* pointer) {
  for (int device = 0; device < kNumDevices; device++)
    if (device_memory(device).owns(pointer)) return device;
  return std::nullopt;
}

char* bytes_of(const void* pointer) {
  const std::optional<int> device = device_of(pointer);
  return device ? device_memory(*device).bytes_of(pointer) : static_cast<char*>(const_cast<void*>(pointer));
}

DeviceMemory::DeviceMemory(int device, size_t capacity_bytes) : device_(device) { map(capacity_bytes); }

void DeviceMemory::map(size_t capacity_bytes) {
  char* guard = map_pages(capacity_bytes, PROT_NONE);
  char* backing = map_pages(capacity_bytes, PROT_READ | PROT_WRITE);
  if (guard_) {
    munmap(guard_, capacity_);
    munmap(backing_, capacity_);
  }
  guard_ = guard;
  backing_ = backing;
  capacity_ = capacity_bytes;
  unused_ = {{0, capacity_bytes}};
}

void DeviceMemory::set_capacity(size_t capacity_bytes) {
  release_cached();
  Runtime::Lock lock;
  TORCH_CHECK(live_.empty() && pending_.empty(), "sim: capacity can only change while nothing is allocated");
  map(capacity_bytes);
  stats_ = {};
}

std::string DeviceMemory::describe(uintptr_t begin, uintptr_t end) {
  Runtime::Lock lock;
  const size_t first = offset(reinterpret_cast<void*>(begin)), num_bytes = end - begin;
  auto block = live_.upper_bound(first);
  if (block == live_.begin() || first >= std::prev(block)->second.offset + std::prev(block)->second.size)
    return "in no block that is allocated now";
  const Block& owner = std::prev(block)->second;
  const size_t begin_in_block = first - owner.offset;
  return "from " + std::to_string(begin_in_block) + " to " + std::to_string(begin_in_block + num_bytes) +
         " of a block of " + std::to_string(owner.requested) + " on sim:" + std::to_string(device_);
}

// ---- allocating

void* DeviceMemory::allocate(size_t num_bytes, int stream) {
  if (num_bytes == 0) return nullptr;
  fail_if_asked(Fault::kAllocation);
  const size_t size = (num_bytes + kBlockBytes - 1) / kBlockBytes * kBlockBytes;
  size_t offset = 0;
  auto take = [&] {
    Runtime::Lock lock;
    reclaim_pending();
    const bool is_recycled = take_cached(size, stream, offset);
    if (!is_recycled && !take_unused(size, offset)) return false;
    stats_.allocated_bytes[0].increase(size);
    stats_.active_bytes[0].increase(size);
    stats_.requested_bytes[0].increase(num_bytes);
    stats_.allocation[0].increase(1);
    live_[offset] = Block{offset, size, num_bytes, stream, {}};
    Runtime& runtime = Runtime::get();
    runtime.memory_allocated(runtime.stream(device_, stream), address(offset), address(offset + size),
                             is_recycled ? backing_ + offset : nullptr);
    return true;
  };
  if (!take()) {
    stats_.num_alloc_retries++;
    release_cached();  // waits for the device, so without the lock
    if (!take()) throw_out_of_memory(num_bytes);
  }
  return guard_ + offset;
}

bool DeviceMemory::take_cached(size_t size, int stream, size_t& offset) {
  auto& cached = cached_[stream];
  auto found = cached.lower_bound(size);
  if (found == cached.end()) return false;
  const size_t found_size = found->first;
  offset = found->second;
  cached.erase(found);
  if (found_size > size) cached.emplace(found_size - size, offset + size);
  return true;
}

bool DeviceMemory::take_unused(size_t size, size_t& offset) {
  auto found = std::find_if(unused_.begin(), unused_.end(), [&](auto& hole) { return hole.second >= size; });
  if (found == unused_.end()) return false;
  const size_t found_size = found->second;
  offset = found->first;
  unused_.erase(found);
  if (found_size > size) unused_[offset + size] = found_size - size;
  stats_.reserved_bytes[0].increase(size);
  stats_.num_device_alloc++;
  // At once, not in stream order: nothing else uses these bytes, so any stream may have them first.
  if (Runtime::get().poisons()) std::memset(backing_ + offset, kNanByte, size);
  return true;
}

void DeviceMemory::throw_out_of_memory(size_t num_bytes) {
  Runtime::Lock lock;
  stats_.num_ooms++;
  size_t largest = 0;
  for (auto& [offset, size] : unused_) largest = std::max(largest, size);
  TORCH_CHECK_WITH(OutOfMemoryError, false, "sim out of memory. Tried to allocate ", num_bytes, " bytes. Device ",
                   device_, " has a total capacity of ", capacity_, " bytes of which ",
                   capacity_ - stats_.reserved_bytes[0].current, " are free, at most ", largest,
                   " of them in one piece; tensors hold ", stats_.allocated_bytes[0].current, " bytes.");
}

// ---- freeing

void DeviceMemory::free(void* pointer) {
  if (!pointer) return;
  Runtime::Lock lock;
  auto found = live_.find(offset(pointer));
  if (found == live_.end()) return;
  Block block = std::move(found->second);
  live_.erase(found);
  stats_.allocated_bytes[0].decrease(block.size);
  stats_.requested_bytes[0].decrease(block.requested);
  stats_.allocation[0].decrease(1);
  Runtime::get().memory_let_go(address(block.offset));
  if (block.other_streams.empty()) return recycle(block, {});
  std::vector<EventPtr> uses;
  for (Stream* stream : block.other_streams) uses.push_back(Runtime::get().record(*stream));
  pending_.push_back({std::move(block), std::move(uses)});
}

void DeviceMemory::recycle(const Block& block, const std::vector<EventPtr>& ended) {
  Runtime& runtime = Runtime::get();
  runtime.memory_reusable(runtime.stream(device_, block.stream), address(block.offset),
                          address(block.offset + block.size), ended);
  cached_[block.stream].emplace(block.size, block.offset);
  stats_.active_bytes[0].decrease(block.size);
}

void DeviceMemory::reclaim_pending() {
  auto is_over = [](const Pending& pending) {
    return std::all_of(pending.uses.begin(), pending.uses.end(), [](auto& event) { return event->is_done; });
  };
  auto first_over = std::stable_partition(pending_.begin(), pending_.end(), [&](auto& p) { return !is_over(p); });
  for (auto it = first_over; it != pending_.end(); ++it) recycle(it->block, it->uses);
  pending_.erase(first_over, pending_.end());
}

void DeviceMemory::record_use(const void* pointer, Stream& stream) {
  Runtime::Lock lock;
  auto found = live_.find(offset(pointer));
  if (found != live_.end() && (stream.device != device_ || stream.id != found->second.stream))
    found->second.other_streams.insert(&stream);
}

void DeviceMemory::release_cached() {
  Runtime::get().synchronize();
  Runtime::Lock lock;
  reclaim_pending();
  release_cached_blocks();
}

void DeviceMemory::release_cached_blocks() {
  for (auto& [stream, cached] : cached_)
    for (auto& [size, offset] : cached) {
      give_back_unused(offset, size);
      stats_.reserved_bytes[0].decrease(size);
      stats_.num_device_free++;
      if (size >= kAdviseBytes) madvise(backing_ + offset, size, MADV_DONTNEED);
    }
  cached_.clear();
}

void DeviceMemory::give_back_unused(size_t offset, size_t size) {
  auto hole = unused_.emplace(offset, size).first;
  auto next = std::next(hole);
  if (next != unused_.end() && offset + size == next->first) {
    hole->second += next->second;
    unused_.erase(next);
  }
  if (hole == unused_.begin()) return;
  auto previous = std::prev(hole);
  if (previous->first + previous->second != offset) return;
  previous->second += hole->second;
  unused_.erase(hole);
}

// ---- statistics

DeviceMemory::Stats DeviceMemory::stats() {
  Runtime::Lock lock;
  return stats_;
}

void DeviceMemory::reset_peak_stats() {
  Runtime::Lock lock;
  for_byte_stats(stats_, [](auto& stat) { stat.reset_peak(); });
}

void DeviceMemory::reset_accumulated_stats() {
  Runtime::Lock lock;
  for_byte_stats(stats_, [](auto& stat) { stat.reset_accumulated(); });
}

size_t DeviceMemory::free_bytes() {
  Runtime::Lock lock;
  return capacity_ - stats_.reserved_bytes[0].current;
}

size_t DeviceMemory::live_bytes() {
  Runtime::Lock lock;
  return stats_.allocated_bytes[0].current;
}

}  // namespace sim
