#include "shapes.h"

#include <cstring>
#include <mutex>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <utility>

#include "kernel.h"
#include "tensors.h"

namespace sim {
namespace {

using Results = std::optional<torch::jit::Stack>;

// All that shapes can depend on, as text: the operator, sizes, strides, dtypes and scalars.
class Key {
 public:
  explicit Key(const std::string& name) : text_(name) {}

  // False if the argument is of a kind that has no place in a key, or if shapes depend on its data (a mask).
  bool add(const c10::IValue& value) {
    put(value.isNone() ? 'n' : static_cast<char>('A' + kind(value)));
    if (value.isTensor()) return add(value.toTensor());
    if (value.isTensorList()) return add_all(value.toTensorVector());
    if (value.isOptionalTensorList()) return add_indices(value.toOptionalTensorVector());
    if (value.isInt()) return put(value.toInt());
    if (value.isDouble()) return put(value.toDouble());
    if (value.isBool()) return put(value.toBool());
    if (value.isIntList()) return put_all(value.toIntVector());
    if (value.isDoubleList()) return put_all(value.toDoubleVector());
    if (value.isBoolList()) {
      const auto flags = value.toBoolList().vec();
      return put_all(std::vector<char>(flags.begin(), flags.end()));
    }
    if (value.isString()) return put_all(std::vector<char>(value.toStringRef().begin(), value.toStringRef().end()));
    return value.isNone() || value.isDevice() || value.isGenerator();
  }

  const std::string& text() const { return text_; }

 private:
  static int kind(const c10::IValue& value) {
    const bool kinds[] = {
        value.isTensor(), value.isTensorList(), value.isOptionalTensorList(), value.isInt(),      value.isDouble(),
        value.isBool(),   value.isIntList(),    value.isDoubleList(),         value.isBoolList(), value.isString()};
    int index = 0;
    for (bool is_kind : kinds) {
      if (is_kind) break;
      index++;
    }
    return index;
  }

  template <class T>
  bool put(T value) {
    static_assert(std::is_trivially_copyable_v<T>);
    text_.append(reinterpret_cast<const char*>(&value), sizeof value);
    return true;
  }

  template <class Values>
  bool put_all(const Values& values) {
    put(values.size());
    for (auto value : values) put(value);
    return true;
  }

  bool add(const at::Tensor& tensor) {
    if (!tensor.defined()) return put('u');
    put(is_on_device(tensor) ? 'd' : tensor.unsafeGetTensorImpl()->is_wrapped_number() ? 'w' : 'c');
    put(tensor.scalar_type());
    put_all(tensor.sizes());
    return put_all(tensor.strides());
  }

  bool add_all(const std::vector<at::Tensor>& tensors) {
    put(tensors.size());
    for (const at::Tensor& tensor : tensors) add(tensor);
    return true;
  }

  bool add_indices(const std::vector<std::optional<at::Tensor>>& indices) {
    put(indices.size());
    for (const std::optional<at::Tensor>& index : indices) {
      const bool is_defined = index && index->defined();
      put(is_defined);
      if (!is_defined) continue;
      if (index->scalar_type() == at::kBool || index->scalar_type() == at::kByte) return false;
      add(*index);
    }
    return true;
  }

  std::string text_;
};

class ResultCache {
 public:
  std::optional<Results> find(const std::string& key) {
    std::lock_guard<std::mutex> guard(mutex_);
    auto entry = results_.find(key);
    return entry == results_.end() ? std::nullopt : std::optional<Results>(entry->second);
  }
  void add(const std::string& key, const Results& results) {
    std::lock_guard<std::mutex> guard(mutex_);
    if (results_.size() >= kMaxEntries) results_.clear();
    results_[key] = results;
  }

 private:
  static constexpr size_t kMaxEntries = 20000;
  std::mutex mutex_;
  std::unordered_map<std::string, Results> results_;
};

using Written = std::vector<std::pair<at::Tensor, at::Tensor>>;  // an argument, and its stand-in that Meta may resize

torch::jit::Stack meta_stack(const OperatorInfo& info, const std::vector<c10::IValue>& arguments, Written& written) {
  torch::jit::Stack stack;
  for (size_t i = 0; i < arguments.size(); i++) {
    if (arguments[i].isDevice()) {
      stack.emplace_back(c10::Device(at::kMeta));
    } else if (arguments[i].isGenerator()) {
      stack.emplace_back();
    } else {
      stack.push_back(map_tensors(arguments[i], [&](const at::Tensor& tensor) {
        // CPU scalars stay what they are, wrapped numbers too: they take part in type promotion as such.
        if (!is_on_device(tensor) && tensor.dim() == 0) return tensor;
        at::Tensor meta = as_meta(tensor);
        if (info.arguments[i].is_written) written.emplace_back(tensor, meta);
        return meta;
      }));
    }
  }
  return stack;
}

Results call_meta(const OperatorInfo& info, torch::jit::Stack stack) {
  try {
    KernelScope scope;
    info.handle.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::Meta), &stack);
  } catch (const c10::NotImplementedError&) {
    return std::nullopt;
  } catch (const std::exception& error) {
    // A Meta kernel written in Python raises Python's error, for example for an index that is a mask.
    if (std::strstr(error.what(), "NotImplementedError")) return std::nullopt;
    throw;
  }
  bool is_meta = true;
  for (const c10::IValue& value : stack)
    for_each_tensor(value, [&](const at::Tensor& tensor) { is_meta &= tensor.is_meta(); });
  return is_meta ? Results(std::move(stack)) : std::nullopt;
}

}  // namespace

std::optional<torch::jit::Stack> infer_results(const OperatorInfo& info, const std::vector<c10::IValue>& arguments) {
  static auto* cache = new ResultCache;
  Key key(info.name);
  bool has_key = true;
  for (const c10::IValue& argument : arguments) has_key = has_key && key.add(argument);
  if (has_key)
    if (std::optional<Results> known = cache->find(key.text())) return *known;

  Written written;
  Results results = call_meta(info, meta_stack(info, arguments, written));
  bool has_resized = false;
  for (auto& [tensor, meta] : written) {
    if (!results || tensor.sizes() == meta.sizes()) continue;
    resize_tensor(tensor, meta.sizes(), std::nullopt);
    has_resized = true;  // to be done again the next time
  }
  if (has_key && !has_resized) cache->add(key.text(), results);
  return results;
}

}  // namespace sim
