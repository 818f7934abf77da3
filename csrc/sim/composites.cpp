// Operators that torch would not bring to the fallback, or would compute on the wrong generator.
#include <ATen/SDPBackend.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/histc.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ones_like.h>
#include <torch/library.h>

#include <tuple>

#include "fallback.h"

namespace sim {
namespace {

// From plain matrix products, which is what every device has.
int64_t fused_sdp_choice(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                         double, bool, std::optional<double>, bool) {
  return static_cast<int64_t>(at::SDPBackend::math);
}

// The CPU's kernel takes no generator: it would draw from the CPU's, in the order of execution.
std::tuple<at::Tensor, at::Tensor> dropout(const at::Tensor& input, double p, std::optional<bool> train) {
  const auto bool_options = input.options().dtype(at::kBool);
  if (!train.value_or(true) || p == 0) return {input.clone(), at::ones_like(input, bool_options)};
  const at::Tensor mask = at::empty_like(input, bool_options).bernoulli_(1 - p);
  const double scale = p == 1 ? 0 : 1 / (1 - p);
  return {input.mul(mask).mul_(scale), mask};
}

// CUDA's takes integers, which mixtures of experts count tokens with; the CPU's does not.
at::Tensor histc(const at::Tensor& input, int64_t num_bins, const at::Scalar& min, const at::Scalar& max) {
  const at::ScalarType dtype = input.scalar_type();
  const at::Tensor values = at::isIntegralType(dtype, /*includeBool=*/false) ? input.to(at::kDouble) : input;
  at::Tensor counts = at::empty({num_bins}, values.options());
  at::histc_out(counts, values, num_bins, min, max);
  return counts.to(dtype);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("_fused_sdp_choice", fused_sdp_choice);
  library.impl("native_dropout", dropout);
  library.impl("histc", histc);
  for (const char* name : {// Composites that pick a backend by device, and have none for this one.
                           "convolution", "convolution_backward",
                           // Composites elsewhere, but one kernel each on the CPU and on CUDA.
                           "native_layer_norm", "native_group_norm", "silu_backward", "mish_backward", "addr",
                           "addr.out", "all.dims", "all.dims_out", "any.dims", "any.dims_out", "linalg__powsum",
                           // Composite that reads, times zero, what nothing has written.
                           "mv", "mv.out",
                           // Checks for devices that it knows.
                           "mode.values"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

}  // namespace
}  // namespace sim

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &sim::fused_sdp_choice)
}  // namespace at::native
