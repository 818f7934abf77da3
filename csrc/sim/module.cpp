// What offload/accelerators/sim.py calls. Times are in seconds, pointers are those of data_ptr().
#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/extension.h>

#include <cstring>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "device.h"
#include "faults.h"
#include "memory.h"
#include "pinned.h"
#include "tensors.h"

namespace py = pybind11;

namespace sim {
namespace {

void set_profile(int device, const std::map<std::string, double>& rates) {
  Profile profile = Runtime::get().profile(device);
  const std::map<std::string, double*> fields = {{"h2d_bytes_per_s", &profile.h2d_bytes_per_s},
                                                 {"d2h_bytes_per_s", &profile.d2h_bytes_per_s},
                                                 {"pageable_bytes_per_s", &profile.pageable_bytes_per_s},
                                                 {"memory_bytes_per_s", &profile.memory_bytes_per_s},
                                                 {"flops", &profile.flops},
                                                 {"device_update_params_per_s", &profile.update_params_per_s},
                                                 {"latency_s", &profile.latency_s},
                                                 {"peer_bytes_per_s", &profile.peer_bytes_per_s},
                                                 {"launch_s", &profile.launch_s},
                                                 {"both_bytes_per_s", &profile.both_bytes_per_s},
                                                 {"host_bytes_per_h2d_byte", &profile.host_bytes_per_h2d_byte},
                                                 {"host_bytes_per_d2h_byte", &profile.host_bytes_per_d2h_byte}};
  for (auto& [name, value] : rates) *fields.at(name) = value;
  Runtime::get().set_profile(device, profile);
}

py::list trace() {
  py::list rows;
  for (const TaskPtr& task : Runtime::get().spans())
    rows.append(py::make_tuple(name_of(task->name), task->stream, static_cast<int>(task->engine), task->start_s,
                               task->end_s, task->device, task->num_bytes));
  return rows;
}

py::bytes get_rng_state(int device) {
  at::Generator generator = default_generator(device);
  const at::Tensor state = generator.get_state();
  return {static_cast<const char*>(state.data_ptr()), static_cast<size_t>(state.numel())};
}

void set_rng_state(int device, const std::string& bytes) {
  at::Generator generator = default_generator(device);
  at::Tensor state = generator.get_state();
  TORCH_CHECK(bytes.size() == static_cast<size_t>(state.numel()), "RNG state has ", bytes.size(), " bytes, not ",
              state.numel());
  std::memcpy(state.data_ptr(), bytes.data(), bytes.size());
  generator.set_state(state);
}

void manual_seed(int device, uint64_t seed) {
  at::Generator generator = default_generator(device);
  generator.set_current_seed(seed);
}

}  // namespace
}  // namespace sim

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace sim;
  py::class_<HostMark>(m, "HostMark");
  m.def("configure", [](int executor, uint64_t seed, std::vector<size_t> script, bool races, bool poison) {
    Runtime::get().configure({static_cast<Executor>(executor), seed, std::move(script), races, poison});
  });
  m.def("choices", [] {
    std::vector<std::pair<size_t, std::optional<size_t>>> choices;
    for (const Choice& choice : Runtime::get().choices()) choices.emplace_back(choice.chosen, choice.next);
    return choices;
  });
  m.def("set_profile", &set_profile);
  m.attr("num_devices") = kNumDevices;
  m.def("capacity", [](int device) { return device_memory(device).capacity(); });
  m.def("live_bytes", [](int device) { return device_memory(device).live_bytes(); });
  m.def("set_capacity", [](int device, size_t num_bytes) { device_memory(device).set_capacity(num_bytes); });
  m.def("races", [] { return Runtime::get().races(); });
  m.def("clear_races", [] { Runtime::get().clear_races(); });
  m.def("counts", [] { return Runtime::get().counts(); });
  m.def("trace", &trace);
  m.def("host_access", [](const at::Tensor& tensor, bool is_write, const std::string& name) {
    Runtime::get().host_access(range_of(tensor, is_write), name);
  });
  m.def("last_write",
        [](const at::Tensor& tensor) { return Runtime::get().last_write(range_of(tensor, false).bytes); });
  m.def("warnings", [] { return Runtime::get().warnings(); });
  m.def("set_fault",
        [](int fault, uint64_t first, uint64_t count) { set_fault(static_cast<Fault>(fault), first, count); });
  m.def("num_occurrences", [](int fault) { return num_occurrences(static_cast<Fault>(fault)); });
  m.def("clear_faults", [] {
    for (int fault = 0; fault < kNumFaults; fault++) set_fault(static_cast<Fault>(fault), 0, 0);
  });
  m.def("begin_host_task", [] { fail_if_asked(Fault::kTask); });
  m.def("lock_pages", [](bool locks) { pinned_allocator().lock_pages(locks); });
  m.def("locks_pages", [] { return pinned_allocator().locks_pages(); });
  m.def("forbid_sync", [](bool is_forbidden) { Runtime::get().forbid_sync(is_forbidden); });
  m.def("report", [](const std::string& text) { Runtime::get().report(text); });
  m.def("host_charge", [](double seconds, double num_bytes, const std::string& name) {
    Runtime::get().host_charge(seconds, num_bytes, name);
  });
  m.def("set_host_memory", [](double bytes_per_s) { Runtime::get().set_host_memory(bytes_per_s); });
  m.def("host_time_s", [] { return Runtime::get().host_time_s(); });
  m.def("host_stamp", [] { return Runtime::get().host_stamp(); });
  m.def("time_s", [](const HostMark& mark) { return Runtime::get().time_s(mark); });
  m.def("own_host_clock", [] { Runtime::get().own_host_clock(); });
  m.def("host_mark", [] { return Runtime::get().host_mark(); });
  m.def("host_join", [](const HostMark& mark) { Runtime::get().host_join(mark); });
  m.def("manual_seed", &manual_seed);
  m.def("get_rng_state", &get_rng_state);
  m.def("set_rng_state", &set_rng_state);
  // Worker threads must be gone, and queued work done, before Python is.
  py::module_::import("atexit").attr("register")(py::cpp_function([] { Runtime::get().configure(Settings{}); }));
}
