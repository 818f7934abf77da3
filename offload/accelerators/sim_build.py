"""Builds the emulated device's C++ on first use, once per version of torch, Python and source."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.machinery
import importlib.util
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

logger = logging.getLogger(__name__)

_MODULE = "offload_sim"
_PACKAGE = Path(__file__).resolve().parents[1]
# In a checkout, and in an installed package (setup.py maps one to the other).
_SOURCE_DIRECTORIES = (_PACKAGE.parent / "csrc" / "sim", _PACKAGE / "csrc_sim")
# torch's headers take the time to compile, not our code: optimising more makes the device no faster.
_FLAGS = ["-O1", "-g0", "-DAT_PER_OPERATOR_HEADERS"]


def load_extension() -> ModuleType:
    """The compiled module, built if it is not in the cache.

    Raises:
        RuntimeError: there is no source, or the build failed; the message says what to do.
    """
    sources = _source_files()
    directory = cache_directory(sources)
    directory.mkdir(parents=True, exist_ok=True)
    library = directory / f"{_MODULE}.so"
    complete = directory / "complete"
    with _exclusive(directory / "build.flock"):
        if not complete.exists():
            _build(sources, directory)
            complete.touch()
    try:
        return _import(library)
    except (ImportError, OSError) as error:
        raise RuntimeError(
            f"the emulated device in {directory} does not load ({error}); remove that directory to build it again"
        ) from error


def cache_directory(sources: list[Path]) -> Path:
    """Where the library of these sources is kept: the name holds all that it depends on."""
    digest = hashlib.sha256()
    for path in sources:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(" ".join([*_FLAGS, platform.machine(), os.environ.get("CXX", "")]).encode())
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    version = f"{sys.implementation.cache_tag}-torch{torch.__version__}"
    return root / "offload" / f"sim-{version}-{digest.hexdigest()[:12]}"


def _source_files() -> list[Path]:
    for directory in _SOURCE_DIRECTORIES:
        if sources := sorted(path for path in directory.glob("*") if path.suffix in (".cpp", ".h")):
            return sources
    raise RuntimeError(
        f"no sources of the emulated device in {' or '.join(map(str, _SOURCE_DIRECTORIES))}: this installation is "
        f"incomplete; install the package again"
    )


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """One builder at a time. The lock goes with its holder: a killed build leaves nothing to wait for."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("another process builds the emulated device; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(sources: list[Path], directory: Path) -> None:
    from torch.utils import cpp_extension

    # torch's own lock is a plain file that a killed build leaves behind, for the next one to wait on for ever.
    (directory / "lock").unlink(missing_ok=True)
    # One translation unit: each of its own would read torch's headers again, and take three times as long together.
    unity = directory / f"{_MODULE}.cpp"
    unity.write_text("".join(f'#include "{path.name}"\n' for path in sources if path.suffix == ".cpp"))
    logger.warning("building the emulated device in %s, once: this takes about a minute", directory)
    try:
        with _scripts_on_path():
            cpp_extension.load(
                _MODULE,
                [str(unity)],
                extra_cflags=_FLAGS,
                extra_include_paths=[str(sources[0].parent)],
                build_directory=str(directory),
            )
    except (RuntimeError, ImportError, OSError, subprocess.SubprocessError) as error:
        raise RuntimeError(
            f"the emulated device could not be built: {error}\n"
            "It needs a C++ compiler that this torch supports (CXX names it), Python's headers and ninja "
            f"(pip install ninja). To start from nothing, remove {directory}"
        ) from error


@contextmanager
def _scripts_on_path() -> Iterator[None]:
    """Finds the ninja of a virtual environment that was not activated."""
    path = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), path])
    try:
        yield
    finally:
        os.environ["PATH"] = path


def _import(library: Path) -> ModuleType:
    if _MODULE in sys.modules:
        return sys.modules[_MODULE]
    loader = importlib.machinery.ExtensionFileLoader(_MODULE, str(library))
    spec = importlib.util.spec_from_loader(_MODULE, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE] = module
    loader.exec_module(module)
    return module
