#include "schedule.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <iterator>

namespace sim {
namespace {

using Busy = std::map<double, double>;

double first_gap_s(const Busy& busy, double ready_s, double seconds) {
  double start_s = ready_s;
  auto next = busy.upper_bound(start_s);
  if (next != busy.begin()) start_s = std::max(start_s, std::prev(next)->second);
  for (; next != busy.end() && next->first < start_s + seconds; ++next) start_s = next->second;
  return start_s;
}

void add_busy(Busy& busy, double start_s, double end_s) {
  auto next = busy.upper_bound(start_s);
  if (next != busy.end() && next->first == end_s) {
    end_s = next->second;
    next = busy.erase(next);
  }
  if (next != busy.begin() && std::prev(next)->second == start_s)
    std::prev(next)->second = end_s;
  else
    busy[start_s] = end_s;
}

}  // namespace

TaskPtr Schedule::add(Task given, const std::vector<Moment>& after, bool is_traced) {
  auto task = std::make_shared<Task>(std::move(given));
  task->order = num_added_++;
  num_unfinished_++;
  for (const Moment& moment : after) {
    if (moment.task && !moment.task->is_done) {
      moment.task->followers.emplace_back(task, moment.offset_s);
      task->num_awaited++;
    } else {
      task->ready_s = std::max(task->ready_s, moment.offset_s + (moment.task ? moment.task->end_s : 0));
    }
  }
  if (is_traced) {
    if (spans_.size() == kMaxSpans) spans_.pop_front();
    spans_.push_back(task);
  }
  if (task->num_awaited == 0) arrive(task);
  if (num_unfinished_ > kMaxUnfinished) run_all();
  return task;
}

Moment Schedule::later(const Moment& a, const Moment& b) {
  if (a.task == b.task) return {a.task, std::max(a.offset_s, b.offset_s)};
  if (!b.task && b.offset_s == 0) return a;
  return {add(Task{}, {a, b}), 0};
}

double Schedule::time_s(const Moment& moment) {
  if (!moment.task) return moment.offset_s;
  while (!moment.task->is_done) step();
  return moment.task->end_s + moment.offset_s;
}

const std::deque<TaskPtr>& Schedule::spans() {
  run_all();
  return spans_;
}

void Schedule::clear() {
  run_all();
  for (auto& [id, engine] : engines_) engine.busy.clear();
  spans_.clear();
  now_s_ = 0;
}

void Schedule::set_duplex_speeds(int device, double h2d_speed, double d2h_speed) {
  EngineState &h2d = engines_[{device, Engine::kH2D}], &d2h = engines_[{device, Engine::kD2H}];
  h2d.opposite = &d2h;
  d2h.opposite = &h2d;
  h2d.duplex_speed = h2d_speed;
  d2h.duplex_speed = d2h_speed;
}

// ---- the clock

void Schedule::run_all() {
  while (num_unfinished_) step();
}

// From one start or end of work to the next.
void Schedule::step() {
  start_all();
  share();
  double next_s = std::numeric_limits<double>::infinity();
  for (const TaskPtr& task : running_) next_s = std::min(next_s, task->end_s);
  for (auto& [id, engine] : engines_)
    if (!engine.is_running && !engine.ready.empty()) next_s = std::min(next_s, engine.ready.begin()->first.first);
  if (next_s == std::numeric_limits<double>::infinity()) return;  // what was ready lay in the past, and is done
  now_s_ = std::max(now_s_, next_s);
  std::vector<TaskPtr> ended;
  auto first_ended =
      std::stable_partition(running_.begin(), running_.end(), [&](auto& task) { return task->end_s > now_s_; });
  ended.assign(first_ended, running_.end());
  running_.erase(first_ended, running_.end());
  for (const TaskPtr& task : ended) finish(task);
}

void Schedule::start_all() {
  for (auto& [id, engine] : engines_) {
    while (!engine.is_running && !engine.ready.empty() && engine.ready.begin()->first.first <= now_s_) {
      const TaskPtr task = engine.ready.begin()->second;
      engine.ready.erase(engine.ready.begin());
      start(task);
    }
  }
}

// Work may come to be known only after the clock has passed the time it was ready at, where another thread asked for a
// later time. It then takes its place in the past, beside what ran there.
void Schedule::start(const TaskPtr& task) {
  const bool is_host = task->engine == Engine::kHost;
  const double ready_s = task->ready_s;
  task->start_s = is_host || ready_s >= now_s_
                      ? ready_s
                      : std::min(now_s_, first_gap_s(engine_of(*task).busy, ready_s, task->seconds));
  task->end_s = task->start_s + task->seconds;
  if (task->end_s <= now_s_) return finish(task);
  if (!is_host) engine_of(*task).is_running = true;
  running_.push_back(task);
}

void Schedule::finish(TaskPtr finished) {
  std::vector<TaskPtr> done{std::move(finished)};
  while (!done.empty()) {
    const TaskPtr task = std::move(done.back());
    done.pop_back();
    task->is_done = true;
    num_unfinished_--;
    if (task->engine != Engine::kHost && task->seconds > 0) {
      EngineState& engine = engine_of(*task);
      add_busy(engine.busy, task->start_s, task->end_s);
      engine.is_running = false;
    }
    for (auto& [follower, offset_s] : std::exchange(task->followers, {})) {
      follower->ready_s = std::max(follower->ready_s, task->end_s + offset_s);
      if (--follower->num_awaited) continue;
      if (follower->seconds > 0) {
        arrive(follower);
      } else {
        follower->start_s = follower->end_s = follower->ready_s;
        done.push_back(follower);
      }
    }
  }
}

void Schedule::arrive(const TaskPtr& task) {
  if (task->seconds > 0) {
    engine_of(*task).ready.emplace(std::pair(task->ready_s, task->order), task);
    return;
  }
  task->start_s = task->end_s = task->ready_s;
  finish(task);
}

// The speed of each piece of running work from now on, and the end that follows from it.
void Schedule::share() {
  double asked_bytes_per_s = 0;
  for (const TaskPtr& task : running_) {
    const EngineState& engine = engine_of(*task);
    task->link_speed = engine.opposite && engine.opposite->is_running ? engine.duplex_speed : 1;
    asked_bytes_per_s += task->link_speed * task->host_bytes_per_s;
  }
  const double squeeze = std::min(1.0, asked_bytes_per_s > 0 ? host_bytes_per_s_ / asked_bytes_per_s : 1.0);
  for (const TaskPtr& task : running_) {
    const double speed = task->host_bytes_per_s > 0 ? task->link_speed * squeeze : task->link_speed;
    if (speed == task->speed) continue;
    const double left_s = task->end_s - std::max(now_s_, task->start_s);
    task->end_s = std::max(now_s_, task->start_s) + left_s * task->speed / speed;
    task->speed = speed;
  }
}

}  // namespace sim
