"""How far ONNX Runtime and the engines are from the torch reference, graph by graph and output by output.

    python -m runtime.accuracy --engines build/demo/cpu

A few prompts are decoded by the torch reference, in rounds as always, and every call of every graph is recorded with
its states. Each call then goes to each of Polygraphy's runners, which all get the same states, so errors do not add up
over calls. One table says per output, states by kind, the worst of all calls and layers.

The tolerance of an output is the sum of the tolerances of the ops that it depends on (`Op.tolerance`, from plugins/);
the largest difference may be that part of the largest value of the reference's output. An op may be off by its
tolerance; what comes after carries that on and adds its own, and the norm before every mixer and MLP keeps a relative
error what it is. So errors that all point the same way add up to the sum. The kernels of an engine have a tolerance
of their own, that of rounding activations to 16 bits: independent from op to op, so they add up as squares do, and
four times that root is taken. Exit status 1: an output is farther off. A router's near-tie that falls the other way
is farther off too, and no defect; the calls of the demo hold none.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import torch

from engines import Floats, open_engine
from engines.manifest import WEIGHTS, Manifest
from engines.onnxruntime import MAX_THREADS, OnnxRuntimeEngine
from engines.torch import TorchEngine
from export.bindings import GRAPHS, RING_CALL_ROWS, input_specs, sized
from export.checkpoint import TensorSpec, load_weights, read_header
from export.cli import Parser, run, say
from export.errors import UserError
from export.model import Graph
from export.trace import trace
from plugins import DOMAIN, OPS
from plugins.launch import DECODE_RTOL, PREFILL_RTOL
from runtime.bench import PROMPTS, load_prompts
from runtime.decode import DEMO, read_prompt
from runtime.rounds import Decoder, check_request
from runtime.sampling import Sampler, SamplingConfig
from runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from runtime.comparison import Feed, Measurement

NUM_PROMPTS = 2  # of the demo's, where none is given
RULE = """tolerance, of the reference's largest value: the sum of the tolerances of the ops that an output depends on;
for engines, whose ops round to 16 bits, four times the root of the sum of their squares"""


class Call(NamedTuple):
    graph: str
    feed: Feed


class Recorder(TorchEngine):
    """The torch reference of an engine directory of any target, which keeps what its graphs are called with.

    calls: (graph, feed) since they were last taken. layout: of the states, see export.bindings."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.manifest = manifest
        self.layout = "host" if manifest.target == "cpu" else "device"
        self.max_rows = TorchEngine.max_rows if self.layout == "host" else RING_CALL_ROWS
        weights = load_weights(directory / WEIGHTS)
        header = {name: TensorSpec(entry[0], entry[1]) for name, entry in read_header(directory / WEIGHTS).items()}
        self.graphs = {
            name: Graph(name, manifest.config, header, manifest.formats, layout=self.layout).load(weights)
            for name in (GRAPHS if manifest.has_mtp else GRAPHS[:2])
        }
        self.calls: list[Call] = []

    def start(self, capacity: int, window: int) -> None:
        self.states: dict[str, Any] = {}
        for graph in self.graphs:
            for name, (dtype, shape) in input_specs(graph, self.manifest.config, self.layout).items():
                if "layers." in name:
                    self.states[name] = np.zeros(sized(shape, {"S": capacity, "W": 1}), dtype)

    def _run(self, graph: str, **inputs: Any) -> dict[str, Floats]:
        from runtime.comparison import run_graph

        feed: dict[str, Any] = {}
        for name, (dtype, _) in input_specs(graph, self.manifest.config, self.layout).items():
            feed[name] = self.states[name] if name in self.states else np.atleast_1d(inputs[name]).astype(dtype)
        self.calls.append(Call(graph, feed))
        outputs = run_graph(self.graphs[graph], feed)
        self.states |= {name.removeprefix("next."): t for name, t in outputs.items() if "layers." in name}
        return outputs

    def state(self) -> dict[str, Floats]:
        return self.states


def rounds(reference: Recorder, prompt: list[int], max_new_tokens: int, mtp_k: int) -> Iterator[list[Call]]:
    """Decodes greedily; yields the calls of the prefill, then those of each round."""
    decoder = Decoder(reference, len(prompt) + max_new_tokens, mtp_k, Sampler(SamplingConfig()))
    decoder.prefill(prompt)
    left = max_new_tokens - 1
    while True:
        calls, reference.calls = reference.calls, []
        yield calls
        if left < 1:
            return
        left -= len(decoder.round(min(mtp_k, left - 1))[1])


