// Two notions of time. A vector clock knows what happened before what; the virtual clock knows how long it took.
#pragma once
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <vector>

#include "names.h"

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

enum class Engine { kCompute, kH2D, kD2H, kHost };  // order as in offload/accelerators/sim.py

struct Profile {
  double h2d_bytes_per_s = 12e9;
  double d2h_bytes_per_s = 12e9;
  double pageable_bytes_per_s = 4e9;
  double memory_bytes_per_s = 2e12;
  double flops = 50e12;
  double latency_s = 5e-6;  // of a copy
  double launch_s = 4e-6;   // of the host, for each operation
};

struct Cost {
  Engine engine = Engine::kCompute;
  double num_bytes = 0;
  double num_flops = 0;
  bool is_pageable = false;

  double seconds(const Profile& profile) const;
};

struct Span {
  NameId name;
  int stream;  // kHostStream for work of the host
  Engine engine;
  double start_s, end_s;
};
constexpr int kHostStream = -1;

// When each engine is busy. An operation takes the first gap that holds it, so one that is enqueued early but must wait
// does not hold up those behind it.
class Timeline {
 public:
  double schedule(Engine engine, double ready_s, double duration_s);  // returns the start
  void add(const Span& span);
  const std::deque<Span>& spans() const { return spans_; }
  void clear();

 private:
  static constexpr size_t kMaxSpans = 1 << 20;
  std::map<double, double> busy_[3];  // start -> end, by engine, disjoint and not touching
  std::deque<Span> spans_;
};

}  // namespace sim
