#include "races.h"

#include <algorithm>
#include <iterator>

#include "memory.h"

namespace sim {
namespace {

std::string place_of(const Access& access) {
  std::string text = access.stream == kHostStream ? " on the host" : " on stream " + std::to_string(access.stream);
  if (access.device) text += " of sim:" + std::to_string(access.device);
  if (access.call_site) text += " (" + name_of(access.call_site) + ")";
  return text;
}

std::string describe(const Access& access, bool is_write) {
  return name_of(access.name) + (is_write ? " writes" : " reads") + place_of(access);
}

std::string describe(const Footprint& bytes) {
  const std::string gaps = bytes.strides ? " with gaps" : "";
  const std::string text = std::to_string(bytes.end - bytes.begin) + " bytes" + gaps + " of ";
  if (auto device = device_of(reinterpret_cast<void*>(bytes.begin)))
    return text + "device memory, " + device_memory(*device).describe(bytes.begin, bytes.end);
  return text + "host memory at " + std::to_string(bytes.begin);
}

}  // namespace

void RaceDetector::check(const Access& access, const VectorClock& clock, const std::vector<ByteRange>& ranges) {
  if (access.kind == Access::Kind::kUse || access.kind == Access::Kind::kDownload)
    for (const ByteRange& range : ranges)
      if (!range.is_write) check_fresh(access, range);
  for (const bool is_write : {true, false})  // bytes that are read and written are reported as written
    for (const ByteRange& range : ranges)
      if (range.is_write == is_write && !range.bytes.is_empty()) check_one(access, clock, range);
}

void RaceDetector::check_one(const Access& access, const VectorClock& clock, const ByteRange& range) {
  const Footprint& bytes = range.bytes;
  split(bytes.begin);
  split(bytes.end);
  const auto first = segments_.lower_bound(bytes.begin), last = segments_.lower_bound(bytes.end);
  for (auto it = first; it != last; ++it) {
    const Segment& segment = it->second;
    const Footprint shared{it->first, segment.end, bytes.strides};
    auto compare = [&](const Past& earlier, bool is_write) {
      if (clock.knows(earlier.access.component, earlier.access.tick) || !earlier.bytes.overlaps(bytes)) return;
      add_report(describe(access, range.is_write) + ", unordered after " + describe(earlier.access, is_write), shared);
    };
    if (segment.write) compare(*segment.write, true);
    for (const Past& earlier : segment.strided_writes) compare(earlier, true);
    if (!range.is_write) continue;
    for (const Past& earlier : segment.reads) compare(earlier, false);
    for (const Use& earlier : segment.former)
      if (!clock.knows(earlier.access.component, earlier.access.tick))
        add_report(describe(access, true) + " memory just allocated, unordered after " +
                       describe(earlier.access, earlier.is_write) +
                       ", and was freed: record_stream is missing, or a wait for that stream",
                   shared);
  }
  range.is_write ? write(access, bytes) : read(access, bytes);
}

void RaceDetector::check_fresh(const Access& access, const ByteRange& range) {
  bool is_any_fresh = false, is_all_fresh = true;
  for (auto it = first_touching(range.bytes.begin); it != segments_.end() && it->first < range.bytes.end; ++it) {
    if (!range.bytes.overlaps({it->first, it->second.end, nullptr})) continue;
    is_any_fresh |= it->second.is_fresh;
    is_all_fresh &= it->second.is_fresh;
  }
  if (access.kind == Access::Kind::kDownload ? is_any_fresh && is_all_fresh : is_any_fresh)
    add_report(describe(access, false) + " what nothing has written since it was allocated", range.bytes);
}

RaceDetector::Segments::const_iterator RaceDetector::first_touching(uintptr_t begin) const {
  auto next = segments_.upper_bound(begin);
  if (next == segments_.begin()) return next;
  auto before = std::prev(next);
  return before->second.end > begin ? before : next;
}

// Visits the segments of [begin, end), made where there are none; the bounds are bounds of segments already.
template <class F>
void RaceDetector::for_each_segment(uintptr_t begin, uintptr_t end, F visit) {
  uintptr_t at = begin;
  for (auto it = segments_.lower_bound(at); at < end; ++it) {
    const uintptr_t next = it == segments_.end() ? end : std::min(it->first, end);
    if (at < next) it = segments_.insert(it, {at, Segment{next}});
    at = it->second.end;
    visit(it->second);
  }
}

void RaceDetector::write(const Access& access, const Footprint& bytes) {
  num_writes_++;
  if (!bytes.strides) {
    segments_.erase(segments_.lower_bound(bytes.begin), segments_.lower_bound(bytes.end));
    segments_[bytes.begin] = Segment{bytes.end, Past{access, bytes}, {}, {}, {}, false, num_writes_};
    return;
  }
  for_each_segment(bytes.begin, bytes.end, [&](Segment& segment) {
    auto& writes = segment.strided_writes;
    auto own = std::find_if(writes.begin(), writes.end(), [&](const Past& past) {
      return past.access.component == access.component && past.bytes.is_same(bytes);
    });
    if (own != writes.end())
      own->access = access;
    else
      writes.push_back({access, bytes});
    if (writes.size() > kMaxStrided) writes.erase(writes.begin());
    segment.is_fresh = false;  // as far as is known: the gaps may still be
    segment.num_writes = num_writes_;
  });
}

void RaceDetector::read(const Access& access, const Footprint& bytes) {
  for_each_segment(bytes.begin, bytes.end, [&](Segment& segment) {
    auto is_this_operation = [&](const Past& past) {
      return past.access.component == access.component && past.access.tick == access.tick;
    };
    if (segment.write && is_this_operation(*segment.write)) return;  // the write says it
    auto& reads = segment.reads;
    auto own = std::find_if(reads.begin(), reads.end(), [&](const Past& past) {
      return past.access.component == access.component && (!bytes.strides || past.bytes.is_same(bytes));
    });
    if (own != reads.end())
      *own = {access, bytes};
    else
      reads.push_back({access, bytes});
    if (reads.size() > kMaxStrided) reads.erase(reads.begin());
  });
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

void RaceDetector::add_report(const std::string& text, const Footprint& bytes) {
  if (reports_.size() < kMaxReports && reported_.insert(text).second) reports_.push_back(text + ": " + describe(bytes));
}

void RaceDetector::add_report(const std::string& text) {
  if (reports_.size() < kMaxReports && reported_.insert(text).second) reports_.push_back(text);
}

std::vector<RaceDetector::Use> RaceDetector::uses_of(const Segment& segment) {
  std::vector<Use> uses = segment.former;
  if (segment.write) uses.push_back({segment.write->access, true});
  for (const Past& past : segment.strided_writes) uses.push_back({past.access, true});
  for (const Past& past : segment.reads) uses.push_back({past.access, false});
  return uses;
}

void RaceDetector::free(uintptr_t begin, uintptr_t end, size_t stream, const VectorClock& clock) {
  auto& unawaited = unawaited_[stream];
  for (auto it = first_touching(begin); it != segments_.end() && it->first < end; ++it)
    for (const Use& use : uses_of(it->second)) {
      if (clock.knows(use.access.component, use.access.tick)) continue;
      auto own = std::find_if(unawaited.begin(), unawaited.end(),
                              [&](const Use& other) { return other.access.component == use.access.component; });
      if (own == unawaited.end())
        unawaited.push_back(use);
      else if (own->access.tick < use.access.tick)
        *own = use;  // who waits for it has waited for the earlier one
    }
}

void RaceDetector::allocate(uintptr_t begin, uintptr_t end, size_t stream, const VectorClock& clock) {
  auto& unawaited = unawaited_[stream];
  auto is_awaited = [&](const Use& use) { return clock.knows(use.access.component, use.access.tick); };
  unawaited.erase(std::remove_if(unawaited.begin(), unawaited.end(), is_awaited), unawaited.end());
  split(begin);
  split(end);
  for_each_segment(begin, end, [&](Segment& segment) {
    Segment fresh{segment.end, std::nullopt, {}, {}, uses_of(segment), true, segment.num_writes};
    fresh.former.insert(fresh.former.end(), unawaited.begin(), unawaited.end());
    segment = std::move(fresh);
  });
}

void RaceDetector::forget(uintptr_t begin, uintptr_t end, const VectorClock& clock) {
  auto is_over = [&](const auto& past) { return clock.knows(past.access.component, past.access.tick); };
  auto drop = [&](auto& pasts) { pasts.erase(std::remove_if(pasts.begin(), pasts.end(), is_over), pasts.end()); };
  split(begin);
  split(end);
  for_each_segment(begin, end, [&](Segment& segment) {
    if (segment.write && is_over(*segment.write)) segment.write = std::nullopt;
    drop(segment.strided_writes);
    drop(segment.reads);
    drop(segment.former);
  });
}

uint64_t RaceDetector::last_write(const Footprint& bytes) const {
  uint64_t last = 0;
  for (auto it = first_touching(bytes.begin); it != segments_.end() && it->first < bytes.end; ++it)
    last = std::max(last, it->second.num_writes);
  return last;
}

void RaceDetector::clear_reports() {
  reports_.clear();
  reported_.clear();
}

void RaceDetector::clear() {
  clear_reports();
  segments_.clear();
  unawaited_.clear();
}

}  // namespace sim
