#include "runtime.h"

#include <c10/util/Exception.h>

#include <algorithm>

namespace sim {
namespace {

thread_local std::shared_ptr<HostClock> own_host_of_thread;

}  // namespace

Runtime& Runtime::get() {
  static Runtime* runtime = new Runtime;  // never destroyed: tensors may outlive static objects
  return *runtime;
}

Runtime::Runtime() : shared_host_(std::make_shared<HostClock>(HostClock{num_components_++, {}, 0})) {
  streams_.reserve(kPoolSize + 1);  // never moved: stream() reads without the lock
  add_stream();
}

Stream& Runtime::add_stream() {
  auto stream = std::make_unique<Stream>();
  stream->id = static_cast<int>(streams_.size());
  stream->component = num_components_++;
  streams_.push_back(std::move(stream));
  return *streams_.back();
}

Stream& Runtime::pool_stream() {
  const bool is_shared = [&] {
    Lock lock;
    return num_streams_handed_out_++ >= kPoolSize;
  }();
  if (is_shared)
    warn("more than " + std::to_string(kPoolSize) + " streams: this one is also another, whose work it waits for");
  Lock lock;
  if (streams_.size() <= kPoolSize) return add_stream();
  return *streams_[1 + next_in_pool_++ % kPoolSize];
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
  num_streams_handed_out_ = 0;
  races_on_ = settings.races;
  poison_ = settings.poison;
  detector_.clear();
  timeline_.clear();
  num_operations_ = num_host_waits_ = 0;
  for (auto& stream : streams_) stream->time_s = 0;
  for (auto& clock : own_hosts_) clock->time_s = 0;
  shared_host_->time_s = 0;
}

void Runtime::set_profile(const Profile& profile) {
  Lock lock;
  profile_ = profile;
}

// ---- enqueueing

void Runtime::enqueue(Stream& stream, Operation operation) {
  const NameId site = races_on_ && !operation.is_bookkeeping ? call_site() : 0;  // before the lock: it takes the GIL
  Lock lock;
  charge(stream, operation, site);
  submit(stream, Item{Item::Kind::kRun, operation.name, std::move(operation.run), nullptr, operation.cost,
                      std::move(operation.accesses)});
}

void Runtime::charge(Stream& stream, const Operation& operation, NameId call_site) {
  stream.clock.join(host().clock);
  if (!operation.is_bookkeeping) {
    num_operations_++;
    host().time_s += profile_.launch_s;
    const double ready_s = std::max(stream.time_s, host().time_s), duration_s = operation.cost.seconds(profile_);
    const double start_s = timeline_.schedule(operation.cost.engine, ready_s, duration_s);
    stream.time_s = start_s + duration_s;
    timeline_.add({operation.name, stream.id, operation.cost.engine, start_s, stream.time_s});
  }
  const uint64_t tick = stream.clock.advance(stream.component);
  if (!races_on_) return;
  const Access access{stream.component, tick, stream.id, operation.name, call_site, operation.access_kind};
  detector_.check(access, stream.clock, operation.accesses);
}

EventPtr Runtime::record(Stream& stream) {
  Lock lock;
  auto event = std::make_shared<Event>();
  stream.clock.join(host().clock);
  event->stream = &stream;
  event->position = stream.num_submitted + 1;
  event->time_s = std::max(stream.time_s, host().time_s);
  event->clock = stream.clock;
  submit(stream, Item{Item::Kind::kRecord, 0, nullptr, event, {}, {}});
  return event;
}

void Runtime::wait(Stream& stream, const EventPtr& event) {
  Lock lock;
  stream.time_s = std::max(stream.time_s, event->time_s);
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

void Runtime::join_host(const VectorClock& clock, double time_s) {
  host().clock.join(clock);
  host().time_s = std::max(host().time_s, time_s);
}

void Runtime::synchronize(Stream& stream) {
  EventPtr end = std::make_shared<Event>();
  {
    Lock lock;
    end->stream = &stream;
    end->position = stream.num_submitted;
    end->time_s = stream.time_s;
    end->clock = stream.clock;
  }
  synchronize(end);
}

void Runtime::synchronize(const EventPtr& event) {
  wait_until(*event->stream, event->position);
  Lock lock;
  join_host(event->clock, event->time_s);
}

void Runtime::synchronize() {
  size_t num_streams;
  {
    Lock lock;
    num_streams = streams_.size();
  }
  for (size_t i = 0; i < num_streams; i++) synchronize(stream(static_cast<int>(i)));
}

// A query makes a step of progress: a loop that polls would otherwise never end where nothing runs by itself.
bool Runtime::query(Stream& stream) {
  Lock lock;
  const bool is_cooperative = executor_ != Executor::kThreads;
  asleep_.clear();  // what runs below was not chosen
  if (stream.num_done < stream.num_submitted && is_cooperative) run_needed(stream, stream.num_done + 1);
  if (stream.num_done < stream.num_submitted) return false;
  join_host(stream.clock, stream.time_s);
  return true;
}

bool Runtime::query(const EventPtr& event) {
  Lock lock;
  asleep_.clear();
  if (!event->is_done && executor_ != Executor::kThreads) run_needed(*event->stream, event->stream->num_done + 1);
  if (event->is_done) join_host(event->clock, event->time_s);
  return event->is_done;
}

double Runtime::elapsed_s(const Event& from, const Event& to) {
  Lock lock;
  return executor_ == Executor::kThreads ? to.wall_time_s - from.wall_time_s : to.time_s - from.time_s;
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
  detector_.check({host.component, tick, kHostStream, intern(name), site}, host.clock, {range});
}

void Runtime::host_charge(double seconds, const std::string& name) {
  Lock lock;
  double& time_s = host().time_s;
  timeline_.add({intern(name), kHostStream, Engine::kHost, time_s, time_s + seconds});
  time_s += seconds;
}

double Runtime::host_time_s() {
  Lock lock;
  return host().time_s;
}

// A clock whose thread has ended serves the next one: components stay few, and what was known of them stays true.
void Runtime::own_host_clock() {
  Lock lock;
  if (own_host_of_thread) return;
  auto unused =
      std::find_if(own_hosts_.begin(), own_hosts_.end(), [](const auto& clock) { return clock.use_count() == 1; });
  if (unused == own_hosts_.end())
    unused = own_hosts_.insert(unused, std::make_shared<HostClock>(HostClock{num_components_++, {}, 0}));
  (*unused)->clock.join(shared_host_->clock);
  (*unused)->time_s = shared_host_->time_s;
  own_host_of_thread = *unused;
}

HostMark Runtime::host_mark() {
  Lock lock;
  return {host().clock, host().time_s};
}

void Runtime::host_join(const HostMark& mark) {
  Lock lock;
  join_host(mark.clock, mark.time_s);
}

void Runtime::forget_accesses(uintptr_t begin, uintptr_t end) {
  Lock lock;
  detector_.forget(begin, end);
}

void Runtime::mark_fresh(uintptr_t begin, uintptr_t end) {
  if (!races_on_) return;
  Lock lock;
  detector_.mark_fresh(begin, end);
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

std::vector<Span> Runtime::spans() {
  Lock lock;
  return {timeline_.spans().begin(), timeline_.spans().end()};
}

}  // namespace sim
