// Autocast, with the lists of operators that all accelerators share: one boxed kernel for each kind of cast.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>

#include "kernel.h"

namespace sim {
namespace {

constexpr auto kKey = c10::DispatchKey::AutocastPrivateUse1;
constexpr auto kType = c10::DeviceType::PrivateUse1;

void call_cast(const c10::OperatorHandle& op, torch::jit::Stack* stack, at::ScalarType dtype) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(kKey);
  for (auto it = stack->end() - op.schema().arguments().size(); it != stack->end(); ++it)
    *it = map_tensors(*it, [&](const at::Tensor& tensor) { return at::autocast::cached_cast(dtype, tensor, kType); });
  op.callBoxed(stack);
}

void lower_precision(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  call_cast(op, stack, at::autocast::get_autocast_dtype(kType));
}

void fp32(const c10::OperatorHandle& op, torch::jit::Stack* stack) { call_cast(op, stack, at::kFloat); }

// Computes in fp32 inside the kernel: asks for an fp32 result unless the caller asked for another.
void fp32_result(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(kKey);
  const auto arguments = stack->end() - op.schema().arguments().size();
  const std::optional<int> dtype = op.schema().argumentIndexWithName("dtype");
  const bool is_eligible = arguments->isTensor() && at::autocast::is_autocast_eligible(arguments->toTensor(), kType);
  if (dtype && is_eligible && arguments[*dtype].isNone()) arguments[*dtype] = at::kFloat;
  op.callBoxed(stack);
}

void widest(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  at::ScalarType dtype = at::autocast::get_autocast_dtype(kType);
  for (auto it = stack->end() - op.schema().arguments().size(); it != stack->end(); ++it)
    for_each_tensor(*it, [&](const at::Tensor& tensor) { dtype = at::autocast::prioritize(dtype, tensor, kType); });
  call_cast(op, stack, dtype);
}

// From torch's macros, which give "pow, Tensor_Scalar" for pow.Tensor_Scalar.
std::string operator_name(std::string listed) {
  listed.erase(std::remove(listed.begin(), listed.end(), ' '), listed.end());
  std::replace(listed.begin(), listed.end(), ',', '.');
  return listed;
}

template <c10::BoxedKernel::BoxedKernelFunction* kernel>
torch::CppFunction boxed() {
  return torch::CppFunction::makeFromBoxedFunction<kernel>();
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) { library.fallback(torch::CppFunction::makeFallthrough()); }

#define SIM_LOWER_PRECISION(...) library.impl(operator_name(#__VA_ARGS__).c_str(), boxed<&lower_precision>());
#define SIM_FP32(...) library.impl(operator_name(#__VA_ARGS__).c_str(), boxed<&fp32>());
#define SIM_FP32_RESULT(...) library.impl(operator_name(#__VA_ARGS__).c_str(), boxed<&fp32_result>());
#define SIM_PROMOTE(...) library.impl(operator_name(#__VA_ARGS__).c_str(), boxed<&widest>());

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, library) {
  AT_FORALL_LOWER_PRECISION_FP(SIM_LOWER_PRECISION)
  AT_FORALL_FP32(SIM_FP32)
  AT_FORALL_FP32_SET_OPT_DTYPE(SIM_FP32_RESULT)
  AT_FORALL_PROMOTE(SIM_PROMOTE)
}

}  // namespace
}  // namespace sim
