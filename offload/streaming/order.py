"""In which order layers will be called: as in the pass before, until a pass shows otherwise.

A prediction only decides what is loaded ahead of time. A layer that comes unforeseen is loaded when it comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence


class CallOrder:
    """Predicts the layers that come next.

    Passes with and without gradients are learned apart, since a backward visits the layers again, the last first. The
    first pass of either kind is expected to visit them in the order of the model.

    Args:
        num_layers: streamed ones, numbered in the order of the model.
    """

    def __init__(self, num_layers: int) -> None:
        forward = list(range(num_layers))
        self._expected = {False: forward, True: forward + forward[::-1]}
        self._training = False
        self._wraps = True
        self._position = 0
        self._seen: list[int] | None = None  # in this pass; None outside passes

    def begin_pass(self, *, training: bool, wraps: bool = True) -> None:
        """The model is called: what the pass before did is now expected.

        Args:
            training: gradients are enabled.
            wraps: the next pass will find the weights as they are now, so layers may be loaded for it ahead of time;
                not where an optimizer changes them in between.
        """
        if self._seen:
            self._expected[self._training] = self._seen
        self._training = training
        self._wraps = wraps
        self._position = 0
        self._seen = []

    def abandon_pass(self) -> None:
        """The pass failed half way: what it did is not expected of the next one."""
        self._seen = None
        self._position = 0

    def note(self, layer: int) -> None:
        """``layer`` is called now."""
        if self._seen is not None:
            self._seen.append(layer)
        expected = self._expected[self._training]
        for step in range(len(expected)):
            index = (self._position + step) % len(expected)
            if expected[index] == layer:
                self._position = index + 1
                return

    def upcoming(self) -> Iterator[int]:
        """The layers expected from here on, for one round at most; a layer that comes twice appears twice."""
        expected = self._expected[self._training]
        yield from expected[self._position :]
        if self._wraps:
            yield from expected[: self._position]

    @staticmethod
    def distinct(layers: Iterator[int] | Sequence[int]) -> Iterator[int]:
        """``layers`` without repetitions, in the order of their first appearance."""
        seen = set()
        for layer in layers:
            if layer not in seen:
                seen.add(layer)
                yield layer
