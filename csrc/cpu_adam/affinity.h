// Which processor each thread of an update runs on, if the user chose any.
#pragma once

#include <atomic>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

namespace offload {

using CpuList = std::vector<int>;

// Seat s of an update runs on entry s modulo the length; null: wherever the system puts it. Each choice is a list of
// its own that is never changed nor freed, since a worker may still read it: fork() and races are harmless, and a
// process chooses only a few times.
inline std::atomic<const CpuList*>& ChosenCpus() {
  static std::atomic<const CpuList*> chosen{nullptr};
  return chosen;
}

// Keeps the calling thread where its seat belongs, from Follow() until the object dies; then the thread may run where
// it could before. A processor that is gone meanwhile (a shrunk cpuset) leaves the thread unbound, which is only
// slower.
class ThreadAffinity {
 public:
  ThreadAffinity() = default;
  ThreadAffinity(const ThreadAffinity&) = delete;
  ThreadAffinity& operator=(const ThreadAffinity&) = delete;
#if defined(__linux__)
  ~ThreadAffinity() { Apply(nullptr, 0); }

  void Follow(int seat) { Apply(ChosenCpus().load(std::memory_order_acquire), seat); }

 private:
  void Apply(const CpuList* cpus, int seat) {
    if (cpus == applied_) return;
    if (applied_ == nullptr && sched_getaffinity(0, sizeof(original_), &original_) != 0) return;
    cpu_set_t wanted = original_;
    if (cpus != nullptr) {
      CPU_ZERO(&wanted);
      CPU_SET((*cpus)[static_cast<size_t>(seat) % cpus->size()], &wanted);
    }
    sched_setaffinity(0, sizeof(wanted), &wanted);
    applied_ = cpus;
  }

  cpu_set_t original_;
  const CpuList* applied_ = nullptr;
#else
  void Follow(int) {}
#endif
};

}  // namespace offload
