// Happens-before race detector over the bytes of device and host memory.
//
// Two accesses to the same bytes race if one of them writes and neither is known, by streams, events and waits of the
// host, to come before the other. What order they really ran in does not matter, so one run in any order finds them.
// It also knows which bytes nothing has written since they were allocated.
#pragma once
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "clock.h"
#include "footprint.h"
#include "names.h"

namespace sim {

struct ByteRange {
  Footprint bytes;
  bool is_write;
};

struct Access {
  enum class Kind {
    kUse,   // by an operator, or declared by the host
    kCopy,  // within the device: it may carry bytes that nothing has written, as padding
    kFree   // by the allocator: nobody may use the bytes from here on
  };
  size_t component;  // of the vector clock
  uint64_t tick;
  int stream;  // kHostStream for an access of the host
  NameId name;
  NameId call_site;
  Kind kind = Kind::kUse;
};

class RaceDetector {
 public:
  // `clock` is what the accessing stream or thread knows of the others.
  void check(const Access& access, const VectorClock& clock, const std::vector<ByteRange>& ranges);
  // All uses of the bytes are known to be over, so what comes next is ordered after them.
  void forget(uintptr_t begin, uintptr_t end);
  // Nothing has written the bytes for their new owner; what former owners did stays known.
  void mark_fresh(uintptr_t begin, uintptr_t end);
  // How often the bytes were written, or 0: grows with every write to any of them.
  uint64_t last_write(const Footprint& bytes) const;

  void add_report(const std::string& text);  // told once
  const std::vector<std::string>& reports() const { return reports_; }
  void clear_reports();
  void clear();

 private:
  static constexpr size_t kMaxReports = 100;
  static constexpr size_t kMaxStrided = 64;
  struct Past {
    Access access;
    Footprint bytes;
  };
  // Bytes with one history: the last write of all of them, writes since of some of them, and reads since.
  struct Segment {
    uintptr_t end;
    std::optional<Past> write;
    std::vector<Past> strided_writes;
    std::vector<Past> reads;
    bool is_fresh = false;
    uint64_t num_writes = 0;  // of all memory, when these bytes were last written
  };
  using Segments = std::map<uintptr_t, Segment>;

  void check_one(const Access& access, const VectorClock& clock, const ByteRange& range);
  void check_fresh(const Access& access, const ByteRange& range);
  void split(uintptr_t at);
  Segments::const_iterator first_touching(uintptr_t begin) const;
  template <class F>
  void for_each_segment(uintptr_t begin, uintptr_t end, F visit);
  void write(const Access& access, const Footprint& bytes);
  void read(const Access& access, const Footprint& bytes);
  void report(const Access& access, bool is_write, const Access& earlier, bool earlier_is_write, const Footprint&);
  void add_report(const std::string& text, const Footprint& bytes);  // told once, wherever the bytes are

  Segments segments_;  // by first byte, disjoint
  uint64_t num_writes_ = 0;
  std::vector<std::string> reports_;
  std::set<std::string> reported_;
};

}  // namespace sim
