"""The doctor: what it says of healthy and of broken machines, with real pynvml over a stand-in for NVIDIA's library."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from offload.cli import main
from offload.doctor import GOOD, NO_DEVICE, NOT_GOOD, Finding, exit_status, remedies
from offload.doctor.device import NO_ACCELERATOR, examine_device
from offload.doctor.host import examine_host
from offload.doctor.nvml import examine_nvml
from offload.doctor.software import examine_kernels, examine_versions
from offload.interconnect.buffers import Pair
from offload.interconnect.harness import Harness

pynvml = pytest.importorskip("pynvml")

# What pynvml calls of the library, with the answers of a healthy device; the test sets what each returns.
STAND_IN = r"""
#include <stdlib.h>
#include <string.h>
static int number(const char* name, int otherwise) { const char* text = getenv(name); return text ? atoi(text) : otherwise; }
int nvmlInitWithFlags(unsigned flags) { return number("STAND_IN_INIT", 0); }
int nvmlShutdown(void) { return 0; }
const char* nvmlErrorString(int code) { return "said by the stand-in"; }
int nvmlSystemGetDriverVersion(char* text, unsigned size) { strncpy(text, "999.1", size); return 0; }
int nvmlDeviceGetCount_v2(unsigned* count) { *count = 1; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** handle) { *handle = &number; return number("STAND_IN_DEVICE", 0); }
int nvmlDeviceGetName(void* handle, char* text, unsigned size) { strncpy(text, "Stand-in 1000", size); return 0; }
int nvmlDeviceGetCurrPcieLinkGeneration(void* handle, unsigned* value) { *value = number("STAND_IN_GENERATION", 5); return number("STAND_IN_LINK", 0); }
int nvmlDeviceGetMaxPcieLinkGeneration(void* handle, unsigned* value) { *value = 5; return 0; }
int nvmlDeviceGetCurrPcieLinkWidth(void* handle, unsigned* value) { *value = number("STAND_IN_WIDTH", 16); return 0; }
int nvmlDeviceGetMaxPcieLinkWidth(void* handle, unsigned* value) { *value = 16; return 0; }
"""  # noqa: E501


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for the stand-in")
    folder = tmp_path_factory.mktemp("nvml")
    (folder / "stand_in.c").write_text(STAND_IN)
    path = folder / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", path, folder / "stand_in.c"], check=True)
    return path


@pytest.fixture
def stand_in(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pynvml calls the stand-in."""
    monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(library)))
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})


# ---- NVML


def test_healthy_device(stand_in: None) -> None:
    users = pynvml._nvmlLib_refcount
    findings = examine_nvml()
    assert pynvml._nvmlLib_refcount == users, "the library is given back"
    assert [finding.status for finding in findings] == ["good", "good", "good"]
    text = "\n".join(map(str, findings))
    assert "driver 999.1" in text
    assert "device 0: Stand-in 1000" in text
    assert "PCIe generation 5 of 5, 16 of 16 lanes" in text
    assert not remedies(findings)


@pytest.mark.parametrize(
    ("fault", "line", "remedy"),
    [
        ("NVML_ERROR_DRIVER_NOT_LOADED", "installed and not loaded", "modprobe nvidia"),
        ("NVML_ERROR_LIB_RM_VERSION_MISMATCH", "of different versions", "reboot, or reload"),
        ("NVML_ERROR_NO_PERMISSION", "no permission to ask", "access to /dev/nvidia"),
        ("NVML_ERROR_GPU_IS_LOST", "starting failed: ", "dmesg"),
    ],
)
def test_faults_are_a_line_each(
    stand_in: None, monkeypatch: pytest.MonkeyPatch, fault: str, line: str, remedy: str
) -> None:
    monkeypatch.setenv("STAND_IN_INIT", str(getattr(pynvml, fault)))
    (finding,) = examine_nvml()
    assert finding.status == "bad"
    assert line in finding.text
    assert remedy in finding.remedy


