// A persistent pool for one data-parallel task at a time. Not OpenMP: that would bring a second runtime beside
// torch's, and torch's thread count is not ours to share.
#pragma once

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>

#include "affinity.h"

namespace offload {

class ThreadPool {
 public:
  using Task = std::function<void(int seat)>;

  // The pool of this process. Threads don't survive fork(), so a child gets a pool of its own; the parent's object,
  // whose locks may have been held at the fork, is left alone. Never destroyed either: at process exit its workers
  // are asleep, own nothing, and end with the process.
  static ThreadPool& OfThisProcess() {
    static std::atomic<ThreadPool*> current{nullptr};
    ThreadPool* pool = current.load(std::memory_order_acquire);
    while (pool == nullptr || pool->owner_ != getpid()) {
      ThreadPool* fresh = new ThreadPool;
      if (current.compare_exchange_strong(pool, fresh, std::memory_order_acq_rel)) return *fresh;
      delete fresh;  // another thread of the child was first; pool now holds its choice
    }
    return *pool;
  }

  // Runs the task on the calling thread, which has seat 0, and on up to num_helpers workers at once, which have seats 1
  // to num_helpers, always the same worker in the same seat; returns when all of them have returned. The task shares
  // out its own work, so correctness never depends on how many helpers turn up: a second caller, who finds the pool
  // taken, works alone.
  void Run(int num_helpers, const Task& task) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock() || num_helpers <= 0) return task(0);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      Grow(num_helpers);
      task_ = &task;
      num_open_seats_ = num_helpers;
      ++round_;
    }
    wake_.notify_all();
    {
      ThreadAffinity affinity;  // only now: new workers inherit the caller's
      affinity.Follow(0);
      task(0);
    }
    std::unique_lock<std::mutex> lock(mutex_);
    num_open_seats_ = 0;  // a worker that wakes only now stays out: the caller is about to leave
    idle_.wait(lock, [this] { return num_running_ == 0; });
    task_ = nullptr;
  }

 private:
  ThreadPool() : owner_(getpid()) {}
  ~ThreadPool() = default;

  // Signals are blocked in the workers: they belong to the interpreter's threads.
  void Grow(int num_helpers) {
    sigset_t all, previous;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &previous);
    try {
      for (; num_workers_ < num_helpers; ++num_workers_) {
        std::thread([this, seat = num_workers_ + 1] { Work(seat); }).detach();
      }
    } catch (const std::system_error&) {
      // No more threads to be had: those that exist, and the caller, do the work.
    }
    pthread_sigmask(SIG_SETMASK, &previous, nullptr);
  }

  void Work(int seat) {
#if defined(__linux__)
    pthread_setname_np(pthread_self(), "offload-update");
#endif
    ThreadAffinity affinity;
    uint64_t last_round = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return seat <= num_open_seats_ && round_ != last_round; });
      last_round = round_;
      ++num_running_;
      const Task* task = task_;
      lock.unlock();
      affinity.Follow(seat);
      (*task)(seat);
      lock.lock();
      if (--num_running_ == 0) idle_.notify_one();
    }
  }

  const pid_t owner_;
  std::mutex turn_;   // held by the caller whose task it is
  std::mutex mutex_;  // guards all below
  std::condition_variable wake_, idle_;
  const Task* task_ = nullptr;
  uint64_t round_ = 0;  // of tasks: nobody takes the same one twice
  int num_workers_ = 0;
  int num_open_seats_ = 0;
  int num_running_ = 0;
};

}  // namespace offload
