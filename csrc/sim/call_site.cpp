#include <torch/csrc/autograd/function.h>

#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "python.h"

namespace sim {
namespace {

constexpr size_t kMaxFrames = 3;

struct Code {
  bool is_hidden;
  std::string file, function;
};

bool is_of_torch_or_device(const std::string& path) {
  for (const char* part : {"/torch/", "/offload/accelerators/", "/offload/testing/"})
    if (path.find(part) != std::string::npos) return true;
  return false;
}

std::string text_of(PyObject* text) {
  const char* utf8 = PyUnicode_AsUTF8(text);
  if (!utf8) PyErr_Clear();
  return utf8 ? utf8 : "?";
}

// Keeps a reference to each code object it has seen, so that none is taken for another. The GIL is its lock.
const Code& describe(PyCodeObject* code) {
  static auto* known = new std::unordered_map<PyCodeObject*, Code>;
  auto entry = known->find(code);
  if (entry != known->end()) return entry->second;
  Py_INCREF(code);
  std::string path = text_of(code->co_filename);
  const bool is_hidden = is_of_torch_or_device(path);
  const size_t directory = path.rfind('/', path.rfind('/') - 1);  // keep one directory
  if (path.rfind('/') != std::string::npos && directory != std::string::npos) path = path.substr(directory + 1);
  return known->emplace(code, Code{is_hidden, path, text_of(code->co_name)}).first->second;
}

// Frames outside torch and the device, innermost first, as (code, line) pairs written into `key`; needs the GIL.
NameId python_call_site() {
  static auto* known = new std::unordered_map<std::string, NameId>;  // the GIL is its lock
  std::string key;
  std::vector<std::pair<const Code*, int>> frames;
  PyFrameObject* frame = PyThreadState_GetFrame(PyThreadState_Get());
  while (frame && frames.size() < kMaxFrames) {
    PyCodeObject* code = PyFrame_GetCode(frame);
    const Code& description = describe(code);
    if (!description.is_hidden) {
      const int line = PyFrame_GetLineNumber(frame);
      frames.emplace_back(&description, line);
      key.append(reinterpret_cast<const char*>(&code), sizeof code);
      key.append(reinterpret_cast<const char*>(&line), sizeof line);
    }
    Py_DECREF(code);
    PyFrameObject* outer = PyFrame_GetBack(frame);
    Py_DECREF(frame);
    frame = outer;
  }
  Py_XDECREF(frame);
  if (frames.empty()) return 0;
  auto [entry, is_new] = known->try_emplace(key, 0);
  if (is_new) {
    std::string text;
    for (auto& [code, line] : frames)
      text += (text.empty() ? "" : " < ") + code->file + ":" + std::to_string(line) + " in " + code->function;
    entry->second = intern(text);
  }
  return entry->second;
}

}  // namespace

NameId call_site() {
  if (!Py_IsInitialized()) return 0;
  if (PyGILState_Check()) return python_call_site();
  if (auto node = torch::autograd::get_current_node()) return intern("backward, " + node->name());
  // Threads that Python does not know have no frames.
  if (!PyGILState_GetThisThreadState()) return 0;
  const PyGILState_STATE state = PyGILState_Ensure();
  const NameId site = python_call_site();
  PyGILState_Release(state);
  return site;
}

}  // namespace sim
