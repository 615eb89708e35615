"""runtime.accuracy and the README's commands of its section: what passes, what is named where something does not.

pytest tests/test_accuracy.py
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from engines import cuda_memory
from engines.build import build
from engines.cuda_model import Gpu
from engines.cuda_weights import DeviceWeights
from engines.manifest import WEIGHTS, Manifest
from engines.tensorrt import TensorRtEngine, TensorRtModel
from export.bindings import GRAPHS, output_specs
from export.checkpoint import load_weights
from plugins import OPS
from plugins.op import HALF_STEP
from runtime import accuracy, comparison
from tests.checkpoints import random_state, tiny_config, write_checkpoint
from tests.conftest import Build, Built
from tests.emulator import EmulatedModule
from tests.test_cuda_model import ALL_EXPERTS, MOE, SIZES
from tests.test_decode import refused, run
from tests.test_engines import TorchExecution

ROOT = Path(__file__).parents[1]
CALLS = ("--token-ids", "1 2 3 4 5", "--max-new-tokens", 4)


@pytest.fixture(scope="module")
def built(build_engine: Build) -> Built:
    return build_engine("modelopt_mixed", True, vocab_size=24)


def compare(monkeypatch: pytest.MonkeyPatch, directory: Path, *arguments: object) -> int:
    """The command in this process, so that a runner can be spoiled -> exit status."""
    command = ["accuracy", "--engines", str(directory), *map(str, (*CALLS, *arguments))]
    monkeypatch.setattr(sys, "argv", command)
    try:
        accuracy.main()
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def failed(table: str) -> set[str]:
    return set(re.findall(r"NO: (\S+)", table))


def commands() -> list[str]:
    """Of the README's section, continued lines joined."""
    section = (ROOT / "README.md").read_text().split("\n## Accuracy\n")[1].split("\n## ")[0]
    lines = section.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.startswith("    ")]


def test_commands_of_the_readme(tmp_path: Path) -> None:
    """In their order, on the demo's engines, which the first one builds."""
    found = commands()
    assert [any(word in line for line in found) for word in ("make accuracy", "inspect model", "--onnxrt")] == [
        True
    ] * 3
    environment = {**os.environ, "PYTHONPATH": ".", "CUDA_VISIBLE_DEVICES": ""}
    for line in found:
        words = shlex.split(
            line.replace("build/demo", str(tmp_path)).replace(".venv/bin", str(Path(sys.executable).parent))
        )
        if words[0] == "make":
            words[1:1] = ["-s", "-o", ".venv/ready"]  # what is installed is not this test's concern
        result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
        assert result.returncode == 0, (line, result.stdout[-2000:], result.stderr[-2000:])
        if "accuracy" in line:
            assert "NO" not in result.stdout and "the cpu target's is ONNX Runtime" in result.stderr
            assert all(graph in result.stdout for graph in GRAPHS)
            same, rows = map(int, re.findall(r"in (\d+) of (\d+) rows", result.stdout)[0])
            assert same == rows > 0


def test_states_fold_by_kind(built: Built, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert compare(monkeypatch, built.directory) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("ONNX Runtime ")]
    kinds = {(row[2], row[3]) for row in rows if row[-1] == "yes"}
    config = built.engine().config
    assert kinds == {(graph, accuracy.kind_of(name)) for graph in GRAPHS for name in output_specs(graph, config)}


