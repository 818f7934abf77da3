// Two notions of time: a vector clock knows what happened before what, and costs say how long it took.
#pragma once
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

namespace sim {

// Component i counts how far the i-th stream or host thread is known to have come.
class VectorClock {
 public:
  bool knows(size_t component, uint64_t tick) const { return component < ticks_.size() && ticks_[component] >= tick; }
  uint64_t advance(size_t component);
  void join(const VectorClock& other);

 private:
  std::vector<uint64_t> ticks_;
};

enum class Engine { kCompute, kH2D, kD2H, kHost, kPeer };  // order as in offload/accelerators/sim.py

struct Profile {
  double h2d_bytes_per_s = 12e9;  // each direction alone
  double d2h_bytes_per_s = 12e9;
  double both_bytes_per_s = std::numeric_limits<double>::infinity();  // each way while both are busy
  double pageable_bytes_per_s = 4e9;
  double peer_bytes_per_s = 24e9;  // to another device
  double memory_bytes_per_s = 2e12;
  double flops = 50e12;
  double update_params_per_s = std::numeric_limits<double>::infinity();  // of optimizers' kernels
  double latency_s = 5e-6;                                               // of a copy
  double launch_s = 4e-6;                                                // of the host, for each operation
  double host_bytes_per_h2d_byte = 1;                                    // of host memory, taken by copies
  double host_bytes_per_d2h_byte = 1;
};

struct Cost {
  Engine engine = Engine::kCompute;
  double num_bytes = 0;
  double num_flops = 0;
  double num_updated = 0;  // parameters, by an optimizer's kernel
  bool is_pageable = false;

  double seconds(const Profile& profile) const;  // while nothing else runs
  double host_bytes(const Profile& profile) const;
};

constexpr int kHostStream = -1;

}  // namespace sim
