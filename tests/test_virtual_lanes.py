"""Virtual lanes share what a machine has: links, host memory, one submitting thread for each rank. Times by hand."""

from __future__ import annotations

from typing import Any

import pytest

from offload.lanes import Lanes, Work
from offload.lanes.virtual import LANE_NAMES, MARK, Cost, TimedWork, VirtualMachine


def virtual(**options: Any) -> tuple[VirtualMachine, Lanes]:
    """A machine with 10 bytes/s of host memory, and lanes on which a byte takes a second and asks for no memory."""
    machine = VirtualMachine(10.0)
    cost = Cost(lambda work: float(work.num_bytes), lambda work: work.host_bytes)
    return machine, machine.lanes(dict.fromkeys(LANE_NAMES, cost), **options)


def seconds(name: str, duration: int, host_bytes: int = 0) -> Work:
    return Work(name, num_bytes=duration, host_bytes=host_bytes)


def ran(machine: VirtualMachine) -> dict[str, tuple[float, float]]:
    """Run the machine; start and end of each piece of work, but for marks."""
    machine.run()
    return {event.name: (event.start_s, event.end_s) for event in machine.events if event.name != MARK}


def test_mark_is_behind_what_the_lane_waits_for() -> None:
    machine, lanes = virtual()
    lanes.compute.wait(lanes.d2h.submit(seconds("down", 4)))
    lanes.h2d.submit(seconds("up", 1), after=(lanes.compute.mark(),))
    lanes.d2h.submit(seconds("down again", 1), after=(lanes.host.mark(),))
    assert ran(machine) == {"down": (0, 4), "up": (4, 5), "down again": (4, 5)}


def test_upload_after_a_cpu_update_holds_the_submitting_thread() -> None:
    """A stream cannot wait for a worker; so all that is submitted later starts no earlier, on whatever lane."""
    machine, lanes = virtual()
    updated = lanes.host.submit(seconds("C0@0", 5))
    lanes.h2d.submit(seconds("U0@0", 1), after=(updated,))
    lanes.d2h.submit(seconds("D1@0", 1))
    assert ran(machine) == {"C0@0": (0, 5), "U0@0": (5, 6), "D1@0": (5, 6)}


def test_synchronizing_holds_the_submitting_thread() -> None:
    machine, lanes = virtual()
    lanes.h2d.submit(seconds("P0@0", 3)).synchronize()
    lanes.host.submit(seconds("C1@0", 1))
    assert ran(machine) == {"P0@0": (0, 3), "C1@0": (3, 4)}


def test_machine_goes_on_from_where_it_was() -> None:
    machine, lanes = virtual()
    up = lanes.h2d.submit(seconds("up", 3))
    machine.run()
    lanes.d2h.submit(seconds("down", 1), after=(up,))
    assert ran(machine) == {"up": (0, 3), "down": (3, 4)}


def test_directions_of_a_link_slow_each_other() -> None:
    """Up keeps half its rate beside down, down a quarter; each has its own rate where the other rests."""
    machine, lanes = virtual(duplex_speeds=(0.5, 0.25))
    lanes.h2d.submit(seconds("up", 2))
    lanes.d2h.submit(seconds("down", 2))
    lanes.compute.submit(seconds("update", 3))
    assert ran(machine) == {"up": (0, 4), "down": (0, 5), "update": (0, 3)}


def test_serial_link_takes_turns() -> None:
    machine, lanes = virtual(serial_link=True)
    lanes.d2h.submit(seconds("F0@0", 3))
    lanes.h2d.submit(seconds("P1@0", 3))
    lanes.d2h.submit(seconds("F1@0", 3), after=(lanes.h2d.mark(),))
    assert ran(machine) == {"F0@0": (0, 3), "P1@0": (3, 6), "F1@0": (6, 9)}


def test_host_memory_slows_all_that_ask_for_too_much_of_it() -> None:
    """10 bytes/s: 12 and 8 bytes/s asked for run at half speed, until one is done; what asks for none goes on."""
    machine, lanes = virtual()
    lanes.host.submit(seconds("C0@0", 2, host_bytes=24))
    lanes.h2d.submit(seconds("P1@0", 1, host_bytes=8))
    lanes.compute.submit(seconds("update", 3))
    assert ran(machine) == {"C0@0": (0, pytest.approx(2 + 1 * 1.2)), "P1@0": (0, 2), "update": (0, 3)}


def test_host_memory_that_suffices_slows_nothing() -> None:
    machine, lanes = virtual()
    lanes.host.submit(seconds("C0@0", 2, host_bytes=12))
    lanes.h2d.submit(seconds("P1@0", 1, host_bytes=4))
    assert ran(machine) == {"C0@0": (0, 2), "P1@0": (0, 1)}


def test_ranks_share_the_memory_of_their_machine_and_nothing_else() -> None:
    """Two ranks on 10 bytes/s run as one on 5 would; each thread waits for its own worker only."""
    cost = Cost(lambda work: float(work.num_bytes), lambda work: work.host_bytes)
    machine = VirtualMachine(10.0)
    for rank in range(2):
        lanes = machine.lanes(dict.fromkeys(LANE_NAMES, cost))
        updated = lanes.host.submit(seconds(f"C{rank}", 1 + rank, host_bytes=10 * (1 + rank)))
        lanes.h2d.submit(seconds(f"U{rank}", 1), after=(updated,))
    assert ran(machine) == {"C0": (0, 2), "C1": (0, 3), "U0": (2, 3), "U1": (3, 4)}


def test_known_times_override_the_costs_of_the_lane() -> None:
    machine, lanes = virtual()
    lanes.compute.submit(TimedWork("forward", num_bytes=100, seconds=0.25))
    assert ran(machine) == {"forward": (0, 0.25)}
