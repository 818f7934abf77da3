"""CPU-GPU offloading for PyTorch: optimizer state in host memory, updated on both sides, with the same bits."""

from offload.calibration import calibrate
from offload.estimate import measured_budget
from offload.gradients import NonFiniteGradientError
from offload.hardware import HardwareProfile
from offload.monitor import MemoryMonitor
from offload.optimizer import Adam, AdamW
from offload.perf_model import Prediction, Rates
from offload.plan import Op, OpKind, Placement, Plan, PlanError, lower
from offload.policy import Static, Stride
from offload.pool import BudgetError

__version__ = "0.1.0"

__all__ = [
    "Adam",
    "AdamW",
    "BudgetError",
    "HardwareProfile",
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
    "Stride",
    "calibrate",
    "lower",
    "measured_budget",
]
