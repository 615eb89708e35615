"""The JSON documents of `python -m runtime.bench`, read and checked field by field.

    run = read_cpu(Path("build/bench.json"))
    run.speeds[2].tokens_per_second

A document that is missing, or a field of it that is missing or not what it has to be, is a UserError that names the
file, the field and the command that measures again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from export.config import read_json
from export.errors import UserError

AUTO = "auto"  # the place of K where the runtime chooses it
MEASURE_CPU = "python -m runtime.bench --engines build/demo/cpu --out {path}"
MEASURE_GPU = "python -m runtime.bench --synthetic --config demo/qwen3.6-35b-a3b.json --profile --out {path}"


@dataclass(frozen=True)
class Speed:
    """Greedy decoding with K drafts a round. k: a number or `auto`. acceptance: share of the rounds in which the first
    i drafts all are right. times_transformers: None where it was not measured."""

    k: str
    tokens_per_second: float
    times_plain: float
    tokens_per_round: float
    acceptance: tuple[float, ...]
    times_transformers: float | None


@dataclass(frozen=True)
class Kind:
    """A kind of text, see runtime/bench_kinds.py."""

    name: str
    how: str
    acceptance: tuple[float, ...]

    @property
    def conditional(self) -> tuple[float, ...]:
        """Share of drafts that are right, of those before which all are right; NaN where there are none of those."""
        before = (1.0, *self.acceptance[:-1])
        return tuple(a / b if b else math.nan for a, b in zip(self.acceptance, before, strict=True))


@dataclass(frozen=True)
class Source:
    """Where numbers come from: command, hardware, versions of the packages, as text."""

    command: str
    hardware: str
    versions: str


@dataclass(frozen=True)
class CpuRun:
    source: Source
    speeds: tuple[Speed, ...]
    kinds: tuple[Kind, ...]  # empty: the checkpoint has no head that drafts
    transformers: float | None  # tokens per second of transformers.generate
    prompts: int
    max_new_tokens: int
    repeats: int


@dataclass(frozen=True)
class GpuCase:
    """Rounds with K drafts at a context of so many positions."""

    context: int
    k: str
    ms: float
    tokens_per_round: float
    tokens_per_second: float
    share_of_floor: float
    times_plain: float


@dataclass(frozen=True)
class Launch:
    """All launches of a kind in one verify call: microseconds, and the bytes that they must move."""

    name: str
    count: int
    us: float
    bytes: float


@dataclass(frozen=True)
class GpuRun:
    source: Source
    cases: tuple[GpuCase, ...]
    profiles: dict[int, tuple[Launch, ...]]  # by rows of the call; empty: measured without --profile
    bandwidth: float  # bytes per second of a large copy
    simulated_acceptance: float

    def floor_us(self, launch: Launch) -> float:
        """Microseconds that the copy's bandwidth needs for the launch's bytes."""
        return 1e6 * launch.bytes / self.bandwidth


class Value:
    """A value of a document that knows where it stands. at: "greedy.2.acceptance"."""

    def __init__(self, path: Path, measure: str, value: Any, at: str = "") -> None:
        self.path, self.measure, self.value, self.at = path, measure, value, at

    def refuse(self, why: str) -> NoReturn:
        raise UserError(f"{self.path}: {self.at}: {why}; measure again: {self.measure.format(path=self.path)}")

    def __getitem__(self, key: str) -> Value:
        found = self.get(key)
        return found or Value(self.path, self.measure, None, self._below(key)).refuse("missing")

    def get(self, key: str) -> Value | None:
        if not isinstance(self.value, dict):
            self.refuse("expected an object")
        found = self.value.get(key)
        return None if found is None else Value(self.path, self.measure, found, self._below(key))

    def _below(self, key: str) -> str:
        return f"{self.at}.{key}" if self.at else key

    def items(self) -> Iterator[tuple[str, Value]]:
        if not isinstance(self.value, dict):
            self.refuse("expected an object")
        return ((key, self[key]) for key in self.value)

    def each(self) -> list[Value]:
        if not isinstance(self.value, list):
            self.refuse("expected a list")
        return [Value(self.path, self.measure, value, f"{self.at}[{i}]") for i, value in enumerate(self.value)]

    def number(self, most: float = 1e300) -> float:
        """From 0 to `most`."""
        if type(self.value) not in (int, float) or not 0 <= self.value <= most:
            self.refuse("expected a number from 0 up" if most == 1e300 else f"expected a number from 0 to {most:g}")
        return float(self.value)

    def positive(self) -> float:
        return self.number() or self.refuse("expected a number above 0")

    def count(self) -> int:
        if type(self.value) is not int or self.value < 0:
            self.refuse("expected an integer from 0 up")
        return self.value

    def text(self) -> str:
        if not isinstance(self.value, str):
            self.refuse("expected a text")
        return self.value

    def shares(self) -> tuple[float, ...]:
        return tuple(value.number(most=1) for value in self.each())


def read_cpu(path: Path) -> CpuRun:
    """Raises UserError: see above."""
    document = _open(path, MEASURE_CPU)
    speeds = [_speed(k, row) for k, row in document["greedy"].items()]
    document["greedy"]["0"]  # plain decoding, which all others are compared with
    kinds = [_kind(kind) for kind in document["kinds"].each()]
    other = document.get("transformers_tokens_per_second")
    return CpuRun(
        source=_source(document),
        speeds=tuple(sorted(speeds, key=lambda speed: _order(speed.k))),
        kinds=tuple(kinds),
        transformers=other.number() if other else None,
        prompts=document["prompts"].count(),
        max_new_tokens=document["max_new_tokens"].count(),
        repeats=document["repeats"].count(),
    )


def _speed(k: str, row: Value) -> Speed:
    if not k.isdecimal() and k != AUTO:
        row.refuse(f"expected a number of drafts or {AUTO!r}")
    of = row.get("times_transformers")
    return Speed(
        k=k,
        tokens_per_second=row["tokens_per_second"].positive(),
        times_plain=row["times_plain"].positive(),
        tokens_per_round=row["tokens_per_round"].positive(),
        acceptance=row["acceptance"].shares(),
        times_transformers=of.number() if of else None,
    )


def _kind(kind: Value) -> Kind:
    shares = kind["acceptance"].shares() or kind["acceptance"].refuse("expected a share for every draft")
    return Kind(kind["kind"].text(), kind["how"].text(), shares)


def read_gpu(path: Path) -> GpuRun:
    """Raises UserError: see above."""
    document = _open(path, MEASURE_GPU)
    rows = document["decode"].each() or document["decode"].refuse("expected at least one case")
    plain = {row["context"].count(): row["tokens_per_second"].positive() for row in rows if row["mtp_k"].value == 0}
    cases = [_case(row, plain) for row in rows]
    profiles = {}
    for rows_of_call in (1, 3):
        if found := document.get(f"profile_{rows_of_call}"):
            profiles[rows_of_call] = tuple(
                Launch(kind["launch"].text(), kind["count"].count(), kind["us"].positive(), kind["bytes"].number())
                for kind in found.each()
            )
    return GpuRun(
        source=_source(document),
        cases=tuple(sorted(cases, key=lambda case: (case.context, _order(case.k)))),
        profiles=profiles,
        bandwidth=1e9 * document["copy_gb_per_second"].positive(),
        simulated_acceptance=document["simulated_acceptance"].number(most=1),
    )


def _case(row: Value, plain: dict[int, float]) -> GpuCase:
    """plain: tokens per second without drafts, by context."""
    context, speed = row["context"].count(), row["tokens_per_second"].positive()
    if context not in plain:
        row.refuse(f"no case with mtp_k 0 at context {context} to compare it with")
    return GpuCase(
        context=context,
        k=AUTO if row["mtp_k"].value == AUTO else str(row["mtp_k"].count()),
        ms=row["ms"].positive(),
        tokens_per_round=row["tokens_per_round"].positive(),
        tokens_per_second=speed,
        share_of_floor=row["share_of_floor"].number(),
        times_plain=speed / plain[context],
    )


def _open(path: Path, measure: str) -> Value:
    command = measure.format(path=path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; measure first: {command}")
    return Value(path, measure, read_json(path, f"measure again: {command}"))


def _source(document: Value) -> Source:
    versions = ", ".join(f"{name} {version.text()}" for name, version in document["versions"].items())
    return Source(document["command"].text(), document["hardware"].text(), versions)


def _order(k: str) -> float:
    return math.inf if k == AUTO else int(k)
