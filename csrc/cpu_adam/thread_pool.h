// A persistent pool for one data-parallel task at a time. Not OpenMP: that would bring a second runtime beside
// torch's, and torch's thread count is not ours to share.
#pragma once

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>

namespace offload {

class ThreadPool {
 public:
  using Task = std::function<void()>;

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

  // Runs the task on the calling thread and on up to num_helpers workers at once; returns when all of them have
  // returned. The task shares out its own work, so correctness never depends on how many helpers turn up: a second
  // caller, who finds the pool taken, works alone.
  void Run(int num_helpers, const Task& task) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock() || num_helpers <= 0) return task();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      Grow(num_helpers);
      task_ = &task;
      num_free_seats_ = num_helpers;
    }
    wake_.notify_all();
    task();
    std::unique_lock<std::mutex> lock(mutex_);
    num_free_seats_ = 0;  // a worker that wakes only now stays out: the caller is about to leave
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
      for (; num_workers_ < num_helpers; ++num_workers_) std::thread([this] { Work(); }).detach();
    } catch (const std::system_error&) {
      // No more threads to be had: those that exist, and the caller, do the work.
    }
    pthread_sigmask(SIG_SETMASK, &previous, nullptr);
  }

  void Work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return num_free_seats_ > 0; });
      --num_free_seats_;
      ++num_running_;
      const Task* task = task_;
      lock.unlock();
      (*task)();
      lock.lock();
      if (--num_running_ == 0) idle_.notify_one();
    }
  }

  const pid_t owner_;
  std::mutex turn_;   // held by the caller whose task it is
  std::mutex mutex_;  // guards all below
  std::condition_variable wake_, idle_;
  const Task* task_ = nullptr;
  int num_workers_ = 0;
  int num_free_seats_ = 0;
  int num_running_ = 0;
};

}  // namespace offload
