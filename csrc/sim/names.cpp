#include "names.h"

#include <deque>
#include <mutex>
#include <unordered_map>

namespace sim {
namespace {

struct NameTable {
  std::mutex mutex;
  std::unordered_map<std::string, NameId> ids{{"", 0}};
  std::deque<std::string> names{""};  // a deque does not move what it holds
};

// Never destroyed: operations may still be named while the process ends.
NameTable& table() {
  static NameTable* table = new NameTable;
  return *table;
}

}  // namespace

NameId intern(const std::string& name) {
  auto& [mutex, ids, names] = table();
  std::lock_guard<std::mutex> guard(mutex);
  auto [entry, is_new] = ids.try_emplace(name, static_cast<NameId>(names.size()));
  if (is_new) names.push_back(name);
  return entry->second;
}

const std::string& name_of(NameId id) {
  auto& [mutex, ids, names] = table();
  std::lock_guard<std::mutex> guard(mutex);
  return names[id];
}

}  // namespace sim
