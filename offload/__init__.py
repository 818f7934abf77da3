"""CPU-GPU offloading for PyTorch: optimizer state in host memory, updated on both sides, with the same bits."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from offload.gradients import NonFiniteGradientError
from offload.hardware import HardwareProfile
from offload.monitor import MemoryMonitor
from offload.optimizers import SGD, Adagrad, Adam, AdamW, Lion
from offload.perf_model import Prediction, Rates
from offload.plan import Op, OpKind, Placement, Plan, PlanError, lower
from offload.policy import Static, Stride
from offload.pool import BudgetError

if TYPE_CHECKING:
    from offload.calibration import calibrate
    from offload.checkpoint import CheckpointError, load, save
    from offload.estimate import measured_budget
    from offload.live import LiveStatus
    from offload.module_waits import wait_in_modules
    from offload.streaming import StreamHandle, StreamPlan, stream, stream_from_pretrained

__version__ = "0.1.0"

# Imported when first asked for: a training script seldom does.
_LAZY = {
    "CheckpointError": "offload.checkpoint",
    "LiveStatus": "offload.live",
    "calibrate": "offload.calibration",
    "load": "offload.checkpoint",
    "measured_budget": "offload.estimate",
    "save": "offload.checkpoint",
    "wait_in_modules": "offload.module_waits",
    "StreamHandle": "offload.streaming",
    "StreamPlan": "offload.streaming",
    "stream": "offload.streaming",
    "stream_from_pretrained": "offload.streaming",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "BudgetError",
    "CheckpointError",
    "HardwareProfile",
    "Lion",
    "LiveStatus",
    "MemoryMonitor",
    "NonFiniteGradientError",
    "Op",
    "OpKind",
    "Placement",
    "Plan",
    "PlanError",
    "Prediction",
    "Rates",
    "Static",
    "StreamHandle",
    "StreamPlan",
    "Stride",
    "calibrate",
    "load",
    "lower",
    "measured_budget",
    "save",
    "stream",
    "stream_from_pretrained",
    "wait_in_modules",
]