def tolerances(model: onnx.ModelProto, kernels: float | None = None) -> dict[str, float]:
    """Output -> the sum of the tolerances of the ops that it depends on: see the module. kernels: the tolerance of
    every op's kernels, for an engine."""
    ops = {op.name: op for op in OPS}
    halves = {
        value.name
        for value in (*model.graph.value_info, *model.graph.output)
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    }
    behind: dict[str, frozenset[int]] = {}  # value -> the ops, by number, that it depends on
    rtol: dict[int, float] = {}
    for i, node in enumerate(model.graph.node):
        found = frozenset[int]().union(*(behind.get(name, ()) for name in node.input))
        if node.domain == DOMAIN:
            dtypes = [torch.float16 if name in halves else torch.float32 for name in node.output]
            own = ops[node.op_type].tolerance([torch.empty(0, dtype=dtype) for dtype in dtypes])
            rtol[i] = max(own, kernels or 0)
            found |= {i}
        behind |= dict.fromkeys(node.output, found)
    each = {output.name: [rtol[i] for i in behind[output.name]] for output in model.graph.output}
    if kernels:
        return {name: 4 * math.hypot(*own) for name, own in each.items()}
    return {name: sum(own) for name, own in each.items()}


class Comparison:
    """The runners of one engine directory. left_out: why a runner takes no part, one line each."""

    def __init__(self, directory: Path, manifest: Manifest, threads: int = 1) -> None:
        self.directory, self.manifest = directory, manifest
        self.reference = Recorder(directory, manifest)
        self.layout, self.left_out = self.reference.layout, list[str]()
        self.onnx: OnnxRuntimeEngine | None = None
        if manifest.target == "cuda":
            self.left_out.append("ONNX Runtime: left out, the cuda target has no ONNX files")
        else:
            self.onnx = OnnxRuntimeEngine(directory, manifest, threads, self.layout)
        self.engine = self._open_engine()
        self.tolerances = {graph: self._tolerances(graph) for graph in self.reference.graphs}

    def _tolerances(self, graph: str) -> dict[str, dict[str, float]]:
        """By runner, then output."""
        model = self._model(graph)
        kernels = PREFILL_RTOL if graph.endswith("prefill") else DECODE_RTOL
        return {"ONNX Runtime": tolerances(model), "engine": tolerances(model, kernels)}

    def _open_engine(self) -> Any:
        """The engine of a GPU target, where its GPU is."""
        targets = self.manifest.target.split(",")
        if targets == ["cpu"]:
            self.left_out.append("engine: the cpu target's is ONNX Runtime")
            return None
        if not torch.cuda.is_available():
            self.left_out.append(f"engine: left out, it is for {self.manifest.target} and no NVIDIA GPU is here")
            return None
        arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
        if targets[0].startswith("sm_") and arch not in targets:
            self.left_out.append(f"engine: left out, it is for {self.manifest.target} and this GPU is {arch}")
            return None
        return open_engine(self.directory)

    def _model(self, graph: str) -> onnx.ModelProto:
        if self.onnx:
            return onnx.load(self.directory / f"{graph}.onnx", load_external_data=False)
        weights, manifest = self.directory / WEIGHTS, self.manifest
        header = {name: TensorSpec(entry[0], entry[1]) for name, entry in read_header(weights).items()}
        return ir.to_proto(
            trace(graph, manifest.config, header, manifest.formats, weights, expanded=False, layout=self.layout)
        )

    def runners(self, graph: str) -> list[Any]:
        """Of Polygraphy; the reference is the first."""
        from runtime import comparison

        found: list[Any] = [comparison.TorchRunner(self.reference.graphs[graph])]
        if self.onnx:
            self.onnx.load(graph)
            found.append(comparison.OnnxrtRunner(self.onnx.sessions[graph], name="ONNX Runtime"))
        if self.engine:
            found.append(comparison.EngineRunner(graph, self.engine))
        return found

    def run(
        self, prompts: list[list[int]], max_new_tokens: int, mtp_k: int, save: Path | None = None
    ) -> tuple[list[Measurement], Counter[str]]:
        """Measurements of every output of every call, and how many calls each graph had."""
        from runtime import comparison

        found: list[Measurement] = []
        count: Counter[str] = Counter()
        for prompt in prompts:
            if self.engine:
                self.engine.start(len(prompt) + max_new_tokens, mtp_k + 1)
            # Round by round: the states of all calls at once would be gigabytes for a large model.
            for calls in rounds(self.reference, prompt, max_new_tokens, mtp_k):
                for graph in dict.fromkeys(call.graph for call in calls):
                    feeds = [call.feed for call in calls if call.graph == graph]
                    for i, feed in enumerate(feeds if save else ()):
                        assert save
                        comparison.save(save, count[graph] + i, feed, self.reference.graphs[graph])
                    found += comparison.compare(graph, feeds, self.runners(graph), self.tolerances[graph])
                    count[graph] += len(feeds)
        return found, count


