#include "device.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <algorithm>
#include <cstring>

#include "memory.h"
#include "pinned.h"

namespace sim {
namespace {

thread_local int current_stream_id = 0;

c10::Stream as_torch(int stream_id) { return c10::Stream(c10::Stream::UNSAFE, kDevice, stream_id); }
Stream& from_torch(const c10::Stream& stream) { return Runtime::get().stream(static_cast<int>(stream.id())); }

class Allocator final : public c10::DeviceAllocator {
 public:
  at::DataPtr allocate(size_t num_bytes) override {
    void* pointer = device_memory().allocate(num_bytes, current_stream_id);
    return {pointer, pointer, &free, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* destination, const void* source, size_t num_bytes) const override {
    std::memcpy(device_memory().bytes_of(destination), device_memory().bytes_of(source), num_bytes);
  }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override { device_memory().release_cached(); }
  void recordStream(const at::DataPtr& data, c10::Stream stream) override { record_stream(data, stream); }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override { return device_memory().stats(); }
  void resetAccumulatedStats(c10::DeviceIndex) override { device_memory().reset_accumulated_stats(); }
  void resetPeakStats(c10::DeviceIndex) override { device_memory().reset_peak_stats(); }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex) override {
    return {device_memory().free_bytes(), device_memory().capacity()};
  }

 private:
  static void free(void* pointer) { device_memory().free(pointer); }
};

Allocator allocator;
REGISTER_ALLOCATOR(kDeviceType, &allocator)

struct Generator final : at::CPUGeneratorImpl {
  Generator() {
    device_ = kDevice;
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  }
};

class Hooks final : public at::PrivateUse1HooksInterface {
 public:
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Generator>(); }
  at::Device getDeviceFromPtr(void* pointer) const override {
    TORCH_CHECK(device_memory().owns(pointer), "sim: not a device pointer");
    return kDevice;
  }
  bool isPinnedPtr(const void* pointer) const override { return pinned_allocator().owns(pointer); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t num_bytes) const override {
    resize_storage(storage, num_bytes);
  }
};

// What a torch.Event holds: its last recording, none at first.
struct EventHandle {
  EventPtr recording;
  bool has_timing;
};

class Guard final : public c10::impl::DeviceGuardImplInterface {
 public:
  static constexpr c10::DeviceType static_type = kDeviceType;
  c10::DeviceType type() const override { return kDeviceType; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }

  c10::Stream getStream(c10::Device) const override { return as_torch(current_stream_id); }
  c10::Stream getDefaultStream(c10::Device) const override { return as_torch(0); }
  c10::Stream getNewStream(c10::Device, int) const override { return as_torch(Runtime::get().pool_stream().id); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return as_torch(std::exchange(current_stream_id, static_cast<int>(stream.id())));
  }
  bool queryStream(const c10::Stream& stream) const override { return Runtime::get().query(from_torch(stream)); }
  void synchronizeStream(const c10::Stream& stream) const override {
    Runtime::get().check_may_wait("synchronizing a stream");
    Runtime::get().synchronize(from_torch(stream));
  }
  void synchronizeDevice(c10::DeviceIndex) const override {
    Runtime::get().check_may_wait("synchronizing the device");
    Runtime::get().synchronize();
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override {
    record_stream(data, stream);
  }

  void record(void** event, const c10::Stream& stream, c10::DeviceIndex, c10::EventFlag flag) const override {
    if (!*event) *event = new EventHandle{nullptr, flag == c10::EventFlag::BACKEND_DEFAULT};
    static_cast<EventHandle*>(*event)->recording = Runtime::get().record(from_torch(stream));
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (EventPtr recording = recording_of(event)) Runtime::get().wait(from_torch(stream), recording);
  }
  bool queryEvent(void* event) const override {
    EventPtr recording = recording_of(event);
    return !recording || Runtime::get().query(recording);
  }
  void synchronizeEvent(void* event) const override {
    Runtime::get().check_may_wait("synchronizing an event");
    if (EventPtr recording = recording_of(event)) Runtime::get().synchronize(recording);
  }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override { delete static_cast<EventHandle*>(event); }
  double elapsedTime(void* from, void* to, c10::DeviceIndex) const override {
    EventPtr first = recording_of(from), second = recording_of(to);
    TORCH_CHECK(first && second, "Both events must be recorded before calculating elapsed time.");
    TORCH_CHECK(static_cast<EventHandle*>(from)->has_timing && static_cast<EventHandle*>(to)->has_timing,
                "Both events must be created with argument 'enable_timing=True'.");
    TORCH_CHECK(first->is_done && second->is_done, "Both events must be completed before calculating elapsed time.");
    return Runtime::get().elapsed_s(*first, *second) * 1e3;
  }

 private:
  static EventPtr recording_of(void* event) { return event ? static_cast<EventHandle*>(event)->recording : nullptr; }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

[[maybe_unused]] const bool hooks_registered = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  return true;
}();

}  // namespace

Stream& current_stream() { return Runtime::get().stream(current_stream_id); }

c10::Allocator* device_allocator() { return &allocator; }

void record_stream(const c10::DataPtr& data, const c10::Stream& stream) {
  device_memory().record_use(data.get(), static_cast<int>(stream.id()));
}

void resize_storage(const c10::Storage& storage, size_t num_bytes) {
  c10::StorageImpl* impl = storage.unsafeGetStorageImpl();
  at::DataPtr data = allocator.allocate(num_bytes);
  if (const size_t num_kept = std::min(num_bytes, impl->nbytes())) {
    const auto from = reinterpret_cast<uintptr_t>(impl->data()), to = reinterpret_cast<uintptr_t>(data.get());
    char *destination = device_memory().bytes_of(data.get()), *source = device_memory().bytes_of(impl->data());
    static const NameId kResize = intern("resize");
    Operation operation;
    operation.name = kResize;
    operation.run = [destination, source, num_kept] { std::memcpy(destination, source, num_kept); };
    operation.cost.num_bytes = 2.0 * static_cast<double>(num_kept);
    operation.accesses = {{{from, from + num_kept, nullptr}, false}, {{to, to + num_kept, nullptr}, true}};
    operation.access_kind = Access::Kind::kCopy;
    Runtime::get().enqueue(current_stream(), std::move(operation));
  }
  impl->set_data_ptr_noswap(std::move(data));
  impl->set_nbytes(num_bytes);
}

const at::Generator& default_generator() {
  static const at::Generator generator = at::make_generator<Generator>();
  return generator;
}

at::Generator generator_for_operation(const at::Generator& generator) {
  at::Generator source = generator.defined() ? generator : default_generator();
  TORCH_CHECK(source.device().type() == kDeviceType, "Expected a 'sim' device type for generator but found '",
              source.device().type(), "'");
  std::lock_guard<std::mutex> guard(source.mutex());
  const uint64_t seed = static_cast<at::CPUGeneratorImpl*>(source.unsafeGetGeneratorImpl())->random64();
  return at::make_generator<at::CPUGeneratorImpl>(seed);
}

}  // namespace sim
