// Copies between host and device, and the few operators whose result the host reads.
//
// A copy from or to pinned memory reads or writes the host's bytes when it runs, not when it is enqueued, so a buffer
// that is reused too early shows. The host waits for a copy from or to pageable memory, and for any copy that was not
// asked to be non-blocking.
#include <ATen/core/Tensor.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <string>
#include <utility>

#include "device.h"
#include "faults.h"
#include "kernel.h"
#include "pinned.h"
#include "tensors.h"

namespace sim {
namespace {

void wait_for_current_stream(const char* reason) {
  Runtime::get().count_host_wait(reason);
  Runtime::get().synchronize(current_stream());
}

// Whether the host must wait for a copy that was enqueued now. Waits although nobody asked for it are told.
void wait_for_copy(bool non_blocking, bool is_pinned, const char* name, size_t num_bytes) {
  if (non_blocking && is_pinned) return;
  if (!non_blocking) return wait_for_current_stream("a blocking copy between host and device");
  Runtime::get().warn(std::string(name) + " of " + std::to_string(num_bytes) +
                      " bytes blocks although it was asked not to: the host memory is not pinned");
  wait_for_current_stream("a copy of host memory that is not pinned");
}

Operation copy_operation(const at::Tensor& destination, const at::Tensor& source, Engine engine) {
  static const NameId kNames[] = {intern("d2d"), intern("h2d"), intern("d2h"), 0, intern("peer")};
  Operation operation;
  operation.name = kNames[static_cast<int>(engine)];
  operation.accesses = {range_of(source, false), range_of(destination, true)};
  operation.cost.engine = engine;
  operation.cost.num_bytes = static_cast<double>(destination.nbytes());
  return operation;
}

void enqueue_device_copy(const at::Tensor& destination, const at::Tensor& source) {
  Operation operation = copy_operation(destination, source, Engine::kCompute);
  operation.cost.num_bytes *= 2;  // read and written in the same memory
  operation.access_kind = Access::Kind::kCopy;
  operation.run = [to = alias_on_cpu(destination), from = alias_on_cpu(source)] {
    KernelScope scope;
    to.copy_(from);
  };
  Runtime::get().enqueue(current_stream(), std::move(operation));
}

// Between devices: on the stream of the source, after what the destination's holds, which then waits for it, as on
// CUDA.
void enqueue_peer_copy(const at::Tensor& destination, const at::Tensor& source) {
  auto& runtime = Runtime::get();
  c10::DeviceGuard guard(destination.device());
  Stream& destination_stream = current_stream();
  guard.set_index(source.device().index());
  Stream& source_stream = current_stream();
  Operation operation = copy_operation(destination, source, Engine::kPeer);
  operation.access_kind = Access::Kind::kCopy;
  operation.run = [to = alias_on_cpu(destination), from = alias_on_cpu(source)] {
    KernelScope scope;
    to.copy_(from);
  };
  runtime.wait(source_stream, runtime.record(destination_stream));
  runtime.enqueue(source_stream, std::move(operation));
  runtime.wait(destination_stream, runtime.record(source_stream));
}

// Between contiguous host memory and the device. `host` is the CPU tensor of the two; returns whether it is pinned.
bool enqueue_link_copy(const at::Tensor& destination, const at::Tensor& source, const at::Tensor& host) {
  void* pinned = pinned_allocator().owns(host.data_ptr()) ? host.data_ptr() : nullptr;
  Operation operation = copy_operation(destination, source, is_on_device(source) ? Engine::kD2H : Engine::kH2D);
  operation.cost.is_pageable = !pinned;
  operation.access_kind = Access::Kind::kDownload;  // of what is read on the device, if anything is
  if (pinned) pinned_allocator().retain(pinned);
  operation.run = [to = alias_on_cpu(destination), from = alias_on_cpu(source), pinned] {
    KernelScope scope;
    to.copy_(from);
    if (pinned) pinned_allocator().release(pinned);
  };
  Runtime::get().enqueue(current_stream(), std::move(operation));
  return pinned;
}

void copy_from_host(const at::Tensor& destination, const at::Tensor& source, bool non_blocking) {
  // Another dtype or layout is made on the host first, in memory that is not pinned, as CUDA does it.
  const at::Tensor host = source.to(destination.scalar_type()).contiguous();
  const bool is_pinned = enqueue_link_copy(destination, host, host);
  wait_for_copy(non_blocking, is_pinned, "h2d", destination.nbytes());
}

void copy_to_host(const at::Tensor& destination, const at::Tensor& source, bool non_blocking) {
  const at::Tensor device = source.to(destination.scalar_type()).contiguous();
  const bool is_direct = destination.is_contiguous();
  const at::Tensor host = is_direct ? destination : at::empty(destination.sizes(), destination.options());
  const bool is_pinned = enqueue_link_copy(host, device, host);
  wait_for_copy(non_blocking, is_pinned, "d2h", destination.nbytes());
  if (!is_direct) destination.copy_(host);
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& destination, bool non_blocking) {
  if (destination.numel() == 0) return destination;
  fail_if_asked(Fault::kCopy);
  const at::Tensor source = self.expand_as(destination);
  const c10::DeviceGuard guard(is_on_device(destination) ? destination.device() : source.device());
  if (is_on_device(source) && is_on_device(destination) && source.device() != destination.device())
    enqueue_peer_copy(destination, source);
  else if (is_on_device(source) && is_on_device(destination))
    enqueue_device_copy(destination, source);
  else if (is_on_device(destination))
    copy_from_host(destination, source, non_blocking);
  else
    copy_to_host(destination, source, non_blocking);
  return destination;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& destination) {
  at::native::resize_output(destination, self.sizes());
  return copy_from(self, destination, false);
}

void read_by_host(const at::Tensor& tensor) {
  static const NameId kRead = intern("read by the host");
  Operation operation;
  operation.name = kRead;
  operation.run = [] {};
  operation.accesses = {range_of(tensor, false)};
  Runtime::get().enqueue(current_stream(), std::move(operation));
}

at::Scalar local_scalar_dense(const at::Tensor& self) {
  const c10::DeviceGuard guard(self.device());
  read_by_host(self);
  wait_for_current_stream("reading a value, as .item() does,");
  return alias_on_cpu(self).item();
}

bool values_equal(const at::Tensor& self, const at::Tensor& other) {
  TORCH_CHECK(self.device() == other.device(),
              "Expected all tensors to be on the same device, but found at least two "
              "devices, ",
              self.device(), " and ", other.device(), "!");
  const c10::DeviceGuard guard(self.device());
  read_by_host(self);
  read_by_host(other);
  wait_for_current_stream("comparing tensors");
  return at::equal(alias_on_cpu(self), alias_on_cpu(other));
}

void record_stream_of_tensor(at::Tensor& self, c10::Stream stream) { record_stream(self.storage().data_ptr(), stream); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("_local_scalar_dense", local_scalar_dense);
  library.impl("equal", values_equal);
  library.impl("record_stream", record_stream_of_tensor);
}

// Else torch would first make a copy without the bit, which is again a copy of a tensor with the bit.
void register_copies_with_bits(torch::Library& library) {
  for (const char* name : {"_copy_from", "_copy_from_and_resize"})
    library.impl(name, torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, Conjugate, library) { register_copies_with_bits(library); }
TORCH_LIBRARY_IMPL(aten, Negative, library) { register_copies_with_bits(library); }

}  // namespace
}  // namespace sim
