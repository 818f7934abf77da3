// Shares a range of elements out to threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <memory>

#include "thread_pool.h"

namespace offload {

// The range cut into one contiguous share per seat, and each share into chunks. A thread does the chunks of its own
// share, in order: it streams through memory that it touched first, in the same place every time. Then it helps with
// what is left of the others', so a thread that is late or that the system took away holds nobody up.
class Shares {
 public:
  Shares(size_t numel, size_t chunk_numel, size_t num_shares)
      : numel_(numel), chunk_numel_(chunk_numel), num_shares_(num_shares), cursors_(new Cursor[num_shares]) {
    const size_t num_chunks = NumChunks(numel, chunk_numel);
    for (size_t s = 0; s < num_shares; ++s) {
      cursors_[s].next.store(s * num_chunks / num_shares, std::memory_order_relaxed);
      cursors_[s].end = (s + 1) * num_chunks / num_shares;
    }
  }

  static size_t NumChunks(size_t numel, size_t chunk_numel) { return numel / chunk_numel + (numel % chunk_numel != 0); }

  // Calls update(begin, end) until no chunk is left in any share.
  template <class Update>
  void Work(int seat, const Update& update) {
    for (size_t i = 0; i < num_shares_; ++i) {
      Cursor& share = cursors_[(static_cast<size_t>(seat) + i) % num_shares_];
      for (size_t c; (c = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) {
        const size_t begin = c * chunk_numel_;
        update(begin, begin + std::min(chunk_numel_, numel_ - begin));
      }
    }
  }

 private:
  struct alignas(64) Cursor {  // a cache line each: taking a chunk disturbs nobody else
    std::atomic<size_t> next;
    size_t end;
  };

  const size_t numel_, chunk_numel_, num_shares_;
  const std::unique_ptr<Cursor[]> cursors_;
};

// Calls update(begin, end) for disjoint ranges that make up 0..numel, on at most num_threads threads, the caller
// included. Ranges begin at multiples of chunk_numel (> 0).
template <class Update>
void ForRanges(size_t numel, size_t chunk_numel, int num_threads, const Update& update) {
  const size_t num_chunks = Shares::NumChunks(numel, chunk_numel);
  const size_t num_shares = std::min(static_cast<size_t>(std::max(num_threads, 1)), num_chunks);
  if (num_shares <= 1) return update(size_t{0}, numel);
  Shares shares(numel, chunk_numel, num_shares);
  ThreadPool::OfThisProcess().Run(static_cast<int>(num_shares) - 1, [&](int seat) { shares.Work(seat, update); });
}

}  // namespace offload
