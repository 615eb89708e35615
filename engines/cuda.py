"""The `cuda` engine: our kernels on any NVIDIA GPU from compute capability 8.0 on.

Call by call it has the interface of every engine, which tests use; decoding runs whole rounds as CUDA graphs over the
same launches (runtime/graph.py). Weights are loaded once, for the main model and the head.

    engine = CudaEngine(Path("build/demo/cuda"))
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engines import Floats, Tokens
from engines.cuda_memory import PREFILL_CHUNK, slots
from engines.cuda_model import CudaModel, Gpu, Options
from engines.cuda_prefill import Prefill
from engines.cuda_weights import DeviceWeights
from engines.manifest import WEIGHTS, Manifest
from export.cli import progress
from export.errors import UserError
from plugins.sampling import cuda as sampling_cuda


@contextlib.contextmanager
def loading(directory: Path) -> Iterator[Callable[[float, float], None]]:
    """Yields the progress of loading the directory's weights. Raises UserError: they do not fit the GPU's memory."""
    try:
        with progress("loading the weights") as update:
            yield update
    except torch.OutOfMemoryError:
        raise UserError(f"{directory}: the GPU's memory does not hold the weights; close what uses it") from None


class CudaEngine:
    """One engine directory on the current GPU. Raises UserError: no GPU, an old one, too little memory."""

    def __init__(
        self, directory: Path | None, manifest: Manifest | None = None, options: Options | None = None
    ) -> None:
        Gpu.current()
        self.manifest = manifest or Manifest.read(directory or Path())
        if directory:
            if self.manifest.target != "cuda":
                raise UserError(f"{directory}: engines for {self.manifest.target}, this runs the cuda target only")
            with loading(directory) as update:
                weights = DeviceWeights.load(directory / WEIGHTS, self.manifest.formats, update)
                self.model = CudaModel(self.manifest.config, weights, options or Options())

    @classmethod
    def of(cls, model: CudaModel, manifest: Manifest) -> CudaEngine:
        """An engine around a model that is there already."""
        engine = cls(None, manifest)
        engine.model = model
        return engine

    cache_hint = ", or use --fp8-cache"

    @property
    def max_rows(self) -> int:
        return self.model.max_rows

    def load(self, *graphs: str) -> None:
        """Everything is ready once the engine is."""

    def start(self, capacity: int, window: int) -> None:
        if window > self.max_rows:
            raise UserError(f"--mtp-k {window - 1}: this model on this GPU takes 0 to {self.max_rows - 1}")
        self.__dict__.pop("prefilled", None)  # its memory, before the next takes as much
        try:
            self.model.start(slots(capacity), window)
            self.prefilled = self.make_prefill(min(PREFILL_CHUNK, capacity))
        except torch.OutOfMemoryError:
            free = torch.cuda.mem_get_info()[0] / 1e9
            raise UserError(
                f"the GPU's memory does not hold {capacity} positions beside the weights ({free:.1f} GB free); "
                f"shorten the prompt or --max-new-tokens{self.cache_hint}"
            ) from None

    def make_prefill(self, rows: int) -> Any:
        return Prefill(self.model, rows)

    def _control(self, **words: int) -> None:
        for word, value in words.items():
            self.model.buffers.control[getattr(sampling_cuda, word)] = value

    @staticmethod
    def _put(buffer: torch.Tensor, values: Tokens | Floats) -> None:
        buffer[: len(values)].copy_(torch.from_numpy(np.ascontiguousarray(values)))

    def prefill(self, token_ids: Tokens, position: int, accepted: int) -> tuple[Floats, Floats]:
        rows = len(token_ids)
        self._control(POSITION=position, COMMIT=accepted)
        self._put(self.prefilled.buffers.tokens, token_ids)
        self.prefilled.main(rows)
        self._control(COMMIT=0)
        return self.prefilled.buffers.hidden[1 : rows + 1].cpu().numpy(), self.model.buffers.logits[:1].cpu().numpy()

    def verify(self, token_ids: Tokens, position: int, accepted: int) -> tuple[Floats, Floats]:
        rows = len(token_ids)
        self._control(POSITION=position, COMMIT=accepted)
        self._put(self.model.buffers.verify_tokens, token_ids)
        self.model.verify(rows)
        return self.model.buffers.hidden[:rows].cpu().numpy(), self.model.buffers.logits[:rows].cpu().numpy()

    def mtp_prefill(self, token_ids: Tokens, hidden: Floats, position: int) -> None:
        self._control(POSITION=position)
        self._put(self.prefilled.buffers.next_tokens, token_ids)
        self._put(self.prefilled.buffers.hidden, hidden)
        self.prefilled.head(len(token_ids), 0, 0)

    def draft(self, token_ids: Tokens, hidden: Floats, position: int, accepted: int) -> tuple[Floats, Floats]:
        self._control(HEAD_POSITION=position, HEAD_ROWS=accepted, HEAD_LAST=accepted - 1)
        self._put(self.model.buffers.head_tokens, token_ids)
        self._put(self.model.buffers.hidden, hidden)
        self.model.draft(len(token_ids), 0)
        return self.model.buffers.head_hidden.cpu().numpy(), self.model.buffers.draft_logits.cpu().numpy()

    def state(self) -> dict[str, Floats]:
        """KV caches and recurrent states; the pending rows are in the rings, by position."""
        state = self.model.state
        tensors = {f"{name}.kv_cache": cache for name, cache in state.kv.items()}
        tensors |= {f"{name}.recurrent_state": pair[0] for name, pair in state.recurrent.items()}
        return {name: tensor.float().cpu().numpy() for name, tensor in tensors.items()}
