// The order in which enqueued work really runs. Any order that streams and events allow is right; these are the ones
// that show what a program forgot to wait for.
#include <c10/util/Exception.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "memory.h"
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

// ---- kSystematic: all orders, one a run
//
// Wherever more than one thing could happen next - the host goes on, or a stream runs its next operation - one is
// chosen: by the script, then the first. A run leaves what it chose and what else there was, so the caller can write
// the next script. Of orders that differ only in operations that touch different bytes one is enough; sleep sets see to
// that, and persistent sets (Godefroid, Partial-Order Methods for the Verification of Concurrent Systems, 1996): what
// was tried at a choice sleeps in the others until something runs that could tell the difference, and where all that
// can happen before some step is of no concern to it, there is no choice.

namespace {

bool touches_host(const Item& item) {
  return std::any_of(item.accesses.begin(), item.accesses.end(), [](const ByteRange& range) {
    return !device_memory().owns(reinterpret_cast<void*>(range.bytes.begin));
  });
}

bool conflict(const Item& a, const Item& b) {
  for (const ByteRange& mine : a.accesses)
    for (const ByteRange& other : b.accesses)
      if ((mine.is_write || other.is_write) && mine.bytes.overlaps(other.bytes)) return true;
  return false;
}

// The next steps of two streams, or of one and the host (null): the host touches no bytes of the device.
bool conflict(const Stream* a, const Stream* b) {
  if (a && b) return conflict(a->queue.front(), b->queue.front());
  const Stream* stream = a ? a : b;
  return !stream || touches_host(stream->queue.front());
}

}  // namespace

// Until the host goes on: at once if it waits for nothing, otherwise once `awaited` has come to `position`.
void Runtime::explore(const Stream* awaited, uint64_t position) {
  for (;;) {
    run_marks();
    const bool can_host_go_on = !awaited || awaited->num_done >= position;
    std::vector<Stream*> options;
    if (can_host_go_on) options.push_back(nullptr);
    for (Stream* stream : runnable()) options.push_back(stream);
    if (can_host_go_on && !any_queued(nullptr, touches_host))
      options = {nullptr};
    else if (Stream* needed = can_host_go_on ? nullptr : needed_by(*awaited))
      if (!any_queued(needed, [&](const Item& item) { return conflict(needed->queue.front(), item); }))
        options = {needed};
    Stream* chosen = options[choose(options)];
    std::vector<Stream*> still_asleep;
    for (Stream* stream : asleep_)
      if (stream != chosen && !conflict(stream, chosen)) still_asleep.push_back(stream);
    asleep_ = std::move(still_asleep);
    if (!chosen) return;
    run_next(*chosen);
  }
}

// Whether any work that waits in streams other than `except` is such.
bool Runtime::any_queued(const Stream* except, const std::function<bool(const Item&)>& is_such) const {
  return std::any_of(streams_.begin(), streams_.end(), [&](const auto& stream) {
    return stream.get() != except && std::any_of(stream->queue.begin(), stream->queue.end(), is_such);
  });
}

// The stream whose next work `awaited` cannot do without. Events that have been reached are behind it already.
Stream* Runtime::needed_by(const Stream& awaited) {
  const Item* next = &awaited.queue.front();
  int id = awaited.id;
  for (; next->kind == Item::Kind::kWait; next = &stream(id).queue.front()) id = next->event->stream->id;
  return &stream(id);
}

// Events are reached and waited for as soon as can be: that touches no bytes.
void Runtime::run_marks() {
  for (bool has_run = true; has_run;) {
    has_run = false;
    for (Stream* stream : runnable())
      if (stream->queue.front().kind != Item::Kind::kRun) {
        run_next(*stream);
        has_run = true;
      }
  }
}

size_t Runtime::choose(const std::vector<Stream*>& options) {
  auto is_asleep = [&](size_t i) { return std::find(asleep_.begin(), asleep_.end(), options[i]) != asleep_.end(); };
  auto first_awake = [&](size_t from) {
    while (from < options.size() && is_asleep(from)) from++;
    return from;
  };
  const size_t num_made = choices_.size();
  size_t chosen = first_awake(0);
  if (options.size() > 1 && num_made < script_.size()) {
    chosen = std::min(script_[num_made], options.size() - 1);
  } else if (chosen == options.size()) {
    is_in_vain_ = true;
    chosen = 0;
  }
  if (options.size() > 1) {
    const size_t next = is_in_vain_ ? options.size() : first_awake(chosen + 1);
    choices_.push_back({chosen, next < options.size() ? std::optional(next) : std::nullopt});
  }
  for (size_t i = 0; i < chosen; i++)
    if (!is_asleep(i)) asleep_.push_back(options[i]);
  return chosen;
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
    const double end_s = reserve_link(item);
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
double Runtime::reserve_link(const Item& item) {
  if (item.kind != Item::Kind::kRun || item.cost.engine == Engine::kCompute) return 0;
  double& free_s = link_free_s_[item.cost.engine == Engine::kD2H];
  return free_s = std::max(wall_time_s(), free_s) + item.cost.seconds(profile_);
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
