#include "races.h"

#include <algorithm>
#include <iterator>

#include "memory.h"

namespace sim {
namespace {

std::string describe(const Access& access, const char* verb) {
  std::string text = name_of(access.name) + " " + verb;
  text += access.stream == kHostStream ? " on the host" : " on stream " + std::to_string(access.stream);
  if (access.call_site) text += " (" + name_of(access.call_site) + ")";
  return text;
}

}  // namespace

void RaceDetector::check(const Access& access, const VectorClock& clock, const ByteRange& range) {
  if (range.begin >= range.end) return;
  split(range.begin);
  split(range.end);
  auto is_unordered = [&](const Access& earlier) { return !clock.knows(earlier.component, earlier.tick); };
  const auto first = segments_.lower_bound(range.begin), last = segments_.lower_bound(range.end);
  for (auto it = first; it != last; ++it) {
    const ByteRange shared{it->first, it->second.end, range.is_write};
    if (it->second.write && is_unordered(*it->second.write))
      report(access, range.is_write, *it->second.write, true, shared);
    if (!range.is_write) continue;
    for (const Access& earlier : it->second.reads)
      if (is_unordered(earlier)) report(access, true, earlier, false, shared);
  }
  if (range.is_write) {
    segments_.erase(first, last);
    segments_[range.begin] = Segment{range.end, access, {}};
  } else {
    read(access, range);
  }
}

void RaceDetector::read(const Access& access, const ByteRange& range) {
  uintptr_t at = range.begin;
  for (auto it = segments_.lower_bound(at); at < range.end; ++it) {
    const uintptr_t next = it == segments_.end() ? range.end : std::min(it->first, range.end);
    if (at < next) it = segments_.insert(it, {at, Segment{next, std::nullopt, {}}});
    at = it->second.end;
    const std::optional<Access>& write = it->second.write;
    if (write && write->component == access.component && write->tick == access.tick) continue;  // the write says it
    auto& reads = it->second.reads;
    auto own = std::find_if(reads.begin(), reads.end(), [&](auto& r) { return r.component == access.component; });
    if (own == reads.end())
      reads.push_back(access);
    else
      *own = access;
  }
}

// Make `at` a boundary between segments.
void RaceDetector::split(uintptr_t at) {
  auto next = segments_.lower_bound(at);
  if (next == segments_.begin()) return;
  auto before = std::prev(next);
  if (before->second.end <= at) return;
  Segment tail = before->second;
  before->second.end = at;
  segments_.insert(next, {at, std::move(tail)});
}

void RaceDetector::report(const Access& access, bool is_write, const Access& earlier, bool earlier_is_write,
                          const ByteRange& range) {
  const bool is_device = device_memory().owns(reinterpret_cast<void*>(range.begin));
  std::string text = describe(access, is_write ? "writes" : "reads") + ", unordered after " +
                     describe(earlier, earlier_is_write ? "writes" : "reads");
  // Told once, not again for each piece of memory and each iteration.
  if (reports_.size() == kMaxReports || !reported_.insert(text).second) return;
  const uintptr_t offset = is_device ? device_memory().offset(reinterpret_cast<void*>(range.begin)) : range.begin;
  reports_.push_back(text + ": " + std::to_string(range.end - range.begin) + " bytes of " +
                     (is_device ? "device" : "host") + " memory at " + std::to_string(offset));
}

void RaceDetector::forget(uintptr_t begin, uintptr_t end) {
  if (begin >= end) return;
  split(begin);
  split(end);
  segments_.erase(segments_.lower_bound(begin), segments_.lower_bound(end));
}

void RaceDetector::clear_reports() {
  reports_.clear();
  reported_.clear();
}

void RaceDetector::clear() {
  clear_reports();
  segments_.clear();
}

}  // namespace sim
