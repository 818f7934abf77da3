// The device as torch sees it: its allocator, its current stream, its random numbers.
#pragma once
#include <ATen/core/Generator.h>
#include <c10/core/Allocator.h>
#include <c10/core/Device.h>
#include <c10/core/Storage.h>
#include <c10/core/Stream.h>

#include "runtime.h"

namespace sim {

constexpr auto kDeviceType = c10::DeviceType::PrivateUse1;
inline c10::Device device_at(int index) { return {kDeviceType, static_cast<c10::DeviceIndex>(index)}; }

int current_device();      // of the calling thread
Stream& current_stream();  // on that device
c10::Allocator* device_allocator();
void record_stream(const c10::DataPtr& data, const c10::Stream& stream);
void resize_storage(const c10::Storage& storage, size_t num_bytes);

const at::Generator& default_generator(int device);
// A CPU generator for one operation, seeded from `generator` (undefined: the default one). Seeds are drawn when
// operations are enqueued, in program order, so the executor makes no difference to random numbers.
at::Generator generator_for_operation(const at::Generator& generator);

}  // namespace sim