def kind_of(output: str) -> str:
    """States of all layers fold into one row by kind."""
    return output.rpartition(".")[2] if "layers." in output else output


def worst(found: list[Measurement]) -> list[Measurement]:
    """Per runner, graph and kind of output the one that is farthest off, as part of its tolerance."""
    rows: dict[tuple[str, str, str], Measurement] = {}
    for m in found:
        key = (m.runner, m.graph, kind_of(m.output))
        if key not in rows or severity(m) > severity(rows[key]):
            rows[key] = m
    order = {graph: i for i, graph in enumerate(GRAPHS)}
    return sorted(rows.values(), key=lambda m: (m.runner, order[m.graph]))


def severity(m: Measurement) -> tuple[bool, float]:
    return not m.passed, np.nan_to_num(m.relative / m.tolerance, nan=np.inf) if m.tolerance else m.relative


def table(found: list[Measurement]) -> None:
    print(f"{'runner':13}{'graph':13}{'output':17}{'abs. error':>11}{'of largest':>12}{'tolerance':>11}  passed")
    for m in worst(found):
        numbers = f"{m.absolute:11.2e}{m.relative:12.2e}{m.tolerance:11.2e}"
        print(f"{m.runner:13}{m.graph:13}{kind_of(m.output):17}{numbers}  {'yes' if m.passed else 'NO: ' + m.output}")
    print(RULE)
    for runner in dict.fromkeys(m.runner for m in found):
        same, rows = (sum(m.tokens[i] for m in found if m.runner == runner) for i in range(2))
        print(f"{runner}: the most likely token is the reference's in {same} of {rows} rows of logits")


def prompts_of(options: argparse.Namespace) -> list[list[int]]:
    if options.token_ids is not None:
        return [read_prompt(options, None)]
    tokenizer = Tokenizer(options.engines)
    if options.prompt_file:
        return [read_prompt(options, tokenizer)]
    return load_prompts(PROMPTS, tokenizer)[:NUM_PROMPTS]


def main() -> None:
    parser = Parser(prog="python -m runtime.accuracy", description=__doc__.split("\n")[0])
    parser.add_argument("--engines", type=Path, default=DEMO, metavar="DIR", help=f"engine directory (default {DEMO})")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt-file", type=Path, metavar="FILE", help="default: a few of demo/prompts.json")
    source.add_argument("--token-ids", metavar="IDS", help='the prompt as token ids, "1 2 3"; needs no tokenizer')
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help="per prompt (default 32)")
    parser.add_argument("--mtp-k", type=int, default=2, metavar="K", help="drafts per round (default 2)")
    parser.add_argument("--save", type=Path, metavar="DIR", help="keep the calls for `polygraphy run --load-inputs`")
    help = "CPU threads (default 1: torch and ONNX Runtime run in turn, and each waits for the other's idle threads)"
    parser.add_argument("--threads", type=int, default=1, metavar="N", help=help)
    parser.set_defaults(prompt=None)
    options = parser.parse_args()
    try:
        from runtime import comparison
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "polygraphy":
            raise
        raise UserError("Polygraphy is not installed; run `make setup`") from None
    comparison.be_quiet()
    manifest = Manifest.read(options.engines)
    if not manifest.has_weights:
        raise UserError(f"{options.engines}: built without weights; give `make engines` a checkpoint as MODEL")
    if options.save and options.save.exists():
        raise UserError(f"--save {options.save}: exists; choose another directory or move it away")
    if not 1 <= options.threads <= MAX_THREADS:
        raise UserError(f"--threads {options.threads}: expected 1 to {MAX_THREADS}")
    torch.set_num_threads(options.threads)
    prompts = prompts_of(options)
    compared = Comparison(options.engines, manifest, options.threads)
    for prompt in prompts:
        check_request(compared.reference, prompt, options.max_new_tokens, options.mtp_k)
    for line in compared.left_out:
        say(line)
    if len(compared.runners("main.verify")) == 1:
        raise UserError(f"{options.engines}: nothing to compare with the reference here; the line above says why")
    found, count = compared.run(prompts, options.max_new_tokens, options.mtp_k, options.save)
    say(f"calls compared: {', '.join(f'{number} of {graph}' for graph, number in count.items())}")
    table(found)
    if not all(m.passed for m in found):
        sys.exit(1)


if __name__ == "__main__":
    run(main)
