"""A progress bar over streamed blocks, with the time to go of the pass and the passes behind it."""

from __future__ import annotations

import time
from typing import Any


class Progress:
    """Shows how far a pass is, and how long the passes so far took.

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
        self._make = tqdm
        self._num_layers = num_layers
        self._pass_bytes = pass_bytes
        self._bar: Any = None
        self._num_passes = 0
        self._start_s = 0.0

    def begin_pass(self) -> None:
        """A pass starts; the bar of the one before, if it is still open, is closed."""
        self.close()
        self._num_passes += 1
        self._start_s = time.perf_counter()
        self._bar = self._make(
            total=self._num_layers, desc=f"pass {self._num_passes}", unit="block", leave=False, dynamic_ncols=True
        )

    def note(self) -> None:
        """One more block is called."""
        if self._bar is not None and self._bar.n < self._num_layers:
            self._bar.update(1)

    def end_pass(self) -> None:
        if self._bar is not None:
            elapsed_s = time.perf_counter() - self._start_s
            self._bar.set_postfix_str(f"{elapsed_s:.2f} s, {self._pass_bytes / elapsed_s / 1e9:.2f} GB/s")
            self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
