// The virtual clock: when each piece of work starts and ends, by discrete events.
//
// Work is only noted when it is enqueued. When somebody asks for a time, the clock runs on until it is known: work
// starts once its stream, its engine and all that it waits for are free, and shares what else runs meanwhile - the two
// directions of a link, and the host's memory - so its end may depend on work that is enqueued after it. A host thread
// is a row of tasks too, so times follow from what the program waits for, and not from when its threads really ran.
//
// [Note: running back]
// The clock may have run past the time at which work that comes to be known only now is ready: a thread asked for a
// time before another thread had enqueued it. All that happened since is then undone, and happens again beside that
// work. So whatever is asked once all is enqueued has one answer, whoever enqueued or asked what first.
#pragma once
#include <cstdint>
#include <deque>
#include <limits>
#include <map>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "clock.h"
#include "names.h"

namespace sim {

struct Task;
using TaskPtr = std::shared_ptr<Task>;

// So long after the end of a task; after the start of all where there is none.
struct Moment {
  TaskPtr task;
  double offset_s = 0;
};

struct Task {
  NameId name = 0;  // none: it is not traced
  int stream = kHostStream;
  uint64_t turn = 0;  // of its stream, among others that want the engine at the same instant
  int device = 0;
  Engine engine = Engine::kHost;
  double seconds = 0;           // while nothing else runs; none: it only marks a moment
  double host_bytes_per_s = 0;  // of host memory, asked for meanwhile
  double num_bytes = 0;         // that are moved
  uint64_t order = 0;           // of enqueueing
  double ready_s = 0, enqueued_s = 0, start_s = 0, end_s = 0;
  double link_speed = 1, speed = 1;  // as the link's other direction allows, and host memory too; 1 is alone
  int num_awaited = 0;               // of `after`, not done
  bool is_done = false;
  std::vector<Moment> after;     // while the schedule remembers it
  std::vector<Task*> followers;  // of which it is one of `after`
};

class Schedule {
 public:
  // `task` with its work, after all of `after`; the last of these is when the host enqueued it.
  TaskPtr add(Task task, const std::vector<Moment>& after);
  Moment later(const Moment& a, const Moment& b);
  double time_s(const Moment& moment);
  // All traced work that is remembered, in the order of enqueueing.
  std::vector<TaskPtr> spans();
  void clear();

  // Rates hold for all that is remembered: to be set before the work.
  void set_host_bytes_per_s(double host_bytes_per_s) { host_bytes_per_s_ = host_bytes_per_s; }
  // The share of its rate that each direction of a device's link keeps while the other is busy.
  void set_duplex_speeds(int device, double h2d_speed, double d2h_speed);

 private:
  static constexpr size_t kMaxRemembered = 1 << 19;
  // First what was ready first, then what was enqueued first; then what no thread's luck decides.
  struct InTurn {
    bool operator()(const Task* a, const Task* b) const;
  };
  using Tasks = std::set<Task*, InTurn>;
  struct EngineState {
    Tasks ready;
    bool is_running = false;
    double duplex_speed = 1;
    EngineState* opposite = nullptr;
  };
  struct Change {
    enum class Kind { kStart, kSpeed, kFinish } kind;
    double time_s;
    Task* task;
    double end_s, speed;  // before
  };

  // Of a task from before the clock was set to 0.
  bool is_past(const Moment& moment) const { return moment.task && moment.task->order < first_order_; }
  bool is_remembered(const Task& task) const { return !tasks_.empty() && task.order >= tasks_.front()->order; }
  EngineState& engine_of(const Task& task) { return engines_[{task.device, task.engine}]; }
  void step();
  void run_all();
  void start_all();
  void start(Task* task);
  void finish(Task* task);
  void pass(Task* task);
  bool become_ready(Task* task);
  void share();
  void note(Change::Kind kind, Task* task) { changes_.push_back({kind, now_s_, task, task->end_s, task->speed}); }
  void run_back(double to_s);
  void undo(const Change& change);
  void forget(size_t num_tasks);

  std::map<std::pair<int, Engine>, EngineState> engines_;  // by device
  std::deque<TaskPtr> tasks_;                              // remembered, in the order of enqueueing
  std::deque<Change> changes_;                             // in the order of time
  Tasks running_;
  size_t num_unfinished_ = 0;
  uint64_t num_added_ = 0, first_order_ = 0;
  double now_s_ = 0;
  double forgotten_s_ = 0;  // the clock does not run back further
  double host_bytes_per_s_ = std::numeric_limits<double>::infinity();
};

}  // namespace sim
