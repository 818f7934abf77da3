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
    kUse,      // by an operator, or declared by the host
    kCopy,     // within or between devices: it may carry bytes that nothing has written
    kDownload  // to the host: some of its bytes may be so, as padding is
  };
  size_t component;  // of the vector clock
  uint64_t tick;
  int device;
  int stream;  // kHostStream for an access of the host
  NameId name;
  NameId call_site;
  Kind kind = Kind::kUse;
};

class RaceDetector {
 public:
  // `clock` is what the accessing stream or thread knows of the others.
  void check(const Access& access, const VectorClock& clock, const std::vector<ByteRange>& ranges);
  // Freeing touches nothing; the next owner's first use does, and must come after the last owner's. As the allocator
  // gives freed memory to its own stream at once, in pieces of any size, any later allocation of that stream may get
  // it: uses that the stream does not wait for (`clock` is what it knows) are held against all of them.
  void free(uintptr_t begin, uintptr_t end, size_t stream, const VectorClock& clock);
  // Nothing has written the bytes for their new owner.
  void allocate(uintptr_t begin, uintptr_t end, size_t stream, const VectorClock& clock);
  // Uses of the bytes that `clock` knows are over, so what comes next is ordered after them.
  void forget(uintptr_t begin, uintptr_t end, const VectorClock& clock);
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
  struct Use {
    Access access;
    bool is_write;
  };
  // Bytes with one history: the last write of all of them, writes since of some of them, and reads since.
  struct Segment {
    uintptr_t end;
    std::optional<Past> write;
    std::vector<Past> strided_writes;
    std::vector<Past> reads;
    std::vector<Use> former;  // of memory that has been freed since, and may be this
    bool is_fresh = false;
    uint64_t num_writes = 0;  // of all memory, when these bytes were last written
  };
  using Segments = std::map<uintptr_t, Segment>;

  void check_one(const Access& access, const VectorClock& clock, const ByteRange& range);
  void check_fresh(const Access& access, const ByteRange& range);
  void split(uintptr_t at);
  static std::vector<Use> uses_of(const Segment& segment);
  Segments::const_iterator first_touching(uintptr_t begin) const;
  template <class F>
  void for_each_segment(uintptr_t begin, uintptr_t end, F visit);
  void write(const Access& access, const Footprint& bytes);
  void read(const Access& access, const Footprint& bytes);
  void add_report(const std::string& text, const Footprint& bytes);  // told once, wherever the bytes are

  Segments segments_;                             // by first byte, disjoint
  std::map<size_t, std::vector<Use>> unawaited_;  // by stream: uses of its freed memory; one of each component
  uint64_t num_writes_ = 0;
  std::vector<std::string> reports_;
  std::set<std::string> reported_;
};

}  // namespace sim
