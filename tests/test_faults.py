"""Faults, each with what becomes of training: it goes on bit for bit, or the step says so and the state stays whole."""

from __future__ import annotations

import ast
import functools
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import offload
from offload.conductor import let_land
from offload.lanes.lazy import lazy_lanes
from offload.plan import OpKind, Plan
from offload.shrink import without_slot
from offload.testing import faults
from tests.training import Trained, assert_same_bits, loss_of, mlp, snapshot, state_snapshot, train

NUM_STEPS = 4


@pytest.fixture(autouse=True)
def _one_torch_thread(one_torch_thread: None) -> None:
    """Trainings so small that threads only wait for each other."""


def make(model: nn.Module, plan: object, overlap: str = "none", **options: object) -> offload.AdamW:
    return offload.AdamW(model.parameters(), plan=plan, subgroup_numel=600, overlap=overlap, **options)


def undisturbed() -> Trained:
    model = mlp(device="sim")
    return train(model, make(model, "host"), steps=range(NUM_STEPS))


# ---- telling the device to fail


@pytest.mark.parametrize(
    ("kind", "work"),
    [
        ("allocation", lambda: torch.empty(100, device="sim")),
        ("pin", lambda: torch.empty(100, pin_memory=True)),
        ("copy", lambda: torch.ones(3).to("sim")),
        ("launch", lambda: torch.zeros(3, device="sim").add_(1)),
    ],
)
def test_the_nth_of_each_kind_fails(sim: ModuleType, kind: faults.Kind, work: object) -> None:
    assert callable(work)
    work()
    with faults.fail(kind, nth=1, count=faults.FOREVER) as fault:
        assert not fault.happened
        expected = torch.OutOfMemoryError if kind == "allocation" else RuntimeError
        with pytest.raises(expected, match="injected failure of"):
            work()
        assert fault.happened
    work()


def test_count_and_number(sim: ModuleType) -> None:
    with faults.fail("pin", nth=2, count=2) as fault:
        torch.empty(10, pin_memory=True)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="injected failure of pinning"):
                torch.empty(10, pin_memory=True)
        torch.empty(10, pin_memory=True)
        assert fault.num_seen == 4


@pytest.mark.parametrize(("kind", "nth", "count"), [("disk", 1, 1), ("copy", 0, 1), ("copy", 1, 0)])
def test_a_fault_that_cannot_be(sim: ModuleType, kind: faults.Kind, nth: int, count: int) -> None:
    with pytest.raises(ValueError, match="must be"), faults.fail(kind, nth, count):
        pass


@pytest.mark.parametrize("lane", ["h2d", "host"])
def test_lanes_that_fail(sim: ModuleType, lane: str) -> None:
    """On lazy lanes the error surfaces where the work is waited for."""
    model = mlp()
    optimizer = make(model, "D0@0 C0@0 U0@0 P1@0 G1@0 F1@0 D2@0 C2@0 U2@0 D3@0 C3@0 U3@0")
    optimizer.runtime.lanes = faults.failing_lanes(lazy_lanes(seed=1), lane, nth=2)  # type: ignore[arg-type]
    loss_of(model, 0).backward()
    with pytest.raises(faults.InjectedError):
        whole_step(optimizer)
    with pytest.raises(ValueError, match="nth=0 must be at least 1"):
        faults.failing_lanes(lazy_lanes(seed=1), "h2d", nth=0)


# ---- what a step does about it


def whole_step(optimizer: offload.AdamW) -> None:
    optimizer.step()
    optimizer.synchronize()


def error_of(optimizer: offload.AdamW) -> RuntimeError | None:
    try:
        whole_step(optimizer)
    except RuntimeError as error:
        return error
    return None