def test_noise_of_one_percent_is_named(built: Built, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    class Noisy(comparison.OnnxrtRunner):
        def infer(self, *arguments: Any, **options: Any) -> Any:
            outputs = super().infer(*arguments, **options)
            if "hidden" in outputs:
                hidden = outputs["hidden"]
                outputs["hidden"] = hidden * (1 + np.float32(0.01) * np.random.standard_normal(hidden.shape))
            return outputs

    monkeypatch.setattr(comparison, "OnnxrtRunner", Noisy)
    assert compare(monkeypatch, built.directory) == 1
    captured = capsys.readouterr()
    assert failed(captured.out) == {"hidden"} and captured.err.count("\n") < 5


def test_other_weights_are_named(built: Built, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """One weight of the final norm, for the reference alone: no state of the main model depends on it."""

    def altered(path: Path) -> dict[str, torch.Tensor]:
        weights = dict(load_weights(path))
        weights["norm.weight"] = weights["norm.weight"].clone()
        weights["norm.weight"][3] += 0.5
        return weights

    monkeypatch.setattr(accuracy, "load_weights", altered)
    assert compare(monkeypatch, built.directory) == 1
    assert failed(capsys.readouterr().out) == {"hidden", "logits"}


def test_not_a_number_and_other_shapes_do_not_pass() -> None:
    class Runner(comparison.BaseRunner):
        def __init__(self, name: str, value: Any) -> None:
            super().__init__(name=name)
            self.value, self.inference_time = value, 0.0

        def get_input_metadata_impl(self) -> Any:
            return comparison.metadata({"x": ("float32", (1,))})

        def infer_impl(self, feed_dict: Any) -> Any:
            self.inference_time = 0.0
            return {"y": self.value}

    comparison.be_quiet()
    feeds = [{"x": np.zeros(1, np.float32)}]
    ones = np.ones((2, 3), np.float32)
    for other, passed in ((ones, True), (ones * np.nan, False), (ones[:1], False), (ones * 1.5, False)):
        (m,) = comparison.compare("g", feeds, [Runner("torch", ones), Runner("other", other)], {"other": {"y": 0.1}})
        assert m.passed == passed and m.runner == "other"


def test_tolerance_is_the_sum_over_what_an_output_depends_on(built: Built) -> None:
    graph = onnx.load(built.directory / "mtp.prefill.onnx", load_external_data=False)
    rtol = {op.name: op.rtol for op in OPS}
    every = sum(rtol[node.op_type] for node in graph.graph.node if node.op_type in rtol)
    assert accuracy.tolerances(graph) == {"next.mtp.layers.0.kv_cache": pytest.approx(every)}
    verify = accuracy.tolerances(onnx.load(built.directory / "main.verify.onnx", load_external_data=False))
    assert verify["next.layers.0.pending_k"] < verify["next.layers.1.pending_k"] < verify["hidden"] < verify["logits"]


def test_engines_of_a_gpu_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Without its GPU: ONNX Runtime runs the same graphs. Then with modules in the place of TensorRT's engines."""
    sizes: dict[str, Any] = {**SIZES, **MOE, **ALL_EXPERTS}
    config = tiny_config(**sizes)
    write_checkpoint(tmp_path / "checkpoint", config, random_state(config, 0), "modelopt_mixed")
    directory = tmp_path / "sm_120"
    manifest = build(tmp_path / "checkpoint", directory, "sm_120", capacity=128)
    tolerance = accuracy.tolerances(onnx.load(directory / "mtp.prefill.onnx", load_external_data=False))
    assert tolerance["next.mtp.layers.0.kv_cache"] > HALF_STEP  # float16 caches
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert compare(monkeypatch, directory) == 0
    captured = capsys.readouterr()
    assert "engine: left out, it is for sm_120 and no NVIDIA GPU is here" in captured.err.splitlines()
    assert "ONNX Runtime" in captured.out

    monkeypatch.setattr(cuda_memory, "DEVICE", "cpu")
    monkeypatch.setattr(Gpu, "current", classmethod(lambda cls, what="": Gpu("sm_120", 3, 99 << 10, 1 << 20)))
    engine = TensorRtEngine.__new__(TensorRtEngine)
    engine.manifest = manifest
    executions = {graph: TorchExecution(graph, directory, manifest) for graph in GRAPHS}
    weights = DeviceWeights(load_weights(directory / WEIGHTS), manifest.formats)
    engine.model = TensorRtModel(manifest.config, weights, executions, EmulatedModule)
    monkeypatch.setattr(accuracy.Comparison, "_open_engine", lambda self: engine)
    assert compare(monkeypatch, directory) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("engine ")]
    assert {row[1] for row in rows} == set(GRAPHS)
    # The same module with the same inputs: only what does not arrive, or is not read back, would differ.
    assert all(float(row[3]) == 0 for row in rows), rows


def test_bad_input_is_one_line(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(run("runtime.accuracy", "--engines", tmp_path / "none"), tmp_path / "none", "make engines")
    with pytest.raises(accuracy.UserError, match="--save"):
        compare(monkeypatch, built.directory, "--save", tmp_path)
    with pytest.raises(accuracy.UserError, match="token id 99"):
        compare(monkeypatch, built.directory, "--token-ids", "1 99")
    monkeypatch.setattr(sys, "argv", ["accuracy", "--engines", str(built.directory)])
    with pytest.raises(accuracy.UserError, match="tokenizer"):
        accuracy.main()


@pytest.mark.parametrize(("flag", "value"), [("--max-new-tokens", 0), ("--mtp-k", 17), ("--threads", 0)])
def test_flags_out_of_range(flag: str, value: int, built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(accuracy.UserError, match=flag):
        compare(monkeypatch, built.directory, flag, value)


def test_without_polygraphy(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "runtime.comparison")
    monkeypatch.delattr(sys.modules["runtime"], "comparison")
    monkeypatch.setitem(sys.modules, "polygraphy.backend.base", None)
    with pytest.raises(accuracy.UserError, match="make setup"):
        compare(monkeypatch, built.directory)


def test_a_directory_without_weights(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest.read(built.directory)
    monkeypatch.setattr(Manifest, "read", lambda path: Manifest(**{**vars(manifest), "has_weights": False}))
    with pytest.raises(accuracy.UserError, match="built without weights"):
        compare(monkeypatch, built.directory)
