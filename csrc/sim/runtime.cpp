#include "runtime.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <utility>

namespace sim {
namespace {

thread_local std::shared_ptr<HostClock> own_host_of_thread;

}  // namespace

Runtime& Runtime::get() {
  static Runtime* runtime = new Runtime;  // never destroyed: tensors may outlive static objects
  return *runtime;
}

Runtime::Runtime() : shared_host_(std::make_shared<HostClock>(HostClock{num_components_++, {}, {}})) {
  for (int device = 0; device < kNumDevices; device++) {
    devices_[device].streams.reserve(kPoolSize + 1);  // never moved: stream() reads without the lock
    add_stream(device);
  }
}

Stream& Runtime::add_stream(int device) {
  auto& streams = devices_[device].streams;
  auto stream = std::make_unique<Stream>();
  stream->device = device;
  stream->id = static_cast<int>(streams.size());
  stream->component = num_components_++;
  streams.push_back(stream.get());
  streams_.push_back(std::move(stream));
  return *streams.back();
}

Stream& Runtime::pool_stream(int device) {
  DeviceState& state = devices_.at(device);
  const bool is_shared = [&] {
    Lock lock;
    return state.num_handed_out++ >= kPoolSize;
  }();
  if (is_shared)
    warn("more than " + std::to_string(kPoolSize) + " streams: this one is also another, whose work it waits for");
  Lock lock;
  const size_t id = 1 + state.next_in_pool++ % kPoolSize;
  Stream& stream = id == state.streams.size() ? add_stream(device) : *state.streams[id];
  stream.turn = ++num_turns_;
  return stream;
}

void Runtime::configure(const Settings& settings) {
  synchronize();
  {
    Lock lock;
    executor_ = settings.executor;
  }
  stop_workers();
  Lock lock;
  random_.seed(settings.seed);
  script_ = settings.script;
  choices_.clear();
  asleep_.clear();
  is_in_vain_ = false;
  warnings_.clear();
  warned_.clear();
  for (DeviceState& device : devices_) {
    device.num_handed_out = 0;
    if (executor_ == Executor::kSystematic) device.next_in_pool = 0;  // the program gets the same streams each time
  }
  races_on_ = settings.races;
  poison_ = settings.poison;
  detector_.clear();
  recycled_.clear();
  schedule_.clear();
  num_operations_ = num_host_waits_ = 0;
  for (auto& stream : streams_) {
    stream->last = nullptr;
    stream->waits.clear();
  }
  for (auto& clock : own_hosts_) clock->now = {};
  shared_host_->now = {};
}

void Runtime::set_profile(int device, const Profile& profile) {
  Lock lock;
  devices_.at(device).profile = profile;
  schedule_.set_duplex_speeds(device, std::min(1.0, profile.both_bytes_per_s / profile.h2d_bytes_per_s),
                              std::min(1.0, profile.both_bytes_per_s / profile.d2h_bytes_per_s));
}

void Runtime::set_host_memory(double bytes_per_s) {
  Lock lock;
  schedule_.set_host_bytes_per_s(bytes_per_s);
}

// ---- enqueueing

void Runtime::enqueue(Stream& stream, Operation operation) {
  const NameId site = races_on_ && !operation.is_bookkeeping ? call_site() : 0;  // before the lock: it takes the GIL
  Lock lock;
  charge(stream, operation, site);
  if (poison_) poison_first(operation);
  submit(stream, Item{Item::Kind::kRun, operation.name, std::move(operation.run), nullptr, operation.cost,
                      std::move(operation.accesses)});
}

void Runtime::charge(Stream& stream, const Operation& operation, NameId call_site) {
  stream.clock.join(host().clock);
  if (!operation.is_bookkeeping) {
    num_operations_++;
    const Profile& profile = devices_[stream.device].profile;
    host().now.offset_s += profile.launch_s;
    Task task;
    task.name = operation.name;
    task.stream = stream.id;
    task.turn = stream.turn;
    task.device = stream.device;
    task.engine = operation.cost.engine;
    task.seconds = operation.cost.seconds(profile);
    task.num_bytes = operation.cost.num_bytes;
    if (task.seconds > 0) task.host_bytes_per_s = operation.cost.host_bytes(profile) / task.seconds;
    add_task(stream, std::move(task));
  }
  const uint64_t tick = stream.clock.advance(stream.component);
  if (!races_on_) return;
  const Access access{stream.component, tick,      stream.device,        stream.id,
                      operation.name,   call_site, operation.access_kind};
  detector_.check(access, stream.clock, operation.accesses);
}

// Behind what the stream holds and waits for, and not before the host has enqueued it.
void Runtime::add_task(Stream& stream, Task task) {
  std::vector<Moment> after = std::exchange(stream.waits, {});
  after.push_back({stream.last, 0});
  after.push_back(host().now);
  stream.last = schedule_.add(std::move(task), after);
}

EventPtr Runtime::record(Stream& stream) {
  Lock lock;
  auto event = std::make_shared<Event>();
  stream.clock.join(host().clock);
  event->stream = &stream;
  event->position = stream.num_submitted + 1;
  add_task(stream, Task{});
  event->task = stream.last;
  event->clock = stream.clock;
  submit(stream, Item{Item::Kind::kRecord, 0, nullptr, event, {}, {}});
  return event;
}

void Runtime::wait(Stream& stream, const EventPtr& event) {
  Lock lock;
  stream.waits.push_back({event->task, 0});
  stream.clock.join(event->clock);
  submit(stream, Item{Item::Kind::kWait, 0, nullptr, event, {}, {}});
}

void Runtime::submit(Stream& stream, Item item) {
  const bool is_work = item.kind == Item::Kind::kRun;
  stream.queue.push_back(std::move(item));
  stream.num_submitted++;
  if (executor_ == Executor::kSync) {
    run_needed(stream, stream.num_submitted);
  } else if (executor_ == Executor::kThreads) {
    start_worker(stream);
    stream.wake.notify_one();
  } else if (executor_ == Executor::kRandom) {
    run_random();
  } else if (executor_ == Executor::kSystematic && is_work) {
    explore(nullptr, 0);
  }
}

// ---- the host waits

void Runtime::join_host(const VectorClock& clock, const Moment& moment) {
  host().clock.join(clock);
  host().now = schedule_.later(host().now, moment);
}

void Runtime::synchronize(Stream& stream) {
  EventPtr end = std::make_shared<Event>();
  {
    Lock lock;
    end->stream = &stream;
    end->position = stream.num_submitted;
    if (!stream.waits.empty()) add_task(stream, Task{});
    end->task = stream.last;
    end->clock = stream.clock;
  }
  synchronize(end);
}

void Runtime::synchronize(const EventPtr& event) {
  wait_until(*event->stream, event->position);
  Lock lock;
  join_host(event->clock, {event->task, 0});
}

void Runtime::synchronize(int device) {
  size_t num_streams;
  {
    Lock lock;
    num_streams = devices_.at(device).streams.size();
  }
  for (size_t i = 0; i < num_streams; i++) synchronize(stream(device, static_cast<int>(i)));
}

void Runtime::synchronize() {
  for (int device = 0; device < kNumDevices; device++) synchronize(device);
}

// A query makes a step of progress: a loop that polls would otherwise never end where nothing runs by itself.
bool Runtime::query(Stream& stream) {
  Lock lock;
  const bool is_cooperative = executor_ != Executor::kThreads;
  asleep_.clear();  // what runs below was not chosen
  if (stream.num_done < stream.num_submitted && is_cooperative) run_needed(stream, stream.num_done + 1);
  if (stream.num_done < stream.num_submitted) return false;
  if (!stream.waits.empty()) add_task(stream, Task{});
  join_host(stream.clock, {stream.last, 0});
  return true;
}

bool Runtime::query(const EventPtr& event) {
  Lock lock;
  asleep_.clear();
  if (!event->is_done && executor_ != Executor::kThreads) run_needed(*event->stream, event->stream->num_done + 1);
  if (event->is_done) join_host(event->clock, {event->task, 0});
  return event->is_done;
}

double Runtime::elapsed_s(const Event& from, const Event& to) {
  Lock lock;
  if (executor_ == Executor::kThreads) return to.wall_time_s - from.wall_time_s;
  return schedule_.time_s({to.task, 0}) - schedule_.time_s({from.task, 0});
}

// ---- what the host does beside the device

HostClock& Runtime::host() { return own_host_of_thread ? *own_host_of_thread : *shared_host_; }

void Runtime::host_access(const ByteRange& range, const std::string& name) {
  if (!races_on_) return;
  const NameId site = call_site();
  Lock lock;
  if (executor_ == Executor::kSystematic) explore(nullptr, 0);
  HostClock& host = this->host();
  const uint64_t tick = host.clock.advance(host.component);
  detector_.check({host.component, tick, 0, kHostStream, intern(name), site}, host.clock, {range});
}

void Runtime::host_charge(double seconds, double num_bytes, const std::string& name) {
  Lock lock;
  Task task;
  task.name = intern(name);
  task.seconds = seconds;
  task.num_bytes = num_bytes;
  if (seconds > 0) task.host_bytes_per_s = num_bytes / seconds;
  host().now = {schedule_.add(std::move(task), {host().now}), 0};
}

double Runtime::host_time_s() {
  Lock lock;
  return schedule_.time_s(host().now);
}

double Runtime::time_s(const HostMark& mark) {
  Lock lock;
  return schedule_.time_s(mark.moment);
}

HostMark Runtime::host_stamp() {
  Lock lock;
  return {{}, executor_ == Executor::kThreads ? Moment{nullptr, wall_time_s()} : host().now};
}

// A clock whose thread has ended serves the next one: components stay few, and what was known of them stays true.
void Runtime::own_host_clock() {
  Lock lock;
  if (own_host_of_thread) return;
  auto unused =
      std::find_if(own_hosts_.begin(), own_hosts_.end(), [](const auto& clock) { return clock.use_count() == 1; });
  if (unused == own_hosts_.end())
    unused = own_hosts_.insert(unused, std::make_shared<HostClock>(HostClock{num_components_++, {}, {}}));
  (*unused)->clock.join(shared_host_->clock);
  (*unused)->now = {};  // not the time of a clock that runs on while this thread starts: joining a mark says when it is
  own_host_of_thread = *unused;
}

HostMark Runtime::host_mark() {
  Lock lock;
  return {host().clock, host().now};
}

void Runtime::host_join(const HostMark& mark) {
  Lock lock;
  join_host(mark.clock, mark.moment);
}

uint64_t Runtime::last_write(const Footprint& bytes) {
  Lock lock;
  return detector_.last_write(bytes);
}

void Runtime::count_host_wait(const char* reason) {
  num_host_waits_++;
  check_may_wait(reason);
}

void Runtime::check_may_wait(const char* reason) {
  TORCH_CHECK(num_forbidding_ == 0 || own_host_of_thread, "sim: ", reason,
              " makes the host wait, inside sim.forbid_sync()");
}

void Runtime::warn(const std::string& text) {
  const NameId site = call_site();
  const std::string warning = site ? text + " (" + name_of(site) + ")" : text;
  Lock lock;
  if (warned_.insert(warning).second) warnings_.push_back(warning);
}

std::vector<std::string> Runtime::warnings() {
  Lock lock;
  return warnings_;
}

void Runtime::report(const std::string& text) {
  const NameId site = call_site();
  Lock lock;
  detector_.add_report(site ? text + " (" + name_of(site) + ")" : text);
}

std::vector<std::string> Runtime::races() {
  Lock lock;
  return detector_.reports();
}

void Runtime::clear_races() {
  Lock lock;
  detector_.clear_reports();
}

std::vector<TaskPtr> Runtime::spans() {
  Lock lock;
  return schedule_.spans();
}

}  // namespace sim
