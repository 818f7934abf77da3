// Executor::kSystematic: all orders, one a run.
//
// Wherever more than one thing could happen next - the host goes on, or a stream runs its next operation - one is
// chosen: by the script, then the first. A run leaves what it chose and what else there was, so the caller can write
// the next script. Of orders that differ only in operations that touch different bytes one is enough; sleep sets see to
// that, and persistent sets (Godefroid, Partial-Order Methods for the Verification of Concurrent Systems, 1996): what
// was tried at a choice sleeps in the others until something runs that could tell the difference, and where all that
// can happen before some step is of no concern to it, there is no choice.
#include <algorithm>
#include <utility>

#include "memory.h"
#include "runtime.h"

namespace sim {
namespace {

bool touches_host(const Item& item) {
  return std::any_of(item.accesses.begin(), item.accesses.end(), [](const ByteRange& range) {
    return !range.bytes.is_empty() && !device_of(reinterpret_cast<void*>(range.bytes.begin));
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
void Runtime::explore(Stream* awaited, uint64_t position) {
  for (;;) {
    run_marks();
    const bool can_host_go_on = !awaited || awaited->num_done >= position;
    std::vector<Stream*> options;
    if (can_host_go_on) options.push_back(nullptr);
    for (Stream* stream : runnable()) options.push_back(stream);
    if (can_host_go_on && !any_queued(nullptr, touches_host))
      options = {nullptr};
    else if (Stream* needed = can_host_go_on ? nullptr : needed_by(awaited))
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
Stream* Runtime::needed_by(Stream* awaited) {
  Stream* needed = awaited;
  while (needed->queue.front().kind == Item::Kind::kWait) needed = needed->queue.front().event->stream;
  return needed;
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

}  // namespace sim
