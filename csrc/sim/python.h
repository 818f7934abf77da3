// What the device needs of Python: not to hold its lock while waiting, and to know where an operation came from.
#pragma once
#include <Python.h>
// After Python.h; Python 3.10 declares PyFrame_GetBack here.
#include <frameobject.h>

#include "names.h"

namespace sim {

// Whoever waits for a lock of ours must not hold the GIL: the holder may be running an operator written in Python.
class ReleaseGil {
 public:
  ReleaseGil() : state_(Py_IsInitialized() && PyGILState_Check() ? PyEval_SaveThread() : nullptr) {}
  ~ReleaseGil() {
    if (state_) PyEval_RestoreThread(state_);
  }
  ReleaseGil(const ReleaseGil&) = delete;
  ReleaseGil& operator=(const ReleaseGil&) = delete;

 private:
  PyThreadState* state_;
};

// The innermost Python frames of the program, without torch, this device and pytest, or the node of a backward pass; 0
// where there is neither. May take the GIL: to be called without any lock held.
NameId call_site();

}  // namespace sim
