// Running an operator's CPU kernel over the bytes of device tensors.
#pragma once
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/stack.h>

#include <optional>
#include <utility>
#include <vector>

#include "operators.h"

namespace sim {

// The thread's state for kernels: below autograd, autocast and Python's modes, whichever thread this is.
class KernelScope {
  at::AutoDispatchBelowADInplaceOrView below_autograd_;
  c10::impl::ExcludeDispatchKeyGuard no_modes_{c10::autocast_dispatch_keyset | c10::python_ks};
};

// The same value with `map` applied to each defined tensor in it.
template <class F>
c10::IValue map_tensors(const c10::IValue& value, F map) {
  if (value.isTensor()) {
    const at::Tensor& tensor = value.toTensor();
    return tensor.defined() ? c10::IValue(map(tensor)) : value;
  }
  if (value.isTensorList()) {
    c10::List<at::Tensor> mapped;
    for (const at::Tensor& tensor : value.toTensorVector()) mapped.push_back(tensor.defined() ? map(tensor) : tensor);
    return mapped;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> mapped;
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector())
      mapped.push_back(tensor && tensor->defined() ? std::optional<at::Tensor>(map(*tensor)) : tensor);
    return mapped;
  }
  return value;
}

template <class F>
void for_each_tensor(const c10::IValue& value, F visit) {
  map_tensors(value, [&](const at::Tensor& tensor) {
    visit(tensor);
    return tensor;
  });
}

// A device tensor among the arguments, and the CPU tensor that the kernel gets for it.
struct AliasedTensor {
  at::Tensor device, cpu;
  bool is_out;
};

// Arguments for the CPU kernel: aliases of device tensors, CPU tensors by value, generators and devices of the CPU.
torch::jit::Stack cpu_stack(const OperatorInfo& info, const std::vector<c10::IValue>& arguments,
                            std::vector<AliasedTensor>& aliases);

// Calls the CPU kernel, after changing the arguments where CPU and Meta kernels disagree on what they are.
void call_cpu_kernel(const OperatorInfo& info, torch::jit::Stack& stack);

// One call to be made later. It holds no tensor of the device, only aliases.
class DeferredKernel {
 public:
  DeferredKernel(const OperatorInfo& info, const std::vector<c10::IValue>& arguments,
                 const std::vector<c10::IValue>& results);
  void operator()();

 private:
  using Destination = std::pair<size_t, at::Tensor>;  // place among the tensors of one returned value, alias

  const OperatorInfo* info_;
  torch::jit::Stack stack_;
  std::vector<std::vector<Destination>> results_;                 // by returned value, for those that are new
  std::vector<std::pair<at::Tensor, at::Tensor>> out_arguments_;  // what the kernel gets, and where its bytes belong
};

}  // namespace sim
