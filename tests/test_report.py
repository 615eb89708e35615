"""The report from documents made by hand: every number is on the page and in its picture, and lies where it has to.

pytest tests/test_report.py
"""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from export.errors import UserError
from runtime import plots, report
from runtime.measurements import read_cpu, read_gpu

ROOT = Path(__file__).parents[1]
MEASURED = ROOT / "docs/measurements"
SVG = "{http://www.w3.org/2000/svg}"
SPEEDS = {"0": (311.0, 1.0), "1": (402.0, 1.29), "2": (463.0, 1.49), "3": (441.0, 1.42), "auto": (487.0, 1.57)}
CPU: dict[str, Any] = {
    "greedy": {
        k: {
            "tokens_per_second": speed,
            "times_plain": times,
            "tokens_per_round": 2.75,
            "acceptance": [0.83] * (k > "0"),
        }
        for k, (speed, times) in SPEEDS.items()
    },
    "kinds": [
        {"kind": "code, greedy", "how": "3 prompts", "acceptance": [0.8, 0.6, 0.3]},
        {"kind": "prose <as> context", "how": "2 chapters", "acceptance": [0.5, 0.0, 0.0]},
    ],
    "transformers_tokens_per_second": 77.0,
    "prompts": 3,
    "max_new_tokens": 64,
    "repeats": 2,
    "hardware": "Some(R) CPU of $2 & more, 2 threads",
    "versions": {"onnxruntime": "1.2.3"},
    "command": "python -m runtime.bench --repeats 2",
}
# launch, times, microseconds, bytes: of one row; three rows take twice the time for as many bytes
LAUNCHES = (("experts up", 4, 50.0, 75e6), ("lm_head", 1, 100.0, 240e6), ("embed", 1, 2.0, 3e3))
GPU: dict[str, Any] = {
    "copy_gb_per_second": 3000.0,
    "simulated_acceptance": 0.65,
    "decode": [
        {"context": context, "mtp_k": k, "ms": ms, "tokens_per_round": 1.5, "tokens_per_second": speed}
        | {"share_of_floor": 0.512}
        for context, k, ms, speed in (
            *((4096, 0, 1.625, 610.0), (4096, 1, 2.125, 854.0)),
            *((128, 0, 1.5, 640.0), (128, 1, 2.0, 768.0), (128, 2, 3.0, 720.0), (128, "auto", 2.5, 800.0)),
        )
    ],
    "profile_1": [{"launch": n, "count": c, "us": us, "bytes": b} for n, c, us, b in LAUNCHES],
    "profile_3": [{"launch": n, "count": c, "us": 2 * us, "bytes": b} for n, c, us, b in LAUNCHES],
    "hardware": "A GPU",
    "versions": {"torch": "9.9"},
    "command": "python -m runtime.bench --synthetic --profile",
}


