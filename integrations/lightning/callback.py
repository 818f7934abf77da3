"""What the optimizer does, in Lightning's logs."""

from __future__ import annotations

import logging
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

import offload
from offload.optimizer import OffloadedOptimizer

from ..figures import figures_of

logger = logging.getLogger("offload")


class OffloadCallback(Callback):
    """Follows memory by phase (forward, backward, update) and says where states are updated. Optional.

    Logs what the callback for Trainer does, by the same names
    (:class:`offload.integrations.transformers.OffloadCallback`), as often as Lightning logs.

    Attributes:
        monitor: of the training that runs or ran last.
    """

    def __init__(self) -> None:
        self.monitor: offload.MemoryMonitor | None = None
        self._optimizer: OffloadedOptimizer | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to follow.

        Raises:
            TypeError: if the module has another's optimizer, or more than one.
        """
        match trainer.optimizers:
            case [OffloadedOptimizer() as optimizer]:
                self._optimizer = optimizer
            case others:
                names = ", ".join(type(each).__name__ for each in others) or "none"
                raise TypeError(
                    f"this callback follows one offloaded optimizer, and configure_optimizers gave {names}: return "
                    "offload.AdamW(self.parameters(), ...) from it, or leave the callback out"
                )
        self.monitor = offload.MemoryMonitor(optimizer.runtime.device)
        logger.info("%s", optimizer.explain())

    # Lightning runs forward and backward within optimizer.step(closure), and may never call the module itself, so its
    # own hooks say what the phase is.

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._enter("forward")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._enter("backward")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter("idle")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._enter("update")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._enter("idle")
        if self.monitor is not None and self._optimizer is not None:
            figures = figures_of(self.monitor, self._optimizer)
            pl_module.log_dict({name: float(figure) for name, figure in figures.items()})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what was seen."""
        if self.monitor is not None and self._optimizer is not None:
            logger.info("%s\n%s", self._optimizer.explain(), self.monitor.report())
        self._optimizer = None

    def _enter(self, phase: str) -> None:
        if self.monitor is not None:
            self.monitor.enter(phase)
