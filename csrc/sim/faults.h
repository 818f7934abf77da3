// Failures on demand: the n-th allocation, pinning, copy, launch or host task from now on fails.
#pragma once
#include <cstdint>

namespace sim {

enum class Fault { kAllocation, kPin, kCopy, kLaunch, kTask };  // order as in offload/testing/faults.py
constexpr int kNumFaults = 5;

// From the `first`-th occurrence on (1 is the next), `count` of them fail; with `first` 0 none does. Counts anew.
void set_fault(Fault fault, uint64_t first, uint64_t count);
uint64_t num_occurrences(Fault fault);  // since then

// Throws where this occurrence is to fail: c10::OutOfMemoryError for an allocation, c10::Error otherwise.
void fail_if_asked(Fault fault);

}  // namespace sim
