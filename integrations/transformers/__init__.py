"""This project's optimizers for transformers' Trainer: one line, and a callback for whoever wants to see inside.

::

    from offload.integrations.transformers import offloaded

    trainer = Trainer(model=model, args=args, ..., optimizer_cls_and_kwargs=offloaded(args, device_budget="4GiB"))

docs/huggingface.md says what follows from it.
"""

from .callback import OffloadCallback
from .optimizer import offloaded

__all__ = ["OffloadCallback", "offloaded"]
