"""Updates beside the caller: a thread that enqueues them, and a caller that waits for one subgroup at a time.

A stream cannot wait for a CPU worker, so somebody has to wait for each CPU update before its upload is enqueued. In
order that is the thread that called ``step()``. Here a thread of its own does it, while the caller is in the next
forward pass; parameters and gradients are pending (:mod:`offload.pending`) until their subgroup is settled.

[Note: two threads]
The conductor's thread enqueues on ``update``, ``h2d``, ``d2h`` and ``host``; the caller's on ``compute``. Settling a
subgroup waits, on the host, until the conductor has enqueued the last write of its parameters, and then makes the
compute lane wait for that write. It runs under a lock: backward recomputes forward passes in threads of autograd's.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from offload.accelerators import Accelerator
from offload.executor import await_params, enqueue_update
from offload.lanes import Lane, Lanes
from offload.lanes.accelerator import start_worker
from offload.pending import make_pending, make_plain
from offload.plan import Op, Plan
from offload.subgroup import Slot, Staging, Subgroup


@dataclass(slots=True)
class _Flight:
    """An update that is in flight.

    Attributes:
        subgroups: those that are not settled yet, by index.
        tensors: what is pending on each of them. Gradients are freed when they are dropped from here.
        announced: set by the conductor once a subgroup's ``params_ready`` is there, to a mark of the host's order.
        settled: called for each subgroup when its tensors are what they were.
        home: the stream that was current when the update began.
        enqueued: done when all is enqueued, flushes included.
    """

    subgroups: dict[int, Subgroup]
    tensors: dict[int, list[Tensor]]
    settled: Callable[[int], None]
    home: torch.Stream | None
    announced: dict[int, Future[object]] = field(default_factory=dict)
    enqueued: Future[object] | None = None


class Conductor:
    """Runs one update at a time beside its caller.

    Args:
        compute: the caller's lane. The others are not kept: a worker keeps its error, whose traceback leads to whoever
            waited, and this is what lets an update land that nobody holds any more.
        accelerator: told of the order between the threads; None for parameters on the CPU.
        failed: called with what failed in an update. Weak, for the same reason.
    """

    def __init__(
        self,
        compute: Lane,
        accelerator: Accelerator | None,
        failed: weakref.WeakMethod[Callable[[BaseException], None]],
    ) -> None:
        self._failed = failed
        self._compute = compute
        self._accelerator = accelerator
        self._lock = threading.RLock()
        self._flight: _Flight | None = None
        initializer = None if accelerator is None else partial(start_worker, accelerator)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="offload-conductor", initializer=initializer)

    @property
    def in_flight(self) -> bool:
        """Whether an update was begun and not finished."""
        return self._flight is not None

    def start(
        self,
        plan: Plan,
        subgroups: Sequence[Subgroup],
        slots: Sequence[Slot],
        stagings: Sequence[Staging],
        lanes: Lanes,
        tensors: Mapping[int, Iterable[Tensor]],
        settled: Callable[[int], None],
        *,
        begun: Collection[Op] = (),
    ) -> None:
        """Begin an update after what the compute lane was given so far, and return.

        Args:
            tensors: by subgroup, what nobody may read or write before the subgroup is settled. They count as changed
                from now on, for a backward pass that would read what autograd saved of them before.
            settled: called with a subgroup's index, in the thread that settles it.
            begun: operations of the plan that were enqueued already.
        """
        assert self._flight is None, "one update at a time: finish() the last one first"
        indices = list(dict.fromkeys(op.subgroup for op in plan.ops))
        flight = _Flight(
            subgroups={i: subgroups[i] for i in indices},
            tensors={i: list(tensors.get(i, ())) for i in indices},
            settled=settled,
            home=None if self._accelerator is None else torch.accelerator.current_stream(self._accelerator.device),
            announced={i: Future() for i in indices},
        )
        backward, mark = self._compute.mark(), self._host_mark()
        self._flight = flight
        for i, pending in flight.tensors.items():
            for tensor in pending:
                torch.autograd.graph.increment_version(tensor)
                make_pending(tensor, partial(self.settle, i))
        run = partial(enqueue_update, plan, subgroups, slots, stagings, lanes, backward=backward, begun=begun)
        flight.enqueued = self._thread.submit(self._conduct, run, flight.announced, mark)

    def settle(self, index: int) -> None:
        """Make subgroup ``index`` safe to use on the current stream, and on the one that the update began on.

        Raises:
            Exception: what failed in the update, after everything pending was made what it was.
        """
        with self._lock:
            flight = self._flight
            if flight is None or index not in flight.subgroups:
                return
            try:
                mark = flight.announced[index].result()
            except BaseException as error:
                self._abandon(flight, error)
                raise
            self._host_join(mark)
            subgroup = flight.subgroups.pop(index)
            self._await_params(subgroup, flight.home)
            for tensor in flight.tensors.pop(index):
                make_plain(tensor)
            flight.settled(index)

    def finish(self) -> None:
        """Settle all, and return when the whole update is enqueued. Raises what failed in it."""
        with self._lock:
            flight = self._flight
            if flight is None:
                return
            for index in list(flight.subgroups):
                self.settle(index)
            assert flight.enqueued is not None
            try:
                self._host_join(flight.enqueued.result())
            except BaseException as error:
                self._abandon(flight, error)
                raise
            self._flight = None

    def _abandon(self, flight: _Flight, error: BaseException) -> None:
        for tensor in [tensor for tensors in flight.tensors.values() for tensor in tensors]:
            make_plain(tensor)
        assert flight.enqueued is not None
        flight.enqueued.exception()  # the thread lets go of what the update used
        self._flight = None
        if (failed := self._failed()) is not None:
            failed(error)

    def _await_params(self, subgroup: Subgroup, home: torch.Stream | None) -> None:
        await_params(subgroup, self._compute)
        # Who reads the parameters first may do so on a side stream, and the stream that trains must not miss the wait.
        if home is not None and home != torch.accelerator.current_stream(home.device):
            with home:
                await_params(subgroup, self._compute)

    def _conduct(self, run: Callable[..., None], announced: Mapping[int, Future[object]], started: object) -> object:
        """In the conductor's thread. Returns the mark of its end."""

        def announce(subgroup: Subgroup) -> None:
            announced[subgroup.index].set_result(self._host_mark())

        try:
            self._host_join(started)
            with torch.no_grad():
                run(announce=announce)
            return self._host_mark()
        except BaseException as error:
            for future in announced.values():
                if not future.done():
                    future.set_exception(error)
            raise

    def _host_mark(self) -> object:
        return None if self._accelerator is None else self._accelerator.host_mark()

    def _host_join(self, mark: object) -> None:
        if self._accelerator is not None:
            self._accelerator.host_join(mark)


def _wait_for_copies(*lanes: Lane) -> None:
    for lane in lanes:
        lane.mark().synchronize()


def let_land(conductor: Conductor, hooks: Sequence[RemovableHandle], *copies: Lane) -> None:
    """Keep what is in flight alive until it is done. Nobody is left to hear of an update that fails now."""
    for hook in hooks:
        hook.remove()

    def land() -> None:
        with contextlib.suppress(Exception):
            conductor.finish()
        _wait_for_copies(*copies)

    if conductor.in_flight:  # a thread of its own: garbage may be collected in one that the update waits for
        threading.Thread(target=land, name="offload-landing").start()
    else:
        _wait_for_copies(*copies)
