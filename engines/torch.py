"""The same graphs as eager torch modules: slow, plain, and the oracle of the other engines.

engine = TorchEngine(Path("build/demo/cpu"))
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from engines import Floats, Tokens
from engines.manifest import WEIGHTS, Manifest
from export.bindings import GRAPHS, input_specs, output_specs, sized
from export.checkpoint import TensorSpec, load_weights, read_header
from export.model import Graph


class TorchEngine:
    """An engine directory's weights under the modules that its graphs were traced from."""

    def __init__(self, directory: Path, manifest: Manifest | None = None) -> None:
        self.manifest = manifest or Manifest.read(directory)
        config, weights = self.manifest.config, load_weights(directory / WEIGHTS)
        header = {name: TensorSpec(entry[0], entry[1]) for name, entry in read_header(directory / WEIGHTS).items()}
        graphs = GRAPHS if self.manifest.has_mtp else GRAPHS[:2]
        self.graphs = {name: Graph(name, config, header, self.manifest.formats).load(weights) for name in graphs}

    max_rows = 17

    def load(self, *graphs: str) -> None:
        """Everything is ready once the engine is."""

    def start(self, capacity: int, window: int) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        for graph in self.graphs:
            for name, (_, shape) in input_specs(graph, self.manifest.config).items():
                if "layers." in name:
                    self.tensors[name] = torch.zeros(sized(shape, {"S": capacity, "W": 1}))

    def prefill(self, token_ids: Tokens, position: int, accepted: int) -> tuple[Floats, Floats]:
        out = self._run("main.prefill", token_ids=token_ids, position=position, accepted=accepted)
        return out["hidden"], out["logits"]

    def verify(self, token_ids: Tokens, position: int, accepted: int) -> tuple[Floats, Floats]:
        out = self._run("main.verify", token_ids=token_ids, position=position, accepted=accepted)
        return out["hidden"], out["logits"]

    def mtp_prefill(self, token_ids: Tokens, hidden: Floats, position: int) -> None:
        self._run("mtp.prefill", token_ids=token_ids, hidden=hidden, position=position)

    def draft(self, token_ids: Tokens, hidden: Floats, position: int, accepted: int) -> tuple[Floats, Floats]:
        out = self._run("mtp.draft", token_ids=token_ids, hidden=hidden, position=position, accepted=accepted)
        return out["next.hidden"], out["logits"]

    def state(self) -> dict[str, Floats]:
        return {name: tensor.numpy() for name, tensor in self.tensors.items()}

    @torch.no_grad()
    def _run(self, graph: str, **inputs: object) -> dict[str, Floats]:
        config = self.manifest.config
        given = {name: torch.as_tensor(np.atleast_1d(np.asarray(value))) for name, value in inputs.items()}
        feeds = [given[name] if name in given else self.tensors[name] for name in input_specs(graph, config)]
        outputs = dict(zip(output_specs(graph, config), self.graphs[graph](*feeds), strict=True))
        self.tensors |= {name.removeprefix("next."): t for name, t in outputs.items() if "layers." in name}
        return {name: tensor.numpy() for name, tensor in outputs.items() if "layers." not in name}
