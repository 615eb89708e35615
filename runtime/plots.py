"""The report's pictures, each a function from measurements to the text of an SVG.

    Path("speed.svg").write_text(speed(read_cpu(Path("build/bench.json")), None))

The same numbers give the same bytes. Text stays text, on a white ground, so that pages of any colour can show it.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from runtime.measurements import AUTO, CpuRun, GpuCase, GpuRun, Kind, Launch

# Okabe and Ito's colours, which people with any colour vision tell apart; the orange is darker, for text.
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#B06F00", "#00805E", "#C04E00", "#A64D85", "#5F6368"
PALE = "#C9DDEB"
LABEL = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # lines do not run through a label
STYLE: Any = {
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "tandem",
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.1,
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": "#202124",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": "#202124",
    "ytick.labelcolor": "#202124",
    "grid.color": "#E4E6E8",
    "lines.linewidth": 1.8,
}


def _drawing() -> Any:
    """A context in which the reader's own settings of matplotlib mean nothing."""
    return matplotlib.style.context(["default", STYLE])


def speed(cpu: CpuRun, gpu: GpuRun | None) -> str:
    """Tokens per second against K."""
    with _drawing():
        figure = Figure(figsize=(10 if gpu else 6.4, 3.9), layout="constrained")
        axes = figure.subplots(1, 2 if gpu else 1, squeeze=False)[0]
        _cpu_speed(axes[0], cpu)
        if gpu:
            _gpu_speed(axes[1], gpu)
        return _svg(figure, "Tokens per second against the number of drafts a round")


def _cpu_speed(axes: Axes, cpu: CpuRun) -> None:
    fixed = [s for s in cpu.speeds if s.k != AUTO]
    axes.plot([int(s.k) for s in fixed], [s.tokens_per_second for s in fixed], "o-", color=BLUE)
    ticks = {int(s.k): s.k for s in fixed}
    for s in cpu.speeds:
        x = int(s.k) if s.k != AUTO else max(ticks) + 1
        colour = BLUE if s.k != AUTO else RED
        text = f"{s.tokens_per_second:.0f}\n{s.times_plain:.2f} ×"
        beside = [o.tokens_per_second for o in fixed if s.k != AUTO and abs(int(o.k) - x) == 1]
        above = s.tokens_per_second >= sum(beside) / max(len(beside), 1)  # where the line is not
        look: dict[str, Any] = {"ha": "center", "va": "bottom" if above else "top", "bbox": LABEL, "linespacing": 1.15}
        place = (x, s.tokens_per_second), (0, 7 if above else -7)
        axes.annotate(text, *place, textcoords="offset points", color=colour, zorder=2.5, **look)
        if s.k == AUTO:
            axes.axhline(s.tokens_per_second, color=RED, linewidth=0.9, linestyle=(0, (4, 3)))
            axes.plot([x], [s.tokens_per_second], "D", color=RED)
            ticks[x] = AUTO
    if cpu.transformers:
        axes.axhline(cpu.transformers, color=GREY, linewidth=0.9, linestyle=(0, (1, 2)))
        label = f"transformers.generate, the same weights: {cpu.transformers:.0f}"
        place = (0, cpu.transformers), (0, 5)
        axes.annotate(label, *place, textcoords="offset points", color=GREY, bbox=LABEL)
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xlim(-0.4, max(ticks) + 0.4)
    axes.set_ylim(0, 1.22 * max(s.tokens_per_second for s in cpu.speeds))
    axes.set_title(f"CPU: {_without_marks(cpu.source.hardware)}")
    _name_axes(axes)


def _gpu_speed(axes: Axes, gpu: GpuRun) -> None:
    by_context = itertools.groupby(gpu.cases, key=lambda case: case.context)
    ticks: dict[int, str] = {}
    for (context, group), colour in zip(by_context, itertools.cycle((BLUE, GREEN, ORANGE)), strict=False):
        cases = list(group)
        fixed = [case for case in cases if case.k != AUTO]
        axes.plot([int(case.k) for case in fixed], [case.tokens_per_second for case in fixed], "o-", color=colour)
        ticks |= {int(case.k): case.k for case in fixed}
        best = max(fixed, key=lambda case: case.tokens_per_second)
        text = f"{context} positions: up to {_with_times(best)}, with K = {best.k}"
        height = 0.3 - 0.075 * (len(axes.lines) - 1)
        axes.annotate(text, (0.06, height), xycoords="axes fraction", color=colour, bbox=LABEL)
    place = max(ticks) + 1
    for case in (case for case in gpu.cases if case.k == AUTO):
        axes.plot([place], [case.tokens_per_second], "D", color=RED)
        label = (place, case.tokens_per_second), (0, 7)
        axes.annotate(_with_times(case), *label, textcoords="offset points", ha="center", color=RED)
        ticks[place] = AUTO
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xlim(-0.4, max(ticks) + 0.4)
    axes.set_ylim(0, 1.22 * max(case.tokens_per_second for case in gpu.cases))
    axes.set_title(f"GPU: {gpu.source.hardware}, a draft right with p = {gpu.simulated_acceptance:g}")
    _name_axes(axes)


