#include "fallback.h"

#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "device.h"
#include "faults.h"
#include "kernel.h"
#include "memory.h"
#include "shapes.h"
#include "tensors.h"

namespace sim {
namespace {

using Values = std::vector<c10::IValue>;

struct Touched {  // by one call
  std::vector<ByteRange> ranges;
  double num_bytes = 0;

  void add(const at::Tensor& tensor, bool is_write, int num_passes = 1) {
    ranges.push_back(range_of(tensor, is_write));
    num_bytes += static_cast<double>(tensor.nbytes()) * num_passes;
  }
};

// How often the bytes of an argument go through device memory: twice if it is changed in place.
int num_passes(const OperatorInfo& info, size_t argument) {
  const bool is_changed = info.arguments[argument].is_written && !info.arguments[argument].is_out;
  const std::string& name = info.schema->name();
  const bool is_only_written = info.handle.hasTag(at::Tag::nondeterministic_seeded) || name == "aten::fill_" ||
                               name == "aten::zero_" || name == "aten::_foreach_zero_";
  return is_changed && !is_only_written ? 2 : 1;
}

// Where an operator runs: where its first tensor on a device is, or where it was asked to make one.
std::optional<c10::Device> device_for(const Values& arguments) {
  std::optional<c10::Device> asked, found;
  for (const c10::IValue& argument : arguments) {
    if (argument.isDevice() && argument.toDevice().type() == kDeviceType) asked = argument.toDevice();
    for_each_tensor(argument, [&](const at::Tensor& tensor) {
      if (!found && is_on_device(tensor)) found = tensor.device();
    });
    if (found) return found;
  }
  return asked;
}

// Raises CUDA's error for tensors elsewhere. As there, 0-dim CPU tensors may be read, and indices may be on the CPU.
Touched touched_arguments(const OperatorInfo& info, const Values& arguments) {
  Touched touched;
  const c10::Device device = device_at(current_device());
  for (size_t i = 0; i < arguments.size(); i++) {
    const bool is_write = info.arguments[i].is_written, is_index = arguments[i].isOptionalTensorList();
    for_each_tensor(arguments[i], [&](const at::Tensor& tensor) {
      if (tensor.device() == device) return touched.add(tensor, is_write, num_passes(info, i));
      TORCH_CHECK(tensor.is_cpu() && !is_write && (tensor.dim() == 0 || is_index),
                  "Expected all tensors to be on the same device, but found at least two devices, ", device, " and ",
                  tensor.device(), "! (when checking argument for argument ", info.schema->arguments()[i].name(),
                  " in method ", info.name, ")");
    });
  }
  return touched;
}

// Of matrix products and convolutions, which is where the time of a model goes; 0 for all else.
double num_flops(const OperatorInfo& info, const Values& arguments, const Values& results) {
  auto size_after_first = [](const at::Tensor& weight) { return static_cast<double>(weight.numel() / weight.size(0)); };
  const std::string& name = info.schema->name();  // any overload, out= too
  auto tensor = [&](size_t i) -> const at::Tensor& { return arguments[i].toTensor(); };
  if (results.empty() || !results[0].isTensor() || !results[0].toTensor().defined()) return 0;
  const auto numel = static_cast<double>(results[0].toTensor().numel());
  if (name == "aten::mm" || name == "aten::bmm") return 2 * numel * static_cast<double>(tensor(0).size(-1));
  if (name == "aten::addmm" || name == "aten::baddbmm") return 2 * numel * static_cast<double>(tensor(1).size(-1));
  if (name == "aten::convolution" && tensor(1).numel()) return 2 * numel * size_after_first(tensor(1));
  if (name == "aten::convolution_backward" && tensor(2).numel())
    return 4 * static_cast<double>(tensor(0).numel()) * size_after_first(tensor(2));
  return 0;
}

double num_updated(const OperatorInfo& info, const Values& arguments) {
  if (info.schema->name() != "offload::update_") return 0;
  return static_cast<double>(arguments[*info.schema->argumentIndexWithName("grad")].toTensor().numel());
}

// The values to return: written arguments as they are, all else new on the device.
Values allocate_results(const OperatorInfo& info, const Values& arguments, const Values& inferred) {
  Values results;
  for (size_t i = 0; i < info.aliased_argument.size(); i++) {
    const int aliased = info.aliased_argument[i];
    results.push_back(aliased >= 0 ? arguments[aliased] : map_tensors(inferred[i], [](const at::Tensor& meta) {
      return empty_on_device(meta.sizes(), meta.strides(), meta.scalar_type());
    }));
  }
  return results;
}

Values run_later(const OperatorInfo& info, const Values& arguments, const Values& inferred, Touched touched) {
  Values results = allocate_results(info, arguments, inferred);
  for (size_t i = 0; i < results.size(); i++)
    if (info.aliased_argument[i] < 0)
      for_each_tensor(results[i], [&](const at::Tensor& tensor) { touched.add(tensor, true); });
  Operation operation;
  operation.name = info.name_id;
  operation.cost.num_bytes = touched.num_bytes;
  operation.cost.num_flops = num_flops(info, arguments, results);
  operation.cost.num_updated = num_updated(info, arguments);
  operation.accesses = std::move(touched.ranges);
  operation.run = DeferredKernel(info, arguments, results);
  Runtime::get().enqueue(current_stream(), std::move(operation));
  return results;
}

[[noreturn]] void refuse_sparse(const std::string& operator_name) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, "sim: ", operator_name,
                              " makes or takes a sparse tensor, and the emulated device has dense ones only. Use dense "
                              "gradients (sparse=False in an embedding), or keep such tensors on the CPU.");
}

