// What the device needs to know of an operator, read from its schema once.
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>

#include <string>
#include <vector>

#include "names.h"

namespace sim {

enum class Path {
  kAsync,     // shapes now, if they can be known, bytes from the CPU kernel later
  kView,      // no bytes are touched: done at once
  kHostWaits  // shapes or returned values depend on data, so the host waits, as on CUDA
};

struct OperatorInfo {
  struct Argument {
    bool is_written, is_out, is_generator;
  };

  c10::OperatorHandle handle;
  const c10::FunctionSchema* schema;
  std::string name;  // with its overload: "aten::add.Tensor"
  NameId name_id;
  Path path;
  std::vector<Argument> arguments;
  bool is_in_place;  // returns nothing, or only arguments, and resizes none: there are no shapes to find
  std::vector<int> aliased_argument;  // by returned value: the written argument that it is, or -1
};

// The reference stays valid for the life of the process. Throws if no CPU kernel could do the work.
const OperatorInfo& operator_info(const c10::OperatorHandle& op);

}  // namespace sim
