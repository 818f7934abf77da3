#include "clock.h"

#include <algorithm>
#include <iterator>

namespace sim {

uint64_t VectorClock::advance(size_t component) {
  if (ticks_.size() <= component) ticks_.resize(component + 1);
  return ++ticks_[component];
}

void VectorClock::join(const VectorClock& other) {
  if (ticks_.size() < other.ticks_.size()) ticks_.resize(other.ticks_.size());
  for (size_t i = 0; i < other.ticks_.size(); i++) ticks_[i] = std::max(ticks_[i], other.ticks_[i]);
}

double Cost::seconds(const Profile& profile) const {
  if (engine == Engine::kCompute) return std::max(num_bytes / profile.memory_bytes_per_s, num_flops / profile.flops);
  const double link = engine == Engine::kH2D ? profile.h2d_bytes_per_s : profile.d2h_bytes_per_s;
  return profile.latency_s + num_bytes / (is_pageable ? std::min(link, profile.pageable_bytes_per_s) : link);
}

double Timeline::schedule(Engine engine, double ready_s, double duration_s) {
  auto& busy = busy_[static_cast<int>(engine)];
  double start_s = ready_s;
  auto next = busy.upper_bound(start_s);
  if (next != busy.begin()) start_s = std::max(start_s, std::prev(next)->second);
  for (; next != busy.end() && next->first < start_s + duration_s; ++next) start_s = next->second;
  if (duration_s <= 0) return start_s;

  double merged_start_s = start_s, merged_end_s = start_s + duration_s;
  if (next != busy.end() && next->first == merged_end_s) {
    merged_end_s = next->second;
    next = busy.erase(next);
  }
  if (next != busy.begin() && std::prev(next)->second == merged_start_s) {
    merged_start_s = std::prev(next)->first;
    busy.erase(std::prev(next));
  }
  busy[merged_start_s] = merged_end_s;
  return start_s;
}

void Timeline::add(const Span& span) {
  if (spans_.size() == kMaxSpans) spans_.pop_front();
  spans_.push_back(span);
}

void Timeline::clear() {
  for (auto& busy : busy_) busy.clear();
  spans_.clear();
}

}  // namespace sim
