#include "schedule.h"

#include <algorithm>
#include <iterator>
#include <tuple>

namespace sim {

bool Schedule::InTurn::operator()(const Task* a, const Task* b) const {
  const auto turn = [](const Task& task) {
    return std::tie(task.ready_s, task.enqueued_s, task.turn, task.seconds, task.order);
  };
  return turn(*a) < turn(*b);
}

TaskPtr Schedule::add(Task given, const std::vector<Moment>& after) {
  if (tasks_.size() == kMaxRemembered) forget(kMaxRemembered / 4);
  auto task = std::make_shared<Task>(std::move(given));
  task->order = num_added_++;
  tasks_.push_back(task);
  num_unfinished_++;
  for (const Moment& moment : after) {
    if (is_past(moment)) continue;
    task->after.push_back(moment);
    if (!moment.task || !is_remembered(*moment.task)) continue;
    moment.task->followers.push_back(task.get());
    if (!moment.task->is_done) task->num_awaited++;
  }
  if (task->num_awaited == 0) {
    if (become_ready(task.get()))
      pass(task.get());
    else
      run_back(task->ready_s);
  }
  return task;
}

Moment Schedule::later(const Moment& a, const Moment& b) {
  if (a.task == b.task) return {a.task, std::max(a.offset_s, b.offset_s)};
  if (!b.task && b.offset_s == 0) return a;
  return {add(Task{}, {a, b}), 0};
}

double Schedule::time_s(const Moment& moment) {
  if (is_past(moment)) return 0;
  if (!moment.task) return moment.offset_s;
  while (!moment.task->is_done) step();
  return moment.task->end_s + moment.offset_s;
}

std::vector<TaskPtr> Schedule::spans() {
  run_all();
  std::vector<TaskPtr> traced;
  std::copy_if(tasks_.begin(), tasks_.end(), std::back_inserter(traced), [](auto& task) { return task->name != 0; });
  return traced;
}

void Schedule::clear() {
  forget(tasks_.size());
  now_s_ = forgotten_s_ = 0;
  first_order_ = num_added_;
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
  for (const Task* task : running_) next_s = std::min(next_s, task->end_s);
  for (auto& [id, engine] : engines_)
    if (!engine.is_running && !engine.ready.empty()) next_s = std::min(next_s, (*engine.ready.begin())->ready_s);
  now_s_ = next_s;
  std::vector<Task*> ended;
  std::copy_if(running_.begin(), running_.end(), std::back_inserter(ended),
               [&](const Task* task) { return task->end_s <= now_s_; });
  for (Task* task : ended) finish(task);
}

void Schedule::start_all() {
  for (auto& [id, engine] : engines_)
    while (!engine.is_running && !engine.ready.empty() && (*engine.ready.begin())->ready_s <= now_s_)
      start(engine.ready.extract(engine.ready.begin()).value());
}

void Schedule::start(Task* task) {
  note(Change::Kind::kStart, task);
  task->start_s = now_s_;
  task->end_s = now_s_ + task->seconds;
  task->speed = 1;
  engine_of(*task).is_running = task->engine != Engine::kHost;
  running_.insert(task);
}

void Schedule::finish(Task* task) {
  note(Change::Kind::kFinish, task);
  running_.erase(task);
  engine_of(*task).is_running = false;
  pass(task);
}

// It is done, and with it all that only marked a moment after it.
void Schedule::pass(Task* first) {
  std::vector<Task*> done{first};
  while (!done.empty()) {
    Task* task = done.back();
    done.pop_back();
    task->is_done = true;
    num_unfinished_--;
    for (Task* follower : task->followers)
      if (--follower->num_awaited == 0 && become_ready(follower)) done.push_back(follower);
  }
}

// All that it waits for is done. True if it is done too, since it only marks a moment: work waits for its turn.
bool Schedule::become_ready(Task* task) {
  task->ready_s = task->enqueued_s = 0;
  for (const Moment& moment : task->after) {
    task->enqueued_s = moment.offset_s + (moment.task ? moment.task->end_s : 0);
    task->ready_s = std::max(task->ready_s, task->enqueued_s);
  }
  if (task->seconds > 0)
    engine_of(*task).ready.insert(task);
  else
    task->start_s = task->end_s = task->ready_s;
  return task->seconds == 0;
}

// The speed of each piece of running work from now on, and the end that follows from it.
void Schedule::share() {
  double asked_bytes_per_s = 0;
  for (Task* task : running_) {
    const EngineState& engine = engine_of(*task);
    task->link_speed = engine.opposite && engine.opposite->is_running ? engine.duplex_speed : 1;
    asked_bytes_per_s += task->link_speed * task->host_bytes_per_s;
  }
  const double squeeze = std::min(1.0, asked_bytes_per_s > 0 ? host_bytes_per_s_ / asked_bytes_per_s : 1.0);
  for (Task* task : running_) {
    const double speed = task->host_bytes_per_s > 0 ? task->link_speed * squeeze : task->link_speed;
    if (speed == task->speed) continue;
    note(Change::Kind::kSpeed, task);
    task->end_s = now_s_ + (task->end_s - now_s_) * task->speed / speed;
    task->speed = speed;
  }
}

// ---- what was, again

// Before all that happened at `to_s` or later; see [Note: running back].
void Schedule::run_back(double to_s) {
  while (!changes_.empty() && changes_.back().time_s >= to_s) {
    undo(changes_.back());
    changes_.pop_back();
  }
  now_s_ = changes_.empty() ? forgotten_s_ : changes_.back().time_s;
}

void Schedule::undo(const Change& change) {
  Task* task = change.task;
  EngineState& engine = engine_of(*task);
  task->end_s = change.end_s;
  task->speed = change.speed;
  if (change.kind == Change::Kind::kStart) {
    running_.erase(task);
    engine.is_running = false;
    engine.ready.insert(task);
  } else if (change.kind == Change::Kind::kFinish) {
    engine.is_running = task->engine != Engine::kHost;
    running_.insert(task);
    std::vector<Task*> undone{task};
    while (!undone.empty()) {
      Task* awaited = undone.back();
      undone.pop_back();
      awaited->is_done = false;
      num_unfinished_++;
      for (Task* follower : awaited->followers) {
        if (follower->num_awaited++) continue;
        if (follower->seconds > 0)
          engine_of(*follower).ready.erase(follower);
        else
          undone.push_back(follower);
      }
    }
  }
}

// The oldest tasks: they stay as they are, and work that would have run beside them waits until they are over.
void Schedule::forget(size_t num_tasks) {
  run_all();
  for (; num_tasks; num_tasks--) {
    Task& oldest = *tasks_.front();
    if (oldest.seconds > 0) forgotten_s_ = std::max(forgotten_s_, oldest.end_s);
    oldest.after.clear();
    oldest.followers.clear();
    tasks_.pop_front();
  }
  while (!changes_.empty() && changes_.front().time_s <= forgotten_s_) changes_.pop_front();
}

}  // namespace sim
