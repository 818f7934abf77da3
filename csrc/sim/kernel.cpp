#include "kernel.h"

#include <initializer_list>
#include <string>

#include "device.h"
#include "tensors.h"

namespace sim {
namespace {

// By value, as CUDA passes scalars at launch: the caller may change them before the kernel runs.
at::Tensor copy_of_cpu_tensor(const at::Tensor& tensor) {
  at::Tensor copy = tensor.clone();
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) copy.unsafeGetTensorImpl()->set_wrapped_number(true);
  return copy;
}

// The Meta kernel has warned the caller already; what the CPU's says besides is about its own buffers.
class Silence final : public c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

// Meta kernels (and CUDA's) keep statistics of bf16 and fp16 inputs in fp32; the CPU's backward wants them in the dtype
// of the weight, or of the input where there is none.
struct Statistics {
  const char* operator_name;
  size_t input, weight;
  std::initializer_list<size_t> arguments;
};
const Statistics kStatistics[] = {
    {"aten::native_layer_norm_backward", 1, 5, {3, 4}},
    {"aten::native_batch_norm_backward", 1, 2, {5, 6}},
    {"aten::batch_norm_backward", 1, 2, {5, 6}},
};

void convert_statistics(const OperatorInfo& info, torch::jit::Stack& stack) {
  for (const Statistics& statistics : kStatistics) {
    if (info.name != statistics.operator_name) continue;
    const c10::IValue& weight = stack[statistics.weight];
    const bool has_weight = weight.isTensor() && weight.toTensor().defined();
    const at::ScalarType dtype = (has_weight ? weight : stack[statistics.input]).toTensor().scalar_type();
    for (size_t i : statistics.arguments)
      if (stack[i].isTensor() && stack[i].toTensor().defined()) stack[i] = stack[i].toTensor().to(dtype);
  }
}

std::vector<at::Tensor> tensors_in(const c10::IValue& value) {
  if (value.isTensorList()) return value.toTensorVector();
  return {value.toTensor()};
}

}  // namespace

torch::jit::Stack cpu_stack(const OperatorInfo& info, const std::vector<c10::IValue>& arguments,
                            std::vector<AliasedTensor>& aliases) {
  torch::jit::Stack stack;
  stack.reserve(arguments.size());
  for (size_t i = 0; i < arguments.size(); i++) {
    const OperatorInfo::Argument& argument = info.arguments[i];
    if (argument.is_generator) {
      stack.emplace_back(generator_for_operation(arguments[i].isNone() ? at::Generator() : arguments[i].toGenerator()));
    } else if (arguments[i].isDevice()) {
      stack.emplace_back(c10::Device(at::kCPU));
    } else {
      stack.push_back(map_tensors(arguments[i], [&](const at::Tensor& tensor) {
        if (!is_on_device(tensor)) return copy_of_cpu_tensor(tensor);
        at::Tensor cpu = argument.is_out ? resizable_alias_on_cpu(tensor) : alias_on_cpu(tensor);
        aliases.push_back({tensor, cpu, argument.is_out});
        return cpu;
      }));
    }
  }
  return stack;
}

void call_cpu_kernel(const OperatorInfo& info, torch::jit::Stack& stack) {
  KernelScope scope;
  Silence silence;
  c10::WarningUtils::WarningHandlerGuard guard(&silence);
  convert_statistics(info, stack);
  info.handle.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack);
}

DeferredKernel::DeferredKernel(const OperatorInfo& info, const std::vector<c10::IValue>& arguments,
                               const std::vector<c10::IValue>& results)
    : info_(&info), results_(results.size()) {
  std::vector<AliasedTensor> aliases;
  stack_ = cpu_stack(info, arguments, aliases);
  for (const AliasedTensor& alias : aliases)
    if (alias.is_out) out_arguments_.emplace_back(alias.cpu, alias_on_cpu(alias.device));
  for (size_t i = 0; i < results.size(); i++) {
    if (info.aliased_argument[i] >= 0) continue;
    const std::vector<at::Tensor> tensors = tensors_in(results[i]);
    for (size_t j = 0; j < tensors.size(); j++)
      if (tensors[j].defined() && tensors[j].numel()) results_[i].emplace_back(j, alias_on_cpu(tensors[j]));
  }
}

void DeferredKernel::operator()() {
  call_cpu_kernel(*info_, stack_);
  KernelScope scope;
  for (auto& [given, destination] : out_arguments_)
    if (given.numel() && given.data_ptr() != destination.data_ptr()) destination.copy_(given);
  for (size_t i = 0; i < results_.size(); i++) {
    if (results_[i].empty()) continue;
    const std::vector<at::Tensor> tensors = tensors_in(stack_[i]);
    for (auto& [j, destination] : results_[i]) {
      // Empty are the statistics of a normalization that is not training: Meta kernels (and CUDA's) have them.
      const bool is_left_out = !tensors[j].defined() || (tensors[j].numel() == 0 && tensors[j].is_floating_point());
      if (!is_left_out) destination.copy_(tensors[j]);
    }
  }
}

}  // namespace sim
