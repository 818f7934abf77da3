#include "pinned.h"

#include <c10/util/Exception.h>
#include <sys/mman.h>

#include <cstring>
#include <iterator>

#include "faults.h"

namespace sim {

PinnedAllocator& pinned_allocator() {
  static PinnedAllocator* allocator = new PinnedAllocator;  // never destroyed: tensors may outlive static objects
  return *allocator;
}

at::DataPtr PinnedAllocator::allocate(size_t num_bytes) {
  if (num_bytes == 0) return {nullptr, nullptr, &free, at::Device(at::kCPU)};
  fail_if_asked(Fault::kPin);
  void* pointer = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  TORCH_CHECK_WITH(OutOfMemoryError, pointer != MAP_FAILED, "sim: cannot pin ", num_bytes, " bytes of host memory");
  if (locks_ && mlock(pointer, num_bytes) != 0) {
    munmap(pointer, num_bytes);
    TORCH_CHECK(false, "sim: the system refused to lock ", num_bytes, " bytes of host memory (RLIMIT_MEMLOCK)");
  }
  std::lock_guard<std::mutex> guard(mutex_);
  blocks_[reinterpret_cast<uintptr_t>(pointer)] = Block{num_bytes};
  stats_.allocated_bytes.increase(num_bytes);
  stats_.active_bytes.increase(num_bytes);
  stats_.num_host_alloc++;
  return {pointer, pointer, &free, at::Device(at::kCPU)};
}

void PinnedAllocator::free(void* pointer) {
  if (!pointer) return;
  auto& self = pinned_allocator();
  std::lock_guard<std::mutex> guard(self.mutex_);
  auto block = self.find(pointer);
  self.stats_.allocated_bytes.decrease(block->second.num_bytes);
  self.stats_.num_host_free++;
  block->second.is_freed = true;
  self.drop_if_unused(block);
}

void PinnedAllocator::drop_if_unused(Blocks::iterator block) {
  if (!block->second.is_freed || block->second.num_copies) return;
  stats_.active_bytes.decrease(block->second.num_bytes);
  munmap(reinterpret_cast<void*>(block->first), block->second.num_bytes);  // and with it the lock
  blocks_.erase(block);
}

PinnedAllocator::Blocks::iterator PinnedAllocator::find(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  auto after = blocks_.upper_bound(address);
  if (after == blocks_.begin()) return blocks_.end();
  auto block = std::prev(after);
  return address < block->first + block->second.num_bytes ? block : blocks_.end();
}

bool PinnedAllocator::owns(const void* pointer) {
  std::lock_guard<std::mutex> guard(mutex_);
  return find(pointer) != blocks_.end();
}

void PinnedAllocator::retain(const void* pointer) {
  std::lock_guard<std::mutex> guard(mutex_);
  find(pointer)->second.num_copies++;
}

void PinnedAllocator::release(const void* pointer) {
  std::lock_guard<std::mutex> guard(mutex_);
  auto block = find(pointer);
  block->second.num_copies--;
  drop_if_unused(block);
}

c10::DeleterFnPtr PinnedAllocator::raw_deleter() const { return &free; }

void PinnedAllocator::copy_data(void* destination, const void* source, size_t num_bytes) const {
  std::memcpy(destination, source, num_bytes);
}

at::HostStats PinnedAllocator::get_stats() {
  std::lock_guard<std::mutex> guard(mutex_);
  return stats_;
}

void PinnedAllocator::reset_accumulated_stats() {
  std::lock_guard<std::mutex> guard(mutex_);
  stats_.allocated_bytes.reset_accumulated();
  stats_.active_bytes.reset_accumulated();
}

void PinnedAllocator::reset_peak_stats() {
  std::lock_guard<std::mutex> guard(mutex_);
  stats_.allocated_bytes.reset_peak();
  stats_.active_bytes.reset_peak();
}

REGISTER_HOST_ALLOCATOR(at::kPrivateUse1, &pinned_allocator())

}  // namespace sim
