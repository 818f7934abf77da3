"""Testing without an accelerator: ``from offload.testing import sim``, then ``sim.load()``.

``sim`` is an emulated accelerator, a PyTorch device with memory, streams, events and links of its own, and with a race
detector. Importing this module builds and registers nothing.
"""

from offload.accelerators import sim

__all__ = ["sim"]
