"""The compiled library on processors without AVX: it loads, and its scalar path alone is used."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from offload.kernels import available_implementations, default_implementation, native, selection

# VEX and EVEX instructions start with a v; all others that do are listed (verr and verw, of the 286).
AVX = re.compile(r"\t(?!verr|verw)v[a-z]\w+ |%[yz]mm")
SYMBOL = re.compile(r"^[0-9a-f]+ <(.*)>:$")


class WithoutAvx:
    """The library as it is on a processor that has none of it."""

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)

    def __getattr__(self, name: str) -> Any:
        if name == "offload_adam_supports":
            return lambda isa: int(isa == native.ISA_CODES["scalar"])
        return getattr(self._library, name)


@pytest.fixture
def without_avx(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("OFFLOAD_KERNEL", raising=False)
    for cache in (native.load, selection._works):
        cache.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(native, "_open", WithoutAvx)
        yield
    for cache in (native.load, selection._works):
        cache.cache_clear()


def test_scalar_path_alone_is_used(without_avx: None, buffers: Any, make_scalars: Any) -> None:
    assert available_implementations()[0] == default_implementation() == "scalar"
    assert not {"avx2", "avx512"} & set(available_implementations())
    state = buffers.adversarial(100)
    expected = state.clone().step(*make_scalars(), implementation="torch")
    state.step(*make_scalars()).assert_same_bits(expected)


@pytest.fixture(scope="module")
def disassembly() -> dict[str, list[str]]:
    """Instructions of the library by function."""
    if shutil.which("objdump") is None:
        pytest.skip("needs objdump")
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", str(native.LIBRARY)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in listing.splitlines():
        if match := SYMBOL.match(line):
            lines = functions.setdefault(match[1], [])
        else:
            lines.append(line)
    return functions


def test_no_avx_outside_its_regions(disassembly: dict[str, list[str]]) -> None:
    inside = [name for name in disassembly if "avx2::" in name or "avx512::" in name]
    if not any("UpdateRange" in name for name in inside):
        pytest.skip("the library is stripped, or not for x86-64: its functions have no names to tell them by")
    assert any(AVX.search(line) for name in inside for line in disassembly[name]), "the pattern finds no AVX at all"
    found = [f"{n}: {line}" for n in disassembly if n not in inside for line in disassembly[n] if AVX.search(line)]
    assert not found, "code that runs on every processor has instructions that not every processor has"
    wide = [n for n in inside if "avx2::" in n and any("%zmm" in line or "%k1" in line for line in disassembly[n])]
    assert not wide, "AVX-512 instructions in the AVX2 region"


# Python alone, without torch: an emulated processor is slow.
ON_AN_OLD_PROCESSOR = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
assert [library.offload_adam_supports(isa) for isa in (0, 1, 2)] == [1, 0, 0]
master, exp_avg, exp_avg_sq, grad = ((ctypes.c_float * 100)(*[value] * 100) for value in (1.0, 0.0, 0.0, 0.5))
scalars = (ctypes.c_float * 10)(1.0, 0.0, 1.0, 0.1, 0.999, 0.001, 1.0, 1e-8, -1.0)  # the last, an int, is 0
def update(isa):
    state = (master, exp_avg, exp_avg_sq, None, None, None)
    numel, chunk_numel = ctypes.c_size_t(100), ctypes.c_size_t(16)
    return library.offload_update(isa, 0, 0, *state, grad, 0, None, -1, numel, scalars, 0, 0, 0, 2, chunk_numel)
assert [update(0), update(1), update(2)] == [0, -1, -1]
assert all(0.05 <= value <= 0.0500001 for value in exp_avg), exp_avg[:]
assert all(value < 0 for value in master), master[:]
"""


@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="needs qemu-x86_64 (Debian: qemu-user)")
def test_on_an_emulated_processor_without_avx() -> None:
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin") or shutil.which("python3")
    command = ["qemu-x86_64", "-cpu", "Nehalem", python, "-S", "-c", ON_AN_OLD_PROCESSOR, str(native.LIBRARY)]
    subprocess.run(command, check=True, timeout=120)
