"""Buffers: sizes as billed, text of sizes, and nothing more than asked for."""

from __future__ import annotations

import gc
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload.accelerators import accelerator_for
from offload.accelerators.base import PAGE_BYTES
from offload.homes import Homes
from offload.pool import Budgets, MemoryBill, Pool, format_bytes, parse_bytes
from offload.subgroup import Subgroup

CPU = torch.device("cpu")


# ---- sizes as text


@pytest.mark.parametrize(
    ("value", "num_bytes"),
    [
        (None, None),
        (0, 0),
        (123, 123),
        ("123", 123),
        ("10B", 10),
        ("4KiB", 4096),
        ("4KB", 4000),
        ("1.5 GiB", 3 * 2**29),
        (" 2gib ", 2 * 2**30),
        ("10GB", 10**10),
        ("1e9", 10**9),
    ],
)
def test_parse_bytes(value: int | str | None, num_bytes: int | None) -> None:
    assert parse_bytes(value, "device_budget") == num_bytes


@pytest.mark.parametrize("value", ["", "GiB", "four GiB", "4 TiB", "4XB", "nan", "inf", "0x10", "4Gi"])
def test_text_that_is_no_size(value: str) -> None:
    with pytest.raises(ValueError) as raised:
        parse_bytes(value, "device_budget")
    assert str(raised.value) == f'device_budget={value!r} is no size; write bytes as an int, or a text such as "4GiB"'


@pytest.mark.parametrize("value", [-1, "-1", "-4GiB"])
def test_negative_size(value: int | str) -> None:
    with pytest.raises(ValueError, match=f"host_budget={value!r} is negative; give 0 or more bytes, or None"):
        parse_bytes(value, "host_budget")


@pytest.mark.parametrize("value", [4.5, True, [4]])
def test_size_of_another_type(value: object) -> None:
    with pytest.raises(TypeError, match=f"pinned_budget must be an int, .*not {type(value).__name__}"):
        parse_bytes(value, "pinned_budget")  # type: ignore[arg-type]


@given(st.integers(0, 2**60))
def test_integers_are_exact(num_bytes: int) -> None:
    assert parse_bytes(num_bytes, "x") == num_bytes


def test_format_bytes() -> None:
    sizes = [0, 1023, 1024, 2**20 - 1, 3 * 2**20, 3 * 2**29, 5 * 2**40]
    assert [format_bytes(size) for size in sizes] == [
        "0 B", "1023 B", "1.0 KiB", "1024.0 KiB", "3.0 MiB", "1.50 GiB", "5120.00 GiB",
    ]  # fmt: skip


# ---- the bill


def test_bill_adds_up() -> None:
    bill = MemoryBill(host_state_bytes=1000, pinned_state_bytes=300, staging_bytes=20, slot_bytes=7, resident_bytes=5)
    assert (bill.host_bytes, bill.pinned_bytes, bill.device_bytes) == (1020, 320, 12)
    bill.check(Budgets(device_bytes=12, host_bytes=1020, pinned_bytes=320))
    bill.check(Budgets())
    assert str(bill) == ("host state 1000 B (300 B pinned), staging 20 B pinned, device slots 7 B, resident state 5 B")


# ---- buffers

HOMES = Homes(residents=frozenset({3}), visitors=frozenset({1, 2}), num_slots=2, num_staging=2)


def subgroups_of(*numels: int) -> list[Subgroup]:
    return [Subgroup(i, numel, 2 * numel, 12 * numel) for i, numel in enumerate(numels)]


def fill(pool: Pool, subgroups: list[Subgroup]) -> list[torch.Tensor]:
    """Allocate what :data:`HOMES` says, as the runtime does; the states."""
    states = []
    for s in subgroups:
        if s.index in HOMES.residents:
            states.append(pool.device_state(3, s.numel))
        else:
            states.append(pool.host_state(3, s.numel, pinned=s.index in HOMES.visitors))
    pool.set_slots(HOMES.num_slots, HOMES.slot_bytes(subgroups), [])
    pool.set_stagings(HOMES.num_staging, HOMES.staging_bytes(subgroups))
    return states


def storage_bytes(tensors: list[torch.Tensor | None]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)


def test_on_the_cpu_all_is_as_billed() -> None:
    subgroups, pool = subgroups_of(13, 57, 31, 7), Pool(CPU, None)
    states, bill = fill(pool, subgroups), HOMES.bill(subgroups)
    assert storage_bytes([*states[:3]]) == bill.host_state_bytes
    assert storage_bytes([states[3]]) == bill.resident_bytes
    assert storage_bytes([slot.buffer for slot in pool.slots]) == bill.slot_bytes
    assert storage_bytes([half for s in pool.stagings for half in (s.grad, s.param)]) == bill.staging_bytes
    for state, subgroup in zip(states, subgroups, strict=True):
        assert state.shape == (3, subgroup.numel)
        assert state.dtype is torch.float32
        assert not state.any(), "a new optimizer's state is zero"
    assert [slot.index for slot in pool.slots] == [staging.index for staging in pool.stagings] == [0, 1]


def test_on_the_device_all_is_as_billed(sim: ModuleType) -> None:
    """Whole pages and allocator blocks, so that nothing is rounded up and bytes have to agree exactly."""
    device = torch.device("sim", 0)
    subgroups = subgroups_of(*(PAGE_BYTES * n for n in (1, 3, 2, 4)))
    pool, before = Pool(device, accelerator_for(device)), torch.accelerator.memory_allocated(device)
    states, bill = fill(pool, subgroups), HOMES.bill(subgroups)
    assert torch.accelerator.memory_allocated(device) - before == bill.device_bytes
    stagings = [half for staging in pool.stagings for half in (staging.grad, staging.param)]
    assert storage_bytes([states[1], states[2], *stagings]) == bill.pinned_bytes
    assert storage_bytes([states[0], states[1], states[2], *stagings]) == bill.host_bytes
    assert [state.is_pinned() for state in states[:3]] == [False, True, True]
    assert all(half is not None and half.is_pinned() for half in stagings)
    assert states[3].device == device


def test_pinning_rounds_up_to_a_page_at_most(sim: ModuleType) -> None:
    device = torch.device("sim", 0)
    pool = Pool(device, accelerator_for(device))
    for numel in (1, 1000, PAGE_BYTES + 1):
        state = pool.host_state(3, numel, pinned=True)
        assert 12 * numel <= storage_bytes([state]) < 12 * numel + PAGE_BYTES
        assert state.shape == (3, numel)
        assert not state.any()


def test_buffers_made_anew_replace_the_old(sim: ModuleType) -> None:
    device = torch.device("sim", 0)
    pool, before = Pool(device, accelerator_for(device)), torch.accelerator.memory_allocated(device)
    streams = [torch.Stream(device)]
    pool.set_slots(3, 4096, streams)
    pool.set_slots(2, 8192, streams)
    gc.collect()
    torch.accelerator.synchronize()
    assert torch.accelerator.memory_allocated(device) - before == 2 * 8192
