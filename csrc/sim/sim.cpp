#include "runtime.h"
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/SDPBackend.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>
#include <torch/library.h>

namespace sim {
constexpr auto PU1 = c10::DeviceType::PrivateUse1;
const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);
Memory& mem() { static Memory* m = [] { auto* x = new Memory; x->init(size_t(1) << 30); return x; }(); return *m; }
Runtime& rt() {
  static Runtime* r = [] {
    auto* x = new Runtime;
    x->guard_run = [](Op& op) {
      at::AutoDispatchBelowADInplaceOrView g;
      c10::impl::ExcludeDispatchKeyGuard no(c10::autocast_dispatch_keyset | c10::python_ks);
      op.fn();
    };
    return x;
  }();
  return *r;
}
thread_local int cur_stream = 0;
Stream* cur() { return rt().stream(cur_stream); }
c10::Stream wrap(int id) { return c10::Stream(c10::Stream::UNSAFE, c10::Device(PU1, 0), id); }

// ---------------- allocator, pinned host allocator
struct Alloc final : c10::DeviceAllocator {
  static void del(void* p) { mem().free(p); }
  at::DataPtr allocate(size_t n) override { void* p = mem().alloc(n, cur_stream); return {p, p, &del, c10::Device(PU1, 0)}; }
  c10::DeleterFnPtr raw_deleter() const override { return &del; }
  void copy_data(void* d, const void* s, size_t n) const override { memcpy(mem().real(d), mem().real(s), n); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override { rt().sync_device(); std::lock_guard<std::mutex> g(mem().m); mem().process_pending(); mem().release_cached(); }
  void recordStream(const at::DataPtr& p, c10::Stream s) override {
    auto& M = mem(); std::lock_guard<std::mutex> g(M.m); auto it = M.live.find((char*)p.get() - M.fake);
    if (it != M.live.end() && it->second.stream != s.id()) it->second.uses.insert((int)s.id());
  }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override { std::lock_guard<std::mutex> g(mem().m); return mem().st; }
  void resetAccumulatedStats(c10::DeviceIndex) override { auto& s = mem().st; for (auto* a : {&s.allocated_bytes, &s.reserved_bytes, &s.active_bytes, &s.requested_bytes}) for (auto& x : *a) x.reset_accumulated(); }
  void resetPeakStats(c10::DeviceIndex) override { auto& s = mem().st; for (auto* a : {&s.allocated_bytes, &s.reserved_bytes, &s.active_bytes, &s.requested_bytes}) for (auto& x : *a) x.reset_peak(); }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex) override { return {mem().cap - mem().st.reserved_bytes[0].current, mem().cap}; }
};
Alloc g_alloc; REGISTER_ALLOCATOR(PU1, &g_alloc);

