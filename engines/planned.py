"""A checkpoint that is only a config.json: shapes and formats of NVIDIA's mixed layout, no weights.

For building engines that hold no weights before, or without, a download. Has what `engines.build` uses of a Checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from engines.cuda_weights import synthetic_modules, synthetic_vectors
from export.checkpoint import TensorSpec
from export.config import ModelConfig
from export.weights import write_hole


class PlannedCheckpoint:
    def __init__(self, path: Path) -> None:
        """path: a config.json or a directory with one. Raises UserError for a config that Tandem cannot build."""
        self.config = ModelConfig.from_hf(path)
        self.directory = path.parent if path.is_file() else path
        self._config_file = path if path.is_file() else path / "config.json"
        self.has_mtp = self.config.mtp_num_hidden_layers > 0
        self.notes = ["no weights: engines for experts and lm_head in NVFP4, mixers in FP8, the rest in bfloat16"]
        self.tensors: dict[str, TensorSpec] = {}
        self.formats: dict[str, str] = {}
        for module, format, shape in synthetic_modules(self.config):
            self.formats[module.rpartition(".")[0] if ".experts." in module else module] = format
            if format == "nvfp4":
                halves = (2,) if module.endswith("gate_up_proj") else ()
                self.tensors[f"{module}.weight"] = TensorSpec("U8", (*shape[:-1], shape[-1] // 2))
                self.tensors[f"{module}.weight_scale"] = TensorSpec("F8_E4M3", (*shape[:-1], shape[-1] // 16))
                self.tensors[f"{module}.weight_scale_2"] = TensorSpec("F32", shape[:-2] + halves)
                continue
            self.tensors[f"{module}.weight"] = TensorSpec("F8_E4M3" if format == "fp8" else "BF16", shape)
            if format == "fp8":
                self.tensors[f"{module}.weight_scale"] = TensorSpec("F32", ())
        for name, shape in synthetic_vectors(self.config):
            self.tensors[name] = TensorSpec("BF16", shape)

    def files(self) -> list[Path]:
        return [self._config_file]

    def write_weights(self, path: Path, progress: Callable[[int, int], None] | None = None) -> None:
        """The header of a weights file, for the graphs to point into; its data is a hole."""
        write_hole(path, ((name, spec.dtype, spec.shape) for name, spec in self.tensors.items()))
