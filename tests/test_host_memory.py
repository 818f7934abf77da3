"""Pages of state: huge where the system offers them, exact in size, gone with their tensor."""

from __future__ import annotations

import gc
import itertools
import mmap
import re
from pathlib import Path

import pytest
import torch

import offload
from offload import Stride, host_memory
from offload.pool import Pool
from tests.training import assert_same_bits, mlp, train

NUM_BYTES = 8 << 20


def mapping_of(address: int) -> str | None:
    """Its entry in /proc/self/smaps; None if nothing is mapped there."""
    for entry in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        begin, _, end = entry.partition(" ")[0].partition("-")
        if entry and int(begin, 16) <= address < int(end, 16):
            return entry
    return None


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file in which Linux says to whom it gives huge pages."""
    monkeypatch.delenv("OFFLOAD_HUGE_PAGES", raising=False)
    monkeypatch.setattr(host_memory, "_SETTINGS", tmp_path)
    monkeypatch.setattr(host_memory, "_are_offered", host_memory._are_offered.__wrapped__)
    return tmp_path / "enabled"


def test_huge_pages_where_the_system_offers_them(offered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not host_memory.uses_huge_pages(), "no file: not Linux, or a kernel without them"
    for text, expected in (
        ("always [madvise] never", True),
        ("[always] madvise never", True),
        ("always madvise [never]", False),
    ):
        offered.write_text(text + "\n")
        assert host_memory.uses_huge_pages() is expected
    for value, expected in (("1", True), ("0", False)):
        monkeypatch.setenv("OFFLOAD_HUGE_PAGES", value)
        assert host_memory.uses_huge_pages() is expected
    monkeypatch.setenv("OFFLOAD_HUGE_PAGES", "yes")
    with pytest.raises(ValueError, match='OFFLOAD_HUGE_PAGES must be "0" or "1", not \'yes\'; leave it unset'):
        host_memory.uses_huge_pages()


needs_smaps = pytest.mark.skipif(
    not Path("/proc/self/smaps").exists() or not hasattr(mmap, "MADV_HUGEPAGE"), reason="needs Linux with huge pages"
)


@needs_smaps
def test_memory_asks_for_huge_pages_and_dies_with_its_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_HUGE_PAGES", "1")
    memory = host_memory.empty(NUM_BYTES + 100)
    assert (memory.shape, memory.dtype) == ((NUM_BYTES + 100,), torch.uint8)
    address = memory.data_ptr() + NUM_BYTES // 2
    mapping = mapping_of(address)
    assert mapping is not None
    assert " hg" in re.search(r"VmFlags:.*", mapping)[0]
    row = memory[:NUM_BYTES].view(torch.float32)[1000:2000].fill_(3.0)
    del memory
    gc.collect()
    assert mapping_of(address) is not None, "a view keeps the memory"
    assert row.sum() == 3000
    del row
    gc.collect()
    mapping = mapping_of(address)
    assert mapping is None or " hg" not in re.search(r"VmFlags:.*", mapping)[0], "the memory is never given back"


@needs_smaps
@pytest.mark.parametrize(("value", "num_bytes"), [("0", NUM_BYTES), ("1", 1000)])
def test_ordinary_memory_where_huge_pages_are_not_wanted_or_too_large(
    monkeypatch: pytest.MonkeyPatch, value: str, num_bytes: int
) -> None:
    monkeypatch.setenv("OFFLOAD_HUGE_PAGES", value)
    memory = host_memory.empty(num_bytes)
    mapping = mapping_of(memory.data_ptr())
    assert mapping is not None
    assert " hg" not in re.search(r"VmFlags:.*", mapping)[0]
    assert memory.shape == (num_bytes,)


@needs_smaps
def test_state_of_an_optimizer_is_in_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_HUGE_PAGES", "1")
    state = Pool(torch.device("cpu"), None).host_state(3, NUM_BYTES // 4, pinned=False)
    assert not state.any()
    mapping = mapping_of(state[1].data_ptr())
    assert mapping is not None
    assert " hg" in re.search(r"VmFlags:.*", mapping)[0]


# Pairs of address bits whose exclusive or an AMD core guesses the way of its first-level cache by, as found out by Lipp
# et al., "Take A Way: Exploring the Security Implications of AMD's Cache Way Predictors", ASIA CCS 2020.
WAY_PREDICTOR = ((12, 27), (13, 26), (14, 25), (15, 20), (16, 21), (17, 22), (18, 23), (19, 24))


def predicted(address: int) -> tuple[int, ...]:
    return tuple((address >> low ^ address >> high) & 1 for low, high in WAY_PREDICTOR)


@pytest.mark.parametrize("row_bytes", [1 << 26, 1 << 27, 1 << 28, 3 << 27, 1 << 29, 1 << 30, 4 * 10**8, 4096, 4])
def test_rows_do_not_collide_in_the_first_level_cache(row_bytes: int) -> None:
    rows = host_memory.empty_rows(4, row_bytes)  # of which nothing is touched
    assert rows.shape == (4, row_bytes)
    assert all(row.is_contiguous() for row in rows)
    starts = [row.data_ptr() for row in rows]
    same_set = [(a, b) for a, b in itertools.combinations(starts, 2) if (a - b) % 4096 == 0]
    assert not [(a, b) for a, b in same_set if predicted(a) == predicted(b)]
    assert rows.untyped_storage().nbytes() - 4 * row_bytes <= 4 << 16


def test_rows_are_apart_only_where_they_must_be() -> None:
    assert host_memory.empty_rows(3, 1000).is_contiguous()
    assert host_memory.empty_rows(3, (1 << 27) + 4096).is_contiguous()
    assert not host_memory.empty_rows(3, 1 << 27).is_contiguous()
    assert host_memory.empty_rows(3, 0).shape == (3, 0)


@pytest.mark.parametrize("plan", ["host", Stride(2)], ids=str)
@pytest.mark.usefixtures("one_torch_thread")
def test_training_in_rows_that_are_apart(monkeypatch: pytest.MonkeyPatch, plan: str | Stride) -> None:
    """Updates, visits to slots, and a checkpoint from such rows into ordinary ones."""

    def run(steps: range, state_dict: dict[str, object] | None = None) -> tuple[object, dict[str, object]]:
        model = mlp()
        optimizer = offload.AdamW(model.parameters(), plan=plan, subgroup_numel=600)
        if state_dict is not None:
            optimizer.load_state_dict(state_dict)
        return train(model, optimizer, steps=steps), optimizer.state_dict()

    trained, expected = run(range(3))
    with monkeypatch.context() as patch:
        patch.setattr(host_memory, "_COLLIDING_BYTES", 64)  # every parameter's numel is a multiple of 16
        patch.setattr(host_memory, "_SKEW_BYTES", 4096)
        apart, state_dict = run(range(3))
    assert_same_bits(apart, trained)
    assert_same_bits(
        [entry[name] for entry in state_dict["state"].values() for name in entry],
        [entry[name] for entry in expected["state"].values() for name in entry],
    )
    assert_same_bits(run(range(3, 5), state_dict)[0], run(range(3, 5), expected)[0])