@pytest.mark.parametrize("kind", ["task", "copy"])
@pytest.mark.parametrize("overlap", ["none", "next_forward"])
def test_a_failed_step_says_so_and_nothing_hangs(sim: ModuleType, kind: faults.Kind, overlap: str) -> None:
    """Whichever copy or host task fails. The next step is refused, and a checkpoint goes on from where it was."""
    expected = undisturbed()
    for nth in range(1, 30):
        model = mlp(device="sim")
        optimizer = make(model, offload.Stride(2), overlap)
        train(model, optimizer, steps=range(2))
        saved = snapshot(model), optimizer.state_dict()
        saved[1]["state"] = {i: {k: v.clone() for k, v in e.items()} for i, e in saved[1]["state"].items()}
        optimizer.zero_grad()
        loss_of(model, 2).backward()
        with faults.fail(kind, nth) as fault:
            error = error_of(optimizer)
            happened = fault.happened
        if not happened:
            assert error is None
            break
        assert "injected failure" in str(error) or "broken" in str(error)
        with pytest.raises(RuntimeError, match=r"this optimizer is broken: .* load the last checkpoint"):
            optimizer.step()
        assert all(type(param) is nn.Parameter for param in model.parameters()), "none is pending for ever"
        del optimizer
        model = mlp(device="sim", seed=5)
        model.load_state_dict(saved[0])
        resumed = make(model, "device")
        resumed.load_state_dict(saved[1])
        assert_same_bits(train(model, resumed, steps=range(2, NUM_STEPS)).params, expected.params)
    assert nth > 2, "there were copies and tasks to fail"


def fail_prefetch(
    monkeypatch: pytest.MonkeyPatch, optimizer: offload.AdamW, nths: set[int], *, in_backward: bool = True
) -> None:
    """Let some prefetches find the device full; with ``in_backward`` False, count only those of the step itself."""
    num_seen = 0
    for actions in optimizer.runtime.actions:

        def prefetch(slot: object, original: object = actions.prefetch) -> None:
            nonlocal num_seen
            thread = threading.current_thread()
            is_in_step = thread is threading.main_thread() or thread.name.startswith("offload-conductor")
            num_seen += in_backward or is_in_step
            if (in_backward or is_in_step) and num_seen in nths:
                raise torch.OutOfMemoryError("no memory left")
            assert callable(original)
            original(slot)

        monkeypatch.setattr(actions, "prefetch", prefetch)


def fail_prefetch_in_open_update(monkeypatch: pytest.MonkeyPatch, optimizer: offload.AdamW) -> None:
    """Let the first prefetch that the conductor enqueues while backward runs find the device full."""
    failed = False
    for actions in optimizer.runtime.actions:

        def prefetch(slot: object, original: object = actions.prefetch) -> None:
            nonlocal failed
            flight = optimizer.runtime._conductor._flight
            is_conductor = threading.current_thread().name.startswith("offload-conductor")
            if not failed and is_conductor and flight is not None and flight.is_open:
                failed = True
                raise torch.OutOfMemoryError("no memory left")
            assert callable(original)
            original(slot)

        monkeypatch.setattr(actions, "prefetch", prefetch)


@pytest.mark.parametrize("overlap", ["none", "backward", "next_forward"])
@pytest.mark.parametrize("plan", ["device", offload.Stride(2)], ids=str)
@pytest.mark.parametrize("nths", [{1}, {1, 2}, {6}], ids=str)
def test_device_full_in_a_prefetch(
    sim: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    overlap: str,
    plan: object,
    nths: set[int],
) -> None:
    """Also in the first step: the slot's memory is given back, and training goes on with fewer, bit for bit."""
    expected = undisturbed()
    model = mlp(device="sim")
    optimizer = make(model, plan, overlap)
    before = torch.accelerator.memory_allocated()
    fail_prefetch(monkeypatch, optimizer, nths)
    if plan == "device" and len(nths) == 2:
        return  # neither a slot nor a staging buffer is left: an error, see below
    with caplog.at_level(logging.WARNING, "offload"):
        trained = train(model, optimizer, steps=range(NUM_STEPS))
        optimizer.synchronize()
    assert_same_bits(trained, expected)
    assert sim.races() == []
    num_lost = 2 - optimizer.runtime.homes.num_slots
    num_said = caplog.text.count("the device ran out of memory in a prefetch")
    assert bool(num_lost) <= num_said <= num_lost
    if overlap == "none":  # others try some prefetches early, and then again
        assert num_lost == len(nths)
        slot_bytes = optimizer.runtime.homes.slot_bytes(optimizer.runtime.subgroups)
        optimizer.zero_grad()
        assert torch.accelerator.memory_allocated() <= before - num_lost * slot_bytes + 4096
    assert optimizer.bill.slot_bytes == sum(slot.buffer.nbytes for slot in optimizer.runtime.pool.slots)


