// The CPU kernel under a sanitizer (make sanitize): every instruction set, rule, format and odd size, in buffers of
// exactly the bytes that the C ABI promises to stay within, from several callers at once; and what the ABI refuses.
#include <sys/wait.h>

#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <thread>
#include <vector>

#include "../../csrc/cpu_adam/adam.cpp"

namespace {

using offload::Format;
using offload::StateFormat;

int num_failures = 0;

void Expect(bool holds, const char* what, int a = 0, int b = 0, int c = 0) {
  if (holds) return;
  std::printf("FAILED: %s (%d, %d, %d)\n", what, a, b, c);
  ++num_failures;
}

// Memory of exactly num_bytes, so that the first byte beyond is poisoned.
class Exact {
 public:
  explicit Exact(size_t num_bytes) : bytes_(num_bytes ? static_cast<char*>(std::malloc(num_bytes)) : nullptr) {
    for (size_t i = 0; i < num_bytes; ++i) bytes_[i] = static_cast<char>(i % 61);
  }
  ~Exact() { std::free(bytes_); }
  Exact(const Exact&) = delete;
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(bytes_);
  }

 private:
  char* bytes_;
};

// One scalar struct serves all rules: large enough for each, every value harmless as float and as flag.
alignas(4) const float kScalars[10] = {0.5f, 0.25f, 0.5f, 0.25f, 0.5f, 0.5f, 0.5f, 0.25f, 0.5f, 0.0f};

int Update(int isa, int rule, int state_format, size_t numel, int grad_format, int param_format, int num_threads,
           size_t chunk_numel) {
  const size_t moment = offload::SizeOfMoment(static_cast<StateFormat>(state_format));
  const size_t num_blocks = (numel + offload::kStateBlock - 1) / offload::kStateBlock;
  const bool is_int8 = state_format == 3, has_first = rule != 2, has_second = rule == 0 || rule == 2;
  const Exact master(numel * (state_format == 0 ? 4 : 2)), first(numel * moment), second(numel * moment);
  const Exact max_second(numel * 4), first_scale(num_blocks * 4), second_scale(num_blocks * 4);
  const Exact grad(numel * offload::SizeOf(static_cast<Format>(grad_format)));
  const Exact param(numel * offload::SizeOf(static_cast<Format>(param_format)));
  const bool amsgrad = rule == 0 && state_format < 2;
  const OffloadWork work{isa,
                         rule,
                         state_format,
                         grad_format,
                         param_format,
                         master.as<void>(),
                         has_first ? first.as<void>() : nullptr,
                         has_second ? second.as<void>() : nullptr,
                         amsgrad ? max_second.as<float>() : nullptr,
                         is_int8 && has_first ? first_scale.as<float>() : nullptr,
                         is_int8 && has_second ? second_scale.as<float>() : nullptr,
                         grad.as<void>(),
                         param.as<void>(),
                         numel,
                         chunk_numel};
  return offload_update(&work, kScalars, 1, 0xfffffff0u, num_threads);
}

void EveryKind() {
  for (int isa = 0; isa < 3; ++isa) {
    if (!offload_adam_supports(isa)) continue;
    for (int rule = 0; rule < 4; ++rule)
      for (int state = 0; state < 4; ++state)
        for (int grad = 0; grad < 3; ++grad)
          for (int param = state == 0 ? -1 : 1; param < (state == 0 ? 3 : 2); ++param)
            for (size_t numel : {1, 7, 15, 16, 17, 63, 127, 128, 129, 1000})
              Expect(Update(isa, rule, state, numel, grad, param, 1, 128) == 0, "a known kind is refused", rule, state,
                     param);
  }
}

void ManyThreads() {
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller)
    callers.emplace_back([caller] {
      for (int i = 0; i < 20; ++i)
        Expect(Update(0, caller, i % 4, 5000 + i, 0, i % 4 ? 1 : -1, 4, 128) == 0, "refused beside others", caller, i);
    });
  for (std::thread& caller : callers) caller.join();
  const Exact memory(100001);
  offload_zero(memory.as<char>(), 100001, 4, 4096);
  for (size_t i = 0; i < 100001; ++i) Expect(memory.as<char>()[i] == 0, "not zeroed");
}

void AfterFork() {
  const pid_t child = fork();
  if (child == 0) {
    const bool fine = Update(0, 0, 0, 5000, 0, 0, 3, 128) == 0;
    std::_Exit(fine ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  Expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "an update after a fork");
}

void Refusals() {
  alignas(64) static char memory[4096];
  struct Arguments : OffloadWork {
    const void* scalars = kScalars;
    int num_threads = 1;
    int Call() const { return offload_update(this, scalars, 0, 0, num_threads); }
  };
  auto expect = [](int wanted, const char* what, auto change) {
    Arguments arguments{{0, 0, 0, 0, 0, memory, memory + 512, memory + 1024, nullptr, nullptr, nullptr, memory + 2048,
                         memory + 3072, 64, 128}};
    change(arguments);
    const int status = arguments.Call();
    Expect(status == wanted, what, status, wanted);
  };
  expect(0, "what is fine", [](Arguments&) {});
  expect(-1, "an instruction set", [](Arguments& a) { a.isa = 9; });
  expect(-1, "a rule", [](Arguments& a) { a.rule = 4; });
  expect(-1, "a state format", [](Arguments& a) { a.state_format = 4; });
  expect(-1, "a gradient's format", [](Arguments& a) { a.grad_format = 3; });
  expect(-1, "no gradient format", [](Arguments& a) { a.grad_format = -1; });
  expect(-1, "a parameter's format", [](Arguments& a) { a.param_format = 7; });
  expect(-1, "a compact state with a float32 parameter", [](Arguments& a) { a.state_format = 1; });
  expect(-2, "no master", [](Arguments& a) { a.master = nullptr; });
  expect(-2, "no first moment", [](Arguments& a) { a.first = nullptr; });
  expect(-2, "no second moment", [](Arguments& a) { a.second = nullptr; });
  expect(-2, "no gradient", [](Arguments& a) { a.grad = nullptr; });
  expect(-2, "no parameter", [](Arguments& a) { a.param = nullptr; });
  expect(-2, "no scalars", [](Arguments& a) { a.scalars = nullptr; });
  expect(-2, "no scales", [](Arguments& a) { a.state_format = 3, a.param_format = 1; });
  expect(-3, "a master between elements", [](Arguments& a) { a.master = memory + 2; });
  expect(-3, "a moment between elements", [](Arguments& a) { a.second = memory + 1025; });
  expect(-3, "a gradient between elements", [](Arguments& a) { a.grad = memory + 2049; });
  expect(-3, "a parameter between elements", [](Arguments& a) { a.param = memory + 3073, a.param_format = 1; });
  expect(-4, "no chunk", [](Arguments& a) { a.chunk_numel = 0; });
  expect(-4, "chunks that cut blocks", [](Arguments& a) {
    a.state_format = 3, a.param_format = 1, a.chunk_numel = 100;
    a.first_scale = a.second_scale = reinterpret_cast<float*>(memory + 1536);
  });
  expect(-4, "no thread", [](Arguments& a) { a.num_threads = 0; });
  expect(-4, "more elements than memory can hold", [](Arguments& a) { a.numel = ~size_t{0} / 2; });
}

}  // namespace

int main() {
  EveryKind();
  Refusals();
  AfterFork();
  ManyThreads();
  if (num_failures == 0) std::printf("all fine\n");
  return num_failures != 0;
}
