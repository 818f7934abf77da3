"""A copy of state and parameters as they are after one step, made while training goes on.

[Note: copied before it is overwritten]
A thread copies one subgroup after the other to a few host buffers, from which a consumer writes them away. Updates go
on meanwhile: each waits, before it overwrites a subgroup's state and parameters, until that subgroup was copied. So
every copy is of the same step, and the buffers bound the memory: where the consumer is slower than training, training
waits.

Who else changes a parameter (an average of weights swapped in, a clamp) calls ``optimizer.synchronize()`` first, which
waits for the copies. Where that was forgotten the snapshot fails, it is never silently of two steps.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from offload import host_memory
from offload.accelerators import Accelerator
from offload.adam import AdamSubgroup, SliceUpdate
from offload.lanes.accelerator import start_worker
from offload.plan import Plan
from offload.pool import BudgetError, Budgets, MemoryBill, format_bytes
from offload.watchdog import watched

DEFAULT_NUM_COPIES = 2  # one is filled while another is written


@dataclass(frozen=True, slots=True)
class Source:
    """What is copied of one subgroup.

    Attributes:
        state: its slab, on the host or on the device.
        params: its parameters, flat and of one dtype, as aliases that are never pending.
        changed: the name of a parameter that something else than a step has changed; None if there is none.
    """

    state: Tensor
    params: Sequence[Tensor]
    changed: Callable[[], str | None]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.state, *self.params))


@dataclass(frozen=True, slots=True)
class Copy:
    """A subgroup's state (contiguous, of the slab's shape) and its flat parameters, in a buffer on the host."""

    subgroup: int
    state: Tensor
    params: tuple[Tensor, ...]


def num_copies(sources: Mapping[int, Source], copy_bytes: int | None) -> int:
    """How many subgroups may be copied and not yet written within ``copy_bytes``; None: :data:`DEFAULT_NUM_COPIES`.

    Raises:
        BudgetError: if not even one.
    """
    each_bytes = Copier.buffer_bytes(sources)
    if copy_bytes is not None and copy_bytes < each_bytes:
        raise BudgetError(
            f"copy_budget is {format_bytes(copy_bytes)} and one copy of the largest subgroup takes "
            f"{format_bytes(each_bytes)}; raise it, or construct the optimizer with a lower subgroup_numel"
        )
    num_buffers = DEFAULT_NUM_COPIES if copy_bytes is None else copy_bytes // max(each_bytes, 1)
    return min(num_buffers, len(sources))


class CopiedEvent:
    """A subgroup was copied, or the snapshot was given up. Never raises: training goes on without a snapshot."""

    __slots__ = ("_accelerator", "_future")

    def __init__(self, accelerator: Accelerator | None) -> None:
        self._accelerator = accelerator
        self._future: Future[object] = Future()

    def happened(self) -> None:
        if not self._future.done():
            self._future.set_result(None if self._accelerator is None else self._accelerator.host_mark())

    def synchronize(self) -> None:
        with watched(lambda: "an update waits until its subgroup is copied for the checkpoint being written"):
            mark = self._future.result()
        if self._accelerator is not None:
            self._accelerator.host_join(mark)


class Copier:
    """Copies ``sources`` in their order. Iterate over it, in one thread, to get the copies.

    Args:
        sources: by subgroup. Nothing is in flight.
        num_buffers: copies that there may be at a time.
        accelerator: None for parameters on the CPU.
    """

    def __init__(self, sources: Mapping[int, Source], num_buffers: int, accelerator: Accelerator | None) -> None:
        self.events = {index: CopiedEvent(accelerator) for index in sources}
        self._sources = sources
        self._accelerator = accelerator
        self._mark = None if accelerator is None else accelerator.host_mark()
        self._lock = threading.Lock()
        self._has_stepped = False
        self._is_given_up = False
        self.held_bytes = num_buffers * self.buffer_bytes(sources)
        self._free: queue.SimpleQueue[Tensor | None] = queue.SimpleQueue()
        self._full: queue.SimpleQueue[tuple[Copy, Tensor] | BaseException] = queue.SimpleQueue()
        for _ in range(num_buffers):
            self._free.put(host_memory.empty(self.buffer_bytes(sources)))
        self._thread = threading.Thread(target=self._run, name="offload-snapshot")
        self._thread.start()

    @staticmethod
    def buffer_bytes(sources: Mapping[int, Source]) -> int:
        """Of one buffer: the largest subgroup."""
        return max((source.num_bytes for source in sources.values()), default=0)

    def begin_step(self) -> None:
        """Tell that parameters change from now on, by a step that waits for their copies."""
        with self._lock:
            self._has_stepped = True

    def wait(self) -> None:
        """Return when everything was copied."""
        for event in self.events.values():
            event.synchronize()

    def give_up(self) -> None:
        """Copy no more, and let updates go on."""
        self._is_given_up = True
        self._free.put(None)  # for a thread that waits for a buffer
        self._let_go()

    def _let_go(self) -> None:
        """Free the buffers. The thread is about to end."""
        self._thread.join()
        self._free, self._full = queue.SimpleQueue(), queue.SimpleQueue()
        self._sources = {}
        self.held_bytes = 0

    def __iter__(self) -> Iterator[Copy]:
        """Each copy is valid until the next is asked for. Raises what failed in copying."""
        for _ in self._sources:
            item = self._full.get()
            if isinstance(item, BaseException):
                raise item
            copy, buffer = item
            yield copy
            self._free.put(buffer)
            del copy, buffer, item
        self._let_go()

    def _run(self) -> None:
        try:
            stream = self._begin_thread()
            for index, source in self._sources.items():
                buffer = self._free.get()
                if buffer is None or self._is_given_up:
                    return
                copy = self._in_buffer(index, source, buffer)
                with nullcontext() if stream is None else stream:
                    self._copy(source, copy)
                self._check_unchanged(source)
                self.events[index].happened()
                self._full.put((copy, buffer))
        except BaseException as error:  # noqa: BLE001 - raised in whoever iterates
            self._full.put(error)
        finally:
            for event in self.events.values():
                event.happened()

    def _begin_thread(self) -> torch.Stream | None:
        """Returns a stream of the thread's own, so that a copy off the device waits for no forward pass."""
        if self._accelerator is None:
            return None
        start_worker(self._accelerator)
        self._accelerator.host_join(self._mark)
        return torch.Stream(self._accelerator.device)

    def _copy(self, source: Source, copy: Copy) -> None:
        if self._accelerator is not None:
            reads = [row for row in source.state if source.state.device.type == "cpu"]
            self._accelerator.declare_host_work("snapshot", reads=reads, writes=(copy.state,))
        copy.state.copy_(source.state)
        for param, copied in zip(source.params, copy.params, strict=True):
            copied.copy_(param)

    def _check_unchanged(self, source: Source) -> None:
        """Before the next step only: later versions of the parameters are its own, and it waits for their copies."""
        with self._lock:
            if not self._has_stepped and (name := source.changed()) is not None:
                raise RuntimeError(
                    f"parameter {name} was changed while it was copied for a snapshot; call optimizer.synchronize(), "
                    f"which waits for the copy, before changing parameters by other means than step()"
                )

    @staticmethod
    def _in_buffer(index: int, source: Source, buffer: Tensor) -> Copy:
        end = source.state.nbytes
        state = buffer[:end].view(source.state.dtype).view(source.state.shape)
        params = []
        for param in source.params:
            begin, end = end, end + param.nbytes
            params.append(buffer[begin:end].view(param.dtype))
        return Copy(index, state, tuple(params))


