"""Masters: float32 values behind bfloat16 and float16 parameters, and when they are read from these again."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from offload import master_reading
from offload.adam import AdamSubgroup, ParamSlice
from offload.masters import MasterTable
from offload.state_layout import StateKind, StateLayout
from tests.training import assert_same_bits, bits

STATE_ROWS = ("master", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
LOW_PRECISION = (torch.bfloat16, torch.float16)


def table_of(*params: nn.Parameter, num_rows: int = 3) -> tuple[MasterTable, AdamSubgroup]:
    """All parameters in one subgroup on the CPU, masters read."""
    slices, offset = [], 0
    for param in params:
        slices.append(ParamSlice(param, offset, param.numel()))
        offset += param.numel()
    actions = AdamSubgroup(slices, params[0].dtype, torch.zeros(num_rows, offset), None)
    table = MasterTable()
    table.add(0, actions)
    table.refresh(lambda: None, lambda param: None)
    return table, actions


class Calls:
    """What :meth:`MasterTable.refresh` asked for, in order."""

    def __init__(self) -> None:
        self.log: list[object] = []

    def refresh(self, table: MasterTable, **kwargs: bool) -> list[object]:
        """Returns the parameters that were read again, preceded by checks and one synchronization."""
        self.log = []
        table.refresh(lambda: self.log.append("synchronize"), self.log.append, **kwargs)
        return self.log


def same(log: list[object], expected: list[object]) -> bool:
    return len(log) == len(expected) and all(a is b for a, b in zip(log, expected, strict=True))


def test_masters_are_read_at_first() -> None:
    params = nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(7))
    _, actions = table_of(*params)
    assert_same_bits(actions.state[0], torch.cat([param.detach().flatten() for param in params]))


def test_only_edited_parameters_are_read_again() -> None:
    params = [nn.Parameter(torch.randn(4)) for _ in range(3)]
    table, actions = table_of(*params)
    calls = Calls()
    assert calls.refresh(table) == []
    with torch.no_grad():
        params[1].fill_(2.0)
    assert same(calls.refresh(table), [params[1], "synchronize"])  # checked before anything waits
    assert_same_bits(actions.state[0, 4:8], torch.full((4,), 2.0))
    assert calls.refresh(table) == []
    assert same(calls.refresh(table, all_=True), [*params, "synchronize"])


def test_a_refused_edit_is_not_read() -> None:
    param = nn.Parameter(torch.zeros(4))
    table, actions = table_of(param)
    with torch.no_grad():
        param.fill_(2.0)

    def refuse(param: Tensor) -> None:
        raise ValueError("no")

    for _ in range(2):  # and is refused again
        with pytest.raises(ValueError, match="no"):
            table.refresh(lambda: None, refuse)
    assert_same_bits(actions.state[0], torch.zeros(4))


def test_replaced_memory_is_an_edit() -> None:
    param = nn.Parameter(torch.zeros(1024))
    table, actions = table_of(param)
    calls = Calls()
    address = param.data_ptr()
    for value in range(1, 5):  # the allocator gives freed memory out again: an address proves nothing
        param.data = torch.full((1024,), float(-value))
        param.data = torch.full((1024,), float(value))
        assert same(calls.refresh(table), [param, "synchronize"])
        assert_same_bits(actions.state[0], param.detach())
    del address
    whole = torch.arange(2048.0)
    param.data = whole[:1024]
    calls.refresh(table)
    param.data = whole[1024:]  # the same storage
    assert same(calls.refresh(table), [param, "synchronize"])


def test_noting_a_parameter_does_not_keep_its_old_memory() -> None:
    param = nn.Parameter(torch.zeros(1024))
    table, _ = table_of(param)
    old = StorageWeakRef(param.untyped_storage())
    param.data = torch.ones(1024)
    assert old.expired()
    assert Calls().refresh(table)


def test_noted_edits_are_not_read() -> None:
    """A step writes parameters itself, with the values that its masters have or will have."""
    param = nn.Parameter(torch.zeros(4))
    table, _ = table_of(param)
    with torch.no_grad():
        param.fill_(1.0)
    table.note_in_step([param])
    assert Calls().refresh(table) == []


class Allocations(TorchDispatchMode):
    """Operations whose result is new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.returns[0].alias_info is None:  # neither a view nor in place
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("state_format", "dtype"),
    [("fp32", dtype) for dtype in (torch.float32, *LOW_PRECISION)]
    + [(name, torch.bfloat16) for name in ("split16", "bf16", "int8")],
)
def test_reading_in_pieces_allocates_nothing(
    state_format: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits of the plain formula, from a parameter of which about half was edited."""
    monkeypatch.setattr(master_reading, "PIECE_NUMEL", 1 << 10)
    numel = (1 << 11) + 5
    layout = StateLayout(StateKind(state_format), numel)
    slab = torch.zeros(layout.shape, dtype=layout.dtype)
    for field in layout.state(slab).tensors():
        if field is not None:
            field.copy_(torch.randn(field.shape) * (1 if field.is_floating_point() else 1000))
    master = slab[0] if state_format == "fp32" else torch.randn(numel)
    param = nn.Parameter(torch.where(torch.rand(numel) < 0.5, master, torch.randn(numel)).to(dtype))
    expected = slab.clone()
    master_reading._read_on_device(layout.state(expected), param.detach())
    actions = AdamSubgroup([ParamSlice(param, 0, numel)], dtype, slab, None, layout)
    reader = master_reading.MasterReader()
    with torch.no_grad(), Allocations() as allocations:
        reader.read(actions, actions.slices[0])
    assert_same_bits(slab.view(torch.uint8), expected.view(torch.uint8))
    assert allocations.found == []


# ---- which value wins


@settings(deadline=None)
@given(
    value=st.floats(width=32, allow_nan=False, allow_infinity=False),
    edit=st.floats(width=16, allow_nan=False),
    dtype=st.sampled_from(LOW_PRECISION),
    is_edited=st.booleans(),
)
def test_an_edit_wins_and_no_edit_keeps_the_master(
    value: float, edit: float, dtype: torch.dtype, is_edited: bool
) -> None:
    master = torch.tensor([value])
    rounded = master.to(dtype)
    param = nn.Parameter(torch.tensor([edit]).to(dtype) if is_edited else rounded.clone())
    item = ParamSlice(param, 0, 1)
    actions = AdamSubgroup([item], dtype, torch.stack([master, master, master]), None)
    with torch.no_grad():
        master_reading.MasterReader().read(actions, item)
    still_equal = bool((bits(param) == bits(rounded)).all())
    assert_same_bits(actions.state[0], master if still_equal else param.detach().float())
    assert_same_bits(actions.state[1:], torch.stack([master, master]))
    assert_same_bits(actions.state[0].to(dtype), param.detach())


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
def test_every_special_value_is_an_edit(dtype: torch.dtype) -> None:
    """Of zeros the sign counts, and NaN is taken over (which NaN, conversions do not say)."""
    param = nn.Parameter(torch.tensor([0.0, -0.0, 1.0, 2.0, 3.0]).to(dtype))
    table, actions = table_of(param)
    edited = torch.tensor([-0.0, 0.0, math.nan, math.inf, -math.inf]).to(dtype)
    with torch.no_grad():
        param.copy_(edited)
    Calls().refresh(table)
    master = actions.state[0].to(dtype)
    assert bool(((bits(master) == bits(edited)) | (master.isnan() & edited.isnan())).all())


# ---- homes


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
@pytest.mark.parametrize("num_rows", [3, 4])
def test_views_have_torchs_names_and_the_parameters_shape(dtype: torch.dtype, num_rows: int) -> None:
    params = nn.Parameter(torch.randn(2, 3).to(dtype)), nn.Parameter(torch.randn(5).to(dtype))
    table, actions = table_of(*params, num_rows=num_rows)
    home = table[params[0]]
    assert ("max_second" in home.moments) == (num_rows == 4)
    views = home.views()
    expected = [name for name in STATE_ROWS[:num_rows] if dtype != torch.float32 or name != "master"]
    assert list(views) == expected
    for name, view in views.items():
        assert view.shape == (2, 3)
        view.fill_(7.0)
        assert_same_bits(actions.state[STATE_ROWS.index(name), :6], torch.full((6,), 7.0))
    assert not (actions.state[:, 6:] == 7).any()


def test_membership() -> None:
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]  # equal values: identity counts
    table, _ = table_of(params[0])
    assert params[0] in table
    assert params[1] not in table


@pytest.mark.parametrize("num_rows", [3, 4])
def test_restart_is_as_before_the_first_step(num_rows: int) -> None:
    params = [nn.Parameter(torch.randn(4).bfloat16()) for _ in range(2)]
    table, actions = table_of(*params, num_rows=num_rows)
    with torch.no_grad():
        actions.state.add_(1e-4)
    untouched = actions.state[:, 4:].clone()
    home = table[params[0]]
    home.fresh = False
    with torch.no_grad():
        home.restart()
    assert home.fresh
    assert_same_bits(actions.state[0, :4], params[0].detach().float())
    assert_same_bits(actions.state[1:, :4], torch.zeros(num_rows - 1, 4))
    assert_same_bits(actions.state[:, 4:], untouched)