class Page(HTMLParser):
    """What a page says, its ids, and what it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.ids: Counter[str] = Counter()
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.ids.update(value for key, value in attributes if key == "id" and value)
        self.loads += [v for key, v in attributes if key in ("src", "href", "xlink:href") and v and v[0] != "#"]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return put(tmp_path / "bench.json", CPU), put(tmp_path / "gpu.json", GPU)


def put(path: Path, document: Any) -> Path:
    path.write_text(json.dumps(document))
    return path


def make(out: Path, cpu: Path, gpu: Path | None, monkeypatch: pytest.MonkeyPatch) -> Page:
    arguments = ["report", "--bench", str(cpu), "--out", str(out), *(["--gpu", str(gpu)] if gpu else [])]
    monkeypatch.setattr(sys, "argv", arguments)
    report.main()
    return Page((out / "index.html").read_text(encoding="utf-8"))


def words(svg: str) -> list[str]:
    return ["".join(text.itertext()).strip() for text in ET.fromstring(svg).iter(f"{SVG}text")]


def heights(svg: str, colour: str) -> list[float]:
    """Of the markers of a colour, from left to right as they were drawn."""
    uses = ET.fromstring(svg).iter(f"{SVG}use")
    return [float(use.get("y", "nan")) for use in uses if colour.lower() in use.get("style", "")]


def assert_in_proportion(places: list[float], values: list[float]) -> None:
    scale = (places[-1] - places[0]) / (values[-1] - values[0])
    assert places == pytest.approx([places[0] + scale * (value - values[0]) for value in values], abs=1e-3)


def test_the_page_has_every_number_and_picture(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = make(tmp_path / "out", *files, monkeypatch)
    everything = " ".join(page.words)
    for k, (speed, times) in SPEEDS.items():
        assert re.search(rf"\b{k}\s+{speed:.0f}\s+{times:.2f}\s", everything)
    for expected in ("80%", "75%", "50%", "prose <as> context", "2 chapters", "medians of 2 repeats"):
        assert expected in everything
    for expected in ("854", "1.40", "2.125", "51.2%", "auto", "3000 GB/s", "probability 0.65"):
        assert expected in everything
    for name, count, us, bytes in LAUNCHES:
        floor = bytes / 3000e3  # microseconds at 3000 GB/s
        for factor in (1, 2):
            figures = f"{count} {factor * us:.0f} {factor * us / count:.2f} {bytes / 1e6:.1f} {floor:.0f}"
            row = [re.escape(name), *figures.split(), f"{floor / us / factor:.1%}"]
            assert re.search(r"\s+".join(row), everything)
    for document in (CPU, GPU):
        assert document["command"] in everything and document["hardware"] in everything
    assert page.ids["tokens_per_second"] == page.ids["acceptance"] == page.ids["memory_floor"] == 1
    assert max(page.ids.values()) == 1 and not page.loads
    assert len(list((tmp_path / "out").glob("*.svg"))) == 3 and len(list((tmp_path / "out").iterdir())) == 4


def test_speeds_are_drawn_to_scale(files: tuple[Path, Path]) -> None:
    svg = plots.speed(read_cpu(files[0]), None)
    found = words(svg)
    for k, (speed, times) in SPEEDS.items():
        assert k in found and f"{speed:.0f}" in found and f"{times:.2f} ×" in found
    assert "transformers.generate, the same weights: 77" in found
    assert "CPU: Some CPU of $2 & more, 2 threads" in found
    assert_in_proportion(heights(svg, plots.BLUE), [speed for k, (speed, _) in SPEEDS.items() if k != "auto"])
    blue, (auto,) = heights(svg, plots.BLUE), heights(svg, plots.RED)
    assert_in_proportion([*blue[:2], auto], [311.0, 402.0, 487.0])


def test_speeds_of_a_gpu_are_drawn_by_context(files: tuple[Path, Path]) -> None:
    svg = plots.speed(read_cpu(files[0]), read_gpu(files[1]))
    found = words(svg)
    assert "128 positions: up to 768, 1.20 ×, with K = 1" in found
    assert "4096 positions: up to 854, 1.40 ×, with K = 1" in found
    assert "800, 1.25 ×" in found and "GPU: A GPU, a draft right with p = 0.65" in found
    assert_in_proportion(heights(svg, plots.BLUE)[4:] + heights(svg, plots.GREEN), [640, 768, 720, 610, 854])


def test_acceptance_is_drawn_both_ways(files: tuple[Path, Path]) -> None:
    svg = plots.acceptance(read_cpu(files[0]).kinds)
    assert {"code, greedy: 30%", "prose <as> context: 0%", "1", "2", "3"} <= set(words(svg))
    # 0.6 / 0.8 and 0.3 / 0.6; after 0 right drafts there is nothing to be right about, and nothing is drawn
    assert_in_proportion(heights(svg, plots.BLUE), [0.8, 0.75, 0.5, 0.8, 0.6, 0.3])
    assert_in_proportion(heights(svg, plots.ORANGE), [0.5, 0.0, 0.5, 0.0, 0.0])


def test_floors_are_drawn(files: tuple[Path, Path]) -> None:
    found = words(plots.floors(read_gpu(files[1])))
    assert {"experts up", "lm_head", "embed"} <= set(found)
    shares = Counter(text for text in found if text.endswith("%"))
    assert shares == {"50%": 1, "80%": 1, "0%": 2, "25%": 1, "40%": 1}
    assert any(text.startswith("1 row: 152 µs in all, 69%") for text in found)


def test_what_was_not_measured_is_said(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    make(out, *files, monkeypatch)
    monkeypatch.setattr(report, "GPU", tmp_path / "none.json")
    page = make(out, put(tmp_path / "headless.json", CPU | {"kinds": []}), None, monkeypatch)
    everything = " ".join(page.words)
    assert everything.count("No GPU run here") == 2 and "no head that drafts" in everything
    assert {path.name for path in out.iterdir()} == {"index.html", "tokens_per_second.svg"}
    without = {key: value for key, value in GPU.items() if not key.startswith("profile")}
    page = make(out, files[0], put(tmp_path / "short.json", without), monkeypatch)
    assert "without --profile" in " ".join(page.words)


def broken(document: dict[str, Any], change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    changed = copy.deepcopy(document)
    change(changed)
    return changed


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("greedy: missing", lambda d: d.pop("greedy")),
        ("greedy: expected an object", lambda d: d.update(greedy=[])),
        ("greedy.0: missing", lambda d: d["greedy"].pop("0")),
        ("greedy.two: expected a number of drafts or 'auto'", lambda d: d["greedy"].update(two=d["greedy"]["2"])),
        ("greedy.2.times_plain: missing", lambda d: d["greedy"]["2"].pop("times_plain")),
        (
            "greedy.2.tokens_per_second: expected a number above 0",
            lambda d: d["greedy"]["2"].update(tokens_per_second=0),
        ),
        ("greedy.1.acceptance[0]: expected a number", lambda d: d["greedy"]["1"].update(acceptance=["x"])),
        ("kinds: missing", lambda d: d.pop("kinds")),
        (
            "kinds[1].acceptance[2]: expected a number from 0 to 1",
            lambda d: d["kinds"][1]["acceptance"].__setitem__(2, 2),
        ),
        ("kinds[0].acceptance: expected a share", lambda d: d["kinds"][0].update(acceptance=[])),
        ("kinds[0].acceptance[0]: expected", lambda d: d["kinds"][0].update(acceptance=[float("nan")])),
        ("versions.onnxruntime: expected a text", lambda d: d["versions"].update(onnxruntime=1)),
        ("repeats: expected an integer", lambda d: d.update(repeats=True)),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, field: str, change: Any) -> None:
    path = put(tmp_path / "bench.json", broken(CPU, change))
    with pytest.raises(UserError) as error:
        read_cpu(path)
    assert str(error.value).startswith(f"{path}: {field}")
    assert "python -m runtime.bench" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("decode: expected at least one", lambda d: d.update(decode=[])),
        ("decode[0]: no case with mtp_k 0 at context 4096", lambda d: d["decode"].pop(0)),
        ("decode[1].mtp_k: expected an integer", lambda d: d["decode"][1].update(mtp_k="some")),
        ("profile_1[0].bytes: missing", lambda d: d["profile_1"][0].pop("bytes")),
        ("profile_3[1].us: expected a number above 0", lambda d: d["profile_3"][1].update(us=0)),
        ("copy_gb_per_second: missing", lambda d: d.pop("copy_gb_per_second")),
    ],
)
def test_a_wrong_field_of_a_gpu_is_named(tmp_path: Path, field: str, change: Any) -> None:
    path = put(tmp_path / "gpu.json", broken(GPU, change))
    with pytest.raises(UserError) as error:
        read_gpu(path)
    assert str(error.value).startswith(f"{path}: {field}")
    assert "--synthetic" in str(error.value) and "\n" not in str(error.value)


def command(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "runtime.report", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ".", **environment},
    )


def test_errors_are_one_line_and_leave_the_report_alone(files: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "index.html").write_text("before")
    cut = tmp_path / "cut.json"
    cut.write_text('{"greedy": ')
    for arguments, expected in (
        (("--bench", tmp_path / "no.json"), "no such file; measure first: python -m runtime.bench"),
        (("--bench", cut), "not JSON"),
        (("--bench", files[0], "--gpu", tmp_path / "no.json"), "--synthetic"),
    ):
        result = command(*arguments, "--out", out)
        assert result.returncode == 2 and not result.stdout
        assert result.stderr.count("\n") == 1 and expected in result.stderr
        assert [path.read_text() for path in out.iterdir()] == ["before"]


def test_the_same_numbers_are_the_same_bytes(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another process, and with other settings of matplotlib."""
    settings = tmp_path / "settings"
    settings.mkdir()
    (settings / "matplotlibrc").write_text("font.size: 20\naxes.grid: True\nsvg.fonttype: path\n")
    result = command(
        *("--bench", files[0], "--gpu", files[1], "--out", tmp_path / "there"),
        MPLCONFIGDIR=str(settings),
        PYTHONHASHSEED="7",
    )
    assert result.returncode == 0, result.stderr
    make(tmp_path / "here", *files, monkeypatch)
    for path in (tmp_path / "here").iterdir():
        assert path.read_bytes() == (tmp_path / "there" / path.name).read_bytes()


def test_the_readme_s_picture_is_that_of_the_measurements() -> None:
    """After a new measurement: python -m runtime.report --bench docs/measurements/cpu.json, and copy the picture."""
    gpu = MEASURED / "h100.json"
    expected = plots.speed(read_cpu(MEASURED / "cpu.json"), read_gpu(gpu) if gpu.exists() else None)
    shown = (ROOT / "docs/tokens_per_second.svg").read_text(encoding="utf-8")
    assert words(shown) == words(expected)
    assert heights(shown, plots.BLUE) == pytest.approx(heights(expected, plots.BLUE), abs=0.1)