// Work on the block may still be queued, by a former owner or as the fill of fresh memory.
void wait_to_write(const at::Tensor& tensor) {
  static const NameId kResult = intern("result of the host");
  Operation operation;
  operation.name = kResult;
  operation.run = [] {};
  operation.accesses = {range_of(tensor, true)};
  operation.is_bookkeeping = true;
  Runtime::get().enqueue(current_stream(), std::move(operation));
  Runtime::get().synchronize(current_stream());
}

at::Tensor copy_to_device(const OperatorInfo& info, const at::Tensor& cpu) {
  if (cpu.layout() != at::kStrided) refuse_sparse(info.name);
  at::Tensor result = empty_on_device(cpu.sizes(), cpu.strides(), cpu.scalar_type());
  wait_to_write(result);
  KernelScope scope;
  if (cpu.numel()) alias_on_cpu(result).copy_(cpu);
  return result;
}

at::Tensor view_on_device(const OperatorInfo& info, const at::Tensor& cpu_view,
                          const std::vector<AliasedTensor>& aliases) {
  for (const AliasedTensor& base : aliases) {
    if (!base.cpu.storage().is_alias_of(cpu_view.storage())) continue;
    const size_t offset_bytes =
        base.device.storage_offset() * base.device.element_size() + cpu_view.storage_offset() * cpu_view.element_size();
    return view_of(base.device, cpu_view.sizes(), cpu_view.strides(),
                   static_cast<int64_t>(offset_bytes / cpu_view.element_size()), cpu_view.dtype());
  }
  return copy_to_device(info, cpu_view);
}

void take_back_resized(const AliasedTensor& alias) {
  if (alias.cpu.sizes() != alias.device.sizes()) resize_tensor(alias.device, alias.cpu.sizes(), std::nullopt);
  if (alias.cpu.numel() == 0 || alias.cpu.data_ptr() == bytes_of(alias.device.data_ptr())) return;
  wait_to_write(alias.device);
  KernelScope scope;
  alias_on_cpu(alias.device).copy_(alias.cpu);
}

Values run_now(const OperatorInfo& info, const Values& arguments) {
  std::vector<AliasedTensor> aliases;
  torch::jit::Stack stack = cpu_stack(info, arguments, aliases);
  call_cpu_kernel(info, stack);
  for (const AliasedTensor& alias : aliases)
    if (alias.is_out) take_back_resized(alias);
  Values results;
  for (size_t i = 0; i < info.aliased_argument.size(); i++) {
    const int aliased = info.aliased_argument[i];
    results.push_back(aliased >= 0 ? arguments[aliased] : map_tensors(stack[i], [&](const at::Tensor& tensor) {
      return info.path == Path::kView ? view_on_device(info, tensor, aliases) : copy_to_device(info, tensor);
    }));
  }
  return results;
}

void wait_for_arguments(const OperatorInfo& info, Touched touched) {
  Operation operation;
  operation.name = info.name_id;
  operation.cost.num_bytes = touched.num_bytes;
  operation.accesses = std::move(touched.ranges);
  operation.run = [] {};  // the host does it, after the wait
  Runtime::get().enqueue(current_stream(), std::move(operation));
  Runtime::get().count_host_wait(info.name.c_str());
  Runtime::get().synchronize(current_stream());
}

Values run(const OperatorInfo& info, const Values& arguments) {
  if (info.path == Path::kView) return run_now(info, arguments);
  fail_if_asked(Fault::kLaunch);
  touched_arguments(info, arguments);  // raises for tensors elsewhere, before anything is resized
  if (info.path == Path::kAsync) {
    std::optional<Values> inferred = infer_results(info, arguments);
    if (!inferred && info.is_in_place) inferred.emplace();
    if (inferred) return run_later(info, arguments, *inferred, touched_arguments(info, arguments));
  }
  wait_for_arguments(info, touched_arguments(info, arguments));
  return run_now(info, arguments);
}

}  // namespace

void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const OperatorInfo& info = operator_info(op);
  const Values arguments = torch::jit::pop(*stack, info.arguments.size());
  const c10::OptionalDeviceGuard guard(device_for(arguments));
  for (c10::IValue& result : run(info, arguments)) stack->push_back(std::move(result));
}

void sparse_fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack*) {
  refuse_sparse(toString(op.schema().operator_name()));
}

TORCH_LIBRARY_IMPL(_, SparsePrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&sparse_fallback>());
}

TORCH_LIBRARY_IMPL(_, SparseCsrPrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&sparse_fallback>());
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

}  // namespace sim
