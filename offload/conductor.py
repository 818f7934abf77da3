"""Updates beside the caller: a thread that enqueues them, and a caller that waits for one subgroup at a time.

A stream cannot wait for a CPU worker, so somebody has to wait for each CPU update before its upload is enqueued. In
order that is the thread that called ``step()``. Here a thread of its own does it, while the caller is in the next
forward pass; parameters and gradients are pending (:mod:`offload.pending`) until their subgroup is settled.

[Note: two threads]
The conductor's thread enqueues on ``update``, ``h2d``, ``d2h`` and ``host``; the caller's on ``compute``. Settling a
subgroup waits, on the host, until the conductor has enqueued the last write of its parameters, and then makes the
compute lane wait for that write. It runs under a lock: backward recomputes forward passes in threads of autograd's.

[Note: an open update]
An update that begins in backward is *open* until backward is over: the conductor waits for one subgroup after the other
to be begun. Nobody may read what is pending on it meanwhile: that would wait for gradients that the reader holds up.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from offload.accelerators import Accelerator
from offload.executor import await_params, enqueue_in_backward, enqueue_update
from offload.lanes import Event, Lane, Lanes
from offload.lanes.accelerator import start_worker
from offload.pending import make_pending, make_plain
from offload.plan import Op, Plan
from offload.signals import deferred_signals
from offload.subgroup import Slot, Staging, Subgroup
from offload.watchdog import wait_for


@dataclass(slots=True)
class _Flight:
    """An update that is in flight.

    Attributes:
        subgroups: those that are not settled yet, by index.
        tensors: what is pending on each of them. Gradients are freed when they are dropped from here.
        num_awaited: how many of the subgroups each tensor, by its id, still waits for.
        announced: set by the conductor once a subgroup's ``params_ready`` is there, to a mark of the host's order.
        settled: called for each subgroup when its tensors are what they were.
        home: the stream that was current when the update began.
        enqueued: done when all is enqueued, flushes included.
        gradients: of an update that began in backward: set once a subgroup's are final, to their end on the compute
            lane and a mark of the host's order.
        is_open: see [Note: an open update].
    """

    subgroups: dict[int, Subgroup]
    tensors: dict[int, list[Tensor]]
    num_awaited: Counter[int]
    settled: Callable[[int], None]
    home: torch.Stream | None
    announced: dict[int, Future[object]] = field(default_factory=dict)
    enqueued: Future[object] | None = None
    gradients: dict[int, Future[tuple[Event, object]]] = field(default_factory=dict)
    is_open: bool = False


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
        self._started: list[threading.Thread] = []
        initializer = None if accelerator is None else partial(start_worker, accelerator, self._started)
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
            tensors: by subgroup, what nobody may read or write before the subgroup is settled; a tensor may wait for
                several. They count as changed from now on, for a backward pass that would read what autograd saved of
                them before.
            settled: called with a subgroup's index, in the thread that settles it.
            begun: operations of the plan that were enqueued already.
        """
        flight = self._new_flight(plan, subgroups, settled)
        backward, mark = self._compute.mark(), self._host_mark()
        self._hold(flight, {index: tensors.get(index, ()) for index in flight.subgroups})
        run = partial(enqueue_update, plan, subgroups, slots, stagings, lanes, backward=backward, begun=begun)
        self._submit(flight, run, mark)

    def open(
        self,
        plan: Plan,
        subgroups: Sequence[Subgroup],
        slots: Sequence[Slot],
        stagings: Sequence[Staging],
        lanes: Lanes,
        settled: Callable[[int], None],
        *,
        begun: Collection[Op] = (),
    ) -> None:
        """As :meth:`start`, for gradients that are yet to come: the update of a subgroup waits for :meth:`begin`.

        To be followed by :meth:`close` or :meth:`cancel`. See [Note: an open update].
        """
        flight = self._new_flight(plan, subgroups, settled)
        flight.is_open = True
        gradients: dict[int, Future[tuple[Event, object]]] = {index: Future() for index in flight.subgroups}
        flight.gradients = gradients

        def grads_ready(subgroup: Subgroup) -> Event:
            ready, mark = gradients[subgroup.index].result()
            self._host_join(mark)
            return ready

        run = partial(
            enqueue_in_backward, plan, subgroups, slots, stagings, lanes, grads_ready=grads_ready, begun=begun
        )
        self._submit(flight, run, self._host_mark())

    def begin(self, index: int, tensors: Iterable[Tensor]) -> None:
        """Let the update of a subgroup begin, after what the compute lane was given so far; ``tensors`` as in start."""
        flight = self._flight
        assert flight is not None
        assert flight.is_open, "only an open update has subgroups to begin"
        self._hold(flight, {index: tensors})
        flight.gradients[index].set_result((self._compute.mark(), self._host_mark()))

    def close(self) -> None:
        """Every subgroup was begun: go on as after :meth:`start`."""
        assert self._flight is not None
        self._flight.is_open = False

    def cancel(self) -> None:
        """Give an open update up, and make what is pending on it what it was; what was begun may have run."""
        flight = self._flight
        if flight is None:  # it failed
            return
        for future in flight.gradients.values():
            if not future.done():
                future.set_exception(RuntimeError("backward failed"))
        self._let_go(flight)

    def _new_flight(self, plan: Plan, subgroups: Sequence[Subgroup], settled: Callable[[int], None]) -> _Flight:
        assert self._flight is None, "one update at a time: finish() the last one first"
        indices = list(dict.fromkeys(op.subgroup for op in plan.ops))
        self._flight = _Flight(
            subgroups={i: subgroups[i] for i in indices},
            tensors={i: [] for i in indices},
            num_awaited=Counter(),
            settled=settled,
            home=None if self._accelerator is None else torch.accelerator.current_stream(self._accelerator.device),
            announced={i: Future() for i in indices},
        )
        return self._flight

    def _hold(self, flight: _Flight, tensors: Mapping[int, Iterable[Tensor]]) -> None:
        """Make what the updates of these subgroups read and write pending on them."""
        awaited: dict[int, tuple[Tensor, list[int]]] = {}
        for index, pending in tensors.items():
            flight.tensors[index] = list(pending)
            for tensor in flight.tensors[index]:
                awaited.setdefault(id(tensor), (tensor, []))[1].append(index)
        for key, (tensor, indices) in awaited.items():
            flight.num_awaited[key] = len(indices)
            torch.autograd.graph.increment_version(tensor)
            make_pending(tensor, partial(self._settle_each, indices))

    def _submit(self, flight: _Flight, run: Callable[..., None], mark: object) -> None:
        flight.enqueued = self._thread.submit(self._conduct, [run], flight.announced, mark)

    def _settle_each(self, indices: Iterable[int]) -> None:
        for index in indices:
            self.settle(index)

    def settle(self, index: int) -> None:
        """Make subgroup ``index`` safe to use on the current stream, and on the one that the update began on.

        Raises:
            RuntimeError: if the update is open.
            Exception: what failed in the update, after everything pending was made what it was.
        """
        with deferred_signals(), self._lock:
            flight = self._flight
            if flight is None or index not in flight.subgroups:
                return
            if flight.is_open:
                raise RuntimeError(
                    "a parameter or gradient is used within update_in_backward() after its update has begun: leave the "
                    "context first; a layer whose parameters are read again after their gradients are final cannot be "
                    "trained so"
                )
            try:
                mark = self._wait(flight.announced[index], f"the update of subgroup {index}")
            except BaseException as error:
                self._abandon(flight, error)
                raise
            self._host_join(mark)
            subgroup = flight.subgroups.pop(index)
            self._await_params(subgroup, flight.home)
            for tensor in flight.tensors.pop(index):
                flight.num_awaited[id(tensor)] -= 1
                if not flight.num_awaited[id(tensor)]:
                    make_plain(tensor)
            flight.settled(index)

    def finish(self) -> None:
        """Settle all, and return when the whole update is enqueued. Raises what failed in it."""
        with deferred_signals(), self._lock:
            flight = self._flight
            if flight is None:
                return
            for index in list(flight.subgroups):
                self.settle(index)
            assert flight.enqueued is not None
            try:
                self._host_join(self._wait(flight.enqueued, "the end of the update"))
            except BaseException as error:
                self._abandon(flight, error)
                raise
            self._flight = None

    def _abandon(self, flight: _Flight, error: BaseException) -> None:
        self._let_go(flight)
        if (failed := self._failed()) is not None:
            failed(error)

    def _let_go(self, flight: _Flight) -> None:
        for tensor in [tensor for tensors in flight.tensors.values() for tensor in tensors]:
            make_plain(tensor)
        assert flight.enqueued is not None
        with contextlib.suppress(Exception):
            self._wait(flight.enqueued, "the end of a failed update")  # the thread lets go of what the update used
        self._flight = None

    def _wait(self, future: Future[object], what: str) -> object:
        """What the conductor's thread gives; it waits itself, so its own error has time to come first."""
        return wait_for(future, lambda: f"the step waits for {what} to be enqueued", self._started, patience=2.0)

    def _await_params(self, subgroup: Subgroup, home: torch.Stream | None) -> None:
        await_params(subgroup, self._compute)
        # Who reads the parameters first may do so on a side stream, and the stream that trains must not miss the wait.
        if home is not None and home != torch.accelerator.current_stream(home.device):
            with home:
                await_params(subgroup, self._compute)

    def _conduct(
        self, job: list[Callable[..., None]], announced: Mapping[int, Future[object]], started: object
    ) -> object:
        """In the conductor's thread. Returns the mark of its end.

        The job is taken out of its list, so that nothing holds what it used when the end is known.
        """

        def announce(subgroup: Subgroup) -> None:
            announced[subgroup.index].set_result(self._host_mark())

        try:
            self._host_join(started)
            with torch.no_grad():
                job.pop()(announce=announce)
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


def let_land(process: int, conductor: Conductor, hooks: Sequence[RemovableHandle], *copies: Lane) -> None:
    """Keep what is in flight alive until it is done. Nobody is left to hear of an update that fails now."""
    if process != os.getpid():
        return  # in a fork: nothing of it is in flight here
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
