"""The update of each optimizer: one definition, several implementations, the same bits from each.

docs/numerics.md writes the arithmetic down. Importing this package loads neither the C++ library nor numba nor
triton: each is found at its first use.
"""

from __future__ import annotations

from offload.kernels.affinity import cpu_affinity
from offload.kernels.dispatch import adam_step, update
from offload.kernels.prepared import PreparedUpdate
from offload.kernels.rules import AdagradScalars, LionScalars, SGDScalars
from offload.kernels.scalars import AdamScalars, Scalars
from offload.kernels.selection import available_implementations, default_implementation, use_implementation
from offload.kernels.state import STATE_FORMATS, Rounding, State
from offload.kernels.threads import num_threads, set_cpu_affinity, set_num_threads

__all__ = [
    "STATE_FORMATS",
    "AdagradScalars",
    "AdamScalars",
    "LionScalars",
    "PreparedUpdate",
    "Rounding",
    "SGDScalars",
    "Scalars",
    "State",
    "adam_step",
    "available_implementations",
    "cpu_affinity",
    "default_implementation",
    "num_threads",
    "set_cpu_affinity",
    "set_num_threads",
    "update",
    "use_implementation",
]