struct Pinned final : at::HostAllocator { // no cache: an in-flight copy keeps its block alive (what record_event does on CUDA)
  struct B { size_t n; int uses; bool freed; };
  std::mutex m; std::map<size_t, B> live; at::HostStats st;
  std::map<size_t, B>::iterator find(const void* p) { auto it = live.upper_bound((size_t)p); if (it == live.begin()) return live.end(); --it; return (size_t)p < it->first + it->second.n ? it : live.end(); }
  void use(const void* p, int d) { std::lock_guard<std::mutex> g(m); auto it = find(p); if (it == live.end()) return; it->second.uses += d; if (it->second.freed && !it->second.uses) { ::free((void*)it->first); live.erase(it); } }
  static void del(void* p);
  at::DataPtr allocate(size_t n) override {
    if (!n) return {nullptr, nullptr, &del, at::Device(at::kCPU)};
    void* p = nullptr; TORCH_CHECK(posix_memalign(&p, 4096, n) == 0, "pinned allocation failed");
    std::lock_guard<std::mutex> g(m); live[(size_t)p] = B{n, 0, false}; st.allocated_bytes.increase(n); st.active_bytes.increase(n); st.num_host_alloc++;
    return {p, p, &del, at::Device(at::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &del; }
  void copy_data(void* d, const void* s, size_t n) const override { memcpy(d, s, n); }
  bool record_event(void*, void*, c10::Stream) override { return true; }
  void empty_cache() override {}
  at::HostStats get_stats() override { return st; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
  bool owns(const void* p) { std::lock_guard<std::mutex> g(m); return find(p) != live.end(); }
};
Pinned g_pinned;
void Pinned::del(void* p) { if (!p) return; std::lock_guard<std::mutex> g(g_pinned.m); auto it = g_pinned.live.find((size_t)p); g_pinned.st.allocated_bytes.decrease(it->second.n); g_pinned.st.active_bytes.decrease(it->second.n);
  if (it->second.uses) it->second.freed = true; else { g_pinned.live.erase(it); ::free(p); } }
REGISTER_HOST_ALLOCATOR(PU1, &g_pinned);

// ---------------- generator: own seed; each op gets its own CPU generator (program order, like philox offsets)
struct Gen final : at::CPUGeneratorImpl {
  Gen() : at::CPUGeneratorImpl() { device_ = c10::Device(PU1, 0); key_set_ = kKeys; }
};
at::Generator& default_gen() { static at::Generator g = at::make_generator<Gen>(); return g; }
at::Generator op_gen(const c10::IValue& v) {
  at::Generator g = v.isNone() ? default_gen() : v.toGenerator();
  TORCH_CHECK(g.device().type() == PU1, "Expected a 'sim' device type for generator but found '", g.device().type(), "'");
  std::lock_guard<std::mutex> l(g.mutex());
  return at::make_generator<at::CPUGeneratorImpl>(static_cast<at::CPUGeneratorImpl*>(g.unsafeGetGeneratorImpl())->random64());
}

// ---------------- hooks and guard
struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_gen(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Gen>(); }
  at::Device getDeviceFromPtr(void* p) const override { TORCH_CHECK(mem().owns(p), "not a sim pointer"); return at::Device(PU1, 0); }
  bool isPinnedPtr(const void* p) const override { return g_pinned.owns(p); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &g_pinned; }
  void resizePrivateUse1Bytes(const c10::Storage& s, size_t n) const override {
    auto* impl = s.unsafeGetStorageImpl(); auto p = g_alloc.allocate(n); size_t k = std::min(n, impl->nbytes());
    if (k) { char *d = mem().real(p.get()), *q = mem().real(impl->data()); Op op; op.name = "resize"; op.bytes = 2.0 * k; op.fn = [d, q, k] { memcpy(d, q, k); }; rt().enqueue(cur(), std::move(op), {{(size_t)q, (size_t)q + k, false}, {(size_t)d, (size_t)d + k, true}}); }
    impl->set_data_ptr_noswap(std::move(p)); impl->set_nbytes(n);
  }
};
struct Event { Ev rec; bool timing; };
struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = PU1;
  c10::DeviceType type() const override { return PU1; }
  c10::Device exchangeDevice(c10::Device) const override { return c10::Device(PU1, 0); }
  c10::Device getDevice() const override { return c10::Device(PU1, 0); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(c10::Device) const override { return wrap(cur_stream); }
  c10::Stream getDefaultStream(c10::Device) const override { return wrap(0); }
  c10::Stream getNewStream(c10::Device, int) const override { return wrap(rt().new_stream()->id); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return wrap(rt().new_stream()->id); }
  c10::Stream exchangeStream(c10::Stream s) const override { int old = cur_stream; cur_stream = (int)s.id(); return wrap(old); }
  bool queryStream(const c10::Stream& s) const override { return rt().query_stream(rt().stream((int)s.id())); }
  void synchronizeStream(const c10::Stream& s) const override { rt().sync_stream(rt().stream((int)s.id())); }
  void synchronizeDevice(c10::DeviceIndex) const override { rt().sync_device(); }
  void destroyEvent(void* e, c10::DeviceIndex) const noexcept override { delete (Event*)e; }
  void record(void** e, const c10::Stream& s, c10::DeviceIndex, c10::EventFlag f) const override {
    if (!*e) *e = new Event{nullptr, f == c10::EventFlag::BACKEND_DEFAULT};
    auto r = std::make_shared<EventRec>(); ((Event*)*e)->rec = r;
    Op op; op.kind = Op::RECORD; op.ev = r; rt().enqueue(rt().stream((int)s.id()), std::move(op));
  }
  void block(void* e, const c10::Stream& s) const override {
    if (!e || !((Event*)e)->rec) return;
    Op op; op.kind = Op::WAIT; op.ev = ((Event*)e)->rec; rt().enqueue(rt().stream((int)s.id()), std::move(op));
  }
  bool queryEvent(void* e) const override { return !e || rt().query_event(((Event*)e)->rec); }
  void synchronizeEvent(void* e) const override { if (e) rt().sync_event(((Event*)e)->rec); }
  void recordDataPtrOnStream(const c10::DataPtr& p, const c10::Stream& s) const override { g_alloc.recordStream(p, s); }
  double elapsedTime(void* a, void* b, c10::DeviceIndex) const override {
    TORCH_CHECK(a && b && ((Event*)a)->rec && ((Event*)b)->rec, "Both events must be recorded before calculating elapsed time.");
    auto x = ((Event*)a)->rec, y = ((Event*)b)->rec;
    TORCH_CHECK(((Event*)a)->timing && ((Event*)b)->timing, "Both events must be created with argument 'enable_timing=True'.");
    TORCH_CHECK(x->done && y->done, "Both events must be completed before calculating elapsed time.");
    return (rt().mode == THREADS ? y->wall - x->wall : y->vt - x->vt) / 1e3;
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// ---------------- tensors
at::Tensor alias_cpu(const at::Tensor& t) { // same bytes, cpu tensor over the backing memory; holds no reference, as a kernel on CUDA
  void* p = t.numel() ? mem().real(t.data_ptr()) : nullptr;
  return at::from_blob(p, t.sizes(), t.strides(), t.options().device(at::kCPU).requires_grad(false));
}
at::Tensor alias_out(const at::Tensor& t) { // some CPU out= kernels resize their output on the way (mse_loss.out): let them, and copy back
  void* p = t.numel() ? mem().real(t.data_ptr()) : nullptr;
  return at::for_blob(p, t.sizes()).strides(t.strides()).options(t.options().device(at::kCPU).requires_grad(false)).resizeable_storage().allocator(c10::GetCPUAllocator()).make_tensor();
}
at::Tensor to_meta(const at::Tensor& t) {
  at::Tensor m = at::detail::empty_strided_meta(t.sizes(), t.strides(), t.scalar_type());
  if (t.unsafeGetTensorImpl()->is_wrapped_number()) m.unsafeGetTensorImpl()->set_wrapped_number(true);
  return m;
}
Range range_of(const at::Tensor& t, bool w) { // byte range touched (bounding box)
  if (!t.numel()) return {0, 0, w};
  size_t lo = (size_t)(t.device().type() == PU1 ? mem().real(t.data_ptr()) : t.data_ptr()), ext = 1;
  for (int64_t i = 0; i < t.dim(); i++) ext += (t.size(i) - 1) * t.stride(i);
  return {lo, lo + ext * t.element_size(), w};
}
at::Tensor empty_strided(at::IntArrayRef sz, at::IntArrayRef st, std::optional<at::ScalarType> d, std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool> pin) {
  TORCH_CHECK(!c10::pinned_memory_or_default(pin), "Only dense CPU tensors can be pinned");
  return at::detail::empty_strided_generic(sz, st, &g_alloc, kKeys, c10::dtype_or_default(d));
}
at::Tensor empty_mf(at::IntArrayRef sz, std::optional<at::ScalarType> d, std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool> pin, std::optional<at::MemoryFormat> mf) {
  TORCH_CHECK(!c10::pinned_memory_or_default(pin), "Only dense CPU tensors can be pinned");
  return at::detail::empty_generic(sz, &g_alloc, kKeys, c10::dtype_or_default(d), mf);
}
const at::Tensor& resize_(const at::Tensor& self, at::IntArrayRef sz, std::optional<at::MemoryFormat> mf) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(sz);
  size_t need = (impl->numel() + impl->storage_offset()) * impl->itemsize();
  if (need > impl->storage().nbytes()) Hooks().resizePrivateUse1Bytes(impl->storage(), need);
  if (mf && *mf != at::MemoryFormat::Preserve) impl->empty_tensor_restride(*mf);
  return self;
}
void enqueue_copy(const at::Tensor& dst, const at::Tensor& src, Engine eng, bool pageable, bool hold_host) {
  auto d = alias_cpu(dst), s = alias_cpu(src); // never a tensor known to python: dropping it on a worker thread would need the GIL
  void* hp = eng == H2D ? src.data_ptr() : eng == D2H ? dst.data_ptr() : nullptr; if (hp && !pageable) g_pinned.use(hp, 1); else hp = nullptr;
  Op op; op.name = eng == H2D ? "h2d" : eng == D2H ? "d2h" : "d2d"; op.eng = eng; op.pageable = pageable;
  op.bytes = double(dst.nbytes()) * (eng == COMPUTE ? 2 : 1);
  op.fn = [d, s, hp]() mutable { at::AutoDispatchBelowADInplaceOrView g; d.copy_(s); if (hp) g_pinned.use(hp, -1); };
  rt().enqueue(cur(), std::move(op), {range_of(src, false), range_of(dst, true)});
}
at::Tensor copy_from(const at::Tensor& self, const at::Tensor& dst_, bool nb) {
  at::Tensor dst = dst_;
  if (!self.numel()) return dst;
  bool sd = self.device().type() == PU1, dd = dst.device().type() == PU1;
  if (sd && dd) { enqueue_copy(dst, self.sizes() == dst.sizes() ? self : self.expand_as(dst), COMPUTE, false, false); return dst; }
  at::Tensor s = self.sizes() == dst.sizes() ? self : self.expand_as(dst);
  if (!sd) { // H2D; a dtype change or strided source goes through temporaries as on CUDA
    bool pinned = g_pinned.owns(self.data_ptr());
    if (s.dtype() != dst.dtype() || !s.is_contiguous()) { s = s.to(dst.scalar_type()).contiguous(); pinned = false; }
    enqueue_copy(dst, s, H2D, !pinned, true);
    if (!nb || !pinned) rt().sync_stream(cur());
  } else {
    bool pinned = g_pinned.owns(dst.data_ptr());
    if (s.dtype() != dst.dtype() || !s.is_contiguous()) s = s.to(dst.scalar_type()).contiguous(); // on the device
    bool direct = dst.is_contiguous(); at::Tensor tmp = direct ? dst : at::empty(dst.sizes(), dst.options());
    enqueue_copy(tmp, s, D2H, !pinned, true);
    if (!nb || !pinned || !direct) rt().sync_stream(cur());
    if (!direct) dst.copy_(tmp);
  }
  return dst;
}
at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& dst) { at::native::resize_output(dst, self.sizes()); return copy_from(self, dst, false); }
at::Scalar local_scalar(const at::Tensor& t) { rt().sync_stream(cur()); return alias_cpu(t).item(); }
void record_stream(at::Tensor& t, c10::Stream s) { g_alloc.recordStream(t.storage().data_ptr(), s); }
bool equal(const at::Tensor& a, const at::Tensor& b) { rt().sync_stream(cur()); return at::equal(alias_cpu(a), alias_cpu(b)); }
int64_t sdp_choice(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double, bool, std::optional<double>, bool) { return (int64_t)at::SDPBackend::math; }

// ---------------- the fallback: shapes by the Meta kernel, bytes by the CPU kernel, on the current stream
template <class F> c10::IValue map_tensors(const c10::IValue& v, F f) {
  if (v.isTensor()) { auto t = v.toTensor(); return t.defined() ? c10::IValue(f(t)) : v; }
  if (v.isTensorList()) { c10::List<at::Tensor> o; for (auto& t : v.toTensorVector()) o.push_back(t.defined() ? f(t) : t); return o; }
  if (v.isOptionalTensorList()) { c10::List<std::optional<at::Tensor>> o; for (auto t : v.toOptionalTensorVector()) o.push_back(t && t->defined() ? std::optional<at::Tensor>(f(*t)) : t); return o; }
  return v;
}
enum class Path { ASYNC, SYNCED, VIEW };
// shapes repeat from step to step: Meta results are cached by (op, argument metadata, scalars), else python meta kernels cost ~0.3 ms an op
bool key_of(std::string& k, const c10::IValue& v) {
  auto put = [&](const void* p, size_t n) { k.append((const char*)p, n); };
  auto num = [&](auto x) { put(&x, sizeof x); };
  auto ten = [&](const at::Tensor& t) {
    if (!t.defined()) { k += 'u'; return; }
    k += t.device().type() == PU1 ? 't' : t.unsafeGetTensorImpl()->is_wrapped_number() ? 'w' : 'c'; k += (char)t.scalar_type(); num(t.dim());
    put(t.sizes().data(), 8 * t.dim()); put(t.strides().data(), 8 * t.dim()); };
  if (v.isNone()) k += 'n';
  else if (v.isTensor()) ten(v.toTensor());
  else if (v.isTensorList()) { k += 'L'; auto l = v.toTensorVector(); num(l.size()); for (auto& t : l) ten(t); }
  else if (v.isOptionalTensorList()) { k += 'O'; auto l = v.toOptionalTensorVector(); num(l.size()); for (auto& t : l) if (t) { if (t->defined() && (t->scalar_type() == at::kBool || t->scalar_type() == at::kByte)) return false; ten(*t); } else k += 'n'; }
  else if (v.isInt()) { k += 'i'; num(v.toInt()); } else if (v.isDouble()) { k += 'd'; num(v.toDouble()); } else if (v.isBool()) { k += v.toBool() ? 'T' : 'F'; }
  else if (v.isIntList()) { k += 'I'; auto l = v.toIntVector(); num(l.size()); put(l.data(), 8 * l.size()); }
  else if (v.isBoolList()) { k += 'B'; auto l = v.toBoolList(); num(l.size()); for (bool b : l) k += b ? '1' : '0'; }
  else if (v.isString()) { k += 's'; k += v.toStringRef(); k += '\0'; } else if (v.isDevice() || v.isGenerator()) k += 'g';
  else return false;
  return true;
}
std::unordered_map<std::string, torch::jit::Stack> meta_cache; uint64_t meta_hit = 0, meta_miss = 0;
std::mutex path_m; std::unordered_map<std::string, Path> paths;
Path classify(const c10::OperatorHandle& op) {
  for (auto& r : op.schema().returns()) {
    if (r.alias_info() && !r.alias_info()->isWrite()) return Path::VIEW;
    auto k = r.type()->kind();
    bool ok = k == c10::TypeKind::TensorType || (k == c10::TypeKind::ListType && r.type()->castRaw<c10::ListType>()->getElementType()->kind() == c10::TypeKind::TensorType);
    if (!ok) return Path::SYNCED;
  }
  if (!rt().async_compute || op.hasTag(at::Tag::dynamic_output_shape) || op.hasTag(at::Tag::data_dependent_output)) return Path::SYNCED;
  return op.hasComputedKernelForDispatchKey(c10::DispatchKey::Meta) ? Path::ASYNC : Path::SYNCED;
}
void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  auto& schema = op.schema(); const size_t n = schema.arguments().size(), nr = schema.returns().size();
  const std::string name = schema.name() + (schema.overload_name().empty() ? "" : "." + schema.overload_name());
  Path path; { std::lock_guard<std::mutex> g(path_m); auto it = paths.find(name); path = it != paths.end() ? it->second : (paths[name] = classify(op)); }
  auto last = torch::jit::last(*stack, n); std::vector<c10::IValue> args(last.begin(), last.end());
  // device checks, access ranges, generators
  std::vector<Range> ranges; double bytes = 0;
  for (size_t i = 0; i < n; i++) {
    auto& a = schema.arguments()[i]; bool w = a.alias_info() && a.alias_info()->isWrite(), idx = args[i].isOptionalTensorList();
    map_tensors(args[i], [&](const at::Tensor& t) {
      if (t.device().type() == PU1) { ranges.push_back(range_of(t, w)); bytes += t.nbytes(); }
      else TORCH_CHECK(t.device().is_cpu() && (t.dim() == 0 || idx) && !w, "Expected all tensors to be on the same device, but found at least two devices, sim:0 and ", t.device(), "! (argument ", a.name(), " in ", name, ")");
      return t;
    });
  }
  auto gen_fix = [&](torch::jit::Stack& st) { for (size_t i = 0; i < n; i++) {
    auto& ty = schema.arguments()[i].type();
    if (ty->kind() == c10::TypeKind::OptionalType && ty->castRaw<c10::OptionalType>()->getElementType()->kind() == c10::TypeKind::GeneratorType) st[i] = op_gen(args[i]);
    else if (st[i].isDevice()) st[i] = c10::Device(at::kCPU);
  } };
  auto cpu_arg = [](const at::Tensor& t) { // kernels get cpu scalars by value at launch
    if (t.device().type() == PU1) return alias_cpu(t);
    auto c = t.clone(); if (t.unsafeGetTensorImpl()->is_wrapped_number()) c.unsafeGetTensorImpl()->set_wrapped_number(true); return c; };
  if (path == Path::ASYNC) {
    torch::jit::Stack ms; std::vector<at::Tensor> metas; ms.reserve(n);
    std::vector<std::pair<at::Tensor, at::Tensor>> written; // (original, meta)
    for (size_t i = 0; i < n; i++) {
      auto& a = schema.arguments()[i]; bool w = a.alias_info() && a.alias_info()->isWrite();
      if (args[i].isDevice()) ms.emplace_back(c10::Device(at::kMeta));
      else if (args[i].isGenerator()) ms.emplace_back();
      else ms.push_back(map_tensors(args[i], [&](const at::Tensor& t) { if (t.device().type() != PU1 && t.dim() == 0) return t; auto m = to_meta(t); if (w) written.emplace_back(t, m); return m; }));
    }
    std::string key = name; bool hit = false, cachable = true;
    for (auto& a : args) if (!(cachable = key_of(key, a))) break;
    if (cachable) { std::lock_guard<std::mutex> g(path_m); auto it = meta_cache.find(key); if (it != meta_cache.end()) { ms = it->second; hit = true; meta_hit++; } else meta_miss++; }
    if (!hit) try { op.callBoxedForDispatchKey(c10::DispatchKey::Meta, ms); }
    catch (c10::NotImplementedError&) { path = Path::SYNCED; std::lock_guard<std::mutex> g(path_m); paths[name] = path; }
    catch (std::exception& e) { if (!strstr(e.what(), "NotImplementedError")) throw; path = Path::SYNCED; } // e.g. a boolean mask index
    if (path == Path::ASYNC) for (auto& r : ms) map_tensors(r, [&](const at::Tensor& t) { if (!t.is_meta()) path = Path::SYNCED; return t; });
    if (path == Path::ASYNC) {
      for (auto& [t, m] : written) if (t.sizes() != m.sizes()) cachable = false;
      if (cachable && !hit) { std::lock_guard<std::mutex> g(path_m); if (meta_cache.size() > 20000) meta_cache.clear(); meta_cache[key] = ms; }
      if (!hit) for (auto& [t, m] : written) if (t.sizes() != m.sizes()) resize_(t, m.sizes(), std::nullopt);
      torch::jit::Stack cs; cs.reserve(n + nr);
      std::vector<std::pair<at::Tensor, at::Tensor>> back;
      for (size_t i = 0; i < n; i++) { auto& a = schema.arguments()[i]; bool out = a.alias_info() && a.alias_info()->isWrite() && a.kwarg_only();
        cs.push_back(map_tensors(args[i], [&](const at::Tensor& t) { if (!out) return cpu_arg(t); auto x = alias_out(t); back.emplace_back(x, alias_cpu(t)); return x; })); }
      gen_fix(cs);
      // outputs
      torch::jit::Stack outs; std::vector<std::pair<size_t, at::Tensor>> dsts; // flat index -> cpu alias of the output
      size_t flat = 0, warg = 0; double flop = 0;
      std::vector<c10::IValue> wargs;
      for (size_t i = 0; i < n; i++) { auto& a = schema.arguments()[i]; if (a.alias_info() && a.alias_info()->isWrite()) wargs.push_back(args[i]); }
      for (size_t i = 0; i < nr; i++) {
        auto& r = schema.returns()[i];
        if (r.alias_info() && warg < wargs.size()) { outs.push_back(wargs[warg++]); flat += outs.back().isTensorList() ? outs.back().toTensorVector().size() : 1; continue; }
        outs.push_back(map_tensors(ms[i], [&](const at::Tensor& m) {
          at::Tensor o = at::detail::empty_strided_generic(m.sizes(), m.strides(), &g_alloc, kKeys, m.scalar_type());
          if (o.numel()) { dsts.emplace_back(flat, alias_cpu(o)); ranges.push_back(range_of(o, true)); bytes += o.nbytes(); }
          flat++; return o; }));
        if (ms[i].isTensor() && !ms[i].toTensor().defined()) flat++;
      }
      if (name == "aten::mm" || name == "aten::bmm" || name == "aten::addmm" || name == "aten::baddbmm") {
        auto& x = args[name[6] == 'a' ? (name == "aten::addmm" || name == "aten::baddbmm" ? 1 : 0) : 0].toTensor(); auto& o = outs[0].toTensor();
        flop = 2.0 * o.numel() * x.size(-1);
      }
      Op o; o.name = name; o.bytes = bytes; o.flop = flop;
      bool ln = name == "aten::native_layer_norm_backward"; // Meta says fp32 statistics (as on CUDA), the CPU kernel wants them in the weight's dtype
      o.fn = [op, ln, cs = std::move(cs), dsts = std::move(dsts), back = std::move(back)]() mutable {
        if (ln) { auto dt = cs[5].isTensor() && cs[5].toTensor().defined() ? cs[5].toTensor().scalar_type() : cs[1].toTensor().scalar_type(); for (int i : {3, 4}) cs[i] = cs[i].toTensor().to(dt); }
        op.callBoxedForDispatchKey(c10::DispatchKey::CPU, cs);
        for (auto& [x, y] : back) if (x.numel() && x.data_ptr() != y.data_ptr()) y.copy_(x);
        if (dsts.empty()) return;
        size_t flat = 0, k = 0;
        for (auto& v : cs) {
          auto one = [&](const at::Tensor& t) { if (k < dsts.size() && dsts[k].first == flat) { if (t.defined() && t.numel()) dsts[k].second.copy_(t); k++; } flat++; };
          if (v.isTensorList()) for (auto& t : v.toTensorVector()) one(t); else one(v.toTensor());
        }
      };
      rt().enqueue(cur(), std::move(o), ranges);
      torch::jit::drop(*stack, n); for (auto& v : outs) stack->push_back(std::move(v));
      return;
    }
  }
  // views (no data touched) and ops whose output shape depends on data (the host waits, as nonzero does on CUDA)
  if (path == Path::SYNCED) { rt().n_sync_ops++; Op o; o.name = name + " (host waits)"; o.bytes = bytes; o.fn = [] {}; rt().enqueue(cur(), std::move(o), ranges); rt().sync_stream(cur()); }
  std::vector<std::pair<at::Tensor, at::Tensor>> al; // original, alias
  torch::jit::Stack cs;
  for (size_t i = 0; i < n; i++) {
    auto& a = schema.arguments()[i]; bool out = a.alias_info() && a.alias_info()->isWrite() && a.kwarg_only();
    cs.push_back(map_tensors(args[i], [&](const at::Tensor& t) { auto c = out ? at::empty({0}, t.options().device(at::kCPU)) : cpu_arg(t); if (t.device().type() == PU1) al.emplace_back(t, c); return c; }));
  }
  gen_fix(cs);
  { at::AutoDispatchBelowADInplaceOrView g; op.callBoxedForDispatchKey(c10::DispatchKey::CPU, cs); }
  torch::jit::drop(*stack, n);
  for (size_t i = 0; i < nr; i++) {
    auto* ai = schema.returns()[i].alias_info();
    stack->push_back(map_tensors(cs[i], [&](const at::Tensor& t) -> at::Tensor {
      if (ai) for (auto& [o, c] : al) {
        if (ai->isWrite() && c.is_same(t)) { if (c.sizes() != o.sizes()) resize_(o, c.sizes(), std::nullopt); if (c.numel() && c.data_ptr() != mem().real(o.data_ptr())) alias_cpu(o).copy_(c); return o; }
        if (!ai->isWrite() && c.storage().unsafeGetStorageImpl() == t.storage().unsafeGetStorageImpl()) {
          at::Tensor v = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(o.storage()), o.key_set(), t.dtype());
          int64_t off = (o.storage_offset() * o.element_size() + t.storage_offset() * t.element_size()) / t.element_size();
          v.unsafeGetTensorImpl()->set_storage_offset(off); v.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides()); return v;
        }
      }
      at::Tensor o = at::detail::empty_strided_generic(t.sizes(), t.strides(), &g_alloc, kKeys, t.scalar_type());
      if (o.numel()) alias_cpu(o).copy_(t);
      return o; }));
  }
}
at::Tensor as_strided(const at::Tensor& s, c10::SymIntArrayRef sz, c10::SymIntArrayRef st, std::optional<c10::SymInt> off) {
  at::Tensor v = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(s.storage()), s.key_set(), s.dtype());
  v.unsafeGetTensorImpl()->set_storage_offset(off ? off->expect_int() : s.storage_offset());
  v.unsafeGetTensorImpl()->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(sz), C10_AS_INTARRAYREF_SLOW(st)); return v;
}
at::Tensor view(const at::Tensor& s, c10::SymIntArrayRef sz) { return at::native::view(s, C10_AS_INTARRAYREF_SLOW(sz)); }
at::Tensor reshape_alias(const at::Tensor& s, c10::SymIntArrayRef sz, c10::SymIntArrayRef st) { return as_strided(s, sz, st, std::nullopt); }
at::Tensor& set_storage(at::Tensor& t, at::Storage s, int64_t off, at::IntArrayRef sz, at::IntArrayRef st) {
  t.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(s)); t.unsafeGetTensorImpl()->set_storage_offset(off); if (st.empty()) t.unsafeGetTensorImpl()->set_sizes_contiguous(sz); else t.unsafeGetTensorImpl()->set_sizes_and_strides(sz, st); return t;
}
at::Tensor& set_source(at::Tensor& t, at::Storage s) { int64_t n = s.nbytes() / t.element_size(); return set_storage(t, std::move(s), 0, {n}, {1}); }
at::Tensor& set_tensor(at::Tensor& t, const at::Tensor& o) { return set_storage(t, o.storage(), o.storage_offset(), o.sizes(), o.strides()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty_mf); m.impl("empty_strided", empty_strided); m.impl("as_strided", as_strided); m.impl("resize_", [](const at::Tensor& t, c10::SymIntArrayRef s, std::optional<at::MemoryFormat> mf) -> const at::Tensor& { return resize_(t, C10_AS_INTARRAYREF_SLOW(s), mf); });
  m.impl("_reshape_alias", reshape_alias); m.impl("view", view); m.impl("_copy_from", copy_from); m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar); m.impl("set_.source_Tensor", set_tensor); m.impl("set_.source_Storage", set_source);
  m.impl("set_.source_Storage_storage_offset", set_storage); m.impl("record_stream", record_stream); m.impl("equal", equal); m.impl("_fused_sdp_choice", sdp_choice);
  m.impl("_has_compatible_shallow_copy_type", [](const at::Tensor& a, const at::Tensor& b) { return (a.is_cpu() || a.is_privateuseone()) && (b.is_cpu() || b.is_privateuseone()); }); // keeps tied weights tied in Module.to
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
} // namespace sim
namespace at::autocast { TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define _L(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
  AT_FORALL_LOWER_PRECISION_FP(_L)
#define _F(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
  AT_FORALL_FP32(_F)
#define _P(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_PROMOTE(_P)
} }
namespace at::native { REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &sim::sdp_choice); }