def _with_times(case: GpuCase) -> str:
    return f"{case.tokens_per_second:.0f}, {case.times_plain:.2f} ×"


def _without_marks(hardware: str) -> str:
    """A processor's name as people say it."""
    return " ".join(hardware.replace("(R)", "").replace("(TM)", "").split())


def _name_axes(axes: Axes) -> None:
    axes.set_xlabel("K, drafts a round (0: plain decoding)")
    axes.set_ylabel("tokens per second (×: times plain)")
    axes.grid(axis="y")
    axes.set_axisbelow(True)


def acceptance(kinds: Sequence[Kind]) -> str:
    """Share of right drafts by position, a line for every kind of text."""
    looks = list(zip((BLUE, ORANGE, GREEN, RED, PURPLE, GREY), "o^sDvP", strict=True))
    with _drawing():
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        ends = []
        for kind, (colour, marker) in zip(kinds, itertools.cycle(looks), strict=False):
            places = range(1, len(kind.acceptance) + 1)
            left.plot(places, [100 * share for share in kind.conditional], marker, linestyle="-", color=colour)
            right.plot(places, [100 * share for share in kind.acceptance], marker, linestyle="-", color=colour)
            ends.append((len(places), 100 * kind.acceptance[-1], f"{kind.name}: {kind.acceptance[-1]:.0%}", colour))
        most = max(len(kind.acceptance) for kind in kinds)
        for (x, y, text, colour), at in zip(ends, _spread([y for _, y, _, _ in ends], 6.0), strict=True):
            line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
            right.annotate(text, (x, y), (most + 0.3, at), color=colour, va="center", arrowprops=line)
        for axes, title in (
            (left, "Right, if all drafts before it are right"),
            (right, "Right together with all before it: accepted"),
        ):
            axes.set_title(title)
            axes.set_xticks(range(1, most + 1))
            axes.set_xlabel("position of the draft in its round", loc="left")
            axes.grid(axis="y")
        left.set_ylim(0, 100)
        left.set_xlim(0.7, most + 0.3)
        right.set_xlim(0.7, most + 2.6)
        right.spines.bottom.set_bounds(0.7, most + 0.3)
        left.set_ylabel("drafts that are right, %")
        return _svg(figure, "Accepted drafts by position and kind of text")


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights at least `gap` apart, in the same order and as near as can be done simply."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = list(heights)
    for before, i in itertools.pairwise(order):
        placed[i] = max(placed[i], placed[before] + gap)
    shift = sum(p - h for p, h in zip(placed, heights, strict=True)) / len(heights)
    return [max(p - shift, gap / 2 + gap * order.index(i)) for i, p in enumerate(placed)]


def floors(gpu: GpuRun) -> str:
    """Every kind of launch of a verify call: its time, and the part that its bytes need."""
    with _drawing():
        every = itertools.chain(*(_longest_first(launches) for launches in gpu.profiles.values()))
        names = list(dict.fromkeys(launch.name for launch in every))
        figure = Figure(figsize=(5.2 * len(gpu.profiles), 1.3 + 0.32 * len(names)), layout="constrained")
        panels = figure.subplots(1, len(gpu.profiles), sharex=True, sharey=True, squeeze=False)[0]
        for axes, (rows, launches) in zip(panels, gpu.profiles.items(), strict=True):
            for launch in launches:
                place, floor = names.index(launch.name), gpu.floor_us(launch)
                axes.barh(place, launch.us, 0.62, color=PALE)
                axes.barh(place, floor, 0.62, color=BLUE)
                label = f"{floor / launch.us:.0%}"
                axes.annotate(label, (max(launch.us, floor), place), (4, 0), textcoords="offset points", va="center")
            total, least = sum(each.us for each in launches), sum(map(gpu.floor_us, launches))
            axes.set_title(f"{rows} row{'s' * (rows > 1)}: {total:.0f} µs in all, {least / total:.0%} of it the floor")
            axes.set_xlabel("µs a verify call; dark: the memory floor")
            axes.grid(axis="x")
            axes.set_axisbelow(True)
        panels[0].set_yticks(range(len(names)), names)
        panels[0].set_ylim(len(names) - 0.5, -0.5)
        panels[0].set_xlim(right=1.12 * max(each.us for launches in gpu.profiles.values() for each in launches))
        return _svg(figure, "Time of every kind of launch against its memory floor")


def _longest_first(launches: Sequence[Launch]) -> list[Launch]:
    return sorted(launches, key=lambda launch: -launch.us)


def _svg(figure: Figure, title: str) -> str:
    file = io.StringIO()
    unchanging = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", metadata={"Title": title, **unchanging})
    return "".join(line.rstrip() + "\n" for line in file.getvalue().splitlines())
