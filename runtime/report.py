"""What was measured, as one page with pictures: `make report`, or

    python -m runtime.report --bench build/bench.json --gpu docs/measurements/h100.json --out build/report

reads the JSON documents that `python -m runtime.bench --out FILE` writes, and writes DIR/index.html, which needs no
other file, and each picture beside it. Without --gpu, a document that is not there is a sentence on the page.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from export.cli import Parser, run, say
from runtime import plots
from runtime.measurements import MEASURE_GPU, CpuRun, GpuRun, Source, read_cpu, read_gpu

BENCH, GPU, OUT = Path("build/bench.json"), Path("docs/measurements/h100.json"), Path("build/report")
Rows = list[Sequence[str]]

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Tandem: what was measured</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
figure { margin: 1rem 0; background: #fff; border-radius: 6px; padding: .5rem; }
svg { display: block; max-width: 100%; height: auto; margin: auto; }
.tables { display: flex; flex-wrap: wrap; gap: 1rem 3rem; align-items: start; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
th, td { text-align: right; padding: .15rem .7rem .15rem 0; border-bottom: 1px solid #8884; }
th:first-child, td:first-child, .words td { text-align: left; }
.source { font-size: .85rem; overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>Tandem: what was measured</h1>
{% for part in parts %}
<section id="{{ part.name }}">
<h2>{{ part.title }}</h2>
{% for paragraph in part.text %}<p>{{ paragraph }}</p>
{% endfor %}
{% if part.svg %}<figure>
{{ part.inline | safe }}</figure>
{% endif %}
<div class="tables">
{% for table in part.tables %}<table{% if not table.header %} class="words"{% endif %}>
<caption>{{ table.caption }}</caption>
{% if table.header %}<tr>{% for cell in table.header %}<th>{{ cell }}</th>{% endfor %}</tr>
{% endif %}
{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% endfor %}</div>
{% for source in part.sources %}<p class="source"><code>{{ source.command }}</code><br>
{{ source.hardware }}; {{ source.versions }}</p>
{% endfor %}</section>
{% endfor %}
</body>
</html>
"""


@dataclass(frozen=True)
class Table:
    """header: of numbers' columns; none where the cells are words."""

    caption: str
    header: Sequence[str]
    rows: Rows


@dataclass(frozen=True)
class Part:
    """A section of the page. name: of its picture's file. svg: "" where there is nothing to draw, as the text says."""

    name: str
    title: str
    text: Sequence[str]
    svg: str
    tables: Sequence[Table]
    sources: Sequence[Source]

    @property
    def inline(self) -> str:
        """The picture for a page that holds others: without its head, and with names of its own."""
        svg = self.svg[self.svg.index("<svg") :]
        return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{self.name}-", svg)


def percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{share:.0%}"


def speed_part(cpu: CpuRun, gpu: GpuRun | None, no_gpu: str) -> Part:
    rows: Rows = []
    for s in cpu.speeds:
        others = [f"{s.times_transformers:.1f}" if s.times_transformers else "–"] if cpu.transformers else []
        figures = [f"{s.tokens_per_second:.0f}", f"{s.times_plain:.2f}", *others, f"{s.tokens_per_round:.2f}"]
        rows.append([s.k, *figures, " ".join(map(percent, s.acceptance)) or "–"])
    others = ["times transformers"] if cpu.transformers else []
    header = ["K", "tokens/s", "times plain", *others, "tokens a round", "accepted, by position"]
    tables = [Table("CPU, greedy", header, rows)]
    text = [
        f"{cpu.prompts} prompts, greedy, up to {cpu.max_new_tokens} tokens each, medians of {cpu.repeats} "
        f"repeat{'s' * (cpu.repeats > 1)}, prefill not counted. The text is the same for every K."
    ]
    if gpu:
        text.append(
            "On the GPU, rounds as they run in decoding, at several lengths of the text so far. Each draft is taken "
            f"for right with probability {gpu.simulated_acceptance:g}, whatever the main model says."
        )
        cases: Rows = []
        for case in gpu.cases:
            speed = [f"{case.tokens_per_second:.0f}", f"{case.times_plain:.2f}"]
            figures = [f"{case.tokens_per_round:.2f}", f"{case.ms:.3f}", f"{case.share_of_floor:.1%}"]
            cases.append([str(case.context), case.k, *speed, *figures])
        names = ("positions", "K", "tokens/s", "times plain", "tokens a round", "ms a round", "of the memory floor")
        tables.append(Table("GPU", names, cases))
    sources = [cpu.source, gpu.source] if gpu else [cpu.source]
    title = "Tokens per second against K"
    return Part("tokens_per_second", title, text if gpu else [*text, no_gpu], plots.speed(cpu, gpu), tables, sources)


