#include "tensors.h"

#include <ATen/EmptyTensor.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include "device.h"
#include "memory.h"

namespace sim {
namespace {

const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

void* bytes_of(const at::Tensor& tensor) {
  return tensor.numel() ? device_memory().bytes_of(tensor.data_ptr()) : nullptr;
}

at::TensorOptions cpu_options(const at::Tensor& tensor) {
  return at::TensorOptions().dtype(tensor.dtype()).device(at::kCPU);
}

void refuse_pinning(std::optional<bool> pin_memory) {
  TORCH_CHECK(!pin_memory.value_or(false), "Only dense CPU tensors can be pinned");
}

at::Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool> pin_memory) {
  refuse_pinning(pin_memory);
  return empty_on_device(sizes, strides, c10::dtype_or_default(dtype));
}

at::Tensor empty_memory_format(at::IntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                               std::optional<at::Device>, std::optional<bool> pin_memory,
                               std::optional<at::MemoryFormat> format) {
  refuse_pinning(pin_memory);
  return at::detail::empty_generic(sizes, device_allocator(), kKeys, c10::dtype_or_default(dtype), format);
}

at::Tensor strided_view(const at::Tensor& self, at::IntArrayRef sizes, at::IntArrayRef strides,
                        std::optional<int64_t> storage_offset) {
  return view_of(self, sizes, strides, storage_offset.value_or(self.storage_offset()), self.dtype());
}

at::Tensor reshape_alias(const at::Tensor& self, at::IntArrayRef sizes, at::IntArrayRef strides) {
  return strided_view(self, sizes, strides, std::nullopt);
}

at::Tensor& set_storage_offset(at::Tensor& self, at::Storage source, int64_t storage_offset, at::IntArrayRef sizes,
                               at::IntArrayRef strides) {
  c10::TensorImpl* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_storage_offset(storage_offset);
  if (strides.empty())
    impl->set_sizes_contiguous(sizes);
  else
    impl->set_sizes_and_strides(sizes, strides);
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source) {
  const auto numel = static_cast<int64_t>(source.nbytes() / self.element_size());
  return set_storage_offset(self, std::move(source), 0, {numel}, {1});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage_offset(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

// As between CPU and CUDA: Module.to then swaps the parameters' data and tied weights stay tied.
bool has_compatible_shallow_copy_type(const at::Tensor& self, const at::Tensor& from) {
  auto is_ours = [](const at::Tensor& tensor) { return tensor.is_cpu() || is_on_device(tensor); };
  return is_ours(self) && is_ours(from);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty_memory_format);
  library.impl("empty_strided", empty_strided);
  library.impl("as_strided", strided_view);
  library.impl("view", at::native::view);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("resize_", resize_tensor);
  library.impl("set_.source_Storage", set_storage);
  library.impl("set_.source_Storage_storage_offset", set_storage_offset);
  library.impl("set_.source_Tensor", set_tensor);
  library.impl("_has_compatible_shallow_copy_type", has_compatible_shallow_copy_type);
}

}  // namespace

bool is_on_device(const at::Tensor& tensor) { return tensor.device().type() == kDeviceType; }

at::Tensor empty_on_device(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype) {
  return at::detail::empty_strided_generic(sizes, strides, device_allocator(), kKeys, dtype);
}

at::Tensor alias_on_cpu(const at::Tensor& tensor) {
  return at::from_blob(bytes_of(tensor), tensor.sizes(), tensor.strides(), cpu_options(tensor));
}

at::Tensor resizable_alias_on_cpu(const at::Tensor& tensor) {
  return at::for_blob(bytes_of(tensor), tensor.sizes())
      .strides(tensor.strides())
      .options(cpu_options(tensor))
      .resizeable_storage()
      .allocator(c10::GetCPUAllocator())
      .make_tensor();
}

at::Tensor as_meta(const at::Tensor& tensor) {
  at::Tensor meta = at::detail::empty_strided_meta(tensor.sizes(), tensor.strides(), tensor.scalar_type());
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) meta.unsafeGetTensorImpl()->set_wrapped_number(true);
  return meta;
}

at::Tensor view_of(const at::Tensor& base, at::IntArrayRef sizes, at::IntArrayRef strides, int64_t storage_offset,
                   caffe2::TypeMeta dtype) {
  // The key set of the base, not the bare device key: autograd takes a view without its keys for an inference tensor.
  at::Tensor view = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(base.storage()),
                                                             base.key_set(), dtype);
  view.unsafeGetTensorImpl()->set_storage_offset(storage_offset);
  view.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides);
  return view;
}

const at::Tensor& resize_tensor(const at::Tensor& self, at::IntArrayRef sizes, std::optional<at::MemoryFormat> format) {
  c10::TensorImpl* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(sizes);
  const size_t num_bytes = (impl->numel() + impl->storage_offset()) * impl->itemsize();
  if (num_bytes > impl->storage().nbytes()) resize_storage(impl->storage(), num_bytes);
  if (format && *format != at::MemoryFormat::Preserve) impl->empty_tensor_restride(*format);
  return self;
}

ByteRange range_of(const at::Tensor& tensor, bool is_write) {
  if (tensor.numel() == 0) return {{0, 0, nullptr}, is_write};
  Footprint bytes = footprint_of(reinterpret_cast<uintptr_t>(tensor.data_ptr()), tensor.sizes().data(),
                                 tensor.strides().data(), tensor.sizes().size(), tensor.element_size());
  if (is_on_device(tensor)) {
    const size_t needed = tensor.storage_offset() * tensor.element_size() + (bytes.end - bytes.begin);
    TORCH_CHECK(needed <= tensor.storage().nbytes(), "sim: use after free: a tensor needs ", needed,
                " bytes of a storage that was resized to ", tensor.storage().nbytes(),
                "; resize the storage back before using the tensor");
  }
  return {std::move(bytes), is_write};
}

}  // namespace sim
