// Names of operations and places in programs, each stored once and passed around as a number.
#pragma once
#include <cstdint>
#include <string>

namespace sim {

using NameId = uint32_t;  // 0 is the empty name

NameId intern(const std::string& name);
const std::string& name_of(NameId id);  // valid for the life of the process

}  // namespace sim
