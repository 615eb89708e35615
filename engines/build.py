"""Checkpoint -> engine directory: the command behind `make engines`.

Everything is written into a temporary directory beside the target and renamed at the end, so that a build that
fails, is interrupted or fills the disk leaves the engines that were there before as they were.

    python -m engines.build --model demo/checkpoint --target cpu --out build/demo/cpu
"""

from __future__ import annotations

import contextlib
import glob
import importlib.metadata
import math
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from engines.manifest import NAME, VERSION, WEIGHTS, Manifest, describe
from export.bindings import GRAPHS
from export.checkpoint import Checkpoint
from export.cli import Parser, progress, run, say
from export.config import read_json
from export.errors import UserError
from export.trace import trace

TARGETS = ("cpu", "cuda")
EXPAND_BELOW = 1 << 30  # bytes of float32 weights up to which they are unpacked at load
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def build(
    model: Path, out: Path, target: str = "cpu", capacity: int | None = None, expanded: bool | None = None
) -> Manifest:
    """Build the engine directory `out` from the checkpoint directory `model`.

    Raises UserError for a checkpoint or target that Tandem cannot build."""
    if target not in TARGETS:
        raise UserError(f"--target {target}: unknown; this version builds {', '.join(TARGETS)}")
    out = out.resolve()  # the directory itself, not a link to it, is replaced
    _check_replaceable(out)
    checkpoint = Checkpoint.open(model)
    limit = checkpoint.config.max_position_embeddings
    if capacity is not None and not 1 <= capacity <= limit:
        raise UserError(f"--capacity {capacity}: expected 1 to {limit} (the model's max_position_embeddings)")
    out.parent.mkdir(parents=True, exist_ok=True)
    for note in checkpoint.notes:
        say(note)
    with _replaced(out) as directory:
        manifest = _fill(checkpoint, directory, target, capacity or limit, expanded)
        with _writing(directory / NAME):
            manifest.write(directory)
    say(f"engines for {target}: {out}")
    return manifest


def _fill(checkpoint: Checkpoint, directory: Path, target: str, capacity: int, expanded: bool | None) -> Manifest:
    with progress("writing the weights") as update:
        checkpoint.write_weights(directory / WEIGHTS, update)
    if expanded is None:
        codes = {"U8": 2}  # two weights a byte
        size = sum(4 * math.prod(t.shape) * codes.get(t.dtype, 1) for t in checkpoint.tensors.values())
        expanded = size <= EXPAND_BELOW
    graphs: tuple[str, ...] = GRAPHS if checkpoint.has_mtp else GRAPHS[:2]
    if target == "cuda":
        graphs, expanded = (), False  # kernels are launched from Python, and compiled for the GPU that runs them
    with progress("tracing the graphs") as update:
        for i, name in enumerate(graphs):
            update(i, len(graphs))
            weights = directory / WEIGHTS
            model = trace(name, checkpoint.config, checkpoint.tensors, checkpoint.formats, weights, expanded)
            with _writing(directory / f"{name}.onnx") as path:
                ir.save(model, path)
        update(len(graphs), len(graphs))
    for file in TEXT_FILES:
        if (checkpoint.directory / file).is_file():
            with _writing(directory / file) as path:
                shutil.copyfile(checkpoint.directory / file, path)
    sources, done = list(checkpoint.files()), 0
    total = sum(path.stat().st_size for path in [*sources, *directory.iterdir()])
    with progress("hashing") as update:

        def count(size: int) -> None:
            nonlocal done
            done += size
            update(done, total)

        source = {"name": checkpoint.directory.resolve().name, "files": describe(sources, count)}
        files = describe(directory.iterdir(), count)
    return Manifest(
        version=VERSION,
        target=target,
        config=checkpoint.config,
        formats=dict(checkpoint.formats),
        has_mtp=checkpoint.has_mtp,
        expanded=expanded,
        capacity=capacity,
        versions={name: importlib.metadata.version(name) for name in ("torch", "onnx", "onnxruntime")},
        source=source,
        files=files,
    )


def _check_replaceable(out: Path) -> None:
    """Raises UserError unless `out` is absent, an empty directory, or engines and nothing else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    found = read_json(out / NAME, "move the directory away or choose another --out") if (out / NAME).is_file() else {}
    files = found.get("files")
    if not isinstance(files, dict) or "target" not in found:
        raise UserError(f"{out}: exists and is not an engine directory; choose another --out or move it away")
    if others := sorted({path.name for path in out.iterdir()} - {NAME, *files}):
        raise UserError(f"{out}: holds {others[0]}, which is not of the engines; move it away or choose another --out")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[Path]:
    try:
        yield path
    except OSError as error:
        mend = "free some space or choose another directory"
        raise UserError(f"{path}: cannot be written ({error.strerror}); {mend}") from None


@contextlib.contextmanager
def _replaced(out: Path) -> Iterator[Path]:
    """Yields a new directory that takes the place of `out` if the block succeeds and vanishes if it does not."""
    _recover(out)
    fresh = out.parent / f".{out.name}.new-{os.getpid()}"
    old = out.parent / f".{out.name}.old-{os.getpid()}"
    fresh.mkdir()
    previous = signal.signal(signal.SIGTERM, _terminated)
    try:
        yield fresh
        if out.exists():
            out.rename(old)
        fresh.rename(out)  # an interrupt between the two ends in `finally`, which undoes the first
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        signal.signal(signal.SIGTERM, previous)


def _recover(out: Path) -> None:
    """What builds that were killed left behind: half-written engines go, engines that were set aside come back."""
    for kind in ("old", "new"):
        for left in out.parent.glob(f".{glob.escape(out.name)}.{kind}-*"):
            if _is_another_build(left.name.rpartition("-")[2]):
                continue
            if kind == "old" and not out.exists():
                left.rename(out)
            else:
                shutil.rmtree(left, ignore_errors=True)


def _is_another_build(pid: str) -> bool:
    """Whether a process with this number runs; this one's own number is a coincidence."""
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        pass  # somebody else's
    return int(pid) != os.getpid()


def _terminated(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    parser = Parser(prog="python -m engines.build", description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="Hugging Face checkpoint directory")
    parser.add_argument("--target", default="cpu", help=f"one of {', '.join(TARGETS)} (default cpu)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="engine directory (default build/<model>/<target>)")
    parser.add_argument("--capacity", type=int, metavar="N", help="positions of a run (default: the model's maximum)")
    options = parser.parse_args()
    model = options.model.expanduser()
    out = options.out or Path("build") / model.resolve().name / options.target
    build(model, out, options.target, options.capacity)


if __name__ == "__main__":
    run(main)
