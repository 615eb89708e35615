"""The `cpu` engine: the exported graphs in ONNX Runtime, every buffer bound once.

KV caches are written in place; the other states alternate between two sets of buffers, so that no call reads what it
writes. A binding is prepared once per (graph, rows, window rows, parity) and then reused. The graphs' state may be of
either layout (export.bindings): graphs for GPUs run here too, through their function bodies.

    engine = OnnxRuntimeEngine(Path("build/demo/cpu"), threads=2)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from engines import Floats, Tokens
from engines.manifest import Manifest
from export.bindings import RING_CALL_ROWS, Spec, input_specs, output_specs, sized
from export.errors import UserError

MAX_THREADS = 1024


class OnnxRuntimeEngine:
    """One engine directory, loaded. threads: ONNX Runtime's intra-op threads, 0 for one per core. layout: of the
    graphs' state, see export.bindings."""

    def __init__(
        self, directory: Path, manifest: Manifest | None = None, threads: int = 0, layout: str = "host"
    ) -> None:
        self.manifest = manifest or Manifest.read(directory)
        if layout == "host" and self.manifest.target != "cpu":
            raise UserError(f"{directory}: engines for {self.manifest.target}, this runs the cpu target only")
        self.config = self.manifest.config
        if not 0 <= threads <= MAX_THREADS:
            raise UserError(f"--threads {threads}: expected 0 (one per core) to {MAX_THREADS}")
        self.directory, self.threads, self.layout = directory, threads, layout
        self.max_rows = 17 if layout == "host" else RING_CALL_ROWS
        self.sessions: dict[str, Any] = {}
        self.capacity = self.window = 0
        self.bindings: dict[tuple[str, int, int, int], Any] = {}
        self.rows: dict[tuple[str, int], dict[str, Any]] = {}  # inputs and outputs that are no state

    def load(self, *graphs: str) -> None:
        """Create the sessions of these graphs now rather than at their first call."""
        for name in graphs:
            self._session(name)

    def _session(self, graph: str) -> Any:
        if graph not in self.sessions:
            if graph.startswith("mtp") and not self.manifest.has_mtp:
                raise UserError(f"{self.directory}: the checkpoint has no MTP head; decode with --mtp-k 0")
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = self.threads
            options.log_severity_level = 3
            # A session's threads spin after each run; those of the head would take the cores from the main model's.
            options.add_session_config_entry("session.force_spinning_stop", "1")
            # Folding the unpacking of the weights is what makes them float32 once, at load, instead of in each call.
            disabled = [] if self.manifest.expanded else ["ConstantFolding"]
            path = self.directory / f"{graph}.onnx"
            try:
                session = onnxruntime.InferenceSession(
                    str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
                )
            except Exception as error:  # ONNX Runtime's exceptions share no base but this
                reason = str(error).strip().split("\n")[0]
                raise UserError(f"{path}: ONNX Runtime cannot load it ({reason}); build the engines again") from None
            found = ([i.name for i in session.get_inputs()], [o.name for o in session.get_outputs()])
            if found != tuple(map(list, self._specs(graph))):
                raise UserError(f"{path}: its inputs and outputs are not those of {graph}; build the engines again")
            self.sessions[graph] = session
        return self.sessions[graph]

    def _specs(self, graph: str) -> tuple[dict[str, Spec], dict[str, Spec]]:
        """Of the graph's inputs and outputs."""
        return input_specs(graph, self.config, self.layout), output_specs(graph, self.config, self.layout)

    def start(self, capacity: int, window: int) -> None:
        if capacity == self.capacity and window <= self.window:  # keep what was bound; caches are written before read
            self.parity, self.window_rows = 0, 1
            # Those of prefills are not kept: prompts have any length.
            self.bindings = {key: value for key, value in self.bindings.items() if not key[0].endswith("prefill")}
            self.rows = {key: value for key, value in self.rows.items() if not key[0].endswith("prefill")}
            for states in self.pairs:
                for state in states.values():
                    state.fill(0)
            return
        self.capacity, self.window = capacity, window
        self.bindings = {}
        self.parity, self.window_rows = 0, 1
        self.buffers: dict[str, Floats] = {}  # KV caches, one each
        self.pairs: tuple[dict[str, Floats], dict[str, Floats]] = ({}, {})  # the other states, two sets
        sizes = {"S": capacity, "W": window}
        for graph in ("main.verify", "mtp.draft") if self.manifest.has_mtp else ("main.verify",):
            for name, (dtype, shape) in self._specs(graph)[0].items():
                if "layers." not in name:
                    continue
                for store in (self.buffers,) if name.endswith("kv_cache") else self.pairs:
                    store[name] = np.zeros(sized(shape, sizes), dtype)
        self.rows = {}

    def prefill(self, token_ids: Tokens, position: int, accepted: int) -> tuple[Floats, Floats]:
        assert accepted <= self.window_rows
        out = self._run("main.prefill", len(token_ids), token_ids=token_ids, position=position, accepted=accepted)
        self.parity, self.window_rows = 1 - self.parity, 1
        return out["hidden"], out["logits"]

    def verify(self, token_ids: Tokens, position: int, accepted: int) -> tuple[Floats, Floats]:
        assert len(token_ids) <= self.window and accepted <= self.window_rows
        out = self._run("main.verify", len(token_ids), token_ids=token_ids, position=position, accepted=accepted)
        self.parity, self.window_rows = 1 - self.parity, len(token_ids)
        return out["hidden"], out["logits"]

    def mtp_prefill(self, token_ids: Tokens, hidden: Floats, position: int) -> None:
        self._run("mtp.prefill", len(token_ids), token_ids=token_ids, hidden=hidden, position=position)

    def draft(self, token_ids: Tokens, hidden: Floats, position: int, accepted: int) -> tuple[Floats, Floats]:
        rows = len(token_ids)
        out = self._run("mtp.draft", rows, token_ids=token_ids, hidden=hidden, position=position, accepted=accepted)
        return out["next.hidden"], out["logits"]

    def state(self) -> dict[str, Floats]:
        pair = self.pairs[self.parity]
        return self.buffers | {n: t[: self.window_rows] if ".pending_" in n else t for n, t in pair.items()}

    def _run(self, graph: str, rows: int, **inputs: Any) -> dict[str, Any]:
        is_main = graph.startswith("main")
        key = (graph, rows, self.window_rows if is_main else 0, self.parity if is_main else 0)
        if key not in self.bindings:
            self.bindings[key] = self._bind(*key)
        buffers = self.rows[graph, rows]
        for name, value in inputs.items():
            buffers[name][...] = value
        self._session(graph).run_with_iobinding(self.bindings[key])
        return buffers

    def _bind(self, graph: str, rows: int, window_rows: int, parity: int) -> Any:
        """A binding of every input and output of the graph to its buffer."""
        inputs, outputs = self._specs(graph)
        sizes = {"T": rows, "S": self.capacity, "W": window_rows}
        transient = {name: spec for name, spec in {**inputs, **outputs}.items() if "layers." not in name}
        buffers = self.rows.setdefault(
            (graph, rows),
            {name: np.zeros(sized(shape, sizes), dtype) for name, (dtype, shape) in transient.items()},
        )
        binding = self._session(graph).io_binding()
        for names, bind, states in (
            (inputs, binding.bind_input, self.pairs[parity]),
            (outputs, binding.bind_output, self.pairs[1 - parity]),
        ):
            for name, (_, shape) in names.items():
                state = name.removeprefix("next.")
                if "layers." not in name:
                    buffer = buffers[name]
                else:
                    buffer = self.buffers[state] if state in self.buffers else states[state]
                actual = sized(shape, sizes)
                assert buffer.flags.c_contiguous and buffer.size >= np.prod(actual)
                bind(name, "cpu", 0, buffer.dtype.type, actual, buffer.ctypes.data)
        return binding