def acceptance_part(cpu: CpuRun) -> Part:
    title = "Accepted drafts, by position and kind of text"
    if not cpu.kinds:
        return Part("acceptance", title, ["The checkpoint has no head that drafts."], "", [], [cpu.source])
    text = (
        "Left: how often a draft is right where all before it in its round are. Right: how often it is accepted, which "
        "takes all before it to be right too. A round emits one token more than it accepts drafts.",
        "Where the model writes the text, a round is a sample. Where a text is the context, every position of it is, "
        "and right is what the main model would choose there.",
    )
    places = [str(i + 1) for i in range(max(len(kind.acceptance) for kind in cpu.kinds))]
    tables = [
        Table("Right, if all before are", ["", *places], [[k.name, *map(percent, k.conditional)] for k in cpu.kinds]),
        Table("Accepted", ["", *places], [[k.name, *map(percent, k.acceptance)] for k in cpu.kinds]),
        Table("How", [], [[k.name, k.how] for k in cpu.kinds]),
    ]
    return Part("acceptance", title, text, plots.acceptance(cpu.kinds), tables, [cpu.source])


def floor_part(gpu: GpuRun | None, no_gpu: str) -> Part:
    name, title = "memory_floor", "Kernels against the memory floor"
    if not gpu:
        return Part(name, title, [no_gpu], "", [], [])
    if not gpu.profiles:
        return Part(name, title, ["The GPU's benchmark ran without --profile."], "", [], [gpu.source])
    text = (
        "One verify call of the main model, by kind of launch, each kind timed by itself. The floor is the time that a "
        f"large copy, here at {gpu.bandwidth / 1e9:.0f} GB/s, needs for the bytes that the launch must move: its "
        "weights once, states read and written, the cache; of the experts those that rows choosing at random need.",
    )
    tables = []
    for rows, launches in gpu.profiles.items():
        cells: Rows = []
        for each in sorted(launches, key=lambda launch: -launch.us):
            floor = gpu.floor_us(each)
            figures = [f"{each.us:.0f}", f"{each.us / each.count:.2f}", f"{each.bytes / 1e6:.1f}", f"{floor:.0f}"]
            cells.append([each.name, str(each.count), *figures, f"{floor / each.us:.1%}"])
        header = ("launch", "times", "µs", "µs each", "MB", "floor, µs", "share")
        tables.append(Table(f"{rows} row{'s' * (rows > 1)}", header, cells))
    return Part(name, title, text, plots.floors(gpu), tables, [gpu.source])


def write(parts: Sequence[Part], out: Path) -> None:
    """The page and its pictures. What was there before stays until all is written."""
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    files = {f"{part.name}.svg": part.svg for part in parts if part.svg}
    files["index.html"] = page.from_string(PAGE).render(parts=parts) + "\n"
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as directory:
        for name, text in files.items():
            (Path(directory) / name).write_text(text, encoding="utf-8")
        for name in files:
            (Path(directory) / name).replace(out / name)
    for part in parts:
        if not part.svg:  # nor an earlier run's
            (out / f"{part.name}.svg").unlink(missing_ok=True)


def main() -> None:
    parser = Parser(prog="python -m runtime.report", description=__doc__.split("\n")[0])
    parser.add_argument("--bench", type=Path, default=BENCH, metavar="FILE", help=f"of a CPU (default {BENCH})")
    parser.add_argument("--gpu", type=Path, metavar="FILE", help=f"of a GPU (default {GPU}, if it is there)")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help=f"default {OUT}")
    options = parser.parse_args()
    cpu = read_cpu(options.bench)
    gpu = read_gpu(options.gpu or GPU) if options.gpu or GPU.exists() else None
    no_gpu = f"No GPU run here: {MEASURE_GPU.format(path=GPU)} makes one."
    write([speed_part(cpu, gpu, no_gpu), acceptance_part(cpu), floor_part(gpu, no_gpu)], options.out)
    say(f"report: {options.out / 'index.html'}")


if __name__ == "__main__":
    run(main)
