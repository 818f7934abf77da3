"""A progress bar over streamed blocks, with the time to go: of a pass, or of all passes of a generation."""

from __future__ import annotations

import functools
import time
from typing import Any

from torch import nn


class Progress:
    """Shows how far a pass is, or, inside :meth:`begin_generation`, how far a generation is.

    A generation is one bar over the blocks of all of its passes, so that its first blocks say how long it will take.

    Args:
        num_layers: streamed blocks of a forward pass.
        pass_bytes: that cross the link in one.

    Raises:
        ImportError: without tqdm.
    """

    def __init__(self, num_layers: int, pass_bytes: int) -> None:
        try:
            from tqdm import tqdm
        except ModuleNotFoundError as error:
            raise ImportError("the progress bar needs tqdm: pip install tqdm, or progress=False") from error
        self.num_layers = num_layers
        self._make = tqdm
        self._units = max(1, num_layers)  # of a pass; one where no block is streamed
        self._pass_bytes = pass_bytes
        self._bar: Any = None
        self._num_passes = 0  # so far; of the generation, inside one
        self._length: int | None = None  # passes of the generation
        self._start_s = 0.0

    def begin_generation(self, num_passes: int) -> None:
        """So many passes follow, or fewer."""
        self.close()
        self._length, self._num_passes = num_passes, 0
        self._bar = self._open(num_passes * self._units, "generation")

    def end_generation(self) -> None:
        self._length = None
        self.close()

    def begin_pass(self) -> None:
        """A pass starts; the bar of the one before, if it is still open, is closed."""
        self._num_passes += 1
        self._start_s = time.perf_counter()
        if self._length is None:
            self.close()
            self._bar = self._open(self._units, f"pass {self._num_passes}")
        else:
            self._bar.set_description(f"pass {self._num_passes} of {self._length}", refresh=False)

    def note(self) -> None:
        """One more block is called."""
        if self._bar is not None and self._bar.n < self._end_of_pass():
            self._bar.update(1)

    def end_pass(self) -> None:
        if self._bar is None:
            return
        elapsed_s = time.perf_counter() - self._start_s
        rate = f", {self._pass_bytes / elapsed_s / 1e9:.2f} GB/s" if self._pass_bytes else ""
        self._bar.set_postfix_str(f"{elapsed_s:.2f} s{rate}")
        if self._length is None:
            self.close()
        else:
            self._bar.update(max(0, self._end_of_pass() - self._bar.n))  # blocks that this pass left out

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _open(self, total: int, text: str) -> Any:
        return self._make(total=total, desc=text, unit="block", leave=False, dynamic_ncols=True)

    def _end_of_pass(self) -> int:
        return self._units * (1 if self._length is None else min(self._num_passes, self._length))


class WatchedGenerate:
    """``model.generate`` as one run of passes for the progress bar, until :meth:`remove`."""

    def __init__(self, model: nn.Module, progress: Progress) -> None:
        self._model = model
        original: Any = model.generate

        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            num_passes = most_passes(model, args, kwargs)
            if num_passes is None:
                return original(*args, **kwargs)
            progress.begin_generation(num_passes)
            try:
                return original(*args, **kwargs)
            finally:
                progress.end_generation()

        self._generate = model.__dict__["generate"] = generate

    def remove(self) -> None:
        if self._model.__dict__.get("generate") is self._generate:
            del self._model.__dict__["generate"]


def most_passes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """How many tokens, and so passes, a call of transformers' ``generate`` makes at most; None if it does not say."""
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)

    def setting(name: str) -> Any:
        return kwargs.get(name) or getattr(config, name, None)

    if setting("max_new_tokens"):
        return int(setting("max_new_tokens"))
    ids = kwargs.get("input_ids", args[0] if args else None)
    if setting("max_length") and ids is not None and setting("max_length") > ids.shape[-1]:
        return int(setting("max_length")) - int(ids.shape[-1])
    return None
