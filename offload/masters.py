"""Which parameter has its state where, and when its float32 master must be read again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from offload.adam import AdamSubgroup, ParamSlice, drop_remainder, flat
from offload.kernels import State
from offload.master_reading import MasterReader
from offload.shards import as_shard, local
from offload.state_entries import entry_views, load_entry
from offload.state_layout import StateKind, StateLayout

NO_SUBGROUP = -1
_ADAM_NAMES = {"first": "exp_avg", "second": "exp_avg_sq", "max_second": "max_exp_avg_sq"}


class ParamHome:
    """Where one parameter's state lives, and what the parameter looked like when its master last equalled it."""

    __slots__ = ("_address", "_storage", "_version", "actions", "entry", "fresh", "item", "subgroup", "torch_names")

    def __init__(
        self, subgroup: int, actions: AdamSubgroup, item: ParamSlice, torch_names: Mapping[str, str] = _ADAM_NAMES
    ) -> None:
        self.subgroup = subgroup
        self.torch_names = torch_names
        self.actions = actions
        self.item = item
        self.fresh = True  # its moments are zero: no step was counted since they were made
        self.entry: dict[str, Tensor] | None = None  # of ``optimizer.state``, made of views of this
        self._version = -1
        self._address = 0
        # Weak, so that replaced memory is free to go. The address alone will not do: freed memory is given out again.
        self._storage: StorageWeakRef | None = None

    @property
    def moments(self) -> tuple[str, ...]:
        """Fields of :class:`offload.kernels.State` besides the master."""
        return self.actions.layout.kind.moments

    @property
    def state(self) -> State:
        """The parameter's state, as views of the slab."""
        return self.actions.state_of(self.item)

    @property
    def changed(self) -> bool:
        param = local(self.item.param)
        return self._version != param._version or self._address != param.data_ptr() or not self._has_storage()

    def note_in_step(self) -> None:
        """Record that master and parameter are equal, or will be when what is enqueued has run."""
        param = local(self.item.param)
        self._version, self._address = param._version, param.data_ptr()
        if not self._has_storage():
            self._storage = StorageWeakRef(param.untyped_storage())  # type: ignore[no-untyped-call]

    def _has_storage(self) -> bool:
        return self._storage is not None and self._storage.cdata == local(self.item.param).untyped_storage()._cdata

    def recheck(self) -> None:
        """Compare master and parameter before the next step, whoever changed which."""
        self._version = -1

    def restart(self) -> None:
        """Make the state what it is before a first step. Nothing may be in flight."""
        for name, tensor in self.state.items():
            if name != "master":
                tensor.zero_()
        self.take_master()
        self.fresh = True

    def take_master(self) -> None:
        """Make the master what the parameter is, whatever it was. Nothing may be in flight."""
        state = self.state
        if state.is_compact:
            drop_remainder(state)
        else:
            state.master.copy_(flat(self.item.param))

    def views(self) -> dict[str, Tensor]:
        """The entry of ``optimizer.state``: see :mod:`offload.state_entries`. DTensors where the parameter is one."""
        param = self.item.param
        views = entry_views(self.state, tuple(local(param).shape), self.actions.dtype, self.torch_names)
        return {name: as_shard(view, param) for name, view in views.items()}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Take a saved entry, of whichever format. Nothing may be in flight."""
        if not load_entry(self.state, self.item.param, saved, self.moments, self.torch_names):
            self.take_master()
        self.recheck()  # the model's weights win over the checkpoint's masters, whichever was loaded first
        self.fresh = False


class MasterTable:
    """All parameters that have state.

    A user may edit parameters between steps (load a checkpoint, tie, clamp, average): the parameter then wins over
    its master. Edits are seen by autograd's version counter and by the address.
    """

    def __init__(self) -> None:
        self._homes: dict[Tensor, ParamHome] = {}

    def __len__(self) -> int:
        return len(self._homes)

    def __contains__(self, param: Tensor) -> bool:
        return param in self._homes

    def __getitem__(self, param: Tensor) -> ParamHome:
        return self._homes[param]

    def add(self, subgroup: int, actions: AdamSubgroup, torch_names: Mapping[str, str] = _ADAM_NAMES) -> None:
        """Parameters of a subgroup; ``torch_names``: what torch calls the fields of their state."""
        for item in actions.slices:
            self._homes[item.param] = ParamHome(subgroup, actions, item, torch_names)

    def add_empty(self, param: Tensor, kind: StateKind, torch_names: Mapping[str, str] = _ADAM_NAMES) -> None:
        """A parameter of which this rank holds nothing: it is in no subgroup, but has an entry as on the others."""
        layout = StateLayout(kind, 0)
        slab = torch.empty(layout.shape, dtype=layout.dtype)
        self.add(NO_SUBGROUP, AdamSubgroup([ParamSlice(param, 0, 0)], param.dtype, slab, None, layout), torch_names)

    def refresh(self, synchronize: Callable[[], None], check: Callable[[Tensor], None], *, all_: bool = False) -> None:
        """Read the masters of edited parameters (or all) again, after ``check`` accepted each and all is at rest."""
        homes = [home for home in self._homes.values() if all_ or home.changed]
        if not homes:
            return
        for home in homes:
            check(home.item.param)
        synchronize()
        reader = MasterReader()
        with torch.no_grad():
            for home in homes:
                reader.read(home.actions, home.item)
                home.note_in_step()

    def note_in_step(self, params: Iterable[Tensor]) -> None:
        for param in params:
            self._homes[param].note_in_step()