namespace py = pybind11;
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace sim;
  at::RegisterPrivateUse1HooksInterface(new Hooks);

  m.def("set_capacity", [](size_t c) { rt().sync_device(); g_alloc.emptyCache({0, 0}); mem().init(c); mem().st = {}; });
  m.def("capacity", [] { return mem().cap; });
  m.def("live_bytes", [] { return mem().st.allocated_bytes[0].current; });
  m.def("configure", [](int x, uint64_t seed, bool races, bool poison) { { py::gil_scoped_release r; rt().set_mode((Mode)x); rt().rng.seed(seed); } auto& R = rt(); R.races_on = races; R.poison = poison; R.trace_on = true; R.races.clear(); R.hist.clear(); R.trace.clear(); R.n_ops = R.n_sync_ops = 0; });
  m.def("set_profile", [](std::map<std::string, double> d) { auto& p = rt().prof; for (auto& [k, v] : d) { if (k == "h2d_bytes_per_s") p.bw[1] = v / 1e6; else if (k == "d2h_bytes_per_s") p.bw[2] = v / 1e6; else if (k == "memory_bytes_per_s") p.bw[0] = v / 1e6; else if (k == "pageable_bytes_per_s") p.pageable = v / 1e6; else if (k == "flops") p.flops = v / 1e6; else if (k == "latency_s") p.latency = v * 1e6; else p.launch = v * 1e6; } });
  m.def("races", [] { return rt().races; });
  m.def("clear_races", [] { rt().races.clear(); });
  m.def("host_access", [](size_t p, size_t n, bool w, std::string name) { auto q = (size_t)mem().real((void*)p); rt().host_access(q, n, w, name); });
  m.def("host_charge", [](double s, std::string) { rt().host_vt += s * 1e6; });
  m.def("host_time_s", [] { return rt().host_vt / 1e6; });
  m.def("own_host_clock", [] {}); m.def("host_mark", [] {}); m.def("host_join", [](py::object) {});
  m.def("trace", [] { py::list l; for (auto& t : rt().trace) l.append(py::make_tuple(t.name, t.stream, t.eng, t.t0 / 1e6, t.t1 / 1e6)); return l; });
  m.def("counts", [] { return py::make_tuple(rt().n_ops, rt().n_sync_ops); });
  m.def("manual_seed", [](uint64_t s) { default_gen().set_current_seed(s); });
  m.def("get_rng_state", [] { auto t = default_gen().get_state(); return py::bytes((char*)t.data_ptr(), t.numel()); });
  m.def("set_rng_state", [](std::string s) { auto t = at::empty({(int64_t)s.size()}, at::kByte); memcpy(t.data_ptr(), s.data(), s.size()); default_gen().set_state(t); });
  py::module_::import("atexit").attr("register")(py::cpp_function([] { py::gil_scoped_release r; rt().set_mode(SYNC); }));
}
