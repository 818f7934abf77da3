"""Every implementation gives the same bits as the torch reference, however the work is cut."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload.kernels import available_implementations, native, threads


def others() -> list[str]:
    """All that must equal "torch": every one that can run here, or these tests would prove less than they say."""
    names = [name for name in available_implementations() if name != "torch"]
    assert {"scalar", "numba"} <= set(names), f"not built: {names}; run pip install -e ."
    supported = native.NativeKernel(ctypes.CDLL(str(native.LIBRARY))).isas
    assert set(supported) <= set(names), f"the self-test rejected {set(supported) - set(names)}"
    return names


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes calls of any size go parallel, in chunks of the given numel."""
    from offload.kernels import numba_kernel

    def choose(chunk_numel: int) -> None:
        monkeypatch.setattr(threads, "MIN_PARALLEL_NUMEL", 0)
        monkeypatch.setattr(native, "CHUNK_NUMEL", chunk_numel)
        monkeypatch.setattr(numba_kernel, "CHUNK_NUMEL", chunk_numel)

    return choose


@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize("mode", ["adamw", "adam", "no decay", "from gradient", "no momentum"])
def test_same_bits_for_every_format_and_mode(
    buffers: Any, make_scalars: Any, modes: Any, formats: Any, mode: str, amsgrad: bool
) -> None:
    start = buffers.adversarial(64 * 29 + 7, *formats, amsgrad=amsgrad)
    scalars = make_scalars(**modes[mode])
    expected = start.clone().step(*scalars, implementation="torch")
    for name in others():
        start.clone().step(*scalars, implementation=name).assert_same_bits(expected, name)


@pytest.mark.parametrize("numel", [0, 1, 2, 15, 16, 17, 31, 63, 64, 65, 127, 128, 129, 191, 1000, 1025])
def test_same_bits_for_every_size(buffers: Any, make_scalars: Any, numel: int) -> None:
    start = buffers.adversarial(numel, torch.bfloat16, torch.bfloat16, amsgrad=True, seed=numel)
    expected = start.clone().step(*make_scalars(), implementation="torch")
    for name in others():
        start.clone().step(*make_scalars(), implementation=name).assert_same_bits(expected, name)


@pytest.mark.parametrize("chunk_numel", [64, 64 * 37, 1000, 1 << 16])
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_same_bits_for_every_cut(
    buffers: Any, make_scalars: Any, small_chunks: Any, num_threads: int, chunk_numel: int
) -> None:
    small_chunks(chunk_numel)
    start = buffers.adversarial(150_001, torch.bfloat16, torch.bfloat16, seed=1)
    expected = start.clone().step(*make_scalars(), implementation="torch")
    for name in others():
        got = start.clone().step(*make_scalars(), implementation=name, num_threads=num_threads)
        got.assert_same_bits(expected, name)


@pytest.mark.parametrize("offset", [1, 2, 3, 8, 16])
def test_unaligned_views_and_nothing_outside_them(buffers: Any, make_scalars: Any, formats: Any, offset: int) -> None:
    numel = 64 * 5 + 3
    whole = buffers.adversarial(offset + numel + 80, *formats, amsgrad=True)
    inside = slice(offset, offset + numel)
    expected = whole.clone()
    expected.map(lambda tensor: tensor[inside].clone())
    result = whole.map(lambda tensor: tensor[inside].clone()).step(*make_scalars(), implementation="torch")
    for into, part in zip(expected.tensors(), result.tensors(), strict=True):
        if into is not None:
            into[inside] = part
    for name in others():
        got = whole.clone()
        got.map(lambda tensor: tensor[inside]).step(*make_scalars(), implementation=name)
        got.assert_same_bits(expected, name)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_same_bits_for_any_scalars(buffers: Any, make_scalars: Any, data: st.DataObject) -> None:
    dtype = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
    unit = st.floats(0, 1, exclude_max=True)
    start = buffers.adversarial(
        data.draw(st.integers(0, 700)),
        data.draw(dtype),
        data.draw(st.none() | dtype),
        amsgrad=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 2**32)),
    )
    scalars = make_scalars(
        steps=[data.draw(st.integers(1, 10**7))],
        lr=data.draw(st.floats(0, 1e4)),
        betas=(data.draw(unit), data.draw(unit)),
        eps=data.draw(st.floats(0, 1)),
        weight_decay=data.draw(st.floats(0, 10)),
        decoupled=data.draw(st.booleans()),
        maximize=data.draw(st.booleans()),
        grad_scale=data.draw(st.floats(width=32)),
    )
    expected = start.clone().step(*scalars, implementation="torch")
    for name in others():
        start.clone().step(*scalars, implementation=name).assert_same_bits(expected, (name, scalars))


def test_copy_is_the_rounded_master_and_the_gradient_is_only_read(
    buffers: Any, make_scalars: Any, formats: Any
) -> None:
    grad_dtype, out_dtype = formats
    for name in available_implementations():
        state = buffers.adversarial(1000, grad_dtype, out_dtype)
        grad = state.grad.clone()
        state.step(*make_scalars(maximize=True, grad_scale=0.5), implementation=name)
        assert torch.equal(state.grad.view(torch.int8), grad.view(torch.int8)), name
        if out_dtype is not None:
            assert torch.equal(state.param_out.nan_to_num(-1), state.master.to(out_dtype).nan_to_num(-1)), name


