// Happens-before race detector over byte ranges of device and host memory.
//
// Two accesses to the same bytes race if one of them writes and neither is known, by streams, events and waits of the
// host, to come before the other. What order they really ran in does not matter, so one run in any order finds them.
#pragma once
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "clock.h"
#include "names.h"

namespace sim {

struct ByteRange {
  uintptr_t begin, end;  // as data_ptr() gives them
  bool is_write;
};

struct Access {
  size_t component;  // of the vector clock
  uint64_t tick;
  int stream;  // kHostStream for an access of the host
  NameId name;
  NameId call_site;
};

class RaceDetector {
 public:
  // `clock` is what the accessing stream or thread knows of the others.
  void check(const Access& access, const VectorClock& clock, const ByteRange& range);
  // All uses of the bytes are known to be over, so what comes next is ordered after them.
  void forget(uintptr_t begin, uintptr_t end);

  const std::vector<std::string>& reports() const { return reports_; }
  void clear_reports();
  void clear();

 private:
  static constexpr size_t kMaxReports = 100;
  struct Segment {  // bytes with one history: the last write, and the reads since, one for each stream or thread
    uintptr_t end;
    std::optional<Access> write;
    std::vector<Access> reads;
  };

  void split(uintptr_t at);
  void read(const Access& access, const ByteRange& range);
  void report(const Access& access, bool is_write, const Access& earlier, bool earlier_is_write, const ByteRange&);

  std::map<uintptr_t, Segment> segments_;  // by first byte, disjoint
  std::vector<std::string> reports_;
  std::set<std::string> reported_;
};

}  // namespace sim
