"""Testing without an accelerator: ``from offload.testing import sim``, then ``sim.load()``.

``sim`` is an emulated accelerator, a PyTorch device with memory, streams, events and links of its own, and with a race
detector. Importing this module builds and registers nothing. The pytest plugin beside it does the rest: see
``docs/testing.md``.
"""

from offload.accelerators import sim
from offload.testing.exploration import Exploration, FailedOrder, explore
from offload.testing.saved_tensors import watch_saved_tensors

__all__ = ["Exploration", "FailedOrder", "explore", "sim", "watch_saved_tensors"]
