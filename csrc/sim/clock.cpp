#include "clock.h"

#include <algorithm>

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
  if (engine == Engine::kCompute)
    return std::max(
        {num_bytes / profile.memory_bytes_per_s, num_flops / profile.flops, num_updated / profile.update_params_per_s});
  if (engine == Engine::kPeer) return profile.latency_s + num_bytes / profile.peer_bytes_per_s;
  const double link = engine == Engine::kH2D ? profile.h2d_bytes_per_s : profile.d2h_bytes_per_s;
  return profile.latency_s + num_bytes / (is_pageable ? std::min(link, profile.pageable_bytes_per_s) : link);
}

double Cost::host_bytes(const Profile& profile) const {
  if (engine == Engine::kH2D) return num_bytes * profile.host_bytes_per_h2d_byte;
  return engine == Engine::kD2H ? num_bytes * profile.host_bytes_per_d2h_byte : 0;
}

}  // namespace sim
