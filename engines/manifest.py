"""What an engine directory holds, and the check that it still holds it.

`manifest.json` names the version and target, the model's config, the checkpoint it was made from, and every file
with its size and SHA-256. `Manifest.read` refuses a directory that another version wrote or that was changed since.
Files above 256 MiB are hashed again only when their size or time of change differs from the build's.

The manifest holds a hash of itself too.

    python -c "from pathlib import Path; from engines.manifest import *; print(Manifest.read(Path('build/demo/cpu')))"
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.config import ModelConfig, read_json
from export.errors import UserError

VERSION = "0.2.0"
NAME = "manifest.json"
WEIGHTS = "weights.safetensors"
LARGE = 256 << 20
TENSORRT = {"package", "version", "targets", "words", "plugin_version", "graphs", "kernels"}  # of such a target


def sha256(path: Path, progress: Callable[[int], None] | None = None) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(8 << 20):
            digest.update(piece)
            if progress:
                progress(len(piece))
    return digest.hexdigest()


def describe(files: Iterable[Path], progress: Callable[[int], None] | None = None) -> dict[str, dict[str, Any]]:
    """name -> size, time of change, hash."""
    return {
        path.name: {
            "size": path.stat().st_size,
            "mtime_ns": path.stat().st_mtime_ns,
            "sha256": sha256(path, progress),
        }
        for path in sorted(files)
    }


@dataclass(frozen=True)
class Manifest:
    """target: "cpu", "cuda", "tensorrt" or compute capabilities such as "sm_89,sm_120". expanded: weights are
    constant-folded to float32 at load, else they stay packed. capacity: largest number of positions that a run may ask
    for. has_weights: else it was built from a config alone."""

    version: str
    target: str
    config: ModelConfig
    formats: dict[str, str]
    has_mtp: bool
    expanded: bool
    capacity: int
    versions: dict[str, str]
    source: dict[str, Any]
    files: dict[str, dict[str, Any]]
    has_weights: bool = True
    tensorrt: dict[str, Any] = dataclasses.field(default_factory=dict)  # of engines.tensorrt_files.fill

    def write(self, directory: Path) -> None:
        values = {**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, "config": self.config.to_dict()}
        (directory / NAME).write_text(json.dumps({**values, "sha256": _digest(values)}, indent=1) + "\n")

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read and check an engine directory.

        Raises UserError: no directory, no manifest, another version, a file that is missing or was changed."""
        if not directory.is_dir():
            raise UserError(f"{directory}: no such engine directory; make it with `make engines MODEL=<checkpoint>`")
        if not (directory / NAME).is_file():
            raise UserError(f"{directory}: not an engine directory (no {NAME}); make one with `make engines MODEL=…`")
        rebuild = "build the engines again with `make engines`"
        values = read_json(directory / NAME, rebuild)
        if values.get("version") != VERSION:
            raise UserError(
                f"{directory / NAME}: written by Tandem {values.get('version')}, this is {VERSION}; {rebuild}"
            )
        if values.pop("sha256", None) != _digest(values):
            raise UserError(f"{directory / NAME}: changed since the build (its own SHA-256 differs); {rebuild}")
        try:
            manifest = cls(**{**values, "config": ModelConfig.from_dict(values["config"])})
            if manifest.target not in ("cpu", "cuda") and (missing := TENSORRT - set(manifest.tensorrt)):
                raise KeyError(min(missing))
            files = [(directory / name, recorded) for name, recorded in manifest.files.items()]
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{directory / NAME}: not a manifest of this version ({error}); {rebuild}") from None
        for path, recorded in files:
            _check(path, recorded, rebuild)
        return manifest


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _check(path: Path, recorded: dict[str, Any], mend: str) -> None:
    if not path.is_file():
        raise UserError(f"{path}: missing from the engine directory; {mend}")
    status = path.stat()
    if status.st_size != recorded["size"]:
        raise UserError(f"{path}: {status.st_size} bytes, the manifest says {recorded['size']}; {mend}")
    if status.st_size > LARGE and status.st_mtime_ns == recorded["mtime_ns"]:
        return
    if sha256(path) != recorded["sha256"]:
        raise UserError(f"{path}: changed since the build (its SHA-256 differs from the manifest's); {mend}")
