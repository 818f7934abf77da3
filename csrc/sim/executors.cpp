// The order in which enqueued work really runs. Any order that streams and events allow is right; these are the ones
// that show what a program forgot to wait for.
#include <c10/util/Exception.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "runtime.h"

namespace sim {

double wall_time_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

bool Runtime::can_run(const Stream& stream) const {
  if (stream.queue.empty() || stream.is_running) return false;
  const Item& next = stream.queue.front();
  return next.kind != Item::Kind::kWait || next.event->is_done;
}

std::vector<Stream*> Runtime::runnable(const Stream* except) {
  std::vector<Stream*> found;
  for (auto& stream : streams_)
    if (stream.get() != except && can_run(*stream)) found.push_back(stream.get());
  return found;
}

void Runtime::complete(Stream& stream, Item& item) {
  stream.num_done++;
  if (item.kind != Item::Kind::kRecord) return;
  item.event->is_done = true;
  item.event->wall_time_s = wall_time_s();
}

void Runtime::run_next(Stream& stream) {
  Item item = std::move(stream.queue.front());
  stream.queue.pop_front();
  complete(stream, item);  // nobody else looks before the lock is given up
  if (item.kind != Item::Kind::kRun) return;
  try {
    item.run();
  } catch (const std::exception& error) {
    if (executor_ == Executor::kSync) throw;
    if (error_.empty()) error_ = name_of(item.name) + ": " + error.what();
  }
}

// ---- cooperative executors: the thread that waits runs the work

// kLazy (and kSync): only what position `position` of `stream` depends on.
void Runtime::run_needed(Stream& stream, uint64_t position) {
  std::vector<std::pair<Stream*, uint64_t>> goals{{&stream, position}};
  while (!goals.empty()) {
    auto [goal, goal_position] = goals.back();
    if (goal->num_done >= goal_position) {
      goals.pop_back();
    } else if (can_run(*goal)) {
      run_next(*goal);
    } else {
      const Event& awaited = *goal->queue.front().event;
      goals.emplace_back(awaited.stream, awaited.position);
    }
  }
}

// kEager: all other streams as far as they get, then this one.
void Runtime::run_others_first(Stream& stream, uint64_t position) {
  while (stream.num_done < position) {
    auto others = runnable(&stream);
    run_next(others.empty() ? stream : *others.front());
  }
}

void Runtime::run_any_until(Stream& stream, uint64_t position) {
  while (stream.num_done < position) {
    auto streams = runnable();
    run_next(*streams[random_() % streams.size()]);
  }
}

// kRandom: some progress now and then, also while the host only enqueues.
void Runtime::run_random() {
  while (random_() % 2) {
    auto streams = runnable();
    if (streams.empty()) return;
    run_next(*streams[random_() % streams.size()]);
  }
}

void Runtime::wait_until(Stream& stream, uint64_t position) {
  Lock lock;
  switch (executor_) {
    case Executor::kSync:
    case Executor::kLazy:
      run_needed(stream, position);
      break;
    case Executor::kEager:
      run_others_first(stream, position);
      break;
    case Executor::kRandom:
      run_any_until(stream, position);
      break;
    case Executor::kSystematic:
      explore(&stream, position);
      break;
    case Executor::kThreads:
      progress_.wait(lock.lock_, [&] { return stream.num_done >= position; });
  }
  if (error_.empty()) return;
  const std::string error = std::exchange(error_, {});
  TORCH_CHECK(false, "sim: asynchronous error in ", error);
}

// ---- threads: one for each stream that was used, each with its own condition (one for all would wake them all)

void Runtime::start_worker(Stream& stream) {
  if (!stream.worker.joinable()) stream.worker = std::thread([this, &stream] { work(stream); });
}

void Runtime::work(Stream& stream) {
  std::unique_lock<std::recursive_mutex> lock(mutex_);
  for (;;) {
    stream.wake.wait(lock, [&] { return executor_ != Executor::kThreads || can_run(stream); });
    if (executor_ != Executor::kThreads) return;
    Item item = std::move(stream.queue.front());
    stream.queue.pop_front();
    stream.is_running = true;
    const double end_s = reserve_link(stream, item);
    lock.unlock();
    std::string error;
    try {
      if (item.run) item.run();
    } catch (const std::exception& exception) {
      error = name_of(item.name) + ": " + exception.what();
    }
    item.run = nullptr;
    const double left_s = end_s - wall_time_s();
    if (left_s > 0) std::this_thread::sleep_for(std::chrono::duration<double>(left_s));
    lock.lock();
    if (error_.empty()) error_ = error;
    stream.is_running = false;
    complete(stream, item);
    progress_.notify_all();
    if (item.kind == Item::Kind::kRecord)
      for (auto& other : streams_)
        if (!other->queue.empty()) other->wake.notify_one();
  }
}

// When a copy may end, in wall time; 0 for all else. Copies of one direction share a link.
double Runtime::reserve_link(const Stream& stream, const Item& item) {
  if (item.kind != Item::Kind::kRun || item.cost.engine == Engine::kCompute) return 0;
  DeviceState& device = devices_[stream.device];
  double& free_s = device.link_free_s[item.cost.engine == Engine::kD2H];
  return free_s = std::max(wall_time_s(), free_s) + item.cost.seconds(device.profile);
}

void Runtime::stop_workers() {
  ReleaseGil no_gil;
  for (auto& stream : streams_) {
    {
      std::lock_guard<std::recursive_mutex> guard(mutex_);
      if (executor_ == Executor::kThreads) return;
      stream->wake.notify_all();
    }
    if (stream->worker.joinable()) stream->worker.join();
  }
}

}  // namespace sim