def test_no_driver_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a library, pynvml itself says so; that is no fault of a machine without such a device."""
    monkeypatch.setattr(pynvml, "nvmlLib", None)
    monkeypatch.setattr(pynvml, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    (finding,) = examine_nvml()
    assert (finding.status, finding.remedy) == ("note", "")
    assert "no NVIDIA driver is installed" in finding.text


def test_pynvml_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    (finding,) = examine_nvml()
    assert "pip install nvidia-ml-py" in finding.remedy


def test_half_the_lanes(stand_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_WIDTH", "8")
    link = examine_nvml()[-1]
    assert link.status == "bad"
    assert "copies run at 8/16" in link.remedy


def test_a_lower_generation_may_be_sleep(stand_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_GENERATION", "1")
    link = examine_nvml()[-1]
    assert (link.status, link.remedy) == ("note", "")
    assert "generation 1 of 5" in link.text


@pytest.mark.parametrize(("where", "num_lines"), [("STAND_IN_DEVICE", 2), ("STAND_IN_LINK", 3)])
def test_what_one_call_refuses_leaves_the_rest(
    stand_in: None, monkeypatch: pytest.MonkeyPatch, where: str, num_lines: int
) -> None:
    monkeypatch.setenv(where, str(pynvml.NVML_ERROR_NO_PERMISSION))
    findings = examine_nvml()
    assert len(findings) == num_lines
    assert findings[0].status == "good"
    assert "no permission" in findings[-1].text


@pytest.mark.skipif(torch.cuda.is_available(), reason="the driver is real here")
def test_the_command_without_a_gpu(library: Path) -> None:
    """In a process of its own, which finds the stand-in as it would find the driver's library."""
    environment = {
        **os.environ, "LD_LIBRARY_PATH": str(library.parent), "STAND_IN_INIT": str(pynvml.NVML_ERROR_NO_PERMISSION),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "offload.cli", "doctor"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == NOT_GOOD
    assert "Traceback" not in done.stdout + done.stderr
    assert "BAD   NVML          no permission to ask the NVIDIA driver" in done.stdout
    assert "none is here. What still works: training on the CPU" in done.stdout
    first = done.stdout.split("what to change, in order of gain:\n")[1].splitlines()[0]
    assert first.startswith("1. give this user access to /dev/nvidia*")


# ---- the host


def system(tmp_path: Path, *, huge_pages: str = "always [madvise] never", memory: str = "max") -> Path:
    files = {"kernel/mm/transparent_hugepage/enabled": huge_pages, "fs/cgroup/memory.max": memory}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    return tmp_path


def line(findings: list[Finding], topic: str) -> Finding:
    return next(finding for finding in findings if finding.topic == topic)


def test_host_in_good_order(tmp_path: Path) -> None:
    findings = examine_host(system(tmp_path))
    assert {finding.topic for finding in findings} == {"processors", "threads", "memlock", "memory", "huge pages"}
    assert line(findings, "huge pages").text.endswith("madvise")
    assert line(findings, "memory").status == "good"


def test_host_with_something_to_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_NUM_THREADS", "4096")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 20, 1 << 20))
    monkeypatch.setattr("offload.doctor.host.torch_pins_by_driver", lambda: False)
    findings = examine_host(system(tmp_path, huge_pages="always madvise [never]", memory=str(1 << 30)))
    assert line(findings, "threads").status == "bad"
    assert line(findings, "memlock").text == "at most 1.0 MiB may be locked"
    assert line(findings, "memory").text == "the control group allows 1.00 GiB of host memory"
    assert line(findings, "huge pages").text == "transparent huge pages are off"
    wanted = remedies(findings)
    assert [remedy.split(" (")[0].split(" to ")[0] for remedy in wanted] == [
        "raise the limit on locked memory", "lower OFFLOAD_NUM_THREADS", "allow transparent huge pages",
        "raise the container's memory limit, or set host_budget",
    ]  # fmt: skip


def test_cuda_pins_without_regard_to_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 20, 1 << 20))
    monkeypatch.setattr("offload.doctor.host.torch_pins_by_driver", lambda: True)
    assert line(examine_host(system(tmp_path)), "memlock").remedy == ""


