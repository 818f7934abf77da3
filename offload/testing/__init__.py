"""Testing without an accelerator: ``from offload.testing import sim``, then ``sim.load()``.

``sim`` is an emulated accelerator, a PyTorch device with memory, streams, events and links of its own, and with a race
detector. Importing this module builds and registers nothing. The pytest plugin beside it does the rest: see
``docs/testing.md``.
"""

from offload.accelerators import sim
from offload.testing import faults
from offload.testing.exploration import Exploration, FailedOrder, explore
from offload.testing.saved_tensors import watch_saved_tensors
from offload.testing.traces import spans, write_trace

__all__ = ["Exploration", "FailedOrder", "explore", "faults", "sim", "spans", "watch_saved_tensors", "write_trace"]
