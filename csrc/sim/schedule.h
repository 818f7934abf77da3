// The virtual clock: when each piece of work starts and ends, by discrete events.
//
// Work is only noted when it is enqueued. When somebody asks for a time, the clock runs on until it is known: work
// starts once its stream, its engine and all that it waits for are free, and shares what else runs meanwhile - the two
// directions of a link, and the host's memory - so its end may depend on work that is enqueued after it. A host thread
// is a row of tasks too, so times follow from what the program waits for, and not from when its threads really ran.
#pragma once
#include <cstdint>
#include <deque>
#include <limits>
#include <map>
#include <memory>
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
  NameId name = 0;
  int stream = kHostStream;
  int device = 0;
  Engine engine = Engine::kHost;
  double seconds = 0;           // while nothing else runs; none: it only marks a moment
  double host_bytes_per_s = 0;  // of host memory, asked for meanwhile
  double ready_s = 0;           // the latest of what is known of all it waits for
  double start_s = 0, end_s = 0;
  double link_speed = 1, speed = 1;  // as the link's other direction allows, and host memory too; 1 is alone
  int num_awaited = 0;
  uint64_t order = 0;  // of enqueueing
  bool is_done = false;
  std::vector<std::pair<TaskPtr, double>> followers;  // and how long after this task each may start
};

class Schedule {
 public:
  // `task` with its work and `after`, which it waits for.
  TaskPtr add(Task task, const std::vector<Moment>& after, bool is_traced = false);
  Moment later(const Moment& a, const Moment& b);
  double time_s(const Moment& moment);
  // All traced work, in the order of enqueueing.
  const std::deque<TaskPtr>& spans();
  void clear();

  void set_host_bytes_per_s(double host_bytes_per_s) { host_bytes_per_s_ = host_bytes_per_s; }
  // The share of its rate that each direction of a device's link keeps while the other is busy.
  void set_duplex_speeds(int device, double h2d_speed, double d2h_speed);

 private:
  static constexpr size_t kMaxSpans = 1 << 20, kMaxUnfinished = 1 << 16;
  struct EngineState {
    std::map<std::pair<double, uint64_t>, TaskPtr> ready;  // by when it is, and by order
    std::map<double, double> busy;                         // start -> end, disjoint and not touching
    bool is_running = false;
    double duplex_speed = 1;
    EngineState* opposite = nullptr;
  };

  EngineState& engine_of(const Task& task) { return engines_[{task.device, task.engine}]; }
  void step();
  void run_all();
  void start_all();
  void start(const TaskPtr& task);
  void finish(TaskPtr task);
  void arrive(const TaskPtr& task);
  void share();

  std::map<std::pair<int, Engine>, EngineState> engines_;  // by device
  std::vector<TaskPtr> running_;
  std::deque<TaskPtr> spans_;
  size_t num_unfinished_ = 0;
  uint64_t num_added_ = 0;
  double now_s_ = 0;
  double host_bytes_per_s_ = std::numeric_limits<double>::infinity();
};

}  // namespace sim
