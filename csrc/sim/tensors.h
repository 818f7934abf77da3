// Tensors of the device, and other tensors over the same bytes.
#pragma once
#include <ATen/core/Tensor.h>

#include "races.h"

namespace sim {

bool is_on_device(const at::Tensor& tensor);
at::Tensor empty_on_device(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype);

// A CPU tensor over the bytes behind a device tensor. It holds no reference, as a kernel on CUDA holds none: work that
// runs after its memory was reused goes wrong, and nothing that Python knows is dropped on a worker thread.
at::Tensor alias_on_cpu(const at::Tensor& tensor);
// The same, but resizable: some out= kernels of the CPU resize their output on the way, and then write elsewhere.
at::Tensor resizable_alias_on_cpu(const at::Tensor& tensor);
// A tensor without bytes, for shape inference.
at::Tensor as_meta(const at::Tensor& tensor);
// Sizes, strides and offset of another view over the storage of `base`; `dtype` may differ from its dtype.
at::Tensor view_of(const at::Tensor& base, at::IntArrayRef sizes, at::IntArrayRef strides, int64_t storage_offset,
                   caffe2::TypeMeta dtype);
const at::Tensor& resize_tensor(const at::Tensor& self, at::IntArrayRef sizes, std::optional<at::MemoryFormat> format);

// The bytes that the tensor touches. Throws if its storage was made smaller than that, as by resize_(0).
ByteRange range_of(const at::Tensor& tensor, bool is_write);

}  // namespace sim
