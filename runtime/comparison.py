"""What Polygraphy compares: the torch reference, ONNX Runtime and the engine, as its runners over the same feeds.

A feed is one call of a graph: every input of it by its binding name, states included, so that no runner's rounding
reaches another call. This is the one module that imports Polygraphy.

    compare("main.verify", feeds, [TorchRunner(graph), OnnxrtRunner(session, name="ONNX Runtime")], tolerances)
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator, RunResults
from polygraphy.json import save_json
from polygraphy.logger import G_LOGGER

from engines import Engine
from export.bindings import Spec, input_specs, output_specs
from export.model import Graph

__all__ = ["EngineRunner", "Measurement", "OnnxrtRunner", "TorchRunner", "be_quiet", "compare", "run_graph"]

Feed = Mapping[str, NDArray[Any]]


class Measurement(NamedTuple):
    """One output of one call against the reference. largest: of the reference's values. absolute: largest difference.
    tolerance: that it may have, of `largest`. tokens: of logits, rows with the reference's best entry, and rows."""

    runner: str
    graph: str
    output: str
    largest: float
    absolute: float
    tolerance: float
    passed: bool
    tokens: tuple[int, int] = (0, 0)

    @property
    def relative(self) -> float:
        return self.absolute / self.largest if self.largest else float(self.absolute > 0) * float("inf")


def be_quiet() -> None:
    """Polygraphy's messages go to stderr, from warnings on; a difference is a line of our table and not of its log."""
    G_LOGGER.colors = False
    G_LOGGER.use_python_logging_system = True
    G_LOGGER.module_severity = {"": G_LOGGER.WARNING, "comparator": G_LOGGER.CRITICAL}


def metadata(specs: Mapping[str, Spec]) -> TensorMetadata:
    found = TensorMetadata()
    for name, (dtype, shape) in specs.items():
        found.add(name, dtype=np.dtype(dtype), shape=tuple(dim if isinstance(dim, int) else -1 for dim in shape))
    return found


@torch.no_grad()
def run_graph(graph: Graph, feed: Feed) -> dict[str, NDArray[Any]]:
    """The graph's outputs by binding name, eager. The feed stays as it is."""
    config, layout = graph.config, graph.layout
    # Copies: an op may write a state in place, or hand an input on as an output.
    inputs = [torch.tensor(feed[name]) for name in input_specs(graph.graph_name, config, layout)]
    names = output_specs(graph.graph_name, config, layout)
    return {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in zip(names, graph(*inputs), strict=True)}


ENGINE, ONNX_RUNTIME = "engine", "ONNX Runtime"  # names of runners