def test_several_numa_nodes_ask_for_binding(tmp_path: Path) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    for node in range(2):
        folder = system(tmp_path) / f"devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{cpus[-node]}")
    assert "numactl" in line(examine_host(tmp_path), "processors").remedy


# ---- software and device


def test_versions_name_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.doctor.software._PACKAGES", ("torch", "no-such-package"))
    (finding,) = examine_versions()
    assert finding.text == f"torch {torch.__version__}, no no-such-package"


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from offload.doctor import software

    real = software.update

    def wrong(state: Any, *others: Any, implementation: str, **options: Any) -> None:
        real(state, *others, implementation=implementation, **options)
        if implementation == "torch":
            state.master.add_(1)

    def broken(*tensors: object, **options: object) -> None:
        raise RuntimeError("illegal instruction\nand more")

    monkeypatch.setattr(software, "update", wrong)
    by_name = {finding.text.split()[0]: finding for finding in examine_kernels(torch.device("cpu"))}
    assert by_name["torch"].status == "bad"
    assert "do not train with torch" in by_name["torch"].remedy
    assert by_name["scalar"].status == "good"
    monkeypatch.setattr(software, "update", broken)
    assert all("failed: illegal instruction" in finding.text for finding in examine_kernels(torch.device("cpu")))


def test_slow_kernels_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.doctor.software.available_implementations", lambda device: ())
    monkeypatch.setattr("offload.doctor.software.default_implementation", lambda device: "torch")
    (finding,) = examine_kernels(torch.device("cuda"))
    assert "install triton" in finding.remedy


@pytest.mark.usefixtures("one_torch_thread")
def test_emulated_device_passes(sim: ModuleType) -> None:
    findings = examine_device(torch.device("sim"))
    assert [finding.status for finding in findings] == ["good", "good", "good"]
    assert "overlap by 100%" in findings[1].text
    assert "12 GB/s up" in findings[1].text
    assert exit_status(findings) == GOOD


@pytest.mark.usefixtures("one_torch_thread")
def test_a_link_used_in_turns_is_found(sim: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    make, only = Harness.__init__, torch.Stream("sim")

    def one_stream(self: Harness, *arguments: object) -> None:
        make(self, *arguments)
        self._streams = [only, only]

    monkeypatch.setattr(Harness, "__init__", one_stream)
    overlap = examine_device(torch.device("sim"))[1]
    assert overlap.status == "bad"
    assert "take turns" in overlap.remedy


@pytest.mark.usefixtures("one_torch_thread")
def test_corrupt_copies_wrong_bits_and_errors_are_found(sim: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from offload.doctor import device

    monkeypatch.setattr(Pair, "arrived", lambda self: False)
    trained = iter([[torch.zeros(1)], [torch.ones(1)]])
    monkeypatch.setattr(device, "_train", lambda *_: next(trained))
    presence, overlap, bits = examine_device(torch.device("sim"))
    assert presence.status == "good"
    assert "corrupt" in overlap.remedy
    assert "gives other bits than on the CPU" in bits.text
    monkeypatch.setattr(device, "_train", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full\nreally")))
    assert examine_device(torch.device("sim"))[2].text == "OutOfMemoryError: full"
    assert exit_status([bits]) == NOT_GOOD


def test_exit_status_and_order_of_remedies() -> None:
    good, note = Finding("a", "good", "x"), Finding("a", "note", "x", "later", 1)
    bad = Finding("a", "bad", "x", "first", 5)
    assert exit_status([good, note]) == GOOD
    assert exit_status([good, NO_ACCELERATOR]) == NO_DEVICE
    assert exit_status([bad, NO_ACCELERATOR]) == NOT_GOOD
    assert remedies([note, good, bad, note]) == ["first", "later"]


def test_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "offload.cli.doctor.examine", lambda device, tell: [Finding("link", "bad", "narrow", "widen it", 2)]
    )
    assert main(["doctor", "--json"]) == NOT_GOOD
    content = json.loads(capsys.readouterr().out)
    assert content["remedies"] == ["widen it"]
    assert content["findings"][0]["text"] == "narrow"
    assert main(["doctor"]) == NOT_GOOD
    assert "1. widen it" in capsys.readouterr().out
