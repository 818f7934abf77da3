"""What the optimizer does, in Trainer's logs."""

from __future__ import annotations

import logging
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import offload
from offload.module_waits import ModuleWaits
from offload.optimizer import OffloadedOptimizer

from ..figures import figures_of
from .optimizer import find_optimizer

logger = logging.getLogger("offload")


class OffloadCallback(TrainerCallback):
    """Follows memory by phase (forward, backward, update) and says where states are updated. Optional.

    Each of Trainer's logs, the one in ``trainer_state.json`` included, gains

    - ``offload_<phase>_peak_bytes``: the highest that the device's allocator held in a phase, of the last steps; on a
      machine without an accelerator ``offload_<phase>_rss_bytes`` instead, of the process;
    - ``offload_updates_on_device``: of ``offload_num_subgroups`` updates of a step, how many the plan has there.

    The log "offload" (level INFO) has the optimizer's :meth:`explain` when training begins and ends, and a table of
    memory at the end. With ``torch_compile=True`` compiled modules are told to wait for their parameters
    (:func:`offload.wait_in_modules`), which keeps their graphs in one piece.

    Attributes:
        monitor: of the training that runs or ran last.
    """

    def __init__(self) -> None:
        self.monitor: offload.MemoryMonitor | None = None
        self._optimizer: OffloadedOptimizer | None = None
        self._waits: ModuleWaits | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to follow.

        Raises:
            TypeError: if Trainer's optimizer is not offloaded.
        """
        self._let_go()
        model, self._optimizer = kwargs["model"], find_optimizer(kwargs["optimizer"])
        self.monitor = offload.MemoryMonitor(self._optimizer.runtime.device)
        self.monitor.attach(model, self._optimizer)
        if args.torch_compile:
            self._waits = offload.wait_in_modules(model)
        logger.info("%s", self._optimizer.explain())

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add figures to what Trainer logs: to its history, and for the callbacks that come after this one."""
        if self._optimizer is None or self.monitor is None:
            return
        figures = figures_of(self.monitor, self._optimizer)
        if logs is not None:
            logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say what was seen, and remove all hooks."""
        if self._optimizer is not None and self.monitor is not None:
            logger.info("%s\n%s", self._optimizer.explain(), self.monitor.report())
        self._let_go()

    def _let_go(self) -> None:
        """Of a training that ended, or was broken off by an error."""
        if self.monitor is not None:
            self.monitor.detach()
        if self._waits is not None:
            self._waits.remove()
        self._optimizer = self._waits = None
