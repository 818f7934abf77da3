// Indexing with masks. As on CUDA, the host waits once, for the places where a mask is true, and never where the places
// do not matter: one value for all of them.
#include <ATen/native/IndexingUtils.h>
#include <ATen/ops/nonzero.h>
#include <torch/library.h>

#include "fallback.h"

namespace sim {
namespace {

using Indices = c10::List<std::optional<at::Tensor>>;

bool is_mask(const std::optional<at::Tensor>& index) {
  return index && index->defined() && (index->scalar_type() == at::kBool || index->scalar_type() == at::kByte);
}

// Masks replaced by the indices where they are true.
Indices without_masks(const at::Tensor& self, const Indices& indices) {
  Indices expanded;
  for (at::Tensor& index : at::native::expandTensors(self, indices))
    expanded.push_back(index.defined() ? std::optional<at::Tensor>(std::move(index)) : std::nullopt);
  return expanded;
}

void index(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  c10::IValue& indices = torch::jit::peek(*stack, 1, 2);
  indices = without_masks(torch::jit::peek(*stack, 0, 2).toTensor(), indices.to<Indices>());
  fallback(op, keys, stack);
}

// _index_put_impl_(Tensor(a!) self, Tensor?[] indices, Tensor values, bool accumulate=False, bool unsafe=False)
void index_put(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const at::Tensor self = torch::jit::peek(*stack, 0, 5).toTensor();
  c10::IValue& indices = torch::jit::peek(*stack, 1, 5);
  const at::Tensor values = torch::jit::peek(*stack, 2, 5).toTensor();
  const bool accumulate = torch::jit::peek(*stack, 3, 5).toBool();
  const Indices given = indices.to<Indices>();
  size_t num_masks = 0, num_indices = 0;
  for (const std::optional<at::Tensor>& index : given) {
    num_masks += is_mask(index);
    num_indices += index && index->defined();
  }
  const bool is_fill = !accumulate && values.numel() == 1 && num_masks == 1 && num_indices == 1;
  if (num_masks && !is_fill) indices = without_masks(self, given);
  fallback(op, keys, stack);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("index.Tensor", torch::CppFunction::makeFromBoxedFunction<&index>());
  library.impl("_index_put_impl_", torch::CppFunction::makeFromBoxedFunction<&index_put>());
}

}  // namespace
}  // namespace sim
