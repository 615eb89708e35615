"""Engines of synthetic checkpoints, built once per test run and shared."""

from __future__ import annotations

import os
import secrets

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one test process per core: more threads only wait for each other

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.build import build
from engines.onnxruntime import OnnxRuntimeEngine
from tests.checkpoints import Layout, State, random_state, tiny_config, write_checkpoint


@dataclass(frozen=True)
class Built:
    """checkpoint: the Hugging Face directory. directory: the engines. twin: the float32 weights it stands for."""

    config: dict[str, Any]
    checkpoint: Path
    directory: Path
    twin: State

    def engine(self, threads: int = 1) -> OnnxRuntimeEngine:
        return OnnxRuntimeEngine(self.directory, threads=threads)


Build = Callable[..., Built]


@pytest.fixture(autouse=True)
def fresh_seed() -> None:
    """Every test draws new inputs; the seed is shown where a test fails, and TANDEM_SEED brings it back."""
    seed = int(os.environ.get("TANDEM_SEED", secrets.randbits(31)))
    print(f"TANDEM_SEED={seed}")
    torch.manual_seed(seed)


@pytest.fixture(scope="session")
def build_engine(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """build_engine(layout, expanded=..., written=..., **overrides of the config) -> Built."""
    made: dict[str, Built] = {}

    def make(
        layout: Layout = "float",
        expanded: bool = True,
        written: dict[str, Any] | None = None,
        seed: int = 0,
        **overrides: Any,
    ) -> Built:
        key = repr((layout, expanded, written, seed, sorted(overrides.items())))
        if key not in made:
            root = tmp_path_factory.mktemp("engine")
            config = tiny_config(**overrides)
            state = random_state(config, seed)
            dtype = {"dtype": "F32"} if layout == "float" else {}
            twin = write_checkpoint(root / "checkpoint", config, state, layout, **(dtype | (written or {})))
            build(root / "checkpoint", root / "engines", expanded=expanded)
            made[key] = Built(config, root / "checkpoint", root / "engines", twin)
        return made[key]

    return make


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's engines for a CPU."""
    directory = tmp_path_factory.mktemp("demo") / "engines"
    build(Path(__file__).parents[1] / "demo" / "checkpoint", directory)
    return directory
