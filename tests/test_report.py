"""Reports: tables in the terminal, and the HTML page as a real browser sees it."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from offload.cli import main
from offload.interconnect import Change, Report, Result, compare
from offload.interconnect.overlap import ACTIVITIES
from tests.chromium import browser_page, find_chromium

pytest.importorskip("matplotlib")


def case(mode: str, value: float = 1e10, **changes: object) -> Result:
    fields = {"group": "copy", "source": "pinned", "target": "device", "unit": "bytes/s", **changes}
    return Result(mode=mode, value=value, low=0.9 * value, high=1.1 * value, **fields)


@pytest.fixture
def report() -> Report:
    sizes = (4096, 65536, 1 << 20)
    copies = [
        case("alone", 1e9 * i, source=source, target=target, num_bytes=size, details={"seconds": 1e-3})
        for source, target in (("pinned", "device"), ("device", "pinned"))
        for i, size in enumerate(sizes, start=1)
    ]
    beside = [
        case(f"{a} under {b}", group="overlap", details={"rate_kept": 0.5}) for a in ACTIVITIES for b in ACTIVITIES
        if a != b
    ]  # fmt: skip
    share = case("copy up with copy down", 0.8, group="overlap", unit="share", details={"exposed_s": 0.01})
    figures = {
        "h2d_bytes_per_s": 1e10, "d2h_bytes_per_s": 1e10, "both_bytes_per_s": 8e9, "h2d_latency_s": 1e-5,
        "host_update_params_per_s": 1e9, "device_update_params_per_s": 1e11,
    }  # fmt: skip
    step = {
        "numel": 1000, "points": [{"name": "all", "device_share": x, "update_s": 1e-5} for x in (0, 0.5, 1)],
        "spans": [
            {"lane": lane, "name": name, "start_s": i * 1e-3, "end_s": (i + 1) * 1e-3}
            for i, (lane, name) in enumerate((("d2h", "D0@0"), ("host", "C0@0"), ("h2d", "U0@0"), ("compute", "G1@0")))
        ],
    }  # fmt: skip
    machine = {
        "device": "sim:0", "device_name": "emulated <accelerator>", "emulated": True, "num_processors": 2,
        "num_numa_nodes": 1, "torch": "2",
    }  # fmt: skip
    return Report(machine, {}, [*copies, *beside, share], figures, step)


# ---- the page


def test_page_in_a_browser(report: Report, tmp_path: Path) -> None:
    """Elements are present, the console is silent, nothing is fetched, and a phone need not scroll sideways."""
    from offload.report.page import html_page

    program = find_chromium()
    if program is None:
        pytest.skip("no chromium is installed")
    path = tmp_path / "report.html"
    path.write_text(html_page(report), encoding="utf-8")
    with browser_page(program, tmp_path / "profile") as page:
        page.open(path, width=360)
        assert page.evaluate("document.title") == "Interconnect and overlap"
        ids = page.evaluate("[...document.querySelectorAll('section')].map(e => e.id)")
        assert ids == ["summary", "bandwidth", "overlap", "roofline", "timeline", "all"]
        for section, words in {
            "bandwidth": ("pinned to device", "device to pinned"),
            "overlap": ("CPU update", "matmul", "50%"),
            "roofline": ("cores", "link up", "this machine's steps"),
            "timeline": ("host", "h2d", "update on host"),
        }.items():
            text = page.evaluate(f"document.querySelector('#{section} svg').textContent")
            assert all(word in text for word in words), (section, text)
            box = page.evaluate(f"document.querySelector('#{section} svg').getBoundingClientRect().toJSON()")
            assert 200 < box["width"] <= 360, section
            assert box["height"] > 100, section
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        smallest_px = page.evaluate(
            "Math.min(...[...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect().height))"
        )
        assert smallest_px > 7, "text of the plots must be readable on a phone"
        ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
        assert len(ids) == len(set(ids)), "plots on one page must not refer to each other's parts"
        assert page.errors == []
        fetched = [url for url in page.requests if not url.startswith("data:")]
        assert fetched == [path.resolve().as_uri()], "the file itself and nothing else"


def test_browser_sees_errors_and_requests(tmp_path: Path) -> None:
    """What the test above relies on: a page with both is found out."""
    program = find_chromium()
    if program is None:
        pytest.skip("no chromium is installed")
    path = tmp_path / "bad.html"
    path.write_text("<script>console.error('no')</script><img src='missing.png'>", encoding="utf-8")
    with browser_page(program, tmp_path / "profile") as page:
        page.open(path, width=360)
        assert any("no" in error for error in page.errors)
        assert any(url.endswith("missing.png") for url in page.requests)


def test_page_says_what_is_emulated_and_what_is_wrong(report: Report) -> None:
    from offload.report.page import html_page

    text = html_page(replace(report, results=[replace(report.results[0], problem="a < b")]))
    assert "emulated &lt;accelerator&gt;" in text, "text from elsewhere is no markup"
    assert "say nothing about a machine" in text
    assert "a &lt; b" in text
    real = html_page(replace(report, machine={**report.machine, "emulated": False}))
    assert "say nothing about a machine" not in real


def test_page_leaves_out_what_was_not_measured(report: Report) -> None:
    from offload.report.page import html_page

    text = html_page(replace(report, results=[], figures={}, step={}))
    assert not any(f'id="{section}"' in text for section in ("bandwidth", "overlap", "roofline", "timeline"))
    assert "<svg" not in text


# ---- the terminal


def printed(function: object, *arguments: object) -> str:
    from rich.console import Console

    text = io.StringIO()
    function(Console(file=text, width=120), *arguments)
    return text.getvalue()


def test_tables_have_every_case(report: Report) -> None:
    from offload.report.terminal import print_report

    text = printed(print_report, replace(report, results=[*report.results, case("bad", problem="odd")]))
    assert all(result.name in text for result in report.results)
    assert "emulated device" in text
    assert "10.0 ms exposed" in text
    assert "50% rate kept" in text
    assert "not to be trusted: pinned_to_device.bad: odd" in text


def test_comparison_is_told(report: Report) -> None:
    from offload.report.terminal import print_comparison

    slower = [replace(each, value=each.value / 2, low=each.low / 2, high=each.high / 2) for each in report.results[:1]]
    changes: list[Change] = compare(report, replace(report, results=[*slower, *report.results[1:]]))
    text = printed(print_comparison, changes)
    assert "-50.0%" in text
    assert "1 worse and 0 better" in text


# ---- the command


@pytest.mark.usefixtures("one_torch_thread")
def test_bench_writes_all_its_files(
    sim: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from tests.test_interconnect import TINY

    monkeypatch.setattr("offload.cli.bench.Settings.quick", lambda: TINY)
    paths = {kind: tmp_path / f"out.{kind}" for kind in ("json", "csv", "html")}
    files = [word for kind, path in paths.items() for word in (f"--{kind}", str(path))]
    assert main(["bench", "--emulated", "--quick", "--only", "copy", "streams", *files]) in (0, 1)
    assert "pinned_to_device.on_2_streams" in capsys.readouterr().out
    names = [row["name"] for row in json.loads(paths["json"].read_text())["results"]]
    assert len(names) == 4 * len(TINY.sizes) + 2 * len(TINY.num_streams)
    assert len(paths["csv"].read_text().splitlines()) == 1 + len(names)
    assert "<svg" in paths["html"].read_text()
    assert main(["bench", "--from-json", str(paths["json"]), "--html", str(paths["html"])]) in (0, 1)
    assert main(["bench", "--compare", str(paths["json"]), str(paths["json"])]) == 0
    assert "0 worse and 0 better" in capsys.readouterr().out
    torch.accelerator.synchronize()


def test_bench_fails_where_a_result_is_not_to_be_trusted(report: Report, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    report.save(good)
    replace(report, results=[replace(report.results[0], problem="odd")]).save(bad)
    assert main(["bench", "--from-json", str(good)]) == 0
    assert main(["bench", "--from-json", str(bad)]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "link"], "no part of the benchmarks is called 'link'"),
        (["--ranks", "0", "--emulated"], "num_ranks=0 is not possible"),
        (["--compare", "a.json", "b.json"], "a.json"),
        (["--device", "cpu"], "there is no accelerator to measure"),
    ],
)
def test_mistakes_are_told(
    sim: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_door_in_bench_has_the_same_options(capsys: pytest.CaptureFixture[str]) -> None:
    from bench import interconnect

    assert interconnect.main(["bench", "--compare", "no.json", "no.json"]) == 2
    assert "no.json" in capsys.readouterr().err
