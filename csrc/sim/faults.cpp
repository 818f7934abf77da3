#include "faults.h"

#include <c10/util/Exception.h>

#include <array>
#include <atomic>

namespace sim {
namespace {

struct Injection {
  std::atomic<uint64_t> first{0}, count{0}, seen{0};
};

Injection& injection(Fault fault) {
  static auto* injections = new std::array<Injection, kNumFaults>;  // tensors may outlive static objects
  return injections->at(static_cast<size_t>(fault));
}

constexpr const char* kNames[kNumFaults] = {"allocation", "pinning", "copy", "launch", "host task"};

}  // namespace

void set_fault(Fault fault, uint64_t first, uint64_t count) {
  Injection& asked = injection(fault);
  asked.first = 0;
  asked.seen = 0;
  asked.count = count;
  asked.first = first;
}

uint64_t num_occurrences(Fault fault) { return injection(fault).seen; }

void fail_if_asked(Fault fault) {
  Injection& asked = injection(fault);
  const uint64_t first = asked.first;
  if (first == 0) return;
  const uint64_t number = ++asked.seen;
  if (number < first || number - first >= asked.count) return;
  const char* name = kNames[static_cast<size_t>(fault)];
  TORCH_CHECK_WITH(OutOfMemoryError, fault != Fault::kAllocation, "sim out of memory: injected failure of ", name, " ",
                   number);
  TORCH_CHECK(false, "sim: injected failure of ", name, " ", number);
}

}  // namespace sim