def test_denormals_survive_a_caller_who_flushes_them(buffers: Any, make_scalars: Any, small_chunks: Any) -> None:
    small_chunks(512)
    tiny = buffers.adversarial(4096, torch.float32, torch.float16).map(lambda tensor: tensor * 1e-38)
    tiny.master.mul_(1e-3)
    scalars = make_scalars(lr=1e-40)
    expected = tiny.clone().step(*scalars, implementation="torch")
    assert ((expected.master != 0) & (expected.master.abs() < 1e-38)).any()
    for name in available_implementations():
        got = tiny.clone()
        assert torch.set_flush_denormal(True)
        try:
            assert make_scalars(lr=1e-40) == scalars
            got.step(*scalars, implementation=name, num_threads=2)
            still_flushes = sys.float_info.min * 0.5 == 0.0
        finally:
            torch.set_flush_denormal(False)
        got.assert_same_bits(expected, name)
        assert still_flushes, f"{name} did not restore the caller's own mode"


@pytest.mark.parametrize(("implementation", "num_steps"), [(None, 400), ("numba", 10)])
def test_callers_at_once_share_the_pool(
    buffers: Any, make_scalars: Any, small_chunks: Any, implementation: str | None, num_steps: int
) -> None:
    """Many short calls of a few chunks each, so that one caller's end often meets another's start."""
    small_chunks(1024)
    start = buffers.adversarial(8 * 1024, torch.bfloat16, torch.bfloat16)
    scalars = make_scalars(steps=range(1, num_steps + 1))
    expected = start.clone().step(*scalars)
    results = [start.clone() for _ in range(6)]
    options = {"implementation": implementation, "num_threads": 3}
    callers = [threading.Thread(target=each.step, args=scalars, kwargs=options) for each in results]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for each in results:
        each.assert_same_bits(expected)


class RepeatedMemory:
    """A virtual range of many bytes over a few physical ones, repeated: 2**32 elements without the memory for them."""

    def __init__(self, period_bytes: int, num_periods: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long]
        file = os.memfd_create("repeated")
        os.ftruncate(file, period_bytes)
        read_write, shared, fixed = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, 0x10
        no_access, private = 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._unmap, self._num_bytes = libc.munmap, period_bytes * num_periods
        self._address = libc.mmap(None, self._num_bytes, no_access, private, -1, 0)
        for start in range(self._address, self._address + self._num_bytes, period_bytes):
            assert libc.mmap(start, period_bytes, read_write, shared | fixed, file, 0) == start
        os.close(file)

    def tensor(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.frombuffer((ctypes.c_char * self._num_bytes).from_address(self._address), dtype=dtype)

    def close(self) -> None:
        self._unmap(ctypes.c_void_p(self._address), ctypes.c_size_t(self._num_bytes))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs memfd_create")
@pytest.mark.parametrize("implementation", [None, "numba"])
def test_more_than_two_to_the_32_elements(buffers: Any, make_scalars: Any, implementation: str | None) -> None:
    """On one thread, an update over n repetitions of the same memory is n updates of it: nothing skipped or wrapped."""
    period, repetitions = 3 << 18, 5462  # an index that wraps at 2**32 lands elsewhere in the period
    expected = buffers.ordinary(period, torch.bfloat16, torch.bfloat16)
    memories = [RepeatedMemory(tensor.nbytes, repetitions) for tensor in expected.tensors() if tensor is not None]
    views = iter(memories)
    repeated = expected.map(lambda tensor: next(views).tensor(tensor.dtype))
    for view, values in zip(repeated.tensors(), expected.tensors(), strict=True):
        if view is not None:
            view[:period] = values
    assert repeated.master.numel() > 2**32
    [scalars] = make_scalars([1], eps=1e-3, weight_decay=0.0)
    repeated.step(scalars, implementation=implementation, num_threads=1)
    expected.step(*[scalars] * repetitions)
    repeated.map(lambda tensor: tensor[-period:].clone()).assert_same_bits(expected)
    del repeated
    for memory in memories:
        memory.close()


AFTER_A_FORK = """
import os, signal, sys, torch
from offload.kernels import AdamScalars, adam_step, native, threads
torch.set_num_threads(1)  # torch's own threads don't survive a fork
threads.MIN_PARALLEL_NUMEL, native.CHUNK_NUMEL = 0, 1024
scalars = AdamScalars.at_step(lr=1e-3, betas=(.9, .999), eps=1e-8, weight_decay=.1, step=1, decoupled=True)
def update():
    buffers = [torch.full((100_000,), value) for value in (1.0, 0.5, 0.25, 0.125)]
    adam_step(*buffers, scalars=scalars, implementation=sys.argv[1], num_threads=3)
    return buffers[0]
before = update()
child = os.fork()
if child == 0:
    signal.alarm(60)
    os._exit(0 if torch.equal(update(), before) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert torch.equal(update(), before)
"""


@pytest.mark.parametrize("implementation", ["scalar", "numba"])
def test_threads_after_a_fork_and_at_exit(implementation: str) -> None:
    """The child makes threads of its own; both processes end, with sleeping workers, by themselves."""
    command = [sys.executable, "-c", AFTER_A_FORK, implementation]
    subprocess.run(command, check=True, timeout=120, env={**os.environ, "PYTHONWARNINGS": "ignore"})