@pytest.mark.parametrize("overlap", ["backward", "next_forward"])
def test_device_full_in_a_step_after_early_transfers(
    sim: ModuleType, monkeypatch: pytest.MonkeyPatch, overlap: str
) -> None:
    """What comes early for the next step must not go into a slot that is no more, nor by its number before."""
    model = mlp(device="sim")
    optimizer = make(model, "device", overlap)
    fail_prefetch(monkeypatch, optimizer, {1}, in_backward=False)
    assert_same_bits(train(model, optimizer, steps=range(NUM_STEPS)), undisturbed())
    assert optimizer.runtime.homes.num_slots == 1
    assert sim.races() == []


@pytest.mark.parametrize("overlap", ["backward", "next_forward"])
@pytest.mark.parametrize("plan", ["device", offload.Stride(2)], ids=str)
def test_device_full_while_the_update_runs_in_backward(
    sim: ModuleType, monkeypatch: pytest.MonkeyPatch, overlap: str, plan: object
) -> None:
    """A prefetch in the middle of an open update fails: the rest of that update goes on without its slot."""
    model = mlp(device="sim")
    optimizer = make(model, plan, overlap)
    fail_prefetch_in_open_update(monkeypatch, optimizer)
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        with optimizer.update_in_backward():
            loss_of(model, step).backward()
        optimizer.step()
    optimizer.synchronize()
    assert optimizer.runtime.homes.num_slots == 1
    assert_same_bits(snapshot(model), undisturbed().params)
    assert sim.races() == []


