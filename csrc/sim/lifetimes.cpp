// What becomes of device memory between its owners.
//
// As with CUDA's caching allocator, freed memory goes back to the stream it was allocated on at once, and nothing
// touches it until that stream's next owner does. That first use is what must come after all of the last owner's, and
// what finds the memory full of NaN.
#include <cstring>
#include <iterator>
#include <utility>

#include "runtime.h"

namespace sim {

void Runtime::memory_allocated(Stream& stream, uintptr_t begin, uintptr_t end, char* bytes) {
  Lock lock;
  if (poison_ && bytes) recycled_[begin] = {end, bytes};
  if (!races_on_) return;
  stream.clock.join(host().clock);
  detector_.allocate(begin, end, stream.component, stream.clock);
}

void Runtime::memory_let_go(uintptr_t begin) {
  Lock lock;
  recycled_.erase(begin);
}

void Runtime::memory_reusable(Stream& stream, uintptr_t begin, uintptr_t end, const std::vector<EventPtr>& ended) {
  if (!races_on_) return;
  Lock lock;
  VectorClock over = host().clock;
  for (const EventPtr& event : ended) over.join(event->clock);
  detector_.forget(begin, end, over);
  detector_.free(begin, end, stream.component, stream.clock);
}

// In stream order, with the operation that is the first to touch them.
void Runtime::poison_first(Operation& operation) {
  if (recycled_.empty()) return;
  std::vector<std::pair<char*, size_t>> blocks;
  for (const ByteRange& range : operation.accesses) {
    auto after = recycled_.upper_bound(range.bytes.begin);
    if (range.bytes.is_empty() || after == recycled_.begin()) continue;
    const auto block = std::prev(after);
    const auto [end, bytes] = block->second;
    if (range.bytes.begin >= end) continue;
    blocks.emplace_back(bytes, end - block->first);
    recycled_.erase(block);
  }
  if (blocks.empty()) return;
  operation.run = [blocks = std::move(blocks), run = std::move(operation.run)] {
    for (const auto& [bytes, size] : blocks) std::memset(bytes, kNanByte, size);
    run();
  };
}

}  // namespace sim
