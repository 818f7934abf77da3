"""Every order in which the streams of a small program could run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from offload.accelerators import sim


class FailedOrder(AssertionError):  # noqa: N818 - what failed is the program; the cause says how
    """A program failed in one order of its streams. ``seed`` replays it: ``sim.configure("systematic", seed)``."""

    def __init__(self, seed: int, num_orders: int, error: Exception) -> None:
        super().__init__(
            f"order {num_orders} of the program's streams fails with {type(error).__name__}: {error}\n"
            f'replay it with sim.configure("systematic", seed={seed})'
        )
        self.seed = seed
        self.num_orders = num_orders


@dataclass(frozen=True, slots=True)
class Exploration:
    """What :func:`explore` did: how many orders it ran, and whether these were all that differ."""

    num_orders: int
    is_complete: bool


def explore(program: Callable[[], object], max_orders: int = 1000) -> Exploration:
    """Run ``program`` in every order that its streams and events allow, up to ``max_orders``.

    An order says which operation of which stream runs next, and how far the host has come by then. Orders that differ
    only in operations on different bytes are the same to any program, so few of them are run twice. The program must do
    the same each time: it makes what it needs, from one host thread, raises when something is wrong, and leaves no
    tensor on the device. The emulated device is configured anew for each order, and left so.

    Args:
        program: raises if its result is wrong.
        max_orders: where to stop; the answer's ``is_complete`` then is False.

    Raises:
        FailedOrder: at the first order in which the program raises, from what it raised.
        ValueError: ``max_orders`` is less than 1.
    """
    if max_orders < 1:
        raise ValueError(f"max_orders must be at least 1, got {max_orders}: there is always one order")
    script: list[int] | None = []
    num_orders = 0
    while script is not None and num_orders < max_orders:
        sim.configure("systematic", sim.seed_of(script))
        num_orders += 1
        try:
            program()
            torch.accelerator.synchronize()
        except Exception as error:
            seed = sim.seed_of([chosen for chosen, _ in sim.choices()])
            raise FailedOrder(seed, num_orders, error) from error
        script = _next_script(sim.choices())
    return Exploration(num_orders, is_complete=script is None)


def _next_script(choices: list[tuple[int, int | None]]) -> list[int] | None:
    """The choices of the next run: as before up to the last where another makes a difference; None when none does."""
    for i in reversed(range(len(choices))):
        following = choices[i][1]
        if following is not None:
            return [chosen for chosen, _ in choices[:i]] + [following]
    return None
