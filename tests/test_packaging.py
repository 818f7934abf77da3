"""What the distribution promises: a light import, one set of supported versions, and builds without a compiler."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("numba", "deepspeed", "transformers", "accelerate", "pynvml", "matplotlib", "psutil", "triton", "ninja")
BUILT = (
    "offload",
    "csrc",
    "integrations",
    "setup.py",
    "pytest_offload.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
)


def test_import_is_light_and_registers_no_device() -> None:
    # Figures: bench/import_time.py. Here only what would make it slow, since a clock says little on a busy machine.
    # A registered emulated device would win over CUDA in torch.accelerator.
    code = """
import sys, torch
before = set(sys.modules)
import offload
print(*set(sys.modules) - before)
import offload.testing
assert torch._C._get_privateuse1_backend_name() == "privateuseone"
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OFFLOAD_")}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    added = {name.partition(".")[0] for name in result.stdout.split()}
    assert "offload" in added
    assert added.isdisjoint(HEAVY)


def test_setup_script_agrees_with_the_metadata() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "make_environment.py"))
    metadata = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"torch>={".".join(map(str, script["MINIMUM_TORCH"]))}"' in metadata
    assert f'requires-python = ">={".".join(map(str, script["MINIMUM_PYTHON"]))}"' in metadata


def test_build_needs_setuptools_only() -> None:
    # torch or numpy here would be downloaded into an isolated environment for every build.
    metadata = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    match = re.search(r"^requires = \[(.*)\]$", metadata, re.MULTILINE)
    assert match is not None
    assert re.fullmatch(r'"setuptools>=\d+"', match[1])


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of what a build reads, without what an earlier build left."""
    root = tmp_path / "sources"
    root.mkdir()
    for name in BUILT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(ROOT / name, root)
    return root


def build_wheel(sources: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # In this environment rather than an isolated one, which needs a network; so torch is there and must be hidden.
    code = "import sys; sys.modules['torch'] = None; import setuptools.build_meta as b; b.build_wheel('dist')"
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=sources, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def names_in(wheel_folder: Path) -> list[str]:
    (wheel,) = wheel_folder.glob("*.whl")
    assert "-py3-none-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false", "OFFLOAD_REQUIRE_CPP": "0"}


def test_wheel_builds_without_a_compiler(sources: Path) -> None:
    result = build_wheel(sources, **NO_COMPILER)
    assert result.returncode == 0, result.stderr
    assert "C++" in result.stderr, "nothing says that the compiled kernels are missing"
    names = names_in(sources / "dist")
    assert not [name for name in names if name.endswith((".so", ".dll"))]
    for expected in (
        "offload/__init__.py", "offload/py.typed", "offload/integrations/deepspeed/__init__.py", "pytest_offload.py",
    ):  # fmt: skip
        assert expected in names
    assert not [name for name in names if name.startswith(("tests", "integrations"))]


def test_a_required_compiler_that_is_missing_fails_the_build(sources: Path) -> None:
    result = build_wheel(sources, **{**NO_COMPILER, "OFFLOAD_REQUIRE_CPP": "1"})
    assert result.returncode != 0


def test_sdist_carries_the_sources_of_both_libraries(sources: Path) -> None:
    code = "import setuptools.build_meta as backend; print(backend.build_sdist('dist'))"
    subprocess.run([sys.executable, "-c", code], cwd=sources, capture_output=True, check=True)
    (archive,) = (sources / "dist").glob("*.tar.gz")
    shutil.unpack_archive(archive, sources / "unpacked", filter="data")
    (unpacked,) = (sources / "unpacked").iterdir()
    for part in ("cpu_adam", "sim"):
        carried = {path.name for path in (unpacked / "csrc" / part).iterdir()}
        assert {path.name for path in (ROOT / "csrc" / part).iterdir()} <= carried


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_installed_wheel_finds_its_kernels_and_the_emulated_device(sources: Path, tmp_path: Path) -> None:
    result = build_wheel(sources, OFFLOAD_REQUIRE_CPP="1")
    assert result.returncode == 0, result.stderr
    installed = tmp_path / "installed"
    (wheel,) = (sources / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    code = (
        "import offload; from offload.kernels import available_implementations as available; "
        "from offload.testing import sim; import offload.integrations.deepspeed; "
        "assert 'scalar' in available(), available(); sim.load(); print(offload.__file__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert str(installed) in ran.stdout