class CopiesBesideSteps:
    """The copies of a snapshot, and the steps that wait for them; see [Note: copied before it is overwritten].

    Args:
        actions: of all subgroups; more may join.
    """

    def __init__(self, actions: Sequence[AdamSubgroup], budgets: Budgets, accelerator: Accelerator | None) -> None:
        self._actions, self._budgets, self._accelerator = actions, budgets, accelerator
        self._copier: Copier | None = None  # that may not have copied everything yet

    def begin(self, sources: Mapping[int, Source], copy_bytes: int | None, plan: Plan, bill: MemoryBill) -> Copier:
        """Copy subgroups beside the next steps, in the order in which ``plan`` updates them. Nothing is in flight.

        Args:
            copy_bytes: how much may be copied and not yet written; None: :data:`DEFAULT_NUM_COPIES` subgroups.
            bill: of what is taken without that.

        Raises:
            BudgetError: if that holds no subgroup, or the host budget not that.
        """
        num_buffers = num_copies(sources, copy_bytes)
        replace(bill, snapshot_bytes=num_buffers * Copier.buffer_bytes(sources)).check(self._budgets)
        order = dict.fromkeys(op.subgroup for op in plan.ops)
        self._copier = Copier({i: sources[i] for i in order}, num_buffers, self._accelerator)
        for index, event in self._copier.events.items():
            self._actions[index].copied = event
        return self._copier

    def begin_step(self, updates: Mapping[int, Sequence[SliceUpdate]], *, waits: bool) -> None:
        """Let a step begin, after all copies if it ``waits``, or leaves a parameter out.

        A parameter that it leaves out does not become pending, so nothing else would keep it for its copy.
        """
        if self._copier is None:
            return
        if waits or any(len(updates.get(i, ())) < len(each.slices) for i, each in enumerate(self._actions)):
            self._copier.wait()
        self._copier.begin_step()

    def wait(self) -> None:
        """Return when everything was copied."""
        if self._copier is not None:
            self._copier.wait()

    @property
    def held_bytes(self) -> int:
        """Host memory that copies hold now."""
        return 0 if self._copier is None else self._copier.held_bytes


class Snapshot:
    """A checkpoint that is being written. What fails is raised by :meth:`result`, or else by the next step."""

    def __init__(self, path: str, copier: Copier | None = None) -> None:
        self.copier = copier
        self.future: Future[None] = Future()
        self._path = path
        self.is_heard = False

    def done(self) -> bool:
        """Whether it is written, or failed."""
        return self.future.done()

    def wait_copied(self) -> None:
        """Return when everything is copied: parameters may be changed by anyone from then on."""
        if self.copier is not None:
            self.copier.wait()

    def fail(self, error: BaseException, *, is_heard: bool = False) -> None:
        """Copy no more and let updates go on; ``is_heard``: whoever saves gets ``error`` already."""
        if self.copier is not None:
            self.copier.give_up()
        self.is_heard = is_heard
        self.future.set_exception(error)

    def result(self, timeout: float | None = None) -> None:
        """Return when the checkpoint is whole and on the disk.

        Raises:
            Exception: what failed. The checkpoint that was there before is untouched then.
            TimeoutError: after ``timeout`` seconds.
        """
        error = self.future.exception(timeout)
        self.is_heard = True
        if error is not None:
            raise error

    def raise_unheard(self) -> None:
        """Raise RuntimeError, once, if it failed and nobody has asked for its result."""
        if self.done() and not self.is_heard and (error := self.future.exception()) is not None:
            self.is_heard = True
            raise RuntimeError(
                f"the checkpoint that was being written to {self._path} failed: {error}. This step changed nothing: "
                f"call step() again to go on without it"
            ) from error
