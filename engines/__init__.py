"""Checkpoint -> engine directory, and engine directory -> callable: one class per backend, all like `Engine`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engines.manifest import Manifest
from export.errors import UserError

Floats = NDArray[np.float32]
Tokens = NDArray[np.int64]


class Engine(Protocol):
    """The four graphs over one state. H: hidden size, V: vocabulary, T: rows of the call.

    `accepted` tells how many leading rows of the previous verify are true; a call commits those before it runs its
    own rows. What a call returns stays valid until the next call of the same graph."""

    manifest: Manifest

    @property
    def max_rows(self) -> int:
        """Rows that one verify can take: one more than drafts."""

    def load(self, *graphs: str) -> None:
        """Make these graphs ready now rather than at their first call."""

    def start(self, capacity: int, window: int) -> None:
        """Fresh state for `capacity` positions and verify calls of up to `window` rows."""

    def prefill(self, token_ids: Tokens, position: int, accepted: int) -> tuple[Floats, Floats]:
        """hidden [T, H], logits of the last row [1, V]; commits its own rows too."""

    def verify(self, token_ids: Tokens, position: int, accepted: int) -> tuple[Floats, Floats]:
        """hidden [T, H], logits [T, V]; its rows become the pending window."""

    def mtp_prefill(self, token_ids: Tokens, hidden: Floats, position: int) -> None:
        """Fills the head's KV cache for rows whose following tokens are token_ids."""

    def draft(self, token_ids: Tokens, hidden: Floats, position: int, accepted: int) -> tuple[Floats, Floats]:
        """The head's own hidden state [1, H] and logits [1, V] of row accepted - 1."""

    def state(self) -> dict[str, Floats]:
        """Every state tensor by its binding name, pending windows with the rows of the last verify; for tests."""


def open_engine(directory: Path, threads: int = 0, **options: Any) -> Engine:
    """The engine directory `directory`, loaded for the target that it was built for. threads: CPU threads of `cpu`.
    options: fields of engines.cuda_model.Options, for `cuda`. Raises UserError: what a user can mend."""
    manifest = Manifest.read(directory)
    if manifest.target == "cuda":
        from engines.cuda import CudaEngine, Options  # they bring torch, which the others decode without

        return CudaEngine(directory, manifest, Options(**options))
    if given := [name for name, value in options.items() if value]:
        raise UserError(
            f"--{given[0].replace('_', '-')}: for engines of the cuda target; {directory} is {manifest.target}"
        )
    if manifest.target != "cpu":
        from engines.tensorrt import TensorRtEngine

        return TensorRtEngine(directory, manifest)
    from engines.onnxruntime import OnnxRuntimeEngine

    return OnnxRuntimeEngine(directory, manifest, threads)