def test_an_error_that_surfaces_late_breaks_the_optimizer(sim: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a device do: wherever it is waited for."""
    model = mlp(device="sim")
    optimizer = make(model, "host")
    train(model, optimizer, steps=range(1))

    def fail() -> None:
        raise RuntimeError("an illegal access, some time ago")

    with monkeypatch.context() as patch:
        patch.setattr(optimizer.runtime.lanes.h2d, "mark", fail)
        with pytest.raises(RuntimeError, match="illegal access"):
            optimizer.synchronize()
    with pytest.raises(RuntimeError, match="this optimizer is broken"):
        optimizer.synchronize()


def test_device_full_with_nowhere_to_go(sim: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp(device="sim")
    optimizer = make(model, "device")
    fail_prefetch(monkeypatch, optimizer, {1, 2})
    loss_of(model, 0).backward()
    with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="broken"):
        optimizer.step()


def test_plan_without_a_slot() -> None:
    ops = Plan.parse("D0@0 P1@0 P3@1 C0@0 G1@0 F1@0 U0@0 P5@0 G3@1 F3@1 G5@0 F5@0 R2").ops
    position = ops.index((OpKind.PREFETCH, 5, 0))

    def rest(slots: list[int], num_staging: int) -> str | None:
        ops_instead = without_slot(ops, position, begun={0, 1, 3}, slots=slots, num_staging=num_staging)
        return None if ops_instead is None else str(Plan(tuple(ops_instead)))

    assert rest([1], 2) == "G3@1 F3@1 P5@1 G5@1 F5@1 R2"
    assert rest([], 2) == "G3@1 F3@1 D5@0 C5@0 U5@0 R2"
    assert rest([], 0) is None


@pytest.mark.parametrize(("nth", "num_slots"), [(2, 1), (3, 2)])
def test_device_without_memory_for_every_slot(
    sim: ModuleType, caplog: pytest.LogCaptureFixture, nth: int, num_slots: int
) -> None:
    model = mlp(device="sim")
    with faults.fail("allocation", nth), caplog.at_level(logging.WARNING, "offload"):
        optimizer = make(model, "device", num_slots=4)
    assert optimizer.runtime.homes.num_slots == len(optimizer.runtime.pool.slots) == num_slots
    assert f"no memory for more than {num_slots} of 4 slots" in caplog.text
    assert_same_bits(train(model, optimizer, steps=range(NUM_STEPS)), undisturbed())


def test_device_without_memory_for_one_slot(sim: ModuleType) -> None:
    model = mlp(device="sim")
    with faults.fail("allocation"), pytest.raises(torch.OutOfMemoryError):
        make(model, "device")


def test_nothing_is_allocated_or_pinned_in_steady_state(sim: ModuleType) -> None:
    """Of ours: the gradients' norm, which tells whether they are finite, is torch's."""
    model = mlp(device="sim")
    optimizer = make(model, offload.Stride(2), "next_forward")
    train(model, optimizer, steps=range(2))
    loss_of(model, 2).backward()
    optimizer.synchronize()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("offload.optimizer.all_finite", lambda _: True)
        with (
            faults.fail("pin", count=faults.FOREVER) as pinned,
            faults.fail("allocation", count=faults.FOREVER) as allocated,
        ):
            whole_step(optimizer)
            assert (pinned.num_seen, allocated.num_seen) == (0, 0)


# ---- processes


def test_fork_is_refused_on_an_accelerator(sim: ModuleType) -> None:
    model = mlp(device="sim")
    optimizer = make(model, "host")
    optimizer.runtime._process += 1  # as a fork would see it; sim itself does not live on in one
    with pytest.raises(RuntimeError, match=r"constructed in process \d+, and this is a fork of it .*'spawn'"):
        optimizer.step()


def test_a_fork_waits_for_no_copy_of_its_parent() -> None:
    """Its streams and its conductor are not there."""

    class NotThere:
        def __getattr__(self, name: str) -> object:
            pytest.fail(f"asked for {name}")

    let_land(os.getpid() + 1, NotThere(), [], NotThere())  # type: ignore[arg-type]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_on_the_cpu_trains_on(tmp_path: Path) -> None:
    """With helpers of its own: the parent's threads are not there."""
    program = """
import os, torch, offload
torch.set_num_threads(1)  # torch's own threads do not outlive a fork
params = [torch.nn.Parameter(torch.zeros(1 << 21))]
optimizer = offload.AdamW(params, lr=0.1)
offload.kernels.set_num_threads(3)
def step():
    params[0].grad = torch.ones(1 << 21)
    optimizer.step()
step()
child = os.fork()
step()
if child:
    os.waitpid(child, 0)  # lines must not mix
names = [open(f"/proc/self/task/{thread}/comm").read() for thread in os.listdir("/proc/self/task")]
helpers = sum(name.startswith("offload-update") for name in names)
print("parent" if child else "child", params[0][0].item(), helpers, flush=True)
os._exit(0)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100)
    said = dict(line.split(" ", 1) for line in ran.stdout.splitlines())
    assert said["parent"] == said["child"]
    assert said["child"].endswith(" 2") or not offload.kernels.native.load()


@functools.cache
def sources() -> dict[str, ast.Module]:
    """The package, by file."""
    root = Path(offload.__file__).parent
    return {str(path.relative_to(root)): ast.parse(path.read_text()) for path in root.rglob("*.py")}


def imported() -> set[str | None]:
    nodes = [node for tree in sources().values() for node in ast.walk(tree)]
    modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    return modules | {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}


def users_of(*names: str) -> set[str]:
    """Files that use one of these functions, written so."""
    last = {name.split(".")[-1] for name in names}
    return {
        file
        for file, tree in sources().items()
        for node in ast.walk(tree)
        if getattr(node, "attr", getattr(node, "id", None)) in last and ast.unparse(node) in names
    }


def test_no_clock_that_can_jump() -> None:
    """Durations are of monotonic clocks. A status file says when it was written, for whoever reads it elsewhere."""
    users = users_of("time.time", "datetime.now", "time.time_ns")
    assert users <= {"live.py", "cli/watch.py"}, "use time.monotonic or time.perf_counter"


def test_the_package_opens_no_socket() -> None:
    """Ranks talk through torch's process groups, and `offload watch` through a file."""
    assert not imported() & {"socket", "socketserver", "http.server", "xmlrpc.server", "asyncio"}


def test_nothing_is_unpickled() -> None:
    """Of checkpoints, or of any other file."""
    assert not imported() & {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    assert not users_of("torch.load", "np.load", "numpy.load", "eval", "exec")


RANK = """
import os, sys, datetime, torch, offload
import torch.distributed as dist
rank, port = int(sys.argv[1]), sys.argv[2]
store = dist.TCPStore("127.0.0.1", int(port), 2, is_master=rank == 0, timeout=datetime.timedelta(seconds=60))
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=20))
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 8))
optimizer = offload.AdamW(model.parameters(), lr=0.1)
offload.save(sys.argv[3], optimizer, model)
for step in range(3):
    optimizer.zero_grad()
    loss = model(torch.ones(2, 8)).sum()
    if rank == 1 and step == 2:
        os._exit(9)
    try:
        loss.backward()
    except RuntimeError:
        counts = {int(entry["step"]) for entry in optimizer.state_dict()["state"].values()}
        print("heard of it after whole steps", counts, flush=True)
        try:
            offload.save(sys.argv[3], optimizer, model)
        except RuntimeError:
            print("and in a save", flush=True)
        os._exit(0)
    optimizer.step()
"""


@pytest.mark.slow
def test_other_ranks_hear_of_one_that_dies(tmp_path: Path) -> None:
    """In backward and in a save, which leaves the last checkpoint."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), port, str(tmp_path / "a")], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    out, _ = ranks[0].communicate(timeout=200)
    assert ranks[1].wait(timeout=200) == 9
    assert out == "heard of it after whole steps {2}\nand in a save\n"
    linear = nn.Linear(8, 8)
    offload.load(tmp_path / "a", offload.AdamW(linear.parameters()), linear)


def test_state_survives_nan_gradients_in_every_mode(sim: ModuleType) -> None:
    for overlap in ("none", "backward", "next_forward"):
        model = mlp(device="sim")
        optimizer = make(model, offload.Stride(2), overlap)
        train(model, optimizer, steps=range(2))
        before = snapshot(model), state_snapshot(optimizer)
        loss_of(model, 2).backward()
        model[2].weight.grad[0, 0] = float("nan")
        with pytest.raises(offload.NonFiniteGradientError):
            optimizer.step()
        assert_same_bits((snapshot(model), state_snapshot(optimizer)), before)
        train(model, optimizer, steps=range(2, NUM_STEPS))
        assert_same_bits(snapshot(model), undisturbed().params)


def test_threads_end_with_the_optimizer(sim: ModuleType) -> None:
    """What a fault leaves behind must not be threads."""
    model = mlp(device="sim")
    optimizer = make(model, "host", "next_forward")
    train(model, optimizer, steps=range(1))
    optimizer.synchronize()
    own = [*optimizer.runtime.lanes.host._worker.started, *optimizer.runtime._conductor._started]
    assert all(isinstance(thread, threading.Thread) for thread in own)
    del optimizer
    for thread in own:
        thread.join(timeout=100)
        assert not thread.is_alive()
