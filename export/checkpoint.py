"""A Hugging Face checkpoint directory of any supported layout, as one naming and one weights file.

Contract: `Checkpoint.open` reads config and headers only and checks all of them against each other;
`write_weights` streams the data, at most 16 MiB at a time. Canonical names are Hugging Face's without the
prefix. A linear X is `X.weight` [N, K] (float), or with `X.weight_scale` (fp8: w * weight_scale), or
U8 `X.weight` [N, K/2], F8_E4M3 `X.weight_scale` [N, K/16] and F32 `X.weight_scale_2` (nvfp4:
e2m1 * weight_scale * weight_scale_2). Experts are stacked: gate_up_proj [E, 2I, H], down_proj [E, H, I].

    python -m export.checkpoint path/to/checkpoint [weights.safetensors]
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from export.cli import run
from export.config import ModelConfig, read_json
from export.errors import UserError
from export.layout import Planner, Source
from export.quantization import read_declared, strip_prefix
from export.weights import Entry, Output, load_weights, read_header, read_tensor, write_file

__all__ = ["Checkpoint", "Entry", "TensorSpec", "load_weights", "read_header", "read_tensor"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SIDECAR = "model_mtp.safetensors"
_VISION = re.compile(r"(?:model\.|language_model\.)?(?:visual|vision_tower|vision_model)\.")
_OPTIONAL = ("generation_config.json", "hf_quant_config.json", INDEX)


class TensorSpec(NamedTuple):
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    config: ModelConfig
    directory: Path
    notes: list[str]  # lines for the user: the layout found, what was skipped
    tensors: dict[str, TensorSpec]  # canonical name -> what `write_weights` writes
    formats: dict[str, str]  # linear or experts module -> "float", "fp8" or "nvfp4"
    _outputs: list[Output]
    _files: list[Path]

    @property
    def has_mtp(self) -> bool:
        return self.config.mtp_num_hidden_layers > 0

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Read config and headers, and plan every tensor of the weights file."""
        directory = Path(directory)
        if not directory.is_dir():
            mend = "point at the directory of a Hugging Face checkpoint"
            raise UserError(f"{directory}: no such directory; {mend}")
        raw_config = read_json(directory / "config.json")
        config = ModelConfig.from_hf(directory)
        declared = read_declared(raw_config, directory)
        tensors = _Tensors(directory)
        has_mtp = any(name.startswith("mtp.") for name in tensors.sources)
        if config.mtp_num_hidden_layers and not has_mtp:
            tensors.notes.append("no MTP head: config.json speaks of one, but there are no mtp. tensors")
        config = dataclasses.replace(config, mtp_num_hidden_layers=int(has_mtp))
        planner = Planner(config, tensors.sources, declared, tensors.where, tensors.prefix())
        planner.plan()
        counts = ", ".join(f"{n} {how}" for how, n in sorted(Counter(planner.formats.values()).items()))
        head = "with" if has_mtp else "without"
        layout = f"layout: {declared.label}, {counts} modules, {head} an MTP head"
        written = {output.name: TensorSpec(output.dtype, output.shape) for output in planner.outputs}
        assert len(written) == len(planner.outputs), "two outputs of one name"
        files = [directory / "config.json"]
        files += [path for name in _OPTIONAL if (path := directory / name).exists()]
        return cls(
            config=config,
            directory=directory,
            notes=[layout, *tensors.notes, *planner.notes],
            tensors=written,
            formats=planner.formats,
            _outputs=planner.outputs,
            _files=files + tensors.files,
        )

    def write_weights(self, path: Path, progress: Callable[[int, int], None] | None = None) -> None:
        """Write the weights file; `progress` gets (bytes done, total)."""
        write_file(Path(path), self._outputs, progress)

    def files(self) -> list[Path]:
        """Every file that was read."""
        return list(self._files)


class _Tensors:
    """The tensors of all safetensors files of a directory, vision aside, by name without prefix."""

    def __init__(self, directory: Path) -> None:
        self.sources: dict[str, Source] = {}
        self.notes: list[str] = []
        self.files: list[Path] = []
        self._vision: Counter[str] = Counter()
        index = directory / INDEX
        self.where = index if index.exists() else directory / SINGLE
        weight_map = _read_index(index) if index.exists() else {}
        if weight_map:
            self._add_shards(directory, weight_map)
        else:
            self._add(_present(directory / SINGLE, _no_weights(directory)))
        sidecar = directory / SIDECAR
        if sidecar.exists() and sidecar not in self.files:
            if any(name.startswith("mtp.") for name in self.sources):
                self.notes.append(f"ignored {SIDECAR}: the other files have an MTP head already")
            else:
                self._add(sidecar)
        for prefix, count in self._vision.items():
            self.notes.append(f"skipped {count} vision tensors under {prefix}")

    def prefix(self) -> str:
        """What goes before `embed_tokens.weight` here, to name a missing tensor as the user would."""
        source = self.sources.get("embed_tokens.weight")
        return source.name.removesuffix("embed_tokens.weight") if source else "model."

    def _add_shards(self, directory: Path, weight_map: dict[str, str]) -> None:
        headers: dict[str, dict[str, Entry]] = {}
        for shard in dict.fromkeys(weight_map.values()):
            path = _present(directory / shard, f"named by {INDEX}, but missing; download it")
            headers[shard] = self._add(path)
        for name, shard in weight_map.items():
            if name not in headers[shard]:
                where = f"{INDEX} places tensor {name!r} there, but the shard does not hold it"
                raise UserError(f"{directory / shard}: {where}; download both again")

    def _add(self, path: Path) -> dict[str, Entry]:
        self.files.append(path)
        header = read_header(path)
        for name, entry in header.items():
            if vision := _VISION.match(name):
                self._vision[vision.group()] += 1
                continue
            short = strip_prefix(name)
            if short in self.sources:
                other = self.sources[short]
                raise UserError(f"{path}: tensor {name!r} is {other.name!r} of {other.path.name} once more; remove one")
            self.sources[short] = Source(name, path, *entry)
        return header


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: no weight_map; download it again")
    for name, shard in weight_map.items():
        # A name, never a path: the file may be a link (Hugging Face's cache is made of them), but an index
        # must not send the reader out of the directory.
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", shard):
            mend = "expected the name of a .safetensors file in this directory; download it again"
            raise UserError(f"{path}: tensor {name!r} is placed in {shard!r}: {mend}")
    return weight_map


def _present(path: Path, otherwise: str) -> Path:
    if not path.exists():
        raise UserError(f"{path}: {otherwise}")
    return path


def _no_weights(directory: Path) -> str:
    if any(directory.glob("model-*-of-*.safetensors")):
        return f"missing, and {INDEX} too, which the shards here need; download it"
    return f"missing, and no {INDEX} either; Tandem reads safetensors checkpoints"


def _main(arguments: list[str]) -> None:
    if not arguments:
        raise UserError("which checkpoint? python -m export.checkpoint DIRECTORY [WEIGHTS_FILE]")
    checkpoint = Checkpoint.open(Path(arguments[0]))
    print("\n".join(checkpoint.notes))
    if len(arguments) > 1:
        checkpoint.write_weights(Path(arguments[1]))


if __name__ == "__main__":
    run(lambda: _main(sys.argv[1:]))
