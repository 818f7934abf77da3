// Shapes of results before there are results.
#pragma once
#include <ATen/core/stack.h>

#include <optional>
#include <vector>

#include "operators.h"

namespace sim {

// What the operator will return, as meta tensors, found by its Meta kernel; written arguments that it resizes are
// resized. Nothing if there is no Meta kernel, or if it cannot tell without the data. Raises what the operator raises
// for bad arguments.
//
// Shapes repeat from step to step, and many Meta kernels are slow Python, so results are kept.
std::optional<torch::jit::Stack> infer_results(const OperatorInfo& info, const std::vector<c10::IValue>& arguments);

}  // namespace sim
