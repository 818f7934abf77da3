"""Building the emulated device: cached, never hanging, and saying what to do when it fails."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from offload.accelerators import sim_build

LOAD = "from offload.testing import sim; sim.load()"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def run_python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, **environment},
    )


def test_nothing_is_registered_before_load() -> None:
    program = (
        "import torch\nfrom offload.testing import sim\nimport offload.accelerators\n"
        "device = torch.accelerator.current_accelerator()\nassert device is None or device.type != 'sim'\n"
        "try: sim.configure()\nexcept RuntimeError as error: print(error)\n"
    )
    done = run_python(program)
    assert done.returncode == 0, done.stderr
    assert "call offload.testing.sim.load() first" in done.stdout


def test_second_load_does_nothing(sim: ModuleType) -> None:
    sim.load()


def test_cache_depends_on_sources(cache: Path, tmp_path: Path) -> None:
    source = tmp_path / "a.cpp"
    source.write_text("int a;")
    first = sim_build.cache_directory([source])
    assert first.parent == cache / "offload"
    assert first == sim_build.cache_directory([source])
    source.write_text("int b;")
    assert first != sim_build.cache_directory([source])


@pytest.mark.parametrize("compiler", ["/bin/false", "/nowhere/c++"])
def test_failed_build_says_what_to_do(cache: Path, compiler: str) -> None:
    done = run_python(LOAD, XDG_CACHE_HOME=str(cache), CXX=compiler)
    assert done.returncode == 1
    assert "RuntimeError: the emulated device could not be built" in done.stderr
    assert "pip install ninja" in done.stderr
    assert str(cache) in done.stderr


def test_killed_build_leaves_nothing_to_wait_for(cache: Path) -> None:
    """The next process builds again; here with a compiler that then fails, so that it ends at once."""
    started, ended, compiler = cache / "started", cache / "ended", cache / "compiler"
    os.mkfifo(started)
    os.mkfifo(ended)
    compiler.write_text(
        "#!/bin/sh\n"
        # torch asks for its name and version first.
        'case " $* " in *" -c "*) ;; *) exec c++ "$@" ;; esac\n'
        f"test -p {started} || exit 1\n"
        f"echo started > {started}\n"
        f"cat {ended}\n"
    )
    compiler.chmod(0o755)
    environment = {"XDG_CACHE_HOME": str(cache), "CXX": str(compiler)}
    first = subprocess.Popen(
        [sys.executable, "-c", LOAD],
        env={**os.environ, **environment},
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    assert started.read_text() == "started\n"  # waits for it
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    with contextlib.suppress(OSError):  # ninja gives compilers groups of their own, so this one may live on
        os.close(os.open(ended, os.O_WRONLY | os.O_NONBLOCK))
    (directory,) = (cache / "offload").iterdir()
    assert (directory / "lock").exists()  # torch's, which its own builds would wait for
    assert not (directory / "complete").exists()
    started.unlink()
    second = run_python(LOAD, **environment)
    assert "RuntimeError: the emulated device could not be built" in second.stderr


def test_stale_lock_does_not_hang(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torch's build lock is a file that a killed build leaves behind."""
    source = tmp_path / "broken.cpp"
    source.write_text("this is not C++")
    monkeypatch.setattr(sim_build, "_SOURCE_DIRECTORIES", (tmp_path,))
    directory = sim_build.cache_directory([source])
    directory.mkdir(parents=True)
    (directory / "lock").touch()
    with pytest.raises(RuntimeError, match="could not be built"):
        sim_build.load_extension()
    assert not (directory / "complete").exists()


def test_unloadable_library_says_what_to_remove(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "empty.cpp"
    source.touch()
    monkeypatch.setattr(sim_build, "_SOURCE_DIRECTORIES", (tmp_path,))
    monkeypatch.setattr(sim_build, "_MODULE", "offload_sim_broken")
    directory = sim_build.cache_directory([source])
    directory.mkdir(parents=True)
    (directory / "offload_sim_broken.so").write_text("half a library")
    (directory / "complete").touch()
    with pytest.raises(RuntimeError, match="remove that directory"):
        sim_build.load_extension()


def test_installed_without_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sim_build, "_SOURCE_DIRECTORIES", (tmp_path / "nowhere",))
    with pytest.raises(RuntimeError, match="install the package again"):
        sim_build.load_extension()