class TorchRunner(BaseRunner):
    """The module that the ONNX graph was traced from, eager: the reference."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(name="torch")
        self.graph = graph

    def get_input_metadata_impl(self) -> TensorMetadata:
        return metadata(input_specs(self.graph.graph_name, self.graph.config, self.graph.layout))

    def infer_impl(self, feed_dict: Feed) -> OrderedDict[str, NDArray[Any]]:
        start = time.perf_counter()
        outputs = OrderedDict(run_graph(self.graph, feed_dict))
        self.inference_time = time.perf_counter() - start
        return outputs


class EngineRunner(BaseRunner):
    """An engine of a GPU target: states are put into its buffers, a call of its own runs, states are read back."""

    def __init__(self, graph: str, engine: Any) -> None:
        super().__init__(name=ENGINE)
        self.graph, self.engine = graph, engine

    def get_input_metadata_impl(self) -> TensorMetadata:
        return metadata(input_specs(self.graph, self.engine.manifest.config, "device"))

    def states(self) -> dict[str, torch.Tensor]:
        """The engine's own buffers by binding name."""
        state = self.engine.model.state
        found = {f"{layer}.kv_cache": cache for layer, cache in state.kv.items()}
        for layer, pair in state.recurrent.items():
            found |= {f"{layer}.{kind}": t for kind, t in zip(("recurrent_state", "ring"), pair, strict=True)}
        return found

    @staticmethod
    def slots(name: str, state: torch.Tensor, feed: Feed) -> torch.Tensor:
        """The part of a state that the feed has: a cache [2, Hkv, S, D] of an engine has slots beyond its S."""
        return state[:, :, : feed[name].shape[2]] if name.endswith("kv_cache") else state

    def infer_impl(self, feed_dict: Feed) -> OrderedDict[str, NDArray[Any]]:
        start = time.perf_counter()
        states = self.states()
        for name in states.keys() & feed_dict.keys():
            self.slots(name, states[name], feed_dict).copy_(torch.tensor(feed_dict[name]))
        outputs = self.call(self.engine, feed_dict)
        for name in output_specs(self.graph, self.engine.manifest.config, "device"):
            state = name.removeprefix("next.")
            if state in states:
                outputs[name] = self.slots(state, states[state], feed_dict).cpu().numpy().copy()
        self.inference_time = time.perf_counter() - start
        return outputs

    def call(self, engine: Engine, feed: Feed) -> OrderedDict[str, NDArray[Any]]:
        tokens, position = np.asarray(feed["token_ids"], np.int64), int(feed["position"][0])
        accepted = int(feed["accepted"][0]) if "accepted" in feed else 0
        match self.graph:
            case "main.prefill":
                hidden, logits = engine.prefill(tokens, position, accepted)
            case "main.verify":
                hidden, logits = engine.verify(tokens, position, accepted)
            case "mtp.draft":
                hidden, logits = engine.draft(tokens, feed["hidden"], position, accepted)
            case _:
                engine.mtp_prefill(tokens, feed["hidden"], position)
                return OrderedDict()
        return OrderedDict({"next.hidden" if self.graph == "mtp.draft" else "hidden": hidden, "logits": logits})


def compare(
    graph: str, feeds: Sequence[Feed], runners: Sequence[Any], tolerances: Mapping[str, Mapping[str, float]]
) -> list[Measurement]:
    """Every output of every runner but the first against the first's, which is the reference.

    tolerances: runner -> output -> largest difference, of the largest value of the reference's output."""
    found: list[Measurement] = []

    def measure(reference: Any, other: Any) -> OrderedDict[str, bool]:
        """Polygraphy's own functions have no bound relative to the largest value."""
        assert list(reference) == list(other), (list(reference), list(other))
        for name, expected in reference.items():
            value, tokens, absolute = other[name], (0, 0), float("nan")
            largest = float(np.abs(expected, dtype=np.float64).max())
            if value.shape == expected.shape:
                absolute = float(np.abs(np.subtract(value, expected, dtype=np.float64)).max())
                if name == "logits":
                    tokens = int((value.argmax(-1) == expected.argmax(-1)).sum()), len(value)
            tolerance = tolerances[other.runner_name][name]
            passed = absolute <= tolerance * largest  # not so for NaN
            row = (other.runner_name, graph, name, largest, absolute, tolerance, passed, tokens)
            found.append(Measurement(*row))
        # Under the name of an output Polygraphy would compute its statistics, for a log that nobody reads.
        return OrderedDict((f"{graph}/{m.output}", m.passed) for m in found[-len(reference) :])

    pairs = [(0, i) for i in range(1, len(runners))]
    results = Comparator.run(list(runners), data_loader=list(feeds))
    Comparator.compare_accuracy(results, comparisons=pairs, compare_func=measure)
    return found


def save(directory: Path, index: int, feed: Feed, graph: Graph) -> None:
    """The call as files that `polygraphy run` takes: --load-inputs and, from the reference, --load-outputs."""
    results = RunResults()
    results.add([run_graph(graph, feed)], runner_name="torch")
    for kind, value in (("inputs", [dict(feed)]), ("outputs", results)):
        (directory / f"{graph.graph_name}.{kind}").mkdir(parents=True, exist_ok=True)
        save_json(value, str(directory / f"{graph.graph_name}.{kind}" / f"{index:06}.json"))
