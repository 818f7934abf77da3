#include "operators.h"

#include <algorithm>
#include <deque>
#include <mutex>
#include <unordered_map>

namespace sim {
namespace {

bool is_optional_generator(const c10::Type& type) {
  return type.kind() == c10::TypeKind::OptionalType &&
         type.expectRef<c10::OptionalType>().getElementType()->kind() == c10::TypeKind::GeneratorType;
}

bool holds_tensors(const c10::Type& type) {
  if (type.kind() == c10::TypeKind::TensorType) return true;
  return type.kind() == c10::TypeKind::ListType &&
         type.expectRef<c10::ListType>().getElementType()->kind() == c10::TypeKind::TensorType;
}

int written_argument(const c10::FunctionSchema& schema, const c10::AliasInfo& alias) {
  for (size_t i = 0; i < schema.arguments().size(); i++) {
    const c10::AliasInfo* candidate = schema.arguments()[i].alias_info();
    if (candidate && candidate->isWrite() && candidate->beforeSets() == alias.beforeSets()) return static_cast<int>(i);
  }
  return -1;
}

// Of these, CPU kernels return other shapes than Meta kernels say, which later kernels then rely on.
bool has_shapes_of_its_own(const OperatorInfo& info) {
  const std::string& name = info.schema->name();
  return name == "aten::_embedding_bag" || name == "aten::_embedding_bag_forward_only";
}

Path path_of(const OperatorInfo& info) {
  for (const c10::Argument& returned : info.schema->returns()) {
    if (returned.alias_info() && !returned.alias_info()->isWrite()) return Path::kView;
    if (!holds_tensors(*returned.type())) return Path::kHostWaits;
  }
  if (info.name == "aten::index.Tensor") return Path::kAsync;  // tagged for masks, which indexing.cpp replaces
  const bool depends_on_data =
      info.handle.hasTag(at::Tag::dynamic_output_shape) || info.handle.hasTag(at::Tag::data_dependent_output);
  return depends_on_data || has_shapes_of_its_own(info) ? Path::kHostWaits : Path::kAsync;
}

bool is_in_place(const OperatorInfo& info) {
  return std::none_of(info.arguments.begin(), info.arguments.end(), [](auto& argument) { return argument.is_out; }) &&
         std::all_of(info.aliased_argument.begin(), info.aliased_argument.end(), [](int i) { return i >= 0; });
}

OperatorInfo read(const c10::OperatorHandle& op) {
  const c10::FunctionSchema& schema = op.schema();
  OperatorInfo info{op, &schema, toString(schema.operator_name()), 0, Path::kHostWaits, {}, false, {}};
  TORCH_CHECK_NOT_IMPLEMENTED(op.hasComputedKernelForDispatchKey(c10::DispatchKey::CPU), "sim: ", info.name,
                              " has no CPU kernel, which is what the emulated device would run");
  info.name_id = intern(info.name);
  for (const c10::Argument& argument : schema.arguments()) {
    const bool is_written = argument.alias_info() && argument.alias_info()->isWrite();
    info.arguments.push_back(
        {is_written, is_written && argument.kwarg_only(), is_optional_generator(*argument.type())});
  }
  for (const c10::Argument& returned : schema.returns())
    info.aliased_argument.push_back(returned.alias_info() ? written_argument(schema, *returned.alias_info()) : -1);
  info.path = path_of(info);
  info.is_in_place = is_in_place(info);
  return info;
}

}  // namespace

const OperatorInfo& operator_info(const c10::OperatorHandle& op) {
  static auto* mutex = new std::mutex;
  static auto* known = new std::unordered_map<c10::OperatorName, const OperatorInfo*>;
  static auto* infos = new std::deque<OperatorInfo>;  // old ones stay: calls that are still queued refer to them
  std::lock_guard<std::mutex> guard(*mutex);
  const OperatorInfo*& info = (*known)[op.operator_name()];
  if (!info || info->schema != &op.schema()) {  // a library may define the same name anew
    infos->push_back(read(op));
    info = &infos->back();
  }
  return *info;
}

}  // namespace sim
