"""Make the virtual environment of the Makefile and put torch into it: ``python make_environment.py DIRECTORY``.

Runs on the base Python, so it uses the standard library only. What it decides is which torch:

- a torch that the environment already has, in the supported range, stays;
- with an NVIDIA driver, a base Python that has such a torch with CUDA lends it to the environment; otherwise the
  ordinary wheel is installed, which on Linux is built with CUDA;
- without one, the CPU build, which is several gigabytes smaller: from wherever pip is configured to look, if that
  place has it, else through uv, which knows where PyTorch publishes its CPU builds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

MINIMUM_PYTHON = (3, 10)
MINIMUM_TORCH = (2, 10)
TESTED_TORCH = "2.13.0"

# Prints the version and whether torch was built for CUDA, or fails.
PROBE = "import torch; print(torch.__version__, torch.version.cuda is not None)"


def has_nvidia_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()


def usable_torch(python: str, *, with_cuda: bool) -> str | None:
    """The version of the torch that ``python`` imports, or None if there is none in the supported range.

    With ``with_cuda`` a torch that was built without CUDA doesn't count.
    """
    probe = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        return None
    version, built_with_cuda = probe.stdout.split()
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_TORCH:
        return None
    return version if built_with_cuda == "True" or not with_cuda else None


def pip(python: str, *arguments: str) -> bool:
    return subprocess.run([python, "-m", "pip", *arguments], check=False).returncode == 0


def install_cpu_torch(python: str) -> bool:
    # PyPI has no builds with a local version, so this finds one only where pip was configured to look elsewhere too.
    if pip(python, "install", "--quiet", f"torch=={TESTED_TORCH}+cpu"):
        return True
    print(f"pip's own places have no CPU build of torch {TESTED_TORCH}: asking uv")
    if pip(python, "install", "--quiet", "uv"):
        uv = [python, "-m", "uv", "pip", "install", "--python", python, "--torch-backend=cpu", f"torch=={TESTED_TORCH}"]
        if subprocess.run(uv, check=False).returncode == 0:
            return True
    print(f"No CPU build found: installing the ordinary torch {TESTED_TORCH}, which may be the large one with CUDA")
    return pip(python, "install", f"torch=={TESTED_TORCH}")


def install_torch(python: str, *, with_cuda: bool) -> bool:
    if with_cuda or sys.platform != "linux":
        return pip(python, "install", f"torch=={TESTED_TORCH}")
    return install_cpu_torch(python)


def make_environment(directory: Path, *, lend_packages: bool) -> str:
    """Create the virtual environment, or complete one that was begun; its Python is returned."""
    python = directory / "bin" / "python"
    try:
        venv.EnvBuilder(with_pip=True, system_site_packages=lend_packages, symlinks=True).create(directory)
    except subprocess.CalledProcessError:
        raise SystemExit(
            f"{sys.executable} cannot make a virtual environment with pip in it. On Debian and Ubuntu: "
            "apt install python3-venv. Another Python: make PYTHON=python3.12 …"
        ) from None
    return os.fspath(python.absolute())


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(f"usage: {sys.argv[0]} DIRECTORY")
    if sys.version_info < MINIMUM_PYTHON:
        found, needed = sys.version.split()[0], ".".join(map(str, MINIMUM_PYTHON))
        raise SystemExit(f"Python {needed} or newer is needed and this is {found}; try make PYTHON=python3.12 …")
    with_cuda = has_nvidia_driver()
    lend_packages = with_cuda and usable_torch(sys.executable, with_cuda=True) is not None
    python = make_environment(Path(sys.argv[1]), lend_packages=lend_packages)
    # Without a driver any build will do: one that is there costs nothing to keep.
    version = usable_torch(python, with_cuda=with_cuda)
    if version is None:
        print(f"installing torch {TESTED_TORCH} ({'with CUDA' if with_cuda else 'CPU build'})", flush=True)
        if not install_torch(python, with_cuda=with_cuda):
            raise SystemExit("torch could not be installed; pip's lines above say why")
        version = usable_torch(python, with_cuda=False)
    if version is None:
        raise SystemExit("torch was installed but does not import; its traceback: " + f"{python} -c 'import torch'")
    print(f"torch {version} in {sys.argv[1]}")


if __name__ == "__main__":
    main()
