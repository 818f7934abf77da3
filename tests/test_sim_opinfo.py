"""The bench that compares operators of the emulated device with the CPU's: a short sweep, and what it counts."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from bench import sim_opinfo
from bench.sim_opinfo import KNOWN_DIFFERENCES, Outcomes, Sweep, figures, sweep

# One or more of each way in which an operator can go wrong on a device.
FAMILIES = [
    "add", "nn.functional.linear", "bmm", "mv", "addr", "linalg.eig",  # structured, composite, linear algebra
    "nn.functional.conv2d", "nn.functional.conv_transpose1d",  # a backend is picked by device
    "nn.functional.batch_norm", "nn.functional.group_norm", "nn.functional.layer_norm",  # statistics
    "fft.ifft", "fft.ihfft2", "polar", "conj", "view_as_real",  # complex, and bits of tensors
    "nn.functional.embedding", "nn.functional.embedding_bag", "index_put", "gather", "scatter_add",
    "masked_select", "nonzero", "unique", "tensor_split",  # the host waits
    "nn.functional.dropout", "bernoulli", "randn_like", "empty_like", "new_full", "arange",  # generators, factories
    "unfold", "as_strided", "expand", "diagonal", "split", "squeeze",  # views
    "sort", "topk", "mode", "std_mean", "cumsum", "nn.functional.mse_loss",  # several results, out=
    "nn.functional.scaled_dot_product_attention", "nn.functional.max_pool2d",
    "to_sparse", "native_layer_norm",  # known to differ
]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_operator_agrees_with_the_cpu(sim: ModuleType, name: str) -> None:
    from bench.opinfo_checks import check_operator  # which takes seconds to import

    found = Sweep({name: [tuple(outcome) for outcome in check_operator(name, 1, sim_opinfo.VARIANTS)]})
    assert found.supported == [name]
    assert set(found.disagreeing) == {name} & {"to_sparse", "native_layer_norm"}, json.dumps(found.disagreeing)


def die_or_hang(name: str, num_samples: int, variants: tuple[str, ...]) -> Outcomes:
    match name:
        case "dies":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "exits":
            sys.exit(3)
        case "hangs":
            time.sleep(3600)
    return [("forward", "disagree" if name == "differs" else "equal", "")]


def test_a_crash_is_counted_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sim_opinfo, "ANSWER_LIMIT_S", 2.0)
    found = sweep(["well", "dies", "exits", "hangs", "differs", "well too"], 1, (), check=die_or_hang, num_workers=1)
    assert found.crashes == {"dies": "died with SIGSEGV", "exits": "exited with 3", "hangs": "no answer in 2 s"}
    assert list(found.disagreeing) == ["differs"]
    assert set(found.outcomes) == {"well", "differs", "well too"}
    assert found.agree_fraction == pytest.approx(2 / 6)


def test_operators_that_the_cpu_lacks_do_not_count() -> None:
    found = Sweep({"here": [("forward", "equal", "")], "nowhere": [("forward", "unsupported", "")]})
    assert found.supported == ["here"]
    assert found.agree_fraction == 1.0


def test_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sim_opinfo, "known_bugs", lambda: (12, 0))
    outcomes: dict[str, Outcomes] = {
        "to_sparse": [("forward float32", "disagree", "no sparse tensors")],
        "add": [("forward float32", "equal", ""), ("backward float32", "close", "")],
    }
    result = figures(Sweep(outcomes, crashes={"mm": "died with SIGSEGV"}))
    assert result["agree_fraction"] == pytest.approx(1 / 3, abs=1e-4)
    assert (result["crashes"], result["known_bugs_reported"], result["false_reports"]) == (1, 12, 0)
    assert result["disagreeing"] == {
        "to_sparse": [KNOWN_DIFFERENCES["to_sparse"], "forward float32: no sparse tensors"]
    }


def test_known_bugs_are_null_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sim_opinfo.importlib.util, "find_spec", lambda name: None)
    assert sim_opinfo.known_bugs() == (None, None)


def test_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[object] = []

    def sweep_nothing(names: list[str], num_samples: int, variants: tuple[str, ...], num_workers: int) -> Sweep:
        asked.extend([names, num_samples, variants])
        return Sweep()

    monkeypatch.setattr(sim_opinfo, "sweep", sweep_nothing)
    monkeypatch.setattr(sim_opinfo, "known_bugs", lambda: (None, None))
    monkeypatch.setattr(
        sys, "argv", ["sim_opinfo", "--quick", "--only", "add", "--json", str(tmp_path / "figures.json")]
    )
    sim_opinfo.main()
    assert asked == [["add"], sim_opinfo.QUICK_SAMPLES, sim_opinfo.QUICK_VARIANTS]
    written = json.loads((tmp_path / "figures.json").read_text())
    assert {"agree_fraction", "crashes", "known_bugs_reported", "false_reports"} <= written.keys()
    assert "agree_fraction" in capsys.readouterr().out
